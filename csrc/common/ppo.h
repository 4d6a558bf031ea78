// PPO on both devices: the per-token policy and value losses (also used by token_loss), and of the
// op ppo_loss the metrics, their reduction, checks and outputs.
//
// Shapes: tokens [N] or [B, T], N in all; metrics [kMetrics].
#pragma once

#include <tuple>

#include "math.h"
#include "moments.h"
#include "tensor.h"

namespace rl {

// Clipped policy loss of one token with advantage A and rho = exp(logprob - old_logprob):
//   max(-A rho, -A clip(rho, low, high)), and where A < 0 at most -A * dual_clip.
// An infinite dual_clip disables the bound.
template <typename A>
struct PolicyTerm {
  A loss;
  A grad;  // d loss / d logprob
  A ratio;
  A kl;       // rho - 1 - log rho
  A clipped;  // 1 if the clipped term is the larger one
};

template <typename A>
RL_HD PolicyTerm<A> policy_term(A logprob, A old_logprob, A advantage, A low, A high, A dual_clip) {
  const A d = logprob - old_logprob;
  const A log_ratio = clamp(d, A(-kLogRatioLimit), A(kLogRatioLimit));
  const A ratio = exp_accurate(log_ratio);
  const A unclipped = -advantage * ratio;
  const A clipped = -advantage * clamp(ratio, low, high);
  const A bound = advantage < A(0) ? -advantage * dual_clip : A(INFINITY);
  const A larger = clipped > unclipped ? clipped : unclipped;
  const A inside = clipped > unclipped ? A(0) : unclipped;
  const A grad = bound < larger ? A(0) : inside;
  return {bound < larger ? bound : larger, log_ratio == d ? grad : A(0), ratio,
          expm1_excess(log_ratio), clipped > unclipped ? A(1) : A(0)};
}

// Clipped value loss of one token:
//   max((v - target)^2, (clip(v, old - clip, old + clip) - target)^2) / 2.
// An infinite clip disables clipping.
template <typename A>
struct ValueTerm {
  A loss;
  A grad;  // d loss / d value
  A clipped;
};

template <typename A>
RL_HD ValueTerm<A> value_term(A value, A old_value, A target, A clip) {
  const A error = value - target;
  const A clipped_error = clamp(value, old_value - clip, old_value + clip) - target;
  const bool clipped = clipped_error * clipped_error > error * error;
  const A chosen = clipped ? clipped_error : error;
  return {A(0.5) * chosen * chosen, clipped ? A(0) : error, clipped ? A(1) : A(0)};
}

// In the order of METRICS in fastrlhf/ops/ppo_loss.py.
enum Metric {
  kPolicyLoss,
  kApproxKl,
  kClipFraction,
  kRatioMean,
  kRatioMax,
  kValueLoss,
  kValueClipFraction,
  kExplainedVariance,
  kEntropy,
  kMetrics
};

// Sums over the unmasked tokens, and the moments of returns and value errors.
template <typename S>
struct PpoSums {
  S sum[kMetrics] = {};  // kRatioMax: a maximum; kExplainedVariance: unused
  MomentsOf<S> target;
  MomentsOf<S> error;

  RL_HD void merge(const PpoSums& other) {
    const S largest = sum[kRatioMax] < other.sum[kRatioMax] ? other.sum[kRatioMax] : sum[kRatioMax];
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int i = 0; i < kMetrics; ++i) sum[i] += other.sum[i];
    sum[kRatioMax] = largest;
    target.merge(other.target);
    error.merge(other.error);
  }
};

// Writes metrics [kMetrics] and returns the loss. normaliser = max(1, number of unmasked tokens).
RL_HD double ppo_finish(const PpoSums<double>& all, double normaliser, double value_coef,
                        double entropy_coef, float* metrics) {
  const double explained = all.target.m2 > 0 ? 1 - all.error.m2 / all.target.m2 : 0;
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int i = 0; i < kMetrics; ++i) metrics[i] = static_cast<float>(all.sum[i] / normaliser);
  // The maximum ignores NaN; the sum propagates it.
  const double ratios = all.sum[kRatioMean];
  metrics[kRatioMax] = static_cast<float>(ratios == ratios ? all.sum[kRatioMax] : ratios);
  metrics[kExplainedVariance] = static_cast<float>(explained);
  return all.sum[kPolicyLoss] / normaliser + value_coef * (all.sum[kValueLoss] / normaliser) -
         entropy_coef * (all.sum[kEntropy] / normaliser);
}

// Tensor arguments of the raw op.
struct PpoInputs {
  const Tensor &logprob, &old_logprob, &advantages;
  const std::optional<Tensor>&values, &old_values, &returns, &entropy;

  void check() const {
    const int64_t tokens = logprob.numel();
    const bool wide = logprob.scalar_type() == ScalarType::Double;
    const auto one = [&](const Tensor& t) {
      RL_CHECK(t.numel() == tokens, "expected ", tokens, " tokens, got ", t.numel());
      RL_CHECK((t.scalar_type() == ScalarType::Double) == wide, "float64 only with float64");
    };
    one(old_logprob);
    one(advantages);
    for (const std::optional<Tensor>* t : {&values, &old_values, &returns, &entropy})
      if (t->has_value()) one(**t);
    RL_CHECK(!values.has_value() || returns.has_value(), "values need returns");
  }
};

// loss [], metrics [kMetrics] fp32 and grads [k, ...]: the gradients with respect to logprob,
// values and entropy, stacked so that the backward scales all of them in one launch. Absent tensors
// have no entry; k = 0 if no gradient is wanted.
struct PpoOutputs {
  Tensor loss, metrics, grads;

  PpoOutputs(const PpoInputs& in, bool with_grad)
      : loss(empty_like_device(in.logprob, {}, acc_dtype(in.logprob.scalar_type()))),
        metrics(empty_like_device(in.logprob, {kMetrics}, ScalarType::Float)),
        grads(new_stacked_tokens(
            in.logprob, with_grad ? 1 + in.values.has_value() + in.entropy.has_value() : 0)),
        tokens_(in.logprob.numel()),
        with_grad_(with_grad),
        values_(in.values.has_value()),
        entropy_(in.entropy.has_value()) {}

  // Output pointers of the gradients; null: not wanted.
  template <typename A>
  A* grad_logprob() const {
    return at<A>(with_grad_, 0);
  }
  template <typename A>
  A* grad_values() const {
    return at<A>(with_grad_ && values_, 1);
  }
  template <typename A>
  A* grad_entropy() const {
    return at<A>(with_grad_ && entropy_, 1 + values_);
  }
  std::tuple<Tensor, Tensor, Tensor> tuple() const { return {loss, metrics, grads}; }

 private:
  template <typename A>
  A* at(bool wanted, int64_t place) const {
    return wanted ? static_cast<A*>(grads.mutable_data_ptr()) + place * tokens_ : nullptr;
  }

  int64_t tokens_;
  bool with_grad_, values_, entropy_;
};

}  // namespace rl
