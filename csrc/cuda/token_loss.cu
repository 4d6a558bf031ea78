// token_loss and token_loss_rows on CUDA: loss, log-probability, entropy and dL/dlogits with one
// read of the logits and one write of the gradient.
//
// Shapes: logits [..., V] with any row strides, N rows; targets, mask, the rows of LossArgs and
// outputs [N]; row_stats [2, N]. The gradient has the logits' type T, or a narrower type O.
//
// A cluster of 1 to 8 blocks processes one row. Each block copies its tiles (row_tiles.cuh) to
// shared memory unconverted and reduces them while later ones arrive. Every warp writes the sums of
// its tiles to the shared memory of all blocks of the cluster. After one cluster barrier, the first
// warp of each block merges all tiles in the same order and computes loss and grad_logprob; the
// block then writes gradients from shared memory. Several clusters share an SM, so one reads while
// another writes. Rows that do not fit, fp64, and soft-caps above kFastCap are processed by one
// block that reads the row twice.
//
// Results depend on V and dtype alone: no atomics. A target outside [0, V) is not read: its row is
// NaN (a check without a host sync).

#include "../common/token_loss.h"
#include "cluster.cuh"
#include "launch.cuh"
#include "softmax_row.cuh"

namespace rl {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * 32;
constexpr int kStages = 4;  // pipeline stages: early tiles are reduced while later ones arrive
constexpr int kTilePacks = 32 * kTileVectors;

// Blocks per SM: limits registers through __launch_bounds__, and plan_row() relies on it.
template <typename T, Cap kCap, bool kOnChip>
constexpr int kResident = is_rare<acc_t<T>, kCap>     ? 1
                          : kCap == kNoCap && kOnChip ? 3
                                                      : 2;

// Tiles of a row in shared memory (`chip`). Pack a of the chip is pack first * kTilePacks + a of
// the row, counted from the 16-byte boundary at or before its start. Elements outside the row are
// -inf; kCap: a soft-cap would make their z finite, so tiles at the end are guarded.
template <typename T, bool kAligned, bool kCap>
struct ChipTiles {
  static constexpr bool kReadsWhole = true, kGuards = kCap;
  const T* chip;
  int64_t first, width;
  int skew;

  __device__ __forceinline__ int64_t whole() const {
    return kCap ? width / kTileColumns<T> - first : kSlots;
  }
  __device__ __forceinline__ int64_t columns(int64_t tile) const {
    return width - (first + tile) * kTileColumns<T>;
  }
  __device__ __forceinline__ Tile<T> read(int64_t tile) const {
    constexpr int kSize = kPerVector<T>;
    Tile<T> x;
    const T* from = chip + (tile * kTilePacks + threadIdx.x % 32) * kSize;
#pragma unroll
    for (int k = 0; k < kTileVectors; ++k) {
      const T* at = from + k * 32 * kSize;
      if constexpr (kAligned) {
        x.vector[k] = *reinterpret_cast<const Pack<T>*>(at);
      } else if constexpr (sizeof(T) == 2) {
        x.vector[k] = unaligned_pack<T>(*reinterpret_cast<const Pack<T>*>(at),
                                        *reinterpret_cast<const Pack<T>*>(at + kSize), skew);
      } else {
#pragma unroll
        for (int i = 0; i < kSize; ++i) x.vector[k].word[i] = at[skew + i];
      }
    }
    return x;
  }
  __device__ __forceinline__ Tile<T> read_guarded(int64_t tile) const { return read(tile); }
};

// Starts asynchronous copies of this lane's packs among the first `packs` of a tile; elements
// outside the row become -inf. `to`, `column`: of the lane's first pack, which begins before the
// row if that is misaligned.
template <typename T>
__device__ __forceinline__ void copy_tile(T* to, const T* row, int column, int width, int packs) {
  constexpr int kSize = kPerVector<T>, kStep = 32 * kSize;
  const T* const from = row + column;
  if (packs == kTilePacks && column + (kTileVectors - 1) * kStep + kSize <= width) {
#pragma unroll
    for (int k = 0; k < kTileVectors; ++k) copy_async(to + k * kStep, from + k * kStep);
    return;
  }
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int k = 0; k * 32 + lane < packs; ++k) {
    const int there = column + k * kStep;
    if (there + kSize <= width) {
      copy_async(to + k * kStep, row + there);
    } else {
      *reinterpret_cast<Pack<T>*>(to + k * kStep) = guarded_pack(row, there, width);
    }
  }
}

