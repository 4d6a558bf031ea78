// The policy loss of a token on both devices, for ppo_loss and the row pass of token_loss: clipped
// surrogates, KL in the loss, rollout weights, and weights per sequence.
//
// Shapes: N tokens in S sequences; per-token pointers [N], sequences [5, S], cu_seqlens [S + 1].
#pragma once

#include "sequence.h"
#include "tensor.h"

namespace rl {

// In the order of _KERNEL_OBJECTIVES, KL_GRADIENTS and _ROLLOUT in fastrlhf/ops/_policy.py.
enum class Objective : int { ppo, reinforce, cispo, sapo };
enum class KlGradient : int { estimator, k2, ratio };
enum class Rollout : int { none, weights, truncate, mask };

// Places in the raw ops' `options`, and rows of `sequences`; as in fastrlhf/ops/_policy.py.
enum Option {
  kObjective,
  kSequenceRatio,
  kTauPos,
  kTauNeg,
  kKlCoef,
  kKlEstimator,
  kKlClamp,
  kKlGradient,
  kRollout,
  kRolloutLow,
  kRolloutHigh,
  kFirstRow,
  kOptions
};
enum SequenceRow { kWeight, kValueWeight, kAdvantage, kLogRatio, kRolloutWeight, kSequenceRows };

// ---- one token ----------------------------------------------------------------------------------

// Settings of the policy loss. The defaults are those of plain PPO.
template <typename A>
struct PolicySettings {
  A low = 0, high = 0, dual_clip = 0;  // of the ratio; float32's maximum: no limit
  Objective objective = Objective::ppo;
  bool sequence_ratio = false;
  A tau_pos = 1, tau_neg = 1;
  bool has_kl = false;
  A kl_coef = 0;
  KlEstimator kl_estimator = KlEstimator::k3;
  bool kl_clamp = true;
  KlGradient kl_gradient = KlGradient::estimator;
  Rollout rollout = Rollout::none;
  A rollout_low = 0, rollout_high = 0;
  int64_t first_row = 0;
};

// Policy loss of one token with advantage A, log-ratio d and rho = exp(clamp(d, -20, 20)):
//   ppo:       max(-A rho, -A clip(rho, low, high)), and where A < 0 at most -A dual_clip
//   reinforce: -A logprob
//   cispo:     -A sg(clip(rho, low, high)) logprob
//   sapo:      -A (4 / tau) sigmoid(tau (rho - 1)), tau = tau_pos where A > 0, else tau_neg
template <typename A>
struct PolicyTerm {
  A loss;
  A grad;  // d loss / d logprob
  A ratio;
  A kl;       // rho - 1 - log rho
  A clipped;  // 1 if the clip decides: the clipped term is the larger one (cispo: rho is outside)
  A clipped_low;  // 1 if that is at the lower limit
  A dual;         // 1 if the dual clip decides
  A outside;      // 1 if rho is outside [low, high]
};

template <Objective kObjective = Objective::ppo, typename A>
RL_HD PolicyTerm<A> policy_term(A logprob, A log_ratio, A advantage, const PolicySettings<A>& s) {
  if constexpr (kObjective == Objective::reinforce) {
    return {-advantage * logprob, -advantage, A(1), A(0), A(0), A(0), A(0), A(0)};
  }
  const A d = clamp(log_ratio, A(-kLogRatioLimit), A(kLogRatioLimit));
  const A ratio = exp_accurate(d);
  const A kl = expm1_excess(d);
  if constexpr (kObjective == Objective::sapo) {
    const A tau = advantage > A(0) ? s.tau_pos : s.tau_neg;
    const A e = exp_accurate(clamp(-tau * (ratio - A(1)), exp_floor<A>(), A(88)));
    const A sigmoid = A(1) / (A(1) + e);
    const A grad = A(-4) * advantage * (e * sigmoid) * sigmoid * ratio;
    return {A(-4) * advantage / tau * sigmoid,
            d == log_ratio ? grad : A(0),
            ratio,
            kl,
            A(0),
            A(0),
            A(0),
            A(0)};
  }
  const bool below = ratio < s.low, outside = below || ratio > s.high;
  const A limited = clamp(ratio, s.low, s.high);
  if constexpr (kObjective == Objective::cispo) {
    const A grad = -advantage * limited;
    return {grad * logprob,       grad, ratio, kl, outside ? A(1) : A(0), below ? A(1) : A(0), A(0),
            outside ? A(1) : A(0)};
  }
  const A unclipped = -advantage * ratio;
  const A clipped = -advantage * limited;
  const A bound = advantage < A(0) ? -advantage * s.dual_clip : A(INFINITY);
  const bool binding = clipped > unclipped;
  const A larger = binding ? clipped : unclipped;
  const A inside = binding ? A(0) : unclipped;
  const bool dual = bound < larger;
  const A grad = dual ? A(0) : inside;
  return {dual ? bound : larger,
          d == log_ratio ? grad : A(0),
          ratio,
          kl,
          binding ? A(1) : A(0),
          binding && advantage < A(0) ? A(1) : A(0),
          dual ? A(1) : A(0),
          outside ? A(1) : A(0)};
}

// KL in the loss from d = logprob - ref_logprob, by kl_term; k3 without a clamp is e^-d - 1 + d for
// any d. Its gradient is that of the estimator, of k2 (d), or of ratio * estimator, which is then
// the value too.
template <typename A>
struct KlInLoss {
  A value;
  A grad;  // d value / d logprob
};

// `ratio_grad`: d ratio / d logprob.
template <typename A>
RL_HD KlInLoss<A> kl_in_loss(A logprob, A ref_logprob, A ratio, A ratio_grad,
                             const PolicySettings<A>& s) {
  const A d = logprob - ref_logprob;
  A value = d, grad = A(1);
  bool exact = false;  // value + grad is d
  if (s.kl_estimator == KlEstimator::k2) {
    value = A(0.5) * d * d;
    grad = d;
  } else if (s.kl_estimator == KlEstimator::abs) {
    value = d < A(0) ? -d : d;
    grad = d < A(0) ? A(-1) : (d > A(0) ? A(1) : d);  // NaN stays NaN
  } else if (s.kl_estimator == KlEstimator::k3) {
    const A limit = s.kl_clamp ? A(kLogRatioLimit) : A(std::is_same_v<A, double> ? 700 : 88);
    const A x = clamp(-d, -limit, limit);
    const A excess = expm1_excess(x);  // e^x - 1 - x
    const bool within = x == -d;
    // Both forms of 1 - e^x are computed: a loop with a branch around exp would not vectorise.
    const A near_0 = -(excess + x), elsewhere = A(1) - exp_accurate(x);
    const A slope = (x < A(0) ? -x : x) < A(0.5) ? near_0 : elsewhere;
    if (s.kl_clamp) {
      value = excess > A(kK3Limit) ? A(kK3Limit) : excess;
      exact = within & !(excess > A(kK3Limit));
      grad = exact ? slope : (d == d ? A(0) : d);
    } else {  // beyond the limit e^-d is 0 or infinite
      value = within ? excess : (d > A(0) ? d - A(1) : (d < A(0) ? A(INFINITY) : d));
      grad = within ? slope : (d > A(0) ? A(1) : (d < A(0) ? A(-INFINITY) : d));
      exact = true;
    }
  }
  if (s.kl_gradient == KlGradient::k2) return {value, d};
  if (s.kl_gradient == KlGradient::ratio) {
    // ratio_grad is ratio, or 0 beyond the clamp, where the KL may be infinite. The e^-d of k3 and
    // of its slope cancel: their sum would be rounded to the size of e^-d, or inf - inf.
    const A sum = exact ? d : value + grad;
    return {ratio * value, ratio_grad == A(0) ? ratio * grad : ratio_grad * sum};
  }
  return {value, grad};
}

// A rollout weight within its bounds.
template <typename A>
struct RolloutWeight {
  A weight;
  A outside;  // 1 if it was outside
};

template <typename A>
RL_HD RolloutWeight<A> bounded_weight(A weight, const PolicySettings<A>& s) {
  if (s.rollout == Rollout::none || s.rollout == Rollout::weights) return {weight, A(0)};
  const bool outside = weight < s.rollout_low || weight > s.rollout_high;
  const A limited = clamp(weight, s.rollout_low, s.rollout_high);
  return {s.rollout == Rollout::mask && outside ? A(0) : limited, outside ? A(1) : A(0)};
}

// The weight of a token, before its bounds, from its log-prob under the rollout policy.
template <typename A>
RL_HD A rollout_ratio(A rollout_logprob, A old_logprob) {
  return exp_accurate(clamp(old_logprob - rollout_logprob, A(-kLogRatioLimit), A(kLogRatioLimit)));
}

// The same from its element of `rollout`: a weight or a log-prob.
template <typename A>
RL_HD A rollout_of(A given, A old_logprob, const PolicySettings<A>& s) {
  return s.rollout == Rollout::weights ? given : rollout_ratio(given, old_logprob);
}

// What the policy loss of a token depends on.
template <typename A>
struct PolicyToken {
  A logprob, log_ratio, advantage;
  A ref_logprob;  // with KL
  A rollout;      // weight before its bounds; 1 without rollout correction
};

// kl_in_loss of a token whose policy term has this ratio.
template <typename A>
RL_HD KlInLoss<A> kl_of(A logprob, A ref_logprob, A log_ratio, A ratio,
                        const PolicySettings<A>& s) {
  const A size = log_ratio < A(0) ? -log_ratio : log_ratio;
  return kl_in_loss(logprob, ref_logprob, ratio, size > A(kLogRatioLimit) ? A(0) : ratio, s);
}

template <typename A>
struct PolicyLoss {
  PolicyTerm<A> policy;  // without the rollout weight
  A kl;                  // KL in the loss, before its coefficient
  RolloutWeight<A> rollout;
  A loss;  // weight * policy loss
  A grad;  // d (loss + kl_coef * kl) / d logprob
};

// The policy loss of one token. The branches on the settings are uniform.
template <Objective kObjective, typename A>
RL_HD PolicyLoss<A> policy_loss(const PolicyToken<A>& t, const PolicySettings<A>& s) {
  const PolicyTerm<A> term = policy_term<kObjective>(t.logprob, t.log_ratio, t.advantage, s);
  const RolloutWeight<A> w = bounded_weight(t.rollout, s);
  PolicyLoss<A> out{term, A(0), w, w.weight * term.loss, w.weight * term.grad};
  if (s.has_kl) {
    const KlInLoss<A> kl = kl_of(t.logprob, t.ref_logprob, t.log_ratio, term.ratio, s);
    out.kl = kl.value;
    out.grad += s.kl_coef * kl.grad;
  }
  return out;
}

// ---- tokens of sequences ------------------------------------------------------------------------

// One number of each kind a sequence. Plain pointers and numbers: passed to CUDA kernels by value.
template <typename A>
struct SequenceRows {
  const int32_t* cu_seqlens = nullptr;  // [S + 1]; null: no sequences
  const A* rows = nullptr;              // [5, S]
  int64_t count = 0;                    // S

