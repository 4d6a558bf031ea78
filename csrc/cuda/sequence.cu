// KL rewards and the GAE recurrence over many sequences: the core of kl_reward, gae and kl_gae.
//
// B sequences, T steps, N tokens. A sequence is cut into tiles of 128 tokens, counted from its
// begin. A warp composes its tile's steps into one (GaeRun) by a shuffle scan, and the advantage is
// carried from tile to tile in order, from the end. So the bits of a sequence depend on its tokens
// alone: not on the warps that share it, its neighbours, its place in memory, or masked tokens
// behind its end.
//
// Walks. A group of 1 to 8 warps walks a sequence from its end, in each round a tile for every
// warp. Rounds of whole tiles of aligned fp32 (or fp64) have a loop of their own, which reads the
// next round before it uses this one. Few long sequences would leave most of a GPU idle: they are
// cut into ranges of 4096 tokens. One launch composes every tile (gae_runs_kernel), a second one
// walks all ranges at the same time, each carrying the advantage over the tiles behind it first.
// Limits: one long sequence among many short packed ones is walked by one group; and where a masked
// gap follows a range, a warp searches it.
#include "../common/sequence.h"
#include "whiten.cuh"

namespace rl {

constexpr int kMaxWarps = 8;  // of a group
constexpr int kRangeTiles = 32;
constexpr int64_t kRange = kRangeTiles * kTile;
constexpr int64_t kFewSequences = 128;  // fewer, and long: cut into ranges

template <typename A>
struct SequenceArgs {
  TokenView logprob, ref_logprob, score;  // with KL: rewards are made here
  TokenView given_rewards;                // without KL
  TokenView values, bootstrap;
  TokenView mask;
  const int32_t* cu_seqlens;  // null: padded
  int sequences;
  int64_t steps, tokens;
  unsigned work;    // sequences, or ranges
  bool ranges;      // a group walks a range, not a sequence
  int group_warps;  // 1, 2, 4 or 8
  int groups;       // of a block
  KlEstimator estimator;
  A beta, gamma, gamma_lam;
  A *advantages, *returns, *rewards, *kl;
  GaeRun<A>* runs;        // of every tile, if ranges are scanned
  PivotedSums* partials;  // of the advantages, one a block, or null
};

namespace {

// Sequence b, or the tiles [first, last) of it.
struct Walk {
  int64_t begin, length;
  int b, first, last;

