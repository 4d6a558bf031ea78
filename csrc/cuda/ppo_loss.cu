// ppo_loss on CUDA: loss, gradients and metrics in one launch, one read of every token.
//
// Shapes: tokens [N] or [B, T] with any strides, N in all; metrics [kMetrics].
//
// A warp takes a tile of 128 tokens; block b takes tiles 8 b to 8 b + 7, then those 8 * blocks
// later, and so on, and writes one PpoTotals. The last block to finish merges them in block order,
// so no sum depends on which block that is.
//
// Gradients need 1 / n, the number of unmasked tokens, so every block needs a count of the whole
// mask. It counts one slice, publishes the count, and then counts only slices whose count is not
// published yet. No block waits for another.
#include "../common/ppo.h"
#include "block_reduce.cuh"
#include "grid_sync.cuh"
#include "token_reader.cuh"

namespace rl {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxBlocks = kThreads;  // the last block reads one total per thread
constexpr int64_t kSlice = 65536;     // minimum bytes of mask per published count

// Sums of a warp or block in fp64. Variances use PivotedSums, which merge without division.
struct PpoTotals {
  double sum[kMetrics] = {};  // kRatioMax: a maximum; kExplainedVariance: unused
  PivotedSums target, error;

  __device__ __forceinline__ PpoSums<double> sums() const {
    PpoSums<double> out;
#pragma unroll
    for (int i = 0; i < kMetrics; ++i) out.sum[i] = sum[i];
    out.target = target.moments();
    out.error = error.moments();
    return out;
  }
};
constexpr int64_t kTotalWords = sizeof(PpoTotals) / sizeof(double);

// Reduces the metrics over a warp: sums, and a maximum for kRatioMax.
template <typename S>
__device__ __forceinline__ void sum_metrics(S (&sum)[kMetrics]) {
#pragma unroll 1
  for (int lanes = 16; lanes > 0; lanes /= 2) {
#pragma unroll
    for (int i = 0; i < kMetrics; ++i) {
      if (i == kExplainedVariance) continue;
      const S other = __shfl_xor_sync(kAllLanes, sum[i], lanes);
      if (i == kRatioMax) {
        sum[i] = sum[i] < other ? other : sum[i];
      } else {
        sum[i] += other;
      }
    }
  }
}

__device__ __forceinline__ PpoTotals warp_total(PpoTotals x) {
  sum_metrics(x.sum);
  x.target = warp_total(x.target);
  x.error = warp_total(x.error);
  return x;
}

// Sums of a thread. Metrics are reduced in A within a warp, in fp64 beyond it.
template <typename A>
struct PpoTerms {
  A sum[kMetrics] = {};
  PivotedValues<A, A> target, error;
};
template <typename A>
__device__ __forceinline__ PpoTotals warp_total(PpoTerms<A> x) {
  sum_metrics(x.sum);
  PpoTotals out;
#pragma unroll
  for (int i = 0; i < kMetrics; ++i) out.sum[i] = x.sum[i];
  out.target = warp_total(x.target.sums());
  out.error = warp_total(x.error.sums());
  return out;
}

template <typename A>
struct PpoCall {
  TokenView logprob, old_logprob, advantages, values, old_values, returns, entropy, mask;
  Tiles tiles;
  A low, high, dual_clip, value_clip;
  double value_coef, entropy_coef;
  A *grad_logprob, *grad_values, *grad_entropy;  // outputs; null: not wanted
  A* loss;
  float* metrics;
  int blocks;
  int slices;      // of the mask, at most kMaxBlocks; 0: no mask
  int64_t slice;   // tiles per slice
  Flags flags;     // [slices + blocks]
  int64_t* kept;   // [slices]: unmasked tokens
  double* totals;  // [kTotalWords, blocks]
};

// How many of sixteen mask bytes are not 0.
__device__ __forceinline__ int count_bytes(uint4 v) {
  const uint32_t ones = (nonzero_bytes(v.x) >> 7) + (nonzero_bytes(v.y) >> 7) +
                        (nonzero_bytes(v.z) >> 7) + (nonzero_bytes(v.w) >> 7);
  return static_cast<int>((ones * 0x01010101u) >> 24);
}

// Number of unmasked tokens of a slice; called by a whole block.
template <typename A>
__device__ __forceinline__ int64_t count_slice(const PpoCall<A>& call, int slice) {
  const int64_t first = slice * call.slice;
  const int64_t end =
      first + call.slice < call.tiles.count() ? first + call.slice : call.tiles.count();
  int64_t tile = first, kept = 0;
  if (call.tiles.width == call.tiles.tokens && call.mask.vector != 0 &&
      reinterpret_cast<uintptr_t>(call.mask.data) % 16 == 0) {
    // Vectors of sixteen mask bytes. The loop over tiles below handles the rest.
    const int64_t whole = end * kTile <= call.tiles.tokens ? end : end - 1;
    const int64_t vectors = whole > first ? (whole - first) * (kTile / 16) : 0;
#pragma unroll 8
    for (int64_t i = threadIdx.x; i < vectors; i += kThreads)
      kept += count_bytes(reinterpret_cast<const uint4*>(call.mask.data + first * kTile)[i]);
    tile = whole > first ? whole : first;
  }
#pragma unroll 1
  for (tile += threadIdx.x / 32; tile < end; tile += kWarps)
    kept += __popc(read_mask(call.mask, call.tiles, call.tiles.at(tile)));
  return block_sum(kept);
}

// Number of all unmasked tokens. Blocks start at different slices, so each counts few itself.
template <typename A>
__device__ __forceinline__ int64_t count_kept(const PpoCall<A>& call) {
  __shared__ int nearest;
  const int mine = static_cast<int>(threadIdx.x);
  int slice = static_cast<int>(blockIdx.x) % call.slices;
  while (true) {
    const int64_t counted = count_slice(call, slice);
    if (call.slices == 1) return counted;
    if (mine == 0) {
      nearest = call.slices;
      call.kept[slice] = counted;
      call.flags.raise(slice);
    }
    __syncthreads();
    int64_t published = 0;
    if (mine < call.slices) {
      if (call.flags.is_up(mine)) {
        __threadfence();
        published = *static_cast<const volatile int64_t*>(call.kept + mine);
      } else {
        atomicMin(&nearest, mine > slice ? mine - slice : mine - slice + call.slices);
      }
    }
    published = block_sum(published);
    if (nearest == call.slices) return published;
    slice = (slice + nearest) % call.slices;
  }
}

// Reads several tensors of one tile. Reads of tensors of type A are in flight together. 16-bit
// tensors and tiles that span rows are rare and are read one after the other, which keeps the code
// small: in a launch of a few microseconds, loading instructions takes measurable time.
template <typename A>
struct TileReader {
  const Tiles& tiles;
  const int64_t tile;
  const Place place;
  A* const stage;
  unsigned own = 0;  // bit per tensor: the lane already holds its own four tokens

