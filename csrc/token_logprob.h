// token_logprob: what the CPU and CUDA implementations share. Host checks, and the rows as kernels
// see them.
//
// Shapes: logits [..., V] with at most two row strides, N rows; targets, mask, row_temperature: N.
#pragma once

#include "checks.h"
#include "softmax.h"

namespace rl {

// Plain pointers and numbers: passed to CUDA kernels by value.
struct RowsView {
  Rows rows;
  const void* targets = nullptr;
  const bool* mask = nullptr;             // nullptr: every row counts
  const void* row_temperature = nullptr;  // nullptr: `temperature` for every row
  double temperature = 1;
  double softcap = 0;
  bool wide_targets = true;       // int64, else int32
  bool wide_temperature = false;  // fp64, else fp32

  RL_HD int64_t target(int64_t row) const {
    return wide_targets ? static_cast<const int64_t*>(targets)[row]
                        : static_cast<const int32_t*>(targets)[row];
  }
  RL_HD double row_temperature_of(int64_t row) const {
    return wide_temperature ? static_cast<const double*>(row_temperature)[row]
                            : static_cast<const float*>(row_temperature)[row];
  }
  RL_HD bool counts(int64_t row) const { return mask == nullptr || mask[row]; }
  template <typename A>
  RL_HD RowMaths<A> maths(int64_t row) const {
    const double exact = row_temperature ? row_temperature_of(row) : temperature;
    const A t = static_cast<A>(exact), scale = A(1) / t;
    const A missed = std::fma(-scale, t, A(1)) - scale * static_cast<A>(exact - t);
    return {scale, static_cast<A>(softcap), scale * missed};
  }
};

// The view, and the tensors that keep its pointers alive.
struct Batch {
  Tensor logits, targets;
  std::optional<Tensor> mask, row_temperature;
  RowsView view;
};

inline Batch make_batch(const Tensor& logits, const Tensor& targets,
                        const std::optional<Tensor>& row_temperature, double temperature,
                        double softcap, const std::optional<Tensor>& mask) {
  Batch b{logits, as_contiguous(targets), std::nullopt, std::nullopt, {}};
  RowsView& v = b.view;
  v.temperature = temperature;
  v.softcap = softcap;
  RL_CHECK(is_float_dtype(logits.scalar_type()),
           "logits must be float32, bfloat16, float16 or float64");
  if (!rows_of(b.logits, v.rows)) {
    b.logits = as_contiguous(logits);
    rows_of(b.logits, v.rows);
  }
  const ScalarType index = targets.scalar_type();
  RL_CHECK(index == ScalarType::Long || index == ScalarType::Int, "targets must be int32 or int64");
  RL_CHECK(targets.numel() == v.rows.count, "targets must have one element per row of logits");
  v.wide_targets = index == ScalarType::Long;
  v.targets = b.targets.const_data_ptr();
  if (mask) {
    RL_CHECK(mask->scalar_type() == ScalarType::Bool && mask->numel() == v.rows.count,
             "mask must be bool, one a row");
    b.mask = as_contiguous(*mask);
    v.mask = static_cast<const bool*>(b.mask->const_data_ptr());
  }
  if (row_temperature) {
    const ScalarType dtype = row_temperature->scalar_type();
    RL_CHECK((dtype == ScalarType::Float || dtype == ScalarType::Double) &&
                 row_temperature->numel() == v.rows.count,
             "row_temperature must be float32 or float64, one a row");
    b.row_temperature = as_contiguous(*row_temperature);
    v.wide_temperature = dtype == ScalarType::Double;
    v.row_temperature = b.row_temperature->const_data_ptr();
  }
  return b;
}

inline void check_stats(const Batch& b, const Tensor& stats) {
  RL_CHECK(stats.is_contiguous() && stats.numel() == 3 * b.view.rows.count &&
               stats.scalar_type() == acc_dtype(b.logits.scalar_type()),
           "stats must be contiguous [3, N] in the outputs' dtype");
}

// Upstream gradients of the N rows; a missing one is 0.
template <typename A>
struct Upstream {
  const A* logprob;
  const A* entropy;
};

inline std::vector<int64_t> shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

}  // namespace rl
