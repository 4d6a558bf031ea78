// Per-token arguments on CUDA: a warp reads tiles of 128 tokens with any strides and float dtype.
//
// Shapes: N tokens, padded [B, T] or packed [N]. Each lane owns four consecutive tokens of a tile.
// It reads and writes them as vectors if the tile is complete, aligned and has unit stride.
// Otherwise the lanes read every 32nd token, which coalesces at any offset, and exchange them
// through shared memory. A lane gets the same tokens either way, so results do not depend on the
// layout.
#pragma once

#include <algorithm>

#include "device.cuh"
#include "launch.cuh"

namespace rl {

constexpr int kPerLane = 4;
constexpr int kTile = 32 * kPerLane;
constexpr unsigned kAllLanes = ~0u;

enum class TokenKind : int { f64, f32, bf16, f16, mask };

// A strided 1-d or 2-d tensor, passed to kernels by value. Null data: absent.
struct TokenView {
  const char* data = nullptr;
  int64_t step = 0;      // bytes between tokens
  int64_t row_step = 0;  // bytes between rows
  TokenKind kind = TokenKind::f32;
  unsigned vector = 0;  // alignment in bytes that vector access needs; 0: not possible

  __device__ __forceinline__ const char* at(int64_t row, int64_t column) const {
    return data + row * row_step + column * step;
  }
  // Whether a complete tile at `from` is read as vectors: the same for all tiles of a row.
  RL_HD bool vectors(const char* from) const {
    return vector != 0 && (reinterpret_cast<uintptr_t>(from) & (vector - 1)) == 0;
  }
};

// Position of a tile in a matrix, in row-major order; `count` of its 128 tokens exist.
struct Place {
  int64_t row, column;
  int count;
};

// N tokens in rows of `width`, cut into tiles by row-major index. The tile of a token, hence the
// order of every sum, does not depend on strides.
struct Tiles {
  int64_t tokens, width;
  double rows_per_token;
  int64_t whole;  // tiles [0, whole) can be read as vectors in every view

