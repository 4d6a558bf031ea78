// masked_whiten on CPU: out = (x - mean) / sqrt(var + 1e-8) over the unmasked elements.
//
// Shapes: x, mask, out [N] or [B, T].
#include "whiten.h"

namespace rl {
namespace {

Tensor masked_whiten(const Tensor& x, const std::optional<Tensor>& mask, bool shift_mean,
                     bool unbiased) {
  Tensor out = new_tokens(x);
  const Mask keep(mask, x.numel());
  with_acc(x, [&](auto zero) {
    using A = decltype(zero);
    whiten<A>(Tokens(x), keep, shift_mean, unbiased, static_cast<A*>(out.mutable_data_ptr()));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CPU, m) { m.impl("masked_whiten", TORCH_BOX(&masked_whiten)); }

}  // namespace rl
