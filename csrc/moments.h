// Count, mean and sum of squared deviations, shared by csrc/cpu and csrc/cuda.
#pragma once

#include "rl_math.h"

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

}  // namespace rl