  template <unsigned kBit>
  __device__ __forceinline__ RawTile<A> start(const TokenView& view) {
    constexpr TokenKind kKind = std::is_same_v<A, double> ? TokenKind::f64 : TokenKind::f32;
    RawTile<A> raw{};
    if (view.data == nullptr) return raw;
    if (view.kind == kKind && tiles.in_one_row(place)) {
      if (fetch(view, place, raw)) own |= kBit;
    } else {
      own |= kBit;
      A x[kPerLane];
      read_across(view, tiles, tile, stage, x);
      as_raw(x, raw);
    }
    return raw;
  }
  // The lane's tokens, with masked ones set to 0, so that masked values never enter a sum.
  template <unsigned kBit>
  __device__ __forceinline__ void finish(const RawTile<A>& raw, unsigned keep,
                                         A (&x)[kPerLane]) const {
    as_numbers(raw, x);
    if (!(own & kBit)) to_own_tokens(stage, x);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) x[j] = keep >> j & 1u ? x[j] : A(0);
  }
};

template <typename A>
__global__ void __launch_bounds__(kThreads, sizeof(A) == 4 ? 2 : 1)
    ppo_loss_fwd_kernel(const PpoCall<A> call) {
  __shared__ alignas(16) A stages[kWarps][kTile];
  const int block = static_cast<int>(blockIdx.x), warp = threadIdx.x / 32;
  const bool has_values = call.values.data != nullptr;
  const bool has_old_values = call.old_values.data != nullptr;
  double normaliser = call.tiles.tokens > 0 ? static_cast<double>(call.tiles.tokens) : 1.0;
  bool counted = call.slices == 0;
  PpoTerms<A> mine;
  // count_kept() is called by the whole block, so every warp executes the first round.
  for (int64_t first = int64_t(block) * kWarps; first < call.tiles.count();
       first += int64_t(call.blocks) * kWarps) {
    const int64_t tile = first + warp;
    const bool here = tile < call.tiles.count();
    const Place place = here ? call.tiles.at(tile) : Place{0, 0, 0};
    TileReader<A> reader{call.tiles, tile, place, stages[warp]};
    const auto raw_logprob = reader.template start<1>(call.logprob);
    const auto raw_old_logprob = reader.template start<2>(call.old_logprob);
    const auto raw_advantages = reader.template start<4>(call.advantages);
    const auto raw_values = reader.template start<8>(call.values);
    const auto raw_old_values = reader.template start<16>(call.old_values);
    const auto raw_returns = reader.template start<32>(call.returns);
    const auto raw_entropy = reader.template start<64>(call.entropy);
    const unsigned keep = read_mask(call.mask, call.tiles, place);
    if (!counted) {  // overlaps with the reads above
      const int64_t count = count_kept(call);
      normaliser = count > 0 ? static_cast<double>(count) : 1.0;
      counted = true;
    }
    if (!here) continue;

    A logprob[kPerLane], old_logprob[kPerLane], advantage[kPerLane];
    reader.template finish<1>(raw_logprob, keep, logprob);
    reader.template finish<2>(raw_old_logprob, keep, old_logprob);
    reader.template finish<4>(raw_advantages, keep, advantage);
    A grad_logprob[kPerLane], grad_value[kPerLane] = {};
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      const PolicyTerm<A> term = policy_term(logprob[k], old_logprob[k], advantage[k], call.low,
                                             call.high, call.dual_clip);
      const A ratio = keep >> k & 1u ? term.ratio : A(0);
      mine.sum[kPolicyLoss] += term.loss;
      mine.sum[kApproxKl] += term.kl;
      mine.sum[kClipFraction] += term.clipped;
      mine.sum[kRatioMean] += ratio;
      mine.sum[kRatioMax] = ratio > mine.sum[kRatioMax] ? ratio : mine.sum[kRatioMax];
      grad_logprob[k] = term.grad;
    }
    if (has_values) {
      A value[kPerLane], old_value[kPerLane], wanted[kPerLane], error[kPerLane];
      reader.template finish<8>(raw_values, keep, value);
      reader.template finish<32>(raw_returns, keep, wanted);
      reader.template finish<16>(raw_old_values, keep, old_value);
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) {
        const A old = has_old_values ? old_value[k] : value[k];
        const ValueTerm<A> term = value_term(value[k], old, wanted[k], call.value_clip);
        mine.sum[kValueLoss] += term.loss;
        mine.sum[kValueClipFraction] += term.clipped;
        grad_value[k] = term.grad;
        error[k] = value[k] - wanted[k];
      }
      mine.target.add(wanted, keep);
      mine.error.add(error, keep);
    }
    if (call.entropy.data != nullptr) {
      A entropy[kPerLane];
      reader.template finish<64>(raw_entropy, keep, entropy);
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) mine.sum[kEntropy] += entropy[k];
    }

    const A per_token = static_cast<A>(1 / normaliser);
    const A value_weight = static_cast<A>(call.value_coef) * per_token;
    const A entropy_weight = -static_cast<A>(call.entropy_coef) * per_token;
    A grad_entropy[kPerLane];
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      grad_logprob[k] *= per_token;
      grad_value[k] *= value_weight;
      grad_entropy[k] = keep >> k & 1u ? entropy_weight : A(0);
    }
    const auto write = [&](A* to, const A(&x)[kPerLane]) {
      if (to != nullptr) write_tile(to + tile * kTile, place.count, stages[warp], x);
    };
    write(call.grad_logprob, grad_logprob);
    write(call.grad_values, grad_value);
    write(call.grad_entropy, grad_entropy);
  }
  PpoTotals all = block_total(mine);
  if (threadIdx.x == 0) {
    // Layout [word, block]: the last block reads each word of all blocks as one contiguous run.
    const double* words = reinterpret_cast<const double*>(&all);
    for (int i = 0; i < kTotalWords; ++i) call.totals[i * call.blocks + block] = words[i];
    call.flags.raise(call.slices + block);
  }
  __syncthreads();
  if (!call.flags.all_up(call.slices, call.blocks)) return;

  PpoTotals one;
  if (static_cast<int>(threadIdx.x) < call.blocks) {
    double* words = reinterpret_cast<double*>(&one);
#pragma unroll
    for (int i = 0; i < kTotalWords; ++i) words[i] = call.totals[i * call.blocks + threadIdx.x];
  }
  all = block_total(one);
  if (threadIdx.x == 0) {
    *call.loss = static_cast<A>(
        ppo_finish(all.sums(), normaliser, call.value_coef, call.entropy_coef, call.metrics));
  }
  call.flags.clear(call.slices + call.blocks);
}

