// gae on CUDA: A_t = delta_t + gamma * lam * A_{t+1}, R_t = A_t + V_t, optionally whitened.
//
// Shapes: rewards, values, mask, outputs: [B, T], or [N] with cu_seqlens [B + 1]; bootstrap [B].
#include "sequence_scan.cuh"

namespace rl {
namespace {

Tensor gae(Tensor rewards, Tensor values, double gamma, double lam,
           std::optional<Tensor> cu_seqlens, std::optional<Tensor> mask,
           std::optional<Tensor> bootstrap, bool whiten) {
  const torch::stable::accelerator::DeviceGuard guard(rewards.get_device_index());
  Tensor out = new_stacked_tokens(rewards, 2);
  with_acc(rewards, [&](auto zero) {
    using A = decltype(zero);
    SequenceArgs<A> p{};
    const auto cu = set_layout(p, rewards, cu_seqlens);
    p.given_rewards = view_of(rewards, "rewards");
    p.bootstrap = per_sequence(p, bootstrap, "bootstrap");
    A* const advantages_ptr = output<A>(out);
    set_gae(p, rewards, values, gamma, lam, advantages_ptr, advantages_ptr + p.tokens);
    p.mask = mask_like(mask, rewards);
    run_sequences<A, false, true>("gae", p, rewards, whiten);
  });
  return out;
}

}  // namespace
}  // namespace rl

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CUDA, m) { m.impl("gae", TORCH_BOX(&rl::gae)); }
