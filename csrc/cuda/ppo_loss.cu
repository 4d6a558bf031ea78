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
//
// Plain PPO has a variant of its own (kPlain). In the other one, the settings of the policy loss
// are branches that all threads take alike.
#include "../common/ppo.h"
#include "block_reduce.cuh"
#include "grid_sync.cuh"
#include "sequence_sums.cuh"
#include "token_reader.cuh"

namespace rl {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxBlocks = kThreads;  // the last block reads one total per thread
constexpr int64_t kSlice = 65536;     // minimum bytes of mask per published count

// How many metrics have a sum: the first ones. Those after the entropy need more than plain PPO.
template <bool kPlain>
constexpr int kSums = kPlain ? kKl : kMetrics;

RL_HD constexpr bool is_maximum(int metric) {
  return metric == kRatioMax || metric == kRolloutWeightMax;
}

// Sums of a warp or block in fp64. Variances use PivotedSums, which merge without division.
template <bool kPlain>
struct PpoTotals {
  static constexpr int64_t kWords = kSums<kPlain> + 2 * sizeof(PivotedSums) / sizeof(double);
  double sum[kSums<kPlain>] = {};  // as in PpoSums
  PivotedSums target, error;

  __device__ __forceinline__ PpoSums<double> sums() const {
    PpoSums<double> out;
#pragma unroll
    for (int i = 0; i < kSums<kPlain>; ++i) out.sum[i] = sum[i];
    out.target = target.moments();
    out.error = error.moments();
    return out;
  }
};

// Reduces the metrics over a warp.
template <typename S, int kCount>
__device__ __forceinline__ void sum_metrics(S (&sum)[kCount]) {
#pragma unroll 1
  for (int lanes = 16; lanes > 0; lanes /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i == kExplainedVariance || i == kClipFractionHigh) continue;
      const S other = __shfl_xor_sync(kAllLanes, sum[i], lanes);
      if (is_maximum(i)) {
        sum[i] = sum[i] < other ? other : sum[i];
      } else {
        sum[i] += other;
      }
    }
  }
}

template <bool kPlain>
__device__ __forceinline__ PpoTotals<kPlain> warp_total(PpoTotals<kPlain> x) {
  sum_metrics(x.sum);
  x.target = warp_total(x.target);
  x.error = warp_total(x.error);
  return x;
}

// Sums of a thread. Metrics are reduced in A within a warp, in fp64 beyond it.
template <typename A, bool kPlain>
struct PpoTerms {
  A sum[kSums<kPlain>] = {};
  PivotedValues<A, A> target, error;

  __device__ __forceinline__ void raise(Metric maximum, A x) {
    sum[maximum] = x > sum[maximum] ? x : sum[maximum];
  }
  // `ratio`: 0 for a masked token.
  __device__ __forceinline__ void add(const PolicyTerm<A>& term, A ratio) {
    sum[kApproxKl] += term.kl;
    sum[kClipFraction] += term.clipped;
    sum[kClipFractionLow] += term.clipped_low;
    sum[kDualClipFraction] += term.dual;
    sum[kOutsideFraction] += term.outside;
    sum[kRatioMean] += ratio;
    raise(kRatioMax, ratio);
  }
};
template <typename A, bool kPlain>
__device__ __forceinline__ PpoTotals<kPlain> warp_total(PpoTerms<A, kPlain> x) {
  sum_metrics(x.sum);
  PpoTotals<kPlain> out;
#pragma unroll
  for (int i = 0; i < kSums<kPlain>; ++i) out.sum[i] = x.sum[i];
  out.target = warp_total(x.target.sums());
  out.error = warp_total(x.error.sums());
  return out;
}

