// Softmax of a row of V logits on CUDA: its statistics and its gradient, for every op on logits.
//
// Exponentials are base 2: e_j = 2^(c u_j - b), c = log2(e) dz/du, b = c * (largest u) rounded. The
// same b stands in every term, so that its rounding cancels.
//
// Reduction. A row is cut into tiles of 32 x 8 16-byte vectors, counted from its first element. One
// warp reduces a tile: lane l takes the vectors l, l + 32, ..., adds up each as a tree and then the
// vectors in ascending order, and the lanes merge by shuffles. The tiles merge in one fixed order,
// at most kSlots at a time. Bits depend on V and the dtype alone: not on the alignment of the row,
// on the number of warps or blocks that share it, or on whether the entropy is wanted. Products
// that enter a sum are rounded by name or fused by name: left to the compiler, two kernels could
// differ.
#pragma once

#include "../common/rows.h"
#include "device.cuh"

namespace rl {

constexpr int kTileVectors = 8;  // of a lane, all in flight at once
constexpr int kSlots = 256;      // tiles that wait for their merge

template <typename A>
constexpr A kLog2E = A(1.4426950408889634);
template <typename A>
constexpr A kLn2 = A(0.6931471805599453);

// Beyond this |b| an ulp of b or z is several powers of two ("far"): huge logits, or a tiny
// temperature. Then z is rounded before its maximum is taken off, as log_softmax of z rounds it.
constexpr float kFarBase = 67108864.0f;  // 2^26
constexpr float kFloor2 = -256.0f;       // 2^x of anything below is 0 in fp32
constexpr float kSharp = 4096.0f;        // of c: an error of a fast tanh is beyond 2^-11 of z
constexpr double kFastCap = 64;          // largest soft-cap whose tanh comes from ex2 and rcp

enum Cap : int { kNoCap, kSmallCap, kAnyCap };

// Variants that are right, but not tuned: little code.
template <typename A, Cap kCap>
constexpr bool is_rare = kCap == kAnyCap || std::is_same_v<A, double>;

__device__ __forceinline__ float exp2_fast(float x) {
#if RL_PTX
  float y;  // relative error 2^-22; a result below 2^-126 is 0
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return ::exp2f(x);
#endif
}
__device__ __forceinline__ double exp2_fast(double x) { return ::exp2(x); }

__device__ __forceinline__ float reciprocal(float x) {
#if RL_PTX
  float y;  // relative error 2^-23
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

// Not part of a fused product and sum.
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double rounded_product(double a, double b) { return __dmul_rn(a, b); }

template <typename A>
__device__ __forceinline__ A bounded2(A x) {  // for products with 2^x: 0 and not 0 * inf
  return std::fmax(x, A(std::is_same_v<A, double> ? -2048 : kFloor2));
}

__device__ __forceinline__ float warp_max(float x) {
  // Floats in the order of signed integers: one instruction instead of five shuffles.
  const auto flip = [](int i) { return i ^ ((i >> 31) & 0x7fffffff); };
  return __int_as_float(flip(__reduce_max_sync(~0u, flip(__float_as_int(x)))));
}
__device__ __forceinline__ double warp_max(double x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = std::fmax(x, __shfl_xor_sync(~0u, x, lanes));
  return x;
}

template <typename A>
__device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

// ---- logits as they lie in memory ---------------------------------------------------------------

// The unit in which kernels hold logits: two of 16 bits in a word, or one.
template <typename T>
struct Cells {
  using Cell = T;
  static constexpr int kEach = 1;
  __device__ __forceinline__ static Cell larger(Cell a, Cell b) { return std::fmax(a, b); }
  __device__ __forceinline__ static T largest(Cell a) { return a; }
  __device__ __forceinline__ static void split(Cell a, T (&x)[1]) { x[0] = a; }
  __device__ __forceinline__ static Cell join(const T (&x)[1]) { return x[0]; }
  __device__ __forceinline__ static Cell nothing() { return -T(INFINITY); }
};

template <typename T, typename Pair>
struct PairCells {
  using Cell = uint32_t;
  static constexpr int kEach = 2;
  // Of a NaN and a number: the number.
  __device__ __forceinline__ static Cell larger(Cell a, Cell b) {
    return bits<Cell>(__hmax2(bits<Pair>(a), bits<Pair>(b)));
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
struct Cells<__nv_bfloat16> : PairCells<__nv_bfloat16, __nv_bfloat162> {
  __device__ __forceinline__ static void split(Cell a, float (&x)[2]) {
    x[0] = __uint_as_float(a << 16);
    x[1] = __uint_as_float(a & 0xffff0000u);
  }
  __device__ __forceinline__ static float largest(Cell a) {
    return std::fmax(__uint_as_float(a << 16), __uint_as_float(a & 0xffff0000u));
  }
  __device__ __forceinline__ static Cell join(const float (&x)[2]) {
    return bits<Cell>(__floats2bfloat162_rn(x[0], x[1]));
  }
  __device__ __forceinline__ static Cell nothing() { return 0xff80ff80u; }
};

template <>
struct Cells<__half> : PairCells<__half, __half2> {
  __device__ __forceinline__ static void split(Cell a, float (&x)[2]) {
    const float2 both = __half22float2(bits<__half2>(a));
    x[0] = both.x;
    x[1] = both.y;
  }
  __device__ __forceinline__ static float largest(Cell a) {
    float x[2];
    split(a, x);
    return std::fmax(x[0], x[1]);
  }
  __device__ __forceinline__ static Cell join(const float (&x)[2]) {
    return bits<Cell>(__floats2half2_rn(x[0], x[1]));
  }
  __device__ __forceinline__ static Cell nothing() { return 0xfc00fc00u; }
};

// What one instruction moves: 16 bytes, or the elements of another type that they turn into.
template <typename T, int kCount = kPerVector<T>>
struct alignas(kCount * sizeof(T)) Pack {
  static constexpr int kCells = kCount / Cells<T>::kEach;
  typename Cells<T>::Cell at[kCells];
};

template <typename T>
constexpr int kTileColumns = 32 * kTileVectors * kPerVector<T>;

template <typename T>
struct Tile {
  Pack<T> vector[kTileVectors];
};

// `from` is 16-byte aligned. The read passes the caches by: nobody comes again.
template <typename T>
__device__ __forceinline__ Pack<T> read_pack(const T* from) {
  Pack<T> x;
  *reinterpret_cast<int4*>(&x) = __ldcs(reinterpret_cast<const int4*>(from));
  return x;
}

// For a read that comes twice. (As one vector: the compiler would narrow a plain one.)
template <typename T>
__device__ __forceinline__ Pack<T> read_pack_cached(const T* from) {
  Pack<T> x;
  *reinterpret_cast<int4*>(&x) = __ldca(reinterpret_cast<const int4*>(from));
  return x;
}

// From global or shared memory.
template <typename T>
__device__ __forceinline__ Pack<T> read_pack_once(const T* from) {
  Pack<T> x;
  *reinterpret_cast<int4*>(&x) = *reinterpret_cast<const int4*>(from);
  return x;
}

// The write passes the caches by.
template <typename T, int kCount>
__device__ __forceinline__ void write_pack(T* to, const Pack<T, kCount>& x) {
  using Whole = std::conditional_t<sizeof(x) == 16, int4, int2>;
  static_assert(sizeof(x) == sizeof(Whole));
  __stcs(reinterpret_cast<Whole*>(to), *reinterpret_cast<const Whole*>(&x));
}

// Elements of `row` past the last boundary of kCount of them, by default of 16 bytes.
template <int kCount, typename T>
__device__ __forceinline__ int skew_of(const T* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) % (kCount * sizeof(T)) / sizeof(T));
}
template <typename T>
__device__ __forceinline__ int skew_of(const T* row) {
  return skew_of<kPerVector<T>>(row);
}

// The 16 bytes that start `skew` elements behind two aligned packs.
template <typename T>
__device__ __forceinline__ Pack<T> shifted(const Pack<T>& low, const Pack<T>& high, int skew) {
  static_assert(sizeof(T) == 2);
  uint32_t w[8], a[6], b[5];
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = low.at[i], w[i + 4] = high.at[i];
#pragma unroll
  for (int i = 0; i < 6; ++i) a[i] = skew & 4 ? w[i + 2] : w[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) b[i] = skew & 2 ? a[i + 1] : a[i];
  Pack<T> x;
#pragma unroll
  for (int i = 0; i < 4; ++i) x.at[i] = __funnelshift_r(b[i], b[i + 1], (skew & 1) * 16);
  return x;
}

// 16 bytes of columns [column, ...) of a row in global memory, -inf beyond its ends.
template <typename T>
__device__ __forceinline__ Pack<T> guarded_pack(const T* row, int64_t column, int64_t width) {
  constexpr int kEach = Cells<T>::kEach;
  Pack<T> x;
#pragma unroll
  for (int i = 0; i < Pack<T>::kCells; ++i) {
    acc_t<T> both[kEach];
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int64_t at = column + i * kEach + j;
      both[j] = at >= 0 && at < width ? load(row[at]) : -acc_t<T>(INFINITY);
    }
    x.at[i] = Cells<T>::join(both);
  }
  return x;
}

enum class Start { aligned, anywhere, rare };

// Tiles of a row in global memory. aligned: the row starts on a 16-byte boundary. rare: anywhere,
// in little code.
template <typename T, Start kStart>
struct GlobalTiles {
  static constexpr bool kAligned = kStart == Start::aligned;
  static constexpr bool kReadsWhole = kStart != Start::rare, kGuards = true;
  const T* row;
  int64_t width;

