// The sequence ops on CUDA: kl_reward, gae, and kl_gae, which does both in one launch.
//
//   kl_reward: r_t = -beta * kl_t, plus the score at the last unmasked token of each sequence
//   gae:       A_t = delta_t + gamma * lam * A_{t+1}, R_t = A_t + V_t; optionally A is whitened by
//   a
//              second launch (whiten.cuh)
//
// Shapes: B sequences, T steps, N tokens; tokens [B, T], or [N] with cu_seqlens [B + 1]; score,
// bootstrap [B]. Outputs are stacked.
//
// A sequence is cut into tiles of 128 tokens, counted from its first token. A warp composes the
// steps of its tile into one GaeSegment by a shuffle scan; the advantage is carried from tile to
// tile, from the last to the first. Results of a sequence therefore depend on its tokens alone: not
// on how many warps share it, on its neighbours, on its address, or on masked tokens after its end.
//
// A group of 1 to 8 warps processes a sequence from its end, one tile per warp and round. Padded,
// aligned fp32 rows have a variant that reads vectors only (kFlat). A few long sequences would
// leave most of the GPU idle, so they are cut into ranges of 4096 tokens: gae_segments_kernel
// composes all tiles, then a second launch processes all ranges in parallel, each after carrying
// the advantage over the segments behind it.
//
// Limits: one long sequence among many short packed ones is processed by a single group. If a
// masked gap follows a range, one warp searches the gap.
#include "../common/sequence.h"
#include "whiten.cuh"

namespace rl {

constexpr int kMaxWarps = 8;  // per group, and per block
constexpr int kRangeTiles = 32;
constexpr int64_t kRange = kRangeTiles * kTile;
constexpr int64_t kFewSequences = 128;  // below this, long sequences are cut into ranges

template <typename A>
struct SequenceArgs {
  TokenView logprob, ref_logprob, score;  // kKl: rewards are computed
  TokenView given_rewards;                // otherwise
  TokenView values, bootstrap;
  TokenView mask;
  const int32_t* cu_seqlens;  // null: padded
  int sequences;
  int64_t steps, tokens;
  unsigned work;    // number of sequences, or of ranges
  bool ranges;      // a group processes a range, not a sequence
  int group_warps;  // 1, 2, 4 or 8
  int groups;       // per block
  KlEstimator estimator;
  A beta, gamma, gamma_lam;
  A *advantages, *returns, *rewards, *kl;
  GaeSegment<A>* segments;  // one per tile, if there are ranges
  PivotedSums* partials;    // of the advantages, one per block; null: no whitening
};

namespace {

// Tiles [first, last) of sequence b, whose tokens are [begin, begin + length).
struct Walk {
  int64_t begin, length;
  int b, first, last;

