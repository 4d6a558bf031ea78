// token_logprob on CUDA: forward one read of the logits, backward one read and one write.
//
// Shapes: logits [..., V] with any row strides, N rows; targets, mask, row_temperature, outputs: N.
// One block walks one row. Each thread keeps its own running (max, sum e^d, sum d e^d), d = z -
// max, over 16-byte loads; warps merge by shuffles and the block by shared memory, in a fixed
// order: results repeat bit for bit and do not depend on other rows, nor on where a row lies: in
// the forward the columns of a thread are the same at every alignment (off a 16-byte boundary it
// loads single elements), so a row of an odd V has the same log-prob wherever it stands in a batch.
// A target outside [0, V) is not read: its row's logprob and gradient are NaN (a check without a
// host sync).

#include "../token_logprob.h"
#include "device.cuh"
#include "launch.cuh"

namespace rl {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kVectorsPerBlock = 4;  // 16-byte vectors a thread handles in the backward

template <bool kCap, typename T, typename A>
__device__ __forceinline__ A logit(T x, const RowMaths<A>& f) {
  if constexpr (kCap) return f.softcap * tanh(load(x) * f.inv_softcap) * f.scale;
  return load(x) * f.scale;
}

// Running maximum and sums. Until a logit above -inf is seen, max is -inf and 0 stands in for it.
template <typename A>
struct Running {
  A max, sum, weighted;

  __device__ __forceinline__ static Running empty() { return {-A(INFINITY), A(0), A(0)}; }

  // Moves the maximum up to at least `to`.
  __device__ __forceinline__ void raise(A to) {
    if (!(to > max)) return;
    if (max > -A(INFINITY)) {
      const A shift = at_least(exp_floor<A>(), max - to);
      const A factor = exp_clamped(shift);
      weighted = factor * (weighted + sum * shift);
      sum *= factor;
    }
    max = to;
  }

  template <int kCount>
  __device__ __forceinline__ void add(const A (&z)[kCount]) {
    A top = z[0];
#pragma unroll
    for (int j = 1; j < kCount; ++j) top = z[j] > top ? z[j] : top;
    raise(top);
    const A base = max > -A(INFINITY) ? max : A(0);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const A d = at_least(exp_floor<A>(), z[j] - base);
      const A e = exp_clamped(d);
      sum += e;
      weighted += e * d;
    }
  }

  __device__ __forceinline__ void merge(Running other) {
    if (max > other.max) {
      other.raise(max);
    } else {
      raise(other.max);
    }
    sum += other.sum;
    weighted += other.weighted;
  }
};

template <typename A>
__device__ Running<A> merge_block(Running<A> mine) {
  __shared__ Running<A> of_warp[kWarps];
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    Running<A> other;
    other.max = __shfl_xor_sync(~0u, mine.max, lanes);
    other.sum = __shfl_xor_sync(~0u, mine.sum, lanes);
    other.weighted = __shfl_xor_sync(~0u, mine.weighted, lanes);
    mine.merge(other);
  }
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  Running<A> all = of_warp[0];
#pragma unroll 1
  for (int w = 1; w < kWarps; ++w) all.merge(of_warp[w]);
  return all;
}

template <typename T, bool kCap>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 3)  // fp64 must not spill
    token_logprob_fwd_kernel(const T* __restrict__ logits_ptr, RowsView view,
                             acc_t<T>* __restrict__ logprob_ptr, acc_t<T>* __restrict__ entropy_ptr,
                             acc_t<T>* __restrict__ stats_ptr) {
  using A = acc_t<T>;
  constexpr int kSize = Vector<T>::kSize;
  const int64_t r = blockIdx.x, count = view.rows.count, width = view.rows.width;
  if (!view.counts(r)) {
    if (threadIdx.x == 0)
      logprob_ptr[r] = entropy_ptr[r] = stats_ptr[r] = stats_ptr[count + r] =
          stats_ptr[2 * count + r] = A(0);
    return;
  }
  const RowMaths<A> f = view.maths<A>(r);
  const T* row = logits_ptr + view.rows.offset(r);
  // fp64 always loads single elements: it has no registers to spare.
  const bool aligned = kSize > 2 && reinterpret_cast<uintptr_t>(row) % 16 == 0;
  const int64_t vectors = width / kSize;
  Running<A> mine = Running<A>::empty();
#pragma unroll 1
  for (int64_t v = threadIdx.x; v < vectors; v += kThreads) {
    Vector<T> x;
    if (aligned) {
      x = read_vector(row + v * kSize);
    } else {
#pragma unroll
      for (int j = 0; j < kSize; ++j) x.at[j] = row[v * kSize + j];
    }
    A z[kSize];
#pragma unroll
    for (int j = 0; j < kSize; ++j) z[j] = logit<kCap>(x.at[j], f);
    mine.add(z);
  }
  // At most kSize - 1 elements behind the last vector.
  const int64_t single = vectors * kSize + threadIdx.x;
  if (single < width) {
    const A z[1] = {logit<kCap>(row[single], f)};
    mine.add(z);
  }
  const Running<A> all = merge_block(mine);
  if (threadIdx.x == 0) {
    const A log_sum = log(all.sum);
    const int64_t target = view.target(r);
    const bool inside = target >= 0 && target < width;
    const A z = inside ? logit<kCap>(row[target], f) : A(NAN);
    logprob_ptr[r] = (z - all.max) - log_sum;
    const A mean = all.weighted / all.sum;
    entropy_ptr[r] = log_sum - mean;
    stats_ptr[r] = all.max;
    stats_ptr[count + r] = log_sum;
    stats_ptr[2 * count + r] = mean;
  }
}

