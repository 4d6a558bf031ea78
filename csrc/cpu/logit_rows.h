// The rows of logits on CPU: statistics in one walk, the gradient in another; targets checked
// first.
//
// Shapes: a row of V logits; z = softcap * tanh(logits / softcap) / temperature.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "../token_logprob.h"

namespace rl {

constexpr int64_t kBlock = 2048;           // logits per block: 8 KiB of fp32
constexpr int64_t kFirst = 512;            // logits whose maximum starts a row
constexpr int64_t kGrainLogits = 1 << 15;  // least work of a thread

// Running sums in as many lanes as the widest vector unit keeps in flight: adding them up costs
// nothing until the row ends.
constexpr int64_t kLanes = 64;
// How far ahead the walk asks for memory: the hardware's own prefetch ends with each 4 KiB page.
constexpr int64_t kPrefetchBytes = 4096;

template <typename T>
RL_INLINE void prefetch_lanes(const T* at) {
  for (int64_t line = 0; line < kLanes * int64_t{sizeof(T)}; line += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(at) + kPrefetchBytes + line);
}

// Largest z / scale, sum e^(z - base) and sum (z - base) e^(z - base) of a block, by lanes.
template <typename A>
struct LaneSums {
  A max[kLanes], sum[kLanes], weighted[kLanes];
};

template <typename A>
RL_INLINE A largest(const A (&lanes)[kLanes]) {
  A max = -std::numeric_limits<A>::infinity();
#pragma omp simd reduction(max : max)
  for (int64_t l = 0; l < kLanes; ++l) max = lanes[l] > max ? lanes[l] : max;
  return max;
}

template <typename A>
RL_INLINE A total(const A (&lanes)[kLanes]) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t l = 0; l < kLanes; ++l) sum += lanes[l];
  return sum;
}

// z - base. Rounded once: the base's own rounding cancels, that of z would not.
template <bool kCap, bool kFma, typename T, typename A>
RL_INLINE A distance(const T& x, const RowMaths<A>& f, A scale, A base) {
  return multiply_add<kFma>(unscaled<kCap>(load(x), f), scale, -base);
}

template <bool kCap, bool kFma, typename T, typename A>
RL_INLINE A row_logprob(const T& target, const RowStats<A>& stats, const RowMaths<A>& f) {
  return distance<kCap, kFma>(target, f, dz_du<kCap>(f), stats.max) - stats.log_sum;
}

template <bool kCap, bool kFma, typename T, typename A>
RL_INLINE void add_block(const T* row, int64_t n, const RowMaths<A>& f, A scale, A base, A floor,
                         LaneSums<A>& out) {
  for (int64_t j = 0; j < n; j += kLanes) {
    prefetch_lanes(row + j);
    const int64_t lanes = n - j < kLanes ? n - j : kLanes;
    const auto add = [&](int64_t l) RL_LAMBDA_INLINE {
      const A z = unscaled<kCap>(load(row[j + l]), f);
      out.max[l] = z > out.max[l] ? z : out.max[l];
      const A raw = multiply_add<kFma>(z, scale, -base);
      const A d = at_least(floor, raw);
      const A e = exp_clamped(d);
      out.sum[l] += e;
      out.weighted[l] += e * d;
    };
    if (lanes == kLanes) {
#pragma omp simd
      for (int64_t l = 0; l < kLanes; ++l) add(l);
    } else {
#pragma omp simd
      for (int64_t l = 0; l < lanes; ++l) add(l);
    }
  }
}

