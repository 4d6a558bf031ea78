// KL-penalised rewards of a run of tokens of one sequence: the core of kl_reward and kl_gae.
#pragma once

#include "tokens.h"

namespace rl {

// Both callers compile it for each instruction set, so that kl_reward and kl_gae agree bit for bit.
template <typename A>
class KlRewards {
 public:
  KlRewards(const Tensor& logprob, const Tensor& ref_logprob, std::vector<A> score,
            const Mask& mask, double beta, int64_t estimator, A* rewards, A* kl)
      : logprob_(logprob),
        ref_logprob_(ref_logprob),
        score_(std::move(score)),
        mask_(mask),
        beta_(static_cast<A>(beta)),
        estimator_(static_cast<KlEstimator>(estimator)),
        rewards_(rewards),
        kl_(kl) {
    RL_CHECK(logprob_.count() == ref_logprob_.count(), "logprob and ref_logprob differ in size");
    RL_CHECK(estimator >= 0 && estimator <= static_cast<int64_t>(KlEstimator::abs),
             "unknown estimator");
  }

  // The token of [begin, end) that carries the sequence's score: the last unmasked one, or -1.
  int64_t scored_token(int64_t begin, int64_t end) const {
    const uint8_t* keep = mask_.data();
    int64_t t = end - 1;
    while (keep && t >= begin && !keep[t]) --t;
    return t >= begin ? t : -1;
  }

  // Outputs of the masked tokens [begin, end).
  void skip(int64_t begin, int64_t end) const {
    std::fill(rewards_ + begin, rewards_ + end, A(0));
    std::fill(kl_ + begin, kl_ + end, A(0));
  }

  // Writes and returns the rewards of the `count` tokens from `start` masked by `keep`, which
  // belong to sequence b scored at `scored`.
  RL_INLINE const A* run(int64_t b, int64_t scored, int64_t start, int64_t count,
                         const uint8_t* keep, A*) const {
    switch (estimator_) {
      case KlEstimator::k1:
        return run_as<KlEstimator::k1>(b, scored, start, count, keep);
      case KlEstimator::k2:
        return run_as<KlEstimator::k2>(b, scored, start, count, keep);
      case KlEstimator::k3:
        return run_as<KlEstimator::k3>(b, scored, start, count, keep);
      default:
        return run_as<KlEstimator::abs>(b, scored, start, count, keep);
    }
  }

 private:
  template <KlEstimator E>
  RL_INLINE const A* run_as(int64_t b, int64_t scored, int64_t start, int64_t count,
                            const uint8_t* keep) const {
    A scratch[2][kBlock];
    const A* logprob = logprob_.load(start, count, keep, scratch[0]);
    const A* ref_logprob = ref_logprob_.load(start, count, keep, scratch[1]);
    A* __restrict rewards = rewards_ + start;
    A* __restrict kl = kl_ + start;
    for (int64_t i = 0; i < count; ++i) {
      kl[i] = kl_term<E>(logprob[i], ref_logprob[i]);
      rewards[i] = kl_penalty(beta_, kl[i]);
    }
    if (scored >= start && scored < start + count) rewards[scored - start] += score_[b];
    return rewards;
  }

  Tokens logprob_;
  Tokens ref_logprob_;
  std::vector<A> score_;
  const Mask& mask_;
  A beta_;
  KlEstimator estimator_;
  A* rewards_;
  A* kl_;
};

}  // namespace rl
