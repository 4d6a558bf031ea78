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

// loss [], metrics [kMetrics] fp32, and the gradients of logprob, values and entropy, which have no
// elements where they are not wanted.
struct PpoOutputs {
  Tensor loss, metrics, grad_logprob, grad_values, grad_entropy;

  PpoOutputs(const PpoInputs& in, bool with_grad)
      : loss(empty_like_device(in.logprob, {}, acc_dtype(in.logprob.scalar_type()))),
        metrics(empty_like_device(in.logprob, {kMetrics}, ScalarType::Float)),
        grad_logprob(gradient(in, with_grad)),
        grad_values(gradient(in, with_grad && in.values.has_value())),
        grad_entropy(gradient(in, with_grad && in.entropy.has_value())) {}

  // Where a gradient goes; null where it is not wanted.
  template <typename A>
  static A* address(const Tensor& grad, bool wanted) {
    return wanted ? static_cast<A*>(grad.mutable_data_ptr()) : nullptr;
  }
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> tuple() const {
    return {loss, metrics, grad_logprob, grad_values, grad_entropy};
  }

 private:
  static Tensor gradient(const PpoInputs& in, bool wanted) {
    std::vector<int64_t> shape{0};
    if (wanted) {
      const auto sizes = in.logprob.sizes();
      shape.assign(sizes.begin(), sizes.end());
    }
    return empty_like_device(in.logprob, shape, acc_dtype(in.logprob.scalar_type()));
  }
};

}  // namespace rl
