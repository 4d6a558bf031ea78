// ranking_loss on CPU: loss and gradient over all strict pairs of each prompt.
//
// Shapes: P prompts, M completions; scores, ranks [M]; cu_groups [P + 1]; margins [P]; loss [],
// grad [M]. Single threaded, with sums in order: a batch has a few thousand pairs at most.
#include "../common/ranking.h"
#include "tokens.h"

namespace rl {
namespace {

struct Pair {
  int64_t better, worse;
  int64_t prompt;
  int64_t pairs;  // of the same prompt
};

std::tuple<Tensor, Tensor> ranking_loss_fwd(const Tensor& scores, const Tensor& ranks,
                                            const Tensor& cu_groups,
                                            const std::optional<Tensor>& margins, bool with_grad) {
  RL_CHECK(ranks.scalar_type() == ScalarType::Long && ranks.numel() == scores.numel(),
           "ranks: expected one int64 per score");
  const ScalarType dtype = acc_dtype(scores.scalar_type());
  const Sequences groups(scores, cu_groups);
  const Tensor rank_tensor = contiguous(ranks);
  const int64_t* rank = static_cast<const int64_t*>(rank_tensor.const_data_ptr());
  Tensor loss = empty_like_device(scores, {}, dtype);
  Tensor grad = with_grad ? new_tokens(scores) : empty_like_device(scores, {0}, dtype);

  // Strict pairs of all prompts, in order. `prompts` counts those with at least one.
  std::vector<Pair> pairs;
  int64_t prompts = 0;
  for (int64_t p = 0; p < groups.count(); ++p) {
    const size_t before = pairs.size();
    for (int64_t i = groups.begin(p); i < groups.end(p); ++i) {
      for (int64_t j = groups.begin(p); j < groups.end(p); ++j) {
        if (ranks_above(rank[i], rank[j])) pairs.push_back({i, j, p, 0});
      }
    }
    for (size_t k = before; k < pairs.size(); ++k) pairs[k].pairs = pairs.size() - before;
    prompts += pairs.size() > before;
  }

  with_acc(scores, [&](auto zero) {
    using A = decltype(zero);
    std::vector<A> scratch(scores.numel());
    const A* score = Tokens(scores).load(0, scores.numel(), scratch.data());
    const std::vector<A> margin = per_sequence<A>(margins, groups.count(), "margins");
    std::vector<double> grad_sum(scores.numel());
    double total = 0;
    PairTerm<A> term[kBlock];
    for (size_t start = 0; start < pairs.size(); start += kBlock) {
      const Pair* pair = pairs.data() + start;
      const int64_t count = std::min<int64_t>(kBlock, pairs.size() - start);
      dispatch_isa([&](auto) RL_LAMBDA_INLINE {
        A difference[kBlock], value[kBlock], grad[kBlock];
        for (int64_t k = 0; k < count; ++k)
          difference[k] = score[pair[k].better] - score[pair[k].worse];
        for (int64_t k = 0; !margin.empty() && k < count; ++k)
          difference[k] -= margin[pair[k].prompt];
#pragma omp simd
        for (int64_t k = 0; k < count; ++k) {
          value[k] = neg_log_sigmoid(difference[k]);
          grad[k] = neg_log_sigmoid_grad(difference[k]);
        }
        for (int64_t k = 0; k < count; ++k) term[k] = {value[k], grad[k]};
      });
      for (int64_t k = 0; k < count; ++k) {
        const double weight = pair_weight(pair[k].pairs, prompts);
        const double g = weight * term[k].grad;
        total += weight * term[k].loss;
        grad_sum[pair[k].better] += g;
        grad_sum[pair[k].worse] -= g;
      }
    }
    *static_cast<A*>(loss.mutable_data_ptr()) = static_cast<A>(total);
    if (with_grad) {
      A* out = static_cast<A*>(grad.mutable_data_ptr());
      for (int64_t i = 0; i < scores.numel(); ++i) out[i] = static_cast<A>(grad_sum[i]);
    }
  });
  return {loss, grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CPU, m) {
  m.impl("ranking_loss_fwd", TORCH_BOX(&ranking_loss_fwd));
}

}  // namespace rl
