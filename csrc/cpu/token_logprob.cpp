// token_logprob on CPU: log softmax(z)[target] and the entropy in one read of the logits; backward
// one read, one write.
//
// Shapes: logits [..., V] with any row strides, N rows; targets, mask, row_temperature, outputs: N.
// z = softcap * tanh(logits / softcap) / temperature. A row is walked in blocks that stay in the L1
// cache: the block's maximum first, then sum e^(z-m) and sum (z-m) e^(z-m), rescaled once a block
// when the maximum moves. With these
//   logprob = (z_t - m) - log s,   entropy = log s - (sum (z-m) e^(z-m)) / s  (all terms >= 0: no
//   cancellation),
// and m and log s are kept apart for the backward, so that a large m costs no precision.

#include "../token_logprob.h"

#include <cstddef>

#include "../checks.h"
#include "../rl_math.h"

namespace rl {
namespace {

constexpr int64_t kBlock = 2048;           // logits per block: 8 KiB of fp32
constexpr int64_t kGrainLogits = 1 << 15;  // least work of a thread

template <typename A>
struct RowStats {
  A max, log_sum, entropy;
};

template <bool kCap, typename T, typename A>
RL_INLINE A logit(const T& x, const RowMaths<A>& f) {
  if constexpr (kCap) return tanh(load(x) * f.inv_softcap) * (f.softcap * f.scale);
  return load(x) * f.scale;
}

// One block widened to the accumulator's dtype: the logits, or tanh(logits / softcap); z is `scale`
// times these. The logits themselves where they need no change.
template <bool kCap, typename T, typename A>
RL_INLINE const A* block_logits(const T* row, int64_t n, const RowMaths<A>& f, A* buffer,
                                A& scale) {
  scale = kCap ? f.softcap * f.scale : f.scale;
  if constexpr (std::is_same_v<T, A> && !kCap) {
    return row;
  } else {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      if constexpr (kCap) {
        buffer[j] = tanh(load(row[j]) * f.inv_softcap);
      } else {
        buffer[j] = load(row[j]);
      }
    }
    return buffer;
  }
}

template <bool kCap, typename T, typename A>
RL_INLINE RowStats<A> row_stats(const T* row, int64_t width, const RowMaths<A>& f) {
  constexpr A kInf = std::numeric_limits<A>::infinity();
  const A floor = opaque(exp_floor<A>());
  A buffer[kBlock];
  A max = -kInf, sum = 0, weighted = 0;
  for (int64_t start = 0; start < width; start += kBlock) {
    const int64_t n = width - start < kBlock ? width - start : kBlock;
    A scale;
    const A* z = block_logits<kCap>(row + start, n, f, buffer, scale);
    A block_max = -kInf;
#pragma omp simd reduction(max : block_max)
    for (int64_t j = 0; j < n; ++j) block_max = z[j] > block_max ? z[j] : block_max;
    block_max *= scale;
    if (block_max > max) {
      if (max > -kInf) {
        const A shift = max - block_max;
        const A factor = exp_nonpositive(shift);
        weighted = factor > 0 ? factor * (weighted + sum * shift) : A(0);
        sum *= factor;
      }
      max = block_max;
    }
    // All logits so far -inf: subtract 0 instead, which leaves e^-inf = 0 and keeps a NaN a NaN.
    const A base = max > -kInf ? max : A(0);
    A block_sum = 0, block_weighted = 0;
#pragma omp simd reduction(+ : block_sum, block_weighted)
    for (int64_t j = 0; j < n; ++j) {
      const A raw = z[j] * scale - base;
      const A d = at_least(floor, raw);
      const A e = exp_clamped(d);
      block_sum += e;
      block_weighted += e * d;
    }
    sum += block_sum;
    weighted += block_weighted;
  }
  const A log_sum = log(sum);
  return {max, log_sum, log_sum - weighted / sum};
}

// dL/dlogits of a row from g = dL/dlogprob and h = dL/dentropy:
//   dz_j = g (1[j = t] - p_j) - h p_j (log p_j + entropy),  times dz/dlogits. `out` may be `row`.
template <bool kCap, typename T, typename A>
RL_INLINE void row_backward(const T* row, T* out, int64_t width, int64_t target, A g, A h,
                            const RowStats<A>& stats, const RowMaths<A>& f) {
  const A floor = opaque(exp_floor<A>());
  A buffer[kBlock];
  const A base = stats.max, log_sum = stats.log_sum;
  const A shifted = h * stats.entropy + g;
  // The target's own element, with 1 - p from expm1, before an in-place pass overwrites its logit.
  const A target_logit = load(row[target]);
  for (int64_t start = 0; start < width; start += kBlock) {
    const int64_t n = width - start < kBlock ? width - start : kBlock;
    A scale;
    const A* z = block_logits<kCap>(row + start, n, f, buffer, scale);
    T* const to = out + start;
    const T* const from = row + start;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const A raw = (z[j] * scale - base) - log_sum;
      const A d = at_least(floor, raw);
      A grad = -exp_clamped(d) * (h * d + shifted) * f.scale;
      if constexpr (kCap) grad *= sech2(load(from[j]) * f.inv_softcap);
      store(to[j], grad);
    }
  }
  A capped = target_logit, chain = f.scale;
  if constexpr (kCap) {
    capped = f.softcap * tanh(target_logit * f.inv_softcap);
    chain *= sech2(target_logit * f.inv_softcap);
  }
  const A raw = (capped * f.scale - base) - log_sum;
  const A d = at_least(floor, raw);
  const A p = exp_clamped(d);
  store(out[target], (-g * std::expm1(d) - h * p * (d + stats.entropy)) * chain);
}