  __device__ __forceinline__ int tiles() const {
    return static_cast<int>((length + kTile - 1) / kTile);
  }
  // Number of tokens of a tile.
  __device__ __forceinline__ int count(int tile) const {
    const int64_t left = length - int64_t{tile} * kTile;
    return left <= 0 ? 0 : left < kTile ? static_cast<int>(left) : kTile;
  }
};

// Invalid cu_seqlens cannot cause out-of-bounds access: ends are clamped to [0, N].
template <typename A>
__device__ __forceinline__ int64_t end_of(const SequenceArgs<A>& p, int64_t b) {
  if (p.cu_seqlens == nullptr) return b * p.steps;
  return clamp(static_cast<int64_t>(p.cu_seqlens[b]), int64_t{0}, p.tokens);
}

// First unit (range or tile) of sequence b. Numbers are distinct for any lengths and below
// N / unit + B, without a prefix sum over the lengths.
template <typename A>
__device__ __forceinline__ int64_t first_unit(const SequenceArgs<A>& p, int64_t b, int64_t unit) {
  return end_of(p, b) / unit + b;
}

template <typename A>
__device__ __forceinline__ Walk walk_of(const SequenceArgs<A>& p, unsigned work) {
  Walk walk;
  walk.b = static_cast<int>(work);
  if (p.ranges) {
    int low = 0, high = p.sequences;  // binary search: the last b with first unit <= work
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (first_unit(p, middle, kRange) <= work ? low : high) = middle;
    }
    walk.b = low;
  }
  walk.begin = end_of(p, walk.b);
  const int64_t length = end_of(p, walk.b + 1) - walk.begin;
  walk.length = length > 0 ? length : 0;
  walk.first = 0;
  walk.last = walk.tiles();
  if (p.ranges) {
    walk.first = static_cast<int>(work - first_unit(p, walk.b, kRange)) * kRangeTiles;
    const int last = walk.first + kRangeTiles;
    walk.last = walk.last < last ? walk.last : last;
    if (walk.first < 0) walk.last = walk.first = 0;  // invalid cu_seqlens
  }
  return walk;
}

// State after a token: value and advantage of the next unmasked token. If there is none, value is
// the bootstrap and advantage 0.
template <typename A>
struct Carry {
  A value, advantage;
  bool found;  // an unmasked token follows
};

// Sets value and found of `carry` from the first unmasked token at or after `tile`.
template <typename A, bool kScan>
__device__ Carry<A> look_ahead(const SequenceArgs<A>& p, const Walk& walk, Carry<A> carry,
                               int tile) {
  const int64_t row = p.cu_seqlens ? 0 : walk.b, column = p.cu_seqlens ? walk.begin : 0;
  const bool vectors = p.mask.vectors(p.mask.at(row, column));
#pragma unroll 1
  for (const int tiles = walk.tiles(); tile < tiles; ++tile) {
    const int count = walk.count(tile);
    const int64_t begin = column + int64_t{tile} * kTile;
    const bool as_vectors = vectors && count == kTile;
    const uint32_t raw = fetch_mask(p.mask, p.mask.at(row, begin), count, as_vectors);
    const unsigned keep = unpack_mask(p.mask, raw, count, as_vectors);
    const unsigned holders = __ballot_sync(kAllLanes, keep != 0);
    if (holders == 0) continue;
    const int lane = __ffs(holders) - 1;
    const int token = lane * kPerLane + __ffs(__shfl_sync(kAllLanes, keep, lane)) - 1;
    if constexpr (kScan) carry.value = read_one<A>(p.values, row, begin + token);
    carry.found = true;
    break;
  }
  return carry;
}

// The advantage after tile - 1: composes the segments of tiles [tile, end) of the sequence.
template <typename A>
__device__ A carry_over(const SequenceArgs<A>& p, const Walk& walk, int tile) {
  const GaeSegment<A>* segments = p.segments + first_unit(p, walk.b, kTile);
  A advantage = 0;
#pragma unroll 1
  for (int last = walk.tiles(); last > tile; last -= 32) {
    const int mine = last - 1 - lane_id();
    GaeSegment<A> segment{A(0), A(1)};
    if (mine >= tile) segment = segments[mine];
#pragma unroll 8
    for (int lane = 0; lane < 32; ++lane) {
      const GaeSegment<A> next{__shfl_sync(kAllLanes, segment.delta, lane),
                               __shfl_sync(kAllLanes, segment.factor, lane)};
      advantage = next.apply(advantage);
    }
  }
  return advantage;
}

// Hides x from the optimiser, so that values derived from it are recomputed in every iteration
// rather than kept in registers.
__device__ __forceinline__ float recomputed(float x) {
#if RL_PTX
  asm volatile("" : "+f"(x));
#endif
  return x;
}
__device__ __forceinline__ double recomputed(double x) {
#if RL_PTX
  asm volatile("" : "+d"(x));
#endif
  return x;
}
// A lane's reads of one tile, all issued before the first is used. kFlat: padded rows of type A,
// contiguous, aligned to 16 bytes, with a multiple of four tokens; every lane reads one vector or
// nothing.
template <typename A, bool kKl, bool kScan, bool kFlat>
struct TileReads {
  RawTile<A> first, second, values;  // first, second: logprob and ref_logprob, or the rewards
  uint32_t mask;
  unsigned vectors;  // bit per member above: read as vectors