  __device__ __forceinline__ int tiles() const {
    return static_cast<int>((length + kTile - 1) / kTile);
  }
  // Tokens of a tile.
  __device__ __forceinline__ int count(int tile) const {
    const int64_t left = length - int64_t{tile} * kTile;
    return left <= 0 ? 0 : left < kTile ? static_cast<int>(left) : kTile;
  }
};

// A wrong cu_seqlens cannot reach memory: ends are clamped to the tokens, and 0 <= begin <= end.
template <typename A>
__device__ __forceinline__ int64_t end_of(const SequenceArgs<A>& p, int64_t b) {
  if (p.cu_seqlens == nullptr) return b * p.steps;
  return clamp(static_cast<int64_t>(p.cu_seqlens[b]), int64_t{0}, p.tokens);
}

// Sequence b's units (ranges, or tiles of scratch) are numbered from here: sequences of any
// lengths have numbers of their own, below N / unit + B, and nobody needs to count lengths first.
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
  const int64_t row = p.cu_seqlens ? 0 : walk.b, column = p.cu_seqlens ? walk.begin : 0;
  const bool vectors = p.mask.vectors(p.mask.at(row, column));
#pragma unroll 1
  for (const int tiles = walk.tiles(); tile < tiles; ++tile) {
    const int count = walk.count(tile);
    const int64_t begin = column + int64_t{tile} * kTile;
    const bool as_vectors = vectors && count == kTile;
    const uint32_t raw = fetch_mask(p.mask, p.mask.at(row, begin), count, as_vectors);
    const unsigned keep = settle_mask(p.mask, raw, count, as_vectors);
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

// A value that the compiler takes for a new one: what it makes of it is made again in each turn of
// a loop, where keeping it would cost registers.
__device__ __forceinline__ float made_again(float x) {
#if RL_PTX
  asm volatile("" : "+f"(x));
#endif
  return x;
}
__device__ __forceinline__ double made_again(double x) {
#if RL_PTX
  asm volatile("" : "+d"(x));
#endif
  return x;
}
// A lane's reads of one tile: all are in flight before the first is used. kFlat: padded rows of a
// multiple of four tokens, contiguous and aligned to 16 bytes, in A: a lane's tokens are a vector
// in every tile, or are not there.
template <typename A, bool kKl, bool kScan, bool kFlat>
struct TileReads {
  RawTile<A> first, second, values;  // logprob and ref_logprob, or the given rewards
  uint32_t mask;
  unsigned vectors;  // a bit for each of the above

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

// body(kl of two log-probs) with the estimator of the call: one switch for many tokens.
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

// gamma * lam to the powers that the scan of a tile without masked tokens needs.
template <typename A>
struct Powers {
  A lane;    // of a lane's four tokens
  A behind;  // of the tokens of all lanes behind this one

  __device__ __forceinline__ explicit Powers(A gamma_lam) {
    A power = gamma_lam * gamma_lam;
    lane = power *= power;
    behind = 1;
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2, power *= power)
      if (!(lane_id() & lanes)) behind *= power;
  }
};

// What a warp tells the others of its group about its tile.
template <typename A>
struct Shared {
  A first_value[kMaxWarps];
  GaeRun<A> run[kMaxWarps];
  unsigned char found[kMaxWarps];
};

// One round of a group: each warp takes a tile. kRuns: it composes the tile and writes nothing
// else.
template <typename A, bool kKl, bool kScan, bool kFlat, bool kRuns>
struct Round {
  const SequenceArgs<A>& p;
  const Powers<A> powers;
  A* stage;
  Shared<A>& shared;
  int warp, warps;

  // What stands behind this warp's tile, but for the advantage; moves carry.value and carry.found
  // over the group. `first`: the tile's first unmasked value, if it has one.
  __device__ __forceinline__ Carry<A> behind_tile(bool found, A first, Carry<A>& carry) const {
    Carry<A> behind = carry;
    if (warps == 1) {
      if (found) carry.value = first, carry.found = true;
      return behind;
    }
    if (lane_id() == 0) {
      if constexpr (kScan) shared.first_value[warp] = first;
      shared.found[warp] = found;
    }
    __syncthreads();
    const int of = lane_id() < warps ? lane_id() : 0;
    const unsigned founders = __ballot_sync(kAllLanes, lane_id() < warps && shared.found[of]);
    const unsigned later = founders & ~((2u << warp) - 1u);
    if constexpr (kScan) {
      const A value = shared.first_value[of];
      const A next = __shfl_sync(kAllLanes, value, later ? __ffs(later) - 1 : 0);
      const A head = __shfl_sync(kAllLanes, value, founders ? __ffs(founders) - 1 : 0);
      if (later) behind.value = next;
      if (founders) carry.value = head;
    } else {
      __syncthreads();  // before the next round writes `shared`
    }
    behind.found |= later != 0;
    carry.found |= founders != 0;
    return behind;
  }

  // The advantage behind this warp's tile, of which `run` is the whole; moves carry.advantage over
  // the group.
  __device__ __forceinline__ A advantage_behind_tile(const GaeRun<A>& run, Carry<A>& carry) const {
    A mine = carry.advantage;
    if (warps == 1) {
      carry.advantage = run.from(mine);
      return mine;
    }
    if (lane_id() == 0) shared.run[warp] = run;
    __syncthreads();
    A advantage = mine;
#pragma unroll
    for (int w = kMaxWarps - 1; w >= 0; --w) {
      if (w >= warps) continue;
      if (w == warp) mine = advantage;
      advantage = shared.run[w].from(advantage);
    }
    carry.advantage = advantage;
    return mine;
  }

  // The steps of the tile composed: `tile`, and `behind`, those of the lanes behind this one.
  // `next` is the value behind this lane's tokens; a token's delta goes to where its reward was.
  // kWhole: no token is masked, so that the factors are known.
  template <bool kWhole>
  __device__ __forceinline__ void compose(unsigned keep, A next, const A (&value)[kPerLane],
                                          A (&reward)[kPerLane], GaeRun<A>& behind,
                                          GaeRun<A>& tile) const {
    GaeRun<A> run{A(0), A(1)};  // this lane's tokens, then with those of more and more lanes behind
#pragma unroll
    for (int j = kPerLane - 1; j >= 0; --j) {
      if (!kWhole && !(keep >> j & 1u)) continue;
      reward[j] = td_error(reward[j], value[j], next, p.gamma);
      next = value[j];
      run = GaeRun<A>{reward[j], p.gamma_lam}.followed_by(run);
    }
    A power = made_again(powers.lane);  // then of more and more lanes
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2, power *= power) {
      const A delta = __shfl_down_sync(kAllLanes, run.delta, lanes);
      const A factor = kWhole ? power : __shfl_down_sync(kAllLanes, run.factor, lanes);
      if (lane_id() + lanes >= 32) continue;
      if constexpr (kWhole) {
        run.delta = gae_step(run.delta, delta, power);
      } else {
        run = run.followed_by({delta, factor});
      }
    }
    tile = {__shfl_sync(kAllLanes, run.delta, 0),
            kWhole ? power : __shfl_sync(kAllLanes, run.factor, 0)};
    behind = {__shfl_down_sync(kAllLanes, run.delta, 1),
              kWhole ? powers.behind : __shfl_down_sync(kAllLanes, run.factor, 1)};
    if (lane_id() == 31) behind = {A(0), A(1)};
  }

  // `tile` of this warp; behind the last tile of the round stands `carry`, which moves to its
  // begin.
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
        settle(view, raw, (vectors & bit) != 0, stage, x);
      }
    };
    const auto write = [&](A* to, const A(&x)[kPerLane]) {
      if constexpr (kFlat) {
        if (here) put_vectors(to + out, x);
      } else {
        put(to + out, count, stage, x);
      }
    };
    const unsigned keep =
        kFlat ? nibble(reads.mask) : settle_mask(p.mask, reads.mask, count, (vectors & 8) != 0);
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
    const Carry<A> behind = behind_tile(holders != 0, first, carry);
    if (later == 0) next = behind.value;
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
      if (!behind.found && later == 0) {  // here is the last unmasked token of the sequence, if any
#pragma unroll
        for (int j = 0; j < kPerLane; ++j)
          if (keep >> j == 1u) reward[j] += score;
      }
      if constexpr (!kRuns) {
        write(p.kl, kl);
        write(p.rewards, reward);
      }
    }
    if constexpr (kScan) {
      GaeRun<A> after_lane, all;
      if (__all_sync(kAllLanes, keep == 0xfu)) {
        compose<true>(keep, next, value, reward, after_lane, all);
      } else {
        compose<false>(keep, next, value, reward, after_lane, all);
      }
      if constexpr (kRuns) {
        if (lane_id() == 0) p.runs[first_unit(p, walk.b, kTile) + tile] = all;
        return;
      }
      A advantage = after_lane.from(advantage_behind_tile(all, carry));
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

// Blocks of eight warps on one SM, at least: as many as leave the kernel enough registers. The
// largest kernel spills at three on sm_100.
template <typename A, bool kKl, bool kScan, bool kFlat>
constexpr int kResident = std::is_same_v<A, double> ? 2
                          : !kKl || !kScan || kFlat ? 4
                          : RL_PTX < 1000           ? 3
                                                    : 2;

// Walks every sequence, or every range. Idle warps of a group's last tiles carry on unchanged.
template <typename A, bool kKl, bool kScan, bool kFlat>
__global__ void __launch_bounds__(kMaxWarps * 32, kResident<A, kKl, kScan, kFlat>)
    sequence_kernel(const SequenceArgs<A> p) {
  __shared__ alignas(16) A stages[kMaxWarps][kTile];
  __shared__ Shared<A> shared;
  // A block has one group of several warps, or several of one warp.
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
    // A range that does not end its sequence is a whole number of rounds.
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

// The run of every tile, a warp each; `work` counts ranges.
template <typename A, bool kKl>
__global__ void __launch_bounds__(kMaxWarps * 32, 2) gae_runs_kernel(const SequenceArgs<A> p) {
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

// Fills in the layout of `like`; the tensor returned keeps cu_seqlens alive.
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

// One value of each sequence (score, bootstrap).
template <typename A>
TokenView per_sequence(const SequenceArgs<A>& p, const std::optional<Tensor>& t, const char* name) {
  if (!t) return {};
  RL_CHECK(t->dim() == 1 && t->numel() == p.sequences, name, ": expected [", p.sequences, "]");
  return view_of(*t, name);
}

// body(A{}) with the accumulator type of `like`.
template <typename F>
void with_acc(const Tensor& like, const F& body) {
  like.scalar_type() == ScalarType::Double ? body(double{}) : body(float{});
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

// Whether the kernel that reads nothing but vectors will do.
template <typename A>
bool is_flat(const SequenceArgs<A>& p) {
  bool flat = p.cu_seqlens == nullptr && p.steps % kPerLane == 0;
  // Arrays: of a list in braces nvcc makes no loop that a host compiler takes.
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

// Runs the kernels, and whitens p.advantages on request. All but the walks must be set.
template <typename A, bool kKl, bool kScan>
void run_sequences(const char* op, SequenceArgs<A> p, const Tensor& like, bool whiten) {
  if (p.tokens == 0) return;
  RL_CHECK(p.sequences > 0, op, ": tokens, but no sequence");
  const cudaStream_t stream = current_stream(like);
  // The same bits either way. Padded rows tell their length; packed ones only their mean.
  const int64_t tiles = (p.tokens / p.sequences + kTile - 1) / kTile;
  p.ranges = p.sequences < kFewSequences && tiles > 2 * kRangeTiles;
  p.work = static_cast<unsigned>((p.ranges ? p.tokens / kRange : 0) + p.sequences);
  const int64_t likely = p.cu_seqlens ? 2 * tiles : tiles;  // ragged: many are longer
  p.group_warps = kMaxWarps;
  while (p.group_warps > 1 && p.group_warps / 2 >= likely) p.group_warps /= 2;
  // Groups of several warps meet in __syncthreads, so each has a block of its own.
  p.groups = p.group_warps == 1 ? kMaxWarps : 1;
  const int64_t most = whiten ? kMaxPartials : std::numeric_limits<int32_t>::max();
  const unsigned blocks = blocks_for(p.work, p.groups, most);
  std::optional<Tensor> partials, runs;
  if (whiten) {
    partials = new_partials(like, blocks);
    p.partials = static_cast<PivotedSums*>(partials->mutable_data_ptr());
  }
  if constexpr (kScan) {
    if (p.ranges) {
      runs = empty_like_device(like, {p.tokens / kTile + p.sequences, 2},
                               acc_dtype(like.scalar_type()));
      p.runs = static_cast<GaeRun<A>*>(runs->mutable_data_ptr());
      launch(op, gae_runs_kernel<A, kKl>,
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

// kl_reward on CUDA: r_t = -beta * kl_t, plus the score on the last unmasked token of each
// sequence.
//
// Shapes: logprob, ref_logprob, mask, outputs: [B, T], or [N] with cu_seqlens [B + 1]; score [B].
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

// gae on CUDA: A_t = delta_t + gamma * lam * A_{t+1}, R_t = A_t + V_t, optionally whitened.
//
// Shapes: rewards, values, mask, outputs: [B, T], or [N] with cu_seqlens [B + 1]; bootstrap [B].
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

// kl_gae on CUDA: KL-penalised rewards, GAE and returns in one launch; whitening takes a second
// one.
//
// Shapes: logprob, ref_logprob, values, mask, outputs: [B, T], or [N] with cu_seqlens [B + 1];
// score [B].
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
