// Softmax of a row of V logits on CPU: one pass for the row statistics, one for the gradient. See
// common/softmax.h for z, u and the statistics.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "../common/isa.h"
#include "../common/rows.h"

namespace rl {

// Columns per block. A row is reduced block by block in ascending order, so processing it in parts
// that begin at multiples of kBlock gives bitwise identical results.
constexpr int64_t kBlock = 2048;
constexpr int64_t kFirst = 512;            // columns whose maximum is the first base
constexpr int64_t kGrainLogits = 1 << 15;  // minimum work per thread

// Partial sums per block: as many as keep the widest vector units busy.
constexpr int64_t kLanes = 64;
static_assert(kBlock % kLanes == 0 && kFirst <= kBlock);
// Software prefetch distance: the hardware prefetcher stops at each 4 KiB page.
constexpr int64_t kPrefetchBytes = 4096;

// Calls f(j + l, l) for every element j + l of `row`; l is its lane. Whole vectors only in the main
// loop, so that per-lane sums stay in registers.
template <typename T, typename F>
RL_INLINE void for_each_lane(const T* row, int64_t n, const F& f) {
  int64_t j = 0;
  for (; n - j >= kLanes; j += kLanes) {
    for (int64_t line = 0; line < kLanes * int64_t{sizeof(T)}; line += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(row + j) + kPrefetchBytes + line);
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) f(j + l, l);
  }
#pragma omp simd
  for (int64_t l = 0; l < n - j; ++l) f(j + l, l);
}

// Of a block, per lane: max u, sum e^(z - base) and sum (z - base) e^(z - base).
template <typename A>
struct LaneSums {
  A max[kLanes], sum[kLanes], weighted[kLanes];
};

// Compensated (Neumaier) sum.
template <typename A>
struct Compensated {
  A sum, low;  // low: accumulated rounding error

  RL_INLINE void add(A x) {
    const A next = sum + x, added = next - sum;
    low += (sum - (next - added)) + (x - added);
    sum = next;
  }
  RL_INLINE A value() const { return sum + low; }
};

// Running sums of a row, relative to the base `max`: its largest z so far, to within kMaxSlack.
template <typename A>
struct RowSums {
  A max;
  Compensated<A> sum, weighted;

  // Rescales the sums to base `top`.
  RL_INLINE void rebase(A top) {
    // Clamped to a finite value: a factor of 0 then turns a sum into 0, or keeps NaN.
    const A shift = at_least(exp_floor<A>(), max - top);
    const A factor = exp_clamped(shift);
    weighted = {factor * (weighted.sum + sum.sum * shift),
                factor * (weighted.low + sum.low * shift)};
    sum = {factor * sum.sum, factor * sum.low};
    max = top;
  }
};

template <typename A>
RL_INLINE A largest(const A (&lanes)[kLanes]) {
  A max = -std::numeric_limits<A>::infinity();
#pragma omp simd reduction(max : max)
  for (int64_t l = 0; l < kLanes; ++l) max = lanes[l] > max ? lanes[l] : max;
  return max;
}

// Pairwise sum of the lanes: an order that does not depend on the instruction set.
template <int64_t kHalf = kLanes / 2, typename A>
RL_INLINE A total(A (&lanes)[kLanes]) {
#pragma omp simd
  for (int64_t l = 0; l < kHalf; ++l) lanes[l] += lanes[l + kHalf];
  if constexpr (kHalf > 1) return total<kHalf / 2>(lanes);
  return lanes[0];
}

// A row is "far" if |base| exceeds this (huge logits or a tiny temperature): an ulp of z then spans
// several units of the exponent.
template <typename A>
constexpr A kFarBase = std::is_same_v<A, double> ? A(0x1p55) : A(0x1p26);

// z - base = u * scale - base of the columns of a row.
template <typename A>
struct BaseShift {
  A scale, base;
  A floor = opaque(exp_floor<A>());
  A lowest = opaque(-std::numeric_limits<A>::infinity());