  // The sequence of a token: the last one that begins at or before it. In [0, S) whatever
  // cu_seqlens holds.
  RL_HD int64_t of(int64_t token) const {
    int64_t first = 0, last = count - 1;
    while (first < last) {
      const int64_t middle = (first + last + 1) / 2;
      if (cu_seqlens[middle] <= token) {
        first = middle;
      } else {
        last = middle - 1;
      }
    }
    return first;
  }
  RL_HD A at(SequenceRow row, int64_t sequence) const { return rows[row * count + sequence]; }
};

// ---- arguments of the raw ops -------------------------------------------------------------------

// `more` and `options` of the raw ops. Both are absent or empty for plain PPO. (An empty list costs
// 0.2 us more than an absent one.)
using MoreTensors = std::optional<std::vector<std::optional<Tensor>>>;
using OptionNumbers = std::optional<std::vector<double>>;

struct PolicyInputs {
  std::optional<Tensor> ref_logprob, rollout, cu_seqlens, sequences;
  double low, high, dual_clip;
  std::vector<double> options;

  bool plain() const { return options.empty(); }

  template <typename A>
  PolicySettings<A> settings() const {
    PolicySettings<A> s;
    s.low = static_cast<A>(low);
    s.high = static_cast<A>(high);
    s.dual_clip = static_cast<A>(dual_clip);
    if (plain()) return s;
    const auto at = [&](Option place) { return static_cast<A>(options[place]); };
    s.objective = static_cast<Objective>(options[kObjective]);
    s.sequence_ratio = options[kSequenceRatio] != 0;
    s.tau_pos = at(kTauPos);
    s.tau_neg = at(kTauNeg);
    s.has_kl = ref_logprob.has_value();
    s.kl_coef = at(kKlCoef);
    s.kl_estimator = static_cast<KlEstimator>(options[kKlEstimator]);
    s.kl_clamp = options[kKlClamp] != 0;
    s.kl_gradient = static_cast<KlGradient>(options[kKlGradient]);
    s.rollout = static_cast<Rollout>(options[kRollout]);
    s.rollout_low = at(kRolloutLow);
    s.rollout_high = at(kRolloutHigh);
    s.first_row = static_cast<int64_t>(options[kFirstRow]);
    return s;
  }

