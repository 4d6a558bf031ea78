// kl_gae on CUDA: KL-penalised rewards, GAE and returns in one launch; whitening takes a second
// one.
//
// Shapes: logprob, ref_logprob, values, mask, outputs: [B, T], or [N] with cu_seqlens [B + 1];
// score [B].
#include "sequence_scan.cuh"

namespace rl {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> kl_gae(Tensor logprob, Tensor ref_logprob, Tensor score,
                                                  Tensor values, double beta, int64_t estimator,
                                                  double gamma, double lam, bool whiten,
                                                  std::optional<Tensor> cu_seqlens,
                                                  std::optional<Tensor> mask) {
  const torch::stable::accelerator::DeviceGuard guard(logprob.get_device_index());
  Tensor advantages = new_tokens(logprob);
  Tensor returns = new_tokens(logprob);
  Tensor rewards = new_tokens(logprob);
  Tensor kl = new_tokens(logprob);
  with_acc(logprob, [&](auto zero) {
    using A = decltype(zero);
    SequenceArgs<A> p{};
    const auto cu = set_layout(p, logprob, cu_seqlens);
    set_kl(p, logprob, ref_logprob, score, beta, estimator, rewards, kl);
    set_gae(p, logprob, values, gamma, lam, advantages, returns);
    p.mask = mask_like(mask, logprob);
    run_sequences<A, true, true>("kl_gae", p, logprob, whiten);
  });
  return {advantages, returns, rewards, kl};
}

}  // namespace
}  // namespace rl

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CUDA, m) { m.impl("kl_gae", TORCH_BOX(&rl::kl_gae)); }
