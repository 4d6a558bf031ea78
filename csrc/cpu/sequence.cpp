// The sequence ops on CPU: kl_reward, gae, and kl_gae, which does both in one pass.
//
//   kl_reward: r_t = -beta * kl_t, plus the score at the last unmasked token of each sequence
//   gae:       A_t = delta_t + gamma * lam * A_{t+1}, R_t = A_t + V_t; optionally A is whitened
//
// Shapes: tokens [B, T], or [N] with cu_seqlens [B + 1]; score, bootstrap [B]. Outputs are stacked.
#include "../common/sequence.h"

#include "gae_scan.h"
#include "whiten.h"

namespace rl {
namespace {

// KL-penalised rewards of a run of tokens. kl_reward and kl_gae both compile it for each
// instruction set, so that they agree bitwise.
template <typename A>
class KlRewards {
 public:
  KlRewards(const Tensor& logprob, const Tensor& ref_logprob, std::vector<A> score,
            const Mask& mask, double beta, int64_t estimator, A* rewards, A* kl)
      : logprob_(logprob),
        ref_logprob_(ref_logprob),
        score_(std::move(score)),
        mask_(mask),
        beta_(static_cast<A>(beta)),
        estimator_(static_cast<KlEstimator>(estimator)),
        rewards_(rewards),
        kl_(kl) {
    RL_CHECK(logprob_.count() == ref_logprob_.count(), "logprob and ref_logprob differ in size");
    RL_CHECK(estimator >= 0 && estimator <= static_cast<int64_t>(KlEstimator::abs),
             "unknown estimator");
  }

  // The token of sequence [begin, end) that receives the score: the last unmasked one; -1 if none.
  int64_t scored_token(int64_t begin, int64_t end) const {
    const uint8_t* keep = mask_.data();
    int64_t t = end - 1;
    while (keep && t >= begin && !keep[t]) --t;
    return t >= begin ? t : -1;
  }

  // Writes the outputs of masked tokens [begin, end).
  void skip(int64_t begin, int64_t end) const {
    std::fill(rewards_ + begin, rewards_ + end, A(0));
    std::fill(kl_ + begin, kl_ + end, A(0));
  }

  // Writes and returns the rewards of tokens [start, start + count) of sequence b, masked by
  // `keep`. `scored`: from scored_token(). The unnamed argument is the scratch block of
  // GivenRewards (gae_scan.h), which converts its dtype there; these rewards go to the output.
  RL_INLINE const A* run(int64_t b, int64_t scored, int64_t start, int64_t count,
                         const uint8_t* keep, A*) const {
    switch (estimator_) {
      case KlEstimator::k1:
        return run_as<KlEstimator::k1>(b, scored, start, count, keep);
      case KlEstimator::k2:
        return run_as<KlEstimator::k2>(b, scored, start, count, keep);
      case KlEstimator::k3:
        return run_as<KlEstimator::k3>(b, scored, start, count, keep);
      default:
        return run_as<KlEstimator::abs>(b, scored, start, count, keep);
    }
  }

 private:
  template <KlEstimator E>
  RL_INLINE const A* run_as(int64_t b, int64_t scored, int64_t start, int64_t count,
                            const uint8_t* keep) const {
    A scratch[2][kBlock];
    const A* logprob = logprob_.load(start, count, keep, scratch[0]);
    const A* ref_logprob = ref_logprob_.load(start, count, keep, scratch[1]);
    A* __restrict rewards = rewards_ + start;
    A* __restrict kl = kl_ + start;
    for (int64_t i = 0; i < count; ++i) {
      kl[i] = kl_term<E>(logprob[i], ref_logprob[i]);
      rewards[i] = kl_penalty(beta_, kl[i]);
    }
    if (scored >= start && scored < start + count) rewards[scored - start] += score_[b];
    return rewards;
  }

