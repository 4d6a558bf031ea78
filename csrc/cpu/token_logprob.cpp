// token_logprob on CPU: log softmax(z)[target] and the entropy in one read of the logits; backward
// one read, one write.
//
// Shapes: logits [..., V] with any row strides, N rows; targets, mask, row_temperature, outputs: N.
// z = softcap * tanh(logits / softcap) / temperature. A row is walked once, in blocks: sum e^(z-m)
// and sum (z-m) e^(z-m), rescaled when a block shows that m is too small. The walk may stop behind
// any block, with its sums in a state, and go on from there (token_logprob_part_). With the sums
//   logprob = (z_t - m) - log s,   entropy = log s - (sum (z-m) e^(z-m)) / s  (all terms >= 0: no
//   cancellation),
// and m, log s and that mean are kept for the backward, apart, so that a large m costs no
// precision.

#include "huge_pages.h"
#include "softmax_row.h"

namespace rl {
namespace {

// The N-row outputs of a forward.
struct Outputs {
  Tensor logprob, entropy, stats;

  Outputs(const Tensor& targets, ScalarType dtype)
      : logprob(empty_like_device(targets, shape_of(targets), dtype)),
        entropy(empty_like_device(targets, shape_of(targets), dtype)),
        stats(empty_like_device(targets, {3, targets.numel()}, dtype)) {}
  std::tuple<Tensor, Tensor, Tensor> tuple() const { return {logprob, entropy, stats}; }
};

// Where they go, row by row.
template <typename A>
struct RowOutputs {
  A *logprob, *entropy, *stats;
  int64_t count;

  explicit RowOutputs(const Outputs& to)
      : logprob(static_cast<A*>(to.logprob.mutable_data_ptr())),
        entropy(static_cast<A*>(to.entropy.mutable_data_ptr())),
        stats(static_cast<A*>(to.stats.mutable_data_ptr())),
        count(to.logprob.numel()) {}
  RL_INLINE void put(int64_t r, A row_logprob, const RowStats<A>& s) const {
    logprob[r] = row_logprob;
    entropy[r] = s.shifted_lse - s.mean;
    stats[r] = s.max;
    stats[count + r] = s.shifted_lse;
    stats[2 * count + r] = s.mean;
  }
};

template <typename T, bool kCap>
void forward_rows(const Batch& b, const RowOutputs<acc_t<T>>& to) {
  using A = acc_t<T>;
  const T* data = static_cast<const T*>(b.logits.const_data_ptr());
  torch::stable::parallel_for(0, to.count, grain(b.view.rows), [&](int64_t begin, int64_t end) {
    dispatch_isa([&](auto fma) RL_LAMBDA_INLINE {
      for (int64_t r = begin; r < end; ++r) {
        if (!b.view.counts(r)) {
          to.put(r, 0, {0, 0, 0});
          continue;
        }
        const RowMaths<A> f = b.view.maths<A>(r);
        const T* row = data + b.view.rows.offset(r);
        const RowStats<A> s = row_stats<kCap, fma()>(row, b.view.rows.width, f);
        to.put(r, row_logprob<kCap, fma()>(load(row[b.view.target(r)]), s, f), s);
      }
    });
  });
}

std::tuple<Tensor, Tensor, Tensor> token_logprob_fwd(
    Tensor logits, Tensor targets, std::optional<Tensor> row_temperature, double temperature,
    double softcap, std::optional<Tensor> mask, bool /*with_entropy*/, bool /*inplace_backward*/) {
  const Batch b = make_batch(logits, targets, row_temperature, temperature, softcap, mask);
  check_rows(b);
  const Outputs to(targets, acc_dtype(logits.scalar_type()));
  dispatch_float(logits.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    auto* run = softcap > 0 ? forward_rows<T, true> : forward_rows<T, false>;
    run(b, RowOutputs<acc_t<T>>(to));
  });
  return to.tuple();
}

// ---- forward in parts: the sums of a row's columns so far, and its results behind the last ones

// state [6, N]: the five numbers of RowSums, and the logit of the target.
template <typename A>
struct PartState {
  A* data;
  int64_t count;

  PartState(const Tensor& state, int64_t rows)
      : data(static_cast<A*>(state.mutable_data_ptr())), count(rows) {}
  RL_INLINE RowSums<A> sums(int64_t r) const {
    const auto at = [this, r](int64_t i) { return data[i * count + r]; };
    return {at(0), {at(1), at(2)}, {at(3), at(4)}};
  }
  RL_INLINE void put(int64_t r, const RowSums<A>& all) const {
    const A numbers[] = {all.max, all.sum.sum, all.sum.low, all.weighted.sum, all.weighted.low};
    for (int64_t i = 0; i < 5; ++i) data[i * count + r] = numbers[i];
  }
  RL_INLINE A& target_logit(int64_t r) const { return data[5 * count + r]; }
};

void check_state(const Tensor& state, int64_t rows, ScalarType dtype) {
  RL_CHECK(state.dim() == 2 && state.size(0) == 6 && state.size(1) == rows &&
               state.is_contiguous() && state.scalar_type() == dtype,
           "state must be contiguous [6, N] in the outputs' dtype");
}

template <typename T, bool kCap>
void part_rows(const Batch& b, int64_t first, const PartState<acc_t<T>>& state) {
  using A = acc_t<T>;
  const T* data = static_cast<const T*>(b.logits.const_data_ptr());
  const Rows& rows = b.view.rows;
  torch::stable::parallel_for(0, rows.count, grain(rows), [&](int64_t begin, int64_t end) {
    dispatch_isa([&](auto fma) RL_LAMBDA_INLINE {
      for (int64_t r = begin; r < end; ++r) {
        if (!b.view.counts(r)) continue;
        const RowMaths<A> f = b.view.maths<A>(r);
        const T* row = data + rows.offset(r);
        RowSums<A> all = first == 0 ? start_row<kCap>(row, rows.width, f) : state.sums(r);
        add_columns<kCap, fma()>(row, rows.width, f, all);
        state.put(r, all);
        const int64_t target = b.view.target(r);
        const bool here = target >= first && target - first < rows.width;
        if (here) state.target_logit(r) = load(row[target - first]);
      }
    });
  });
}

void token_logprob_part_(Tensor logits, Tensor targets, int64_t first,
                         std::optional<Tensor> row_temperature, double temperature, double softcap,
                         std::optional<Tensor> mask, Tensor state) {
  const Batch b = make_batch(logits, targets, row_temperature, temperature, softcap, mask);
  check_state(state, b.view.rows.count, acc_dtype(logits.scalar_type()));
  RL_CHECK(first >= 0 && first % kBlock == 0, "first must be a multiple of ", kBlock, "; got ",
           first);
  dispatch_float(logits.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    auto* run = softcap > 0 ? part_rows<T, true> : part_rows<T, false>;
    run(b, first, PartState<acc_t<T>>(state, b.view.rows.count));
  });
}

