// Logits of a row in memory and in registers, as tiles: one warp's 32 x 8 vectors of 16 bytes, of
// rows at any alignment.
#pragma once

#include "../common/rows.h"
#include "device.cuh"

namespace rl {

constexpr int kTileVectors = 8;  // per lane, all in flight

// Logits in registers: a word holds one fp32 or fp64 logit, or two 16-bit ones.
template <typename T>
struct Words {
  using Word = T;
  static constexpr int kPerWord = 1;
  __device__ __forceinline__ static Word max(Word a, Word b) { return std::fmax(a, b); }
  __device__ __forceinline__ static T max_of(Word a) { return a; }
  __device__ __forceinline__ static void unpack(Word a, T (&x)[1]) { x[0] = a; }
  __device__ __forceinline__ static Word pack(const T (&x)[1]) { return x[0]; }
  __device__ __forceinline__ static Word neg_inf() { return -T(INFINITY); }
};

template <typename T, typename Pair>
struct PairWords {
  using Word = uint32_t;
  static constexpr int kPerWord = 2;
  // If one operand is NaN, the other one.
  __device__ __forceinline__ static Word max(Word a, Word b) {
    return bits<Word>(__hmax2(bits<Pair>(a), bits<Pair>(b)));
  }
  template <typename To, typename From>
  __device__ __forceinline__ static To bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
  }
};

template <>
struct Words<__nv_bfloat16> : PairWords<__nv_bfloat16, __nv_bfloat162> {
  __device__ __forceinline__ static void unpack(Word a, float (&x)[2]) {
    x[0] = __uint_as_float(a << 16);
    x[1] = __uint_as_float(a & 0xffff0000u);
  }
  __device__ __forceinline__ static float max_of(Word a) {
    return std::fmax(__uint_as_float(a << 16), __uint_as_float(a & 0xffff0000u));
  }
  __device__ __forceinline__ static Word pack(const float (&x)[2]) {
    return bits<Word>(__floats2bfloat162_rn(x[0], x[1]));
  }
  __device__ __forceinline__ static Word neg_inf() { return 0xff80ff80u; }
};

template <>
struct Words<__half> : PairWords<__half, __half2> {
  __device__ __forceinline__ static void unpack(Word a, float (&x)[2]) {
    const float2 both = __half22float2(bits<__half2>(a));
    x[0] = both.x;
    x[1] = both.y;
  }
  __device__ __forceinline__ static float max_of(Word a) {
    float x[2];
    unpack(a, x);
    return std::fmax(x[0], x[1]);
  }
  __device__ __forceinline__ static Word pack(const float (&x)[2]) {
    return bits<Word>(__floats2half2_rn(x[0], x[1]));
  }
  __device__ __forceinline__ static Word neg_inf() { return 0xfc00fc00u; }
};

// A vector of kCount elements: 16 bytes, or the same elements after conversion to another type.
template <typename T, int kCount = kPerVector<T>>
struct alignas(kCount * sizeof(T)) Pack {
  static constexpr int kWords = kCount / Words<T>::kPerWord;
  typename Words<T>::Word word[kWords];
};

template <typename T>
constexpr int kTileColumns = 32 * kTileVectors * kPerVector<T>;

// A lane's vectors of a tile, in registers.
template <typename T>
struct Tile {
  Pack<T> vector[kTileVectors];
};

// Streaming read of data that is not read again. `from` is 16-byte aligned.
template <typename T>
__device__ __forceinline__ Pack<T> read_pack(const T* from) {
  Pack<T> x;
  *reinterpret_cast<int4*>(&x) = __ldcs(reinterpret_cast<const int4*>(from));
  return x;
}

// Cached read, for data that is read twice. (The compiler would split a plain load.)
template <typename T>
__device__ __forceinline__ Pack<T> read_pack_cached(const T* from) {
  Pack<T> x;
  *reinterpret_cast<int4*>(&x) = __ldca(reinterpret_cast<const int4*>(from));
  return x;
}

// Plain read from global or shared memory.
template <typename T>
__device__ __forceinline__ Pack<T> read_pack_once(const T* from) {
  Pack<T> x;
  *reinterpret_cast<int4*>(&x) = *reinterpret_cast<const int4*>(from);
  return x;
}

// Streaming write.
template <typename T, int kCount>
__device__ __forceinline__ void write_pack(T* to, const Pack<T, kCount>& x) {
  using Whole = std::conditional_t<sizeof(x) == 16, int4, int2>;
  static_assert(sizeof(x) == sizeof(Whole));
  __stcs(reinterpret_cast<Whole*>(to), *reinterpret_cast<const Whole*>(&x));
}

