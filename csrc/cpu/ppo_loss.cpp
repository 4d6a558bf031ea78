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
  Tokens ref_logprob, rollout;
  PolicySettings<A> settings;
  SequenceRows<A> sequences;
  A value_clip;
  // What the gradients of a token's terms are multiplied by, beside the weight of its sequence.
  A policy_factor, value_factor, entropy_factor;
  A* grad_logprob = nullptr;
  A* grad_values = nullptr;
  A* grad_entropy = nullptr;

  // Whether policy_block takes the call: plain PPO, with or without `options`.
  bool plain() const {
    return settings.objective == Objective::ppo && !settings.has_kl &&
           settings.rollout == Rollout::none && sequences.cu_seqlens == nullptr &&
           old_logprob.defined() && advantages.defined();
  }
};

// The sequences of the tokens of a block: f(sequence, begin, end) for tokens [begin, end) of it.
template <typename A, typename F>
RL_INLINE void for_each_sequence(const SequenceRows<A>& rows, int64_t start, int64_t count,
                                 const F& f) {
  int64_t s = rows.of(start);
  for (int64_t at = 0; at < count; ++s) {
    const bool last = s + 1 >= rows.count;
    const int64_t end = last ? count : std::min<int64_t>(count, rows.cu_seqlens[s + 1] - start);
    if (end <= at) continue;
    f(s, at, end);
    at = end;
  }
}

// One row of `sequences` for each token of a block; `absent` without sequences.
template <typename A>
RL_INLINE A* spread(const Call<A>& call, SequenceRow row, A absent, int64_t start, int64_t count,
                    A* out) {
  if (call.sequences.cu_seqlens == nullptr) {
    std::fill(out, out + count, absent);
    return out;
  }
  const int64_t token = start + call.settings.first_row;
  for_each_sequence(call.sequences, token, count,
                    [&](int64_t s, int64_t begin, int64_t end) RL_LAMBDA_INLINE {
                      std::fill(out + begin, out + end, call.sequences.at(row, s));
                    });
  return out;
}

template <typename A>
RL_INLINE void policy_block(const Call<A>& call, int64_t start, int64_t count, const uint8_t* keep,
                            Partial& out) {
  A scratch[3][kBlock];
  A grads[kBlock];
  const A* logprob = call.logprob.load(start, count, keep, scratch[0]);
  const A* old_logprob = call.old_logprob.load(start, count, keep, scratch[1]);
  const A* advantages = call.advantages.load(start, count, keep, scratch[2]);
  A* grad = call.grad_logprob ? call.grad_logprob + start : grads;
  const PolicySettings<A> settings = call.settings;
  const A factor = call.policy_factor;
  // Masked tokens load as 0: loss, gradient, KL and clip are 0. Their ratio is 1, which is removed
  // below.
  A loss = 0, kl = 0, clipped = 0, low = 0, dual = 0, outside = 0, ratio = 0, ratio_max = 0;
#pragma omp simd reduction(+ : loss, kl, clipped, low, dual, outside, ratio) \
    reduction(max : ratio_max)
  for (int64_t i = 0; i < count; ++i) {
    const PolicyTerm<A> term =
        policy_term(logprob[i], logprob[i] - old_logprob[i], advantages[i], settings);
    loss += term.loss;
    kl += term.kl;
    clipped += term.clipped;
    low += term.clipped_low;
    dual += term.dual;
    outside += term.outside;
    ratio += term.ratio;
    ratio_max = term.ratio > ratio_max ? term.ratio : ratio_max;
    grad[i] = term.grad * factor;
  }
  if (keep) {
    int32_t masked = 0;
#pragma omp simd reduction(+ : masked)
    for (int64_t i = 0; i < count; ++i) masked += keep[i] == 0;
    if (masked > 0) {
      outside = ratio = ratio_max = 0;
#pragma omp simd reduction(+ : outside, ratio) reduction(max : ratio_max)
      for (int64_t i = 0; i < count; ++i) {
        const A d = clamp(logprob[i] - old_logprob[i], A(-kLogRatioLimit), A(kLogRatioLimit));
        const A r = blend(keep[i], exp_accurate(d), A(0));
        const bool out = r < settings.low || r > settings.high;
        outside += blend(keep[i], out ? A(1) : A(0), A(0));
        ratio += r;
        ratio_max = r > ratio_max ? r : ratio_max;
      }
    }
  }
  out.sum[kPolicyLoss] = loss;
  out.sum[kApproxKl] = kl;
  out.sum[kClipFraction] = clipped;
  out.sum[kClipFractionLow] = low;
  out.sum[kDualClipFraction] = dual;
  out.sum[kOutsideFraction] = outside;
  out.sum[kRatioMean] = ratio;
  out.sum[kRatioMax] = ratio_max;
}