  // Leading tiles that read() may take. A misaligned one reads up to the boundary behind it.
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
        x.vector[k] = shifted<T>(read_pack_cached(low), read_pack_cached(low + 8), skew);
      }
    } else {
#pragma unroll
      for (int k = 0; k < kTileVectors; ++k) {
#pragma unroll
        for (int i = 0; i < Pack<T>::kCells; ++i) x.vector[k].at[i] = from[k * kStep + i];
      }
    }
    return x;
  }
  // Any tile, elements behind the row's end as -inf.
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
        for (int i = 0; i < Pack<T>::kCells; ++i) x.vector[k].at[i] = Cells<T>::nothing();
      }
    }
    return x;
  }
};

// ---- statistics ---------------------------------------------------------------------------------

// Of a part of a row: largest logit, sum of e_j, sum of e_j (c u_j - b), with b = base(u of max).
template <typename A>
struct Partial {
  A max, sum, weighted;
};

// 2^(c u - b) of the logits of one row.
template <typename A, Cap kCap>
struct Exponent {
  RowMaths<A> f;
  A c, k;  // k: tanh(x / softcap) = 1 - 2 / (2^(k x) + 1)

  __device__ __forceinline__ explicit Exponent(const RowMaths<A>& maths)
      : f(maths), c(dz_du<kCap != kNoCap>(f) * kLog2E<A>), k(0) {
    if constexpr (kCap == kSmallCap) k = 2 * kLog2E<A> / f.softcap;
  }
  __device__ __forceinline__ A u(A logit) const {
    if constexpr (kCap == kSmallCap) {
      return std::fma(A(-2), reciprocal(exp2_fast(logit * k) + 1), A(1));
    } else {
      return unscaled<kCap == kAnyCap>(logit, f);
    }
  }
  // Whether another way to u is another z by much: then all take the one of the row's sums.
  __device__ __forceinline__ bool sharp() const { return kCap == kSmallCap && c > kSharp; }
  __device__ __forceinline__ A target_u(A logit) const {
    if (sharp()) return u(logit);
    return unscaled<kCap != kNoCap>(logit, f);
  }
  // Parts whose largest logit is that low weigh nothing in a row that is not far, whose b is above
  // -kFarBase; -inf and NaN are among them.
  __device__ __forceinline__ static bool weighs(A b) { return b > -2 * kFarBase; }
  // b of a part with that largest logit; 0 where it weighs nothing, so that its terms are 0.
  __device__ __forceinline__ A base(A max) const {
    const A b = rounded_product(u(max), c);
    return weighs(b) ? b : A(0);
  }
  __device__ __forceinline__ A z(A logit) const {  // rounded
    return rounded_product(u(logit), dz_du<kCap != kNoCap>(f));
  }
  __device__ __forceinline__ bool far(A max) const {
    // A soft-capped -inf is a finite z.
    const bool has_max = kCap == kNoCap ? max > -A(INFINITY) : max == max;
    return has_max && !(std::fabs(u(max) * c) <= kFarBase);
  }
};