template <typename A>
struct PpoCall {
  TokenView logprob, old_logprob, advantages, values, old_values, returns, entropy, mask;
  TokenView ref_logprob, rollout;
  Tiles tiles;
  PolicySettings<A> policy;
  SequenceRows<A> sequences;
  const A* factors;  // [2]; null: 1 / the number of unmasked tokens
  A value_clip;
  double kl_coef, value_coef, entropy_coef;
  A *grad_logprob, *grad_values, *grad_entropy;  // outputs; null: not wanted
  A* loss;
  float* metrics;
  int blocks;
  int slices;      // of the mask, at most kMaxBlocks; 0: no mask
  int64_t slice;   // tiles per slice
  Flags flags;     // [slices + blocks]
  int64_t* kept;   // [slices]: unmasked tokens
  double* totals;  // [PpoTotals::kWords, blocks]
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

// A lane's tokens, as the policy loss needs them.
template <typename A>
struct LaneTokens {
  A logprob[kPerLane], old_logprob[kPerLane], advantage[kPerLane];
  A ref_logprob[kPerLane], rollout[kPerLane];  // not for plain PPO
};

// The policy loss of a lane's tokens with any settings. `first`: place of the first token among
// those of cu_seqlens. `grad`, and the weights of the tokens in the terms of the loss, are 0 where
// masked.
template <Objective kObjective, typename A>
__device__ __forceinline__ void policy_losses(const PpoCall<A>& call, const LaneTokens<A>& x,
                                              int64_t first, unsigned keep,
                                              PpoTerms<A, false>& mine, A (&grad)[kPerLane],
                                              A (&weight)[kPerLane], A (&value_weight)[kPerLane]) {
  int64_t sequence = 0, end = first;  // `sequence`: that of the tokens before `end`
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) {
    grad[k] = weight[k] = value_weight[k] = 0;
    if (!(keep >> k & 1u)) continue;
    const A old = call.old_logprob.data ? x.old_logprob[k] : x.logprob[k];
    PolicyToken<A> token{x.logprob[k], x.logprob[k] - old, A(1), x.ref_logprob[k], A(1)};
    weight[k] = value_weight[k] = 1;
    if (call.sequences.cu_seqlens != nullptr) {
      if (first + k >= end) {
        sequence = call.sequences.of(first + k);
        end = call.sequences.cu_seqlens[sequence + 1];
      }
      const auto of = [&](SequenceRow row) { return call.sequences.at(row, sequence); };
      weight[k] = of(kWeight);
      value_weight[k] = of(kValueWeight);
      token.advantage = of(kAdvantage);
      if (call.policy.rollout != Rollout::none) token.rollout = of(kRolloutWeight);
      if (call.policy.sequence_ratio) token.log_ratio = of(kLogRatio);
    }
    if (call.advantages.data) token.advantage = x.advantage[k];
    if (call.rollout.data) token.rollout = rollout_of(x.rollout[k], old, call.policy);
    const PolicyLoss<A> found = policy_loss<kObjective>(token, call.policy);
    mine.add(found.policy, found.policy.ratio);
    mine.sum[kPolicyLoss] += weight[k] * found.loss;
    mine.sum[kKl] += weight[k] * found.kl;
    mine.sum[kRolloutWeightMean] += found.rollout.weight;
    mine.raise(kRolloutWeightMax, found.rollout.weight);
    mine.sum[kRolloutOutsideFraction] += found.rollout.outside;
    grad[k] = weight[k] * found.grad;
  }
}

