// kl_reward on CUDA: r_t = -beta * kl_t, plus the score on the last unmasked token of each
// sequence.
//
// Shapes: logprob, ref_logprob, mask, outputs: [B, T], or [N] with cu_seqlens [B + 1]; score [B].
#include "sequence_scan.cuh"

namespace rl {
namespace {

std::tuple<Tensor, Tensor> kl_reward(Tensor logprob, Tensor ref_logprob, Tensor score, double beta,
                                     int64_t estimator, std::optional<Tensor> cu_seqlens,
                                     std::optional<Tensor> mask) {
  const torch::stable::accelerator::DeviceGuard guard(logprob.get_device_index());
  Tensor rewards = new_tokens(logprob);
  Tensor kl = new_tokens(logprob);
  with_acc(logprob, [&](auto zero) {
    using A = decltype(zero);
    SequenceArgs<A> p{};
    const auto cu = set_layout(p, logprob, cu_seqlens);
    set_kl(p, logprob, ref_logprob, score, beta, estimator, rewards, kl);
    p.mask = mask_like(mask, logprob);
    run_sequences<A, true, false>("kl_reward", p, logprob, false);
  });
  return {rewards, kl};
}

}  // namespace
}  // namespace rl

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CUDA, m) { m.impl("kl_reward", TORCH_BOX(&rl::kl_reward)); }
