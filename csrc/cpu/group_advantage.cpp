// group_advantage on CPU: rewards relative to those of the same prompt.
//
// Shapes: P prompts, M completions; rewards, out [M]; cu_groups [P + 1]. Sums are fp64 and in
// order.
#include "../common/groups.h"
#include "tokens.h"

namespace rl {
namespace {

// Differences to the first of `count` values: their mean, and their squared deviations from it.
struct Deviations {
  double pivot = 0;
  double mean = 0;
  double squares = 0;
};
template <typename A>
Deviations deviations(const A* x, int64_t count, bool with_squares) {
  Deviations out;
  if (count == 0) return out;
  out.pivot = x[0];
  for (int64_t i = 0; i < count; ++i) out.mean += x[i] - out.pivot;
  out.mean /= count;
  for (int64_t i = 0; with_squares && i < count; ++i) {
    const double d = x[i] - out.pivot - out.mean;
    out.squares += d * d;
  }
  return out;
}

// The factor that all groups share.
template <typename A>
double batch_factor(const A* x, int64_t count, const GroupSettings& settings) {
  if (settings.scale == GroupScale::batch_std)
    return inverse_std(deviations(x, count, true).squares, count, settings.eps);
  if (settings.scale == GroupScale::gpg)
    return gpg_factor(count, count - std::count(x, x + count, A(0)));
  return 1.0;
}

Tensor group_advantage(const Tensor& rewards, const Tensor& cu_groups, int64_t baseline,
                       int64_t scale, double eps) {
  RL_CHECK(baseline >= 0 && baseline <= 2 && scale >= 0 && scale <= 3, "unknown baseline or scale");
  const GroupSettings settings{static_cast<GroupBaseline>(baseline), static_cast<GroupScale>(scale),
                               eps};
  const Sequences groups(rewards, cu_groups);
  Tensor out = new_tokens(rewards);
  with_acc(rewards, [&](auto zero) {
    using A = decltype(zero);
    std::vector<A> scratch(rewards.numel());
    const A* x = Tokens(rewards).load(0, rewards.numel(), scratch.data());
    A* to = static_cast<A*>(out.mutable_data_ptr());
    const double factor = batch_factor(x, rewards.numel(), settings);
    groups.parallel([&](int64_t first, int64_t last) {
      for (int64_t p = first; p < last; ++p) {
        const int64_t begin = groups.begin(p), count = groups.end(p) - begin;
        const Deviations d = deviations(x + begin, count, settings.scale == GroupScale::std);
        const GroupAdvantage advantage =
            group_advantage_of(settings, d.pivot, d.mean, d.squares, count, factor);
        for (int64_t i = begin; i < begin + count; ++i) to[i] = static_cast<A>(advantage.of(x[i]));
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CPU, m) {
  m.impl("group_advantage", TORCH_BOX(&group_advantage));
}

}  // namespace rl