// A warp reduces a tile. kFar: relative to z of `top`, the largest logit of the row. kGuarded: only
// the first `columns` of the tile count; the others are -inf, whose soft-capped z is not.
template <bool kFar, bool kGuarded, bool kEntropy, typename T, typename A, Cap kCap>
__device__ __forceinline__ Partial<A> reduce_tile(const Tile<T>& x, const Exponent<A, kCap>& f,
                                                  A top, int64_t columns) {
  using C = Cells<T>;
  constexpr int kEach = C::kEach;
  typename C::Cell largest = x.vector[0].at[0];
#pragma unroll
  for (int k = 0; k < kTileVectors; ++k) {
#pragma unroll
    for (int i = 0; i < Pack<T>::kCells; ++i) largest = C::larger(largest, x.vector[k].at[i]);
  }
  const A max = warp_max(static_cast<A>(C::largest(largest)));
  const A b = kFar ? f.z(top) : f.base(max);
  // Sums of a vector as a tree: a sum that a large term decides is rounded less often.
  A sum = 0, weighted[2] = {};
#pragma unroll
  for (int k = 0; k < kTileVectors; ++k) {
    constexpr int kSize = kPerVector<T>;
    if (kGuarded && k * 32 * kSize >= columns) continue;
    A e[kSize];
#pragma unroll
    for (int i = 0; i < Pack<T>::kCells; ++i) {
      A both[kEach];
      C::split(x.vector[k].at[i], both);
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int at = i * kEach + j;
        const A exponent = kFar ? (f.z(both[j]) - b) * kLog2E<A> : std::fma(f.u(both[j]), f.c, -b);
        e[at] = exp2_fast(exponent);
        if constexpr (kGuarded && kCap != kNoCap) {
          if ((k * 32 + threadIdx.x % 32) * kSize + at >= columns) e[at] = 0;
        }
        if constexpr (kEntropy) {
          weighted[at % 2] = std::fma(e[at], bounded2(exponent), weighted[at % 2]);
        }
      }
    }
#pragma unroll
    for (int half = kSize / 2; half > 0; half /= 2) {
#pragma unroll
      for (int j = 0; j < half; ++j) e[j] += e[j + half];
    }
    sum += e[0];
  }
  return {max, warp_sum(sum), kEntropy ? warp_sum(weighted[0] + weighted[1]) : A(0)};
}

