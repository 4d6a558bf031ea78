// token_loss and token_loss_rows: what the CPU and CUDA implementations share. The loss of a row
// and its grad_logprob from the row's log-probability; host checks.
//
// Shapes: advantages, old_logprob, outputs: N rows, in the accumulator's dtype; scale: 0-d.
#pragma once

#include "ppo.h"
#include "rows.h"

namespace rl {

// grad_logprob = d loss / d logprob: dL/dlogits_j = grad_logprob (1[j = target] - p_j)
// dz_j/dlogits_j.
template <typename A>
struct TokenTerm {
  A loss;
  A grad_logprob;
};

// Plain pointers and numbers: passed to CUDA kernels by value.
template <typename A>
struct LossView {
  const A* advantages = nullptr;   // nullptr: 1
  const A* old_logprob = nullptr;  // nullptr: the loss is -advantage * logprob
  const A* scale_ptr = nullptr;    // nullptr: `scale`
  A scale = 1;
  A low = 0, high = 0, dual_clip = 0;
  A entropy_coef = 0;

  RL_HD A factor_of_rows() const { return scale_ptr ? *scale_ptr : scale; }
  // dL/dentropy of a row that counts.
  RL_HD A grad_entropy() const { return -entropy_coef * factor_of_rows(); }
  RL_HD TokenTerm<A> term(int64_t row, A logprob) const {
    const A factor = factor_of_rows();
    const A advantage = advantages ? advantages[row] : A(1);
    if (old_logprob == nullptr) {
      return {-advantage * logprob * factor, -advantage * factor};
    }
    const PolicyTerm<A> t = policy_term(logprob, old_logprob[row], advantage, low, high, dual_clip);
    // A NaN compares like a clipped token, whose gradient is 0: it must not hide there.
    return {t.loss * factor, (t.loss == t.loss ? t.grad : t.loss) * factor};
  }
};

// The per-row inputs of the loss, and the tensors that keep their pointers alive.
struct LossInputs {
  std::optional<Tensor> advantages, old_logprob, scale_tensor;
  double scale, clip, dual_clip, entropy_coef = 0;

  template <typename A>
  LossView<A> view() const {
    const auto pointer = [](const std::optional<Tensor>& t) {
      return t ? static_cast<const A*>(t->const_data_ptr()) : nullptr;
    };
    return {pointer(advantages),       pointer(old_logprob),        pointer(scale_tensor),
            static_cast<A>(scale),     static_cast<A>(1 - clip),    static_cast<A>(1 + clip),
            static_cast<A>(dual_clip), static_cast<A>(entropy_coef)};
  }
};

inline LossInputs make_loss(const Batch& b, const std::optional<Tensor>& advantages,
                            const std::optional<Tensor>& old_logprob, double clip, double dual_clip,
                            const std::optional<Tensor>& scale_tensor, double scale,
                            double entropy_coef = 0) {
  const ScalarType dtype = acc_dtype(b.logits.scalar_type());
  const auto checked = [dtype](const std::optional<Tensor>& t, int64_t count, const char* name) {
    if (!t) return std::optional<Tensor>{};
    RL_CHECK(t->scalar_type() == dtype && t->numel() == count, name,
             " must have the outputs' dtype and ", count, " elements");
    return std::optional<Tensor>{as_contiguous(*t)};
  };
  return {checked(advantages, b.view.rows.count, "advantages"),
          checked(old_logprob, b.view.rows.count, "old_logprob"),
          checked(scale_tensor, 1, "scale"),
          scale,
          clip,
          dual_clip,
          entropy_coef};
}

// Where a row's results go; nullptr: nowhere.
template <typename A>
struct LossOutputs {
  A* loss;
  A* logprob;
  A* grad_logprob;
  A* stats;  // [2, N]: the first two of token_logprob's
  A* entropy = nullptr;

  // `count`: N.
  RL_HD void put(int64_t row, int64_t count, const TokenTerm<A>& term, A row_logprob, A row_entropy,
                 const RowStats<A>& s) const {
    logprob[row] = row_logprob;
    if (loss) loss[row] = term.loss;
    if (grad_logprob) grad_logprob[row] = term.grad_logprob;
    if (entropy) entropy[row] = row_entropy;
    if (stats) stats[row] = s.max, stats[count + row] = s.shifted_lse;
  }
};

// The N-row outputs of one call.
struct LossTensors {
  Tensor loss, logprob, grad_logprob, stats;

  template <typename A>
  LossOutputs<A> outputs() const {
    const auto pointer = [](const Tensor& t) { return static_cast<A*>(t.mutable_data_ptr()); };
    return {pointer(loss), pointer(logprob), pointer(grad_logprob), pointer(stats)};
  }
};

inline LossTensors new_outputs(const Batch& b, const Tensor& targets) {
  const ScalarType dtype = acc_dtype(b.logits.scalar_type());
  const auto rows = [&] { return empty_like_device(targets, shape_of(targets), dtype); };
  return {rows(), rows(), rows(), empty_like_device(targets, {2, b.view.rows.count}, dtype)};
}

// The outputs of token_loss_rows_, which the caller made.
struct RowPassTensors {
  Tensor logprob;
  std::optional<Tensor> entropy, grad_logprob;

  RowPassTensors(const Batch& b, const Tensor& row_logprob,
                 const std::optional<Tensor>& row_entropy,
                 const std::optional<Tensor>& row_grad_logprob, double entropy_coef)
      : logprob(row_logprob), entropy(row_entropy), grad_logprob(row_grad_logprob) {
    const ScalarType dtype = acc_dtype(b.logits.scalar_type());
    const auto check = [&](const Tensor& t, const char* name) {
      RL_CHECK(t.scalar_type() == dtype && t.numel() == b.view.rows.count && t.is_contiguous(),
               name, " must be contiguous, one a row, in the accumulator's dtype");
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

// Upstream gradients of the rows of `grad`; one number that was expanded is read where it lies.
struct RowScales {
  Tensor keep;
  int64_t step = 1;
};

inline RowScales row_scales(const Tensor& grad, const Tensor& upstream, const Rows& rows) {
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
