// Maths of the sequence ops (kl_reward, gae, kl_gae) on both devices: KL rewards and GAE.
#pragma once

#include "math.h"

namespace rl {

// ---- KL rewards -------------------------------------------------------------------------------

enum class KlEstimator : int64_t { k1, k2, k3, abs };
constexpr float kK3Limit = 10.0f;  // upper bound of the k3 estimate

// Estimate of KL(pi | ref) from one sampled token, with d = logprob - ref_logprob:
//   k1: d,  k2: d^2 / 2,  k3: e^-d - 1 + d,  abs: |d|.
template <KlEstimator E, typename A>
RL_HD A kl_term(A logprob, A ref_logprob) {
  const A d = logprob - ref_logprob;
  if constexpr (E == KlEstimator::k1) return d;
  if constexpr (E == KlEstimator::abs) return d < A(0) ? -d : d;
  if constexpr (E == KlEstimator::k2) return A(0.5) * d * d;
  const A kl = expm1_excess(clamp(-d, A(-kLogRatioLimit), A(kLogRatioLimit)));
  return kl > A(kK3Limit) ? A(kK3Limit) : kl;
}

// The reward -beta * kl of a token; the caller adds the score to the last one. The product is never
// contracted with that sum on CUDA, so kl_reward and kl_gae agree bitwise.
template <typename A>
RL_HD A kl_penalty(A beta, A kl) {
  return A(0) - rounded_product(beta, kl);
}

// ---- GAE --------------------------------------------------------------------------------------

// delta_t = r_t + gamma * V_{t+1} - V_t;  A_t = delta_t + gamma * lam * A_{t+1}.
template <typename A>
RL_HD A td_error(A reward, A value, A next_value, A gamma) {
  return reward + gamma * next_value - value;
}
template <typename A>
RL_HD A gae_step(A delta, A next_advantage, A gamma_lam) {
  return delta + gamma_lam * next_advantage;
}

// A segment of GAE steps as one affine map, A_begin = delta + factor * A_end, where A_end is the
// advantage of the step after the segment. {0, 1} is the identity. Segments compose associatively.
template <typename A>
struct GaeSegment {
  A delta;
  A factor;

  RL_HD A apply(A next_advantage) const { return gae_step(delta, next_advantage, factor); }
  // This segment followed in time by `later`; exact if either is the identity.
  RL_HD GaeSegment followed_by(const GaeSegment& later) const {
    return {apply(later.delta), factor * later.factor};
  }
};

}  // namespace rl
