// Count, mean and sum of squared deviations (m2) on both devices, and whitening by them.
#pragma once

#include "math.h"

namespace rl {

// merge(): Chan et al. 1979. Merging equal means adds nothing to m2.
template <typename S>
struct MomentsOf {
  S count = 0;
  S mean = 0;
  S m2 = 0;

  RL_HD void merge(const MomentsOf& other) {
    if (other.count == 0) return;
    const S total = count + other.count;
    const S delta = other.mean - mean;
    mean += delta * (other.count / total);
    m2 += other.m2 + delta * delta * (count * other.count / total);
    count = total;
  }
};

using Moments = MomentsOf<double>;

// Moments in a form that merges without division: sums of (x - pivot) and (x - pivot)^2. Sums with
// the same pivot merge by addition; with_pivot() changes the pivot.
//
// The pivot is one of the values, hence squares <= count * m2, and m2 keeps its precision wherever
// the mean lies: its relative error is a few 2^-53, and a few count * 2^-53 if the pivot is an
// outlier that accounts for all of the variance. Equal values give exactly 0.
struct PivotedSums {
  double pivot = 0;
  double count = 0;
  double sum = 0;
  double squares = 0;

  RL_HD PivotedSums with_pivot(double to) const {
    const double by = pivot - to, shift = count * by;
    return {to, count, sum + shift, squares + by * (2.0 * sum + shift)};
  }
  RL_HD Moments moments() const {
    Moments out;
    if (count == 0.0) return out;
    const double drift = sum / count;
    const double m2 = squares - drift * sum;
    out.count = count;
    out.mean = pivot + drift;
    out.m2 = m2 < 0.0 ? 0.0 : m2;  // NaN stays NaN
    return out;
  }
};

// PivotedSums of the values of one thread (fewer than 2^31), summed in S; the pivot is its first
// value.
template <typename A, typename S>
struct PivotedValues {
  A pivot = 0;
  S sum = 0;
  S squares = 0;
  int count = 0;

  // Adds every x[j] with bit j of `keep` set.
  template <int kCount>
  RL_HD void add(const A (&x)[kCount], unsigned keep) {
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int j = kCount - 1; count == 0 && j >= 0; --j) pivot = keep >> j & 1u ? x[j] : pivot;
    const S about = static_cast<S>(pivot);
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int j = 0; j < kCount; ++j) {
      if (!(keep >> j & 1u)) continue;
      const S d = static_cast<S>(x[j]) - about;
      sum += d;
      squares += d * d;
      ++count;
    }
  }
  RL_HD PivotedSums sums() const {
    return {static_cast<double>(pivot), static_cast<double>(count), static_cast<double>(sum),
            static_cast<double>(squares)};
  }
};

// ---- whitening --------------------------------------------------------------------------------

// out = (x - mean) * scale + shift with scale = 1 / sqrt(var + 1e-8). shift_mean: the output has
// mean 0; otherwise shift = mean restores the mean.
template <typename A>
struct Whitening {
  A mean = 0;
  A scale = 1;
  A shift = 0;

  Whitening() = default;
  RL_HD Whitening(const Moments& all, bool shift_mean, bool unbiased) {
    const double degrees = all.count - (unbiased ? 1.0 : 0.0);
    const double variance = all.m2 / (degrees < 1.0 ? 1.0 : degrees);
    mean = static_cast<A>(all.mean);
    scale = static_cast<A>(1.0 / ::sqrt(variance + 1e-8));
    shift = shift_mean ? A(0) : mean;
  }
};

template <typename A>
RL_HD A whitened(A x, A mean, A scale, A shift) {
  return (x - mean) * scale + shift;
}

}  // namespace rl