std::tuple<Tensor, Tensor, Tensor> ppo_loss_fwd(
    const Tensor& logprob, const Tensor& old_logprob, const Tensor& advantages,
    const std::optional<Tensor>& values, const std::optional<Tensor>& old_values,
    const std::optional<Tensor>& returns, const std::optional<Tensor>& entropy,
    const std::optional<Tensor>& mask, double clip, double dual_clip, double value_clip,
    double value_coef, double entropy_coef, bool with_grad) {
  const torch::stable::accelerator::DeviceGuard guard(logprob.get_device_index());
  const PpoInputs in{logprob, old_logprob, advantages, values, old_values, returns, entropy};
  in.check();
  const auto view = [&](const auto& t, const char* name) { return tokens_like(t, logprob, name); };
  const TokenView views[] = {view_of(logprob, "logprob"),    view(old_logprob, "old_logprob"),
                             view(advantages, "advantages"), view(values, "values"),
                             view(old_values, "old_values"), view(returns, "returns"),
                             view(entropy, "entropy"),       mask_like(mask, logprob)};
  const Tiles tiles = tiles_of(
      logprob, {views[0], views[1], views[2], views[3], views[4], views[5], views[6], views[7]});
  const PpoOutputs out(in, with_grad);
  // With no tokens, one block writes the zeros.
  const int blocks = tiles.tokens > 0 ? blocks_for(tiles.count(), kWarps, kMaxBlocks) : 1;
  const int slices = mask.has_value() ? blocks_for(tiles.tokens, kSlice, kMaxBlocks) : 0;
  const int64_t slice = slices > 0 ? (tiles.count() + slices - 1) / slices : 0;
  const Tensor scratch = empty_like_device(
      logprob, {blocks * kTotalWords + slices + slices + blocks}, ScalarType::Long);
  int64_t* words = static_cast<int64_t*>(scratch.mutable_data_ptr());
  with_acc(logprob, [&](auto zero) {
    using A = decltype(zero);
    const PpoCall<A> call{
        views[0],
        views[1],
        views[2],
        views[3],
        views[4],
        views[5],
        views[6],
        views[7],
        tiles,
        static_cast<A>(1 - clip),
        static_cast<A>(1 + clip),
        static_cast<A>(dual_clip),
        static_cast<A>(value_clip),
        value_coef,
        entropy_coef,
        out.grad_logprob<A>(),
        out.grad_values<A>(),
        out.grad_entropy<A>(),
        static_cast<A*>(out.loss.mutable_data_ptr()),
        static_cast<float*>(out.metrics.mutable_data_ptr()),
        blocks,
        slices,
        slice,
        Flags{reinterpret_cast<uint64_t*>(words + blocks * kTotalWords + slices), next_tag()},
        words + blocks * kTotalWords,
        reinterpret_cast<double*>(words)};
    launch("ppo_loss_fwd", ppo_loss_fwd_kernel<A>, static_cast<unsigned>(blocks), kThreads, 0,
           current_stream(logprob), call);
  });
  return out.tuple();
}

}  // namespace
}  // namespace rl

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CUDA, m) {
  m.impl("ppo_loss_fwd", TORCH_BOX(&rl::ppo_loss_fwd));
}
