// Detection of the last block of a launch, without a counter.
//
// A counter must be 0 at launch. That costs a memset, or the counter persists between launches, and
// two streams or two replayed CUDA graphs can share it by accident. Each block raises a flag in
// uninitialised scratch memory instead: a flag is up if it holds the tag of the launch, 64 bits
// that no other launch of the process uses. A graph replay reuses the tag of its capture, so the
// last block clears the flags.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

namespace rl {

struct Flags {
  uint64_t* flag;
  uint64_t tag;

  // Release: prior writes are visible to any thread that observes the flag. The second fence orders
  // the flag before later reads, so of several blocks that raise a flag and then read all flags, at
  // least one observes all of them.
  __device__ __forceinline__ void raise(int i) const {
    __threadfence();
    *static_cast<volatile uint64_t*>(flag + i) = tag;
    __threadfence();
  }
  __device__ __forceinline__ bool is_up(int i) const {
    return *static_cast<const volatile uint64_t*>(flag + i) == tag;
  }
  // Called by all threads of a block, after a barrier that follows its raise().
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
  // Called only by the last block. Late blocks see cleared flags and exit.
  __device__ __forceinline__ void clear(int count) const {
    for (int i = threadIdx.x; i < count; i += blockDim.x) flag[i] = 0;
  }
};

// Multiples of an odd constant (2^64 / golden ratio): distinct for 2^64 launches, and unlikely as
// leftover data.
inline uint64_t next_tag() {
  static std::atomic<uint64_t> launches{0};
  return (launches.fetch_add(1, std::memory_order_relaxed) + 1) * 0x9e3779b97f4a7c15u;
}

}  // namespace rl
