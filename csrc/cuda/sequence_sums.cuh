// sequence_sums on CUDA: of each sequence the number of unmasked tokens, and their sum of x - y.
//
// Shapes: x, y, mask [N] or [B, T] with any strides, N tokens in row-major order; cu_seqlens
// [S + 1]; out [2, S], fp64.
//
// One block per sequence: a thread takes every 256th token, and the sums of the threads are added
// as a tree. Sums keep their rounding errors, so that the order does not show in the result, and
// masked tokens are as if left out.
#pragma once

#include "block_reduce.cuh"
#include "token_reader.cuh"

namespace rl {

namespace {

constexpr int kSumThreads = 256;

// A sum of about 106 bits: sum and the errors of its roundings.
struct WideSum {
  double sum = 0, error = 0;

  __device__ __forceinline__ void add(double x) {  // Knuth's two-sum
    const double before = sum;
    sum += x;
    const double added = sum - before;
    error += (before - (sum - added)) + (x - added);
  }
  __device__ __forceinline__ double value() const {  // an infinite or NaN sum has no error
    return sum - sum == 0.0 ? sum + error : sum;
  }
};

__device__ __forceinline__ WideSum warp_total(WideSum x) {
#pragma unroll 1
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const double sum = __shfl_xor_sync(kAllLanes, x.sum, lanes);
    const double error = __shfl_xor_sync(kAllLanes, x.error, lanes);
    x.add(sum);
    x.error += error;
  }
  return x;
}

__global__ void __launch_bounds__(kSumThreads)
    sequence_sums_kernel(TokenView x, TokenView y, TokenView mask, Tiles tiles,
                         const int32_t* __restrict__ cu_seqlens_ptr, double* __restrict__ out_ptr) {
  const int64_t s = blockIdx.x;
  // Invalid cu_seqlens cannot cause out-of-bounds access.
  const auto end_of = [&](int64_t i) {
    return clamp(static_cast<int64_t>(cu_seqlens_ptr[i]), int64_t{0}, tiles.tokens);
  };
  const int64_t end = end_of(s + 1);
  double count = 0;
  WideSum sum;
#pragma unroll 4
  for (int64_t i = end_of(s) + threadIdx.x; i < end; i += kSumThreads) {
    const Place at = tiles.of_token(i, 1);
    double term = read_one<double>(x, at.row, at.column);
    if (y.data) term -= read_one<double>(y, at.row, at.column);
    const bool keep = !mask.data || read_as<uint8_t>(mask.at(at.row, at.column)) != 0;
    count += keep ? 1.0 : 0.0;
    sum.add(keep ? term : 0.0);
  }
  count = block_total(count);
  sum = block_total(sum);
  if (threadIdx.x == 0) {
    out_ptr[s] = count;
    out_ptr[gridDim.x + s] = sum.value();
  }
}

Tensor sequence_sums(const Tensor& x, const std::optional<Tensor>& y,
                     const std::optional<Tensor>& mask, const Tensor& cu_seqlens) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  RL_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.numel() >= 1 &&
               cu_seqlens.scalar_type() == ScalarType::Int,
           "cu_seqlens: expected an int32 tensor [S + 1]");
  const TokenView of_x = view_of(x, "x"), of_y = tokens_like(y, x, "y"), keep = mask_like(mask, x);
  const Tensor ends = as_contiguous(cu_seqlens);
  const int64_t count = ends.numel() - 1;
  Tensor out = empty_like_device(x, {2, count}, ScalarType::Double);
  if (count == 0) return out;
  launch("sequence_sums", sequence_sums_kernel, static_cast<unsigned>(count), kSumThreads, 0,
         current_stream(x), of_x, of_y, keep, tiles_of(x, {of_x, of_y, keep}),
         static_cast<const int32_t*>(ends.const_data_ptr()),
         static_cast<double*>(out.mutable_data_ptr()));
  return out;
}

}  // namespace
}  // namespace rl
