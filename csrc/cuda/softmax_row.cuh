// Softmax of a row of V logits on CUDA: row statistics and gradient, for every op on logits. See
// common/softmax.h for z, u and the statistics.
//
// Exponentials are base 2: e_j = 2^(c u_j - b) with c = log2(e) dz/du and b = c * max(u), rounded.
// All terms of a row share b, so its rounding error cancels.
//
// Reduction: a row is cut into tiles of 32 x 8 16-byte vectors, counted from its first element. One
// warp reduces a tile: lane l takes vectors l, l + 32, ..., sums each as a tree, adds the vectors
// in ascending order, and the lanes merge by shuffles. Tiles are merged in a fixed order, at most
// kSlots at a time. Results depend on V and dtype alone: not on the alignment of the row, on the
// number of warps or blocks that share it, or on whether the entropy is computed. Products in sums
// are explicit FMAs or explicitly rounded; contraction by the compiler could make two kernels
// differ.
#pragma once

#include "block_reduce.cuh"
#include "row_tiles.cuh"

namespace rl {

constexpr int kSlots = 256;  // tile sums held in shared memory until they are merged

template <typename A>
constexpr A kLog2E = A(1.4426950408889634);
template <typename A>
constexpr A kLn2 = A(0.6931471805599453);

// A row is "far" if |b| exceeds this (huge logits or a tiny temperature): an ulp of b or z then
// spans several powers of two. Far rows round z before the maximum is subtracted, like
// log_softmax(z).
constexpr float kFarBase = 67108864.0f;  // 2^26
constexpr float kFloor2 = -256.0f;       // 2^x is 0 in fp32 below this
constexpr float kSteep = 4096.0f;  // c above which the error of a fast tanh exceeds 2^-11 in z
constexpr double kFastCap = 64;    // largest soft-cap with tanh from ex2 and rcp

enum Cap : int { kNoCap, kSmallCap, kAnyCap };

// Variants that favour small code over speed.
template <typename A, Cap kCap>
constexpr bool is_rare = kCap == kAnyCap || std::is_same_v<A, double>;

__device__ __forceinline__ float exp2_fast(float x) {
#if RL_PTX
  float y;  // relative error 2^-22; results below 2^-126 are 0
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

template <typename A>
__device__ __forceinline__ A bounded2(A x) {  // for products with 2^x: 0 and not 0 * inf
  return std::fmax(x, A(std::is_same_v<A, double> ? -2048 : kFloor2));
}

__device__ __forceinline__ float warp_max(float x) {
  // Maps floats to signed integers of the same order: one redux instruction instead of five
  // shuffles.
  const auto flip = [](int i) { return i ^ ((i >> 31) & 0x7fffffff); };
  return __int_as_float(flip(__reduce_max_sync(~0u, flip(__float_as_int(x)))));
}
__device__ __forceinline__ double warp_max(double x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = std::fmax(x, __shfl_xor_sync(~0u, x, lanes));
  return x;
}

// ---- statistics ---------------------------------------------------------------------------------

// Sums of a part of a row: largest logit, sum e_j, sum e_j (c u_j - b), with b = base(max).
template <typename A>
struct Partial {
  A max, sum, weighted;
};

// The exponent c u - b of the logits of one row.
template <typename A, Cap kCap>
struct Exponent {
  LogitTransform<A> f;
  A c, k;  // tanh(x / softcap) = 1 - 2 / (2^(k x) + 1)

  __device__ __forceinline__ explicit Exponent(const LogitTransform<A>& transform)
      : f(transform), c(dz_du<kCap != kNoCap>(f) * kLog2E<A>), k(0) {
    if constexpr (kCap == kSmallCap) k = 2 * kLog2E<A> / f.softcap;
  }
  __device__ __forceinline__ A u(A logit) const {
    if constexpr (kCap == kSmallCap) {
      return std::fma(A(-2), reciprocal(exp2_fast(logit * k) + 1), A(1));
    } else {
      return unscaled<kCap == kAnyCap>(logit, f);
    }
  }
  // Whether the error of a fast tanh matters in z. The target then uses the same tanh as the sums.
  __device__ __forceinline__ bool steep() const { return kCap == kSmallCap && c > kSteep; }
  __device__ __forceinline__ A target_u(A logit) const {
    if (steep()) return u(logit);
    return unscaled<kCap != kNoCap>(logit, f);
  }
  // False for the b of parts that contribute nothing to a row that is not far, whose b exceeds
  // -kFarBase; also for -inf and NaN.
  __device__ __forceinline__ static bool contributes(A b) { return b > -2 * kFarBase; }
  // b of a part with largest logit `max`; 0 if it contributes nothing, which makes its terms 0.
  __device__ __forceinline__ A base(A max) const {
    const A b = rounded_product(u(max), c);
    return contributes(b) ? b : A(0);
  }
  __device__ __forceinline__ A z(A logit) const {  // rounded, not contracted
    return rounded_product(u(logit), dz_du<kCap != kNoCap>(f));
  }
  __device__ __forceinline__ bool far(A max) const {
    // With a soft-cap, z of a logit of -inf is finite.
    const bool has_max = kCap == kNoCap ? max > -A(INFINITY) : max == max;
    return has_max && !(std::fabs(u(max) * c) <= kFarBase);
  }
};

// Reduces a tile by one warp. kFar: relative to z of `top`, the largest logit of the row. kGuarded:
// only the first `columns` of the tile exist; the rest are -inf, which a soft-cap would make
// finite.
template <bool kFar, bool kGuarded, bool kEntropy, typename T, typename A, Cap kCap>
__device__ __forceinline__ Partial<A> reduce_tile(const Tile<T>& x, const Exponent<A, kCap>& f,
                                                  A top, int64_t columns) {
  using W = Words<T>;
  constexpr int kPerWord = W::kPerWord;
  typename W::Word largest = x.vector[0].word[0];
#pragma unroll
  for (int k = 0; k < kTileVectors; ++k) {
#pragma unroll
    for (int i = 0; i < Pack<T>::kWords; ++i) largest = W::max(largest, x.vector[k].word[i]);
  }
  const A max = warp_max(static_cast<A>(W::max_of(largest)));
  const A b = kFar ? f.z(top) : f.base(max);
  // Tree sums per vector: fewer roundings of a sum dominated by one large term.
  A sum = 0, weighted[2] = {};
#pragma unroll
  for (int k = 0; k < kTileVectors; ++k) {
    constexpr int kSize = kPerVector<T>;
    if (kGuarded && k * 32 * kSize >= columns) continue;
    A e[kSize];
#pragma unroll
    for (int i = 0; i < Pack<T>::kWords; ++i) {
      A both[kPerWord];
      W::unpack(x.vector[k].word[i], both);
#pragma unroll
      for (int j = 0; j < kPerWord; ++j) {
        const int at = i * kPerWord + j;
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
  return {max, warp_total(sum), kEntropy ? warp_total(weighted[0] + weighted[1]) : A(0)};
}

// Partials of a row in shared memory, to be merged.
template <typename A>
struct Slots {
  A max[kSlots], sum[kSlots], weighted[kSlots];

  __device__ __forceinline__ void put(int i, const Partial<A>& part) {
    max[i] = part.max;
    sum[i] = part.sum;
    weighted[i] = part.weighted;
  }
};

// Merges slots [0, count). Every calling warp gets a bitwise identical result.
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
    const A part_b = rounded_product(f.u(slots.max[i]), f.c);
    A shift = 0, factor = 1;
    if constexpr (!kFar) {
      shift = f.contributes(part_b) ? part_b - b : A(0);
      factor = f.contributes(part_b) ? exp2_fast(shift) : A(0);  // 0 * NaN stays NaN
    }
    all.sum = std::fma(factor, slots.sum[i], all.sum);
    if constexpr (kEntropy) {
      const A moved = std::fma(slots.sum[i], shift, slots.weighted[i]);
      all.weighted = std::fma(factor, moved, all.weighted);
    }
  }
  all.sum = warp_total(all.sum);
  if constexpr (kEntropy) all.weighted = warp_total(all.weighted);
  return all;
}

// The warps of a block reduce tiles [begin, begin + count), and pass tile begin + i to put(i,
// part).
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

// Reduces all tiles of a row by one block.
template <bool kFar, bool kEntropy, typename Tiles, typename A, Cap kCap>
__device__ __forceinline__ Partial<A> reduce_row(const Tiles& tiles, const Exponent<A, kCap>& f,
                                                 Slots<A>& slots, A top) {
  const int64_t count = tiles.count();
  int64_t done = 0;
  int carried = 0;  // 1: slot 0 holds the result of earlier merges
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

// Chooses the tile reader by the alignment of the row.
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

// Second pass over a far row, relative to its largest logit, which is known by then.
template <bool kEntropy, typename T, typename A, Cap kCap>
__device__ __forceinline__ Partial<A> reduce_row_far(const T* row, int64_t width,
                                                     const Exponent<A, kCap>& f, Slots<A>& slots,
                                                     A top) {
  __syncthreads();
  return reduce_row<true, kEntropy>(GlobalTiles<T, Start::rare>{row, width}, f, slots, top);
}

// Row statistics from the sums of a row.
template <typename A, Cap kCap>
struct RowSums {
  Exponent<A, kCap> f;
  Partial<A> all;
  bool far;
  A u_max, b;             // near: e_j = 2^(c u_j - b)
  A base_error;           // (c u_max - b) ln(2): rounding error of b
  A shifted_lse;          // relative to the exact max z
  A shifted_mean;         // likewise
  RowStats<A> row_stats;  // relative to the rounded max z

  __device__ __forceinline__ RowSums(const Exponent<A, kCap>& exponent, const Partial<A>& sums,
                                     bool is_far)
      : f(exponent), all(sums), far(is_far) {
    u_max = f.u(all.max);
    b = f.base(all.max);
    const bool exact = !far && std::fabs(u_max) < A(INFINITY);
    base_error = exact ? rounded_product(std::fma(u_max, f.c, -b), kLn2<A>) : A(0);
    shifted_lse = log(all.sum) - base_error;
    shifted_mean = std::fma(all.weighted / all.sum, kLn2<A>, -base_error);
    const A z_max = f.z(all.max);
    const A error = exact ? std::fma(u_max, dz_du<kCap != kNoCap>(f.f), -z_max) : A(0);
    row_stats = {z_max, shifted_lse + error, shifted_mean + error};
  }
  // log p of a logit, rounded once at the magnitude of the result. The rounding errors of u - u_max
  // (Dekker's two-sum) and of 1 / temperature are added to the smaller term first.
  __device__ __forceinline__ A logprob(A logit) const {
    const LogitTransform<A>& g = f.f;
    if (far) return (f.z(logit) - row_stats.row_max) - shifted_lse;
    const A u = f.target_u(logit), distance = u - u_max;
    const A factor = kCap != kNoCap ? g.softcap : A(1);
    if (!(distance > -A(INFINITY))) return distance - shifted_lse;  // -inf, or NaN
    const A back = distance - u;
    const A error = (u - (distance - back)) - (u_max + back);
    const A correction = rounded_product(std::fma(distance, g.scale_low, error * g.scale), factor);
    return std::fma(distance * factor, g.scale, correction - shifted_lse);
  }
};

// ---- gradient -----------------------------------------------------------------------------------

// Gradient of a row for g = dL/dlogprob and h = dL/dentropy. For all j but the target:
//   dL/dlogit_j = -p_j (g + h (z_j - row_max - shifted_mean)) dz_j/dlogit_j
// with p_j = 2^(c u_j - b) times a factor of the row. Every kernel starts from the stored
// statistics, so all of them write bitwise identical gradients. z_j - row_max - shifted_mean
// replaces log p_j + entropy: it leaves out shifted_lse, whose rounding error would bias the whole
// row.
template <typename A, Cap kCap, bool kEntropy>
struct RowGradient {
  static constexpr int kUnroll = is_rare<A, kCap> ? 1 : 4;  // packs in flight
  Exponent<A, kCap> f;
  RowStats<A> row_stats;
  A dz, g_row, h_row;
  bool far;  // p_j = e^(z_j - row_max - shifted_lse), not 2^(c u_j - b)
  A b;       // not far
  A g, h;    // dL/dlogit_j = 2^x (g + h x) for exponent x, row factors included

  // dz/dlogit where `chain` of at() is 1.
  __device__ __forceinline__ static A chain_unit(const Exponent<A, kCap>& f) {
    return kCap == kSmallCap ? 4 * f.f.scale : f.f.scale;
  }
  __device__ __forceinline__ RowGradient(const Exponent<A, kCap>& exponent,
                                         const RowStats<A>& of_row, A grad_logprob, A grad_entropy)
      : f(exponent),
        row_stats(of_row),
        dz(dz_du<kCap != kNoCap>(f.f)),
        g_row(grad_logprob),
        h_row(grad_entropy) {
    const A u = row_stats.row_max / dz;
    b = rounded_product(u, f.c);
    far = !(std::fabs(b) <= A(kFarBase));
    // z_j - row_max = ln(2) * exponent + offset
    A offset = std::fma(-std::fma(u, f.c, -b), kLn2<A>, std::fma(u, dz, -row_stats.row_max)),
      share = 1;
    if (far) {
      offset = row_stats.shifted_lse;
    } else {
      share = exp_accurate(offset - row_stats.shifted_lse);
    }
    share *= -chain_unit(f);
    g = std::fma(h_row, offset - row_stats.shifted_mean, g_row) * share;
    h = h_row * kLn2<A> * share;
  }

  // Whether the row needs at<true>().
  __device__ __forceinline__ bool rare() const { return far || f.steep(); }
  template <bool kRare>
  __device__ __forceinline__ A at(A logit) const {
    A u, chain = 1;
    if constexpr (kCap == kSmallCap) {
      // |tanh| = 1 - 2 r, hence 1 - tanh^2 = 4 (r - r^2) without cancellation; g and h include
      // the 4.
      const A r = reciprocal(exp2_fast(std::fabs(logit) * f.k) + 1);
      u = kRare ? f.u(logit) : std::copysign(std::fma(A(-2), r, A(1)), logit);
      chain = std::fma(-r, r, r);
    } else {
      u = f.u(logit);
      if constexpr (kCap == kAnyCap) chain = sech2(logit / f.f.softcap);
    }
    const A exponent =
        kRare && far
            ? ((rounded_product(u, dz) - row_stats.row_max) - row_stats.shifted_lse) * kLog2E<A>
            : std::fma(u, f.c, -b);
    A p = exp2_fast(exponent);
    if constexpr (kEntropy) {
      p *= std::fma(bounded2(exponent), h, g);
    } else {
      p *= g;
    }
    return kCap != kNoCap ? p * chain : p;
  }
  // The target's element: 1 - p without cancellation.
  __device__ __forceinline__ A at_target(A logit) const {
    const A u = f.target_u(logit);
    const A shifted =
        far ? rounded_product(u, dz) - row_stats.row_max : std::fma(u, dz, -row_stats.row_max);
    return target_gradient<kCap != kNoCap>(logit, shifted - row_stats.shifted_lse,
                                           at_least(exp_floor<A>(), shifted), g_row, h_row,
                                           row_stats.shifted_mean, f.f);
  }
};

// The part of a row that a block writes: the 16-byte packs [first, first + count), counted from the
// boundary at or before the start of the row; and of the ends outside complete packs, one element
// per thread, column `single` (width: none).
template <typename T>
struct Share {
  int64_t first, single, width;
  int count, skew;

  // Packs [begin, end) of the row, and its ends if `ends`.
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
  // An even part of the row for block `rank` of `blocks`.
  __device__ __forceinline__ static Share even(const T* row, int64_t width, int rank, int blocks) {
    const int64_t packs = width / kPerVector<T> + 2, each = (packs + blocks - 1) / blocks;
    return Share(row, width, rank * each, (rank + 1) * each, rank == 0);
  }
  __device__ __forceinline__ int64_t column(int v) const {
    return (first + v) * kPerVector<T> - skew;
  }
  // Whether this thread writes column `at`, in write_gradient() or as `single`.
  __device__ __forceinline__ bool owns(int64_t at) const {
    const int64_t v = (at + skew) / kPerVector<T> - first;
    if (v < 0 || v >= count) return single == at;
    return (count - 1 - v) % blockDim.x == threadIdx.x;
  }
};

// Writes zeros to the part of a row of block `rank` of `blocks`.
template <typename T>
__device__ __forceinline__ void zero_row(T* out, int64_t width, int rank, int blocks) {
  const auto share = Share<T>::even(out, width, rank, blocks);
  for (int v = threadIdx.x; v < share.count; v += blockDim.x) {
    write_pack(out + share.column(v), Pack<T>{});
  }
  if (share.single < share.width) out[share.single] = T{};
}

// Writes the gradient of a share by a block of kThreads. `from`: address of its first pack. `out`
// may be the row itself, or of a narrower type O. Runs from the last pack to the first, because the
// end of the row was read last and may still be cached.
template <int kThreads, bool kRare, typename T, typename O, typename Gradient>
__device__ __forceinline__ void write_gradient(const Gradient& grad, const Share<T>& share,
                                               const T* from, O* out) {
  using From = Words<T>;
  using To = Words<O>;
  constexpr int kUnroll = kRare ? 1 : Gradient::kUnroll, kSize = kPerVector<T>,
                kStep = kThreads * kSize;
  const auto of = [&](const Pack<T>& x) {
    acc_t<T> each[kSize];
#pragma unroll
    for (int i = 0; i < Pack<T>::kWords; ++i) {
      acc_t<T> both[From::kPerWord];
      From::unpack(x.word[i], both);
#pragma unroll
      for (int j = 0; j < From::kPerWord; ++j) {
        each[i * From::kPerWord + j] = grad.template at<kRare>(both[j]);
      }
    }
    Pack<O, kSize> y;
#pragma unroll
    for (int i = 0; i < Pack<O, kSize>::kWords; ++i) {
      acc_t<O> both[To::kPerWord];
#pragma unroll
      for (int j = 0; j < To::kPerWord; ++j) both[j] = each[i * To::kPerWord + j];
      y.word[i] = To::pack(both);
    }
    return y;
  };
  int v = share.count - 1 - static_cast<int>(threadIdx.x);
  const T* x_ptr = from + int64_t{v} * kSize;
  O* y_ptr = out + share.column(v);
  if (skew_of<kSize>(out) == share.skew) {
    if constexpr (kUnroll > 1) {
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

// write_gradient() and the ends of the row. `single`: logit of column share.single.
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

// Calls body(cap, entropy) with the variant of a kernel as std::integral_constants.
template <typename T, typename F>
void dispatch_cap(double softcap, bool entropy, const F& body) {
  constexpr std::integral_constant<Cap, kNoCap> none{};
  constexpr std::integral_constant<Cap, kSmallCap> small{};
  constexpr std::integral_constant<Cap, kAnyCap> any{};
  // Rare variants always compute the entropy.
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
