// ppo_loss: what the CPU and CUDA implementations share. The sums of the metrics, how two merge,
// loss and metrics from the sums, the checks of the raw op, and its outputs.
//
// Shapes: every tensor N tokens, 1-d or 2-d; metrics [kMetrics].
#pragma once

#include <tuple>

#include "checks.h"
#include "moments.h"

namespace rl {

// The order of METRICS in fastrlhf/ops/ppo_loss.py.
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

template <typename S>
struct PpoSums {
  S sum[kMetrics] = {};  // kRatioMax holds the largest, kExplainedVariance is unused
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

// Writes metrics [kMetrics] and returns the loss. `normaliser`: unmasked tokens, at least 1.
RL_HD double ppo_finish(const PpoSums<double>& all, double normaliser, double value_coef,
                        double entropy_coef, float* metrics) {
  const double explained = all.target.m2 > 0 ? 1 - all.error.m2 / all.target.m2 : 0;
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int i = 0; i < kMetrics; ++i) metrics[i] = static_cast<float>(all.sum[i] / normaliser);
  // A maximum passes over NaN, a sum does not.
  const double ratios = all.sum[kRatioMean];
  metrics[kRatioMax] = static_cast<float>(ratios == ratios ? all.sum[kRatioMax] : ratios);
  metrics[kExplainedVariance] = static_cast<float>(explained);
  return all.sum[kPolicyLoss] / normaliser + value_coef * (all.sum[kValueLoss] / normaliser) -
         entropy_coef * (all.sum[kEntropy] / normaliser);
}

// The tensors of one call of the raw op.
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

// loss [], metrics [kMetrics] fp32, and grads [k, ...], those of logprob, values and entropy one
// after the other, of the tensors that are given: the backward scales them in one launch. k = 0:
// not wanted.
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

  // Where a gradient goes; null where it is not wanted.
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
