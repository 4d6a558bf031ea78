// Per-token arguments on CUDA: any float dtype and any strides, four consecutive tokens at a time.
//
// N tokens; a [B, T] tensor is N = B * T tokens in row-major order.
#pragma once

#include "../checks.h"
#include "device.cuh"

namespace rl {

enum class Kind : int { fp32, bf16, fp16, fp64, byte };

// Four tokens as they lie in memory, so that the loads of several tensors are under way before the
// first is converted. Read by one vector, 16-bit values lie two to a word and bytes all in the
// first word; read one by one, each has a word of its own.
template <typename A>
struct alignas(16) Quad {
  uint32_t word[4];
};
template <>
struct alignas(16) Quad<double> {
  double at[4];
};

// A 1-d or 2-d tensor as kernels see it: passed by value. Without data the tensor is absent.
struct TokenView {
  const void* data = nullptr;
  int64_t inner = 1;         // tokens of one row
  int64_t inner_stride = 1;  // elements
  int64_t outer_stride = 0;  // elements
  Kind kind = Kind::fp32;
  bool flat = true;          // one stride reaches every token
  bool vector = false;       // contiguous, and four tokens are aligned
  bool wide_vector = false;  // contiguous, and aligned to 16 bytes

  TokenView() = default;
  explicit TokenView(const Tensor& t) {
    RL_CHECK(t.dim() == 1 || t.dim() == 2, "expected a 1-d or 2-d tensor, got ", t.dim(), "-d");
    data = t.const_data_ptr();
    inner = t.size(t.dim() - 1);
    inner_stride = t.stride(t.dim() - 1);
    outer_stride = t.dim() == 2 ? t.stride(0) : 0;
    flat = t.dim() == 1 || t.size(0) == 1 || outer_stride == inner * inner_stride;
    const ScalarType dtype = t.scalar_type();
    kind = dtype == ScalarType::Bool       ? Kind::byte
           : dtype == ScalarType::Double   ? Kind::fp64
           : dtype == ScalarType::Float    ? Kind::fp32
           : dtype == ScalarType::BFloat16 ? Kind::bf16
                                           : Kind::fp16;
    RL_CHECK(kind == Kind::byte || is_float_dtype(dtype), "expected a float tensor");
    const bool contiguous = flat && inner_stride == 1;
    const auto address = reinterpret_cast<uintptr_t>(data);
    const uintptr_t bytes = kind == Kind::byte                         ? 4
                            : kind == Kind::bf16 || kind == Kind::fp16 ? 8
                                                                       : 16;
    vector = contiguous && address % bytes == 0;
    wide_vector = contiguous && address % 16 == 0;
  }
  explicit TokenView(const std::optional<Tensor>& t)
      : TokenView(t.has_value() ? TokenView(*t) : TokenView()) {}

#ifdef __CUDACC__
  // 64-bit division is slow, and most tensors have fewer than 2^32 tokens.
  __device__ __forceinline__ int64_t row_of(int64_t i) const {
    if (flat) return 0;
    if (((i | inner) >> 32) == 0) return static_cast<uint32_t>(i) / static_cast<uint32_t>(inner);
    return i / inner;
  }

  __device__ __forceinline__ bool kept(int64_t i) const {
    const int64_t row = row_of(i);
    const int64_t at = row * outer_stride + (i - row * inner) * inner_stride;
    return static_cast<const uint8_t*>(data)[at] != 0;
  }

  // Tokens i .. i + 3, of which the first `valid` exist; i is a multiple of 4. The rest is any of
  // the tensor's tokens, or 0.
  template <typename A>
  __device__ __forceinline__ Quad<A> read(int64_t i, int valid) const {
    Quad<A> quad{};
    if (data == nullptr || valid <= 0) return quad;
    if (packed(valid)) {
      read_vectors(quad, i);
      return quad;
    }
    int64_t at[4];
    locate(at, i, valid);
    if constexpr (std::is_same_v<A, double>) {
#pragma unroll
      for (int k = 0; k < 4; ++k) quad.at[k] = static_cast<const double*>(data)[at[k]];
    } else if (kind == Kind::fp32) {
#pragma unroll
      for (int k = 0; k < 4; ++k) quad.word[k] = static_cast<const uint32_t*>(data)[at[k]];
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) quad.word[k] = static_cast<const uint16_t*>(data)[at[k]];
    }
    return quad;
  }