// ---- rows, threads, dtypes
// -----------------------------------------------------------------------------------------

// Targets and temperatures of the rows that count; the wording is what fastrlhf.ops turns into a
// ValueError.
void check_rows(const Batch& b) {
  for (int64_t row = 0; row < b.view.rows.count; ++row) {
    if (!b.view.counts(row)) continue;
    const int64_t target = b.view.target(row);
    if (target < 0 || target >= b.view.rows.width) {
      user_error("targets must be in [0, " + std::to_string(b.view.rows.width) + "); got " +
                 std::to_string(target) + " at row " + std::to_string(row));
    }
    if (b.view.row_temperature && !(b.view.row_temperature_of(row) > 0)) {
      user_error("temperature must be above 0; got " +
                 std::to_string(b.view.row_temperature_of(row)) + " at row " + std::to_string(row));
    }
  }
}

int64_t grain(const Rows& rows) {
  return std::max<int64_t>(1, kGrainLogits / std::max<int64_t>(rows.width, 1));
}

template <typename T, bool kCap>
void forward_rows(const Batch& b, acc_t<T>* logprob, acc_t<T>* entropy, acc_t<T>* stats) {
  using A = acc_t<T>;
  const T* data = static_cast<const T*>(b.logits.const_data_ptr());
  const int64_t count = b.view.rows.count;
  torch::stable::parallel_for(0, count, grain(b.view.rows), [&](int64_t begin, int64_t end) {
    dispatch_isa([&]() RL_LAMBDA_INLINE {
      for (int64_t r = begin; r < end; ++r) {
        if (!b.view.counts(r)) {
          logprob[r] = entropy[r] = stats[r] = stats[count + r] = 0;
          continue;
        }
        const RowMaths<A> f = b.view.maths<A>(r);
        const T* row = data + b.view.rows.offset(r);
        const RowStats<A> s = row_stats<kCap>(row, b.view.rows.width, f);
        logprob[r] = (logit<kCap>(row[b.view.target(r)], f) - s.max) - s.log_sum;
        entropy[r] = s.entropy;
        stats[r] = s.max;
        stats[count + r] = s.log_sum;
      }
    });
  });
}

template <typename T, bool kCap>
void backward_rows(const Batch& b, const Upstream<acc_t<T>>& upstream, const acc_t<T>* entropy,
                   const acc_t<T>* stats, T* out, const Rows& out_rows) {
  using A = acc_t<T>;
  const T* data = static_cast<const T*>(b.logits.const_data_ptr());
  const int64_t count = b.view.rows.count, width = b.view.rows.width;
  torch::stable::parallel_for(0, count, grain(b.view.rows), [&](int64_t begin, int64_t end) {
    dispatch_isa([&]() RL_LAMBDA_INLINE {
      for (int64_t r = begin; r < end; ++r) {
        T* to = out + out_rows.offset(r);
        const A g = upstream.logprob ? upstream.logprob[r] : A(0);
        const A h = upstream.entropy ? upstream.entropy[r] : A(0);
        if (!b.view.counts(r) || (g == 0 && h == 0)) {
          std::memset(static_cast<void*>(to), 0, width * sizeof(T));
          continue;
        }
        const RowStats<A> s{stats[r], stats[count + r], entropy[r]};
        row_backward<kCap>(data + b.view.rows.offset(r), to, width, b.view.target(r), g, h, s,
                           b.view.maths<A>(r));
      }
    });
  });
}

