// ppo_loss: what the CPU and CUDA implementations share. The sums of the metrics, how two merge,
// loss and metrics from the sums, the checks of the raw op, and its outputs.
//
// Shapes: every tensor N tokens, 1-d or 2-d; metrics [kMetrics].
#pragma once

#include <tuple>

#include "math.h"
#include "moments.h"
#include "tensor.h"

namespace rl {

// The clipped policy loss of one token: max(-A rho, -A clip(rho, low, high)), at most -A *
// dual_clip where A < 0. A dual_clip of infinity is none.
template <typename A>
struct PolicyTerm {
  A loss;
  A grad;  // d loss / d logprob
  A ratio;
  A kl;       // rho - 1 - log rho
  A clipped;  // 1 where the clip decides
};

template <typename A>
RL_HD PolicyTerm<A> policy_term(A logprob, A old_logprob, A advantage, A low, A high, A dual_clip) {
  const A d = logprob - old_logprob;
  const A log_ratio = clamp(d, A(-kLogRatioLimit), A(kLogRatioLimit));
  const A ratio = exp_far(log_ratio);
  const A unclipped = -advantage * ratio;
  const A clipped = -advantage * clamp(ratio, low, high);
  const A bound = advantage < A(0) ? -advantage * dual_clip : A(INFINITY);
  const A larger = clipped > unclipped ? clipped : unclipped;
  const A inside = clipped > unclipped ? A(0) : unclipped;
  const A free = bound < larger ? A(0) : inside;
  return {bound < larger ? bound : larger, log_ratio == d ? free : A(0), ratio,
          expm1_excess(log_ratio), clipped > unclipped ? A(1) : A(0)};
}

// Half the larger of the squared errors of v and of clip(v, old - clip, old + clip). A clip of
// infinity is none.
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