// Offset of `row` in elements from the last boundary of kCount elements (default: 16 bytes).
template <int kCount, typename T>
__device__ __forceinline__ int skew_of(const T* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) % (kCount * sizeof(T)) / sizeof(T));
}
template <typename T>
__device__ __forceinline__ int skew_of(const T* row) {
  return skew_of<kPerVector<T>>(row);
}

// The 16 bytes at offset `skew` into two adjacent aligned packs.
template <typename T>
__device__ __forceinline__ Pack<T> unaligned_pack(const Pack<T>& low, const Pack<T>& high,
                                                  int skew) {
  static_assert(sizeof(T) == 2);
  uint32_t w[8], a[6], b[5];
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = low.word[i], w[i + 4] = high.word[i];
#pragma unroll
  for (int i = 0; i < 6; ++i) a[i] = skew & 4 ? w[i + 2] : w[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) b[i] = skew & 2 ? a[i + 1] : a[i];
  Pack<T> x;
#pragma unroll
  for (int i = 0; i < 4; ++i) x.word[i] = __funnelshift_r(b[i], b[i + 1], (skew & 1) * 16);
  return x;
}

// 16 bytes of a row in global memory from `column`, with -inf outside the row.
template <typename T>
__device__ __forceinline__ Pack<T> guarded_pack(const T* row, int64_t column, int64_t width) {
  constexpr int kPerWord = Words<T>::kPerWord;
  Pack<T> x;
#pragma unroll
  for (int i = 0; i < Pack<T>::kWords; ++i) {
    acc_t<T> both[kPerWord];
#pragma unroll
    for (int j = 0; j < kPerWord; ++j) {
      const int64_t at = column + i * kPerWord + j;
      both[j] = at >= 0 && at < width ? load(row[at]) : -acc_t<T>(INFINITY);
    }
    x.word[i] = Words<T>::pack(both);
  }
  return x;
}

enum class Start { aligned, anywhere, rare };

// Tiles of a row in global memory. aligned: the row starts at a 16-byte boundary. rare: any
// alignment, element by element.
template <typename T, Start kStart>
struct GlobalTiles {
  static constexpr bool kAligned = kStart == Start::aligned;
  static constexpr bool kReadsWhole = kStart != Start::rare, kGuards = true;
  const T* row;
  int64_t width;

  // Number of leading tiles valid for read(). A misaligned tile reads up to the next boundary.
  __device__ __forceinline__ int64_t whole() const {
    constexpr int64_t kColumns = kTileColumns<T>;
    return (kAligned ? width : width - kPerVector<T>) / kColumns;
  }
  __device__ __forceinline__ int64_t count() const {
    return (width + kTileColumns<T> - 1) / kTileColumns<T>;
  }
  __device__ __forceinline__ int64_t columns(int64_t tile) const {
    return width - tile * kTileColumns<T>;
  }
  __device__ __forceinline__ int64_t column(int64_t tile, int k) const {
    return tile * kTileColumns<T> + (k * 32 + threadIdx.x % 32) * kPerVector<T>;
  }
  __device__ __forceinline__ Tile<T> read(int64_t tile) const {
    Tile<T> x;
    const T* from = row + column(tile, 0);
    constexpr int kStep = 32 * kPerVector<T>;
    if constexpr (kAligned) {
#pragma unroll
      for (int k = 0; k < kTileVectors; ++k) x.vector[k] = read_pack(from + k * kStep);
    } else if constexpr (sizeof(T) == 2) {
      const int skew = skew_of(row);
      const T* base = from - skew;
#pragma unroll
      for (int k = 0; k < kTileVectors; ++k) {
        const T* low = base + k * kStep;
        x.vector[k] = unaligned_pack<T>(read_pack_cached(low), read_pack_cached(low + 8), skew);
      }
    } else {
#pragma unroll
      for (int k = 0; k < kTileVectors; ++k) {
#pragma unroll
        for (int i = 0; i < Pack<T>::kWords; ++i) x.vector[k].word[i] = from[k * kStep + i];
      }
    }
    return x;
  }
  // Reads any tile, with -inf after the end of the row.
  __device__ __forceinline__ Tile<T> read_guarded(int64_t tile) const {
    Tile<T> x;
#pragma unroll
    for (int k = 0; k < kTileVectors; ++k) {
      const int64_t at = column(tile, k);
      if (kAligned && at + kPerVector<T> <= width) {
        x.vector[k] = read_pack(row + at);
      } else if (at < width) {
        x.vector[k] = guarded_pack(row, at, width);
      } else {
#pragma unroll
        for (int i = 0; i < Pack<T>::kWords; ++i) x.vector[k].word[i] = Words<T>::neg_inf();
      }
    }
    return x;
  }
};

}  // namespace rl
