// The GAE recurrence over many sequences, for gae and kl_gae:
//   A_t = delta_t + gamma * lam * A_{t+1}.
//
// A sequence is one serial chain, bound by the latency of a multiply and an add. kLanes sequences
// advance together from their ends and hide each other's latency. Each lane processes its sequence
// in chunks: vectorised TD errors first, then the chains, until the shortest chunk is done. That
// lane writes its chunk and takes the next one, of the same sequence or of the next. Ragged lengths
// therefore cost nothing, and memory is accessed in long runs.
//
// Each sequence is computed with the arithmetic of the naive loop, whatever runs in the other
// lanes. On x86-64 the result is bitwise identical to that loop: the chains are compiled for the
// baseline instruction set, without FMA, and td_errors() stores its products before it adds to
// them.
#pragma once

#include "../common/sequence.h"
#include "tokens.h"

namespace rl {

// Rewards given as a tensor, with the interface of KlRewards (sequence.cpp).
template <typename A>
class GivenRewards {
 public:
  explicit GivenRewards(const Tensor& rewards) : rewards_(rewards) {}
  int64_t scored_token(int64_t, int64_t) const { return -1; }
  void skip(int64_t, int64_t) const {}
  const A* run(int64_t, int64_t, int64_t start, int64_t count, const uint8_t* keep,
               A* scratch) const {
    return rewards_.load(start, count, keep, scratch);
  }

 private:
  Tokens rewards_;
};

template <typename A, typename Rewards>
class GaeScan {
 public:
  GaeScan(const Rewards& rewards, const Tensor& values, const Mask& mask, std::vector<A> bootstrap,
          double gamma, double lam, A* advantages, A* returns)
      : rewards_(rewards),
        values_(values),
        mask_(mask),
        bootstrap_(std::move(bootstrap)),
        gamma_(static_cast<A>(gamma)),
        gamma_lam_(static_cast<A>(gamma * lam)),
        advantages_(advantages),
        returns_(returns) {}

  void run(const Sequences& sequences) const {
    sequences.parallel([&](int64_t first, int64_t last) {
      dispatch_isa([&](auto) RL_LAMBDA_INLINE { run_range(sequences, first, last); });
    });
  }

 private:
  static constexpr int kLanes = 8;
  static constexpr int64_t kChunk = 512;  // so that the chunks of all lanes fit L1
  static_assert(kChunk <= kBlock);

  // The chains run in this buffer. Sequences are often a power of two apart and would evict each
  // other from L1; the padding offsets the lanes by a cache line.
  struct alignas(64) Chunk {
    A advantage[kChunk];  // TD errors at first
    A value[kChunk];
    A factor[kChunk];
    A padding[64 / sizeof(A)];
  };

  // A sequence in progress. Tokens [begin, start) are not loaded yet; of the loaded chunk
  // [start, start + count), the first `left` are not scanned yet. An idle lane scans zeros.
  struct Lane {
    int64_t b = 0;
    int64_t begin = 0;
    int64_t start = 0;
    int64_t count = 0;
    int64_t left = kChunk;
    int64_t scored = -1;
    const uint8_t* keep = nullptr;
    const A* value = nullptr;
    bool has_factors = false;
    A next_value = 0;
    A next_advantage = 0;
  };

  RL_INLINE void run_range(const Sequences& sequences, int64_t next, int64_t last) const {
    Chunk chunks[kLanes];
    Lane lanes[kLanes];
    Lane upcoming;  // the next sequence; idle if none is left
    int busy = 0;
    int masked = 0;  // lanes whose chunk has masked tokens
    const auto prepare = [&]() RL_LAMBDA_INLINE {
      upcoming = Lane{};
      while (next < last && upcoming.start == upcoming.begin) open(upcoming, sequences, next++);
    };
    // Loads the next chunk of lane i, of its sequence or of the next one.
    const auto feed = [&](int i) RL_LAMBDA_INLINE {
      Lane& lane = lanes[i];
      if (lane.start == lane.begin) {
        lane = upcoming;
        if (lane.start > lane.begin) prepare();
      }
      if (lane.start > lane.begin) {
        load(lane, chunks[i]);
        masked += lane.keep != nullptr;
        ++busy;
      } else {
        lane = Lane{};
        std::fill_n(chunks[i].advantage, kChunk, A(0));
      }
    };
    prepare();
    for (int i = 0; i < kLanes; ++i) feed(i);
    while (busy > 0) {
      int64_t steps = kChunk;
      for (const Lane& lane : lanes) steps = std::min(steps, lane.left);
      masked > 0 ? scan_masked(lanes, chunks, steps) : scan(lanes, chunks, steps);
      for (int i = 0; i < kLanes; ++i) {
        Lane& lane = lanes[i];
        if (lane.count == 0) continue;
        lane.left -= steps;
        if (lane.left > 0) continue;
        store(lane, chunks[i]);
        masked -= lane.keep != nullptr;
        --busy;
        feed(i);
      }
    }
  }