  __device__ __forceinline__ void start(const SequenceArgs<A>& p, const Walk& walk, int tile) {
    const TokenView& first_view = kKl ? p.logprob : p.given_rewards;
    const int count = walk.count(tile);
    const int64_t at = int64_t{tile} * kTile;
    vectors = 0;
    if constexpr (kFlat) {
      mask = 0;
      if (lane_id() * kPerLane >= count) return;
      read_vectors(first_view.data + (walk.begin + at) * int64_t{sizeof(A)}, first);
      if constexpr (kKl)
        read_vectors(p.ref_logprob.data + (walk.begin + at) * int64_t{sizeof(A)}, second);
      if constexpr (kScan)
        read_vectors(p.values.data + (walk.begin + at) * int64_t{sizeof(A)}, values);
      mask = fetch_mask(p.mask, p.mask.data + walk.begin + at, kTile, true);
    } else {
      const int64_t row = p.cu_seqlens ? 0 : walk.b, column = p.cu_seqlens ? walk.begin + at : at;
      const auto read = [&](const TokenView& view, unsigned bit, RawTile<A>& raw) {
        const char* from = view.at(row, column);
        const bool as_vectors = count == kTile && view.vectors(from);
        if (as_vectors) vectors |= bit;
        fetch(view, from, count, as_vectors, raw);
      };
      read(first_view, 1, first);
      if constexpr (kKl) read(p.ref_logprob, 2, second);
      if constexpr (kScan) read(p.values, 4, values);
      const char* from = p.mask.at(row, column);
      const bool as_vectors = count == kTile && p.mask.vectors(from);
      if (as_vectors) vectors |= 8;
      mask = fetch_mask(p.mask, from, count, as_vectors);
    }
  }
};

// Calls body(kl_term of the estimator): one switch for many tokens.
template <typename A, typename F>
__device__ __forceinline__ void with_estimator(KlEstimator estimator, const F& body) {
  switch (estimator) {
    case KlEstimator::k1:
      return body([](A a, A b) { return kl_term<KlEstimator::k1>(a, b); });
    case KlEstimator::k2:
      return body([](A a, A b) { return kl_term<KlEstimator::k2>(a, b); });
    case KlEstimator::k3:
      return body([](A a, A b) { return kl_term<KlEstimator::k3>(a, b); });
    default:
      return body([](A a, A b) { return kl_term<KlEstimator::abs>(a, b); });
  }
}

// Powers of gamma * lam for the scan of a tile without masked tokens.
template <typename A>
struct Powers {
  A lane;   // over the four tokens of a lane
  A after;  // over the tokens of all later lanes

  __device__ __forceinline__ explicit Powers(A gamma_lam) {
    A power = gamma_lam * gamma_lam;
    lane = power *= power;
    after = 1;
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2, power *= power)
      if (!(lane_id() & lanes)) after *= power;
  }
};

// Exchange between the warps of a group, one entry per warp and tile.
template <typename A>
struct Shared {
  A first_value[kMaxWarps];
  GaeSegment<A> segment[kMaxWarps];
  unsigned char found[kMaxWarps];
};

// One round of a group: one tile per warp. kSegments: only computes and writes the tile's segment.
template <typename A, bool kKl, bool kScan, bool kFlat, bool kSegments>
struct Round {
  const SequenceArgs<A>& p;
  const Powers<A> powers;
  A* stage;
  Shared<A>& shared;
  int warp, warps;

  // State after this warp's tile, except the advantage. Advances carry.value and carry.found over
  // the tiles of the group. `found`, `first`: whether the tile has an unmasked token, and its first
  // value.
  __device__ __forceinline__ Carry<A> state_after_tile(bool found, A first, Carry<A>& carry) const {
    Carry<A> after = carry;
    if (warps == 1) {
      if (found) carry.value = first, carry.found = true;
      return after;
    }
    if (lane_id() == 0) {
      if constexpr (kScan) shared.first_value[warp] = first;
      shared.found[warp] = found;
    }
    __syncthreads();
    const int of = lane_id() < warps ? lane_id() : 0;
    const unsigned holders = __ballot_sync(kAllLanes, lane_id() < warps && shared.found[of]);
    const unsigned later = holders & ~((2u << warp) - 1u);
    if constexpr (kScan) {
      const A value = shared.first_value[of];
      const A next = __shfl_sync(kAllLanes, value, later ? __ffs(later) - 1 : 0);
      const A head = __shfl_sync(kAllLanes, value, holders ? __ffs(holders) - 1 : 0);
      if (later) after.value = next;
      if (holders) carry.value = head;
    } else {
      __syncthreads();  // before the next round writes `shared`
    }
    after.found |= later != 0;
    carry.found |= holders != 0;
    return after;
  }

