// Thread-block clusters (sm_90 and later), whose blocks are co-scheduled and write to each other's
// shared memory; and asynchronous copies from global to shared memory.
//
// Before sm_90 every block is a cluster of one, so that a kernel is written once. cluster_limit()
// gives the largest cluster that the compiled code supports.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "device.cuh"

namespace rl {

constexpr int kMaxCluster = 8;  // the portable maximum

#ifdef SHIM_CUDACC  // kernels run on the CPU: tests/_support/host_shim/fibers.h
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

// Rank of this block in its cluster.
__device__ __forceinline__ unsigned cluster_rank() {
#if RL_PTX >= 900
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

// Split barrier over all threads of the cluster: arrive releases prior writes, wait acquires them.
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

// *to = value in the shared memory of block `rank`, where `to` is the variable's address in this
// block. Block `rank` must have started: call after a cluster barrier.
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

// Starts an asynchronous copy of 16 aligned bytes. After wait_copies() they are visible to this
// thread; to others only after a barrier.
__device__ __forceinline__ void copy_async(void* to_shared, const void* from) {
#if RL_PTX >= 800
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
#else
  *static_cast<int4*>(to_shared) = *static_cast<const int4*>(from);
#endif
}

// Closes the current group of this thread's copies (commit_group).
__device__ __forceinline__ void close_copies() {
#if RL_PTX >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `open` (0 to 3) of this thread's groups are in flight.
__device__ __forceinline__ void wait_copies(int open) {
#if RL_PTX >= 800
  // The operand is an immediate.
  if (open == 0) asm volatile("cp.async.wait_group 0;" ::: "memory");
  if (open == 1) asm volatile("cp.async.wait_group 1;" ::: "memory");
  if (open == 2) asm volatile("cp.async.wait_group 2;" ::: "memory");
  if (open == 3) asm volatile("cp.async.wait_group 3;" ::: "memory");
#endif
}

#endif  // SHIM_CUDACC

// Maximum cluster size of a compiled kernel. Depends on the architecture of the code that runs,
// which may be older than the device.
inline int cluster_limit(const cudaFuncAttributes& compiled) {
  return compiled.ptxVersion >= 90 ? kMaxCluster : 1;
}

}  // namespace rl