  RL_HD int64_t count() const { return (tokens + kTile - 1) / kTile; }
  // Floating-point product and correction by one row: a 64-bit integer division is a call.
  __device__ __forceinline__ Place of_token(int64_t token, int count) const {
    int64_t row = static_cast<int64_t>(static_cast<double>(token) * rows_per_token);
    int64_t column = token - row * width;
    if (column < 0) --row, column += width;
    if (column >= width) ++row, column -= width;
    return {row, column, count};
  }
  __device__ __forceinline__ Place at(int64_t tile) const {
    const int64_t left = tokens - tile * kTile;
    return of_token(tile * kTile, left < kTile ? static_cast<int>(left) : kTile);
  }
  __device__ __forceinline__ bool in_one_row(const Place& place) const {
    return place.column + place.count <= width;
  }
};

__device__ __forceinline__ int lane_id() { return threadIdx.x % 32; }

template <typename To>
__device__ __forceinline__ To read_as(const char* from) {
  return *reinterpret_cast<const To*>(from);
}

// Reads one token.
template <typename A>
__device__ __forceinline__ A read_one(const TokenView& view, int64_t row, int64_t column) {
  const char* from = view.at(row, column);
  switch (view.kind) {
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

// Unconverted data of a lane: its four tokens as a vector, or every 32nd token. Conversion is a
// separate step, so that reads of several tensors and tiles are in flight together.
template <typename A>
struct RawTile {
  uint32_t bits[kPerLane];
};
template <>
struct RawTile<double> {
  double bits[kPerLane];
};

// ---- reads: fetch() issues the loads, unpack() converts ----------------------------------------

// bits[j]: token j * 32 + lane; 0 beyond `count`.
template <typename Word, typename Bits>
__device__ __forceinline__ void read_striped(const char* from, int64_t step, int count,
                                             Bits (&bits)[kPerLane]) {
  from += lane_id() * step;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    bits[j] = j * 32 + lane_id() < count ? read_as<Word>(from) : Word(0);
    from += 32 * step;
  }
}

// The lane's four numbers, as 16-byte vectors.
__device__ __forceinline__ void read_vectors(const char* from, RawTile<float>& raw) {
  const int4 v = read_as<int4>(from + lane_id() * 16);
  raw.bits[0] = v.x, raw.bits[1] = v.y, raw.bits[2] = v.z, raw.bits[3] = v.w;
}
__device__ __forceinline__ void read_vectors(const char* from, RawTile<double>& raw) {
  const double2 low = read_as<double2>(from + lane_id() * 32);
  const double2 high = read_as<double2>(from + lane_id() * 32 + 16);
  raw.bits[0] = low.x, raw.bits[1] = low.y, raw.bits[2] = high.x, raw.bits[3] = high.y;
}

// `count` tokens of one row at address `from`. as_vectors requires all 128.
template <typename A>
__device__ __forceinline__ void fetch(const TokenView& view, const char* from, int count,
                                      bool as_vectors, RawTile<A>& raw) {
  if constexpr (std::is_same_v<A, double>) {
    if (as_vectors) return read_vectors(from, raw);
    read_striped<double>(from, view.step, count, raw.bits);
  } else if (view.kind == TokenKind::f32) {
    if (as_vectors) return read_vectors(from, raw);
    read_striped<uint32_t>(from, view.step, count, raw.bits);
  } else if (as_vectors) {
    const int2 v = read_as<int2>(from + lane_id() * 8);
    raw.bits[0] = v.x, raw.bits[1] = v.y;
  } else {
    read_striped<uint16_t>(from, view.step, count, raw.bits);
  }
}

// A tile within one row. Returns as_vectors, for unpack().
template <typename A>
__device__ __forceinline__ bool fetch(const TokenView& view, const Place& place, RawTile<A>& raw) {
  const char* from = view.at(place.row, place.column);
  const bool as_vectors = place.count == kTile && view.vectors(from);
  fetch(view, from, place.count, as_vectors, raw);
  return as_vectors;
}

__device__ __forceinline__ float from_bits16(uint32_t bits, TokenKind kind) {
  if (kind == TokenKind::bf16) return __uint_as_float(bits << 16);
  __half half;
  const uint16_t low = static_cast<uint16_t>(bits);
  memcpy(&half, &low, sizeof(half));
  return load(half);
}

// The lane's four tokens, if they were read as vectors of type A.
__device__ __forceinline__ void as_numbers(const RawTile<float>& raw, float (&x)[kPerLane]) {
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) x[j] = __uint_as_float(raw.bits[j]);
}
__device__ __forceinline__ void as_numbers(const RawTile<double>& raw, double (&x)[kPerLane]) {
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) x[j] = raw.bits[j];
}

__device__ __forceinline__ void as_raw(const float (&x)[kPerLane], RawTile<float>& raw) {
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) raw.bits[j] = __float_as_uint(x[j]);
}
__device__ __forceinline__ void as_raw(const double (&x)[kPerLane], RawTile<double>& raw) {
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) raw.bits[j] = x[j];
}
__device__ __forceinline__ void convert(const RawTile<float>& raw, bool as_vectors, TokenKind kind,
                                        float (&x)[kPerLane]) {
  if (kind == TokenKind::f32) return as_numbers(raw, x);
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const uint32_t pair = raw.bits[j / 2];
    const uint32_t half = j % 2 ? pair >> 16 : pair & 0xffffu;
    x[j] = from_bits16(as_vectors ? half : raw.bits[j], kind);
  }
}
__device__ __forceinline__ void convert(const RawTile<double>& raw, bool, TokenKind,
                                        double (&x)[kPerLane]) {
  as_numbers(raw, x);
}

// Exchanges every 32nd token for the lane's own four. `stage`: kTile elements of shared memory per
// warp.
template <typename A>
__device__ __forceinline__ void to_own_tokens(A* stage, A (&x)[kPerLane]) {
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) stage[j * 32 + lane_id()] = x[j];
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) x[j] = stage[lane_id() * kPerLane + j];
}

