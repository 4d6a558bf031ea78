// token_loss and token_loss_rows on both devices: the loss of a row and d loss / d logprob from its
// log-probability; inputs, outputs and their checks.
//
// Shapes: advantages, old_logprob, outputs [N] in the accumulator's dtype; scale 0-d.
#pragma once

#include "ppo.h"
#include "rows.h"

namespace rl {

template <typename A>
struct TokenTerm {
  A loss;
  A grad_logprob;  // d loss / d logprob
};

// loss = scale * policy_term(logprob, ...), or -scale * advantage * logprob without old_logprob.
// Plain pointers and numbers: passed to CUDA kernels by value.
template <typename A>
struct LossArgs {
  const A* advantages = nullptr;   // [N]; null: 1
  const A* old_logprob = nullptr;  // [N]; null: no ratio, no clip
  const A* scale_ptr = nullptr;    // 0-d; null: `scale`
  A scale = 1;
  A low = 0, high = 0, dual_clip = 0;  // clip range of the ratio; infinity: no dual clip
  A entropy_coef = 0;

  RL_HD A row_scale() const { return scale_ptr ? *scale_ptr : scale; }
  // dL/dentropy of an unmasked row.
  RL_HD A grad_entropy() const { return -entropy_coef * row_scale(); }
  RL_HD TokenTerm<A> term(int64_t row, A logprob) const {
    const A factor = row_scale();
    const A advantage = advantages ? advantages[row] : A(1);
    if (old_logprob == nullptr) {
      return {-advantage * logprob * factor, -advantage * factor};
    }
    const PolicyTerm<A> t = policy_term(logprob, old_logprob[row], advantage, low, high, dual_clip);
    // A NaN loss takes the clipped branch, whose gradient is 0: propagate the NaN instead.
    return {t.loss * factor, (t.loss == t.loss ? t.grad : t.loss) * factor};
  }
};

// The tensors and numbers behind LossArgs.
struct LossInputs {
  std::optional<Tensor> advantages, old_logprob, scale_tensor;
  double scale, clip, dual_clip, entropy_coef = 0;

  template <typename A>
  LossArgs<A> args() const {
    const auto pointer = [](const std::optional<Tensor>& t) {
      return t ? static_cast<const A*>(t->const_data_ptr()) : nullptr;
    };
    return {pointer(advantages),       pointer(old_logprob),        pointer(scale_tensor),
            static_cast<A>(scale),     static_cast<A>(1 - clip),    static_cast<A>(1 + clip),
            static_cast<A>(dual_clip), static_cast<A>(entropy_coef)};
  }
};

inline LossInputs loss_inputs(const RowInputs& in, const std::optional<Tensor>& advantages,
                              const std::optional<Tensor>& old_logprob, double clip,
                              double dual_clip, const std::optional<Tensor>& scale_tensor,
                              double scale, double entropy_coef = 0) {
  const ScalarType dtype = acc_dtype(in.logits.scalar_type());
  const auto checked = [dtype](const std::optional<Tensor>& t, int64_t count, const char* name) {
    if (!t) return std::optional<Tensor>{};
    RL_CHECK(t->scalar_type() == dtype && t->numel() == count, name,
             " must have the outputs' dtype and ", count, " elements");
    return std::optional<Tensor>{as_contiguous(*t)};
  };
  return {checked(advantages, in.args.rows.count, "advantages"),
          checked(old_logprob, in.args.rows.count, "old_logprob"),
          checked(scale_tensor, 1, "scale"),
          scale,
          clip,
          dual_clip,
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