// The parts of a row that await their merge, in shared memory.
template <typename A>
struct Slots {
  A max[kSlots], sum[kSlots], weighted[kSlots];

  __device__ __forceinline__ void put(int i, const Partial<A>& part) {
    max[i] = part.max;
    sum[i] = part.sum;
    weighted[i] = part.weighted;
  }
};

// Merges parts [0, count); every warp that calls gets the same bits.
template <bool kFar, bool kEntropy, typename A, Cap kCap>
__device__ __forceinline__ Partial<A> merge_slots(const Slots<A>& slots, int count,
                                                  const Exponent<A, kCap>& f) {
  const int lane = threadIdx.x % 32;
  Partial<A> all{-A(INFINITY), 0, 0};
#pragma unroll 1
  for (int i = lane; i < count; i += 32) all.max = std::fmax(all.max, slots.max[i]);
  all.max = warp_max(all.max);
  const A b = f.base(all.max);
#pragma unroll 1
  for (int i = lane; i < count; i += 32) {
    const A theirs = rounded_product(f.u(slots.max[i]), f.c);
    A shift = 0, factor = 1;
    if constexpr (!kFar) {
      shift = f.weighs(theirs) ? theirs - b : A(0);
      factor = f.weighs(theirs) ? exp2_fast(shift) : A(0);  // 0 * NaN stays NaN
    }
    all.sum = std::fma(factor, slots.sum[i], all.sum);
    if constexpr (kEntropy) {
      const A moved = std::fma(slots.sum[i], shift, slots.weighted[i]);
      all.weighted = std::fma(factor, moved, all.weighted);
    }
  }
  all.sum = warp_sum(all.sum);
  if constexpr (kEntropy) all.weighted = warp_sum(all.weighted);
  return all;
}

