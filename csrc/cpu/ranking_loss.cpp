// ranking_loss on CPU: all pairs of each prompt, loss and gradient together.
//
// M completions of P prompts, K of them per prompt. A batch has thousands of pairs at most: one
// thread, sums in order.
#include "../ranking_loss.h"

#include "tokens.h"

namespace rl {
namespace {

std::tuple<Tensor, Tensor> ranking_loss_fwd(const Tensor& scores, const Tensor& ranks,
                                            const Tensor& cu_groups, bool with_grad) {
  RL_CHECK(ranks.scalar_type() == ScalarType::Long && ranks.numel() == scores.numel(),
           "ranks: expected one int64 per score");
  const ScalarType dtype = acc_dtype(scores.scalar_type());
  const Sequences groups(scores, cu_groups);
  const Tensor rank_tensor = contiguous(ranks);
  const int64_t* rank = static_cast<const int64_t*>(rank_tensor.const_data_ptr());
  Tensor loss = empty_like_device(scores, {}, dtype);
  Tensor grad = with_grad ? new_tokens(scores) : empty_like_device(scores, {0}, dtype);

  // Strict pairs of each prompt; a prompt of ties alone is not counted.
  std::vector<int64_t> pairs(groups.count());
  int64_t prompts = 0;
  for (int64_t p = 0; p < groups.count(); ++p) {
    for (int64_t i = groups.begin(p); i < groups.end(p); ++i) {
      for (int64_t j = groups.begin(p); j < groups.end(p); ++j)
        pairs[p] += ranks_above(rank[i], rank[j]);
    }
    prompts += pairs[p] > 0;
  }

  with_acc(scores, [&](auto zero) {
    using A = decltype(zero);
    std::vector<A> scratch(scores.numel());
    const A* score = Tokens(scores).load(0, scores.numel(), scratch.data());
    std::vector<double> slope(scores.numel());
    double total = 0;
    for (int64_t p = 0; p < groups.count(); ++p) {
      if (pairs[p] == 0) continue;
      const double weight = pair_weight(pairs[p], prompts);
      for (int64_t better = groups.begin(p); better < groups.end(p); ++better) {
        for (int64_t worse = groups.begin(p); worse < groups.end(p); ++worse) {
          if (!ranks_above(rank[better], rank[worse])) continue;
          const PairTerm<A> term = pair_term(score[better], score[worse]);
          const double g = weight * term.grad;
          total += weight * term.loss;
          slope[better] += g;
          slope[worse] -= g;
        }
      }
    }
    *static_cast<A*>(loss.mutable_data_ptr()) = static_cast<A>(total);
    if (with_grad) {
      A* out = static_cast<A*>(grad.mutable_data_ptr());
      for (int64_t i = 0; i < scores.numel(); ++i) out[i] = static_cast<A>(slope[i]);
    }
  });
  return {loss, grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CPU, m) {
  m.impl("ranking_loss_fwd", TORCH_BOX(&ranking_loss_fwd));
}

}  // namespace rl
