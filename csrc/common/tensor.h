// Argument checks and tensor allocation on the LibTorch Stable ABI, for csrc/cpu and csrc/cuda.
//
// fastrlhf/ops reports user errors (TypeError, ValueError) by argument name. The checks here guard
// direct calls of the raw ops.
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

// For user errors that only the kernel can detect. The stable ABI has one type of exception: a
// prefix marks the message, and fastrlhf/ops/_register.py translates it into a ValueError of the
// public op.
[[noreturn]] inline void user_error(const std::string& message) {
  throw std::runtime_error("fastrlhf ValueError: " + message);
}

inline bool is_float_dtype(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::Half ||
         t == ScalarType::BFloat16;
}

// Accumulator dtype, also of per-token outputs: fp64 for fp64 inputs, else fp32.
inline ScalarType acc_dtype(ScalarType t) {
  return t == ScalarType::Double ? t : ScalarType::Float;
}

// Calls body(A{}) with the accumulator type of `like`.
template <typename F>
auto with_acc(const Tensor& like, const F& body) {
  return like.scalar_type() == ScalarType::Double ? body(double{}) : body(float{});
}

inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// Set by tests: fills new CPU tensors with NaN, so that a read of unwritten memory shows.
inline bool fresh_memory_is_nan = false;

// torch::stable::empty goes through the dispatcher, which costs as much as a small op.
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

// An output with the shape of `like` and the accumulator's dtype.
inline Tensor new_tokens(const Tensor& like) {
  std::vector<int64_t> sizes(like.dim());
  for (int64_t d = 0; d < like.dim(); ++d) sizes[d] = like.size(d);
  return empty_like_device(like, sizes, acc_dtype(like.scalar_type()));
}

// `count` outputs with the shape of `like`, stacked: [count, ...]. malloc recycles one large block;
// it returns the pages of several smaller ones to the system after every call.
inline Tensor new_stacked_tokens(const Tensor& like, int64_t count) {
  std::vector<int64_t> sizes{count};
  for (int64_t d = 0; d < like.dim(); ++d) sizes.push_back(like.size(d));
  return empty_like_device(like, sizes, acc_dtype(like.scalar_type()));
}

}  // namespace rl
