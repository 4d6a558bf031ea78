// Per-token arguments on CUDA, read by warps in tiles of 128 tokens: any strides, any float dtype.
//
// B sequences, T steps, N tokens: padded [B, T], or packed [N] with cu_seqlens [B + 1]. In a tile
// each lane owns four consecutive tokens. Where a tile is whole, aligned and of unit stride, a lane
// reads and writes them as vectors; elsewhere lanes take every 32nd token, which is coalesced at
// any offset, and exchange them in shared memory. Both ways give a lane the same tokens, so no
// result depends on where a sequence lies in memory.
#pragma once

#include "../sequence_math.h"
#include "device.cuh"
#include "launch.cuh"

namespace rl {

constexpr int kPerLane = 4;
constexpr int kTile = 32 * kPerLane;
constexpr int kMaxWarps = 8;
constexpr unsigned kAllLanes = ~0u;

enum class TokenKind : int { f64, f32, bf16, f16, mask };

// A 1-d or 2-d tensor (null data: absent), by value in kernel arguments. Strides in elements.
struct TokensView {
  const char* data = nullptr;
  int64_t stride = 0;
  int64_t stride_row = 0;
  TokenKind kind = TokenKind::f32;

  RL_HD int bytes() const {
    return kind == TokenKind::f64    ? 8
           : kind == TokenKind::f32  ? 4
           : kind == TokenKind::mask ? 1
                                     : 2;
  }
};

// Tokens [begin, begin + 128) of one row of a view, of which the first `count` exist.
struct Place {
  int64_t row;
  int64_t begin;
  int count;
};

template <typename To>
__device__ __forceinline__ To read_as(const char* from) {
  return *reinterpret_cast<const To*>(from);
}

template <typename A>
__device__ __forceinline__ A read_value(const char* from, TokenKind kind) {
  switch (kind) {
    case TokenKind::f64:
      return static_cast<A>(read_as<double>(from));
    case TokenKind::f32:
      return static_cast<A>(read_as<float>(from));
    case TokenKind::bf16:
      return static_cast<A>(load(read_as<__nv_bfloat16>(from)));
    default:
      return static_cast<A>(load(read_as<__half>(from)));
  }
}

// One element, for what is read once a sequence.
template <typename A>
__device__ __forceinline__ A read_one(const TokensView& view, int64_t row, int64_t column) {
  const int64_t at = row * view.stride_row + column * view.stride;
  return read_value<A>(view.data + at * view.bytes(), view.kind);
}

// What a lane has read of a tile, before conversion: the reads of several tensors, and of the next
// tile, are then in flight together. Its own four tokens as a vector, or every 32nd: fetch() says
// which, and settle() must be told.
template <typename A>
struct RawTile {
  uint32_t bits[kPerLane];
};
template <>
struct RawTile<double> {
  double bits[kPerLane];
};

__device__ __forceinline__ int lane_id() { return threadIdx.x % 32; }

__device__ __forceinline__ const char* address_of(const TokensView& view, const Place& place) {
  return view.data +
         (place.row * view.stride_row + place.begin * view.stride) * int64_t{view.bytes()};
}

__device__ __forceinline__ bool aligned(const void* at, int bytes) {
  return reinterpret_cast<uintptr_t>(at) % bytes == 0;
}

// bits[j] of every 32nd token; 0 where there is none.
template <typename Word, typename Bits>
__device__ __forceinline__ void read_striped(const char* from, int64_t stride, int count,
                                             Bits (&bits)[kPerLane]) {
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int i = j * 32 + lane_id();
    bits[j] = i < count ? read_as<Word>(from + i * stride * int64_t{sizeof(Word)}) : Word(0);
  }
}