// Broadcasts the result of make(), called by the first warp only, to the block: the other warps do
// not repeat its instructions.
template <typename Make>
__device__ __forceinline__ auto from_first_warp(const Make& make) {
  using X = decltype(make());
  __shared__ alignas(16) unsigned char bytes[sizeof(X)];
  if (threadIdx.x < 32) {
    const X x = make();
    if (threadIdx.x == 0) *reinterpret_cast<X*>(bytes) = x;
  }
  __syncthreads();
  return *reinterpret_cast<const X*>(bytes);
}

// grad_ptr: null if only the values are wanted. It may be the logits (hence no __restrict__): each
// element is read and written by the same thread, and the target's logit is read before any write.
template <typename T, typename O, Cap kCap, bool kOnChip, bool kEntropy>
__global__ void __launch_bounds__(kThreads, kResident<T, kCap, kOnChip>)
    token_loss_fwd_kernel(const T* logits_ptr, RowArgs args, LossArgs<acc_t<T>> loss,
                          LossOutputs<acc_t<T>> to, O* grad_ptr, RowLayout grad_rows) {
  using A = acc_t<T>;
  constexpr int64_t kColumns = kTileColumns<T>;
  extern __shared__ int4 chip_bytes[];
  __shared__ Slots<A> slots;
  T* const chip = reinterpret_cast<T*>(chip_bytes);
  const int blocks = kOnChip ? cluster_size() : 1, rank = kOnChip ? cluster_rank() : 0;
  const int64_t r = blockIdx.x / blocks, width = args.rows.width;
  const int tiles = static_cast<int>((width + kColumns - 1) / kColumns);
  const int each = (tiles + blocks - 1) / blocks, first = rank * each;
  const int count = max(0, min(each, tiles - first));
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const T* const row = logits_ptr + args.rows.offset(r);
  O* const out = grad_ptr ? grad_ptr + grad_rows.offset(r) : nullptr;
  // This block's share of the row. Recomputed where it is needed, to save registers.
  const auto share_of_row = [&] {
    const int64_t begin = int64_t{first} * kTilePacks;
    return Share<T>(row, width, begin, begin + int64_t{each} * kTilePacks, rank == 0);
  };
  const bool writer = rank == 0 && thread == 0;  // writes the per-row outputs
  if (!args.counts(r)) {
    if (writer) to.put(r, args.rows.count, {0, 0}, 0, 0, {0, 0, 0});
    if (out) zero_row(out, width, rank, blocks);
    return;
  }

  const int skew = skew_of(row);
  // Tiles per stage, a multiple of the warps, and stages that the block's share fills.
  const int stage = (count + kStages * kWarps - 1) / (kStages * kWarps) * kWarps;
  const int stages = count > 0 ? (count + stage - 1) / stage : 0;
  if constexpr (kOnChip) {
    cluster_arrive();  // this block has started
    // In an aligned row each thread copies the packs that it will reduce.
    constexpr int kStep = kWarps * static_cast<int>(kColumns);
    const int end = static_cast<int>(width), mine = lane * kPerVector<T>;
    const int column = first * static_cast<int>(kColumns) - skew + mine;
    // All advance by addition, so that the compiler does not compute them again for each tile.
    int i = warp, at = column + warp * static_cast<int>(kColumns);
    T* to = chip + mine + warp * static_cast<int>(kColumns);
#pragma unroll 1
    for (int s = 0; s < stages; ++s) {
      for (; i < min(count, (s + 1) * stage); i += kWarps, at += kStep, to += kStep) {
        copy_tile(to, row, at, end, kTilePacks);
      }
      // A misaligned tile ends in the pack after it.
      if (s == stages - 1 && skew > 0 && warp == 0) {
        const int last = count * static_cast<int>(kColumns);
        copy_tile(chip + mine + last, row, column + last, end, 1);
      }
      close_copies();
    }
#pragma unroll 1
    for (int s = stages; s < kStages; ++s) close_copies();  // the wait below counts kStages
  }
  // Overlaps with the copies.
  const Exponent<A, kCap> exponent(args.transform<A>(r));
  const int64_t target = args.target(r);
  const bool inside = target >= 0 && target < width;
  const A target_logit = inside ? load(row[target]) : A(0);
  const int64_t single_at = share_of_row().single;
  const A single = single_at < width ? load(row[single_at]) : A(0);

  Partial<A> all;
  if constexpr (kOnChip) {
    cluster_wait();  // all blocks have started
    const auto publish = [&](int i, const Partial<A>& part) {
      if (lane < blocks) {
        store_remote(&slots.max[first + i], lane, part.max);
        store_remote(&slots.sum[first + i], lane, part.sum);
        if constexpr (kEntropy) store_remote(&slots.weighted[first + i], lane, part.weighted);
      }
    };
    if (skew == 0) {
#pragma unroll 1
      for (int s = 0; s < stages; ++s) {
        wait_copies(kStages - 1 - s);
        const int begin = min(count, s * stage);
        reduce_tiles<false, kEntropy>(
            ChipTiles<T, true, kCap != kNoCap>{chip, first, width, 0}, begin,
            min(count, begin + stage) - begin, exponent, A(0),
            [&](int i, const Partial<A>& part) { publish(begin + i, part); });
      }
    } else {
      wait_copies(0);
      __syncthreads();  // copies of other threads
      reduce_tiles<false, kEntropy>(ChipTiles<T, false, kCap != kNoCap>{chip, first, width, skew},
                                    0, count, exponent, A(0), publish);
    }
    __syncwarp();
    cluster_arrive();
    cluster_wait();  // the sums of all tiles have arrived, and the copies of other threads
    all = from_first_warp([&] { return merge_slots<false, kEntropy>(slots, tiles, exponent); });
  } else {
    all = reduce_row<kEntropy>(row, width, exponent, slots);
  }
  const bool far = exponent.far(all.max);
  if (far) {
    all = reduce_row_far<kEntropy>(row, width, exponent, slots, all.max);
    if constexpr (kOnChip) {  // all blocks have read the row before any writes
      cluster_arrive();
      cluster_wait();
    }
  }

  const auto grad = from_first_warp([&] {
    const RowSums<A, kCap> sums(exponent, all, far);
    const A logprob = inside ? sums.logprob(target_logit) : A(NAN);
    TokenTerm<A> term = loss.term(r, logprob);
    if (!inside) term.grad_logprob = A(NAN);
    if (writer) {
      to.put(r, args.rows.count, term, logprob, sums.shifted_lse - sums.shifted_mean,
             sums.row_stats);
    }
    const A h = kEntropy ? loss.grad_entropy(r) : A(0);
    return RowGradient<A, kCap, kEntropy>(exponent, sums.row_stats, term.grad_logprob, h);
  });
  if (out == nullptr) return;
  if (grad.g_row == A(0) && grad.h_row == A(0)) return zero_row(out, width, rank, blocks);

  const Share<T> share = share_of_row();
  const T* from = row + share.column(0);
  if constexpr (kOnChip) {
    from = chip + (share.first - int64_t{first} * kTilePacks) * kPerVector<T>;
  }
  write_share<kThreads>(grad, share, from, single, out);
  // The target's element again, by the thread that wrote it.
  if (inside && share.owns(target)) store(out[target], grad.at_target(target_logit));
}

