// kl_gae on CPU: KL-penalised rewards, GAE, returns and whitening; rewards are still in L1 when the
// scan reads them.
#include "gae_scan.h"
#include "kl.h"
#include "whiten.h"

namespace rl {
namespace {

Tensor kl_gae(const Tensor& logprob, const Tensor& ref_logprob, const Tensor& score,
              const Tensor& values, double beta, int64_t estimator, double gamma, double lam,
              bool whitened, const std::optional<Tensor>& cu_seqlens,
              const std::optional<Tensor>& mask) {
  RL_CHECK(logprob.numel() == values.numel(), "logprob and values differ in size");
  Tensor out = new_stacked_tokens(logprob, 4);
  const Sequences sequences(logprob, cu_seqlens);
  const Mask keep(mask, logprob.numel());
  with_acc(logprob, [&](auto zero) {
    using A = decltype(zero);
    A* const advantages = static_cast<A*>(out.mutable_data_ptr());
    A* const returns = advantages + logprob.numel();
    A* const rewards = returns + logprob.numel();
    A* const kl = rewards + logprob.numel();
    const KlRewards<A> shaped(logprob, ref_logprob,
                              per_sequence<A>(score, sequences.count(), "score"), keep, beta,
                              estimator, rewards, kl);
    const GaeScan<A, KlRewards<A>> scan(shaped, values, keep, {}, gamma, lam, advantages, returns);
    scan.run(sequences);
    if (whitened)
      whiten<A>(Tokens(advantages, logprob.numel()), keep, true, true, advantages, true);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CPU, m) { m.impl("kl_gae", TORCH_BOX(&kl_gae)); }

}  // namespace rl