__device__ __forceinline__ bool fetch(const TokensView& view, const Place& place,
                                      RawTile<float>& raw) {
  const char* from = address_of(view, place);
  const bool wide = view.kind == TokenKind::f32;
  const bool as_vector = view.stride == 1 && place.count == kTile && aligned(from, wide ? 16 : 8);
  if (as_vector && wide) {
    const int4 v = read_as<int4>(from + lane_id() * 16);
    raw.bits[0] = v.x, raw.bits[1] = v.y, raw.bits[2] = v.z, raw.bits[3] = v.w;
  } else if (as_vector) {
    const int2 v = read_as<int2>(from + lane_id() * 8);
    raw.bits[0] = v.x, raw.bits[1] = v.y, raw.bits[2] = raw.bits[3] = 0;
  } else if (wide) {
    read_striped<uint32_t>(from, view.stride, place.count, raw.bits);
  } else {
    read_striped<uint16_t>(from, view.stride, place.count, raw.bits);
  }
  return as_vector;
}

__device__ __forceinline__ bool fetch(const TokensView& view, const Place& place,
                                      RawTile<double>& raw) {
  const char* from = address_of(view, place);
  const bool as_vector = view.stride == 1 && place.count == kTile && aligned(from, 16);
  if (as_vector) {
    const double2 low = read_as<double2>(from + lane_id() * 32);
    const double2 high = read_as<double2>(from + lane_id() * 32 + 16);
    raw.bits[0] = low.x, raw.bits[1] = low.y, raw.bits[2] = high.x, raw.bits[3] = high.y;
  } else {
    read_striped<double>(from, view.stride, place.count, raw.bits);
  }
  return as_vector;
}

__device__ __forceinline__ float from_bits16(uint32_t bits, TokenKind kind) {
  if (kind == TokenKind::bf16) return __uint_as_float(bits << 16);
  __half half;
  const uint16_t low = static_cast<uint16_t>(bits);
  memcpy(&half, &low, sizeof(half));
  return load(half);
}

__device__ __forceinline__ void convert(const RawTile<float>& raw, bool as_vector, TokenKind kind,
                                        float (&x)[kPerLane]) {
  if (kind == TokenKind::f32) {
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) x[j] = __uint_as_float(raw.bits[j]);
    return;
  }
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const uint32_t pair = raw.bits[j / 2];
    const uint32_t half = j % 2 ? pair >> 16 : pair & 0xffffu;
    x[j] = from_bits16(as_vector ? half : raw.bits[j], kind);
  }
}

__device__ __forceinline__ void convert(const RawTile<double>& raw, bool, TokenKind,
                                        double (&x)[kPerLane]) {
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) x[j] = raw.bits[j];
}

// The lane's four tokens as numbers. `stage`: kTile elements of shared memory of this warp.
template <typename A>
__device__ __forceinline__ void settle(const RawTile<A>& raw, bool as_vector, TokenKind kind,
                                       A* stage, A (&x)[kPerLane]) {
  convert(raw, as_vector, kind, x);
  if (as_vector) return;
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) stage[j * 32 + lane_id()] = x[j];
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) x[j] = stage[lane_id() * kPerLane + j];
}

// Writes the lane's four tokens to a contiguous output, whose tile begins at `to`.
template <typename A>
__device__ __forceinline__ void put(A* to, int count, A* stage, const A (&x)[kPerLane]) {
  if (count == kTile && aligned(to, 16)) {
    constexpr int kSize = Vector<A>::kSize;
#pragma unroll
    for (int j = 0; j < kPerLane; j += kSize) {
      Vector<A> v;
#pragma unroll
      for (int i = 0; i < kSize; ++i) v.at[i] = x[j + i];
      write_vector(to + lane_id() * kPerLane + j, v);
    }
    return;
  }
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) stage[lane_id() * kPerLane + j] = x[j];
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int i = j * 32 + lane_id();
    if (i < count) to[i] = stage[i];
  }
}