// `max` is the largest z of the row to within kMaxSlack: only a block that passes it by more is
// done again, so that sums and maximum come from one walk that hides behind the memory. The slack
// is small because it cancels in the entropy.
template <bool kCap, bool kFma, typename T, typename A>
RL_INLINE RowStats<A> row_stats(const T* row, int64_t width, const RowMaths<A>& f) {
  constexpr A kInf = std::numeric_limits<A>::infinity();
  constexpr A kMaxSlack = 1;
  const A floor = opaque(exp_floor<A>());
  const A scale = dz_du<kCap>(f);
  A max = -kInf;
  A first = -kInf;
#pragma omp simd reduction(max : first)
  for (int64_t j = 0; j < (width < kFirst ? width : kFirst); ++j) {
    const A z = unscaled<kCap>(load(row[j]), f);
    first = z > first ? z : first;
  }
  max = first * scale;
  LaneSums<A> all{}, block;
  for (int64_t start = 0; start < width; start += kBlock) {
    const int64_t n = width - start < kBlock ? width - start : kBlock;
    for (bool again = true; again;) {
      std::fill_n(block.max, kLanes, -kInf);
      std::fill_n(block.sum, kLanes, A(0));
      std::fill_n(block.weighted, kLanes, A(0));
      // All logits so far -inf: subtract 0 instead, which leaves e^-inf = 0 and keeps a NaN a NaN.
      add_block<kCap, kFma>(row + start, n, f, scale, max > -kInf ? max : A(0), floor, block);
      const A top = largest(block.max) * scale;
      again = top > max + kMaxSlack;
      if (!again) break;
      const A shift = max > -kInf ? max - top : A(0);
      const A factor = max > -kInf ? exp_nonpositive(shift) : A(0);
#pragma omp simd
      for (int64_t l = 0; l < kLanes; ++l) {
        all.weighted[l] = factor > 0 ? factor * (all.weighted[l] + all.sum[l] * shift) : A(0);
        all.sum[l] = factor > 0 ? factor * all.sum[l] : A(0);
      }
      max = top;
    }
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) {
      all.sum[l] += block.sum[l];
      all.weighted[l] += block.weighted[l];
    }
  }
  const A sum = total(all.sum);
  const A log_sum = log(sum);
  return {max, log_sum, total(all.weighted) / sum};
}

// dL/dlogits of a row from g = dL/dlogprob and h = dL/dentropy:
//   dz_j = g (1[j = t] - p_j) - h p_j (log p_j + entropy),  times dz/dlogits. `out` may be `row`.
// log p_j + entropy is taken as (z_j - max) - mean, which leaves out the rounding of log_sum: the
// whole row would share it, and a sum over the row keep it.
template <bool kCap, bool kFma, typename T, typename A>
RL_INLINE void row_backward(const T* row, T* out, int64_t width, int64_t target, A g, A h,
                            const RowStats<A>& stats, const RowMaths<A>& f) {
  const A floor = opaque(exp_floor<A>());
  const A base = stats.max, log_sum = stats.log_sum;
  const A mean = stats.mean;
  const A scale = dz_du<kCap>(f);
  // The target's own element, with 1 - p from expm1, before an in-place pass overwrites its logit.
  const A target_logit = load(row[target]);
  const A target_away = at_least(floor, distance<kCap, kFma>(row[target], f, scale, base));
  const A target_logprob = row_logprob<kCap, kFma>(row[target], stats, f);
  for (int64_t start = 0; start < width; start += kLanes) {
    prefetch_lanes(row + start);
    const int64_t lanes = width - start < kLanes ? width - start : kLanes;
    const auto write = [&](int64_t l) RL_LAMBDA_INLINE {
      const A raw = distance<kCap, kFma>(row[start + l], f, scale, base);
      const A away = at_least(floor, raw);
      const A p = exp_clamped(at_least(floor, away - log_sum));
      store(out[start + l],
            -p * (h * (away - mean) + g) * dz_dlogit<kCap>(load(row[start + l]), f));
    };
    if (lanes == kLanes) {
#pragma omp simd
      for (int64_t l = 0; l < kLanes; ++l) write(l);
    } else {
#pragma omp simd
      for (int64_t l = 0; l < lanes; ++l) write(l);
    }
  }
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

}  // namespace rl