template <typename A, bool kPlain>
__global__ void __launch_bounds__(kThreads, sizeof(A) == 4 ? 2 : 1)
    ppo_loss_fwd_kernel(const PpoCall<A> call) {
  __shared__ alignas(16) A stages[kWarps][kTile];
  const int block = static_cast<int>(blockIdx.x), warp = threadIdx.x / 32;
  const bool has_values = call.values.data != nullptr;
  const bool has_old_values = call.old_values.data != nullptr;
  double normaliser = call.tiles.tokens > 0 ? static_cast<double>(call.tiles.tokens) : 1.0;
  bool counted = call.slices == 0;
  PpoTerms<A, kPlain> mine;
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
    RawTile<A> raw_ref_logprob{}, raw_rollout{};
    if constexpr (!kPlain) {
      raw_ref_logprob = reader.template start<128>(call.ref_logprob);
      raw_rollout = reader.template start<256>(call.rollout);
    }
    const unsigned keep = read_mask(call.mask, call.tiles, place);
    if (!counted) {  // overlaps with the reads above
      const int64_t count = count_kept(call);
      normaliser = count > 0 ? static_cast<double>(count) : 1.0;
      counted = true;
    }
    if (!here) continue;

    LaneTokens<A> x;
    reader.template finish<1>(raw_logprob, keep, x.logprob);
    reader.template finish<2>(raw_old_logprob, keep, x.old_logprob);
    reader.template finish<4>(raw_advantages, keep, x.advantage);
    A grad_logprob[kPerLane], grad_value[kPerLane] = {};
    A weight[kPerLane] = {1, 1, 1, 1}, value_weight[kPerLane] = {1, 1, 1, 1};
    if constexpr (kPlain) {
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) {
        const PolicyTerm<A> term =
            policy_term(x.logprob[k], x.logprob[k] - x.old_logprob[k], x.advantage[k], call.policy);
        mine.add(term, keep >> k & 1u ? term.ratio : A(0));
        mine.sum[kPolicyLoss] += term.loss;
        grad_logprob[k] = term.grad;
      }
    } else {
      reader.template finish<128>(raw_ref_logprob, keep, x.ref_logprob);
      reader.template finish<256>(raw_rollout, keep, x.rollout);
      const int64_t token = call.policy.first_row + tile * kTile + lane_id() * kPerLane;
      const auto losses = [&](auto objective) {
        policy_losses<decltype(objective)::value>(call, x, token, keep, mine, grad_logprob, weight,
                                                  value_weight);
      };
      switch (call.policy.objective) {
        case Objective::ppo:
          losses(std::integral_constant<Objective, Objective::ppo>{});
          break;
        case Objective::reinforce:
          losses(std::integral_constant<Objective, Objective::reinforce>{});
          break;
        case Objective::cispo:
          losses(std::integral_constant<Objective, Objective::cispo>{});
          break;
        case Objective::sapo:
          losses(std::integral_constant<Objective, Objective::sapo>{});
          break;
      }
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
        mine.sum[kValueLoss] += value_weight[k] * term.loss;
        mine.sum[kValueClipFraction] += term.clipped;
        grad_value[k] = value_weight[k] * term.grad;
        error[k] = value[k] - wanted[k];
      }
      mine.target.add(wanted, keep);
      mine.error.add(error, keep);
    }
    if (call.entropy.data != nullptr) {
      A entropy[kPerLane];
      reader.template finish<64>(raw_entropy, keep, entropy);
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) mine.sum[kEntropy] += weight[k] * entropy[k];
    }

    const PpoFactors factors = PpoFactors::of(call.factors, normaliser);
    const A policy_factor = static_cast<A>(factors.policy);
    const A value_factor = static_cast<A>(call.value_coef) * static_cast<A>(factors.value);
    const A entropy_factor = -static_cast<A>(call.entropy_coef) * policy_factor;
    A grad_entropy[kPerLane];
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      grad_logprob[k] *= policy_factor;
      grad_value[k] *= value_factor;
      grad_entropy[k] = keep >> k & 1u ? weight[k] * entropy_factor : A(0);
    }
    const auto write = [&](A* to, const A(&x)[kPerLane]) {
      if (to != nullptr) write_tile(to + tile * kTile, place.count, stages[warp], x);
    };
    write(call.grad_logprob, grad_logprob);
    write(call.grad_values, grad_value);
    write(call.grad_entropy, grad_entropy);
  }
  using Totals = PpoTotals<kPlain>;
  Totals all = block_total(mine);
  if (threadIdx.x == 0) {
    // Layout [word, block]: the last block reads each word of all blocks as one contiguous run.
    const double* words = reinterpret_cast<const double*>(&all);
    for (int i = 0; i < Totals::kWords; ++i) call.totals[i * call.blocks + block] = words[i];
    call.flags.raise(call.slices + block);
  }
  __syncthreads();
  if (!call.flags.all_up(call.slices, call.blocks)) return;

  Totals one;
  if (static_cast<int>(threadIdx.x) < call.blocks) {
    double* words = reinterpret_cast<double*>(&one);
#pragma unroll
    for (int i = 0; i < Totals::kWords; ++i) words[i] = call.totals[i * call.blocks + threadIdx.x];
  }
  all = block_total(one);
  if (threadIdx.x == 0) {
    *call.loss =
        static_cast<A>(ppo_finish(all.sums(), normaliser, PpoFactors::of(call.factors, normaliser),
                                  call.kl_coef, call.value_coef, call.entropy_coef, call.metrics));
  }
  call.flags.clear(call.slices + call.blocks);
}