// The mask bytes of a tile, four in a word; an absent mask keeps every token.
__device__ __forceinline__ bool fetch(const TokensView& view, const Place& place, uint32_t& raw) {
  raw = 0;
  if (view.data == nullptr) return false;
  const char* from = address_of(view, place);
  const bool as_vector = view.stride == 1 && place.count == kTile && aligned(from, 4);
  if (as_vector) {
    raw = read_as<uint32_t>(from + lane_id() * 4);
  } else {
    uint32_t bytes[kPerLane];
    read_striped<uint8_t>(from, view.stride, place.count, bytes);
    raw = bytes[0] | bytes[1] << 8 | bytes[2] << 16 | bytes[3] << 24;
  }
  return as_vector;
}

// Bit j: the lane's token j exists and counts.
__device__ __forceinline__ unsigned settle(const TokensView& view, const Place& place, uint32_t raw,
                                           bool as_vector) {
  unsigned keep = 0;
  if (view.data == nullptr) {
    const int left = place.count - lane_id() * kPerLane;
    return left >= kPerLane ? 0xfu : left <= 0 ? 0u : (1u << left) - 1u;
  }
  if (as_vector) {
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) keep |= (raw >> (8 * j) & 1u) << j;
    return keep;
  }
  // Word j has a bit for each of the tokens [32 j, 32 j + 32); the lane's four lie in one word.
  const int word = lane_id() * kPerLane / 32;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const unsigned ballot = __ballot_sync(kAllLanes, raw >> (8 * j) & 1u);
    if (j == word) keep = ballot >> (lane_id() * kPerLane % 32) & 0xfu;
  }
  return keep;
}

// ---- host -------------------------------------------------------------------------------------

inline TokensView view_of(const Tensor& t, const char* name) {
  RL_CHECK(t.dim() == 1 || t.dim() == 2, name, ": expected a 1-d or 2-d tensor, got ", t.dim(),
           "-d");
  TokensView view;
  view.data = static_cast<const char*>(t.const_data_ptr());
  view.stride = t.stride(t.dim() - 1);
  view.stride_row = t.dim() == 2 ? t.stride(0) : 0;
  switch (t.scalar_type()) {
    case ScalarType::Double:
      view.kind = TokenKind::f64;
      break;
    case ScalarType::Float:
      view.kind = TokenKind::f32;
      break;
    case ScalarType::BFloat16:
      view.kind = TokenKind::bf16;
      break;
    case ScalarType::Half:
      view.kind = TokenKind::f16;
      break;
    default:
      RL_CHECK(false, name, ": expected a float tensor");
  }
  return view;
}

// An argument with the shape of `like`; fp64 only together with fp64.
inline TokensView tokens_like(const Tensor& t, const Tensor& like, const char* name) {
  const TokensView view = view_of(t, name);
  bool same = t.dim() == like.dim();
  for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == like.size(d);
  RL_CHECK(same, name, ": expected the shape of the first argument");
  RL_CHECK((t.scalar_type() == ScalarType::Double) == (like.scalar_type() == ScalarType::Double),
           name, ": float64 goes only with float64");
  return view;
}

inline TokensView mask_like(const std::optional<Tensor>& mask, const Tensor& like) {
  TokensView view;
  if (!mask || mask->numel() == 0) return view;
  RL_CHECK(mask->scalar_type() == ScalarType::Bool, "mask: expected a bool tensor");
  bool same = mask->dim() == like.dim();
  for (int64_t d = 0; same && d < like.dim(); ++d) same = mask->size(d) == like.size(d);
  RL_CHECK(same, "mask: expected the shape of the first argument");
  view.data = static_cast<const char*>(mask->const_data_ptr());
  view.stride = mask->stride(mask->dim() - 1);
  view.stride_row = mask->dim() == 2 ? mask->stride(0) : 0;
  view.kind = TokenKind::mask;
  return view;
}

inline unsigned blocks_for(int64_t items, int64_t per_block, int64_t most) {
  return static_cast<unsigned>(std::min((items + per_block - 1) / per_block, most));
}

}  // namespace rl
