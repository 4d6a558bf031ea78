// token_loss on CPU: loss, log-probability and dL/dlogits of each row.
//
// Shapes: logits [..., V] with any row strides, N rows; targets, advantages, old_logprob, mask and
// outputs [N]. The gradient pass of a row follows its statistics pass while the row is in L2, so
// memory sees one read and one write of the logits. The backward only scales rows whose upstream
// gradient is not 1.

#include "../common/token_loss.h"

#include "huge_pages.h"
#include "softmax_row.h"

namespace rl {
namespace {

// `grad` may be the logits; null if only the values are wanted.
template <typename T, typename G, bool kCap>
void loss_rows(const RowInputs& in, const LossArgs<acc_t<T>>& loss, const LossOutputs<acc_t<T>>& to,
               G* grad, const RowLayout& grad_rows) {
  using A = acc_t<T>;
  const T* data = static_cast<const T*>(in.logits.const_data_ptr());
  const int64_t count = in.args.rows.count, width = in.args.rows.width;
  torch::stable::parallel_for(0, count, grain(in.args.rows), [&](int64_t begin, int64_t end) {
    dispatch_isa([&](auto fma) RL_LAMBDA_INLINE {
      for (int64_t r = begin; r < end; ++r) {
        G* out = grad ? grad + grad_rows.offset(r) : nullptr;
        TokenTerm<A> term{0, 0};
        RowStats<A> s{0, 0, 0};
        A logprob = 0, h = 0;
        const T* row = data + in.args.rows.offset(r);
        if (in.args.counts(r)) {
          const LogitTransform<A> f = in.args.transform<A>(r);
          s = reduce_row<kCap, fma()>(row, width, f);
          logprob = row_logprob<kCap, fma()>(load(row[in.args.target(r)]), s, f);
          term = loss.term(r, logprob);
          h = loss.grad_entropy(r);
        }
        to.put(r, count, term, logprob, s.shifted_lse - s.shifted_mean, s);
        if (out == nullptr) continue;
        if (term.grad_logprob == 0 && h == 0) {
          std::memset(static_cast<void*>(out), 0, width * sizeof(G));
        } else {
          row_backward<kCap, fma()>(row, out, width, in.args.target(r), term.grad_logprob, h, s,
                                    in.args.transform<A>(r));
        }
      }
    });
  });
}

// `to`: LossTensors or RowPassTensors. `out`: output of the gradient, or null.
template <typename Outputs>
void run(const RowInputs& in, const LossInputs& loss, const Outputs& to, const Tensor* out,
         const RowLayout& out_rows) {
  if (out && out->const_data_ptr() != in.logits.const_data_ptr()) advise_huge_pages(*out);
  const ScalarType dtype = in.logits.scalar_type();
  dispatch_gradient(dtype, out ? out->scalar_type() : dtype, [&](auto tag, auto grad_tag) {
    using T = decltype(tag);
    using G = decltype(grad_tag);
    using A = acc_t<T>;
    auto* rows = in.args.softcap > 0 ? loss_rows<T, G, true> : loss_rows<T, G, false>;
    rows(in, loss.args<A>(), to.template outputs<A>(),
         out ? static_cast<G*>(out->mutable_data_ptr()) : nullptr, out_rows);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> values(const RowInputs& in, const LossInputs& loss,
                                                  const Tensor& targets, const Tensor* out,
                                                  const RowLayout& out_rows) {
  check_rows(in);
  const LossTensors to = new_outputs(in, targets);
  run(in, loss, to, out, out_rows);
  return {to.loss, to.logprob, to.grad_logprob, to.row_stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_loss_fwd(
    Tensor logits, Tensor targets, std::optional<Tensor> advantages,
    std::optional<Tensor> old_logprob, MoreTensors more, double low, double high, double dual_clip,
    OptionNumbers options, std::optional<Tensor> row_temperature, double temperature,
    double softcap, std::optional<Tensor> mask, std::optional<Tensor> scale_tensor, double scale) {
  const RowInputs in = row_inputs(logits, targets, row_temperature, temperature, softcap, mask);
  const PolicyArguments policy{advantages, old_logprob, more, low, high, dual_clip, options};
  const LossInputs loss = loss_inputs(in, policy, scale_tensor, scale);
  return values(in, loss, targets, nullptr, RowLayout{});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_loss_fwd_(
    Tensor logits, Tensor targets, std::optional<Tensor> advantages,
    std::optional<Tensor> old_logprob, MoreTensors more, double low, double high, double dual_clip,
    OptionNumbers options, std::optional<Tensor> row_temperature, double temperature,
    double softcap, std::optional<Tensor> mask, std::optional<Tensor> scale_tensor, double scale,
    Tensor out) {
  const RowInputs in = row_inputs(logits, targets, row_temperature, temperature, softcap, mask);
  const PolicyArguments policy{advantages, old_logprob, more, low, high, dual_clip, options};
  const LossInputs loss = loss_inputs(in, policy, scale_tensor, scale);
  return values(in, loss, targets, &out, gradient_layout(logits, out));
}

void token_loss_rows_(Tensor logits, Tensor targets, std::optional<Tensor> advantages,
                      std::optional<Tensor> old_logprob, MoreTensors more, double low, double high,
                      double dual_clip, OptionNumbers options, double entropy_coef,
                      std::optional<Tensor> row_temperature, double temperature, double softcap,
                      std::optional<Tensor> mask, Tensor scale, Tensor dlogits, Tensor logprob,
                      std::optional<Tensor> entropy, std::optional<Tensor> grad_logprob) {
  const RowInputs in = row_inputs(logits, targets, row_temperature, temperature, softcap, mask);
  const PolicyArguments policy{advantages, old_logprob, more, low, high, dual_clip, options};
  const LossInputs loss = loss_inputs(in, policy, scale, 1, entropy_coef);
  const RowPassTensors to(in, logprob, entropy, grad_logprob, entropy_coef);
  const RowLayout rows = gradient_layout(logits, dlogits, true);
  check_rows(in);
  run(in, loss, to, &dlogits, rows);
}

// ---- backward: grad[r] *= upstream[r] ---------------------------------------------------------

template <typename T, typename A>
RL_INLINE void scale_row(T* row, int64_t width, A factor) {
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) store(row[j], load(row[j]) * factor);
}

void token_loss_bwd_(Tensor grad, Tensor upstream) {
  RowLayout rows;
  RL_CHECK(row_layout(grad, rows), "grad must have unit last stride and at most two row strides");
  const RowScales scales = row_scales(grad, upstream, rows);
  dispatch_float(grad.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    T* data = static_cast<T*>(grad.mutable_data_ptr());
    const A* factors = static_cast<const A*>(scales.keep.const_data_ptr());
    torch::stable::parallel_for(0, rows.count, grain(rows), [&](int64_t begin, int64_t end) {
      dispatch_isa([&](auto) RL_LAMBDA_INLINE {
        for (int64_t r = begin; r < end; ++r) {
          const A factor = factors[r * scales.step];
          T* row = data + rows.offset(r);
          if (factor == 0) {
            std::memset(static_cast<void*>(row), 0, rows.width * sizeof(T));
          } else if (factor != 1) {
            scale_row(row, rows.width, factor);
          }
        }
      });
    });
  });
}

}  // namespace
}  // namespace rl

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CPU, m) {
  m.impl("token_loss_fwd", TORCH_BOX(&rl::token_loss_fwd));
  m.impl("token_loss_fwd_", TORCH_BOX(&rl::token_loss_fwd_));
  m.impl("token_loss_rows_", TORCH_BOX(&rl::token_loss_rows_));
  m.impl("token_loss_bwd_", TORCH_BOX(&rl::token_loss_bwd_));
}
