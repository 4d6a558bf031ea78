// group_advantage on both devices: the settings, and how a reward becomes an advantage.
//
// Shapes: P prompts, K completions of one of them, M in all; rewards [M]; cu_groups [P + 1].
#pragma once

#include "math.h"

namespace rl {

// In the order of BASELINES and SCALES in fastrlhf/ops/group_advantage.py.
enum class GroupBaseline : int64_t { mean, leave_one_out, none };
enum class GroupScale : int64_t { std, batch_std, gpg, none };

struct GroupSettings {
  GroupBaseline baseline;
  GroupScale scale;
  double eps;
};

// 1 / (std + eps) with the unbiased std of `count` values, from their squared deviations.
RL_HD double inverse_std(double squares, double count, double eps) {
  return 1.0 / (::sqrt(squares / (count > 1.0 ? count - 1.0 : 1.0)) + eps);
}

// Factor of the advantages by the number of rewards that are not 0.
RL_HD double gpg_factor(double rewards, double nonzero) {
  return rewards / (nonzero > 1.0 ? nonzero : 1.0);
}

// The advantages of a group: (reward - pivot - mean) * factor. The pivot is the first reward, so
// that equal rewards differ from it by exactly 0, and the mean is that of the differences.
struct GroupAdvantage {
  double pivot;
  double mean;
  double factor;

  RL_HD double of(double reward) const { return (reward - pivot - mean) * factor; }
};

// `squares`: the squared deviations of the group's rewards, for GroupScale::std; `factor`: that of
// the other scales.
RL_HD GroupAdvantage group_advantage_of(const GroupSettings& settings, double pivot, double mean,
                                        double squares, double count, double factor) {
  if (settings.scale == GroupScale::std) factor = inverse_std(squares, count, settings.eps);
  if (settings.baseline == GroupBaseline::none) return {0.0, 0.0, factor};
  if (settings.baseline == GroupBaseline::leave_one_out && count > 1.0)
    factor *= count / (count - 1.0);
  return {pivot, mean, factor};
}

}  // namespace rl