// Converts to the lane's four tokens.
template <typename A>
__device__ __forceinline__ void unpack(const TokenView& view, const RawTile<A>& raw,
                                       bool as_vectors, A* stage, A (&x)[kPerLane]) {
  convert(raw, as_vectors, view.kind, x);
  if (!as_vectors) to_own_tokens(stage, x);
}

// Reads and converts any tile, also one that spans several rows.
template <typename A>
__device__ __forceinline__ void read_across(const TokenView& view, const Tiles& tiles, int64_t tile,
                                            A* stage, A (&x)[kPerLane]) {
  __syncwarp();
#pragma unroll 2
  for (int j = 0; j < kPerLane; ++j) {
    const int64_t token = tile * kTile + j * 32 + lane_id();
    const Place at = tiles.of_token(token, 1);
    A one = 0;
    if (token < tiles.tokens) one = read_one<A>(view, at.row, at.column);
    stage[j * 32 + lane_id()] = one;
  }
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) x[j] = stage[lane_id() * kPerLane + j];
}

// ---- masks: bytes, four per word, 0 where masked; an absent mask keeps every token --------------
//
// A kept byte need not be 1: a bool view of a numpy array may hold any value.

__device__ __forceinline__ uint32_t fetch_mask(const TokenView& view, const char* from, int count,
                                               bool as_vectors) {
  if (view.data == nullptr) return 0x01010101u;
  if (as_vectors) return read_as<uint32_t>(from + lane_id() * 4);
  uint32_t bytes[kPerLane];
  read_striped<uint8_t>(from, view.step, count, bytes);
  return bytes[0] | bytes[1] << 8 | bytes[2] << 16 | bytes[3] << 24;
}

// The top bit of each byte that is not 0.
__device__ __forceinline__ uint32_t nonzero_bytes(uint32_t bytes) {
  return (((bytes & 0x7f7f7f7fu) + 0x7f7f7f7fu) | bytes) & 0x80808080u;
}

// Bit j is set if byte j is not 0.
__device__ __forceinline__ unsigned nibble(uint32_t bytes) {
  return nonzero_bytes(bytes) * 0x00204081u >> 28;
}

// Bit j is set if the lane's token j exists and is not masked.
__device__ __forceinline__ unsigned unpack_mask(const TokenView& view, uint32_t raw, int count,
                                                bool as_vectors) {
  if (view.data == nullptr) {
    const int left = count - lane_id() * kPerLane;
    return left >= kPerLane ? 0xfu : left <= 0 ? 0u : (1u << left) - 1u;
  }
  if (as_vectors) return nibble(raw);
  // Ballot j has a bit for each token of [32 j, 32 j + 32); the lane's four are in one ballot.
  const int word = lane_id() * kPerLane / 32;
  unsigned keep = 0;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const unsigned ballot = __ballot_sync(kAllLanes, raw >> (8 * j) & 0xffu);
    if (j == word) keep = ballot >> (lane_id() * kPerLane % 32) & 0xfu;
  }
  return keep;
}

// Reads the mask of any tile, also one that spans several rows.
__device__ __forceinline__ unsigned read_mask(const TokenView& view, const Tiles& tiles,
                                              const Place& place) {
  if (view.data == nullptr || tiles.in_one_row(place)) {
    const char* from = view.at(place.row, place.column);
    const bool as_vectors = place.count == kTile && view.vectors(from);
    return unpack_mask(view, fetch_mask(view, from, place.count, as_vectors), place.count,
                       as_vectors);
  }
  uint32_t raw = 0;
#pragma unroll 1
  for (int j = 0; j < kPerLane; ++j) {
    const int i = j * 32 + lane_id();
    if (i >= place.count) break;
    const Place one = tiles.of_token(place.row * tiles.width + place.column + i, 1);
    raw |= uint32_t{read_as<uint8_t>(view.at(one.row, one.column))} << (8 * j);
  }
  return unpack_mask(view, raw, place.count, false);
}

// ---- writes ------------------------------------------------------------------------------------