  RL_INLINE bool far() const { return !(std::fabs(base) <= kFarBase<A>); }
  // Rounded once: the rounding of the base cancels, a separate rounding of z would not. In a far
  // row that error exceeds the range of exp, so z is rounded like the base and the largest z gives
  // exactly 0. (The comparison keeps the product from being contracted into an FMA.)
  template <bool kFma, bool kFar>
  RL_INLINE A exact(A u) const {
    if constexpr (kFar) return at_least(lowest, u * scale) - base;
    return multiply_add<kFma>(u, scale, -base);
  }
  template <bool kFma, bool kFar>
  RL_INLINE A clamped(A u) const {
    const A raw = exact<kFma, kFar>(u);
    return at_least(floor, raw);
  }
};

// Calls f(std::bool_constant<far>{}): far rows have their own loops, which are slower.
template <typename A, typename F>
RL_INLINE auto with_far(const BaseShift<A>& shift, const F& f) {
  return shift.far() ? f(std::true_type{}) : f(std::false_type{});
}

// z_t - row_max of the target, from its logit.
template <bool kCap, bool kFma, typename A>
RL_INLINE A shifted_target(A logit, const RowStats<A>& row_stats, const LogitTransform<A>& f) {
  const BaseShift<A> shift{dz_du<kCap>(f), row_stats.row_max};
  const A u = unscaled<kCap>(logit, f);
  return with_far(shift,
                  [&](auto far) RL_LAMBDA_INLINE { return shift.template exact<kFma, far()>(u); });
}

template <bool kCap, bool kFma, typename A>
RL_INLINE A row_logprob(A target, const RowStats<A>& row_stats, const LogitTransform<A>& f) {
  return shifted_target<kCap, kFma>(target, row_stats, f) - row_stats.shifted_lse;
}

template <bool kCap, bool kFma, bool kFar, typename T, typename A>
RL_INLINE void add_block(const T* row, int64_t n, const LogitTransform<A>& f,
                         const BaseShift<A>& shift, LaneSums<A>& out) {
  for_each_lane(row, n, [&](int64_t j, int64_t l) RL_LAMBDA_INLINE {
    const A u = unscaled<kCap>(load(row[j]), f);
    out.max[l] = u > out.max[l] ? u : out.max[l];
    const A d = shift.template clamped<kFma, kFar>(u);
    const A e = exp_clamped(d);
    out.sum[l] += e;
    out.weighted[l] += e * d;
  });
}

// Empty sums of a row, with a base from its first columns. `row` holds `width` columns.
template <bool kCap, typename T, typename A>
RL_INLINE RowSums<A> start_row(const T* row, int64_t width, const LogitTransform<A>& f) {
  A first = -std::numeric_limits<A>::infinity();
#pragma omp simd reduction(max : first)
  for (int64_t j = 0; j < (width < kFirst ? width : kFirst); ++j) {
    const A z = unscaled<kCap>(load(row[j]), f);
    first = z > first ? z : first;
  }
  // opaque: the product must be rounded here, not contracted where the base is used.
  return {opaque(first * dz_du<kCap>(f)), {0, 0}, {0, 0}};
}

// Adds the next `width` columns, stored at `row`: the rest of the row, or a multiple of kBlock.
// Sums and maximum come from one pass. A block is computed again only if it exceeds the base by
// more than kMaxSlack, which is small because it cancels in the entropy.
template <bool kCap, bool kFma, typename T, typename A>
RL_INLINE void add_columns(const T* row, int64_t width, const LogitTransform<A>& f,
                           RowSums<A>& all) {
  constexpr A kInf = std::numeric_limits<A>::infinity();
  constexpr A kMaxSlack = 1;
  BaseShift<A> shift{dz_du<kCap>(f), 0};
  LaneSums<A> block;
  for (int64_t start = 0; start < width; start += kBlock) {
    const int64_t n = width - start < kBlock ? width - start : kBlock;
    for (bool again = true; again;) {
      std::fill_n(block.max, kLanes, -kInf);
      std::fill_n(block.sum, kLanes, A(0));
      std::fill_n(block.weighted, kLanes, A(0));
      // If all logits so far are -inf, the base is 0: e^-inf = 0, and NaN stays NaN.
      shift.base = all.max > -kInf ? all.max : A(0);
      with_far(shift, [&](auto far) RL_LAMBDA_INLINE {
        add_block<kCap, kFma, far()>(row + start, n, f, shift, block);
      });
      const A top = opaque(largest(block.max) * shift.scale);
      again = top > all.max + kMaxSlack;
      if (again) all.rebase(top);
    }
    all.sum.add(total(block.sum));
    all.weighted.add(total(block.weighted));
  }
}

