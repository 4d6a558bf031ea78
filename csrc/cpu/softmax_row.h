// The rows of logits on CPU: statistics in one walk, the gradient in another; targets checked
// first.
//
// Shapes: a row of V logits; z = softcap * tanh(logits / softcap) / temperature.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "../common/isa.h"
#include "../common/rows.h"

namespace rl {

// Columns of a block of the canonical reduction: a row's statistics are its blocks' sums, added up
// in ascending order. Whoever walks a row in parts that begin at multiples of it has the same bits.
constexpr int64_t kBlock = 2048;
constexpr int64_t kFirst = 512;            // logits whose maximum starts a row
constexpr int64_t kGrainLogits = 1 << 15;  // least work of a thread

// Sums of a block in as many lanes as the widest vector unit keeps in flight.
constexpr int64_t kLanes = 64;
static_assert(kBlock % kLanes == 0 && kFirst <= kBlock);
// How far ahead the walk asks for memory: the hardware's own prefetch ends with each 4 KiB page.
constexpr int64_t kPrefetchBytes = 4096;

// f(j + l, l) of the elements j + l of `row`, lane by lane. What the lanes sum up stays in
// registers: the loop holds nothing but whole vectors.
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

// Largest z / scale, sum e^(z - base) and sum (z - base) e^(z - base) of a block, by lanes.
template <typename A>
struct LaneSums {
  A max[kLanes], sum[kLanes], weighted[kLanes];
};

// A sum of many blocks, and what its roundings have lost.
template <typename A>
struct Compensated {
  A sum, low;

  RL_INLINE void add(A x) {
    const A next = sum + x, added = next - sum;
    low += (sum - (next - added)) + (x - added);
    sum = next;
  }
  RL_INLINE A value() const { return sum + low; }
};

// The same of all columns of a row so far. `max`, the base, is their largest z to within kMaxSlack.
template <typename A>
struct RowSums {
  A max;
  Compensated<A> sum, weighted;

