// gae on CPU: A_t = delta_t + gamma * lam * A_{t+1}, R_t = A_t + V_t, optionally whitened.
#include "gae_scan.h"
#include "whiten.h"

namespace rl {
namespace {

Tensor gae(const Tensor& rewards, const Tensor& values, double gamma, double lam,
           const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& mask,
           const std::optional<Tensor>& bootstrap, bool whitened) {
  RL_CHECK(rewards.numel() == values.numel(), "rewards and values differ in size");
  Tensor out = new_stacked_tokens(rewards, 2);
  const Sequences sequences(rewards, cu_seqlens);
  const Mask keep(mask, rewards.numel());
  with_acc(rewards, [&](auto zero) {
    using A = decltype(zero);
    A* const advantages = static_cast<A*>(out.mutable_data_ptr());
    A* const returns = advantages + rewards.numel();
    const GivenRewards<A> given(rewards);
    const GaeScan<A, GivenRewards<A>> scan(
        given, values, keep, per_sequence<A>(bootstrap, sequences.count(), "bootstrap"), gamma, lam,
        advantages, returns);
    scan.run(sequences);
    if (whitened)
      whiten<A>(Tokens(advantages, rewards.numel()), keep, true, true, advantages, true);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CPU, m) { m.impl("gae", TORCH_BOX(&gae)); }

}  // namespace rl
