// The walks of sequence_scan.cuh: which tiles of which sequence a group of warps takes, and what
// stands behind them.
//
// B sequences, T steps, N tokens.
#pragma once

#include "whiten.cuh"

namespace rl {

constexpr int kRangeTiles = 32;
constexpr int64_t kRange = kRangeTiles * kTile;

template <typename A>
struct SequenceArgs {
  TokensView logprob, ref_logprob, score;  // with KL: rewards are made here
  TokensView given_rewards;                // without KL
  TokensView values, bootstrap;
  TokensView mask;
  const int32_t* cu_seqlens;  // null: padded
  int sequences;
  int64_t steps, tokens;
  unsigned work;    // sequences, or ranges
  bool ranges;      // a group walks a range, not a sequence
  int group_warps;  // 1, 2, 4 or 8
  KlEstimator estimator;
  A beta, gamma, gamma_lam;
  A *advantages, *returns, *rewards, *kl;
  GaeRun<A>* runs;    // of every tile, if ranges are scanned
  Moments* partials;  // of the advantages, one a block, or null
};

namespace {

// Sequence b, or the tiles [first, last) of it.
struct Walk {
  int64_t begin, length;
  int b, first, last;

  __device__ __forceinline__ int tiles() const {
    return static_cast<int>((length + kTile - 1) / kTile);
  }
};

// A wrong cu_seqlens cannot reach memory: ends are clamped to the tokens, and 0 <= begin <= end.
template <typename A>
__device__ __forceinline__ int64_t end_of(const SequenceArgs<A>& p, int64_t b) {
  if (p.cu_seqlens == nullptr) return b * p.steps;
  return clamp(static_cast<int64_t>(p.cu_seqlens[b]), int64_t{0}, p.tokens);
}

// Sequence b's units (ranges, or tiles of scratch) are numbered from here: sequences of any lengths
// have numbers of their own, below N / unit + B, and nobody needs to count lengths first.
template <typename A>
__device__ __forceinline__ int64_t first_unit(const SequenceArgs<A>& p, int64_t b, int64_t unit) {
  return end_of(p, b) / unit + b;
}

template <typename A>
__device__ __forceinline__ Walk walk_of(const SequenceArgs<A>& p, unsigned work) {
  Walk walk;
  walk.b = static_cast<int>(work);
  if (p.ranges) {
    int low = 0, high = p.sequences;  // the last b whose first unit is at most `work`
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
    if (walk.first < 0) walk.last = walk.first = 0;  // only where cu_seqlens is wrong
  }
  return walk;
}

template <typename A>
__device__ __forceinline__ Place place_of(const SequenceArgs<A>& p, const Walk& walk, int tile) {
  const int64_t at = int64_t{tile} * kTile, left = walk.length - at;
  const bool packed = p.cu_seqlens != nullptr;
  const int count = left <= 0 ? 0 : left < kTile ? static_cast<int>(left) : kTile;
  return {packed ? 0 : walk.b, packed ? walk.begin + at : at, count};
}

// What stands behind a token: the next unmasked value (the bootstrap if there is none), and the
// advantage.
template <typename A>
struct Carry {
  A value, advantage;
  bool found;  // there is an unmasked token behind
};

// The first unmasked token from `tile` on.
template <typename A, bool kScan>
__device__ Carry<A> look_ahead(const SequenceArgs<A>& p, const Walk& walk, Carry<A> carry,
                               int tile) {
#pragma unroll 1
  for (const int tiles = walk.tiles(); tile < tiles; ++tile) {
    const Place place = place_of(p, walk, tile);
    uint32_t raw;
    const bool as_vector = fetch(p.mask, place, raw);
    const unsigned keep = settle(p.mask, place, raw, as_vector);
    const unsigned holders = __ballot_sync(kAllLanes, keep != 0);
    if (holders == 0) continue;
    const int lane = __ffs(holders) - 1;
    const int token = lane * kPerLane + __ffs(__shfl_sync(kAllLanes, keep, lane)) - 1;
    if constexpr (kScan) carry.value = read_one<A>(p.values, place.row, place.begin + token);
    carry.found = true;
    break;
  }
  return carry;
}

// The advantage behind `tile`, over the runs of the tiles from the sequence's end.
template <typename A>
__device__ A carry_over(const SequenceArgs<A>& p, const Walk& walk, int tile) {
  const GaeRun<A>* runs = p.runs + first_unit(p, walk.b, kTile);
  A advantage = 0;
#pragma unroll 1
  for (int last = walk.tiles(); last > tile; last -= 32) {
    const int mine = last - 1 - lane_id();
    GaeRun<A> run{A(0), A(1)};
    if (mine >= tile) run = runs[mine];
#pragma unroll 8
    for (int lane = 0; lane < 32; ++lane) {
      const GaeRun<A> next{__shfl_sync(kAllLanes, run.delta, lane),
                           __shfl_sync(kAllLanes, run.factor, lane)};
      advantage = next.from(advantage);
    }
  }
  return advantage;
}

}  // namespace
}  // namespace rl
