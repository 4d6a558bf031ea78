// ppo_loss on CPU: loss, gradients and metrics in one pass over the tokens.
//
// Each block of kBlock tokens leaves one Partial; partials are added in the order of the blocks, so
// that the result does not depend on the number of threads. Only the mask is read beforehand, for
// the number of tokens that normalises the gradients.
#include "whiten.h"

namespace rl {
namespace {

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

struct Partial {
  double sum[kMetrics] = {};  // kRatioMax holds the largest, kExplainedVariance is unused
  Moments target;
  Moments error;
};

// The tensors of one call, and where the gradients go (null: not wanted).
template <typename A>
struct Call {
  Tokens logprob, old_logprob, advantages, values, old_values, returns, entropy;
  A low, high, dual_clip, value_clip, value_coef, entropy_coef;
  A per_token;  // 1 / number of unmasked tokens
  A* grad_logprob = nullptr;
  A* grad_values = nullptr;
  A* grad_entropy = nullptr;
};

template <typename A>
RL_INLINE void policy_block(const Call<A>& call, int64_t start, int64_t count, const uint8_t* keep,
                            Partial& out) {
  A scratch[3][kBlock];
  A grads[kBlock];
  const A* logprob = call.logprob.load(start, count, keep, scratch[0]);
  const A* old_logprob = call.old_logprob.load(start, count, keep, scratch[1]);
  const A* advantages = call.advantages.load(start, count, keep, scratch[2]);
  A* grad = call.grad_logprob ? call.grad_logprob + start : grads;
  const A low = call.low, high = call.high, dual_clip = call.dual_clip, per_token = call.per_token;
  // A masked token has advantage 0 and log-ratio 0, hence loss, gradient, KL and clip 0, and
  // ratio 1.
  A loss = 0, kl = 0, clipped = 0, ratio = 0, ratio_max = 0;
#pragma omp simd reduction(+ : loss, kl, clipped, ratio) reduction(max : ratio_max)
  for (int64_t i = 0; i < count; ++i) {
    const PolicyTerm<A> term =
        policy_term(logprob[i], old_logprob[i], advantages[i], low, high, dual_clip);
    loss += term.loss;
    kl += term.kl;
    clipped += term.clipped;
    ratio += term.ratio;
    ratio_max = term.ratio > ratio_max ? term.ratio : ratio_max;
    grad[i] = term.grad * per_token;
  }
  if (keep) {
    int32_t masked = 0;
#pragma omp simd reduction(+ : masked)
    for (int64_t i = 0; i < count; ++i) masked += keep[i] == 0;
    ratio -= static_cast<A>(masked);
    if (masked > 0) {
      ratio_max = 0;
#pragma omp simd reduction(max : ratio_max)
      for (int64_t i = 0; i < count; ++i) {
        const A d = clamp(logprob[i] - old_logprob[i], A(-kLogRatioLimit), A(kLogRatioLimit));
        const A r = blend(keep[i], exp_clamped(d), A(0));
        ratio_max = r > ratio_max ? r : ratio_max;
      }
    }
  }
  out.sum[kPolicyLoss] = loss;
  out.sum[kApproxKl] = kl;
  out.sum[kClipFraction] = clipped;
  out.sum[kRatioMean] = ratio;
  out.sum[kRatioMax] = ratio_max;
}

template <typename A>
RL_INLINE void value_block(const Call<A>& call, int64_t start, int64_t count, const uint8_t* keep,
                           Partial& out) {
  A scratch[3][kBlock];
  A grads[kBlock];
  A error[kBlock];
  const A* values = call.values.load(start, count, keep, scratch[0]);
  const A* returns = call.returns.load(start, count, keep, scratch[1]);
  const A* old_values =
      call.old_values.defined() ? call.old_values.load(start, count, keep, scratch[2]) : values;
  A* grad = call.grad_values ? call.grad_values + start : grads;
  const A clip = call.value_clip, weight = call.value_coef * call.per_token;
  A loss = 0, clipped = 0;
#pragma omp simd reduction(+ : loss, clipped)
  for (int64_t i = 0; i < count; ++i) {
    const ValueTerm<A> term = value_term(values[i], old_values[i], returns[i], clip);
    loss += term.loss;
    clipped += term.clipped;
    grad[i] = term.grad * weight;
    error[i] = values[i] - returns[i];
  }
  out.sum[kValueLoss] = loss;
  out.sum[kValueClipFraction] = clipped;
  out.target = block_moments(returns, keep, count);
  out.error = block_moments(error, keep, count);
}

template <typename A>
RL_INLINE void entropy_block(const Call<A>& call, int64_t start, int64_t count, const uint8_t* keep,
                             Partial& out) {
  A scratch[kBlock];
  const A* entropy = call.entropy.load(start, count, keep, scratch);
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += entropy[i];
  out.sum[kEntropy] = sum;
  if (call.grad_entropy == nullptr) return;
  const A weight = -call.entropy_coef * call.per_token;
  A* grad = call.grad_entropy + start;
  for (int64_t i = 0; i < count; ++i) grad[i] = keep ? blend(keep[i], weight, A(0)) : weight;
}

template <typename A>
Partial sum_blocks(const Call<A>& call, const Mask& mask, int64_t tokens) {
  std::vector<Partial> partials((tokens + kBlock - 1) / kBlock);
  for_each_block(tokens, [&](int64_t block, int64_t start, int64_t count) RL_LAMBDA_INLINE {
    const uint8_t* keep = mask.from(start, count);
    policy_block(call, start, count, keep, partials[block]);
    if (call.values.defined()) value_block(call, start, count, keep, partials[block]);
    if (call.entropy.defined()) entropy_block(call, start, count, keep, partials[block]);
  });
  Partial all;
  for (const Partial& partial : partials) {
    const double ratio_max = std::max(all.sum[kRatioMax], partial.sum[kRatioMax]);
    for (int i = 0; i < kMetrics; ++i) all.sum[i] += partial.sum[i];
    all.sum[kRatioMax] = ratio_max;
    all.target.merge(partial.target);
    all.error.merge(partial.error);
  }
  return all;
}

// -> loss [], metrics [kMetrics] fp32 in the order of Metric, and the gradients of logprob, values
// and entropy, which have no elements where they are not wanted. `dual_clip` and `value_clip` are
// infinity for none.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ppo_loss_fwd(
    const Tensor& logprob, const Tensor& old_logprob, const Tensor& advantages,
    const std::optional<Tensor>& values, const std::optional<Tensor>& old_values,
    const std::optional<Tensor>& returns, const std::optional<Tensor>& entropy,
    const std::optional<Tensor>& mask, double clip, double dual_clip, double value_clip,
    double value_coef, double entropy_coef, bool with_grad) {
  const int64_t tokens = logprob.numel();
  const ScalarType dtype = acc_dtype(logprob.scalar_type());
  for (const std::optional<Tensor>& t : {std::optional(old_logprob), std::optional(advantages),
                                         values, old_values, returns, entropy}) {
    RL_CHECK(!t.has_value() || t->numel() == tokens, "expected ", tokens, " tokens, got ",
             t->numel());
  }
  RL_CHECK(!values.has_value() || returns.has_value(), "values need returns");
  const Mask keep(mask, tokens);
  const double normaliser = std::max<int64_t>(1, keep.count_kept(0, tokens));
  const auto gradient = [&](bool wanted) {
    return wanted && with_grad ? new_tokens(logprob) : empty_like_device(logprob, {0}, dtype);
  };
  Tensor grad_logprob = gradient(true);
  Tensor grad_values = gradient(values.has_value());
  Tensor grad_entropy = gradient(entropy.has_value());
  Tensor loss = empty_like_device(logprob, {}, dtype);
  Tensor metrics = empty_like_device(logprob, {kMetrics}, ScalarType::Float);
  with_acc(logprob, [&](auto zero) {
    using A = decltype(zero);
    const auto address = [&](const Tensor& t, bool wanted) {
      return wanted && with_grad ? static_cast<A*>(t.mutable_data_ptr()) : nullptr;
    };
    const Call<A> call{Tokens(logprob),
                       Tokens(old_logprob),
                       Tokens(advantages),
                       Tokens(values),
                       Tokens(old_values),
                       Tokens(returns),
                       Tokens(entropy),
                       static_cast<A>(1 - clip),
                       static_cast<A>(1 + clip),
                       static_cast<A>(dual_clip),
                       static_cast<A>(value_clip),
                       static_cast<A>(value_coef),
                       static_cast<A>(entropy_coef),
                       static_cast<A>(1 / normaliser),
                       address(grad_logprob, true),
                       address(grad_values, values.has_value()),
                       address(grad_entropy, entropy.has_value())};
    const Partial all = sum_blocks(call, keep, tokens);
    double mean[kMetrics];
    for (int i = 0; i < kMetrics; ++i) mean[i] = all.sum[i] / normaliser;
    mean[kRatioMax] = all.sum[kRatioMax];
    mean[kExplainedVariance] = all.target.m2 > 0 ? 1 - all.error.m2 / all.target.m2 : 0;
    float* metric = static_cast<float*>(metrics.mutable_data_ptr());
    for (int i = 0; i < kMetrics; ++i) metric[i] = static_cast<float>(mean[i]);
    *static_cast<A*>(loss.mutable_data_ptr()) = static_cast<A>(
        mean[kPolicyLoss] + value_coef * mean[kValueLoss] - entropy_coef * mean[kEntropy]);
  });
  return {loss, metrics, grad_logprob, grad_values, grad_entropy};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CPU, m) { m.impl("ppo_loss_fwd", TORCH_BOX(&ppo_loss_fwd)); }

}  // namespace rl