// The warps of a block reduce tiles [begin, begin + count); put(i, part) takes tile begin + i.
template <bool kFar, bool kEntropy, typename Tiles, typename A, Cap kCap, typename Put>
__device__ __forceinline__ void reduce_tiles(const Tiles& tiles, int64_t begin, int count,
                                             const Exponent<A, kCap>& f, A top, const Put& put) {
  const int warps = blockDim.x / 32;
  int i = threadIdx.x / 32;
  if constexpr (Tiles::kReadsWhole) {
    const int64_t left = tiles.whole() - begin;
    const int whole = static_cast<int>(left < count ? left : count);
#pragma unroll 1
    for (; i < whole; i += warps) {
      put(i, reduce_tile<kFar, false, kEntropy>(tiles.read(begin + i), f, top, 0));
    }
  }
  if constexpr (Tiles::kGuards) {
#pragma unroll 1
    for (; i < count; i += warps) {
      put(i, reduce_tile<kFar, true, kEntropy>(tiles.read_guarded(begin + i), f, top,
                                               tiles.columns(begin + i)));
    }
  }
}

// A block reduces all tiles of a row.
template <bool kFar, bool kEntropy, typename Tiles, typename A, Cap kCap>
__device__ __forceinline__ Partial<A> reduce_row(const Tiles& tiles, const Exponent<A, kCap>& f,
                                                 Slots<A>& slots, A top) {
  const int64_t count = tiles.count();
  int64_t done = 0;
  int carried = 0;  // slot 0 holds what was merged before
#pragma unroll 1
  while (true) {
    const int64_t left = count - done;
    const int open = static_cast<int>(left < kSlots - carried ? left : kSlots - carried);
    reduce_tiles<kFar, kEntropy>(tiles, done, open, f, top, [&](int i, const Partial<A>& part) {
      if (threadIdx.x % 32 == 0) slots.put(carried + i, part);
    });
    __syncthreads();
    const Partial<A> all = merge_slots<kFar, kEntropy>(slots, carried + open, f);
    done += open;
    if (done == count) return all;
    __syncthreads();  // every warp has read the slots
    if (threadIdx.x == 0) slots.put(0, all);
    carried = 1;
  }
}

// By the way that suits the row.
template <bool kEntropy, typename T, typename A, Cap kCap>
__device__ __forceinline__ Partial<A> reduce_row(const T* row, int64_t width,
                                                 const Exponent<A, kCap>& f, Slots<A>& slots) {
  if constexpr (is_rare<A, kCap>) {
    return reduce_row<false, kEntropy>(GlobalTiles<T, Start::rare>{row, width}, f, slots, A(0));
  } else if (skew_of(row) == 0) {
    return reduce_row<false, kEntropy>(GlobalTiles<T, Start::aligned>{row, width}, f, slots, A(0));
  } else {
    return reduce_row<false, kEntropy>(GlobalTiles<T, Start::anywhere>{row, width}, f, slots, A(0));
  }
}

// The same relative to the row's largest logit, which is known: a rare second walk.
template <bool kEntropy, typename T, typename A, Cap kCap>
__device__ __forceinline__ Partial<A> reduce_row_far(const T* row, int64_t width,
                                                     const Exponent<A, kCap>& f, Slots<A>& slots,
                                                     A top) {
  __syncthreads();
  return reduce_row<true, kEntropy>(GlobalTiles<T, Start::rare>{row, width}, f, slots, top);
}