  // Advantage after this warp's tile, whose segment is given. Advances carry.advantage over the
  // tiles of the group.
  __device__ __forceinline__ A advantage_after_tile(const GaeSegment<A>& segment,
                                                    Carry<A>& carry) const {
    A mine = carry.advantage;
    if (warps == 1) {
      carry.advantage = segment.apply(mine);
      return mine;
    }
    if (lane_id() == 0) shared.segment[warp] = segment;
    __syncthreads();
    A advantage = mine;
#pragma unroll
    for (int w = kMaxWarps - 1; w >= 0; --w) {
      if (w >= warps) continue;
      if (w == warp) mine = advantage;
      advantage = shared.segment[w].apply(advantage);
    }
    carry.advantage = advantage;
    return mine;
  }

  // Composes the segment of the tile, `tile`, and that of all later lanes, `after`. `next`: value
  // after this lane's tokens. Replaces each reward by the token's TD error. kWhole: no token is
  // masked, so all factors are known powers of gamma * lam.
  template <bool kWhole>
  __device__ __forceinline__ void compose(unsigned keep, A next, const A (&value)[kPerLane],
                                          A (&reward)[kPerLane], GaeSegment<A>& after,
                                          GaeSegment<A>& tile) const {
    GaeSegment<A> segment{A(0), A(1)};  // of this lane; the scan appends later lanes
#pragma unroll
    for (int j = kPerLane - 1; j >= 0; --j) {
      if (!kWhole && !(keep >> j & 1u)) continue;
      reward[j] = td_error(reward[j], value[j], next, p.gamma);
      next = value[j];
      segment = GaeSegment<A>{reward[j], p.gamma_lam}.followed_by(segment);
    }
    A power = recomputed(powers.lane);
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2, power *= power) {
      const A delta = __shfl_down_sync(kAllLanes, segment.delta, lanes);
      const A factor = kWhole ? power : __shfl_down_sync(kAllLanes, segment.factor, lanes);
      if (lane_id() + lanes >= 32) continue;
      if constexpr (kWhole) {
        segment.delta = gae_step(segment.delta, delta, power);
      } else {
        segment = segment.followed_by({delta, factor});
      }
    }
    tile = {__shfl_sync(kAllLanes, segment.delta, 0),
            kWhole ? power : __shfl_sync(kAllLanes, segment.factor, 0)};
    after = {__shfl_down_sync(kAllLanes, segment.delta, 1),
             kWhole ? powers.after : __shfl_down_sync(kAllLanes, segment.factor, 1)};
    if (lane_id() == 31) after = {A(0), A(1)};
  }

  // Processes this warp's `tile`. `carry`: state after the last tile of the round; advanced to the
  // begin of the round.
  __device__ __forceinline__ void run(const TileReads<A, kKl, kScan, kFlat>& reads,
                                      const Walk& walk, int tile, Carry<A>& carry, A score,
                                      PivotedValues<A, double>& advantages) const {
    const int count = walk.count(tile);
    const int64_t out = walk.begin + int64_t{tile} * kTile;
    const bool here = lane_id() * kPerLane < count;
    const unsigned vectors = reads.vectors;
    const auto numbers = [&](const TokenView& view, const RawTile<A>& raw, unsigned bit,
                             A(&x)[kPerLane]) {
      if constexpr (kFlat) {
        as_numbers(raw, x);
      } else {
        unpack(view, raw, (vectors & bit) != 0, stage, x);
      }
    };
    const auto write = [&](A* to, const A(&x)[kPerLane]) {
      if constexpr (kFlat) {
        if (here) write_vectors(to + out, x);
      } else {
        write_tile(to + out, count, stage, x);
      }
    };
    const unsigned keep =
        kFlat ? nibble(reads.mask) : unpack_mask(p.mask, reads.mask, count, (vectors & 8) != 0);
    const unsigned holders = __ballot_sync(kAllLanes, keep != 0);
    const unsigned later = holders & ~((2u << lane_id()) - 1u);
    A reward[kPerLane], value[kPerLane], next = 0, first = 0;
    numbers(kKl ? p.logprob : p.given_rewards, reads.first, 1, reward);
    if constexpr (kScan) {
      numbers(p.values, reads.values, 4, value);
      A own = 0;  // this lane's first unmasked value
#pragma unroll
      for (int j = kPerLane - 1; j >= 0; --j)
        if (keep >> j & 1u) own = value[j];
      next = __shfl_sync(kAllLanes, own, later ? __ffs(later) - 1 : 0);
      first = __shfl_sync(kAllLanes, own, holders ? __ffs(holders) - 1 : 0);
    }
    const Carry<A> after = state_after_tile(holders != 0, first, carry);
    if (later == 0) next = after.value;
    if constexpr (kKl) {
      A kl[kPerLane];
      numbers(p.ref_logprob, reads.second, 2, kl);
      with_estimator<A>(p.estimator, [&](const auto& term) {
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) kl[j] = term(reward[j], kl[j]);
      });
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const bool kept = keep >> j & 1u;
        kl[j] = kept ? kl[j] : A(0);
        reward[j] = kept ? kl_penalty(p.beta, kl[j]) : A(0);
      }
      if (!after.found && later == 0) {  // the last unmasked token of the sequence, if any
#pragma unroll
        for (int j = 0; j < kPerLane; ++j)
          if (keep >> j == 1u) reward[j] += score;
      }
      if constexpr (!kSegments) {
        write(p.kl, kl);
        write(p.rewards, reward);
      }
    }
    if constexpr (kScan) {
      GaeSegment<A> after_lane, all;
      if (__all_sync(kAllLanes, keep == 0xfu)) {
        compose<true>(keep, next, value, reward, after_lane, all);
      } else {
        compose<false>(keep, next, value, reward, after_lane, all);
      }
      if constexpr (kSegments) {
        if (lane_id() == 0) p.segments[first_unit(p, walk.b, kTile) + tile] = all;
        return;
      }
      A advantage = after_lane.apply(advantage_after_tile(all, carry));
#pragma unroll
      for (int j = kPerLane - 1; j >= 0; --j) {
        const bool kept = keep >> j & 1u;
        if (kept) advantage = gae_step(reward[j], advantage, p.gamma_lam);
        reward[j] = kept ? advantage : A(0);
        value[j] = kept ? advantage + value[j] : A(0);
      }
      if (p.partials) advantages.add(reward, keep);
      write(p.advantages, reward);
      write(p.returns, value);
    }
  }
};

