// KL rewards and the GAE recurrence over many sequences: the core of kl_reward, gae and kl_gae.
//
// B sequences, T steps, N tokens. A sequence is cut into tiles of 128 tokens, counted from its
// begin. A warp composes its tile's steps into one (GaeRun) by a shuffle scan, and the advantage is
// carried from tile to tile in order, from the end. So the bits of a sequence depend on its tokens
// alone: not on the warps that share it, its neighbours, its place in memory, or masked tokens
// behind its end.
//
// Walks. A group of 1 to 8 warps walks a sequence from its end, in each round a tile for every
// warp. Few long sequences would leave most of a GPU idle: they are cut into ranges of 4096 tokens.
// One launch composes every tile (gae_runs_kernel), a second one walks all ranges at the same time,
// each carrying the advantage over the tiles behind it first. Limits: one long sequence among many
// short packed ones is walked by one group; and where a masked gap follows a range, a warp searches
// it.
#pragma once

#include "sequence_walk.cuh"

namespace rl {

constexpr int64_t kFewSequences = 128;  // fewer, and long: cut into ranges

namespace {

// A lane's reads of one tile.
template <typename A, bool kKl, bool kScan>
struct TileReads {
  RawTile<A> first, second, values;  // logprob and ref_logprob, or the given rewards
  uint32_t mask;
  unsigned as_vector;  // a bit for each of the above

  __device__ __forceinline__ void start(const SequenceArgs<A>& p, const Place& place) {
    as_vector = fetch(kKl ? p.logprob : p.given_rewards, place, first);
    if constexpr (kKl) as_vector |= fetch(p.ref_logprob, place, second) << 1;
    if constexpr (kScan) as_vector |= fetch(p.values, place, values) << 2;
    as_vector |= fetch(p.mask, place, mask) << 3;
  }
};

template <typename A>
__device__ __forceinline__ A kl_of(KlEstimator estimator, A logprob, A ref_logprob) {
  switch (estimator) {
    case KlEstimator::k1:
      return kl_term<KlEstimator::k1>(logprob, ref_logprob);
    case KlEstimator::k2:
      return kl_term<KlEstimator::k2>(logprob, ref_logprob);
    case KlEstimator::k3:
      return kl_term<KlEstimator::k3>(logprob, ref_logprob);
    default:
      return kl_term<KlEstimator::abs>(logprob, ref_logprob);
  }
}

// What a warp tells the others of its group about its tile.
template <typename A>
struct Shared {
  A first_value[kMaxWarps];
  GaeRun<A> run[kMaxWarps];
  unsigned char found[kMaxWarps];
};

// One round of a group: each warp takes a tile. kRuns: it composes the tile and writes nothing
// else.
template <typename A, bool kKl, bool kScan, bool kRuns>
struct Round {
  const SequenceArgs<A>& p;
  A* stage;
  Shared<A>& shared;
  int warp, warps;

  __device__ __forceinline__ void group_sync() const {
    if (warps > 1) __syncthreads();
  }

  __device__ __forceinline__ GaeRun<A> shuffled_down(const GaeRun<A>& run, int lanes) const {
    return {__shfl_down_sync(kAllLanes, run.delta, lanes),
            __shfl_down_sync(kAllLanes, run.factor, lanes)};
  }

  // Where the lane's next unmasked token is in another lane, or another warp, its value; moves
  // carry.value and carry.found over the group.
  __device__ __forceinline__ Carry<A> behind_lane(unsigned keep, const A (&value)[kPerLane],
                                                  Carry<A>& carry) const {
    A own = A(0);
#pragma unroll
    for (int j = kPerLane - 1; j >= 0; --j)
      if (keep >> j & 1u) own = value[j];
    const unsigned holders = __ballot_sync(kAllLanes, keep != 0);
    const unsigned later = holders & ~((2u << lane_id()) - 1u);
    A next = __shfl_sync(kAllLanes, own, later ? __ffs(later) - 1 : 0);
    if (warps == 1) {
      const Carry<A> behind{later ? next : carry.value, carry.advantage, later || carry.found};
      const A first = __shfl_sync(kAllLanes, own, holders ? __ffs(holders) - 1 : 0);
      if (holders) carry.value = first, carry.found = true;
      return behind;
    }
    if (holders && lane_id() == __ffs(holders) - 1) shared.first_value[warp] = own;
    if (lane_id() == 0) shared.found[warp] = holders != 0;
    __syncthreads();
    Carry<A> behind{};
#pragma unroll 1
    for (int w = warps - 1; w >= 0; --w) {
      if (w == warp) behind = carry;
      if (shared.found[w]) carry.value = shared.first_value[w], carry.found = true;
    }
    if (later) behind.value = next, behind.found = true;
    return behind;
  }

