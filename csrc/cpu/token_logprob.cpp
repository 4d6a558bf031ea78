// token_logprob on CPU: log softmax(z)[target] and the entropy in one read of the logits; backward
// one read, one write.
//
// Shapes: logits [..., V] with any row strides, N rows; targets, mask, row_temperature, outputs: N.
// z = softcap * tanh(logits / softcap) / temperature. A row is walked once, in blocks: sum e^(z-m)
// and sum (z-m) e^(z-m), rescaled when a block shows that m is too small. With these
//   logprob = (z_t - m) - log s,   entropy = log s - (sum (z-m) e^(z-m)) / s  (all terms >= 0: no
//   cancellation),
// and m, log s and that mean are kept for the backward, apart, so that a large m costs no
// precision.

#include "huge_pages.h"
#include "logit_rows.h"

namespace rl {
namespace {

template <typename T, bool kCap>
void forward_rows(const Batch& b, acc_t<T>* logprob, acc_t<T>* entropy, acc_t<T>* stats) {
  using A = acc_t<T>;
  const T* data = static_cast<const T*>(b.logits.const_data_ptr());
  const int64_t count = b.view.rows.count;
  torch::stable::parallel_for(0, count, grain(b.view.rows), [&](int64_t begin, int64_t end) {
    dispatch_isa([&](auto fma) RL_LAMBDA_INLINE {
      for (int64_t r = begin; r < end; ++r) {
        if (!b.view.counts(r)) {
          logprob[r] = entropy[r] = stats[r] = stats[count + r] = stats[2 * count + r] = 0;
          continue;
        }
        const RowMaths<A> f = b.view.maths<A>(r);
        const T* row = data + b.view.rows.offset(r);
        const RowStats<A> s = row_stats<kCap, fma()>(row, b.view.rows.width, f);
        logprob[r] = row_logprob<kCap, fma()>(row[b.view.target(r)], s, f);
        entropy[r] = s.log_sum - s.mean;
        stats[r] = s.max;
        stats[count + r] = s.log_sum;
        stats[2 * count + r] = s.mean;
      }
    });
  });
}

template <typename T, bool kCap>
void backward_rows(const Batch& b, const Upstream<acc_t<T>>& upstream, const acc_t<T>* stats,
                   T* out, const Rows& out_rows) {
  using A = acc_t<T>;
  const T* data = static_cast<const T*>(b.logits.const_data_ptr());
  const int64_t count = b.view.rows.count, width = b.view.rows.width;
  torch::stable::parallel_for(0, count, grain(b.view.rows), [&](int64_t begin, int64_t end) {
    dispatch_isa([&](auto fma) RL_LAMBDA_INLINE {
      for (int64_t r = begin; r < end; ++r) {
        T* to = out + out_rows.offset(r);
        const A g = upstream.logprob ? upstream.logprob[r] : A(0);
        const A h = upstream.entropy ? upstream.entropy[r] : A(0);
        if (!b.view.counts(r) || (g == 0 && h == 0)) {
          std::memset(static_cast<void*>(to), 0, width * sizeof(T));
          continue;
        }
        const RowStats<A> s{stats[r], stats[count + r], stats[2 * count + r]};
        row_backward<kCap, fma()>(data + b.view.rows.offset(r), to, width, b.view.target(r), g, h,
                                  s, b.view.maths<A>(r));
      }
    });
  });
}

std::tuple<Tensor, Tensor, Tensor> token_logprob_fwd(
    Tensor logits, Tensor targets, std::optional<Tensor> row_temperature, double temperature,
    double softcap, std::optional<Tensor> mask, bool /*with_entropy*/, bool /*inplace_backward*/) {
  const Batch b = make_batch(logits, targets, row_temperature, temperature, softcap, mask);
  check_rows(b);
  const ScalarType dtype = acc_dtype(logits.scalar_type());
  Tensor logprob = empty_like_device(logits, shape_of(targets), dtype);
  Tensor entropy = empty_like_device(logits, shape_of(targets), dtype);
  Tensor stats = empty_like_device(logits, {3, b.view.rows.count}, dtype);
  dispatch_float(logits.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    auto* run = softcap > 0 ? forward_rows<T, true> : forward_rows<T, false>;
    run(b, static_cast<A*>(logprob.mutable_data_ptr()), static_cast<A*>(entropy.mutable_data_ptr()),
        static_cast<A*>(stats.mutable_data_ptr()));
  });
  return {logprob, entropy, stats};
}

void run_backward(const Batch& b, const std::optional<Tensor>& grad_logprob,
                  const std::optional<Tensor>& grad_entropy, const Tensor& stats, const Tensor& out,
                  const Rows& out_rows) {
  const ScalarType dtype = acc_dtype(b.logits.scalar_type());
  std::optional<Tensor> g, h;
  if (grad_logprob) g = as_contiguous(*grad_logprob);
  if (grad_entropy) h = as_contiguous(*grad_entropy);
  for (const auto& grad : {g, h}) {
    RL_CHECK(!grad || (grad->scalar_type() == dtype && grad->numel() == b.view.rows.count),
             "upstream gradients must have the outputs' dtype and shape");
  }
  check_stats(b, stats);
  dispatch_float(b.logits.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const Upstream<A> upstream{g ? static_cast<const A*>(g->const_data_ptr()) : nullptr,
                               h ? static_cast<const A*>(h->const_data_ptr()) : nullptr};
    auto* run = b.view.softcap > 0 ? backward_rows<T, true> : backward_rows<T, false>;
    run(b, upstream, static_cast<const A*>(stats.const_data_ptr()),
        static_cast<T*>(out.mutable_data_ptr()), out_rows);
  });
}

Tensor token_logprob_bwd(std::optional<Tensor> grad_logprob, std::optional<Tensor> grad_entropy,
                         Tensor logits, Tensor targets, Tensor stats,
                         std::optional<Tensor> row_temperature, double temperature, double softcap,
                         std::optional<Tensor> mask) {
  const Batch b = make_batch(logits, targets, row_temperature, temperature, softcap, mask);
  Tensor out = empty_like_device(logits, shape_of(logits), logits.scalar_type());
  advise_huge_pages(out);
  Rows out_rows;
  rows_of(out, out_rows);
  run_backward(b, grad_logprob, grad_entropy, stats, out, out_rows);
  return out;
}

void token_logprob_bwd_(std::optional<Tensor> grad_logprob, std::optional<Tensor> grad_entropy,
                        Tensor logits, Tensor targets, Tensor stats,
                        std::optional<Tensor> row_temperature, double temperature, double softcap,
                        std::optional<Tensor> mask) {
  Rows rows;
  RL_CHECK(rows_of(logits, rows),
           "an in-place backward needs logits with unit last stride and at most two row strides");
  const Batch b = make_batch(logits, targets, row_temperature, temperature, softcap, mask);
  run_backward(b, grad_logprob, grad_entropy, stats, logits, rows);
}

}  // namespace
}  // namespace rl

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CPU, m) {
  m.impl("token_logprob_fwd", TORCH_BOX(&rl::token_logprob_fwd));
  m.impl("token_logprob_bwd", TORCH_BOX(&rl::token_logprob_bwd));
  m.impl("token_logprob_bwd_", TORCH_BOX(&rl::token_logprob_bwd_));
}