  // The same of a mask.
  __device__ __forceinline__ Quad<float> read_mask(int64_t i, int valid) const {
    Quad<float> quad{};
    if (data == nullptr || valid <= 0) return quad;
    if (packed(valid)) {
      quad.word[0] = *reinterpret_cast<const uint32_t*>(static_cast<const char*>(data) + i);
      return quad;
    }
    int64_t at[4];
    locate(at, i, valid);
#pragma unroll
    for (int k = 0; k < 4; ++k) quad.word[k] = static_cast<const uint8_t*>(data)[at[k]];
    return quad;
  }

  // Whether token k counts; without a mask, whether it exists.
  __device__ __forceinline__ bool keeps(const Quad<float>& mask, int k, int valid) const {
    const uint32_t byte = packed(valid) ? mask.word[0] >> (8 * k) & 0xffu : mask.word[k];
    return k < valid && (data == nullptr || byte != 0);
  }

  __device__ __forceinline__ void convert(const Quad<double>& quad, int, double (&x)[4]) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = quad.at[k];
  }
  __device__ __forceinline__ void convert(const Quad<float>& quad, int valid, float (&x)[4]) const {
    if (kind == Kind::fp32) {
#pragma unroll
      for (int k = 0; k < 4; ++k) x[k] = __uint_as_float(quad.word[k]);
      return;
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t in_pair = quad.word[k / 2] >> (16 * (k % 2)) & 0xffffu;
      const uint32_t bits = packed(valid) ? in_pair : quad.word[k];
      __half half;
      memcpy(&half, &bits, sizeof(half));
      x[k] = kind == Kind::bf16 ? __uint_as_float(bits << 16) : load(half);
    }
  }

 private:
  __device__ __forceinline__ bool packed(int valid) const { return vector && valid == 4; }

  // Where the tokens lie, in elements; the last one again in place of those that do not exist.
  __device__ __forceinline__ void locate(int64_t (&at)[4], int64_t i, int valid) const {
    const int64_t row = row_of(i);
    int64_t column = i - row * inner;
    at[0] = row * outer_stride + column * inner_stride;
#pragma unroll
    for (int k = 1; k < 4; ++k) {
      ++column;
      const bool wraps = !flat && column == inner;
      const int64_t step = wraps ? outer_stride - (inner - 1) * inner_stride : inner_stride;
      if (wraps) column = 0;
      at[k] = at[k - 1] + (k < valid ? step : 0);
    }
  }
  __device__ __forceinline__ void read_vectors(Quad<double>& quad, int64_t i) const {
    const auto* from = static_cast<const double*>(data) + i;
    const double2 low = *reinterpret_cast<const double2*>(from);
    const double2 high = *reinterpret_cast<const double2*>(from + 2);
    quad.at[0] = low.x, quad.at[1] = low.y, quad.at[2] = high.x, quad.at[3] = high.y;
  }
  __device__ __forceinline__ void read_vectors(Quad<float>& quad, int64_t i) const {
    const char* bytes = static_cast<const char*>(data);
    if (kind == Kind::fp32) {
      const uint4 all = *reinterpret_cast<const uint4*>(bytes + 4 * i);
      quad.word[0] = all.x, quad.word[1] = all.y, quad.word[2] = all.z, quad.word[3] = all.w;
    } else {
      const uint2 both = *reinterpret_cast<const uint2*>(bytes + 2 * i);
      quad.word[0] = both.x, quad.word[1] = both.y;
    }
  }
#endif
};

}  // namespace rl