// Minimum blocks of eight warps per SM for __launch_bounds__: the most that do not spill. The
// largest kernel spills at three on sm_100.
template <typename A, bool kKl, bool kScan, bool kFlat>
constexpr int kResident = std::is_same_v<A, double> ? 2
                          : !kKl || !kScan || kFlat ? 4
                          : RL_PTX < 1000           ? 3
                                                    : 2;

// One group per sequence or range, grid-stride. A warp without a tile in a round passes the carry
// on.
template <typename A, bool kKl, bool kScan, bool kFlat>
__global__ void __launch_bounds__(kMaxWarps * 32, kResident<A, kKl, kScan, kFlat>)
    sequence_kernel(const SequenceArgs<A> p) {
  __shared__ alignas(16) A stages[kMaxWarps][kTile];
  __shared__ Shared<A> shared;
  // A block has one group of several warps, or several groups of one warp.
  const int warps = p.group_warps, mine = threadIdx.x / 32;
  const int warp = warps > 1 ? mine : 0, group = warps > 1 ? 0 : mine;
  const Round<A, kKl, kScan, kFlat, false> round{
      p, Powers<A>(p.gamma_lam), stages[mine], shared, warp, warps};
  PivotedValues<A, double> advantages;
#pragma unroll 1
  for (unsigned block = blockIdx.x; block * p.groups + group < p.work; block += gridDim.x) {
    const Walk walk = walk_of(p, block * p.groups + group);
    if (walk.first >= walk.last) continue;
    Carry<A> carry{A(0), A(0), false};
    A score = 0;
    if constexpr (kKl) score = read_one<A>(p.score, 0, walk.b);
    if (kScan && p.bootstrap.data) carry.value = read_one<A>(p.bootstrap, 0, walk.b);
    if (walk.last < walk.tiles()) {
      carry = look_ahead<A, kScan>(p, walk, carry, walk.last);
      if constexpr (kScan) carry.advantage = carry_over(p, walk, walk.last);
    }
    // Only the last range of a sequence can end in an incomplete round.
    int tile = walk.first + (walk.last - walk.first - 1) / warps * warps + warp;
#pragma unroll 1
    for (; tile >= walk.first; tile -= warps) {
      TileReads<A, kKl, kScan, kFlat> reads;
      reads.start(p, walk, tile);
      round.run(reads, walk, tile, carry, score, advantages);
    }
  }
  if constexpr (kScan) {
    if (p.partials == nullptr) return;
    const PivotedSums all = block_total(advantages.sums());
    if (threadIdx.x == 0) p.partials[blockIdx.x] = all;
  }
}

