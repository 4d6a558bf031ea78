// Sums over a block, and how the blocks of one launch learn of each other.
//
// Blocks meet through flags in scratch memory, not through a counter. A counter must be 0 when the
// launch begins, which costs a memset, or lives between launches, where two streams or the replays
// of two CUDA graphs could meet in it. A flag is up when it holds the tag of its launch: 64 bits
// that no other launch of the process has, so that scratch needs no initial value. A replay has the
// tag of its capture: whoever finishes a launch takes the flags down.
#pragma once

#include <atomic>

#include "../common/moments.h"
#include "device.cuh"

namespace rl {

struct Flags {
  uint64_t* flag;
  uint64_t tag;

  // What this thread wrote before is seen by those who see the flag up; and of several blocks that
  // each raise a flag and then look, one at least sees all of them up.
  __device__ __forceinline__ void raise(int i) const {
    __threadfence();
    *static_cast<volatile uint64_t*>(flag + i) = tag;
    __threadfence();
  }
  __device__ __forceinline__ bool is_up(int i) const {
    return *static_cast<const volatile uint64_t*>(flag + i) == tag;
  }
  // For a whole block, after a barrier that follows its own raise().
  __device__ __forceinline__ bool all_up(int first, int count) const {
    __shared__ int missing;
    if (threadIdx.x == 0) missing = 0;
    __syncthreads();
    __threadfence();
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      if (!is_up(first + i)) missing = 1;
    }
    __threadfence();
    __syncthreads();
    return missing == 0;
  }
  // By the block that saw all flags up. A slower block then takes itself for not the last, rightly.
  __device__ __forceinline__ void take_down(int count) const {
    for (int i = threadIdx.x; i < count; i += blockDim.x) flag[i] = 0;
  }
};

// Multiples of an odd number (the golden ratio of 2^64): they differ for 2^64 launches, and look
// like no data.
inline uint64_t next_tag() {
  static std::atomic<uint64_t> launches{0};
  return (launches.fetch_add(1, std::memory_order_relaxed) + 1) * 0x9e3779b97f4a7c15u;
}

// ---- sums over a warp and over a block; their order is fixed -----------------------------------

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
