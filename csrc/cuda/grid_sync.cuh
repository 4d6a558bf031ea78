// Sums over a block, and how the blocks of one launch learn of each other.
//
// Blocks meet through flags in scratch memory, not through a counter. A counter must be 0 when the
// launch begins, which costs a memset, or lives between launches, where two streams or the replays
// of two CUDA graphs could meet in it. A flag is up when it holds the tag of its launch: 64 bits
// that no other launch of the process has, so that scratch needs no initial value. A replay has the
// tag of its capture: whoever finishes a launch takes the flags down.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

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

}  // namespace rl
