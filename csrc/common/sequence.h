// Maths of the sequence ops, shared by csrc/cpu and csrc/cuda: KL rewards, GAE, whitening.
#pragma once

#include "math.h"

namespace rl {

constexpr float kK3Limit = 10.0f;

// ---- KL rewards -------------------------------------------------------------------------------

enum class KlEstimator : int64_t { k1, k2, k3, abs };

// Estimate of KL(pi | ref) from one sampled token.
template <KlEstimator E, typename A>
RL_HD A kl_term(A logprob, A ref_logprob) {
  const A d = logprob - ref_logprob;
  if constexpr (E == KlEstimator::k1) return d;
  if constexpr (E == KlEstimator::abs) return d < A(0) ? -d : d;
  if constexpr (E == KlEstimator::k2) return A(0.5) * d * d;
  const A kl = expm1_excess(clamp(-d, A(-kLogRatioLimit), A(kLogRatioLimit)));
  return kl > A(kK3Limit) ? A(kK3Limit) : kl;
}

// a * b, never fused with a neighbouring addition on CUDA: kl_reward and kl_gae must agree bit for
// bit.
template <typename A>
RL_HD A rounded_product(A a, A b) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<A, double>) return __dmul_rn(a, b);
  if constexpr (std::is_same_v<A, float>) return __fmul_rn(a, b);
#endif
  return a * b;
}

// The reward of a token that does not carry the score.
template <typename A>
RL_HD A kl_penalty(A beta, A kl) {
  return A(0) - rounded_product(beta, kl);
}

// ---- GAE --------------------------------------------------------------------------------------

// delta_t = r_t + gamma * V_{t+1} - V_t, and A_t = delta_t + gamma * lam * A_{t+1}.
template <typename A>
RL_HD A td_error(A reward, A value, A next_value, A gamma) {
  return reward + gamma * next_value - value;
}
template <typename A>
RL_HD A gae_step(A delta, A next_advantage, A gamma_lam) {
  return delta + gamma_lam * next_advantage;
}

// A run of steps as one: A at its begin = delta + factor * (A behind its end). {0, 1} is no step.
template <typename A>
struct GaeRun {
  A delta;
  A factor;

  RL_HD A from(A next_advantage) const { return gae_step(delta, next_advantage, factor); }
  // This run and then `later`; exact where either is no step.
  RL_HD GaeRun followed_by(const GaeRun& later) const {
    return {from(later.delta), factor * later.factor};
  }
};

}  // namespace rl