  // The lane's tokens and all behind them in the tile, as one run.
  __device__ __forceinline__ GaeRun<A> scanned(GaeRun<A> run) const {
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const GaeRun<A> later = shuffled_down(run, lanes);
      if (lane_id() + lanes < 32) run = run.followed_by(later);
    }
    return run;
  }

  // The advantage behind this lane's tokens; moves carry.advantage over the group.
  __device__ __forceinline__ A advantage_behind_lane(const GaeRun<A>& run, Carry<A>& carry) const {
    GaeRun<A> behind = shuffled_down(run, 1);
    if (lane_id() == 31) behind = {A(0), A(1)};
    A mine = carry.advantage;
    if (warps == 1) {
      const GaeRun<A> all{__shfl_sync(kAllLanes, run.delta, 0),
                          __shfl_sync(kAllLanes, run.factor, 0)};
      carry.advantage = all.from(mine);
      return behind.from(mine);
    }
    if (lane_id() == 0) shared.run[warp] = run;
    __syncthreads();
    A advantage = mine;
#pragma unroll 1
    for (int w = warps - 1; w >= 0; --w) {
      if (w == warp) mine = advantage;
      advantage = shared.run[w].from(advantage);
    }
    carry.advantage = advantage;
    return behind.from(mine);
  }

  // `tile` of this warp; behind the last tile of the round stands `carry`, which moves to its
  // begin.
  __device__ __forceinline__ void run(const TileReads<A, kKl, kScan>& reads, const Walk& walk,
                                      int tile, Carry<A>& carry, A score, Spread<A>& spread) const {
    const Place place = place_of(p, walk, tile);
    const int64_t out = walk.begin + int64_t{tile} * kTile;
    const unsigned keep = settle(p.mask, place, reads.mask, reads.as_vector & 8);
    A reward[kPerLane], value[kPerLane] = {};
    settle(reads.first, reads.as_vector & 1, (kKl ? p.logprob : p.given_rewards).kind, stage,
           reward);
    if constexpr (kScan) settle(reads.values, reads.as_vector & 4, p.values.kind, stage, value);
    const Carry<A> behind = behind_lane(keep, value, carry);
    if constexpr (kKl) {
      A kl[kPerLane];
      settle(reads.second, reads.as_vector & 2, p.ref_logprob.kind, stage, kl);
      bool found = behind.found;
#pragma unroll
      for (int j = kPerLane - 1; j >= 0; --j) {
        const bool kept = keep >> j & 1u;
        kl[j] = kept ? kl_of(p.estimator, reward[j], kl[j]) : A(0);
        reward[j] = kept ? kl_penalty(p.beta, kl[j]) : A(0);
        if (kept && !found) reward[j] += score;  // the last one of the sequence
        found |= kept;
      }
      if constexpr (!kRuns) {
        put(p.kl + out, place.count, stage, kl);
        put(p.rewards + out, place.count, stage, reward);
      }
    }
    if constexpr (!kScan) {
      group_sync();  // before the next round writes `shared`
      return;
    } else {
      A next = behind.value;
      GaeRun<A> run{A(0), A(1)};
      A delta[kPerLane];
#pragma unroll
      for (int j = kPerLane - 1; j >= 0; --j) {
        if (!(keep >> j & 1u)) continue;
        delta[j] = td_error(reward[j], value[j], next, p.gamma);
        next = value[j];
        run = GaeRun<A>{delta[j], p.gamma_lam}.followed_by(run);
      }
      run = scanned(run);
      if constexpr (kRuns) {
        if (lane_id() == 0) p.runs[first_unit(p, walk.b, kTile) + tile] = run;
        return;
      }
      A advantage = advantage_behind_lane(run, carry);
#pragma unroll
      for (int j = kPerLane - 1; j >= 0; --j) {
        const bool kept = keep >> j & 1u;
        if (kept) advantage = gae_step(delta[j], advantage, p.gamma_lam);
        reward[j] = kept ? advantage : A(0);
        value[j] = kept ? advantage + value[j] : A(0);
        if (kept && p.partials) spread.add(advantage);
      }
      put(p.advantages + out, place.count, stage, reward);
      put(p.returns + out, place.count, stage, value);
    }
  }
};

// Walks every sequence, or every range. Idle warps of a group's last tiles carry on unchanged.
template <typename A, bool kKl, bool kScan>
__global__ void __launch_bounds__(kMaxWarps * 32, std::is_same_v<A, double> ? 2 : 4)
    sequence_kernel(const SequenceArgs<A> p) {
  __shared__ alignas(16) A stages[kMaxWarps][kTile];
  __shared__ Shared<A> shared;
  const int warps = p.group_warps, groups = blockDim.x / 32 / warps;
  const int warp = threadIdx.x / 32 % warps, group = threadIdx.x / 32 / warps;
  const Round<A, kKl, kScan, false> round{p, stages[threadIdx.x / 32], shared, warp, warps};
  Spread<A> spread = Spread<A>::none();
  for (unsigned work = blockIdx.x * groups + group; work < p.work; work += gridDim.x * groups) {
    const Walk walk = walk_of(p, work);
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
      TileReads<A, kKl, kScan> reads;
      reads.start(p, place_of(p, walk, tile));
      round.run(reads, walk, tile, carry, score, spread);
    }
  }
  if (p.partials == nullptr) return;
  const Moments all = merge_block(spread.moments());
  if (threadIdx.x == 0) p.partials[blockIdx.x] = all;
}

