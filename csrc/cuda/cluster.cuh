// Thread-block clusters (sm_90 and later): blocks that run at the same time and write into each
// other's shared memory; and copies from global to shared memory that threads do not wait for.
//
// Where the hardware has no clusters every block is a cluster of one, so that a kernel is written
// once. A kernel may assume no more than the code that was compiled: see cluster_limit.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "device.cuh"

namespace rl {

constexpr int kMaxCluster = 8;  // the largest that every device with clusters takes

#ifdef SHIM_CUDACC  // kernels run on a CPU: tests/_support/host_shim/fibers.h
using shim::close_copies;
using shim::cluster_arrive;
using shim::cluster_rank;
using shim::cluster_size;
using shim::cluster_wait;
using shim::copy_async;
using shim::store_remote;
using shim::wait_copies;
#else

__device__ __forceinline__ unsigned cluster_size() {
#if RL_PTX >= 900
  unsigned size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
#else
  return 1;
#endif
}

// This block's number in its cluster.
__device__ __forceinline__ unsigned cluster_rank() {
#if RL_PTX >= 900
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

// A barrier of all threads of the cluster in two halves: what a thread wrote before it arrived is
// seen by every thread that has waited.
__device__ __forceinline__ void cluster_arrive() {
#if RL_PTX >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if RL_PTX >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  __syncthreads();
#endif
}

// *to = value in the shared memory of block `rank`; `to` is the address of the same variable here.
// That block must have started: after a barrier of the cluster.
__device__ __forceinline__ void store_remote(float* to, unsigned rank, float value) {
#if RL_PTX >= 900
  const auto here = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(value) : "memory");
#else
  *to = value;
#endif
}

// Starts to copy 16 bytes, both sides aligned. Only the thread itself sees them without a barrier.
__device__ __forceinline__ void copy_async(void* to_shared, const void* from) {
#if RL_PTX >= 800
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
#else
  *static_cast<int4*>(to_shared) = *static_cast<const int4*>(from);
#endif
}

// Ends a group of this thread's copies.
__device__ __forceinline__ void close_copies() {
#if RL_PTX >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `open` (0 to 3) of this thread's groups are under way.
__device__ __forceinline__ void wait_copies(int open) {
#if RL_PTX >= 800
  // The instruction takes a constant.
  if (open == 0) asm volatile("cp.async.wait_group 0;" ::: "memory");
  if (open == 1) asm volatile("cp.async.wait_group 1;" ::: "memory");
  if (open == 2) asm volatile("cp.async.wait_group 2;" ::: "memory");
  if (open == 3) asm volatile("cp.async.wait_group 3;" ::: "memory");
#endif
}

#endif  // SHIM_CUDACC

// The most blocks of a cluster that a kernel was compiled for: what counts is the code that this
// device runs, which may be older than the device.
inline int cluster_limit(const cudaFuncAttributes& compiled) {
  return compiled.ptxVersion >= 90 ? kMaxCluster : 1;
}

}  // namespace rl
