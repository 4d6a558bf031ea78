// The part of CUDA that csrc/cuda uses, for a host compiler: see ../fibers.h.
//
// It comes before NVIDIA's header of the same name. What is missing does not compile: add it here.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include "../fibers.h"

#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__

// ---- vectors ------------------------------------------------------------------------------------

#define SHIM_VECTORS(T, name)                                                   \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                            \
  struct alignas(sizeof(T) < 8 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                    \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SHIM_VECTORS(float, float)
SHIM_VECTORS(double, double)
SHIM_VECTORS(int, int)
SHIM_VECTORS(unsigned, uint)
#undef SHIM_VECTORS

// ---- memory -------------------------------------------------------------------------------------

// Cache hints; as on the hardware, an address must be aligned to the size of the access.
namespace shim {
template <typename T>
const T* aligned(const T* from, const char* what) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(T)) fail("misaligned address", {what, "", 0});
  return from;
}
}  // namespace shim

#define SHIM_LOAD(name)                 \
  template <typename T>                 \
  T name(const T* from) {               \
    return *shim::aligned(from, #name); \
  }
SHIM_LOAD(__ldg)
SHIM_LOAD(__ldcs)
SHIM_LOAD(__ldcg)
SHIM_LOAD(__ldca)
SHIM_LOAD(__ldlu)
#undef SHIM_LOAD

#define SHIM_STORE(name)                               \
  template <typename T>                                \
  void name(T* to, T value) {                          \
    *const_cast<T*>(shim::aligned(to, #name)) = value; \
  }
SHIM_STORE(__stcs)
SHIM_STORE(__stcg)
SHIM_STORE(__stwt)
SHIM_STORE(__stwb)
#undef SHIM_STORE

inline void __threadfence() {}
inline void __threadfence_block() {}

// Blocks and threads run one at a time: every access is atomic.
template <typename T, typename F>
T shim_atomic(T* at, F change) {
  const T old = *at;
  *at = change(old);
  return old;
}
template <typename T>
T atomicAdd(T* at, std::type_identity_t<T> x) {
  return shim_atomic(at, [x](T old) { return old + x; });
}
template <typename T>
T atomicMax(T* at, std::type_identity_t<T> x) {
  return shim_atomic(at, [x](T old) { return std::max(old, x); });
}
template <typename T>
T atomicMin(T* at, std::type_identity_t<T> x) {
  return shim_atomic(at, [x](T old) { return std::min(old, x); });
}
template <typename T>
T atomicOr(T* at, std::type_identity_t<T> x) {
  return shim_atomic(at, [x](T old) { return old | x; });
}
template <typename T>
T atomicExch(T* at, std::type_identity_t<T> x) {
  return shim_atomic(at, [x](T) { return x; });
}
template <typename T>
T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> x) {
  return shim_atomic(at, [=](T old) { return old == expected ? x : old; });
}
inline unsigned atomicInc(unsigned* at, unsigned limit) {
  return shim_atomic(at, [=](unsigned old) { return old >= limit ? 0u : old + 1; });
}

// ---- barriers and warps -------------------------------------------------------------------------

// Default arguments are evaluated where the kernel calls.
#define SHIM_AT const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define SHIM_HERE(name) \
  shim::Place { name, file, line }

inline void __syncthreads(SHIM_AT) { shim::barrier(SHIM_HERE("__syncthreads"), 0); }
inline int __syncthreads_count(int predicate, SHIM_AT) {
  return shim::barrier(SHIM_HERE("__syncthreads_count"), predicate != 0);
}
inline int __syncthreads_or(int predicate, SHIM_AT) {
  return shim::barrier(SHIM_HERE("__syncthreads_or"), predicate != 0) > 0;
}
inline int __syncthreads_and(int predicate, SHIM_AT) {
  return shim::barrier(SHIM_HERE("__syncthreads_and"), predicate == 0) == 0;
}
inline void __syncwarp(unsigned mask = ~0u, SHIM_AT) {
  shim::leave(shim::meet(SHIM_HERE("__syncwarp"), mask, "", 1));
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SHIM_AT) {
  return shim::shuffle(SHIM_HERE("__shfl_sync"), mask, value, width,
                       [=](int lane) { return (lane & -width) | (source & (width - 1)); });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, SHIM_AT) {
  return shim::shuffle(SHIM_HERE("__shfl_xor_sync"), mask, value, width, [=](int lane) {
    return (lane ^ bits) < (lane & -width) + width ? lane ^ bits : lane;
  });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SHIM_AT) {
  return shim::shuffle(SHIM_HERE("__shfl_up_sync"), mask, value, width, [=](int lane) {
    return (lane & (width - 1)) < static_cast<int>(delta) ? lane : lane - static_cast<int>(delta);
  });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SHIM_AT) {
  return shim::shuffle(SHIM_HERE("__shfl_down_sync"), mask, value, width, [=](int lane) {
    const int source = lane + static_cast<int>(delta);
    return source < (lane & -width) + width ? source : lane;
  });
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SHIM_AT) {
  const unsigned mine = predicate ? 1u << shim::lane() : 0u;
  return shim::reduce(SHIM_HERE("__ballot_sync"), mask, mine,
                      [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate, SHIM_AT) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SHIM_AT) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}
template <typename T>
T __reduce_add_sync(unsigned mask, T value, SHIM_AT) {
  static_assert(std::is_integral_v<T> && sizeof(T) == 4);
  return shim::reduce(SHIM_HERE("__reduce_add_sync"), mask, value, [](T a, T b) { return a + b; });
}
template <typename T>
T __reduce_max_sync(unsigned mask, T value, SHIM_AT) {
  static_assert(std::is_integral_v<T> && sizeof(T) == 4);
  return shim::reduce(SHIM_HERE("__reduce_max_sync"), mask, value,
                      [](T a, T b) { return std::max(a, b); });
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value, SHIM_AT) {
  static_assert(std::is_integral_v<T> && sizeof(T) == 4);
  return shim::reduce(SHIM_HERE("__reduce_min_sync"), mask, value,
                      [](T a, T b) { return std::min(a, b); });
}

// ---- clusters and asynchronous copies -----------------------------------------------------------

// In the place of PTX: csrc/cuda/cluster.cuh takes these names, and says what they mean.
namespace shim {
inline void cluster_arrive(SHIM_AT) { arrive_at_cluster(SHIM_HERE("cluster_arrive")); }
inline void cluster_wait(SHIM_AT) { wait_for_cluster(SHIM_HERE("cluster_wait")); }
inline void store_remote(float* to, unsigned rank, float value, SHIM_AT) {
  *static_cast<float*>(remote(SHIM_HERE("store_remote"), to, rank, sizeof(float))) = value;
}
inline void copy_async(void* to_shared, const void* from, SHIM_AT) {
  // The sanitizers see both sides here, where the kernel has its mistake.
  const volatile int4 *to = static_cast<int4*>(to_shared), *source = static_cast<const int4*>(from);
  for (const volatile int4* at : {to, source}) (void)at->x, (void)at->w;
  begin_copy(SHIM_HERE("copy_async"), to_shared, from);
}
inline void close_copies() { close_copy_group(); }
inline void wait_copies(int open) { wait_for_copies(open); }
}  // namespace shim

// ---- maths --------------------------------------------------------------------------------------

// glibc declares some of these names for itself: hence macros.
#define __expf(x) ::expf(x)
#define __logf(x) ::logf(x)
#define __log2f(x) ::log2f(x)
#define __powf(x, y) ::powf(x, y)
#define __fdividef(x, y) ((x) / (y))
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
// The low word of (high:low) >> (shift mod 32).
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((uint64_t(high) << 32) | low) >> (shift & 31));
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1u) << (31 - i);
  return y;
}
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
using std::max;
using std::min;

