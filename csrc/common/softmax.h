// The softmax of a row of logits: what the CPU and CUDA implementations share.
//
// z_j = u_j dz/du, where u_j is the logit, or tanh(logit / softcap). The statistics of a row are
// (m, log sum_j e^(z_j - m), sum_j p_j (z_j - m)). m is the largest z rounded to the accumulator's
// type. The other two are relative to m as it is stored, so that its rounding cancels.
#pragma once

#include "math.h"

namespace rl {

// z = softcap * tanh(logits / softcap) * scale, with scale = 1 / temperature.
template <typename A>
struct RowMaths {
  A scale;
  A softcap;    // 0: none
  A scale_low;  // 1 / temperature - scale
};

template <typename A>
struct RowStats {
  A max, shifted_lse;
  A mean;  // of z - max under the softmax: entropy = shifted_lse - mean
};

// u of a logit. Divided by the cap: the rounding of a reciprocal would stretch the whole row.
template <bool kCap, typename A>
RL_HD A unscaled(A logit, const RowMaths<A>& f) {
  if constexpr (kCap) return tanh(logit / f.softcap);
  return logit;
}

template <bool kCap, typename A>
RL_HD A dz_du(const RowMaths<A>& f) {
  return kCap ? f.softcap * f.scale : f.scale;
}

// dz / d logit.
template <bool kCap, typename A>
RL_HD A dz_dlogit(A logit, const RowMaths<A>& f) {
  return kCap ? f.scale * sech2(logit / f.softcap) : f.scale;
}

// d/dlogit_t of g * logprob + h * entropy at the target t:
//   (g (1 - p) - h p (z_t - m - mean)) dz/dlogit,
// with 1 - p = -expm1(logprob) free of cancellation. `away` is z_t - m, finite.
template <bool kCap, typename A>
RL_HD A target_gradient(A logit, A logprob, A away, A g, A h, A mean, const RowMaths<A>& f) {
  const A d = at_least(exp_floor<A>(), logprob);
  return (-g * std::expm1(d) - h * exp_clamped(d) * (away - mean)) * dz_dlogit<kCap>(logit, f);
}

}  // namespace rl