template <typename A, bool kCap>
void whole_rows(const Batch& b, const PartState<A>& state, const RowOutputs<A>& to) {
  dispatch_isa([&](auto fma) RL_LAMBDA_INLINE {
    for (int64_t r = 0; r < to.count; ++r) {
      if (!b.view.counts(r)) {
        to.put(r, 0, {0, 0, 0});
        continue;
      }
      const RowStats<A> s = finished(state.sums(r));
      to.put(r, row_logprob<kCap, fma()>(state.target_logit(r), s, b.view.maths<A>(r)), s);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> token_logprob_whole(Tensor state, int64_t vocab, Tensor targets,
                                                       std::optional<Tensor> row_temperature,
                                                       double temperature, double softcap,
                                                       std::optional<Tensor> mask) {
  Batch b{state, targets, std::nullopt, std::nullopt, {}};
  b.view.rows.count = targets.numel();
  b.view.rows.width = vocab;
  set_per_row(b, targets, row_temperature, temperature, softcap, mask);
  const ScalarType dtype = acc_dtype(state.scalar_type());
  check_state(state, targets.numel(), dtype);
  check_rows(b);
  const Outputs to(targets, dtype);
  const auto run_as = [&](auto zero) {
    using A = decltype(zero);
    auto* run = softcap > 0 ? whole_rows<A, true> : whole_rows<A, false>;
    run(b, PartState<A>(state, targets.numel()), RowOutputs<A>(to));
  };
  dtype == ScalarType::Double ? run_as(double{}) : run_as(float{});
  return to.tuple();
}

// ---- backward

template <typename T, typename G, bool kCap>
void backward_rows(const Batch& b, const Upstream<acc_t<T>>& upstream, const acc_t<T>* stats,
                   G* out, const Rows& out_rows) {
  using A = acc_t<T>;
  const T* data = static_cast<const T*>(b.logits.const_data_ptr());
  const int64_t count = b.view.rows.count, width = b.view.rows.width;
  torch::stable::parallel_for(0, count, grain(b.view.rows), [&](int64_t begin, int64_t end) {
    dispatch_isa([&](auto fma) RL_LAMBDA_INLINE {
      for (int64_t r = begin; r < end; ++r) {
        G* to = out + out_rows.offset(r);
        const A g = upstream.logprob ? upstream.logprob[r] : A(0);
        const A h = upstream.entropy ? upstream.entropy[r] : A(0);
        if (!b.view.counts(r) || (g == 0 && h == 0)) {
          std::memset(static_cast<void*>(to), 0, width * sizeof(G));
          continue;
        }
        const RowStats<A> s{stats[r], stats[count + r], stats[2 * count + r]};
        row_backward<kCap, fma()>(data + b.view.rows.offset(r), to, width, b.view.target(r), g, h,
                                  s, b.view.maths<A>(r));
      }
    });
  });
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
  dispatch_gradient(b.logits.scalar_type(), out.scalar_type(), [&](auto tag, auto out_tag) {
    using T = decltype(tag);
    using G = decltype(out_tag);
    using A = acc_t<T>;
    const Upstream<A> upstream{g ? static_cast<const A*>(g->const_data_ptr()) : nullptr,
                               h ? static_cast<const A*>(h->const_data_ptr()) : nullptr};
    auto* run = b.view.softcap > 0 ? backward_rows<T, G, true> : backward_rows<T, G, false>;
    run(b, upstream, static_cast<const A*>(stats.const_data_ptr()),
        static_cast<G*>(out.mutable_data_ptr()), out_rows);
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
                        std::optional<Tensor> mask, Tensor out) {
  const Rows rows = gradient_rows(logits, out, true);
  const Batch b = make_batch(logits, targets, row_temperature, temperature, softcap, mask);
  run_backward(b, grad_logprob, grad_entropy, stats, out, rows);
}

}  // namespace
}  // namespace rl

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CPU, m) {
  m.impl("token_logprob_fwd", TORCH_BOX(&rl::token_logprob_fwd));
  m.impl("token_logprob_part_", TORCH_BOX(&rl::token_logprob_part_));
  m.impl("token_logprob_whole", TORCH_BOX(&rl::token_logprob_whole));
  m.impl("token_logprob_bwd", TORCH_BOX(&rl::token_logprob_bwd));
  m.impl("token_logprob_bwd_", TORCH_BOX(&rl::token_logprob_bwd_));
}
