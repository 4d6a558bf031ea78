// Kernels with one deliberate fault each: tests/kernels/test_cuda_on_host.py demands that the host
// shim sees every one of them, and lets the sound ones pass.
//
// Shapes: x, out [N], one block of 64 threads; or a cluster of two, and out holds 64 elements.

#include "cluster.cuh"
#include "launch.cuh"

STABLE_TORCH_LIBRARY(host_shim, m) { m.def("fault(Tensor x, Tensor(a!) out, str kind) -> ()"); }

namespace rl {
namespace {

constexpr int kThreads = 64;

template <bool kBarrier>
__global__ void __launch_bounds__(kThreads)
    reverse_kernel(const float* x_ptr, float* out_ptr, int64_t n) {
  __shared__ float of_block[kThreads];
  of_block[threadIdx.x] = threadIdx.x < n ? x_ptr[threadIdx.x] : 0.0f;
  if constexpr (kBarrier) __syncthreads();
  if (threadIdx.x < n) out_ptr[threadIdx.x] = of_block[n - 1 - threadIdx.x];
}

__global__ void copy_past_end_kernel(const float* x_ptr, float* out_ptr, int64_t read,
                                     int64_t write) {
  for (int64_t i = threadIdx.x; i < read; i += kThreads) {
    const float x = x_ptr[i];
    out_ptr[i % write] = x;
  }
  for (int64_t i = read + threadIdx.x; i < write; i += kThreads) out_ptr[i] = 0;
}

__global__ void shared_past_end_kernel(float* out_ptr) {
  __shared__ float of_block[kThreads];
  float* at = of_block;
  at[threadIdx.x + 1] = 1.0f;
  __syncthreads();
  out_ptr[threadIdx.x] = at[threadIdx.x];
}

__global__ void dynamic_past_end_kernel(float* out_ptr) {
  extern __shared__ float of_block[];
  of_block[threadIdx.x + 1] = 1.0f;
  out_ptr[threadIdx.x] = of_block[threadIdx.x];
}

__global__ void unwritten_shared_kernel(float* out_ptr, bool all) {
  __shared__ float of_block[kThreads];
  if (all || threadIdx.x % 2) of_block[threadIdx.x] = 1.0f;
  __syncthreads();
  out_ptr[threadIdx.x] = of_block[threadIdx.x];
}

__global__ void misaligned_kernel(const float* x_ptr, float* out_ptr) {
  const float4 x = *reinterpret_cast<const float4*>(x_ptr + 1);
  if (threadIdx.x == 0) out_ptr[0] = x.x;
}

__global__ void early_exit_kernel(float* out_ptr) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  out_ptr[threadIdx.x] = 1.0f;
}

__global__ void other_barrier_kernel(float* out_ptr) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out_ptr[threadIdx.x] = 1.0f;
}

__global__ void lane_missing_kernel(float* out_ptr) {
  float x = 1.0f;
  if (threadIdx.x % 32 < 31) x += __shfl_xor_sync(~0u, x, 1);
  out_ptr[threadIdx.x] = x;
}

__global__ void lane_outside_kernel(float* out_ptr) {
  if (threadIdx.x < 4) out_ptr[threadIdx.x] = __shfl_sync(0xfu, 1.0f, 4);
}

__global__ void block_order_kernel(float* out_ptr) {
  if (threadIdx.x == 0) out_ptr[0] = 2.0f * out_ptr[0] + blockIdx.x;
}

enum class Remote {
  sound,
  no_barrier,      // before what the other block wrote is read
  not_started,     // no barrier before the first write
  ended,           // a block that others write to leaves
  no_rank,         // of a third block
  not_shared,      // a pointer to the thread's own variable
  no_arrival,      // a thread waits only
  two_arrivals,    // with one wait
  thread_missing,  // one thread leaves before the barrier
};

// out[0 .. 64) = thread + 100 (rank of the block that wrote it): each block writes the other's.
template <Remote kFault>
__global__ void __launch_bounds__(kThreads) remote_kernel(float* out_ptr) {
  __shared__ float of_block[kThreads];
  const unsigned rank = cluster_rank(), other = 1 - rank;
  const int thread = threadIdx.x;
  if constexpr (kFault != Remote::not_started) {
    if (kFault == Remote::no_arrival && thread == 5 && rank == 0) cluster_wait();
    if (kFault == Remote::thread_missing && thread == 5 && rank == 1) return;
    cluster_arrive();
    if (kFault == Remote::two_arrivals && thread == 5 && rank == 0) cluster_arrive();
    cluster_wait();
  }
  if (kFault == Remote::ended && rank == 1) return;
  float own = 0;
  float* const to = kFault == Remote::not_shared ? &own : &of_block[thread];
  store_remote(to, kFault == Remote::no_rank ? 2 : other, thread + 100.0f * rank);
  if constexpr (kFault == Remote::ended) return;
  if constexpr (kFault != Remote::no_barrier) {
    cluster_arrive();
    cluster_wait();
  }
  if (rank == 0) out_ptr[thread] = of_block[thread];
  if constexpr (kFault == Remote::no_barrier) {  // so that neither block ends too early
    cluster_arrive();
    cluster_wait();
  }
}

