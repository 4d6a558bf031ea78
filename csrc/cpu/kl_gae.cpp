// kl_gae on CPU: KL-penalised rewards, GAE, returns and whitening; rewards are still in L1 when the
// scan reads them.
#include "gae_scan.h"
#include "kl.h"
#include "whiten.h"

namespace rl {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> kl_gae(const Tensor& logprob, const Tensor& ref_logprob,
                                                  const Tensor& score, const Tensor& values,
                                                  double beta, int64_t estimator, double gamma,
                                                  double lam, bool whitened,
                                                  const std::optional<Tensor>& cu_seqlens,
                                                  const std::optional<Tensor>& mask) {
  RL_CHECK(logprob.numel() == values.numel(), "logprob and values differ in size");
  Tensor advantages = new_tokens(logprob);
  Tensor returns = new_tokens(logprob);
  Tensor rewards = new_tokens(logprob);
  Tensor kl = new_tokens(logprob);
  const Sequences sequences(logprob, cu_seqlens);
  const Mask keep(mask, logprob.numel());
  with_acc(logprob, [&](auto zero) {
    using A = decltype(zero);
    A* out = static_cast<A*>(advantages.mutable_data_ptr());
    const KlRewards<A> shaped(logprob, ref_logprob,
                              per_sequence<A>(score, sequences.count(), "score"), keep, beta,
                              estimator, static_cast<A*>(rewards.mutable_data_ptr()),
                              static_cast<A*>(kl.mutable_data_ptr()));
    const GaeScan<A, KlRewards<A>> scan(shaped, values, keep, {}, gamma, lam, out,
                                        static_cast<A*>(returns.mutable_data_ptr()));
    scan.run(sequences);
    if (whitened) whiten<A>(Tokens(advantages), keep, true, true, out);
  });
  return {advantages, returns, rewards, kl};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CPU, m) { m.impl("kl_gae", TORCH_BOX(&kl_gae)); }

}  // namespace rl