// dz_j = (g (1[j = t] - p_j) - h p_j (log p_j + entropy)) dz/dlogits; see csrc/cpu/logit_rows.h.
template <typename A>
struct RowGradient {
  A g, h, max, log_sum, mean;
  RowMaths<A> f;
  int64_t target;

  template <bool kCap, typename T>
  __device__ __forceinline__ A at(T x, int64_t column) const {
    A capped = load(x), chain = f.scale;
    if constexpr (kCap) {
      chain *= sech2(capped * f.inv_softcap);
      capped = f.softcap * tanh(capped * f.inv_softcap);
    }
    const A away = at_least(exp_floor<A>(), capped * f.scale - max);
    const A p = exp_clamped(at_least(exp_floor<A>(), away - log_sum));
    const A own = column == target ? g : A(0);
    return (own - p * (h * (away - mean) + g)) * chain;
  }
};

// out may be logits (no __restrict__): every element is read and written by the same thread.
template <typename T, bool kCap>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2)  // fp64 must not spill
    token_logprob_bwd_kernel(const T* logits_ptr, RowsView view, Upstream<acc_t<T>> upstream,
                             const acc_t<T>* __restrict__ stats_ptr, T* out_ptr, Rows out_rows) {
  using A = acc_t<T>;
  constexpr int kSize = Vector<T>::kSize;
  constexpr int64_t kSpan = int64_t(kThreads) * kVectorsPerBlock * kSize;
  const int64_t r = blockIdx.x, count = view.rows.count, width = view.rows.width;
  const T* row = logits_ptr + view.rows.offset(r);
  T* out = out_ptr + out_rows.offset(r);
  bool counts = view.counts(r);  // and carries a gradient: other rows are not read
  RowGradient<A> grad{};
  if (counts) {
    grad.target = view.target(r);
    grad.g = upstream.logprob ? upstream.logprob[r] : A(0);
    grad.h = upstream.entropy ? upstream.entropy[r] : A(0);
    counts = grad.g != A(0) || grad.h != A(0);
    if (grad.target < 0 || grad.target >= width) grad.g = A(NAN);
    grad.max = stats_ptr[r];
    grad.log_sum = stats_ptr[count + r];
    grad.mean = stats_ptr[2 * count + r];
    grad.f = view.maths<A>(r);
  }
  const int64_t head = misaligned_head(row, width);
  const bool vectorised = misaligned_head(out, width) == head;
  const int64_t vectors = vectorised ? (width - head) / kSize : 0;
  const int64_t first = blockIdx.y * int64_t(kThreads) * kVectorsPerBlock;
#pragma unroll
  for (int k = 0; k < kVectorsPerBlock; ++k) {
    const int64_t v = first + k * kThreads + threadIdx.x;
    if (v >= vectors) break;
    const int64_t start = head + v * kSize;
    Vector<T> y{};
    if (counts) {
      const Vector<T> x = read_vector(row + start);
#pragma unroll
      for (int j = 0; j < kSize; ++j) store(y.at[j], grad.template at<kCap>(x.at[j], start + j));
    }
    write_vector(out + start, y);
  }
  // What no vector covers: head and tail in the first block, or this block's span of a row whose
  // output is aligned otherwise than its input.
  const int64_t tail = head + vectors * kSize;
  const int64_t begin = vectorised ? 0 : blockIdx.y * kSpan;
  const int64_t singles = vectorised ? (blockIdx.y == 0 ? head + (width - tail) : 0) : kSpan;
  for (int64_t i = threadIdx.x; i < singles; i += kThreads) {
    const int64_t column = vectorised ? (i < head ? i : tail + (i - head)) : begin + i;
    if (column >= width) break;
    T y{};
    if (counts) store(y, grad.template at<kCap>(row[column], column));
    out[column] = y;
  }
}

