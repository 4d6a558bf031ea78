// Argument checks and small tensor helpers on the LibTorch Stable ABI, for csrc/cpu and csrc/cuda.
//
// Users meet their mistakes in fastrlhf/ops (TypeError, ValueError with names); these checks guard
// the raw ops.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace rl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define RL_CHECK(cond, ...) STD_TORCH_CHECK(cond, __VA_ARGS__)

// A message without function name and line: for conditions that a user can cause and read about.
[[noreturn]] inline void user_error(const std::string& message) {
  throw std::runtime_error(message);
}

inline bool is_float_dtype(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::Half ||
         t == ScalarType::BFloat16;
}

// The dtype of sums and of per-token outputs: fp64 for fp64 inputs, else fp32.
inline ScalarType acc_dtype(ScalarType t) {
  return t == ScalarType::Double ? t : ScalarType::Float;
}

inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// Tests set it: fresh CPU memory holds NaN, so that reading what nobody wrote shows.
inline bool fresh_memory_is_nan = false;

// Not torch::stable::empty, whose way through the dispatcher costs as much as a small op.
inline Tensor empty_on(const torch::stable::Device& device, const std::vector<int64_t>& sizes,
                       ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0; step *= std::max<int64_t>(sizes[d], 1)) strides[d] = step;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), static_cast<int32_t>(dtype),
      static_cast<int32_t>(device.type()), device.index(), &handle));
  Tensor made(handle);
  if (fresh_memory_is_nan && made.is_cpu() && made.numel() > 0)
    std::memset(made.mutable_data_ptr(), 0xff, made.numel() * made.element_size());
  return made;
}

inline Tensor empty_like_device(const Tensor& like, const std::vector<int64_t>& sizes,
                                ScalarType dtype) {
  return empty_on(like.device(), sizes, dtype);
}

// An output of one float per token of `like`.
inline Tensor new_tokens(const Tensor& like) {
  std::vector<int64_t> sizes(like.dim());
  for (int64_t d = 0; d < like.dim(); ++d) sizes[d] = like.size(d);
  return empty_like_device(like, sizes, acc_dtype(like.scalar_type()));
}

// Several outputs of one shape as one tensor [count, ...]: one allocation, which the C library
// recycles where it hands the pages of several smaller ones back to the system after each call.
inline Tensor new_stacked_tokens(const Tensor& like, int64_t count) {
  std::vector<int64_t> sizes{count};
  for (int64_t d = 0; d < like.dim(); ++d) sizes.push_back(like.size(d));
  return empty_like_device(like, sizes, acc_dtype(like.scalar_type()));
}

}  // namespace rl
