// token_loss on CUDA: loss, log-probability and dL/dlogits with one read and one write of the
// logits.
//
// Shapes: logits [..., V] with any row strides, N rows; targets, advantages, old_logprob, mask,
// outputs: N. A cluster of 1 to 8 blocks takes one row. Each block copies its share into shared
// memory as it is, in 16-byte vectors that the copying thread alone uses, and reduces (max, sum)
// while they arrive; every warp leaves its pair in the shared memory of all blocks of the cluster,
// and after one barrier each thread merges all pairs in the same order, knows the row's loss and
// its slope, and writes gradients from shared memory. Several clusters share a multiprocessor: one
// reads while another writes. Where the row does not fit (or for fp64) one block takes the row and
// reads it twice, the second time backwards, what was read last first: it may still be in a cache.
//
// Order and bits depend on V, dtype and the alignment of the row alone: no atomics, no neighbours.
// A target outside [0, V) is not read: its row is NaN (a check without a host sync).

#include "../token_loss.h"
#include "cluster.cuh"
#include "device.cuh"
#include "launch.cuh"
#include "loss_rows.cuh"

namespace rl {
namespace {

constexpr int kStages = 4;  // groups of copies: the first are reduced while the last arrive

template <typename T>
__device__ __forceinline__ void zero_row(T* out, int width, int rank, int blocks) {
  const Share<T> share(out, width, rank, blocks);
  for (int v = threadIdx.x; v < share.count; v += kThreads) {
    write_vector(out + share.column(v), Vector<T>{});
  }
  if (share.single < width) out[share.single] = T{};
}

// dL/dlogits_j = slope (1[j = target] - p_j) dz_j/dlogits_j.
template <typename A>
struct RowGradient {
  A c, b, factor;  // factor: -slope dz/du / sum e
  RowMaths<A> f;

