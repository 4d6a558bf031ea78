// ranking_loss on both devices: the loss of a pair and its weight.
//
// Shapes: P prompts, M completions in all; scores, ranks [M]; cu_groups [P + 1]; margins [P].
#pragma once

#include "math.h"

namespace rl {

// A smaller rank is better. Ties form no pair.
RL_HD bool ranks_above(int64_t rank, int64_t other) { return rank < other; }

// loss = -log sigmoid(s_better - s_worse - margin); grad = d loss / d s_better = -d loss / d
// s_worse.
template <typename A>
struct PairTerm {
  A loss;
  A grad;
};
template <typename A>
RL_HD PairTerm<A> pair_term(A better, A worse, A margin) {
  const A difference = better - worse - margin;
  return {neg_log_sigmoid(difference), neg_log_sigmoid_grad(difference)};
}

// Weight of a pair: mean over the strict pairs of a prompt, then over the prompts that have pairs.
RL_HD double pair_weight(int64_t pairs, int64_t prompts) {
  return 1.0 / (static_cast<double>(pairs) * static_cast<double>(prompts));
}

}  // namespace rl