// Writes the segment of every tile, one warp per tile. `work`: number of ranges.
template <typename A, bool kKl>
__global__ void __launch_bounds__(kMaxWarps * 32, 2) gae_segments_kernel(const SequenceArgs<A> p) {
  __shared__ alignas(16) A stages[kMaxWarps][kTile];
  __shared__ Shared<A> shared;
  const unsigned item = blockIdx.x * kMaxWarps + threadIdx.x / 32;
  if (item / kRangeTiles >= p.work) return;
  const Walk walk = walk_of(p, item / kRangeTiles);
  const int tile = walk.first + item % kRangeTiles;
  if (tile >= walk.last) return;
  const Round<A, kKl, true, false, true> round{
      p, Powers<A>(p.gamma_lam), stages[threadIdx.x / 32], shared, 0, 1};
  TileReads<A, kKl, true, false> reads;
  reads.start(p, walk, tile);
  Carry<A> carry{A(0), A(0), false};
  A score = 0;
  if constexpr (kKl) score = read_one<A>(p.score, 0, walk.b);
  if (p.bootstrap.data) carry.value = read_one<A>(p.bootstrap, 0, walk.b);
  carry = look_ahead<A, true>(p, walk, carry, tile + 1);
  PivotedValues<A, double> none;
  round.run(reads, walk, tile, carry, score, none);
}

// ---- host -------------------------------------------------------------------------------------

// Sets the sequence layout of `like`. The caller must keep the returned cu_seqlens alive.
template <typename A>
std::optional<Tensor> set_layout(SequenceArgs<A>& p, const Tensor& like,
                                 const std::optional<Tensor>& cu_seqlens) {
  p.tokens = like.numel();
  if (!cu_seqlens) {
    RL_CHECK(like.dim() == 2, "expected a [B, T] tensor, or cu_seqlens");
    RL_CHECK(like.size(0) < INT32_MAX, "expected fewer than 2^31 sequences");
    p.sequences = static_cast<int>(like.size(0));
    p.steps = like.size(1);
    return std::nullopt;
  }
  RL_CHECK(like.dim() == 1, "expected a packed [N] tensor with cu_seqlens");
  RL_CHECK(cu_seqlens->dim() == 1 && cu_seqlens->numel() >= 1 &&
               cu_seqlens->scalar_type() == ScalarType::Int,
           "cu_seqlens: expected an int32 tensor [B + 1]");
  const Tensor cu = as_contiguous(*cu_seqlens);
  p.cu_seqlens = static_cast<const int32_t*>(cu.const_data_ptr());
  RL_CHECK(cu.numel() <= INT32_MAX, "expected fewer than 2^31 sequences");
  p.sequences = static_cast<int>(cu.numel() - 1);
  return cu;
}