// The arrays of general_block for the tokens of a block. Masked tokens have log-probs, log-ratio
// and advantage 0, so that their policy term is 0 and its ratio 1.
template <typename A>
struct Block {
  int64_t count;
  const A *logprob, *log_ratio, *advantages, *ref_logprob, *rollout;
  const A* live;  // 1 where a token counts, else 0
  A *loss, *grad, *ratio, *kl, *kl_grad;
};

template <Objective kObjective, typename A>
RL_INLINE void term_block(const Block<A>& x, const PolicySettings<A>& given, Partial& out) {
  const PolicySettings<A> settings = given;
  A kl = 0, clipped = 0, low = 0, dual = 0, outside = 0, ratio = 0, ratio_max = 0;
#pragma omp simd reduction(+ : kl, clipped, low, dual, outside, ratio) reduction(max : ratio_max)
  for (int64_t i = 0; i < x.count; ++i) {
    const PolicyTerm<A> term =
        policy_term<kObjective>(x.logprob[i], x.log_ratio[i], x.advantages[i], settings);
    x.loss[i] = term.loss;
    x.grad[i] = term.grad;
    x.ratio[i] = term.ratio;
    kl += term.kl;
    clipped += term.clipped;
    low += term.clipped_low;
    dual += term.dual;
    outside += term.outside * x.live[i];
    const A r = term.ratio * x.live[i];
    ratio += r;
    ratio_max = r > ratio_max ? r : ratio_max;
  }
  out.sum[kApproxKl] = kl;
  out.sum[kClipFraction] = clipped;
  out.sum[kClipFractionLow] = low;
  out.sum[kDualClipFraction] = dual;
  out.sum[kOutsideFraction] = outside;
  out.sum[kRatioMean] = ratio;
  out.sum[kRatioMax] = ratio_max;
}

// The settings are constants of the loop, which the compiler could not vectorise otherwise.
template <KlEstimator kEstimator, bool kClamp, KlGradient kGradient, typename A>
RL_INLINE void kl_block(const Block<A>& x, PolicySettings<A> settings) {
  settings.kl_estimator = kEstimator;
  settings.kl_clamp = kClamp;
  settings.kl_gradient = kGradient;
#pragma omp simd
  for (int64_t i = 0; i < x.count; ++i) {
    const KlInLoss<A> kl =
        kl_of(x.logprob[i], x.ref_logprob[i], x.log_ratio[i], x.ratio[i], settings);
    x.kl[i] = kl.value;
    x.kl_grad[i] = kl.grad;
  }
}

template <KlEstimator kEstimator, bool kClamp, typename A>
RL_INLINE void kl_block(const Block<A>& x, const PolicySettings<A>& settings) {
  switch (settings.kl_gradient) {
    case KlGradient::k2:
      return kl_block<kEstimator, kClamp, KlGradient::k2>(x, settings);
    case KlGradient::ratio:
      return kl_block<kEstimator, kClamp, KlGradient::ratio>(x, settings);
    default:
      return kl_block<kEstimator, kClamp, KlGradient::estimator>(x, settings);
  }
}

template <typename A>
RL_INLINE void kl_block(const Block<A>& x, const PolicySettings<A>& settings) {
  switch (settings.kl_estimator) {
    case KlEstimator::k1:
      return kl_block<KlEstimator::k1, true>(x, settings);
    case KlEstimator::k2:
      return kl_block<KlEstimator::k2, true>(x, settings);
    case KlEstimator::abs:
      return kl_block<KlEstimator::abs, true>(x, settings);
    default:
      return settings.kl_clamp ? kl_block<KlEstimator::k3, true>(x, settings)
                               : kl_block<KlEstimator::k3, false>(x, settings);
  }
}

