// TORCH_BOX that runs an op in two orders of blocks and threads and demands the same bits.
//
// Included before each .cu by build.py. Every call of every test is thus a test of order.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "include/cuda_bf16.h"
#include "include/cuda_fp16.h"
#include "include/cuda_runtime.h"

namespace shim {

using torch::stable::Tensor;

using Bits = std::vector<char>;

template <typename T>
concept Plain = std::is_arithmetic_v<T> || std::is_same_v<T, std::string>;

// f(pointer, bytes) for the runs of memory that make up a tensor, in the order of its elements.
// Plain C++: a profile shows no copy.
template <typename F>
void each_run(const Tensor& t, const F& f) {
  const int64_t dim = t.dim(), size = t.element_size(), count = t.numel();
  char* data = static_cast<char*>(t.data_ptr());
  if (count == 0) return;
  if (t.is_contiguous()) return f(data, count * size);
  std::vector<int64_t> at(dim, 0);
  for (int64_t n = count; n > 0; --n) {
    f(data, size);
    for (int64_t d = dim - 1; d >= 0; --d) {
      data += t.stride(d) * size;
      if (++at[d] < t.size(d)) break;
      data -= at[d] * t.stride(d) * size;
      at[d] = 0;
    }
  }
}

inline void keep(std::vector<Bits>& all, const Tensor& t) {
  Bits& bits = all.emplace_back(t.numel() * t.element_size());
  char* to = bits.data();
  each_run(t, [&](const char* at, size_t bytes) {
    std::memcpy(to, at, bytes);
    to += bytes;
  });
}
template <Plain T>
void keep(std::vector<Bits>&, const T&) {}
template <typename T>
void keep(std::vector<Bits>& all, const std::vector<T>& each);
template <typename T>
void keep(std::vector<Bits>& all, const std::optional<T>& x) {
  if (x) keep(all, *x);
}
template <typename... T>
void keep(std::vector<Bits>& all, const std::tuple<T...>& ts) {
  std::apply([&](const auto&... t) { (keep(all, t), ...); }, ts);
}
template <typename T>
void keep(std::vector<Bits>& all, const std::vector<T>& each) {
  for (const T& x : each) keep(all, x);
}

inline void give_back(const Bits*& bits, const Tensor& t) {
  const char* from = bits++->data();
  each_run(t, [&](char* at, size_t bytes) {
    std::memcpy(at, from, bytes);
    from += bytes;
  });
}
template <Plain T>
void give_back(const Bits*&, const T&) {}
template <typename T>
void give_back(const Bits*& bits, const std::vector<T>& each);
template <typename T>
void give_back(const Bits*& bits, const std::optional<T>& x) {
  if (x) give_back(bits, *x);
}
template <typename T>
void give_back(const Bits*& bits, const std::vector<T>& each) {
  for (const T& x : each) give_back(bits, x);
}

inline void same(const std::vector<Bits>& a, const std::vector<Bits>& b, const char* what) {
  for (size_t i = 0; i < a.size(); ++i)
    if (a[i] != b[i])
      throw std::runtime_error("host shim: " + std::string(what) + " " + std::to_string(i) +
                               " depends on the order of blocks or threads");
}

template <auto F>
struct Repeated;

template <typename R, typename... Args, R (*F)(Args...)>
struct Repeated<F> {
  static std::vector<Bits> bits(const Args&... args) {
    std::vector<Bits> all;
    (keep(all, args), ...);
    return all;
  }

  // What a call leaves: its arguments' bits and its results' bits.
  static auto once(Order with, const Args&... args) {
    order = with;
    if constexpr (std::is_void_v<R>) {
      F(args...);
      return std::make_tuple(bits(args...), std::vector<Bits>{}, 0);
    } else {
      R result = F(args...);
      std::vector<Bits> results;
      keep(results, result);
      return std::make_tuple(bits(args...), results, result);
    }
  }

  static R call(Args... args) {
    const std::vector<Bits> before = bits(args...);
    const auto first = once(Order::shuffled, args...);
    if (std::get<0>(first) != before) {
      const Bits* from = before.data();
      (give_back(from, args), ...);
    }
    const auto second = once(Order::ascending, args...);
    same(std::get<0>(first), std::get<0>(second), "argument");
    same(std::get<1>(first), std::get<1>(second), "result");
    if constexpr (!std::is_void_v<R>) return std::get<2>(second);
  }
};

}  // namespace shim

#undef TORCH_BOX
#define TORCH_BOX(func)                                                                        \
  torch::stable::detail::boxer<std::remove_pointer_t<decltype(&shim::Repeated<(func)>::call)>, \
                               &shim::Repeated<(func)>::call>::boxed_fn