  Tokens logprob_;
  Tokens ref_logprob_;
  std::vector<A> score_;
  const Mask& mask_;
  A beta_;
  KlEstimator estimator_;
  A* rewards_;
  A* kl_;
};

Tensor kl_reward(const Tensor& logprob, const Tensor& ref_logprob, const Tensor& score, double beta,
                 int64_t estimator, const std::optional<Tensor>& cu_seqlens,
                 const std::optional<Tensor>& mask) {
  Tensor out = new_stacked_tokens(logprob, 2);
  const Sequences sequences(logprob, cu_seqlens);
  const Mask keep(mask, logprob.numel());
  with_acc(logprob, [&](auto zero) {
    using A = decltype(zero);
    A* const rewards = static_cast<A*>(out.mutable_data_ptr());
    const KlRewards<A> kl_rewards(logprob, ref_logprob,
                                  per_sequence<A>(score, sequences.count(), "score"), keep, beta,
                                  estimator, rewards, rewards + logprob.numel());
    sequences.parallel([&](int64_t first, int64_t last) {
      dispatch_isa([&](auto) RL_LAMBDA_INLINE {
        for (int64_t b = first; b < last; ++b) {
          const int64_t end = sequences.end(b);
          const int64_t scored = kl_rewards.scored_token(sequences.begin(b), end);
          for (int64_t at = sequences.begin(b); at < end; at += kBlock) {
            const int64_t count = std::min(kBlock, end - at);
            kl_rewards.run(b, scored, at, count, keep.from(at, count), nullptr);
          }
        }
      });
    });
  });
  return out;
}

Tensor gae(const Tensor& rewards, const Tensor& values, double gamma, double lam,
           const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& mask,
           const std::optional<Tensor>& bootstrap, bool whitened) {
  RL_CHECK(rewards.numel() == values.numel(), "rewards and values differ in size");
  Tensor out = new_stacked_tokens(rewards, 2);
  const Sequences sequences(rewards, cu_seqlens);
  const Mask keep(mask, rewards.numel());
  with_acc(rewards, [&](auto zero) {
    using A = decltype(zero);
    A* const advantages = static_cast<A*>(out.mutable_data_ptr());
    A* const returns = advantages + rewards.numel();
    const GivenRewards<A> given(rewards);
    const GaeScan<A, GivenRewards<A>> scan(
        given, values, keep, per_sequence<A>(bootstrap, sequences.count(), "bootstrap"), gamma, lam,
        advantages, returns);
    scan.run(sequences);
    if (whitened)
      whiten<A>(Tokens(advantages, rewards.numel()), keep, true, true, advantages, true);
  });
  return out;
}

// The scan reads each chunk of rewards while it is still in L1.
Tensor kl_gae(const Tensor& logprob, const Tensor& ref_logprob, const Tensor& score,
              const Tensor& values, double beta, int64_t estimator, double gamma, double lam,
              bool whitened, const std::optional<Tensor>& cu_seqlens,
              const std::optional<Tensor>& mask) {
  RL_CHECK(logprob.numel() == values.numel(), "logprob and values differ in size");
  Tensor out = new_stacked_tokens(logprob, 4);
  const Sequences sequences(logprob, cu_seqlens);
  const Mask keep(mask, logprob.numel());
  with_acc(logprob, [&](auto zero) {
    using A = decltype(zero);
    A* const advantages = static_cast<A*>(out.mutable_data_ptr());
    A* const returns = advantages + logprob.numel();
    A* const rewards = returns + logprob.numel();
    A* const kl = rewards + logprob.numel();
    const KlRewards<A> kl_rewards(logprob, ref_logprob,
                                  per_sequence<A>(score, sequences.count(), "score"), keep, beta,
                                  estimator, rewards, kl);
    const GaeScan<A, KlRewards<A>> scan(kl_rewards, values, keep, {}, gamma, lam, advantages,
                                        returns);
    scan.run(sequences);
    if (whitened)
      whiten<A>(Tokens(advantages, logprob.numel()), keep, true, true, advantages, true);
  });
  return out;
}

}  // namespace
}  // namespace rl

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CPU, m) {
  m.impl("kl_reward", TORCH_BOX(&rl::kl_reward));
  m.impl("gae", TORCH_BOX(&rl::gae));
  m.impl("kl_gae", TORCH_BOX(&rl::kl_gae));
}