// Multiplies loss and gradient by the rollout weights.
template <Rollout kMode, typename A>
RL_INLINE void rollout_block(const Block<A>& x, PolicySettings<A> settings, Partial& out) {
  settings.rollout = kMode;
  A sum = 0, largest = 0, outside = 0;
#pragma omp simd reduction(+ : sum, outside) reduction(max : largest)
  for (int64_t i = 0; i < x.count; ++i) {
    const RolloutWeight<A> w = bounded_weight(x.rollout[i], settings);
    const bool live = x.live[i] != A(0);
    const A weight = live ? w.weight : A(0);
    sum += weight;
    largest = weight > largest ? weight : largest;
    outside += live ? w.outside : A(0);
    x.loss[i] *= weight;
    x.grad[i] *= weight;
  }
  out.sum[kRolloutWeightMean] = sum;
  out.sum[kRolloutWeightMax] = largest;
  out.sum[kRolloutOutsideFraction] = outside;
}

// policy_block with any settings: policy_loss in steps, each a loop that vectorises. weight: of
// each token's sequence. The loss is summed in fp64: the tokens of a sequence may share a ratio and
// an advantage, whose roundings do not average out.
template <typename A>
RL_INLINE void general_block(const Call<A>& call, int64_t start, int64_t count, const uint8_t* keep,
                             const A* weight, Partial& out) {
  const PolicySettings<A> settings = call.settings;
  const auto load = [&](const Tokens& tokens, A* scratch)
                        RL_LAMBDA_INLINE { return tokens.load(start, count, keep, scratch); };
  A scratch[7][kBlock], made[5][kBlock];
  const auto masked = [&](A* x) RL_LAMBDA_INLINE {
    if (keep)
      for (int64_t i = 0; i < count; ++i) x[i] = blend(keep[i], x[i], A(0));
    return x;
  };
  const A* logprob = load(call.logprob, scratch[0]);
  const A* old = call.old_logprob.defined() ? load(call.old_logprob, scratch[1]) : logprob;
  const A* advantages = call.advantages.defined()
                            ? load(call.advantages, scratch[2])
                            : masked(spread(call, kAdvantage, A(1), start, count, scratch[2]));
  A* const log_ratio = scratch[3];
  if (settings.sequence_ratio) {
    masked(spread(call, kLogRatio, A(0), start, count, log_ratio));
  } else {
    for (int64_t i = 0; i < count; ++i) log_ratio[i] = logprob[i] - old[i];
  }
  A* const live = scratch[4];
  std::fill(live, live + count, A(1));
  masked(live);
  const A* ref = settings.has_kl ? load(call.ref_logprob, scratch[5]) : logprob;
  const A* rollout = nullptr;  // weights before their bounds
  const bool corrected = settings.rollout != Rollout::none;
  if (corrected && call.rollout.defined()) {
    rollout = load(call.rollout, scratch[6]);
    if (settings.rollout != Rollout::weights) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) scratch[6][i] = rollout_ratio(rollout[i], old[i]);
      rollout = scratch[6];
    }
  } else if (corrected) {
    rollout = spread(call, kRolloutWeight, A(1), start, count, scratch[6]);
  }
  const Block<A> x{count, logprob, log_ratio, advantages, ref,     rollout,
                   live,  made[0], made[1],   made[2],    made[3], made[4]};
  switch (settings.objective) {
    case Objective::reinforce:
      term_block<Objective::reinforce>(x, settings, out);
      break;
    case Objective::cispo:
      term_block<Objective::cispo>(x, settings, out);
      break;
    case Objective::sapo:
      term_block<Objective::sapo>(x, settings, out);
      break;
    default:
      term_block<Objective::ppo>(x, settings, out);
  }
  switch (settings.rollout) {
    case Rollout::none:
      break;
    case Rollout::weights:
      rollout_block<Rollout::weights>(x, settings, out);
      break;
    case Rollout::truncate:
      rollout_block<Rollout::truncate>(x, settings, out);
      break;
    case Rollout::mask:
      rollout_block<Rollout::mask>(x, settings, out);
  }
  double kl = 0;
  if (settings.has_kl) {
    kl_block(x, settings);
    const A coef = settings.kl_coef;
#pragma omp simd reduction(+ : kl)
    for (int64_t i = 0; i < count; ++i) {
      const bool counts = live[i] != A(0);
      kl += static_cast<double>(counts ? x.kl[i] * weight[i] : A(0));
      x.grad[i] += counts ? coef * x.kl_grad[i] : A(0);
    }
  }
  A* grad = call.grad_logprob ? call.grad_logprob + start : x.grad;
  const A factor = call.policy_factor;
  double loss = 0;
