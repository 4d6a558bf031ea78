// ranking_loss: what the CPU and CUDA implementations share.
//
// Shapes: P prompts, M completions in all; scores, ranks [M], cu_groups [P + 1].
#pragma once

#include "math.h"

namespace rl {

// A strict pair: one rank is better, which is smaller. Ties are dropped.
RL_HD bool ranks_above(int64_t rank, int64_t other) { return rank < other; }

// -log sigmoid(s_better - s_worse), and its derivative by s_better; by s_worse it is the negative.
template <typename A>
struct PairTerm {
  A loss;
  A grad;
};
template <typename A>
RL_HD PairTerm<A> pair_term(A better, A worse) {
  const A margin = better - worse;
  return {neg_log_sigmoid(margin), neg_log_sigmoid_grad(margin)};
}

// What a pair weighs: the mean over a prompt's strict pairs, then over the prompts that have one.
RL_HD double pair_weight(int64_t pairs, int64_t prompts) {
  return 1.0 / (static_cast<double>(pairs) * static_cast<double>(prompts));
}

}  // namespace rl
