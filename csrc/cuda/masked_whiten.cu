// masked_whiten on CUDA: (x - mean) / sqrt(var + 1e-8) over the unmasked elements, in two launches.
//
// Shapes: x, mask, out [N] or [B, T].
#include "whiten.cuh"

namespace rl {
namespace {

Tensor masked_whiten(Tensor x, std::optional<Tensor> mask, bool shift_mean, bool unbiased) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const TokenView view = view_of(x, "x");
  const TokenView mask_view = mask_like(mask, x);
  Tensor out = new_tokens(x);
  if (x.numel() == 0) return out;
  const Tiles tiles = tiles_of(x, {view, mask_view, view_of(out, "out")});
  const unsigned blocks = whiten_blocks(tiles);
  const Tensor partials = new_partials(x, blocks);
  const cudaStream_t stream = current_stream(x);
  with_acc(x, [&](auto zero) {
    using A = decltype(zero);
    launch("masked_whiten", whiten_sums_kernel<A>, blocks, kWhitenThreads, 0, stream, view,
           mask_view, tiles, static_cast<PivotedSums*>(partials.mutable_data_ptr()));
    whiten_from<A>("masked_whiten", view, mask_view, tiles, partials, shift_mean, unbiased,
                   static_cast<A*>(out.mutable_data_ptr()), stream);
  });
  return out;
}

}  // namespace
}  // namespace rl

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CUDA, m) {
  m.impl("masked_whiten", TORCH_BOX(&rl::masked_whiten));
}