// grad[r] *= upstream[r]. A row with 1 is neither read nor written; one with 0 is not read.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    token_loss_bwd_kernel(T* grad_ptr, RowLayout rows, const acc_t<T>* __restrict__ upstream_ptr,
                          int64_t stride_upstream) {
  using A = acc_t<T>;
  using W = Words<T>;
  for (int64_t r = blockIdx.x; r < rows.count; r += gridDim.x) {
    const A factor = upstream_ptr[r * stride_upstream];
    if (factor == A(1)) continue;
    T* const row = grad_ptr + rows.offset(r);
    const auto share = Share<T>::even(row, rows.width, blockIdx.y, gridDim.y);
    if (factor == A(0)) {
      zero_row(row, rows.width, blockIdx.y, gridDim.y);
      continue;
    }
    for (int v = threadIdx.x; v < share.count; v += kThreads) {
      Pack<T> x = read_pack(row + share.column(v));
#pragma unroll
      for (int i = 0; i < Pack<T>::kWords; ++i) {
        A both[W::kPerWord];
        W::unpack(x.word[i], both);
#pragma unroll
        for (int j = 0; j < W::kPerWord; ++j) both[j] *= factor;
        x.word[i] = W::pack(both);
      }
      write_pack(row + share.column(v), x);
    }
    if (share.single < rows.width) store(row[share.single], load(row[share.single]) * factor);
  }
}

