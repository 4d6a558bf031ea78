// Loads and stores with conversion to and from the accumulator type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../common/math.h"

// The architecture for inline PTX; 0 when a host compiler builds the file.
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

// Elements per 16-byte vector, the widest load and store.
template <typename T>
constexpr int kPerVector = 16 / sizeof(T);

}  // namespace rl