std::tuple<Tensor, Tensor, Tensor> ppo_loss_fwd(
    const Tensor& logprob, const std::optional<Tensor>& old_logprob,
    const std::optional<Tensor>& advantages, const std::optional<Tensor>& values,
    const std::optional<Tensor>& old_values, const std::optional<Tensor>& returns,
    const std::optional<Tensor>& entropy, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& factors, const MoreTensors& more, double low, double high,
    double dual_clip, double value_clip, double value_coef, double entropy_coef,
    const OptionNumbers& options, bool with_grad) {
  const torch::stable::accelerator::DeviceGuard guard(logprob.get_device_index());
  const PolicyInputs policy = policy_inputs(logprob.numel(), acc_dtype(logprob.scalar_type()), more,
                                            low, high, dual_clip, options);
  const PpoInputs in{logprob, old_logprob, advantages, values, old_values,
                     returns, entropy,     factors,    policy};
  in.check();
  const auto view = [&](const std::optional<Tensor>& t, const char* name) {
    return tokens_like(t, logprob, name);
  };
  const TokenView of_logprob = view_of(logprob, "logprob"),
                  of_old_logprob = view(old_logprob, "old_logprob"),
                  of_advantages = view(advantages, "advantages"),
                  of_values = view(values, "values"),
                  of_old_values = view(old_values, "old_values"),
                  of_returns = view(returns, "returns"), of_entropy = view(entropy, "entropy"),
                  of_ref_logprob = view(policy.ref_logprob, "ref_logprob"),
                  of_rollout = view(policy.rollout, "rollout"), of_mask = mask_like(mask, logprob);
  const Tiles tiles =
      tiles_of(logprob, {of_logprob, of_old_logprob, of_advantages, of_values, of_old_values,
                         of_returns, of_entropy, of_ref_logprob, of_rollout, of_mask});
  const PpoOutputs out(in, with_grad);
  // With no tokens, one block writes the zeros.
  const int blocks = tiles.tokens > 0 ? blocks_for(tiles.count(), kWarps, kMaxBlocks) : 1;
  const int slices = mask.has_value() ? blocks_for(tiles.tokens, kSlice, kMaxBlocks) : 0;
  const int64_t slice = slices > 0 ? (tiles.count() + slices - 1) / slices : 0;
  const int64_t totals =
      blocks * (policy.plain() ? PpoTotals<true>::kWords : PpoTotals<false>::kWords);
  const Tensor scratch =
      empty_like_device(logprob, {totals + slices + slices + blocks}, ScalarType::Long);
  int64_t* words = static_cast<int64_t*>(scratch.mutable_data_ptr());
  with_acc(logprob, [&](auto zero) {
    using A = decltype(zero);
    const PpoCall<A> call{of_logprob,
                          of_old_logprob,
                          of_advantages,
                          of_values,
                          of_old_values,
                          of_returns,
                          of_entropy,
                          of_mask,
                          of_ref_logprob,
                          of_rollout,
                          tiles,
                          policy.settings<A>(),
                          policy.sequence_rows<A>(),
                          factors ? static_cast<const A*>(factors->const_data_ptr()) : nullptr,
                          static_cast<A>(value_clip),
                          policy.settings<double>().kl_coef,
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
                          Flags{reinterpret_cast<uint64_t*>(words + totals + slices), next_tag()},
                          words + totals,
                          reinterpret_cast<double*>(words)};
    const auto run = [&](auto* kernel) {
      launch("ppo_loss_fwd", kernel, static_cast<unsigned>(blocks), kThreads, 0,
             current_stream(logprob), call);
    };
    policy.plain() ? run(ppo_loss_fwd_kernel<A, true>) : run(ppo_loss_fwd_kernel<A, false>);
  });
  return out.tuple();
}

}  // namespace
}  // namespace rl

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CUDA, m) {
  m.impl("ppo_loss_fwd", TORCH_BOX(&rl::ppo_loss_fwd));
  m.impl("sequence_sums", TORCH_BOX(&rl::sequence_sums));
}