// body(T{}) with the C++ type of a floating dtype.
template <typename F>
void dispatch_float(ScalarType dtype, const F& body) {
  if (dtype == ScalarType::Float) return body(float{});
  if (dtype == ScalarType::BFloat16) return body(bf16{});
  if (dtype == ScalarType::Half) return body(f16{});
  body(double{});
}

std::tuple<Tensor, Tensor, Tensor> token_logprob_fwd(Tensor logits, Tensor targets,
                                                     std::optional<Tensor> row_temperature,
                                                     double temperature, double softcap,
                                                     std::optional<Tensor> mask,
                                                     bool /*inplace_backward*/) {
  const Batch b = make_batch(logits, targets, row_temperature, temperature, softcap, mask);
  check_rows(b);
  const ScalarType dtype = acc_dtype(logits.scalar_type());
  Tensor logprob = empty_like_device(logits, shape_of(targets), dtype);
  Tensor entropy = empty_like_device(logits, shape_of(targets), dtype);
  Tensor stats = empty_like_device(logits, {2, b.view.rows.count}, dtype);
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
                  const std::optional<Tensor>& grad_entropy, const Tensor& entropy,
                  const Tensor& stats, const Tensor& out, const Rows& out_rows) {
  const ScalarType dtype = acc_dtype(b.logits.scalar_type());
  std::optional<Tensor> g, h;
  if (grad_logprob) g = as_contiguous(*grad_logprob);
  if (grad_entropy) h = as_contiguous(*grad_entropy);
  for (const auto& grad : {g, h}) {
    RL_CHECK(!grad || (grad->scalar_type() == dtype && grad->numel() == b.view.rows.count),
             "upstream gradients must have the outputs' dtype and shape");
  }
  RL_CHECK(stats.is_contiguous() && entropy.is_contiguous(), "saved statistics must be contiguous");
  dispatch_float(b.logits.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const Upstream<A> upstream{g ? static_cast<const A*>(g->const_data_ptr()) : nullptr,
                               h ? static_cast<const A*>(h->const_data_ptr()) : nullptr};
    auto* run = b.view.softcap > 0 ? backward_rows<T, true> : backward_rows<T, false>;
    run(b, upstream, static_cast<const A*>(entropy.const_data_ptr()),
        static_cast<const A*>(stats.const_data_ptr()), static_cast<T*>(out.mutable_data_ptr()),
        out_rows);
  });
}

Tensor token_logprob_bwd(std::optional<Tensor> grad_logprob, std::optional<Tensor> grad_entropy,
                         Tensor logits, Tensor targets, Tensor entropy, Tensor stats,
                         std::optional<Tensor> row_temperature, double temperature, double softcap,
                         std::optional<Tensor> mask) {
  const Batch b = make_batch(logits, targets, row_temperature, temperature, softcap, mask);
  Tensor out = empty_like_device(logits, shape_of(logits), logits.scalar_type());
  Rows out_rows;
  rows_of(out, out_rows);
  run_backward(b, grad_logprob, grad_entropy, entropy, stats, out, out_rows);
  return out;
}

void token_logprob_bwd_(std::optional<Tensor> grad_logprob, std::optional<Tensor> grad_entropy,
                        Tensor logits, Tensor targets, Tensor entropy, Tensor stats,
                        std::optional<Tensor> row_temperature, double temperature, double softcap,
                        std::optional<Tensor> mask) {
  Rows rows;
  RL_CHECK(rows_of(logits, rows),
           "an in-place backward needs logits with unit last stride and at most two row strides");
  const Batch b = make_batch(logits, targets, row_temperature, temperature, softcap, mask);
  run_backward(b, grad_logprob, grad_entropy, entropy, stats, logits, rows);
}

}  // namespace
}  // namespace rl

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CPU, m) {
  m.impl("token_logprob_fwd", TORCH_BOX(&rl::token_logprob_fwd));
  m.impl("token_logprob_bwd", TORCH_BOX(&rl::token_logprob_bwd));
  m.impl("token_logprob_bwd_", TORCH_BOX(&rl::token_logprob_bwd_));
}
