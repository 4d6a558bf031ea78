// Device helpers that several kernels share: conversion to the accumulator type, 16-byte vectors.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../rl_math.h"

// The architecture whose PTX may be written here; 0 where a host compiler reads the file.
#if defined(__NVCC__) && defined(__CUDA_ARCH__)
#define RL_PTX __CUDA_ARCH__
#else
#define RL_PTX 0
#endif

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

// Elements before the first 16-byte boundary.
template <typename T>
__device__ __forceinline__ int64_t misaligned_head(const T* row, int64_t width) {
  const auto past = reinterpret_cast<uintptr_t>(row) % 16;
  const int64_t head = past == 0 ? 0 : static_cast<int64_t>((16 - past) / sizeof(T));
  return head < width ? head : width;
}

}  // namespace rl
