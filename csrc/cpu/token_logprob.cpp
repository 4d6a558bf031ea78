// token_logprob on CPU: log softmax(z)[target] and the entropy in one read of the logits; backward
// one read and one write.
//
// Shapes: logits [..., V] with any row strides, N rows; targets, mask, row_temperature [N];
// logprob, entropy [N]; row_stats [3, N] = (row_max, shifted_lse, shifted_mean), kept for the
// backward as three numbers so that a large row_max costs no precision.
//
//   logprob = (z_t - row_max) - shifted_lse,   entropy = shifted_lse - shifted_mean
//
// The entropy subtracts numbers of opposite sign (to within kMaxSlack), so it does not cancel. A
// row may also be processed in parts, with its running sums in a state tensor (token_logprob_part_,
// token_logprob_whole).

#include "huge_pages.h"
#include "softmax_row.h"

namespace rl {
namespace {

// Outputs of a forward.
struct Outputs {
  Tensor logprob, entropy, row_stats;

  Outputs(const Tensor& targets, ScalarType dtype)
      : logprob(empty_like_device(targets, shape_of(targets), dtype)),
        entropy(empty_like_device(targets, shape_of(targets), dtype)),
        row_stats(empty_like_device(targets, {3, targets.numel()}, dtype)) {}
  std::tuple<Tensor, Tensor, Tensor> tuple() const { return {logprob, entropy, row_stats}; }
};

// Their pointers.
template <typename A>
struct RowOutputs {
  A *logprob, *entropy, *row_stats;
  int64_t count;

  explicit RowOutputs(const Outputs& to)
      : logprob(static_cast<A*>(to.logprob.mutable_data_ptr())),
        entropy(static_cast<A*>(to.entropy.mutable_data_ptr())),
        row_stats(static_cast<A*>(to.row_stats.mutable_data_ptr())),
        count(to.logprob.numel()) {}
  RL_INLINE void put(int64_t r, A row_logprob, const RowStats<A>& s) const {
    logprob[r] = row_logprob;
    entropy[r] = s.shifted_lse - s.shifted_mean;
    row_stats[r] = s.row_max;
    row_stats[count + r] = s.shifted_lse;
    row_stats[2 * count + r] = s.shifted_mean;
  }
};

template <typename T, bool kCap>
void forward_rows(const RowInputs& in, const RowOutputs<acc_t<T>>& to) {
  using A = acc_t<T>;
  const T* data = static_cast<const T*>(in.logits.const_data_ptr());
  torch::stable::parallel_for(0, to.count, grain(in.args.rows), [&](int64_t begin, int64_t end) {
    dispatch_isa([&](auto fma) RL_LAMBDA_INLINE {
      for (int64_t r = begin; r < end; ++r) {
        if (!in.args.counts(r)) {
          to.put(r, 0, {0, 0, 0});
          continue;
        }
        const LogitTransform<A> f = in.args.transform<A>(r);
        const T* row = data + in.args.rows.offset(r);
        const RowStats<A> s = reduce_row<kCap, fma()>(row, in.args.rows.width, f);
        to.put(r, row_logprob<kCap, fma()>(load(row[in.args.target(r)]), s, f), s);
      }
    });
  });
}

std::tuple<Tensor, Tensor, Tensor> token_logprob_fwd(
    Tensor logits, Tensor targets, std::optional<Tensor> row_temperature, double temperature,
    double softcap, std::optional<Tensor> mask, bool /*with_entropy*/, bool /*inplace_backward*/) {
  const RowInputs in = row_inputs(logits, targets, row_temperature, temperature, softcap, mask);
  check_rows(in);
  const Outputs to(targets, acc_dtype(logits.scalar_type()));
  dispatch_float(logits.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    auto* run = softcap > 0 ? forward_rows<T, true> : forward_rows<T, false>;
    run(in, RowOutputs<acc_t<T>>(to));
  });
  return to.tuple();
}

// ---- forward in parts -------------------------------------------------------------------------

// state [6, N]: the five numbers of RowSums, and the target's logit.
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
void part_rows(const RowInputs& in, int64_t first, const PartState<acc_t<T>>& state) {
  using A = acc_t<T>;
  const T* data = static_cast<const T*>(in.logits.const_data_ptr());
  const RowLayout& rows = in.args.rows;
  torch::stable::parallel_for(0, rows.count, grain(rows), [&](int64_t begin, int64_t end) {
    dispatch_isa([&](auto fma) RL_LAMBDA_INLINE {
      for (int64_t r = begin; r < end; ++r) {
        if (!in.args.counts(r)) continue;
        const LogitTransform<A> f = in.args.transform<A>(r);
        const T* row = data + rows.offset(r);
        RowSums<A> all = first == 0 ? start_row<kCap>(row, rows.width, f) : state.sums(r);
        add_columns<kCap, fma()>(row, rows.width, f, all);
        state.put(r, all);
        const int64_t target = in.args.target(r);
        const bool here = target >= first && target - first < rows.width;
        if (here) state.target_logit(r) = load(row[target - first]);
      }
    });
  });
}

void token_logprob_part_(Tensor logits, Tensor targets, int64_t first,
                         std::optional<Tensor> row_temperature, double temperature, double softcap,
                         std::optional<Tensor> mask, Tensor state) {
  const RowInputs in = row_inputs(logits, targets, row_temperature, temperature, softcap, mask);
  check_state(state, in.args.rows.count, acc_dtype(logits.scalar_type()));
  RL_CHECK(first >= 0 && first % kBlock == 0, "first must be a multiple of ", kBlock, "; got ",
           first);
  dispatch_float(logits.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    auto* run = softcap > 0 ? part_rows<T, true> : part_rows<T, false>;
    run(in, first, PartState<acc_t<T>>(state, in.args.rows.count));
  });
}

