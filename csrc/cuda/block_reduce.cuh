// Sums over a warp and over a block, in a fixed order.
#pragma once

#include "../common/moments.h"
#include "device.cuh"

namespace rl {

// Sum over the warp, in every lane.
template <typename S>
__device__ __forceinline__ S warp_total(S x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

// The same for pivoted sums, with the pivot of the first lane that has a value: a chain of five
// additions, no division.
__device__ __forceinline__ PivotedSums warp_total(const PivotedSums& x) {
  const unsigned holders = __ballot_sync(~0u, x.count > 0.0);
  const double pivot = __shfl_sync(~0u, x.pivot, holders ? __ffs(holders) - 1 : 0);
  PivotedSums total = x.count > 0.0 ? x.with_pivot(pivot) : PivotedSums{pivot};
#pragma unroll 1  // runs once: code size matters more than loop overhead
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    total.count += __shfl_xor_sync(~0u, total.count, lanes);
    total.sum += __shfl_xor_sync(~0u, total.sum, lanes);
    total.squares += __shfl_xor_sync(~0u, total.squares, lanes);
  }
  return total;
}

// Sum over the block, in every thread of the first warp. warp_total(X) gives T; T{} is the
// identity.
template <typename X>
__device__ __forceinline__ auto block_total(const X& mine) {
  using T = decltype(warp_total(mine));
  __shared__ alignas(16) unsigned char of_warps[32 * sizeof(T)];
  T* const of_warp = reinterpret_cast<T*>(of_warps);
  const T total = warp_total(mine);
  __syncthreads();  // an earlier call has read of_warp
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x >= 32) return total;
  return warp_total(threadIdx.x < blockDim.x / 32 ? of_warp[threadIdx.x] : T{});
}

// Broadcasts x of thread 0 to the block.
template <typename T>
__device__ __forceinline__ T from_first_thread(const T& x) {
  __shared__ alignas(16) unsigned char first[sizeof(T)];
  if (threadIdx.x == 0) *reinterpret_cast<T*>(first) = x;
  __syncthreads();
  return *reinterpret_cast<const T*>(first);
}

// Sum over the block, in every thread.
template <typename S>
__device__ __forceinline__ S block_sum(S x) {
  return from_first_thread(block_total(x));
}

}  // namespace rl
