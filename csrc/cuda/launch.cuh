// Host side of every CUDA kernel: the launch, the current stream, the dispatch on dtype.
//
// Only ordinary C++ (cudaLaunchKernelEx, no <<<>>>), so that a host compiler can read the .cu files
// too.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "../common/tensor.h"

namespace rl {

// The stream that PyTorch works on, for the device of `t`.
inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Starts kernel(args...) in clusters of `cluster` blocks (more than 1: sm_90 and later); an error
// names `op`. The arguments are converted to the kernel's own types. Callers return early on an
// empty grid, which CUDA refuses.
template <typename... Params, typename... Args>
void launch_clusters(const char* op, void (*kernel)(Params...), dim3 grid, dim3 block,
                     size_t shared_bytes, unsigned cluster, cudaStream_t stream, Args&&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute shape{};
  shape.id = cudaLaunchAttributeClusterDimension;
  shape.val.clusterDim.x = cluster;
  shape.val.clusterDim.y = shape.val.clusterDim.z = 1;
  config.attrs = &shape;
  config.numAttrs = cluster > 1 ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call of anybody would report it again
  RL_CHECK(false, op, ": ", cudaGetErrorString(error));
}

template <typename... Params, typename... Args>
void launch(const char* op, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, Args&&... args) {
  launch_clusters(op, kernel, grid, block, shared_bytes, 1, stream, std::forward<Args>(args)...);
}

// body(T{}) with the device type of `dtype`.
template <typename F>
void dispatch_float(ScalarType dtype, const F& body) {
  if (dtype == ScalarType::Float) return body(float{});
  if (dtype == ScalarType::BFloat16) return body(__nv_bfloat16{});
  if (dtype == ScalarType::Half) return body(__half{});
  body(double{});
}

// body(T{}, O{}) with the device types of logits and of their gradient, which may be of 16 bits
// where the logits are fp32.
template <typename F>
void dispatch_gradient(ScalarType logits, ScalarType gradient, const F& body) {
  dispatch_float(logits, [&](auto tag) {
    if constexpr (std::is_same_v<decltype(tag), float>) {
      if (gradient == ScalarType::BFloat16) return body(tag, __nv_bfloat16{});
      if (gradient == ScalarType::Half) return body(tag, __half{});
    }
    body(tag, tag);
  });
}

}  // namespace rl