// A per-sequence argument [B] (score, bootstrap).
template <typename A>
TokenView per_sequence(const SequenceArgs<A>& p, const std::optional<Tensor>& t, const char* name) {
  if (!t) return {};
  RL_CHECK(t->dim() == 1 && t->numel() == p.sequences, name, ": expected [", p.sequences, "]");
  return view_of(*t, name);
}

template <typename A>
A* output(const Tensor& t) {
  return static_cast<A*>(t.mutable_data_ptr());
}

template <typename A>
void set_kl(SequenceArgs<A>& p, const Tensor& logprob, const Tensor& ref_logprob,
            const Tensor& score, double beta, int64_t estimator, A* rewards_ptr, A* kl_ptr) {
  RL_CHECK(estimator >= 0 && estimator <= static_cast<int64_t>(KlEstimator::abs),
           "unknown estimator");
  p.logprob = view_of(logprob, "logprob");
  p.ref_logprob = tokens_like(ref_logprob, logprob, "ref_logprob");
  p.score = per_sequence(p, score, "score");
  p.beta = static_cast<A>(beta);
  p.estimator = static_cast<KlEstimator>(estimator);
  p.rewards = rewards_ptr;
  p.kl = kl_ptr;
}

template <typename A>
void set_gae(SequenceArgs<A>& p, const Tensor& like, const Tensor& values, double gamma, double lam,
             A* advantages_ptr, A* returns_ptr) {
  p.values = tokens_like(values, like, "values");
  p.gamma = static_cast<A>(gamma);
  p.gamma_lam = static_cast<A>(gamma * lam);
  p.advantages = advantages_ptr;
  p.returns = returns_ptr;
}

// Whether the kFlat variant applies.
template <typename A>
bool is_flat(const SequenceArgs<A>& p) {
  bool flat = p.cu_seqlens == nullptr && p.steps % kPerLane == 0;
  // Arrays: nvcc's host pass of a range-for over a braced list does not compile with g++.
  const TokenView views[] = {p.logprob, p.ref_logprob, p.given_rewards, p.values, p.mask};
  for (const TokenView& v : views) {
    if (v.data == nullptr) continue;
    flat &= v.vectors(v.data) && v.vector != 8;
    flat &= p.sequences == 1 || v.row_step == p.steps * v.step;
  }
  const A* const outputs[] = {p.advantages, p.returns, p.rewards, p.kl};  // null: none
  for (const A* out : outputs) flat &= reinterpret_cast<uintptr_t>(out) % 16 == 0;
  return flat;
}

