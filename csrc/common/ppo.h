// ppo_loss on both devices: the value loss of a token, the metrics and their reduction, checks and
// outputs. The policy loss of a token is in policy.h.
//
// Shapes: tokens [N] or [B, T], N in all; metrics [kMetrics].
#pragma once

#include <tuple>

#include "moments.h"
#include "policy.h"

namespace rl {

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
  kClipFractionLow,
  kClipFractionHigh,
  kDualClipFraction,
  kOutsideFraction,
  kRatioMean,
  kRatioMax,
  kValueLoss,
  kValueClipFraction,
  kExplainedVariance,
  kEntropy,
  kKl,
  kRolloutWeightMean,
  kRolloutWeightMax,
  kRolloutOutsideFraction,
  kMetrics
};

// Sums over the unmasked tokens, and the moments of returns and value errors. A term of the loss is
// summed times the weight of each token's sequence.
template <typename S>
struct PpoSums {
  // kRatioMax, kRolloutWeightMax: maxima; kClipFractionHigh, kExplainedVariance: unused.
  S sum[kMetrics] = {};
  MomentsOf<S> target;
  MomentsOf<S> error;

  RL_HD void merge(const PpoSums& other) {
    const auto larger = [&](Metric m) { return sum[m] < other.sum[m] ? other.sum[m] : sum[m]; };
    const S ratio = larger(kRatioMax), weight = larger(kRolloutWeightMax);
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int i = 0; i < kMetrics; ++i) sum[i] += other.sum[i];
    sum[kRatioMax] = ratio;
    sum[kRolloutWeightMax] = weight;
    target.merge(other.target);
    error.merge(other.error);
  }
};

// What the sums of the loss's terms are multiplied by: `factors` [2], or 1 / the number of unmasked
// tokens.
struct PpoFactors {
  double policy, value;

  // `factors`: [2], or null. count: max(1, unmasked tokens).
  template <typename A>
  static RL_HD PpoFactors of(const A* factors, double count) {
    if (factors == nullptr) return {1 / count, 1 / count};
    return {static_cast<double>(factors[0]), static_cast<double>(factors[1])};
  }
};

// Writes metrics [kMetrics] and returns the loss. count = max(1, number of unmasked tokens).
RL_HD double ppo_finish(const PpoSums<double>& all, double count, const PpoFactors& factors,
                        double kl_coef, double value_coef, double entropy_coef, float* metrics) {
  const double explained = all.target.m2 > 0 ? 1 - all.error.m2 / all.target.m2 : 0;
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int i = 0; i < kMetrics; ++i) metrics[i] = static_cast<float>(all.sum[i] / count);
  // A maximum ignores NaN; the sum propagates it.
  const auto largest = [&](Metric m, Metric mean) {
    const double total = all.sum[mean];
    metrics[m] = static_cast<float>(total == total ? all.sum[m] : total);
  };
  largest(kRatioMax, kRatioMean);
  largest(kRolloutWeightMax, kRolloutWeightMean);
  metrics[kClipFractionHigh] =
      static_cast<float>((all.sum[kClipFraction] - all.sum[kClipFractionLow]) / count);
  metrics[kExplainedVariance] = static_cast<float>(explained);
  const double policy = all.sum[kPolicyLoss] * factors.policy, kl = all.sum[kKl] * factors.policy;
  const double value = all.sum[kValueLoss] * factors.value;
  const double entropy = all.sum[kEntropy] * factors.policy;
  metrics[kPolicyLoss] = static_cast<float>(policy);
  metrics[kKl] = static_cast<float>(kl);
  metrics[kValueLoss] = static_cast<float>(value);
  metrics[kEntropy] = static_cast<float>(entropy);
  return policy + kl_coef * kl + value_coef * value - entropy_coef * entropy;
}

// Tensor arguments of the raw op.
struct PpoInputs {
  const Tensor& logprob;
  const std::optional<Tensor>&old_logprob, &advantages, &values, &old_values, &returns, &entropy;
  const std::optional<Tensor>& factors;
  const PolicyInputs& policy;

  void check() const {
    const int64_t tokens = logprob.numel();
    const bool wide = logprob.scalar_type() == ScalarType::Double;
    const auto one = [&](const Tensor& t) {
      RL_CHECK(t.numel() == tokens, "expected ", tokens, " tokens, got ", t.numel());
      RL_CHECK((t.scalar_type() == ScalarType::Double) == wide, "float64 only with float64");
    };
    for (const std::optional<Tensor>* t :
         {&old_logprob, &advantages, &values, &old_values, &returns, &entropy})
      if (t->has_value()) one(**t);
    RL_CHECK(!policy.plain() || (old_logprob && advantages),
             "old_logprob and advantages may only be absent with options");
    RL_CHECK(!factors || (factors->numel() == 2 && factors->is_contiguous() &&
                          factors->scalar_type() == acc_dtype(logprob.scalar_type())),
             "factors must be [2] in the accumulator's dtype");
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