  // Makes `top` the base.
  RL_INLINE void rebase(A top) {
    // Finite, so that a factor of 0 leaves of a sum 0 or NaN.
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

// The upper half of the lanes is added to the lower one, until one is left: an order that no
// instruction set changes.
template <int64_t kHalf = kLanes / 2, typename A>
RL_INLINE A total(A (&lanes)[kLanes]) {
#pragma omp simd
  for (int64_t l = 0; l < kHalf; ++l) lanes[l] += lanes[l + kHalf];
  if constexpr (kHalf > 1) return total<kHalf / 2>(lanes);
  return lanes[0];
}

// Beyond this |base| an ulp of it is several units of the exponent: huge logits, or a tiny
// temperature.
template <typename A>
constexpr A kFarBase = std::is_same_v<A, double> ? A(0x1p55) : A(0x1p26);

// z - base of the columns of a row.
template <typename A>
struct Distance {
  A scale, base;
  A floor = opaque(exp_floor<A>());
  A lowest = opaque(-std::numeric_limits<A>::infinity());

  RL_INLINE bool far() const { return !(std::fabs(base) <= kFarBase<A>); }
  // Rounded once: the base's own rounding cancels, that of z would not. A far base's would leave
  // the range of exp: there z is rounded as the base is, so that the largest is 0 away from it. (A
  // product that is compared with something is no part of a fused product and sum.)
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

// f(std::bool_constant<far>{}): the loops for a far base are apart, for their product costs.
template <typename A, typename F>
RL_INLINE auto with_far(const Distance<A>& away, const F& f) {
  return away.far() ? f(std::true_type{}) : f(std::false_type{});
}

// z_t - max of the target, from its logit.
template <bool kCap, bool kFma, typename A>
RL_INLINE A target_distance(A logit, const RowStats<A>& stats, const RowMaths<A>& f) {
  const Distance<A> away{dz_du<kCap>(f), stats.max};
  const A u = unscaled<kCap>(logit, f);
  return with_far(away,
                  [&](auto far) RL_LAMBDA_INLINE { return away.template exact<kFma, far()>(u); });
}

template <bool kCap, bool kFma, typename A>
RL_INLINE A row_logprob(A target, const RowStats<A>& stats, const RowMaths<A>& f) {
  return target_distance<kCap, kFma>(target, stats, f) - stats.shifted_lse;
}

template <bool kCap, bool kFma, bool kFar, typename T, typename A>
RL_INLINE void add_block(const T* row, int64_t n, const RowMaths<A>& f, const Distance<A>& away,
                         LaneSums<A>& out) {
  for_each_lane(row, n, [&](int64_t j, int64_t l) RL_LAMBDA_INLINE {
    const A u = unscaled<kCap>(load(row[j]), f);
    out.max[l] = u > out.max[l] ? u : out.max[l];
    const A d = away.template clamped<kFma, kFar>(u);
    const A e = exp_clamped(d);
    out.sum[l] += e;
    out.weighted[l] += e * d;
  });
}

// A row of which no column has been added; `width`: how many of them lie at `row`.
template <bool kCap, typename T, typename A>
RL_INLINE RowSums<A> start_row(const T* row, int64_t width, const RowMaths<A>& f) {
  A first = -std::numeric_limits<A>::infinity();
#pragma omp simd reduction(max : first)
  for (int64_t j = 0; j < (width < kFirst ? width : kFirst); ++j) {
    const A z = unscaled<kCap>(load(row[j]), f);
    first = z > first ? z : first;
  }
  // The base is that product rounded, whatever it meets.
  return {opaque(first * dz_du<kCap>(f)), {0, 0}, {0, 0}};
}

// Adds the next `width` columns, which lie at `row`: the rest of the row, or a multiple of kBlock.
// Only a block that passes the maximum so far by more than kMaxSlack is done again, so that sums
// and maximum come from one walk that hides behind the memory. The slack is small because it
// cancels in the entropy.
template <bool kCap, bool kFma, typename T, typename A>
RL_INLINE void add_columns(const T* row, int64_t width, const RowMaths<A>& f, RowSums<A>& all) {
  constexpr A kInf = std::numeric_limits<A>::infinity();
  constexpr A kMaxSlack = 1;
  Distance<A> away{dz_du<kCap>(f), 0};
  LaneSums<A> block;
  for (int64_t start = 0; start < width; start += kBlock) {
    const int64_t n = width - start < kBlock ? width - start : kBlock;
    for (bool again = true; again;) {
      std::fill_n(block.max, kLanes, -kInf);
      std::fill_n(block.sum, kLanes, A(0));
      std::fill_n(block.weighted, kLanes, A(0));
      // All logits so far -inf: subtract 0 instead, which leaves e^-inf = 0 and keeps a NaN a NaN.
      away.base = all.max > -kInf ? all.max : A(0);
      with_far(away, [&](auto far) RL_LAMBDA_INLINE {
        add_block<kCap, kFma, far()>(row + start, n, f, away, block);
      });
      const A top = opaque(largest(block.max) * away.scale);
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
RL_INLINE RowStats<A> row_stats(const T* row, int64_t width, const RowMaths<A>& f) {
  RowSums<A> all = start_row<kCap>(row, width, f);
  add_columns<kCap, kFma>(row, width, f, all);
  return finished(all);
}

// dL/dlogits of a row from g = dL/dlogprob and h = dL/dentropy:
//   dz_j = g (1[j = t] - p_j) - h p_j (log p_j + entropy),  times dz/dlogits.
// `out` may be `row`, or of a 16-bit type. log p_j + entropy is taken as (z_j - max) - mean, which
// leaves out the rounding of shifted_lse: the whole row would share it, and a sum over the row keep
// it.
template <bool kCap, bool kFma, typename T, typename G, typename A>
RL_INLINE void row_backward(const T* row, G* out, int64_t width, int64_t target, A g, A h,
                            const RowStats<A>& stats, const RowMaths<A>& f) {
  const Distance<A> distance{dz_du<kCap>(f), stats.max};
  const A shifted_lse = stats.shifted_lse, mean = stats.mean, floor = distance.floor;
  // The target's own element, with 1 - p from expm1, before an in-place pass overwrites its logit.
  const A target_logit = load(row[target]);
  const A target_away = at_least(floor, target_distance<kCap, kFma>(target_logit, stats, f));
  const A target_logprob = row_logprob<kCap, kFma>(target_logit, stats, f);
  with_far(distance, [&](auto far) RL_LAMBDA_INLINE {
    for_each_lane(row, width, [&](int64_t j, int64_t) RL_LAMBDA_INLINE {
      const A logit = load(row[j]);
      const A away = distance.template clamped<kFma, far()>(unscaled<kCap>(logit, f));
      const A p = exp_clamped(at_least(floor, away - shifted_lse));
      store(out[j], -p * (h * (away - mean) + g) * dz_dlogit<kCap>(logit, f));
    });
  });
  store(out[target],
        target_gradient<kCap>(target_logit, target_logprob, target_away, g, h, mean, f));
}

// ---- rows, threads, dtypes
// -----------------------------------------------------------------------------------------

// Targets and temperatures of the rows that count; the wording is what fastrlhf.ops turns into a
// ValueError.
inline void check_rows(const Batch& b) {
  for (int64_t row = 0; row < b.view.rows.count; ++row) {
    if (!b.view.counts(row)) continue;
    const int64_t target = b.view.target(row);
    if (target < 0 || target >= b.view.rows.width) {
      user_error("targets must be in [0, " + std::to_string(b.view.rows.width) + "); got " +
                 std::to_string(target) + " at row " + std::to_string(row));
    }
    if (b.view.row_temperature && !(b.view.row_temperature_of(row) > 0)) {
      user_error("temperature must be above 0; got " +
                 std::to_string(b.view.row_temperature_of(row)) + " at row " + std::to_string(row));
    }
  }
}

inline int64_t grain(const Rows& rows) {
  return std::max<int64_t>(1, kGrainLogits / std::max<int64_t>(rows.width, 1));
}

// body(T{}) with the C++ type of a floating dtype.
template <typename F>
void dispatch_float(ScalarType dtype, const F& body) {
  if (dtype == ScalarType::Float) return body(float{});
  if (dtype == ScalarType::BFloat16) return body(bf16{});
  if (dtype == ScalarType::Half) return body(f16{});
  body(double{});
}

// body(T{}, G{}) with the C++ types of logits and of their gradient (see gradient_rows).
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