// The sums of a row with respect to its largest logit, and the statistics that come from them.
template <typename A, Cap kCap>
struct RowSums {
  Exponent<A, kCap> f;
  Partial<A> all;
  bool far;
  A u_max, b;     // near: e_j = 2^(c u_j - b)
  A away;         // ln of the term of u_max: what b lost by rounding
  A shifted_lse;  // ln sum_j e^(z_j - z_max), z_max exact
  A mean;         // of z_j - z_max, z_max exact
  RowStats<A> stats;

  __device__ __forceinline__ RowSums(const Exponent<A, kCap>& exponent, const Partial<A>& sums,
                                     bool is_far)
      : f(exponent), all(sums), far(is_far) {
    u_max = f.u(all.max);
    b = f.base(all.max);
    const bool exact = !far && std::fabs(u_max) < A(INFINITY);
    away = exact ? rounded_product(std::fma(u_max, f.c, -b), kLn2<A>) : A(0);
    shifted_lse = log(all.sum) - away;
    mean = std::fma(all.weighted / all.sum, kLn2<A>, -away);
    const A z_max = f.z(all.max);
    const A lost = exact ? std::fma(u_max, dz_du<kCap != kNoCap>(f.f), -z_max) : A(0);
    stats = {z_max, shifted_lse + lost, mean + lost};
  }
  // log p of a logit, with one rounding at the size of the result: what the difference u - u_max
  // (Dekker's sum of two) and 1 / temperature lost is added to the small term first.
  __device__ __forceinline__ A logprob(A logit) const {
    const RowMaths<A>& g = f.f;
    if (far) return (f.z(logit) - stats.max) - shifted_lse;
    const A u = f.target_u(logit), distance = u - u_max;
    const A factor = kCap != kNoCap ? g.softcap : A(1);
    if (!(distance > -A(INFINITY))) return distance - shifted_lse;  // -inf, or NaN
    const A back = distance - u;
    const A lost = (u - (distance - back)) - (u_max + back);
    const A missed = rounded_product(std::fma(distance, g.scale_low, lost * g.scale), factor);
    return std::fma(distance * factor, g.scale, missed - shifted_lse);
  }
};

// ---- gradient -----------------------------------------------------------------------------------

// dL/dlogits_j of all j but the target, from the statistics, g = dL/dlogprob and h = dL/dentropy:
//   -p_j (h (z_j - max - mean) + g) dz_j/dlogits_j, p_j = 2^(c u_j - b) times what the row shares.
// Every kernel takes it from the statistics as they are stored, so that all write the same bits.
// h weighs z_j - max - mean and not log p_j + entropy: that leaves out the rounding of shifted_lse,
// which the whole row would share, and a sum over the row keep.
template <typename A, Cap kCap, bool kEntropy>
struct RowGradient {
  static constexpr int kUnroll = is_rare<A, kCap> ? 1 : 4;  // packs in flight
  Exponent<A, kCap> f;
  RowStats<A> stats;
  A dz, g_row, h_row;
  bool far;  // p_j = e^(z_j - max - shifted_lse)
  A b;       // near
  A g, h;    // the gradient is p (or e_j) times g + h times the exponent

  // dz/dlogit of at()'s `chain` = 1.
  __device__ __forceinline__ static A chain_unit(const Exponent<A, kCap>& f) {
    return kCap == kSmallCap ? 4 * f.f.scale : f.f.scale;
  }
  __device__ __forceinline__ RowGradient(const Exponent<A, kCap>& exponent,
                                         const RowStats<A>& row_stats, A grad_logprob,
                                         A grad_entropy)
      : f(exponent),
        stats(row_stats),
        dz(dz_du<kCap != kNoCap>(f.f)),
        g_row(grad_logprob),
        h_row(grad_entropy) {
    const A u = stats.max / dz;
    b = rounded_product(u, f.c);
    far = !(std::fabs(b) <= A(kFarBase));
    // z_j - max = ln(2) exponent + away
    A away = std::fma(-std::fma(u, f.c, -b), kLn2<A>, std::fma(u, dz, -stats.max)), share = 1;
    if (far) {
      away = stats.shifted_lse;
    } else {
      share = exp_far(away - stats.shifted_lse);
    }
    share *= -chain_unit(f);
    g = std::fma(h_row, away - stats.mean, g_row) * share;
    h = h_row * kLn2<A> * share;
  }