template <typename A>
RL_INLINE RowStats<A> finished(const RowSums<A>& all) {
  const A sum = all.sum.value();
  return {all.max, log(sum), all.weighted.value() / sum};
}

template <bool kCap, bool kFma, typename T, typename A>
RL_INLINE RowStats<A> reduce_row(const T* row, int64_t width, const LogitTransform<A>& f) {
  RowSums<A> all = start_row<kCap>(row, width, f);
  add_columns<kCap, kFma>(row, width, f, all);
  return finished(all);
}

// Gradient of a row for g = dL/dlogprob and h = dL/dentropy, with target t:
//   dL/dlogit_j = (g (1[j = t] - p_j) - h p_j (log p_j + entropy)) dz_j/dlogit_j
// log p_j + entropy is computed as (z_j - row_max) - shifted_mean, without shifted_lse, whose
// rounding error would bias the whole row. `out` may be `row`, or of a 16-bit type.
template <bool kCap, bool kFma, typename T, typename G, typename A>
RL_INLINE void row_backward(const T* row, G* out, int64_t width, int64_t target, A g, A h,
                            const RowStats<A>& row_stats, const LogitTransform<A>& f) {
  const BaseShift<A> shift{dz_du<kCap>(f), row_stats.row_max};
  const A shifted_lse = row_stats.shifted_lse, shifted_mean = row_stats.shifted_mean,
          floor = shift.floor;
  // The target's element uses expm1 for 1 - p. Read its logit before an in-place pass overwrites
  // it.
  const A target_logit = load(row[target]);
  const A target_shifted = at_least(floor, shifted_target<kCap, kFma>(target_logit, row_stats, f));
  const A target_logprob = row_logprob<kCap, kFma>(target_logit, row_stats, f);
  with_far(shift, [&](auto far) RL_LAMBDA_INLINE {
    for_each_lane(row, width, [&](int64_t j, int64_t) RL_LAMBDA_INLINE {
      const A logit = load(row[j]);
      const A shifted = shift.template clamped<kFma, far()>(unscaled<kCap>(logit, f));
      const A p = exp_clamped(at_least(floor, shifted - shifted_lse));
      store(out[j], -p * (h * (shifted - shifted_mean) + g) * dz_dlogit<kCap>(logit, f));
    });
  });
  store(out[target],
        target_gradient<kCap>(target_logit, target_logprob, target_shifted, g, h, shifted_mean, f));
}

// ---- rows, threads, dtypes --------------------------------------------------------------------

// Checks targets and temperatures of unmasked rows. fastrlhf.ops turns the message into a
// ValueError.
inline void check_rows(const RowInputs& in) {
  for (int64_t row = 0; row < in.args.rows.count; ++row) {
    if (!in.args.counts(row)) continue;
    const int64_t target = in.args.target(row);
    if (target < 0 || target >= in.args.rows.width) {
      user_error("targets must be in [0, " + std::to_string(in.args.rows.width) + "); got " +
                 std::to_string(target) + " at row " + std::to_string(row));
    }
    if (in.args.row_temperature && !(in.args.row_temperature_of(row) > 0)) {
      user_error("temperature must be above 0; got " +
                 std::to_string(in.args.row_temperature_of(row)) + " at row " +
                 std::to_string(row));
    }
  }
}

inline int64_t grain(const RowLayout& rows) {
  return std::max<int64_t>(1, kGrainLogits / std::max<int64_t>(rows.width, 1));
}

// Calls body(T{}) with the C++ type of a float dtype.
template <typename F>
void dispatch_float(ScalarType dtype, const F& body) {
  if (dtype == ScalarType::Float) return body(float{});
  if (dtype == ScalarType::BFloat16) return body(bf16{});
  if (dtype == ScalarType::Half) return body(f16{});
  body(double{});
}

// Calls body(T{}, G{}) with the C++ types of logits and gradient (see gradient_layout).
template <typename F>
void dispatch_gradient(ScalarType logits, ScalarType gradient, const F& body) {
  dispatch_float(logits, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (std::is_same_v<T, float>) {
      if (gradient == ScalarType::BFloat16) return body(T{}, bf16{});
      if (gradient == ScalarType::Half) return body(T{}, f16{});
    }
    body(T{}, T{});
  });
}

}  // namespace rl