// ---- launch -----------------------------------------------------------------------------------

int device_limit(cudaDeviceAttr which, int device) {
  int value = 0;
  RL_CHECK(cudaDeviceGetAttribute(&value, which, device) == cudaSuccess,
           "token_loss: cannot read the limits of the device");
  return value;
}

// How a row is held in shared memory: blocks per cluster (0: not at all) and bytes per block.
struct Plan {
  int blocks = 0;
  int64_t bytes = 0;
};

// The fewest blocks per row that allow most_resident blocks per SM, so that some read while others
// reduce or write; if none do, fewer resident blocks. A single resident block cannot overlap reads
// with writes: without clusters (one block per row) the two-read path is taken instead.
template <typename Kernel>
Plan plan_row(Kernel* kernel, int device, int most_resident, int64_t tiles, int64_t tile_bytes) {
  cudaFuncAttributes compiled;
  RL_CHECK(cudaFuncGetAttributes(&compiled, kernel) == cudaSuccess,
           "token_loss: the extension has no kernel for this device");
  const int64_t of_system = 1024;  // bytes per block reserved by CUDA
  const int64_t fixed = static_cast<int64_t>(compiled.sharedSizeBytes);
  const int64_t per_sm = device_limit(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  const int64_t per_block = device_limit(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const int most = cluster_limit(compiled);
  if (tiles > kSlots) return {};
  for (int resident = most_resident; resident >= (most > 1 ? 1 : 2); --resident) {
    for (int blocks = 1; blocks <= most; blocks *= 2) {
      // 16: the pack after a misaligned share.
      const int64_t bytes = (tiles + blocks - 1) / blocks * tile_bytes + 16;
      if (bytes + fixed <= per_block && (bytes + fixed + of_system) * resident <= per_sm) {
        return {blocks, bytes};
      }
    }
  }
  return {};
}

template <typename T, typename O, Cap kCap, bool kEntropy>
void launch_fwd(const RowInputs& in, const LossArgs<acc_t<T>>& loss,
                const LossOutputs<acc_t<T>>& to, O* grad, const RowLayout& grad_rows) {
  const RowLayout& rows = in.args.rows;
  const T* logits = static_cast<const T*>(in.logits.const_data_ptr());
  const cudaStream_t stream = current_stream(in.logits);
  // Without gradients, every path reads the row once.
  if constexpr (!is_rare<acc_t<T>, kCap>) {
    auto* kernel = token_loss_fwd_kernel<T, O, kCap, true, kEntropy>;
    Plan plan;
    if (grad) {
      plan = plan_row(kernel, in.logits.get_device_index(), kResident<T, kCap, true>,
                      (rows.width + kTileColumns<T> - 1) / kTileColumns<T>, 16 * kTilePacks);
    }
    if (plan.blocks > 0) {
      const auto bytes = static_cast<int>(plan.bytes);
      const bool allowed =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) ==
              cudaSuccess &&
          cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared) == cudaSuccess;
      RL_CHECK(allowed, "token_loss: cannot reserve ", bytes, " bytes of shared memory");
      const dim3 grid(static_cast<unsigned>(rows.count * plan.blocks));
      return launch_clusters("token_loss_fwd", kernel, grid, dim3(kThreads), plan.bytes,
                             static_cast<unsigned>(plan.blocks), stream, logits, in.args, loss, to,
                             grad, grad_rows);
    }
  }
  launch("token_loss_fwd", token_loss_fwd_kernel<T, O, kCap, false, kEntropy>,
         dim3(static_cast<unsigned>(rows.count)), dim3(kThreads), 0, stream, logits, in.args, loss,
         to, grad, grad_rows);
}

