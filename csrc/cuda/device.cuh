// Device helpers that several kernels share: conversion to the accumulator type, 16-byte vectors.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../rl_math.h"

namespace rl {

__device__ __forceinline__ float load(float x) { return x; }
__device__ __forceinline__ double load(double x) { return x; }
__device__ __forceinline__ float load(__half x) { return __half2float(x); }
__device__ __forceinline__ float load(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void store(float& to, float x) { to = x; }
__device__ __forceinline__ void store(double& to, double x) { to = x; }
__device__ __forceinline__ void store(__half& to, float x) { to = __float2half_rn(x); }
__device__ __forceinline__ void store(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

// 16 bytes of T, moved by one instruction.
template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};

// A read that will not come again: it passes the caches by.
template <typename T>
__device__ __forceinline__ Vector<T> read_vector(const T* from) {
  Vector<T> v;
  *reinterpret_cast<int4*>(&v) = __ldcs(reinterpret_cast<const int4*>(from));
  return v;
}

template <typename T>
__device__ __forceinline__ void write_vector(T* to, const Vector<T>& v) {
  *reinterpret_cast<int4*>(to) = *reinterpret_cast<const int4*>(&v);
}

}  // namespace rl
