// Count, mean and sum of squared deviations, shared by csrc/cpu and csrc/cuda.
#pragma once

#include "math.h"

namespace rl {

// Merging two is exact in exact arithmetic (Chan et al. 1979); equal means leave no deviation.
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

// The same without a division until the end, for threads that merge many: the count, and the sums
// of x - pivot and of its square. Sums about one pivot merge by addition; moved() changes the
// pivot. The pivot is one of the values: then squares <= count * m2, so that m2 keeps its digits
// wherever the mean lies. Its relative error is a few times count * 2^-53 where the pivot is an
// outlier from which all variance comes, and a few times 2^-53 elsewhere; equal values leave
// exactly 0.
struct PivotedSums {
  double pivot = 0;
  double count = 0;
  double sum = 0;
  double squares = 0;

  RL_HD PivotedSums moved(double to) const {
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

// Those of one thread in S, about its first value of type A; it meets fewer than 2^31.
template <typename A, typename S>
struct PivotedValues {
  A pivot = 0;
  S sum = 0;
  S squares = 0;
  int count = 0;

  // Those x whose bit in `keep` is set.
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

// (x - mean) * scale + shift, with scale = 1 / sqrt(var + 1e-8) and the mean again as shift if it
// is to stay.
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