  // Rows that at<true>() takes.
  __device__ __forceinline__ bool rare() const { return far || f.sharp(); }
  template <bool kRare>
  __device__ __forceinline__ A at(A logit) const {
    A u, chain = 1;
    if constexpr (kCap == kSmallCap) {
      // tanh = 1 - 2 r of |logit|, so that 1 - tanh^2 = 4 (r - r^2) keeps its digits; g and h hold
      // the 4.
      const A r = reciprocal(exp2_fast(std::fabs(logit) * f.k) + 1);
      u = kRare ? f.u(logit) : std::copysign(std::fma(A(-2), r, A(1)), logit);
      chain = std::fma(-r, r, r);
    } else {
      u = f.u(logit);
      if constexpr (kCap == kAnyCap) chain = sech2(logit / f.f.softcap);
    }
    const A exponent = kRare && far
                           ? ((rounded_product(u, dz) - stats.max) - stats.shifted_lse) * kLog2E<A>
                           : std::fma(u, f.c, -b);
    A p = exp2_fast(exponent);
    if constexpr (kEntropy) {
      p *= std::fma(bounded2(exponent), h, g);
    } else {
      p *= g;
    }
    return kCap != kNoCap ? p * chain : p;
  }
  // The target's own, with 1 - p free of cancellation.
  __device__ __forceinline__ A at_target(A logit) const {
    const A u = f.target_u(logit);
    const A away = far ? rounded_product(u, dz) - stats.max : std::fma(u, dz, -stats.max);
    return target_gradient<kCap != kNoCap>(logit, away - stats.shifted_lse,
                                           at_least(exp_floor<A>(), away), g_row, h_row, stats.mean,
                                           f.f);
  }
};

// The 16-byte packs [first, first + count) of a row that lie inside it, counted from the boundary
// at or before its start; and of the ends that no pack covers, one element a thread.
template <typename T>
struct Share {
  int64_t first, single, width;
  int count, skew;

  // Packs [begin, end) of the row; `ends`: and its ends.
  __device__ __forceinline__ Share(const T* row, int64_t row_width, int64_t begin, int64_t end,
                                   bool ends)
      : width(row_width), skew(skew_of(row)) {
    constexpr int kSize = kPerVector<T>;
    const int64_t inside = skew > 0, behind = (width + skew) / kSize;
    first = begin > inside ? begin : inside;
    const int64_t last = end < behind ? end : behind;
    count = static_cast<int>(last > first ? last - first : 0);
    const int thread = threadIdx.x;
    const int head = skew > 0 ? kSize - skew : 0;
    if (behind < inside) {  // less than one pack
      single = ends ? thread : width;
    } else {
      single = !ends ? width : thread < head ? thread : behind * kSize - skew + (thread - head);
    }
  }
  // An even share of the row for block `rank` of `blocks`.
  __device__ __forceinline__ static Share even(const T* row, int64_t width, int rank, int blocks) {
    const int64_t packs = width / kPerVector<T> + 2, each = (packs + blocks - 1) / blocks;
    return Share(row, width, rank * each, (rank + 1) * each, rank == 0);
  }
  __device__ __forceinline__ int64_t column(int v) const {
    return (first + v) * kPerVector<T> - skew;
  }
  // Whether write_gradient() or `single` gives that column to this thread.
  __device__ __forceinline__ bool owns(int64_t at) const {
    const int64_t v = (at + skew) / kPerVector<T> - first;
    if (v < 0 || v >= count) return single == at;
    return (count - 1 - v) % blockDim.x == threadIdx.x;
  }
};

// Zeros for the share that block `rank` of `blocks` has of a row.
template <typename T>
__device__ __forceinline__ void zero_row(T* out, int64_t width, int rank, int blocks) {
  const auto share = Share<T>::even(out, width, rank, blocks);
  for (int v = threadIdx.x; v < share.count; v += blockDim.x) {
    write_pack(out + share.column(v), Pack<T>{});
  }
  if (share.single < share.width) out[share.single] = T{};
}

