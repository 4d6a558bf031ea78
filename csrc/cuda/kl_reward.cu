// kl_reward on CUDA: r_t = -beta * kl_t, plus the score on the last unmasked token of each
// sequence.
//
// Shapes: logprob, ref_logprob, mask, outputs: [B, T], or [N] with cu_seqlens [B + 1]; score [B].
#include "sequence_scan.cuh"

namespace rl {
namespace {

Tensor kl_reward(Tensor logprob, Tensor ref_logprob, Tensor score, double beta, int64_t estimator,
                 std::optional<Tensor> cu_seqlens, std::optional<Tensor> mask) {
  const torch::stable::accelerator::DeviceGuard guard(logprob.get_device_index());
  Tensor out = new_stacked_tokens(logprob, 2);
  with_acc(logprob, [&](auto zero) {
    using A = decltype(zero);
    SequenceArgs<A> p{};
    const auto cu = set_layout(p, logprob, cu_seqlens);
    A* const rewards_ptr = output<A>(out);
    set_kl(p, logprob, ref_logprob, score, beta, estimator, rewards_ptr, rewards_ptr + p.tokens);
    p.mask = mask_like(mask, logprob);
    run_sequences<A, true, false>("kl_reward", p, logprob, false);
  });
  return out;
}

}  // namespace
}  // namespace rl

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CUDA, m) { m.impl("kl_reward", TORCH_BOX(&rl::kl_reward)); }
