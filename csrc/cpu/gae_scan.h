// The GAE recurrence over many sequences: the core of gae and kl_gae.
//
// Each sequence is one serial chain (A_t needs A_{t+1}), bound by the latency of a multiply and an
// add. So kLanes sequences advance together, step by step from their ends, and hide each other's
// latency. A lane that has finished takes the next sequence, hence ragged lengths cost nothing. The
// arithmetic of a sequence is that of the naive loop, whatever shares its group: compiled for the
// baseline instruction set, which on x86-64 has no fused multiply-add, it is equal to that loop bit
// for bit.
#pragma once

#include "tokens.h"

namespace rl {

// Given rewards, with the interface of KlRewards.
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
    sequences.parallel([&](int64_t first, int64_t last) { run_range(sequences, first, last); });
  }

 private:
  static constexpr int kLanes = 8;
  static constexpr int64_t kChunk =
      512;  // steps between two refills: four lanes of scratch stay in L1
  static_assert(kChunk <= kBlock);

  // A sequence in progress: the tokens [begin, at) are still to do.
  struct Lane {
    int64_t b = 0;
    int64_t begin = 0;
    int64_t at = 0;
    int64_t scored = -1;
    A next_value = 0;
    A next_advantage = 0;
  };

  void run_range(const Sequences& sequences, int64_t next, int64_t last) const {
    Lane lanes[kLanes];
    int live = 0;
    const auto refill = [&] {
      for (; live < kLanes && next < last; ++next) {
        if (sequences.begin(next) == sequences.end(next)) continue;
        const auto [begin, end] = trim(sequences.begin(next), sequences.end(next));
        if (begin == end) continue;
        Lane& lane = lanes[live++];
        lane = Lane{next, begin, end};
        lane.scored = rewards_.scored_token(begin, end);
        if (!bootstrap_.empty()) lane.next_value = bootstrap_[next];
      }
    };
    for (refill(); live == kLanes; refill()) {
      int64_t steps = kChunk;
      for (const Lane& lane : lanes) steps = std::min(steps, lane.at - lane.begin);
      advance<kLanes>(lanes, steps);
      live =
          static_cast<int>(std::remove_if(lanes, lanes + kLanes,
                                          [](const Lane& lane) { return lane.at == lane.begin; }) -
                           lanes);
    }
    for (int i = 0; i < live; ++i) {
      while (lanes[i].at > lanes[i].begin) {
        advance<1>(lanes + i, std::min(kChunk, lanes[i].at - lanes[i].begin));
      }
    }
  }

  // The tokens from the first to the last unmasked one; outputs of those outside are 0. Padding is
  // most of what masks hold, and so it takes no part in the scan.
  std::pair<int64_t, int64_t> trim(int64_t begin, int64_t end) const {
    const auto [first, last] = mask_.kept_range(begin, end);
    for (const auto& [from, to] : {std::pair{begin, first}, std::pair{last, end}}) {
      std::fill(advantages_ + from, advantages_ + to, A(0));
      std::fill(returns_ + from, returns_ + to, A(0));
      rewards_.skip(from, to);
    }
    return {first, last};
  }

  // Moves each of `Count` lanes `steps` tokens towards its beginning. The chains run in scratch
  // memory: rows of T floats lie a power of two apart only too often, and would evict each other
  // from L1.
  template <int Count>
  void advance(Lane* lanes, int64_t steps) const {
    A advantage[Count][kChunk];  // TD errors at first
    A value_scratch[Count][kChunk];
    const A* value[Count];
    const uint8_t* keep[Count];
    bool masked = false;
    for (int i = 0; i < Count; ++i) {
      Lane& lane = lanes[i];
      lane.at -= steps;
      keep[i] = mask_.from(lane.at, steps);
      masked |= keep[i] != nullptr;
      A reward_scratch[kBlock];
      const A* reward = rewards_.run(lane.b, lane.scored, lane.at, steps, keep[i], reward_scratch);
      value[i] = values_.load(lane.at, steps, keep[i], value_scratch[i]);
      lane.next_value = keep[i] ? td_errors_masked(reward, value[i], keep[i], steps,
                                                   lane.next_value, advantage[i])
                                : td_errors(reward, value[i], steps, lane.next_value, advantage[i]);
    }
    masked ? scan_masked<Count>(lanes, keep, steps, advantage)
           : scan<Count>(lanes, steps, advantage);
    for (int i = 0; i < Count; ++i) {
      const A* __restrict a = advantage[i];
      const A* __restrict v = value[i];
      A* __restrict advantages = advantages_ + lanes[i].at;
      A* __restrict returns = returns_ + lanes[i].at;
      if (keep[i]) {
        for (int64_t t = 0; t < steps; ++t) {
          advantages[t] = blend(keep[i][t], a[t], A(0));
          returns[t] = blend(keep[i][t], a[t] + v[t], A(0));
        }
      } else {
        for (int64_t t = 0; t < steps; ++t) {
          advantages[t] = a[t];
          returns[t] = a[t] + v[t];
        }
      }
    }
  }

  // TD errors to advantages in place, one serial chain per lane.
  template <int Count>
  void scan(Lane* lanes, int64_t steps, A (*advantage)[kChunk]) const {
    A carry[Count];
    for (int i = 0; i < Count; ++i) carry[i] = lanes[i].next_advantage;
    for (int64_t t = steps - 1; t >= 0; --t) {
#pragma GCC unroll 8
      for (int i = 0; i < Count; ++i) {
        carry[i] = gae_step(advantage[i][t], carry[i], gamma_lam_);
        advantage[i][t] = carry[i];
      }
    }
    for (int i = 0; i < Count; ++i) lanes[i].next_advantage = carry[i];
  }

  // The same where a masked token has TD error 0 and factor 1, which hands the carry on unchanged.
  template <int Count>
  void scan_masked(Lane* lanes, const uint8_t* const* keep, int64_t steps,
                   A (*advantage)[kChunk]) const {
    A factor[Count][kChunk];
    A carry[Count];
    for (int i = 0; i < Count; ++i) {
      carry[i] = lanes[i].next_advantage;
      for (int64_t t = 0; t < steps; ++t) {
        factor[i][t] = keep[i] ? blend(keep[i][t], gamma_lam_, A(1)) : gamma_lam_;
      }
    }
    for (int64_t t = steps - 1; t >= 0; --t) {
#pragma GCC unroll 8
      for (int i = 0; i < Count; ++i) {
        carry[i] = gae_step(advantage[i][t], carry[i], factor[i][t]);
        advantage[i][t] = carry[i];
      }
    }
    for (int i = 0; i < Count; ++i) lanes[i].next_advantage = carry[i];
  }

  // TD errors of a run; returns the value that the token before it sees as V_{t+1}.
  A td_errors(const A* reward, const A* value, int64_t steps, A next_value,
              A* __restrict out) const {
    for (int64_t t = 0; t < steps - 1; ++t)
      out[t] = td_error(reward[t], value[t], value[t + 1], gamma_);
    out[steps - 1] = td_error(reward[steps - 1], value[steps - 1], next_value, gamma_);
    return value[0];
  }

  A td_errors_masked(const A* reward, const A* value, const uint8_t* keep, int64_t steps,
                     A next_value, A* __restrict out) const {
    A next[kChunk];
    for (int64_t t = steps - 1; t >= 0; --t) {
      next[t] = next_value;
      next_value = blend(keep[t], value[t], next_value);
    }
    for (int64_t t = 0; t < steps; ++t) {
      const A delta = td_error(reward[t], value[t], next[t], gamma_);
      out[t] = blend(keep[t], delta, A(0));
    }
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