enum class Copies { sound, no_wait, open_group, not_closed, no_barrier, misaligned, past_end };

// out[0 .. 60) = x[0 .. 60) by way of shared memory, four elements of a thread.
template <Copies kFault>
__global__ void __launch_bounds__(kThreads) copy_kernel(const float* x_ptr, float* out_ptr) {
  __shared__ __align__(16) float of_block[kThreads];
  const int thread = threadIdx.x, threads = kFault == Copies::past_end ? 16 : 15;
  const int shift = kFault == Copies::misaligned;
  if (thread < threads) copy_async(of_block + 4 * thread, x_ptr + 4 * thread + shift);
  if constexpr (kFault != Copies::not_closed) close_copies();
  if constexpr (kFault != Copies::no_wait) wait_copies(kFault == Copies::open_group);
  if constexpr (kFault != Copies::no_barrier) __syncthreads();
  if (thread < 60) out_ptr[thread] = of_block[thread];
}

void fault(Tensor x, Tensor out, std::string kind) {
  const float* in = static_cast<const float*>(x.const_data_ptr());
  float* to = static_cast<float*>(out.mutable_data_ptr());
  const int64_t n = x.numel();
  const cudaStream_t stream = current_stream(x);
  const auto run = [&](auto* kernel, auto... args) {
    launch("fault", kernel, 1, kThreads, 0, stream, args...);
  };
  if (kind == "sound") return run(reverse_kernel<true>, in, to, n);
  if (kind == "no barrier") return run(reverse_kernel<false>, in, to, n);
  if (kind == "read past the end") return run(copy_past_end_kernel, in, to, n + 1, n);
  if (kind == "write past the end") return run(copy_past_end_kernel, in, to, n, n + 1);
  if (kind == "shared past the end") return run(shared_past_end_kernel, to);
  if (kind == "dynamic past the end")
    return launch("fault", dynamic_past_end_kernel, 1, kThreads, kThreads * sizeof(float), stream,
                  to);
  if (kind == "unwritten shared") return run(unwritten_shared_kernel, to, false);
  if (kind == "misaligned") return run(misaligned_kernel, in, to);
  if (kind == "early exit") return run(early_exit_kernel, to);
  if (kind == "other barrier") return run(other_barrier_kernel, to);
  if (kind == "lane missing") return run(lane_missing_kernel, to);
  if (kind == "lane outside") return run(lane_outside_kernel, to);
  if (kind == "block order") return launch("fault", block_order_kernel, 3, kThreads, 0, stream, to);
  if (kind == "empty grid") return launch("fault", early_exit_kernel, 0, kThreads, 0, stream, to);
  if (kind == "too many threads") return launch("fault", early_exit_kernel, 1, 1025, 0, stream, to);
  if (kind == "too much shared")
    return launch("fault", dynamic_past_end_kernel, 1, kThreads, 50 << 10, stream, to);
  const auto pair = [&](auto* kernel, int blocks) {
    launch_clusters("fault", kernel, blocks, kThreads, 0, 2, stream, to);
  };
  if (kind == "sound cluster") return pair(remote_kernel<Remote::sound>, 2);
  if (kind == "no cluster barrier") return pair(remote_kernel<Remote::no_barrier>, 2);
  if (kind == "block not started") return pair(remote_kernel<Remote::not_started>, 2);
  if (kind == "block has ended") return pair(remote_kernel<Remote::ended>, 2);
  if (kind == "rank outside") return pair(remote_kernel<Remote::no_rank>, 2);
  if (kind == "not shared") return pair(remote_kernel<Remote::not_shared>, 2);
  if (kind == "wait without arrival") return pair(remote_kernel<Remote::no_arrival>, 2);
  if (kind == "two arrivals") return pair(remote_kernel<Remote::two_arrivals>, 2);
  if (kind == "cluster thread missing") return pair(remote_kernel<Remote::thread_missing>, 2);
  if (kind == "grid of half a cluster") return pair(remote_kernel<Remote::sound>, 3);
  if (kind == "no clusters in sm_80") return pair(remote_kernel<Remote::sound>, 2);
  if (kind == "sound copy") return run(copy_kernel<Copies::sound>, in, to);
  if (kind == "copy without wait") return run(copy_kernel<Copies::no_wait>, in, to);
  if (kind == "copy in an open group") return run(copy_kernel<Copies::open_group>, in, to);
  if (kind == "copy in no group") return run(copy_kernel<Copies::not_closed>, in, to);
  if (kind == "copy without barrier") return run(copy_kernel<Copies::no_barrier>, in, to);
  if (kind == "misaligned copy") return run(copy_kernel<Copies::misaligned>, in, to);
  if (kind == "copy past the end") return run(copy_kernel<Copies::past_end>, in, to);
  RL_CHECK(false, "no such fault: ", kind);
}

}  // namespace
}  // namespace rl

STABLE_TORCH_LIBRARY_IMPL(host_shim, CUDA, m) { m.impl("fault", TORCH_BOX(&rl::fault)); }