// Writes the gradient of a share of a row by a block of kThreads; `from` is where pack 0 of the
// share lies, and `out` may be the row itself, or of a narrower type O. From the last pack to the
// first: what was read last may still be in a cache.
template <int kThreads, bool kRare, typename T, typename O, typename Gradient>
__device__ __forceinline__ void write_gradient(const Gradient& grad, const Share<T>& share,
                                               const T* from, O* out) {
  using From = Cells<T>;
  using To = Cells<O>;
  constexpr int kUnroll = Gradient::kUnroll, kSize = kPerVector<T>, kStep = kThreads * kSize;
  const auto of = [&](const Pack<T>& x) {
    acc_t<T> each[kSize];
#pragma unroll
    for (int i = 0; i < Pack<T>::kCells; ++i) {
      acc_t<T> both[From::kEach];
      From::split(x.at[i], both);
#pragma unroll
      for (int j = 0; j < From::kEach; ++j) {
        each[i * From::kEach + j] = grad.template at<kRare>(both[j]);
      }
    }
    Pack<O, kSize> y;
#pragma unroll
    for (int i = 0; i < Pack<O, kSize>::kCells; ++i) {
      acc_t<O> both[To::kEach];
#pragma unroll
      for (int j = 0; j < To::kEach; ++j) both[j] = each[i * To::kEach + j];
      y.at[i] = To::join(both);
    }
    return y;
  };
  int v = share.count - 1 - static_cast<int>(threadIdx.x);
  const T* x_ptr = from + int64_t{v} * kSize;
  O* y_ptr = out + share.column(v);
  if (skew_of<kSize>(out) == share.skew) {
#pragma unroll 1
    for (; v >= (kUnroll - 1) * kThreads; v -= kUnroll * kThreads) {
      Pack<T> x[kUnroll];
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) x[k] = read_pack_once(x_ptr - k * kStep);
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) write_pack(y_ptr - k * kStep, of(x[k]));
      x_ptr -= kUnroll * kStep;
      y_ptr -= kUnroll * kStep;
    }
#pragma unroll 1
    for (; v >= 0; v -= kThreads, x_ptr -= kStep, y_ptr -= kStep) {
      write_pack(y_ptr, of(read_pack_once(x_ptr)));
    }
  } else {
#pragma unroll 1
    for (; v >= 0; v -= kThreads, x_ptr -= kStep, y_ptr -= kStep) {
      const Pack<O, kSize> y = of(read_pack_once(x_ptr));
      O each[kSize];
      memcpy(each, &y, sizeof(y));
#pragma unroll
      for (int j = 0; j < kSize; ++j) y_ptr[j] = each[j];
    }
  }
}

// The same with the ends of the row; `single` is the logit of share.single.
template <int kThreads, typename T, typename O, typename Gradient>
__device__ __forceinline__ void write_share(const Gradient& grad, const Share<T>& share,
                                            const T* from, acc_t<T> single, O* out) {
  const bool ends = share.single < share.width;
  if (grad.rare()) {
    write_gradient<kThreads, true>(grad, share, from, out);
    if (ends) store(out[share.single], grad.template at<true>(single));
  } else {
    write_gradient<kThreads, false>(grad, share, from, out);
    if (ends) store(out[share.single], grad.template at<false>(single));
  }
}

// body(cap, entropy) with the compile-time variant of a kernel: std::integral_constants.
template <typename T, typename F>
void dispatch_cap(double softcap, bool entropy, const F& body) {
  constexpr std::integral_constant<Cap, kNoCap> none{};
  constexpr std::integral_constant<Cap, kSmallCap> small{};
  constexpr std::integral_constant<Cap, kAnyCap> any{};
  // Rare variants always make the entropy.
  if constexpr (std::is_same_v<T, double>) {
    return softcap > 0 ? body(any, std::true_type{}) : body(none, std::true_type{});
  } else {
    if (softcap > kFastCap) return body(any, std::true_type{});
    if (softcap > 0)
      return entropy ? body(small, std::true_type{}) : body(small, std::false_type{});
    return entropy ? body(none, std::true_type{}) : body(none, std::false_type{});
  }
}

}  // namespace rl
