// token_loss and token_loss_rows on both devices: the loss of a row and d loss / d logprob from its
// log-probability; inputs, outputs and their checks.
//
// Shapes: advantages, old_logprob, ref_logprob, rollout, outputs [N] in the accumulator's dtype;
// scale 0-d.
#pragma once

#include "ppo.h"
#include "rows.h"

namespace rl {

template <typename A>
struct TokenTerm {
  A loss;
  A grad_logprob;  // d loss / d logprob
};

// loss = scale * the sequence's weight * (policy loss + kl_coef * KL) of a row, by policy.h.
// Plain pointers and numbers: passed to CUDA kernels by value.
template <typename A>
struct LossArgs {
  PolicySettings<A> settings;
  SequenceRows<A> sequences;
  const A* advantages = nullptr;   // [N]; null: of the sequence; 1 without sequences
  const A* old_logprob = nullptr;  // [N]; null: a log-ratio of 0
  const A* ref_logprob = nullptr;  // [N], with KL
  const A* rollout = nullptr;      // [N]; null: of the sequence; 1 without rollout correction
  const A* scale_ptr = nullptr;    // 0-d; null: `scale`
  A scale = 1;
  A entropy_coef = 0;

  // What the loss of an unmasked row is multiplied by.
  RL_HD A row_scale(int64_t row) const {
    const A factor = scale_ptr ? *scale_ptr : scale;
    if (sequences.cu_seqlens == nullptr) return factor;
    return factor * sequences.at(kWeight, sequences.of(row + settings.first_row));
  }
  // dL/dentropy of an unmasked row.
  RL_HD A grad_entropy(int64_t row) const {
    return entropy_coef == A(0) ? A(0) : -entropy_coef * row_scale(row);
  }
  RL_HD TokenTerm<A> term(int64_t row, A logprob) const {
    switch (settings.objective) {
      case Objective::reinforce:
        return term_of<Objective::reinforce>(row, logprob);
      case Objective::cispo:
        return term_of<Objective::cispo>(row, logprob);
      case Objective::sapo:
        return term_of<Objective::sapo>(row, logprob);
      default:
        return term_of<Objective::ppo>(row, logprob);
    }
  }

 private:
  template <Objective kObjective>
  RL_HD TokenTerm<A> term_of(int64_t row, A logprob) const {
    const A old = old_logprob ? old_logprob[row] : logprob;
    A factor = scale_ptr ? *scale_ptr : scale;
    PolicyToken<A> token{logprob, logprob - old, A(1), A(0), A(1)};
    A rollout_weight = 1;
    if (sequences.cu_seqlens) {
      const int64_t s = sequences.of(row + settings.first_row);
      factor *= sequences.at(kWeight, s);
      token.advantage = sequences.at(kAdvantage, s);
      rollout_weight = sequences.at(kRolloutWeight, s);
      if (settings.sequence_ratio) token.log_ratio = sequences.at(kLogRatio, s);
    }
    if (advantages) token.advantage = advantages[row];
    if (ref_logprob) token.ref_logprob = ref_logprob[row];
    if (settings.rollout != Rollout::none) {
      token.rollout = rollout ? rollout_of(rollout[row], old, settings) : rollout_weight;
    }
    const PolicyLoss<A> x = policy_loss<kObjective>(token, settings);
    const A loss = settings.has_kl ? x.loss + settings.kl_coef * x.kl : x.loss;
    // A NaN takes a branch whose gradient is 0: propagate it instead. Only the KL of reinforce has
    // branches.
    const bool branches = kObjective != Objective::reinforce || settings.has_kl;
    const bool lost = branches && !(loss == loss);
    return {loss * factor, (lost ? loss : x.grad) * factor};
  }
};

// The tensors and numbers behind LossArgs.
struct LossInputs {
  std::optional<Tensor> advantages, old_logprob, scale_tensor;
  PolicyInputs policy;
  double scale, entropy_coef = 0;

