// Host side of every CUDA kernel: current stream, launch, dispatch on dtype.
//
// Ordinary C++ (cudaLaunchKernelEx, not <<<>>>), so that a host compiler can build the .cu files
// too (tests/_support/host_shim).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "../common/tensor.h"

namespace rl {

// PyTorch's current stream on the device of `t`.
inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Launches kernel(args...) in clusters of `cluster` blocks (more than 1 needs sm_90). Arguments are
// converted to the kernel's parameter types; `op` names the op in errors. CUDA rejects an empty
// grid, so callers return early.
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
  cudaGetLastError();  // clears the error, which the next CUDA call would report again
  RL_CHECK(false, op, ": ", cudaGetErrorString(error));
}

template <typename... Params, typename... Args>
void launch(const char* op, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, Args&&... args) {
  launch_clusters(op, kernel, grid, block, shared_bytes, 1, stream, std::forward<Args>(args)...);
}

// Calls body(T{}) with the device type of a float dtype.
template <typename F>
void dispatch_float(ScalarType dtype, const F& body) {
  if (dtype == ScalarType::Float) return body(float{});
  if (dtype == ScalarType::BFloat16) return body(__nv_bfloat16{});
  if (dtype == ScalarType::Half) return body(__half{});
  body(double{});
}

// Calls body(T{}, O{}) with the device types of logits and gradient, which may be 16-bit for fp32
// logits.
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
