// Softmax of one row of logits: transform, row statistics and target gradient, for CPU and CUDA.
//
// Per row: z_j = softcap * tanh(logit_j / softcap) / temperature, or logit_j / temperature without
// a soft-cap; p = softmax(z). The kernels work on u_j = tanh(logit_j / softcap), or the logit, with
// z_j = u_j * dz/du.
//
// Row statistics, with m = row_max = max_j z_j rounded to A (on CPU to within 1):
//   shifted_lse  = log sum_j e^(z_j - m)        lse = m + shifted_lse
//   shifted_mean = sum_j p_j (z_j - m)          entropy = shifted_lse - shifted_mean
// Both are relative to m as stored, so the rounding of m cancels.
#pragma once

#include "math.h"

namespace rl {

template <typename A>
struct LogitTransform {
  A scale;      // 1 / temperature, rounded
  A softcap;    // 0: no soft-cap
  A scale_low;  // rounding error: 1 / temperature - scale
};

template <typename A>
struct RowStats {
  A row_max, shifted_lse;
  A shifted_mean;
};

// u of a logit. Divides by the cap: a rounded reciprocal would scale the whole row.
template <bool kCap, typename A>
RL_HD A unscaled(A logit, const LogitTransform<A>& f) {
  if constexpr (kCap) return tanh(logit / f.softcap);
  return logit;
}

template <bool kCap, typename A>
RL_HD A dz_du(const LogitTransform<A>& f) {
  return kCap ? f.softcap * f.scale : f.scale;
}

// dz/dlogit.
template <bool kCap, typename A>
RL_HD A dz_dlogit(A logit, const LogitTransform<A>& f) {
  return kCap ? f.scale * sech2(logit / f.softcap) : f.scale;
}

// Gradient of g * logprob + h * entropy with respect to the target's logit:
//   (g (1 - p_t) - h p_t (z_t - m - shifted_mean)) dz/dlogit
// with 1 - p_t = -expm1(logprob), which does not cancel. `shifted`: z_t - m, finite.
template <bool kCap, typename A>
RL_HD A target_gradient(A logit, A logprob, A shifted, A g, A h, A shifted_mean,
                        const LogitTransform<A>& f) {
  const A d = at_least(exp_floor<A>(), logprob);
  return (-g * std::expm1(d) - h * exp_clamped(d) * (shifted - shifted_mean)) *
         dz_dlogit<kCap>(logit, f);
}

}  // namespace rl
