// Inputs of the ops on rows of logits: memory layout, per-row arguments, and their checks.
//
// Shapes: logits [..., V] with at most two row strides; N rows. targets, mask, row_temperature [N].
#pragma once

#include "softmax.h"
#include "tensor.h"

namespace rl {

// The leading dimensions of a [..., V] tensor as at most two strides, so that slices such as
// logits[:, :-1] of [B, T, V] need no copy. Row r starts at element
//   (r / inner) * outer_stride + (r % inner) * inner_stride.
struct RowLayout {
  int64_t count = 1;         // N
  int64_t inner = 1;         // rows per outer step
  int64_t inner_stride = 0;  // elements
  int64_t outer_stride = 0;  // elements
  int64_t width = 0;         // V

  RL_HD int64_t offset(int64_t row) const {
    return inner == count ? row * inner_stride
                          : (row / inner) * outer_stride + (row % inner) * inner_stride;
  }
};

// Fills `rows`; false if the tensor must be copied first (last stride other than 1, or three
// independent leading strides).
inline bool row_layout(const Tensor& t, RowLayout& rows) {
  const int64_t dim = t.dim();
  RL_CHECK(dim >= 1, "logits must have at least one dimension");
  rows = RowLayout{};
  rows.width = t.size(dim - 1);
  for (int64_t d = 0; d < dim - 1; ++d) rows.count *= t.size(d);
  if (rows.count == 0) return true;  // copying an empty tensor may keep its odd strides
  if (rows.width > 1 && t.stride(dim - 1) != 1) return false;
  int64_t sizes[2] = {1, 1};
  int64_t strides[2] = {0, 0};
  int groups = 0;  // runs of leading dimensions that share one stride, innermost first
  for (int64_t d = dim - 2; d >= 0; --d) {
    const int64_t size = t.size(d);
    if (size == 1) continue;
    if (groups > 0 && t.stride(d) == strides[groups - 1] * sizes[groups - 1]) {
      sizes[groups - 1] *= size;
    } else if (groups < 2) {
      sizes[groups] = size;
      strides[groups] = t.stride(d);
      ++groups;
    } else {
      return false;
    }
  }
  rows.inner = groups < 2 ? rows.count : sizes[0];
  rows.inner_stride = strides[0];
  rows.outer_stride = strides[1];
  return true;
}

// Per-row arguments as plain pointers and numbers: passed to CUDA kernels by value.
struct RowArgs {
  RowLayout rows;
  const void* targets = nullptr;          // [N], int64 or int32
  const bool* mask = nullptr;             // [N]; null: every row counts
  const void* row_temperature = nullptr;  // [N], fp64 or fp32; null: `temperature` for every row
  double temperature = 1;
  double softcap = 0;
  bool wide_targets = true;       // int64
  bool wide_temperature = false;  // fp64

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
  RL_HD LogitTransform<A> transform(int64_t row) const {
    const double exact = row_temperature ? row_temperature_of(row) : temperature;
    const A t = static_cast<A>(exact), scale = A(1) / t;
    const A error = std::fma(-scale, t, A(1)) - scale * static_cast<A>(exact - t);
    return {scale, static_cast<A>(softcap), scale * error};
  }
};

// RowArgs and the tensors that own its memory.
struct RowInputs {
  Tensor logits, targets;
  std::optional<Tensor> mask, row_temperature;
  RowArgs args;
};

// Checks the per-row tensors and stores them in `in`, whose args.rows is set.
inline void set_per_row(RowInputs& in, const Tensor& targets,
                        const std::optional<Tensor>& row_temperature, double temperature,
                        double softcap, const std::optional<Tensor>& mask) {
  RowArgs& v = in.args;
  v.temperature = temperature;
  v.softcap = softcap;
  in.targets = as_contiguous(targets);
  const ScalarType index = targets.scalar_type();
  RL_CHECK(index == ScalarType::Long || index == ScalarType::Int, "targets must be int32 or int64");
  RL_CHECK(targets.numel() == v.rows.count, "targets must have one element per row of logits");
  v.wide_targets = index == ScalarType::Long;
  v.targets = in.targets.const_data_ptr();
  if (mask) {
    RL_CHECK(mask->scalar_type() == ScalarType::Bool && mask->numel() == v.rows.count,
             "mask must be bool, with one element per row");
    in.mask = as_contiguous(*mask);
    v.mask = static_cast<const bool*>(in.mask->const_data_ptr());
  }
  if (row_temperature) {
    const ScalarType dtype = row_temperature->scalar_type();
    RL_CHECK((dtype == ScalarType::Float || dtype == ScalarType::Double) &&
                 row_temperature->numel() == v.rows.count,
             "row_temperature must be float32 or float64, with one element per row");
    in.row_temperature = as_contiguous(*row_temperature);
    v.wide_temperature = dtype == ScalarType::Double;
    v.row_temperature = in.row_temperature->const_data_ptr();
  }
}

inline RowInputs row_inputs(const Tensor& logits, const Tensor& targets,
                            const std::optional<Tensor>& row_temperature, double temperature,
                            double softcap, const std::optional<Tensor>& mask) {
  RowInputs in{logits, targets, std::nullopt, std::nullopt, {}};
  RL_CHECK(is_float_dtype(logits.scalar_type()),
           "logits must be float32, bfloat16, float16 or float64");
  if (!row_layout(in.logits, in.args.rows)) {
    in.logits = as_contiguous(logits);
    row_layout(in.logits, in.args.rows);
  }
  set_per_row(in, targets, row_temperature, temperature, softcap, mask);
  return in;
}

inline void check_stats(const RowInputs& in, const Tensor& row_stats) {
  RL_CHECK(row_stats.is_contiguous() && row_stats.numel() == 3 * in.args.rows.count &&
               row_stats.scalar_type() == acc_dtype(in.logits.scalar_type()),
           "row_stats must be contiguous [3, N] in the outputs' dtype");
}

// Upstream gradients [N]; null means 0.
template <typename A>
struct Upstream {
  const A* logprob;
  const A* entropy;
};

inline std::vector<int64_t> shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

// Layout of `out`, the output of dL/dlogits: the logits themselves or a tensor like them. With
// may_narrow, also a 16-bit tensor for fp32 logits, which must not overlap them.
inline RowLayout gradient_layout(const Tensor& logits, const Tensor& out, bool may_narrow = false) {
  RowLayout rows, from;
  const ScalarType dtype = out.scalar_type();
  const bool narrow = may_narrow && logits.scalar_type() == ScalarType::Float &&
                      (dtype == ScalarType::BFloat16 || dtype == ScalarType::Half);
  RL_CHECK(row_layout(out, rows) && shape_of(out) == shape_of(logits) &&
               (narrow || dtype == logits.scalar_type()),
           "out must be like logits, with unit last stride and at most two row strides",
           may_narrow ? "; or of 16 bits where they are float32" : "");
  if (narrow && rows.count > 0 && row_layout(logits, from)) {
    const auto end = [](const Tensor& t, const RowLayout& r) {
      return static_cast<const char*>(t.const_data_ptr()) +
             (r.offset(r.count - 1) + r.width) * t.element_size();
    };
    RL_CHECK(end(logits, from) <= out.const_data_ptr() || end(out, rows) <= logits.const_data_ptr(),
             "out of 16 bits must not overlap the logits");
  }
  return rows;
}

}  // namespace rl