// Writes the lane's four tokens to the contiguous tile at `to`, aligned to 16 bytes. A copy of a
// struct would be split into four stores.
__device__ __forceinline__ void write_vectors(float* to, const float (&x)[kPerLane]) {
  reinterpret_cast<float4*>(to)[lane_id()] = make_float4(x[0], x[1], x[2], x[3]);
}
__device__ __forceinline__ void write_vectors(double* to, const double (&x)[kPerLane]) {
  reinterpret_cast<double2*>(to)[lane_id() * 2] = make_double2(x[0], x[1]);
  reinterpret_cast<double2*>(to)[lane_id() * 2 + 1] = make_double2(x[2], x[3]);
}

// Writes the first `count` tokens at any address.
template <typename A>
__device__ __forceinline__ void write_tile(A* to, int count, A* stage, const A (&x)[kPerLane]) {
  if (count == kTile && reinterpret_cast<uintptr_t>(to) % 16 == 0) return write_vectors(to, x);
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

// ---- host --------------------------------------------------------------------------------------

inline TokenView view_of(const Tensor& t, const char* name) {
  RL_CHECK(t.dim() == 1 || t.dim() == 2, name, ": expected a 1-d or 2-d tensor, got ", t.dim(),
           "-d");
  const ScalarType dtype = t.scalar_type();
  RL_CHECK(dtype == ScalarType::Bool || is_float_dtype(dtype), name, ": expected a float tensor");
  const int64_t bytes = t.element_size();
  TokenView view;
  view.data = static_cast<const char*>(t.const_data_ptr());
  view.step = t.stride(t.dim() - 1) * bytes;
  view.row_step = t.dim() == 2 ? t.stride(0) * bytes : 0;
  view.kind = dtype == ScalarType::Double     ? TokenKind::f64
              : dtype == ScalarType::Float    ? TokenKind::f32
              : dtype == ScalarType::BFloat16 ? TokenKind::bf16
              : dtype == ScalarType::Half     ? TokenKind::f16
                                              : TokenKind::mask;
  if (view.step == bytes) view.vector = static_cast<unsigned>(std::min<int64_t>(16, 4 * bytes));
  return view;
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t d = 0; same && d < a.dim(); ++d) same = a.size(d) == b.size(d);
  return same;
}

// Checks an argument with the shape of `like`; float64 only if both are.
inline TokenView tokens_like(const Tensor& t, const Tensor& like, const char* name) {
  RL_CHECK(is_float_dtype(t.scalar_type()), name, ": expected a float tensor");
  RL_CHECK(same_shape(t, like), name, ": expected the shape of the first argument");
  RL_CHECK((t.scalar_type() == ScalarType::Double) == (like.scalar_type() == ScalarType::Double),
           name, ": float64 goes only with float64");
  return view_of(t, name);
}
inline TokenView tokens_like(const std::optional<Tensor>& t, const Tensor& like, const char* name) {
  return t.has_value() ? tokens_like(*t, like, name) : TokenView{};
}

inline TokenView mask_like(const std::optional<Tensor>& mask, const Tensor& like) {
  if (!mask || mask->numel() == 0) return {};
  RL_CHECK(mask->scalar_type() == ScalarType::Bool, "mask: expected a bool tensor");
  RL_CHECK(same_shape(*mask, like), "mask: expected the shape of the first argument");
  return view_of(*mask, "mask");
}

// Tiles over views with the shape of `like`: one long row if each view has a single stride.
inline Tiles tiles_of(const Tensor& like, std::initializer_list<TokenView> views) {
  const int64_t tokens = like.numel(), width = like.size(like.dim() - 1);
  bool flat = true, vectors = true;
  for (const TokenView& v : views) {
    if (v.data == nullptr) continue;
    flat &= width == tokens || v.row_step == width * v.step;
    vectors &= v.vectors(v.data) && v.vector != 8;
  }
  const int64_t row = flat ? tokens : width;
  return {tokens, row, 1.0 / static_cast<double>(row), flat && vectors ? tokens / kTile : 0};
}

inline unsigned blocks_for(int64_t items, int64_t per_block, int64_t most) {
  return static_cast<unsigned>(std::min((items + per_block - 1) / per_block, most));
}

}  // namespace rl