  template <typename A>
  LossArgs<A> args() const {
    const auto pointer = [](const std::optional<Tensor>& t) {
      return t ? static_cast<const A*>(t->const_data_ptr()) : nullptr;
    };
    LossArgs<A> out;
    out.settings = policy.settings<A>();
    if (policy.plain() && !old_logprob) out.settings.objective = Objective::reinforce;
    out.sequences = policy.sequence_rows<A>();
    out.advantages = pointer(advantages);
    out.old_logprob = pointer(old_logprob);
    out.ref_logprob = pointer(policy.ref_logprob);
    out.rollout = pointer(policy.rollout);
    out.scale_ptr = pointer(scale_tensor);
    out.scale = static_cast<A>(scale);
    out.entropy_coef = static_cast<A>(entropy_coef);
    return out;
  }
};

// Policy arguments of the raw ops, in the order of their schemas.
struct PolicyArguments {
  const std::optional<Tensor>&advantages, &old_logprob;
  const MoreTensors& more;
  double low, high, dual_clip;
  const OptionNumbers& options;
};

inline LossInputs loss_inputs(const RowInputs& in, const PolicyArguments& p,
                              const std::optional<Tensor>& scale_tensor, double scale,
                              double entropy_coef = 0) {
  const ScalarType dtype = acc_dtype(in.logits.scalar_type());
  const int64_t rows = in.args.rows.count;
  const auto checked = [dtype](const std::optional<Tensor>& t, int64_t count, const char* name) {
    if (!t) return std::optional<Tensor>{};
    RL_CHECK(t->scalar_type() == dtype && t->numel() == count, name,
             " must have the outputs' dtype and ", count, " elements");
    return std::optional<Tensor>{as_contiguous(*t)};
  };
  PolicyInputs policy = policy_inputs(rows, dtype, p.more, p.low, p.high, p.dual_clip, p.options);
  policy.ref_logprob = checked(policy.ref_logprob, rows, "ref_logprob");
  policy.rollout = checked(policy.rollout, rows, "rollout");
  return {checked(p.advantages, rows, "advantages"),
          checked(p.old_logprob, rows, "old_logprob"),
          checked(scale_tensor, 1, "scale"),
          policy,
          scale,
          entropy_coef};
}

// Output pointers; null: not wanted.
template <typename A>
struct LossOutputs {
  A* loss;
  A* logprob;
  A* grad_logprob;
  A* row_stats;  // [2, N]: row_max, shifted_lse
  A* entropy = nullptr;

  // `count`: N, the stride of row_stats.
  RL_HD void put(int64_t row, int64_t count, const TokenTerm<A>& term, A row_logprob, A row_entropy,
                 const RowStats<A>& s) const {
    logprob[row] = row_logprob;
    if (loss) loss[row] = term.loss;
    if (grad_logprob) grad_logprob[row] = term.grad_logprob;
    if (entropy) entropy[row] = row_entropy;
    if (row_stats) row_stats[row] = s.row_max, row_stats[count + row] = s.shifted_lse;
  }
};

// Outputs of token_loss_fwd: [N] each, row_stats [2, N].
struct LossTensors {
  Tensor loss, logprob, grad_logprob, row_stats;

  template <typename A>
  LossOutputs<A> outputs() const {
    const auto pointer = [](const Tensor& t) { return static_cast<A*>(t.mutable_data_ptr()); };
    return {pointer(loss), pointer(logprob), pointer(grad_logprob), pointer(row_stats)};
  }
};

inline LossTensors new_outputs(const RowInputs& in, const Tensor& targets) {
  const ScalarType dtype = acc_dtype(in.logits.scalar_type());
  const auto rows = [&] { return empty_like_device(targets, shape_of(targets), dtype); };
  return {rows(), rows(), rows(), empty_like_device(targets, {2, in.args.rows.count}, dtype)};
}

// Outputs of token_loss_rows_, allocated by the caller: [N] each.
struct RowPassTensors {
  Tensor logprob;
  std::optional<Tensor> entropy, grad_logprob;

  RowPassTensors(const RowInputs& in, const Tensor& row_logprob,
                 const std::optional<Tensor>& row_entropy,
                 const std::optional<Tensor>& row_grad_logprob, double entropy_coef)
      : logprob(row_logprob), entropy(row_entropy), grad_logprob(row_grad_logprob) {
    const ScalarType dtype = acc_dtype(in.logits.scalar_type());
    const auto check = [&](const Tensor& t, const char* name) {
      RL_CHECK(t.scalar_type() == dtype && t.numel() == in.args.rows.count && t.is_contiguous(),
               name, " must be contiguous, with one element per row, in the accumulator's dtype");
    };
    check(logprob, "logprob");
    if (entropy) check(*entropy, "entropy");
    if (grad_logprob) check(*grad_logprob, "grad_logprob");
    RL_CHECK(entropy || entropy_coef == 0, "an entropy_coef needs the entropy");
  }

  template <typename A>
  LossOutputs<A> outputs() const {
    const auto pointer = [](const Tensor& t) { return static_cast<A*>(t.mutable_data_ptr()); };
    return {nullptr, pointer(logprob), grad_logprob ? pointer(*grad_logprob) : nullptr, nullptr,
            entropy ? pointer(*entropy) : nullptr};
  }
};

// Upstream gradients [N] of the rows of `grad`. An expanded scalar is read with step 0, not copied.
struct RowScales {
  Tensor keep;
  int64_t step = 1;
};

inline RowScales row_scales(const Tensor& grad, const Tensor& upstream, const RowLayout& rows) {
  RL_CHECK(
      upstream.scalar_type() == acc_dtype(grad.scalar_type()) && upstream.numel() == rows.count,
      "upstream gradients must have the outputs' dtype and shape");
  bool expanded = true;
  for (int64_t d = 0; d < upstream.dim(); ++d) {
    expanded = expanded && (upstream.stride(d) == 0 || upstream.size(d) == 1);
  }
  return expanded ? RowScales{upstream, 0} : RowScales{as_contiguous(upstream), 1};
}

}  // namespace rl