  // Starts a lane on sequence b. Scans only from the first to the last unmasked token, because most
  // masks are padding; outputs outside that range are 0.
  RL_INLINE void open(Lane& lane, const Sequences& sequences, int64_t b) const {
    const int64_t begin = sequences.begin(b), end = sequences.end(b);
    const auto [first, last] = mask_.kept_range(begin, end);
    for (const auto& [from, to] : {std::pair{begin, first}, std::pair{last, end}}) {
      std::fill(advantages_ + from, advantages_ + to, A(0));
      std::fill(returns_ + from, returns_ + to, A(0));
      rewards_.skip(from, to);
    }
    lane = Lane{.b = b, .begin = first, .start = last};
    lane.scored = rewards_.scored_token(first, last);
    if (!bootstrap_.empty()) lane.next_value = bootstrap_[b];
  }

  RL_INLINE void load(Lane& lane, Chunk& chunk) const {
    const int64_t steps = std::min(kChunk, lane.start - lane.begin);
    lane.start -= steps;
    lane.count = lane.left = steps;
    lane.keep = mask_.from(lane.start, steps);
    lane.has_factors = false;
    A scratch[kBlock];
    const A* reward = rewards_.run(lane.b, lane.scored, lane.start, steps, lane.keep, scratch);
    lane.value = values_.load(lane.start, steps, lane.keep, chunk.value);
    lane.next_value = lane.keep ? td_errors_masked(reward, lane, chunk)
                                : td_errors(reward, lane, chunk.advantage);
  }

  RL_INLINE void store(const Lane& lane, const Chunk& chunk) const {
    const A* __restrict a = chunk.advantage;
    const A* __restrict v = lane.value;
    const uint8_t* __restrict keep = lane.keep;
    A* __restrict advantages = advantages_ + lane.start;
    A* __restrict returns = returns_ + lane.start;
    if (keep) {
      for (int64_t t = 0; t < lane.count; ++t) {
        advantages[t] = blend(keep[t], a[t], A(0));
        returns[t] = blend(keep[t], a[t] + v[t], A(0));
      }
    } else {
      // Two loops: inputs and outputs often have the same page offset, and a load that follows a
      // store with the same offset stalls (4K aliasing).
      for (int64_t t = 0; t < lane.count; ++t) returns[t] = a[t] + v[t];
      std::copy(a, a + lane.count, advantages);
    }
  }

  // Turns TD errors into advantages in place, one serial chain per lane.
  __attribute__((noinline)) void scan(Lane* lanes, Chunk* chunks, int64_t steps) const {
    A carry[kLanes];
    A* at[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      carry[i] = lanes[i].next_advantage;
      at[i] = chunks[i].advantage + lanes[i].left - steps;
    }
    for (int64_t t = steps - 1; t >= 0; --t) {
#pragma GCC unroll 8
      for (int i = 0; i < kLanes; ++i) {
        carry[i] = gae_step(at[i][t], carry[i], gamma_lam_);
        at[i][t] = carry[i];
      }
    }
    for (int i = 0; i < kLanes; ++i) lanes[i].next_advantage = carry[i];
  }

  // The same with masks: a masked token has TD error 0 and factor 1, the identity.
  __attribute__((noinline)) void scan_masked(Lane* lanes, Chunk* chunks, int64_t steps) const {
    A carry[kLanes];
    int64_t first[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      carry[i] = lanes[i].next_advantage;
      first[i] = lanes[i].left - steps;
      if (!lanes[i].has_factors) {
        std::fill_n(chunks[i].factor, kChunk, gamma_lam_);
        lanes[i].has_factors = true;
      }
    }
    for (int64_t t = steps - 1; t >= 0; --t) {
#pragma GCC unroll 8
      for (int i = 0; i < kLanes; ++i) {
        A& advantage = chunks[i].advantage[first[i] + t];
        carry[i] = gae_step(advantage, carry[i], chunks[i].factor[first[i] + t]);
        advantage = carry[i];
      }
    }
    for (int i = 0; i < kLanes; ++i) lanes[i].next_advantage = carry[i];
  }

  // TD errors of a chunk. Returns the chunk's first value: V_{t+1} of the token before the chunk.
  RL_INLINE A td_errors(const A* __restrict reward, const Lane& lane, A* __restrict out) const {
    const A* __restrict value = lane.value;
    const int64_t last = lane.count - 1;
    for (int64_t t = 0; t < last; ++t) out[t] = gamma_ * value[t + 1];
    out[last] = gamma_ * lane.next_value;
    for (int64_t t = 0; t <= last; ++t) out[t] = (reward[t] + out[t]) - value[t];
    return value[0];
  }

  RL_INLINE A td_errors_masked(const A* __restrict reward, Lane& lane, Chunk& chunk) const {
    A* __restrict out = chunk.advantage;
    const A* __restrict value = lane.value;
    const uint8_t* __restrict keep = lane.keep;
    A next_value = lane.next_value;
    for (int64_t t = lane.count - 1; t >= 0; --t) {
      out[t] = gamma_ * next_value;
      next_value = blend(keep[t], value[t], next_value);
    }
    for (int64_t t = 0; t < lane.count; ++t) {
      out[t] = blend(keep[t], (reward[t] + out[t]) - value[t], A(0));
      chunk.factor[t] = blend(keep[t], gamma_lam_, A(1));
    }
    lane.has_factors = true;
    return next_value;
  }

  const Rewards& rewards_;
  Tokens values_;
  const Mask& mask_;
  std::vector<A> bootstrap_;
  A gamma_;
  A gamma_lam_;
  A* advantages_;
  A* returns_;
};

}  // namespace rl
