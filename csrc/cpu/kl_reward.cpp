// kl_reward on CPU: r_t = -beta * kl_t, plus the score on the last unmasked token of each sequence.
#include "kl.h"

namespace rl {
namespace {

Tensor kl_reward(const Tensor& logprob, const Tensor& ref_logprob, const Tensor& score, double beta,
                 int64_t estimator, const std::optional<Tensor>& cu_seqlens,
                 const std::optional<Tensor>& mask) {
  Tensor out = new_stacked_tokens(logprob, 2);
  const Sequences sequences(logprob, cu_seqlens);
  const Mask keep(mask, logprob.numel());
  with_acc(logprob, [&](auto zero) {
    using A = decltype(zero);
    A* const rewards = static_cast<A*>(out.mutable_data_ptr());
    const KlRewards<A> core(logprob, ref_logprob,
                            per_sequence<A>(score, sequences.count(), "score"), keep, beta,
                            estimator, rewards, rewards + logprob.numel());
    sequences.parallel([&](int64_t first, int64_t last) {
      dispatch_isa([&](auto) RL_LAMBDA_INLINE {
        for (int64_t b = first; b < last; ++b) {
          const int64_t end = sequences.end(b);
          const int64_t scored = core.scored_token(sequences.begin(b), end);
          for (int64_t at = sequences.begin(b); at < end; at += kBlock) {
            const int64_t count = std::min(kBlock, end - at);
            core.run(b, scored, at, count, keep.from(at, count), nullptr);
          }
        }
      });
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CPU, m) { m.impl("kl_reward", TORCH_BOX(&kl_reward)); }

}  // namespace rl