// ---- runtime ------------------------------------------------------------------------------------

using cudaStream_t = struct CUstream_st*;
enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorInvalidConfiguration,
  cudaErrorInvalidClusterSize,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout,
};
enum { cudaSharedmemCarveoutMaxShared = 100 };
struct cudaFuncAttributes {
  int ptxVersion, binaryVersion;
  size_t sharedSizeBytes;  // of the static variables; unknown here, and 0
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace shim {
inline cudaError_t last_error = cudaSuccess;
inline std::map<const void*, int> dynamic_limit;  // of kernels that asked for more than 48 KiB

// The device that the shim plays. HOST_SHIM_SM: 80 (default) or 90, which has clusters.
// HOST_SHIM_SHARED: bytes of shared memory that a block may take; a multiprocessor holds three such
// blocks then, so that a kernel can be made to spread its work over more blocks, or fewer.
inline int setting(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text ? std::atoi(text) : otherwise;
}
inline int sm() { return setting("HOST_SHIM_SM", 80); }
inline int shared_of_block() { return setting("HOST_SHIM_SHARED", (sm() >= 90 ? 227 : 163) << 10); }
inline int shared_of_multiprocessor() {
  return (std::getenv("HOST_SHIM_SHARED") ? 3 : 1) * (shared_of_block() + 1024);
}
}  // namespace shim

inline cudaError_t cudaGetLastError() { return std::exchange(shim::last_error, cudaSuccess); }
inline cudaError_t cudaPeekAtLastError() { return shim::last_error; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess                   ? "no error"
         : error == cudaErrorInvalidValue       ? "invalid argument"
         : error == cudaErrorInvalidClusterSize ? "cluster misconfiguration"
                                                : "invalid configuration argument";
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
// Few multiprocessors: grids sized by them stay small, and have more than one block.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      return *value = 3, cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      return *value = shim::sm() / 10, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      return *value = shim::sm() % 10, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return *value = shim::shared_of_block(), cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return *value = shim::shared_of_multiprocessor(), cudaSuccess;
  }
  return shim::last_error = cudaErrorInvalidValue;
}
template <typename K>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, K*) {
  return *attributes = {shim::sm(), shim::sm(), 0}, cudaSuccess;
}
template <typename K>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, K, int, size_t) {
  return *blocks = 1, cudaSuccess;
}
template <typename K>
cudaError_t cudaFuncSetAttribute(K* kernel, cudaFuncAttribute which, int value) {
  if (which != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value > shim::shared_of_block()) return shim::last_error = cudaErrorInvalidValue;
  shim::dynamic_limit[reinterpret_cast<const void*>(kernel)] = value;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* at, int byte, size_t bytes, cudaStream_t) {
  return std::memset(at, byte, bytes), cudaSuccess;
}

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  dim3 cluster;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const auto& of = config->attrs[i].val.clusterDim;
    cluster = {of.x, of.y, of.z};
  }
  const auto limit = shim::dynamic_limit.find(reinterpret_cast<const void*>(kernel));
  const size_t most = limit == shim::dynamic_limit.end() ? 48 << 10 : limit->second;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  const bool bad = uint64_t(grid.x) * grid.y * grid.z == 0 || grid.x >= 1u << 31 ||
                   grid.y > 65535 || grid.z > 65535 || threads == 0 || threads > 1024 ||
                   block.z > 64;
  if (bad) return shim::last_error = cudaErrorInvalidConfiguration;
  if (config->dynamicSmemBytes > most) return shim::last_error = cudaErrorInvalidValue;
  const bool fits =
      config->numAttrs == 0 || (shim::sm() >= 90 && cluster.y == 1 && cluster.z == 1 &&
                                cluster.x >= 1 && cluster.x <= 8 && grid.x % cluster.x == 0);
  if (!fits) return shim::last_error = cudaErrorInvalidClusterSize;
  shim::run(grid, block, cluster.x, config->dynamicSmemBytes,
            [&] { kernel(static_cast<Params>(args)...); });
  return cudaSuccess;
}