// `to`: LossTensors or RowPassTensors. `out`: output of the gradient, or null.
template <typename Outputs>
void run(const RowInputs& in, const LossInputs& loss, const Outputs& to, bool entropy,
         const Tensor* out, const RowLayout& out_rows) {
  const RowLayout& rows = in.args.rows;
  if (rows.count == 0) return;
  RL_CHECK(rows.width < int64_t{1} << 30 && rows.count < int64_t{1} << 27,
           "token_loss takes fewer than 2^30 classes and 2^27 rows");
  const ScalarType dtype = in.logits.scalar_type();
  dispatch_gradient(dtype, out ? out->scalar_type() : dtype, [&](auto tag, auto of_out) {
    using T = decltype(tag);
    using O = decltype(of_out);
    using A = acc_t<T>;
    dispatch_cap<T>(in.args.softcap, entropy, [&](auto cap, auto entropy_too) {
      launch_fwd<T, O, cap(), entropy_too()>(
          in, loss.args<A>(), to.template outputs<A>(),
          out ? static_cast<O*>(out->mutable_data_ptr()) : nullptr, out_rows);
    });
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_loss_fwd(
    Tensor logits, Tensor targets, std::optional<Tensor> advantages,
    std::optional<Tensor> old_logprob, MoreTensors more, double low, double high, double dual_clip,
    OptionNumbers options, std::optional<Tensor> row_temperature, double temperature,
    double softcap, std::optional<Tensor> mask, std::optional<Tensor> scale_tensor, double scale) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const RowInputs in = row_inputs(logits, targets, row_temperature, temperature, softcap, mask);
  const PolicyArguments policy{advantages, old_logprob, more, low, high, dual_clip, options};
  const LossInputs loss = loss_inputs(in, policy, scale_tensor, scale);
  const LossTensors to = new_outputs(in, targets);
  run(in, loss, to, false, nullptr, RowLayout{});
  return {to.loss, to.logprob, to.grad_logprob, to.row_stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_loss_fwd_(
    Tensor logits, Tensor targets, std::optional<Tensor> advantages,
    std::optional<Tensor> old_logprob, MoreTensors more, double low, double high, double dual_clip,
    OptionNumbers options, std::optional<Tensor> row_temperature, double temperature,
    double softcap, std::optional<Tensor> mask, std::optional<Tensor> scale_tensor, double scale,
    Tensor out) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const RowInputs in = row_inputs(logits, targets, row_temperature, temperature, softcap, mask);
  const PolicyArguments policy{advantages, old_logprob, more, low, high, dual_clip, options};
  const LossInputs loss = loss_inputs(in, policy, scale_tensor, scale);
  const LossTensors to = new_outputs(in, targets);
  run(in, loss, to, false, &out, gradient_layout(logits, out));
  return {to.loss, to.logprob, to.grad_logprob, to.row_stats};
}

void token_loss_rows_(Tensor logits, Tensor targets, std::optional<Tensor> advantages,
                      std::optional<Tensor> old_logprob, MoreTensors more, double low, double high,
                      double dual_clip, OptionNumbers options, double entropy_coef,
                      std::optional<Tensor> row_temperature, double temperature, double softcap,
                      std::optional<Tensor> mask, Tensor scale, Tensor dlogits, Tensor logprob,
                      std::optional<Tensor> entropy, std::optional<Tensor> grad_logprob) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const RowInputs in = row_inputs(logits, targets, row_temperature, temperature, softcap, mask);
  const PolicyArguments policy{advantages, old_logprob, more, low, high, dual_clip, options};
  const LossInputs loss = loss_inputs(in, policy, scale, 1, entropy_coef);
  const RowPassTensors to(in, logprob, entropy, grad_logprob, entropy_coef);
  run(in, loss, to, entropy.has_value(), &dlogits, gradient_layout(logits, dlogits, true));
}

void token_loss_bwd_(Tensor grad, Tensor upstream) {
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  RowLayout rows;
  RL_CHECK(row_layout(grad, rows), "grad must have unit last stride and at most two row strides");
  const RowScales scales = row_scales(grad, upstream, rows);
  if (rows.count == 0 || rows.width == 0) return;
  dispatch_float(grad.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    // Most upstream gradients are 1: few blocks check many rows each. Few rows get several blocks
    // each.
    const int64_t across = std::min<int64_t>(rows.count, 1024);
    const int64_t vectors = rows.width / kPerVector<T>;
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
  m.impl("token_loss_rows_", TORCH_BOX(&rl::token_loss_rows_));
  m.impl("token_loss_bwd_", TORCH_BOX(&rl::token_loss_bwd_));
}