  template <typename A>
  SequenceRows<A> sequence_rows() const {
    if (!sequences) return {};
    return {static_cast<const int32_t*>(cu_seqlens->const_data_ptr()),
            static_cast<const A*>(sequences->const_data_ptr()), sequences->size(1)};
  }
};

// Checks `more` and `options` for `tokens` tokens whose accumulator has this dtype.
inline PolicyInputs policy_inputs(int64_t tokens, ScalarType acc, const MoreTensors& more,
                                  double low, double high, double dual_clip,
                                  const OptionNumbers& numbers) {
  PolicyInputs in{{}, {}, {}, {}, low, high, dual_clip, {}};
  const bool has_more = more && !more->empty();
  if (!numbers || numbers->empty()) {
    RL_CHECK(!has_more, "more needs options");
    return in;
  }
  const std::vector<double>& options = in.options = *numbers;
  RL_CHECK(options.size() == kOptions, "options must have ", kOptions, " numbers, got ",
           options.size());
  RL_CHECK(!has_more || more->size() == 4, "more must have 4 tensors, got ", more->size());
  const auto choice = [&](Option place, int last) {
    const double x = options[place];
    RL_CHECK(x >= 0 && x <= last && x == static_cast<int>(x), "options[", static_cast<int>(place),
             "] must be a whole number from 0 to ", last);
  };
  choice(kObjective, static_cast<int>(Objective::sapo));
  choice(kSequenceRatio, 1);
  choice(kKlEstimator, static_cast<int>(KlEstimator::abs));
  choice(kKlClamp, 1);
  choice(kKlGradient, static_cast<int>(KlGradient::ratio));
  choice(kRollout, static_cast<int>(Rollout::mask));
  RL_CHECK(options[kFirstRow] >= 0 && options[kFirstRow] < 0x1p53, "first_row must be >= 0");
  if (has_more) {
    in.ref_logprob = (*more)[0];
    in.rollout = (*more)[1];
    in.cu_seqlens = (*more)[2];
    in.sequences = (*more)[3];
  }
  for (const std::optional<Tensor>* t : {&in.ref_logprob, &in.rollout}) {
    if (!t->has_value()) continue;
    RL_CHECK((*t)->numel() == tokens, "expected ", tokens, " tokens, got ", (*t)->numel());
    RL_CHECK(acc_dtype((*t)->scalar_type()) == acc, "float64 only with float64");
  }
  RL_CHECK(in.cu_seqlens.has_value() == in.sequences.has_value(),
           "cu_seqlens and sequences must come together");
  if (in.sequences) {
    const int64_t count = in.cu_seqlens->numel() - 1;
    RL_CHECK(in.cu_seqlens->scalar_type() == ScalarType::Int && in.cu_seqlens->dim() == 1 &&
                 (count > 0 || (count == 0 && tokens == 0)),
             "cu_seqlens must be int32 [S + 1]");
    RL_CHECK(in.sequences->scalar_type() == acc && in.sequences->dim() == 2 &&
                 in.sequences->size(0) == kSequenceRows && in.sequences->size(1) == count,
             "sequences must be [", static_cast<int>(kSequenceRows), ", ", count,
             "] in the accumulator's dtype");
    in.cu_seqlens = as_contiguous(*in.cu_seqlens);
    in.sequences = as_contiguous(*in.sequences);
  }
  RL_CHECK(in.sequences || options[kSequenceRatio] == 0, "a sequence's ratio needs sequences");
  RL_CHECK(in.sequences || in.rollout || options[kRollout] == 0,
           "a rollout correction needs rollout or sequences");
  return in;
}

}  // namespace rl