// The run of every tile, a warp each; `work` counts ranges.
template <typename A, bool kKl>
__global__ void __launch_bounds__(kMaxWarps * 32) gae_runs_kernel(const SequenceArgs<A> p) {
  __shared__ alignas(16) A stages[kMaxWarps][kTile];
  __shared__ Shared<A> shared;
  const unsigned item = blockIdx.x * kMaxWarps + threadIdx.x / 32;
  if (item / kRangeTiles >= p.work) return;
  const Walk walk = walk_of(p, item / kRangeTiles);
  const int tile = walk.first + item % kRangeTiles;
  if (tile >= walk.last) return;
  const Round<A, kKl, true, true> round{p, stages[threadIdx.x / 32], shared, 0, 1};
  TileReads<A, kKl, true> reads;
  reads.start(p, place_of(p, walk, tile));
  Carry<A> carry{A(0), A(0), false};
  A score = 0;
  if constexpr (kKl) score = read_one<A>(p.score, 0, walk.b);
  if (p.bootstrap.data) carry.value = read_one<A>(p.bootstrap, 0, walk.b);
  carry = look_ahead<A, true>(p, walk, carry, tile + 1);
  Spread<A> spread = Spread<A>::none();
  round.run(reads, walk, tile, carry, score, spread);
}

}  // namespace

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
TokensView per_sequence(const SequenceArgs<A>& p, const std::optional<Tensor>& t,
                        const char* name) {
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
  const int groups = p.group_warps == 1 ? kMaxWarps : 1;
  const int64_t most = whiten ? kMaxPartials : std::numeric_limits<int32_t>::max();
  const unsigned blocks = blocks_for(p.work, groups, most);
  std::optional<Tensor> partials, runs;
  if (whiten) {
    partials = new_partials(like, blocks);
    p.partials = static_cast<Moments*>(partials->mutable_data_ptr());
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
  launch(op, sequence_kernel<A, kKl, kScan>, blocks, groups * p.group_warps * 32, 0, stream, p);
  if (!whiten) return;
  TokensView advantages;
  advantages.data = reinterpret_cast<const char*>(p.advantages);
  advantages.kind = std::is_same_v<A, double> ? TokenKind::f64 : TokenKind::f32;
  advantages.stride = 1;
  advantages.stride_row = like.size(like.dim() - 1);
  whiten_from<A>(op, advantages, p.mask, tiles_of(like, advantages, p.mask), *partials, true, true,
                 p.advantages, stream);
}

}  // namespace rl
