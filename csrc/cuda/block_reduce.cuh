// Sums over a warp and over a block, in a fixed order.
#pragma once

#include "../common/moments.h"
#include "device.cuh"

namespace rl {

// In every lane: x summed over the warp.
template <typename S>
__device__ __forceinline__ S warp_total(S x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

// The same about the pivot of the first lane that has a value: five additions in a row, and no
// division.
__device__ __forceinline__ PivotedSums warp_total(const PivotedSums& x) {
  const unsigned holders = __ballot_sync(~0u, x.count > 0.0);
  const double pivot = __shfl_sync(~0u, x.pivot, holders ? __ffs(holders) - 1 : 0);
  PivotedSums total = x.count > 0.0 ? x.moved(pivot) : PivotedSums{pivot};
#pragma unroll 1  // code that runs once is read from memory as often as data is
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    total.count += __shfl_xor_sync(~0u, total.count, lanes);
    total.sum += __shfl_xor_sync(~0u, total.sum, lanes);
    total.squares += __shfl_xor_sync(~0u, total.squares, lanes);
  }
  return total;
}

// In every thread of the first warp: the total over the block of what warp_total() makes a T of,
// and again of T; T{} is the total of nothing.
template <typename X>
__device__ __forceinline__ auto block_total(const X& mine) {
  using T = decltype(warp_total(mine));
  __shared__ alignas(16) unsigned char of_warps[32 * sizeof(T)];
  T* const of_warp = reinterpret_cast<T*>(of_warps);
  const T total = warp_total(mine);
  __syncthreads();  // the total before this one has been read
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x >= 32) return total;
  return warp_total(threadIdx.x < blockDim.x / 32 ? of_warp[threadIdx.x] : T{});
}

// In every thread: what thread 0 has.
template <typename T>
__device__ __forceinline__ T from_first_thread(const T& x) {
  __shared__ alignas(16) unsigned char first[sizeof(T)];
  if (threadIdx.x == 0) *reinterpret_cast<T*>(first) = x;
  __syncthreads();
  return *reinterpret_cast<const T*>(first);
}

// In every thread: x summed over the block.
template <typename S>
__device__ __forceinline__ S block_sum(S x) {
  return from_first_thread(block_total(x));
}

}  // namespace rl