template <typename A, bool kCap>
void whole_rows(const RowInputs& in, const PartState<A>& state, const RowOutputs<A>& to) {
  dispatch_isa([&](auto fma) RL_LAMBDA_INLINE {
    for (int64_t r = 0; r < to.count; ++r) {
      if (!in.args.counts(r)) {
        to.put(r, 0, {0, 0, 0});
        continue;
      }
      const RowStats<A> s = finished(state.sums(r));
      to.put(r, row_logprob<kCap, fma()>(state.target_logit(r), s, in.args.transform<A>(r)), s);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> token_logprob_whole(Tensor state, int64_t vocab, Tensor targets,
                                                       std::optional<Tensor> row_temperature,
                                                       double temperature, double softcap,
                                                       std::optional<Tensor> mask) {
  RowInputs in{state, targets, std::nullopt, std::nullopt, {}};
  in.args.rows.count = targets.numel();
  in.args.rows.width = vocab;
  set_per_row(in, targets, row_temperature, temperature, softcap, mask);
  const ScalarType dtype = acc_dtype(state.scalar_type());
  check_state(state, targets.numel(), dtype);
  check_rows(in);
  const Outputs to(targets, dtype);
  const auto run_as = [&](auto zero) {
    using A = decltype(zero);
    auto* run = softcap > 0 ? whole_rows<A, true> : whole_rows<A, false>;
    run(in, PartState<A>(state, targets.numel()), RowOutputs<A>(to));
  };
  dtype == ScalarType::Double ? run_as(double{}) : run_as(float{});
  return to.tuple();
}

// ---- backward ---------------------------------------------------------------------------------

template <typename T, typename G, bool kCap>
void backward_rows(const RowInputs& in, const Upstream<acc_t<T>>& upstream,
                   const acc_t<T>* row_stats, G* out, const RowLayout& out_rows) {
  using A = acc_t<T>;
  const T* data = static_cast<const T*>(in.logits.const_data_ptr());
  const int64_t count = in.args.rows.count, width = in.args.rows.width;
  torch::stable::parallel_for(0, count, grain(in.args.rows), [&](int64_t begin, int64_t end) {
    dispatch_isa([&](auto fma) RL_LAMBDA_INLINE {
      for (int64_t r = begin; r < end; ++r) {
        G* to = out + out_rows.offset(r);
        const A g = upstream.logprob ? upstream.logprob[r] : A(0);
        const A h = upstream.entropy ? upstream.entropy[r] : A(0);
        if (!in.args.counts(r) || (g == 0 && h == 0)) {
          std::memset(static_cast<void*>(to), 0, width * sizeof(G));
          continue;
        }
        const RowStats<A> s{row_stats[r], row_stats[count + r], row_stats[2 * count + r]};
        row_backward<kCap, fma()>(data + in.args.rows.offset(r), to, width, in.args.target(r), g, h,
                                  s, in.args.transform<A>(r));
      }
    });
  });
}

void run_backward(const RowInputs& in, const std::optional<Tensor>& grad_logprob,
                  const std::optional<Tensor>& grad_entropy, const Tensor& row_stats,
                  const Tensor& out, const RowLayout& out_rows) {
  const ScalarType dtype = acc_dtype(in.logits.scalar_type());
  std::optional<Tensor> g, h;
  if (grad_logprob) g = as_contiguous(*grad_logprob);
  if (grad_entropy) h = as_contiguous(*grad_entropy);
  for (const auto& grad : {g, h}) {
    RL_CHECK(!grad || (grad->scalar_type() == dtype && grad->numel() == in.args.rows.count),
             "upstream gradients must have the outputs' dtype and shape");
  }
  check_stats(in, row_stats);
  dispatch_gradient(in.logits.scalar_type(), out.scalar_type(), [&](auto tag, auto out_tag) {
    using T = decltype(tag);
    using G = decltype(out_tag);
    using A = acc_t<T>;
    const Upstream<A> upstream{g ? static_cast<const A*>(g->const_data_ptr()) : nullptr,
                               h ? static_cast<const A*>(h->const_data_ptr()) : nullptr};
    auto* run = in.args.softcap > 0 ? backward_rows<T, G, true> : backward_rows<T, G, false>;
    run(in, upstream, static_cast<const A*>(row_stats.const_data_ptr()),
        static_cast<G*>(out.mutable_data_ptr()), out_rows);
  });
}

Tensor token_logprob_bwd(std::optional<Tensor> grad_logprob, std::optional<Tensor> grad_entropy,
                         Tensor logits, Tensor targets, Tensor row_stats,
                         std::optional<Tensor> row_temperature, double temperature, double softcap,
                         std::optional<Tensor> mask) {
  const RowInputs in = row_inputs(logits, targets, row_temperature, temperature, softcap, mask);
  Tensor out = empty_like_device(logits, shape_of(logits), logits.scalar_type());
  advise_huge_pages(out);
  RowLayout out_rows;
  row_layout(out, out_rows);
  run_backward(in, grad_logprob, grad_entropy, row_stats, out, out_rows);
  return out;
}

void token_logprob_bwd_(std::optional<Tensor> grad_logprob, std::optional<Tensor> grad_entropy,
                        Tensor logits, Tensor targets, Tensor row_stats,
                        std::optional<Tensor> row_temperature, double temperature, double softcap,
                        std::optional<Tensor> mask, Tensor out) {
  const RowLayout rows = gradient_layout(logits, out, true);
  const RowInputs in = row_inputs(logits, targets, row_temperature, temperature, softcap, mask);
  run_backward(in, grad_logprob, grad_entropy, row_stats, out, rows);
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