  template <bool kCap, typename T>
  __device__ __forceinline__ A at(T x) const {
    const A p = exp2_fast(std::fma(unscaled<kCap>(x, f), c, -b)) * factor;
    if constexpr (kCap) return p * sech2(load(x) * f.inv_softcap);
    return p;
  }
};

// grad_ptr: nullptr where only the values are wanted; may be the logits (no __restrict__: the
// thread that reads an element writes it, and all have read the target's before any writes).
template <typename T, bool kCap, bool kOnChip>
__global__ void __launch_bounds__(kThreads, std::is_same_v<T, double> ? 1 : 2)
    token_loss_fwd_kernel(const T* logits_ptr, RowsView view, LossView<acc_t<T>> loss,
                          LossOutputs<acc_t<T>> to, T* grad_ptr, Rows grad_rows) {
  using A = acc_t<T>;
  constexpr int kSize = Vector<T>::kSize;
  constexpr int kSlots = kOnChip ? kMaxCluster * kWarps : kWarps;
  extern __shared__ int4 chip_bytes[];
  __shared__ A slot_max[kSlots];
  __shared__ A slot_sum[kSlots];
  T* const chip = reinterpret_cast<T*>(chip_bytes);
  const int blocks = kOnChip ? cluster_size() : 1, rank = kOnChip ? cluster_rank() : 0;
  const int64_t r = blockIdx.x / blocks, rows = view.rows.count;
  const int width = static_cast<int>(view.rows.width), thread = threadIdx.x;
  const T* const row = logits_ptr + view.rows.offset(r);
  T* const out = grad_ptr ? grad_ptr + grad_rows.offset(r) : nullptr;
  const bool speaker = rank == 0 && thread == 0;  // writes the row's values
  if (!view.counts(r)) {
    if (speaker) to.loss[r] = to.logprob[r] = to.slope[r] = to.stats[r] = to.stats[rows + r] = A(0);
    if (out) zero_row(out, width, rank, blocks);
    return;
  }

  if constexpr (kOnChip) cluster_arrive();  // "this block has started"
  const Share<T> share(row, width, rank, blocks);
  const int stage = ((share.count + kStages - 1) / kStages + kThreads - 1) / kThreads * kThreads;
  if constexpr (kOnChip) {
#pragma unroll 1
    for (int s = 0; s < kStages; ++s) {
      const int end = min(share.count, (s + 1) * stage);
      for (int v = s * stage + thread; v < end; v += kThreads) {
        copy_async(chip + v * kSize, row + share.column(v));
      }
      close_copies();
    }
  }
  // While the copies are under way.
  const RowMaths<A> f = view.maths<A>(r);
  const A dz_du = kCap ? f.softcap * f.scale : f.scale;
  const A c = dz_du * A(1.4426950408889634);
  const int64_t target = view.target(r);
  const bool inside = target >= 0 && target < width;
  const T target_logit = inside ? row[target] : T{};
  const T single = share.single < width ? row[share.single] : T{};

  Running<A> all = Running<A>::empty();
  const auto add = [&](int begin, int end) {
    for (int v = begin + thread; v < end; v += kThreads) {
      const T* const from = kOnChip ? chip + v * kSize : row + share.column(v);
      Vector<T> x;
      *reinterpret_cast<int4*>(&x) = *reinterpret_cast<const int4*>(from);
      A u[kSize];
#pragma unroll
      for (int j = 0; j < kSize; ++j) u[j] = unscaled<kCap>(x.at[j], f);
      all.add(u, c);
    }
  };
  if (share.single < width) {
    const A u[1] = {unscaled<kCap>(single, f)};
    all.add(u, c);
  }
  if constexpr (kOnChip) {
#pragma unroll 1
    for (int s = 0; s < kStages; ++s) {
      wait_copies(kStages - 1 - s);
      add(s * stage, min(share.count, (s + 1) * stage));
    }
  } else {
    add(0, share.count);
  }

  // Every warp's pair to every block; then all threads merge the same pairs in the same order.
  all.merge_warp(c);
  const int lane = thread % 32, warp = thread / 32;
  if constexpr (kOnChip) {
    __syncwarp();
    cluster_wait();  // all blocks have started
    if (lane < blocks) {
      store_remote(&slot_max[rank * kWarps + warp], lane, all.max);
      store_remote(&slot_sum[rank * kWarps + warp], lane, all.sum);
    }
    __syncwarp();
    cluster_arrive();
    cluster_wait();
  } else {
    if (lane == 0) {
      slot_max[warp] = all.max;
      slot_sum[warp] = all.sum;
    }
    __syncthreads();
  }
  all = Running<A>::empty();
  for (int s = lane; s < blocks * kWarps; s += 32) all.merge({slot_max[s], slot_sum[s]}, c);
  all.merge_warp(c);

  // log of the sum of e^(z - max z): the sum is of 2^(c u - b), and b is c max u rounded.
  const A b = all.base(c);
  const A log_sum = log(all.sum) - std::fma(all.max, c, -b) * A(0.6931471805599453);
  const A u_target = inside ? unscaled<kCap>(target_logit, f) : A(NAN);
  const A logprob = log_softmax(u_target, all.max, log_sum, kCap ? f.softcap : A(1), f);
  TokenTerm<A> term = loss.term(r, logprob);
  if (!inside) term.slope = A(NAN);
  if (speaker) {
    to.loss[r] = term.loss;
    to.logprob[r] = logprob;
    to.slope[r] = term.slope;
    to.stats[r] = all.max * dz_du;
    to.stats[rows + r] = log_sum;
  }
  if (out == nullptr) return;
  if (term.slope == A(0)) return zero_row(out, width, rank, blocks);

  const RowGradient<A> grad{c, b, -term.slope * f.scale / all.sum, f};
  const bool vectorised = misaligned_head(out, width) == share.head;
  // From the last vector to the first.
  const int own = (share.count - thread + kThreads - 1) / kThreads;
  for (int i = own - 1; i >= 0; --i) {
    const int v = i * kThreads + thread, column = share.column(v);
    Vector<T> x;
    if constexpr (kOnChip) {
      *reinterpret_cast<int4*>(&x) = *reinterpret_cast<const int4*>(chip + v * kSize);
    } else {
      x = read_vector(row + column);
    }
#pragma unroll
    for (int j = 0; j < kSize; ++j) store(x.at[j], grad.template at<kCap>(x.at[j]));
    if (vectorised) {
      write_vector(out + column, x);
    } else {
#pragma unroll
      for (int j = 0; j < kSize; ++j) out[column + j] = x.at[j];
    }
  }
  if (share.single < width) store(out[share.single], grad.template at<kCap>(single));
  // The target's element once more, by the thread that wrote it: 1 - p without cancellation.
  const int64_t v = (target - share.head) / kSize - share.first;
  const bool in_vectors = target >= share.head && v >= 0 && v < share.count;
  if (inside && (in_vectors ? v % kThreads == thread : share.single == target)) {
    A chain = f.scale;
    if constexpr (kCap) chain *= sech2(load(target_logit) * f.inv_softcap);
    store(out[target], -term.slope * std::expm1(logprob) * chain);
  }
}

// grad[r] *= upstream[r] where that is not 1: a row with 1 is not touched, one with 0 not read.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    token_loss_bwd_kernel(T* grad_ptr, Rows rows, const acc_t<T>* __restrict__ upstream_ptr,
                          int64_t stride_upstream) {
  using A = acc_t<T>;
  for (int64_t r = blockIdx.x; r < rows.count; r += gridDim.x) {
    const A factor = upstream_ptr[r * stride_upstream];
    if (factor == A(1)) continue;
    T* const row = grad_ptr + rows.offset(r);
    const Share<T> share(row, static_cast<int>(rows.width), blockIdx.y, gridDim.y);
    const auto scaled = [&](T x) {
      T y{};
      if (factor != A(0)) store(y, load(x) * factor);
      return y;
    };
    for (int v = threadIdx.x; v < share.count; v += kThreads) {
      Vector<T> x{};
      if (factor != A(0)) x = read_vector(row + share.column(v));
#pragma unroll
      for (int j = 0; j < Vector<T>::kSize; ++j) x.at[j] = scaled(x.at[j]);
      write_vector(row + share.column(v), x);
    }
    if (share.single < rows.width) row[share.single] = scaled(row[share.single]);
  }
}

// ---- launch
// --------------------------------------------------------------------------------------------------------

int device_limit(cudaDeviceAttr which, int device) {
  int value = 0;
  RL_CHECK(cudaDeviceGetAttribute(&value, which, device) == cudaSuccess,
           "token_loss: the device does not tell its limits");
  return value;
}

// How a row is kept on chip: blocks of a cluster (0: not at all) and bytes of shared memory each.
struct Plan {
  int blocks = 0;
  int64_t bytes = 0;
};

// As few blocks a row as leave room for three blocks a multiprocessor, so that some read while
// others reduce or write; else for two, else for one. One alone cannot overlap reading and writing:
// without clusters (one block a row) the two-read path is taken instead.
template <typename Kernel>
Plan plan_row(Kernel* kernel, int device, int64_t row_bytes) {
  cudaFuncAttributes compiled;
  RL_CHECK(cudaFuncGetAttributes(&compiled, kernel) == cudaSuccess,
           "token_loss: no kernel for this device in the extension");
  const int64_t of_system = 1024;  // bytes a block
  const int64_t fixed = static_cast<int64_t>(compiled.sharedSizeBytes);
  const int64_t per_sm = device_limit(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  const int64_t per_block = device_limit(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const int most = cluster_limit(compiled);
  for (int resident = 3; resident >= (most > 1 ? 1 : 2); --resident) {
    for (int blocks = 1; blocks <= most; blocks *= 2) {
      const int64_t bytes = (row_bytes / 16 + blocks - 1) / blocks * 16;
      if (bytes + fixed <= per_block && (bytes + fixed + of_system) * resident <= per_sm) {
        return {blocks, bytes};
      }
    }
  }
  return {};
}

template <typename T, bool kCap>
void launch_fwd(const Batch& b, const LossView<acc_t<T>>& loss, const LossOutputs<acc_t<T>>& to,
                T* grad, const Rows& grad_rows) {
  const Rows& rows = b.view.rows;
  const T* logits = static_cast<const T*>(b.logits.const_data_ptr());
  const cudaStream_t stream = current_stream(b.logits);
  // Without gradients one read is enough anyway.
  if constexpr (!std::is_same_v<T, double>) {
    auto* kernel = token_loss_fwd_kernel<T, kCap, true>;
    Plan plan;
    if (grad) {
      plan = plan_row(kernel, b.logits.get_device_index(),
                      rows.width * static_cast<int64_t>(sizeof(T)));
    }
    if (plan.blocks > 0) {
      const auto bytes = static_cast<int>(plan.bytes);
      const bool allowed =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) ==
              cudaSuccess &&
          cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared) == cudaSuccess;
      RL_CHECK(allowed, "token_loss: the device refuses ", bytes, " bytes of shared memory");
      const dim3 grid(static_cast<unsigned>(rows.count * plan.blocks));
      return launch_clusters("token_loss_fwd", kernel, grid, dim3(kThreads), plan.bytes,
                             static_cast<unsigned>(plan.blocks), stream, logits, b.view, loss, to,
                             grad, grad_rows);
    }
  }
  launch("token_loss_fwd", token_loss_fwd_kernel<T, kCap, false>,
         dim3(static_cast<unsigned>(rows.count)), dim3(kThreads), 0, stream, logits, b.view, loss,
         to, grad, grad_rows);
}

LossTensors run(const Batch& b, const LossInputs& loss, const Tensor& targets, const Tensor* out,
                const Rows& out_rows) {
  const LossTensors to = new_outputs(b, targets);
  const Rows& rows = b.view.rows;
  if (rows.count == 0) return to;
  RL_CHECK(rows.width < int64_t{1} << 30 && rows.count < int64_t{1} << 27,
           "token_loss takes less than 2^30 classes and 2^27 rows");
  dispatch_float(b.logits.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    auto* launch_rows = b.view.softcap > 0 ? launch_fwd<T, true> : launch_fwd<T, false>;
    launch_rows(b, loss.view<A>(), to.outputs<A>(),
                out ? static_cast<T*>(out->mutable_data_ptr()) : nullptr, out_rows);
  });
  return to;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_loss_fwd(
    Tensor logits, Tensor targets, std::optional<Tensor> advantages,
    std::optional<Tensor> old_logprob, double clip, double dual_clip,
    std::optional<Tensor> row_temperature, double temperature, double softcap,
    std::optional<Tensor> mask, std::optional<Tensor> scale_tensor, double scale) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const Batch b = make_batch(logits, targets, row_temperature, temperature, softcap, mask);
  const LossInputs loss =
      make_loss(b, advantages, old_logprob, clip, dual_clip, scale_tensor, scale);
  const LossTensors to = run(b, loss, targets, nullptr, Rows{});
  return {to.loss, to.logprob, to.slope, to.stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_loss_fwd_(
    Tensor logits, Tensor targets, std::optional<Tensor> advantages,
    std::optional<Tensor> old_logprob, double clip, double dual_clip,
    std::optional<Tensor> row_temperature, double temperature, double softcap,
    std::optional<Tensor> mask, std::optional<Tensor> scale_tensor, double scale, Tensor out) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const Batch b = make_batch(logits, targets, row_temperature, temperature, softcap, mask);
  const LossInputs loss =
      make_loss(b, advantages, old_logprob, clip, dual_clip, scale_tensor, scale);
  const LossTensors to = run(b, loss, targets, &out, gradient_rows(logits, out));
  return {to.loss, to.logprob, to.slope, to.stats};
}

void token_loss_bwd_(Tensor grad, Tensor upstream) {
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  Rows rows;
  RL_CHECK(rows_of(grad, rows), "grad must have unit last stride and at most two row strides");
  const RowScales scales = row_scales(grad, upstream, rows);
  if (rows.count == 0 || rows.width == 0) return;
  dispatch_float(grad.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    // Mostly nothing is to be done: few blocks that look at many rows; more a row where rows are
    // few.
    const int64_t across = std::min<int64_t>(rows.count, 1024);
    const int64_t vectors = rows.width / Vector<T>::kSize;
    const int64_t down = std::clamp<int64_t>(vectors / kThreads, 1, 1024 / across);
    launch("token_loss_bwd", token_loss_bwd_kernel<T>,
           dim3(static_cast<unsigned>(across), static_cast<unsigned>(down)), dim3(kThreads), 0,
           current_stream(grad), static_cast<T*>(grad.mutable_data_ptr()), rows,
           static_cast<const acc_t<T>*>(scales.keep.const_data_ptr()), scales.step);
  });
}

}  // namespace
}  // namespace rl

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CUDA, m) {
  m.impl("token_loss_fwd", TORCH_BOX(&rl::token_loss_fwd));
  m.impl("token_loss_fwd_", TORCH_BOX(&rl::token_loss_fwd_));
  m.impl("token_loss_bwd_", TORCH_BOX(&rl::token_loss_bwd_));
}
