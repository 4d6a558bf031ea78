// ppo_loss on CPU: loss, gradients and metrics in one pass over the tokens.
//
// Each block of kBlock tokens produces one Partial. Partials are merged in block order, so the
// result does not depend on the number of threads. The mask alone is read beforehand, because
// gradients are normalised by the number of unmasked tokens.
//
// Shapes: tokens [N] or [B, T]; metrics [kMetrics]. See PpoOutputs for the outputs.
#include "../common/ppo.h"
#include "whiten.h"

namespace rl {
namespace {

using Partial = PpoSums<double>;

// Arguments of one call, and output pointers of the gradients (null: not wanted).
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
  // Masked tokens load as 0: loss, gradient, KL and clip are 0. Their ratio is 1, which is removed
  // below.
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
    if (masked > 0) {
      ratio = ratio_max = 0;
#pragma omp simd reduction(+ : ratio) reduction(max : ratio_max)
      for (int64_t i = 0; i < count; ++i) {
        const A d = clamp(logprob[i] - old_logprob[i], A(-kLogRatioLimit), A(kLogRatioLimit));
        const A r = blend(keep[i], exp_accurate(d), A(0));
        ratio += r;
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
  for (const Partial& partial : partials) all.merge(partial);
  return all;
}

// An infinite dual_clip or value_clip disables that clip.
std::tuple<Tensor, Tensor, Tensor> ppo_loss_fwd(
    const Tensor& logprob, const Tensor& old_logprob, const Tensor& advantages,
    const std::optional<Tensor>& values, const std::optional<Tensor>& old_values,
    const std::optional<Tensor>& returns, const std::optional<Tensor>& entropy,
    const std::optional<Tensor>& mask, double clip, double dual_clip, double value_clip,
    double value_coef, double entropy_coef, bool with_grad) {
  const PpoInputs in{logprob, old_logprob, advantages, values, old_values, returns, entropy};
  in.check();
  const int64_t tokens = logprob.numel();
  const Mask keep(mask, tokens);
  const double normaliser = std::max<int64_t>(1, keep.count_kept(tokens));
  const PpoOutputs out(in, with_grad);
  with_acc(logprob, [&](auto zero) {
    using A = decltype(zero);
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
                       out.grad_logprob<A>(),
                       out.grad_values<A>(),
                       out.grad_entropy<A>()};
    const Partial all = sum_blocks(call, keep, tokens);
    *static_cast<A*>(out.loss.mutable_data_ptr()) =
        static_cast<A>(ppo_finish(all, normaliser, value_coef, entropy_coef,
                                  static_cast<float*>(out.metrics.mutable_data_ptr())));
  });
  return out.tuple();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CPU, m) { m.impl("ppo_loss_fwd", TORCH_BOX(&ppo_loss_fwd)); }

}  // namespace rl