// ---- launch
// --------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> token_logprob_fwd(Tensor logits, Tensor targets,
                                                     std::optional<Tensor> row_temperature,
                                                     double temperature, double softcap,
                                                     std::optional<Tensor> mask,
                                                     bool /*inplace_backward*/) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const Batch b = make_batch(logits, targets, row_temperature, temperature, softcap, mask);
  const ScalarType dtype = acc_dtype(logits.scalar_type());
  Tensor logprob = empty_like_device(logits, shape_of(targets), dtype);
  Tensor entropy = empty_like_device(logits, shape_of(targets), dtype);
  Tensor stats = empty_like_device(logits, {3, b.view.rows.count}, dtype);
  if (b.view.rows.count == 0) return {logprob, entropy, stats};
  dispatch_float(logits.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    auto* kernel =
        softcap > 0 ? token_logprob_fwd_kernel<T, true> : token_logprob_fwd_kernel<T, false>;
    launch("token_logprob_fwd", kernel, static_cast<unsigned>(b.view.rows.count), kThreads, 0,
           current_stream(logits), static_cast<const T*>(b.logits.const_data_ptr()), b.view,
           static_cast<A*>(logprob.mutable_data_ptr()), static_cast<A*>(entropy.mutable_data_ptr()),
           static_cast<A*>(stats.mutable_data_ptr()));
  });
  return {logprob, entropy, stats};
}

void run_backward(const Batch& b, const std::optional<Tensor>& grad_logprob,
                  const std::optional<Tensor>& grad_entropy, const Tensor& stats, const Tensor& out,
                  const Rows& out_rows) {
  const Rows& rows = b.view.rows;
  if (rows.count == 0 || rows.width == 0) return;
  const ScalarType dtype = acc_dtype(b.logits.scalar_type());
  std::optional<Tensor> g, h;
  if (grad_logprob) g = as_contiguous(*grad_logprob);
  if (grad_entropy) h = as_contiguous(*grad_entropy);
  for (const auto& grad : {g, h}) {
    RL_CHECK(!grad || (grad->scalar_type() == dtype && grad->numel() == rows.count),
             "upstream gradients must have the outputs' dtype and shape");
  }
  check_stats(b, stats);
  dispatch_float(b.logits.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const Upstream<A> upstream{g ? static_cast<const A*>(g->const_data_ptr()) : nullptr,
                               h ? static_cast<const A*>(h->const_data_ptr()) : nullptr};
    constexpr int64_t kSpan = int64_t(kThreads) * kVectorsPerBlock * Vector<T>::kSize;
    const dim3 grid(static_cast<unsigned>(rows.count),
                    static_cast<unsigned>((rows.width + kSpan - 1) / kSpan));
    auto* kernel =
        b.view.softcap > 0 ? token_logprob_bwd_kernel<T, true> : token_logprob_bwd_kernel<T, false>;
    launch("token_logprob_bwd", kernel, grid, kThreads, 0, current_stream(b.logits),
           static_cast<const T*>(b.logits.const_data_ptr()), b.view, upstream,
           static_cast<const A*>(stats.const_data_ptr()), static_cast<T*>(out.mutable_data_ptr()),
           out_rows);
  });
}

Tensor token_logprob_bwd(std::optional<Tensor> grad_logprob, std::optional<Tensor> grad_entropy,
                         Tensor logits, Tensor targets, Tensor stats,
                         std::optional<Tensor> row_temperature, double temperature, double softcap,
                         std::optional<Tensor> mask) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const Batch b = make_batch(logits, targets, row_temperature, temperature, softcap, mask);
  Tensor out = empty_like_device(logits, shape_of(logits), logits.scalar_type());
  Rows out_rows;
  rows_of(out, out_rows);
  run_backward(b, grad_logprob, grad_entropy, stats, out, out_rows);
  return out;
}

void token_logprob_bwd_(std::optional<Tensor> grad_logprob, std::optional<Tensor> grad_entropy,
                        Tensor logits, Tensor targets, Tensor stats,
                        std::optional<Tensor> row_temperature, double temperature, double softcap,
                        std::optional<Tensor> mask) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  Rows rows;
  RL_CHECK(rows_of(logits, rows),
           "an in-place backward needs logits with unit last stride and at most two row strides");
  const Batch b = make_batch(logits, targets, row_temperature, temperature, softcap, mask);
  run_backward(b, grad_logprob, grad_entropy, stats, logits, rows);
}

}  // namespace
}  // namespace rl

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CUDA, m) {
  m.impl("token_logprob_fwd", TORCH_BOX(&rl::token_logprob_fwd));
  m.impl("token_logprob_bwd", TORCH_BOX(&rl::token_logprob_bwd));
  m.impl("token_logprob_bwd_", TORCH_BOX(&rl::token_logprob_bwd_));
}