#pragma omp simd reduction(+ : loss)
  for (int64_t i = 0; i < count; ++i) {
    const bool counts = live[i] != A(0);
    loss += static_cast<double>(counts ? x.loss[i] * weight[i] : A(0));
    grad[i] = counts ? x.grad[i] * (factor * weight[i]) : A(0);
  }
  out.sum[kPolicyLoss] = loss;
  out.sum[kKl] = kl;
}

// weight: of each token's sequence; null: 1.
template <bool kWeighted, typename A>
RL_INLINE void value_block(const Call<A>& call, int64_t start, int64_t count, const uint8_t* keep,
                           const A* weight, Partial& out) {
  A scratch[3][kBlock];
  A grads[kBlock];
  A error[kBlock];
  const A* values = call.values.load(start, count, keep, scratch[0]);
  const A* returns = call.returns.load(start, count, keep, scratch[1]);
  const A* old_values =
      call.old_values.defined() ? call.old_values.load(start, count, keep, scratch[2]) : values;
  A* grad = call.grad_values ? call.grad_values + start : grads;
  const A clip = call.value_clip, factor = call.value_factor;
  A loss = 0, clipped = 0;
#pragma omp simd reduction(+ : loss, clipped)
  for (int64_t i = 0; i < count; ++i) {
    const ValueTerm<A> term = value_term(values[i], old_values[i], returns[i], clip);
    loss += kWeighted ? term.loss * weight[i] : term.loss;
    clipped += term.clipped;
    grad[i] = term.grad * (kWeighted ? factor * weight[i] : factor);
    error[i] = values[i] - returns[i];
  }
  out.sum[kValueLoss] = loss;
  out.sum[kValueClipFraction] = clipped;
  out.target = block_moments(returns, keep, count);
  out.error = block_moments(error, keep, count);
}

template <bool kWeighted, typename A>
RL_INLINE void entropy_block(const Call<A>& call, int64_t start, int64_t count, const uint8_t* keep,
                             const A* weight, Partial& out) {
  A scratch[kBlock];
  const A* entropy = call.entropy.load(start, count, keep, scratch);
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += kWeighted ? entropy[i] * weight[i] : entropy[i];
  out.sum[kEntropy] = sum;
  if (call.grad_entropy == nullptr) return;
  const A factor = call.entropy_factor;
  A* grad = call.grad_entropy + start;
  for (int64_t i = 0; i < count; ++i) {
    const A g = kWeighted ? factor * weight[i] : factor;
    grad[i] = keep ? blend(keep[i], g, A(0)) : g;
  }
}

// `policy`: the block of the policy loss. kWeighted: tokens have the weights of their sequences.
template <bool kWeighted, typename A, typename Policy>
Partial sum_blocks(const Call<A>& call, const Mask& mask, int64_t tokens, const Policy& policy) {
  std::vector<Partial> partials((tokens + kBlock - 1) / kBlock);
  for_each_block(tokens, [&](int64_t block, int64_t start, int64_t count) RL_LAMBDA_INLINE {
    A scratch[kWeighted ? kBlock : 1];
    const uint8_t* keep = mask.from(start, count);
    const auto weights = [&](SequenceRow row) RL_LAMBDA_INLINE {
      return kWeighted ? spread(call, row, A(1), start, count, scratch) : nullptr;
    };
    const A* weight = weights(kWeight);
    policy(start, count, keep, weight, partials[block]);
    if (call.entropy.defined())
      entropy_block<kWeighted>(call, start, count, keep, weight, partials[block]);
    if (call.values.defined())
      value_block<kWeighted>(call, start, count, keep, weights(kValueWeight), partials[block]);
  });
  Partial all;
  for (const Partial& partial : partials) all.merge(partial);
  return all;
}

template <typename A>
Partial sum_all(const Call<A>& call, const Mask& mask, int64_t tokens) {
  if (call.plain()) {
    return sum_blocks<false>(
        call, mask, tokens,
        [&](int64_t start, int64_t count, const uint8_t* keep, const A*, Partial& out)
            RL_LAMBDA_INLINE { policy_block(call, start, count, keep, out); });
  }
  return sum_blocks<true>(
      call, mask, tokens,
      [&](int64_t start, int64_t count, const uint8_t* keep, const A* weight, Partial& out)
          RL_LAMBDA_INLINE { general_block(call, start, count, keep, weight, out); });
}

