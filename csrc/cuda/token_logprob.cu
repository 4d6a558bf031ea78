// token_logprob on CUDA: forward one read of the logits, backward one read and one write.
//
// Shapes: logits [..., V] with any row strides, N rows; targets, mask, row_temperature, logprob,
// entropy [N]; row_stats [3, N] = (row_max, shifted_lse, shifted_mean).
//
// Forward, one block per row; softmax_row.cuh gives the order of its sums. Backward, enough blocks
// per row to fill the device. A target outside [0, V) is not read: logprob and gradient of its row
// are NaN (a check without a host sync).

#include "launch.cuh"
#include "softmax_row.cuh"

namespace rl {
namespace {

// Few warps per block: while a block waits at its only barrier, other blocks use the SM.
constexpr int kForwardThreads = 128, kBackwardThreads = 256;

// Minimum blocks per SM for __launch_bounds__: the most that leave each variant enough registers.
template <typename T, Cap kCap>
constexpr int kForwardBlocks = is_rare<acc_t<T>, kCap> ? 1
                               : kCap == kNoCap        ? 5
                                                       : 4;
template <typename T, Cap kCap>
constexpr int kBackwardBlocks = is_rare<acc_t<T>, kCap> ? 1
                                : kCap == kNoCap        ? 3
                                                        : 2;

template <typename T, Cap kCap, bool kEntropy>
__global__ void __launch_bounds__(kForwardThreads, kForwardBlocks<T, kCap>)
    token_logprob_fwd_kernel(const T* __restrict__ logits_ptr, RowArgs args,
                             acc_t<T>* __restrict__ logprob_ptr, acc_t<T>* __restrict__ entropy_ptr,
                             acc_t<T>* __restrict__ row_stats_ptr) {
  using A = acc_t<T>;
  __shared__ Slots<A> slots;
  const int64_t r = blockIdx.x, count = args.rows.count, width = args.rows.width;
  if (!args.counts(r)) {
    if (threadIdx.x == 0)
      logprob_ptr[r] = entropy_ptr[r] = row_stats_ptr[r] = row_stats_ptr[count + r] =
          row_stats_ptr[2 * count + r] = A(0);
    return;
  }
  const T* row = logits_ptr + args.rows.offset(r);
  const Exponent<A, kCap> exponent(args.transform<A>(r));
  Partial<A> all = reduce_row<kEntropy>(row, width, exponent, slots);
  const bool far = exponent.far(all.max);
  if (far) all = reduce_row_far<kEntropy>(row, width, exponent, slots, all.max);
  if (threadIdx.x == 0) {
    const RowSums<A, kCap> sums(exponent, all, far);
    const int64_t target = args.target(r);
    const bool inside = target >= 0 && target < width;
    logprob_ptr[r] = inside ? sums.logprob(load(row[target])) : A(NAN);
    entropy_ptr[r] = kEntropy ? sums.shifted_lse - sums.shifted_mean : A(0);
    row_stats_ptr[r] = sums.row_stats.row_max;
    row_stats_ptr[count + r] = sums.row_stats.shifted_lse;
    row_stats_ptr[2 * count + r] = kEntropy ? sums.row_stats.shifted_mean : A(0);
  }
}

// out may be logits (no __restrict__): every element is read and written by the same thread.
template <typename T, typename O, Cap kCap, bool kEntropy>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks<T, kCap>)
    token_logprob_bwd_kernel(const T* logits_ptr, RowArgs args, Upstream<acc_t<T>> upstream,
                             const acc_t<T>* __restrict__ row_stats_ptr, O* out_ptr,
                             RowLayout out_rows) {
  using A = acc_t<T>;
  const int64_t r = blockIdx.x, count = args.rows.count, width = args.rows.width;
  const T* row = logits_ptr + args.rows.offset(r);
  O* out = out_ptr + out_rows.offset(r);
  const A g = upstream.logprob ? upstream.logprob[r] : A(0);
  const A h = kEntropy && upstream.entropy ? upstream.entropy[r] : A(0);
  if (!args.counts(r) || (g == A(0) && h == A(0))) {  // the logits are not read
    zero_row(out, width, blockIdx.y, gridDim.y);
    return;
  }
  const int64_t target = args.target(r);
  const bool inside = target >= 0 && target < width;
  const RowStats<A> row_stats{row_stats_ptr[r], row_stats_ptr[count + r],
                              row_stats_ptr[2 * count + r]};
  const RowGradient<A, kCap, kEntropy> grad(Exponent<A, kCap>(args.transform<A>(r)), row_stats,
                                            inside ? g : A(NAN), h);
  const auto share = Share<T>::even(row, width, blockIdx.y, gridDim.y);
  // Elements of this thread that write_gradient() does not handle. Read before they are
  // overwritten.
  const A single = share.single < width ? load(row[share.single]) : A(0);
  const bool has_target = inside && share.owns(target);
  const A target_logit = has_target ? load(row[target]) : A(0);
  write_share<kBackwardThreads>(grad, share, row + share.column(0), single, out);
  if (has_target) store(out[target], grad.at_target(target_logit));
}

// ---- launch -----------------------------------------------------------------------------------

// Blocks that keep a large device busy in the backward.
constexpr int64_t kFill = 2048;

std::tuple<Tensor, Tensor, Tensor> token_logprob_fwd(Tensor logits, Tensor targets,
                                                     std::optional<Tensor> row_temperature,
                                                     double temperature, double softcap,
                                                     std::optional<Tensor> mask, bool with_entropy,
                                                     bool /*inplace_backward*/) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const RowInputs in = row_inputs(logits, targets, row_temperature, temperature, softcap, mask);
  const ScalarType dtype = acc_dtype(logits.scalar_type());
  Tensor logprob = empty_like_device(logits, shape_of(targets), dtype);
  Tensor entropy = empty_like_device(logits, shape_of(targets), dtype);
  Tensor row_stats = empty_like_device(logits, {3, in.args.rows.count}, dtype);
  if (in.args.rows.count == 0) return {logprob, entropy, row_stats};
  dispatch_float(logits.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const int64_t tiles = in.args.rows.width / kTileColumns<T> + 1;
    const auto threads = static_cast<unsigned>(32 * std::min<int64_t>(tiles, kForwardThreads / 32));
    dispatch_cap<T>(softcap, with_entropy, [&](auto cap, auto entropy_too) {
      launch("token_logprob_fwd", token_logprob_fwd_kernel<T, cap(), entropy_too()>,
             static_cast<unsigned>(in.args.rows.count), threads, 0, current_stream(logits),
             static_cast<const T*>(in.logits.const_data_ptr()), in.args,
             static_cast<A*>(logprob.mutable_data_ptr()),
             static_cast<A*>(entropy.mutable_data_ptr()),
             static_cast<A*>(row_stats.mutable_data_ptr()));
    });
  });
  return {logprob, entropy, row_stats};
}

