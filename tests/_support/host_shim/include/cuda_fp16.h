// __half for a host compiler, on PyTorch's conversions.
#pragma once

#include <torch/headeronly/util/Half.h>

#include "cuda_runtime.h"

struct __half {
  torch::headeronly::Half value;
};
struct alignas(4) __half2 {
  __half x, y;
};
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half_rn(float x) { return {torch::headeronly::Half(x)}; }
inline __half __float2half(float x) { return __float2half_rn(x); }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
// Of a NaN and a number: the number.
inline __half2 __hmax2(__half2 a, __half2 b) {
  const auto larger = [](__half x, __half y) {
    return __float2half_rn(std::fmax(__half2float(x), __half2float(y)));
  };
  return {larger(a.x, b.x), larger(a.y, b.y)};
}