std::tuple<Tensor, Tensor, Tensor> ppo_loss_fwd(
    const Tensor& logprob, const std::optional<Tensor>& old_logprob,
    const std::optional<Tensor>& advantages, const std::optional<Tensor>& values,
    const std::optional<Tensor>& old_values, const std::optional<Tensor>& returns,
    const std::optional<Tensor>& entropy, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& factors, const MoreTensors& more, double low, double high,
    double dual_clip, double value_clip, double value_coef, double entropy_coef,
    const OptionNumbers& options, bool with_grad) {
  const int64_t tokens = logprob.numel();
  const PolicyInputs policy =
      policy_inputs(tokens, acc_dtype(logprob.scalar_type()), more, low, high, dual_clip, options);
  const PpoInputs in{logprob, old_logprob, advantages, values, old_values,
                     returns, entropy,     factors,    policy};
  in.check();
  const Mask keep(mask, tokens);
  const double kept = std::max<int64_t>(1, keep.count_kept(tokens));
  const PpoOutputs out(in, with_grad);
  with_acc(logprob, [&](auto zero) {
    using A = decltype(zero);
    const PpoFactors factor =
        PpoFactors::of(factors ? static_cast<const A*>(factors->const_data_ptr()) : nullptr, kept);
    const Call<A> call{Tokens(logprob),
                       Tokens(old_logprob),
                       Tokens(advantages),
                       Tokens(values),
                       Tokens(old_values),
                       Tokens(returns),
                       Tokens(entropy),
                       Tokens(policy.ref_logprob),
                       Tokens(policy.rollout),
                       policy.settings<A>(),
                       policy.sequence_rows<A>(),
                       static_cast<A>(value_clip),
                       static_cast<A>(factor.policy),
                       static_cast<A>(value_coef) * static_cast<A>(factor.value),
                       -static_cast<A>(entropy_coef) * static_cast<A>(factor.policy),
                       out.grad_logprob<A>(),
                       out.grad_values<A>(),
                       out.grad_entropy<A>()};
    const Partial all = sum_all(call, keep, tokens);
    *static_cast<A*>(out.loss.mutable_data_ptr()) = static_cast<A>(
        ppo_finish(all, kept, factor, policy.settings<double>().kl_coef, value_coef, entropy_coef,
                   static_cast<float*>(out.metrics.mutable_data_ptr())));
  });
  return out.tuple();
}

// ---- sums of sequences ------------------------------------------------------------------------

// Of one sequence: the number of unmasked tokens, and the sum of x - y in their order, which is the
// same with and without the masked tokens in between.
template <typename A>
std::pair<double, double> sum_sequence(const Tokens& x, const Tokens& y, const uint8_t* keep,
                                       int64_t begin, int64_t end) {
  A scratch[2][kBlock];
  double sum = 0;
  int64_t kept = 0;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = std::min(kBlock, end - at);
    const A* left = x.load(at, count, scratch[0]);
    const A* right = y.defined() ? y.load(at, count, scratch[1]) : nullptr;
    for (int64_t i = 0; i < count; ++i) {
      if (keep && !keep[at + i]) continue;
      sum += static_cast<double>(left[i]) - (right ? static_cast<double>(right[i]) : 0.0);
      ++kept;
    }
  }
  return {static_cast<double>(kept), sum};
}

Tensor sequence_sums(const Tensor& x, const std::optional<Tensor>& y,
                     const std::optional<Tensor>& mask, const Tensor& cu_seqlens) {
  const Sequences sequences(x.numel(), cu_seqlens);
  const Tokens left(x), right(y);
  RL_CHECK(!y || right.count() == left.count(), "x and y differ in size");
  const Mask keep(mask, x.numel());
  const int64_t count = sequences.count();
  Tensor out = empty_like_device(x, {2, count}, ScalarType::Double);
  double* const kept = static_cast<double*>(out.mutable_data_ptr());
  std::fill(kept, kept + 2 * count, 0.0);  // no thread visits empty sequences at the end
  with_acc(x, [&](auto zero) {
    using A = decltype(zero);
    sequences.parallel([&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s) {
        const auto found =
            sum_sequence<A>(left, right, keep.data(), sequences.begin(s), sequences.end(s));
        kept[s] = found.first;
        kept[count + s] = found.second;
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CPU, m) {
  m.impl("ppo_loss_fwd", TORCH_BOX(&ppo_loss_fwd));
  m.impl("sequence_sums", TORCH_BOX(&sequence_sums));
}

}  // namespace rl