void run_backward(const RowInputs& in, const std::optional<Tensor>& grad_logprob,
                  const std::optional<Tensor>& grad_entropy, const Tensor& row_stats,
                  const Tensor& out, const RowLayout& out_rows) {
  const RowLayout& rows = in.args.rows;
  if (rows.count == 0 || rows.width == 0) return;
  const ScalarType dtype = acc_dtype(in.logits.scalar_type());
  std::optional<Tensor> g, h;
  if (grad_logprob) g = as_contiguous(*grad_logprob);
  if (grad_entropy) h = as_contiguous(*grad_entropy);
  for (const auto& grad : {g, h}) {
    RL_CHECK(!grad || (grad->scalar_type() == dtype && grad->numel() == rows.count),
             "upstream gradients must have the outputs' dtype and shape");
  }
  check_stats(in, row_stats);
  dispatch_gradient(in.logits.scalar_type(), out.scalar_type(), [&](auto tag, auto of_out) {
    using T = decltype(tag);
    using O = decltype(of_out);
    using A = acc_t<T>;
    const Upstream<A> upstream{g ? static_cast<const A*>(g->const_data_ptr()) : nullptr,
                               h ? static_cast<const A*>(h->const_data_ptr()) : nullptr};
    // A block amortises its setup over many packs. Few rows are split over several blocks.
    const int64_t packs = rows.width / kPerVector<T> + 2;
    const int64_t split =
        std::min((packs + kBackwardThreads - 1) / kBackwardThreads, kFill / rows.count + 1);
    const dim3 grid(static_cast<unsigned>(rows.count), static_cast<unsigned>(split));
    dispatch_cap<T>(in.args.softcap, upstream.entropy != nullptr, [&](auto cap, auto entropy_too) {
      launch("token_logprob_bwd", token_logprob_bwd_kernel<T, O, cap(), entropy_too()>, grid,
             kBackwardThreads, 0, current_stream(in.logits),
             static_cast<const T*>(in.logits.const_data_ptr()), in.args, upstream,
             static_cast<const A*>(row_stats.const_data_ptr()),
             static_cast<O*>(out.mutable_data_ptr()), out_rows);
    });
  });
}

Tensor token_logprob_bwd(std::optional<Tensor> grad_logprob, std::optional<Tensor> grad_entropy,
                         Tensor logits, Tensor targets, Tensor row_stats,
                         std::optional<Tensor> row_temperature, double temperature, double softcap,
                         std::optional<Tensor> mask) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const RowInputs in = row_inputs(logits, targets, row_temperature, temperature, softcap, mask);
  Tensor out = empty_like_device(logits, shape_of(logits), logits.scalar_type());
  RowLayout out_rows;
  row_layout(out, out_rows);
  run_backward(in, grad_logprob, grad_entropy, row_stats, out, out_rows);
  return out;
}

void token_logprob_bwd_(std::optional<Tensor> grad_logprob, std::optional<Tensor> grad_entropy,
                        Tensor logits, Tensor targets, Tensor row_stats,
                        std::optional<Tensor> row_temperature, double temperature, double softcap,
                        std::optional<Tensor> mask, Tensor out) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const RowInputs in = row_inputs(logits, targets, row_temperature, temperature, softcap, mask);
  run_backward(in, grad_logprob, grad_entropy, row_stats, out, gradient_layout(logits, out, true));
}

}  // namespace
}  // namespace rl

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CUDA, m) {
  m.impl("token_logprob_fwd", TORCH_BOX(&rl::token_logprob_fwd));
  m.impl("token_logprob_bwd", TORCH_BOX(&rl::token_logprob_bwd));
  m.impl("token_logprob_bwd_", TORCH_BOX(&rl::token_logprob_bwd_));
}