// Launches the kernels; whitens p.advantages if asked. Sets the work distribution of `p`; the
// caller sets the rest.
template <typename A, bool kKl, bool kScan>
void run_sequences(const char* op, SequenceArgs<A> p, const Tensor& like, bool whiten) {
  if (p.tokens == 0) return;
  RL_CHECK(p.sequences > 0, op, ": tokens, but no sequence");
  const cudaStream_t stream = current_stream(like);
  // The distribution does not change results. The length of packed sequences is estimated by their
  // mean.
  const int64_t tiles = (p.tokens / p.sequences + kTile - 1) / kTile;
  p.ranges = p.sequences < kFewSequences && tiles > 2 * kRangeTiles;
  p.work = static_cast<unsigned>((p.ranges ? p.tokens / kRange : 0) + p.sequences);
  const int64_t likely = p.cu_seqlens ? 2 * tiles : tiles;  // many ragged ones exceed the mean
  p.group_warps = kMaxWarps;
  while (p.group_warps > 1 && p.group_warps / 2 >= likely) p.group_warps /= 2;
  // Groups of several warps use __syncthreads, so each needs its own block.
  p.groups = p.group_warps == 1 ? kMaxWarps : 1;
  const int64_t most = whiten ? kMaxPartials : std::numeric_limits<int32_t>::max();
  const unsigned blocks = blocks_for(p.work, p.groups, most);
  std::optional<Tensor> partials, segments;
  if (whiten) {
    partials = new_partials(like, blocks);
    p.partials = static_cast<PivotedSums*>(partials->mutable_data_ptr());
  }
  if constexpr (kScan) {
    if (p.ranges) {
      segments = empty_like_device(like, {p.tokens / kTile + p.sequences, 2},
                                   acc_dtype(like.scalar_type()));
      p.segments = static_cast<GaeSegment<A>*>(segments->mutable_data_ptr());
      launch(op, gae_segments_kernel<A, kKl>,
             blocks_for(int64_t{p.work} * kRangeTiles, kMaxWarps, INT32_MAX), kMaxWarps * 32, 0,
             stream, p);
    }
  }
  auto* kernel = sequence_kernel<A, kKl, kScan, false>;
  if constexpr (std::is_same_v<A, float>)
    if (is_flat(p)) kernel = sequence_kernel<A, kKl, kScan, true>;
  launch(op, kernel, blocks, p.groups * p.group_warps * 32, 0, stream, p);
  if (!whiten) return;
  TokenView advantages;
  advantages.data = reinterpret_cast<const char*>(p.advantages);
  advantages.kind = std::is_same_v<A, double> ? TokenKind::f64 : TokenKind::f32;
  advantages.step = sizeof(A);
  advantages.row_step = like.size(like.dim() - 1) * int64_t{sizeof(A)};
  advantages.vector = 16;
  whiten_from<A>(op, advantages, p.mask, tiles_of(like, {advantages, p.mask}), *partials, true,
                 true, p.advantages, stream);
}

// ---- ops --------------------------------------------------------------------------------------

Tensor kl_reward(Tensor logprob, Tensor ref_logprob, Tensor score, double beta, int64_t estimator,
                 std::optional<Tensor> cu_seqlens, std::optional<Tensor> mask) {
  const torch::stable::accelerator::DeviceGuard guard(logprob.get_device_index());
  Tensor out = new_stacked_tokens(logprob, 2);
  with_acc(logprob, [&](auto zero) {
    using A = decltype(zero);
    SequenceArgs<A> p{};
    const auto cu = set_layout(p, logprob, cu_seqlens);
    A* const rewards_ptr = output<A>(out);
    set_kl(p, logprob, ref_logprob, score, beta, estimator, rewards_ptr, rewards_ptr + p.tokens);
    p.mask = mask_like(mask, logprob);
    run_sequences<A, true, false>("kl_reward", p, logprob, false);
  });
  return out;
}

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

Tensor kl_gae(Tensor logprob, Tensor ref_logprob, Tensor score, Tensor values, double beta,
              int64_t estimator, double gamma, double lam, bool whiten,
              std::optional<Tensor> cu_seqlens, std::optional<Tensor> mask) {
  const torch::stable::accelerator::DeviceGuard guard(logprob.get_device_index());
  Tensor out = new_stacked_tokens(logprob, 4);
  with_acc(logprob, [&](auto zero) {
    using A = decltype(zero);
    SequenceArgs<A> p{};
    const auto cu = set_layout(p, logprob, cu_seqlens);
    A* const out_ptr = output<A>(out);  // advantages, returns, rewards, kl
    const int64_t n = p.tokens;
    set_kl(p, logprob, ref_logprob, score, beta, estimator, out_ptr + 2 * n, out_ptr + 3 * n);
    set_gae(p, logprob, values, gamma, lam, out_ptr, out_ptr + n);
    p.mask = mask_like(mask, logprob);
    run_sequences<A, true, true>("kl_gae", p, logprob, whiten);
  });
  return out;
}

}  // namespace
}  // namespace rl

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CUDA, m) {
  m.impl("kl_reward", TORCH_BOX(&rl::kl_reward));
  m.impl("gae", TORCH_BOX(&rl::gae));
  m.impl("kl_gae", TORCH_BOX(&rl::kl_gae));
}
