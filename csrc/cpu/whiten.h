// Masked whitening with sums in a fixed order: masked_whiten, and the last step of gae and kl_gae.
#pragma once

#include "../common/moments.h"
#include "tokens.h"

namespace rl {

// Moments of one block in double, relative to the first value: the fallback of block_moments when
// squares overflow A. Equal values give m2 = 0 at any magnitude.
template <typename A>
__attribute__((noinline)) Moments moments_in_double(const A* x, const uint8_t* keep,
                                                    int64_t count) {
  Moments out;
  double origin = 0, sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (keep && !keep[i]) continue;
    if (out.count == 0) origin = x[i];
    out.count += 1;
    sum += x[i] - origin;
  }
  const double mean = sum / out.count;
  for (int64_t i = 0; i < count; ++i) {
    if (keep && !keep[i]) continue;
    const double d = (x[i] - origin) - mean;
    out.m2 += d * d;
  }
  out.mean = origin + mean;
  return out;
}

// Moments of one block of at most kBlock tokens, in two passes over cached memory. x[i] is 0 where
// keep[i] is 0.
template <typename A>
RL_INLINE Moments block_moments(const A* x, const uint8_t* keep, int64_t count) {
  Moments out;
  A sum = 0;
  int32_t kept = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += x[i];
  if (keep) {
#pragma omp simd reduction(+ : kept)
    for (int64_t i = 0; i < count; ++i) kept += keep[i] != 0;
  } else {
    kept = static_cast<int32_t>(count);
  }
  if (kept == 0) return out;
  const A mean = sum / static_cast<A>(kept);
  A m2 = 0;
  A drift = 0;  // corrects the rounding error of the mean
  if (keep) {
#pragma omp simd reduction(+ : m2, drift)
    for (int64_t i = 0; i < count; ++i) {
      const A d = blend(keep[i], x[i] - mean, A(0));
      m2 += d * d;
      drift += d;
    }
  } else {
#pragma omp simd reduction(+ : m2, drift)
    for (int64_t i = 0; i < count; ++i) {
      const A d = x[i] - mean;
      m2 += d * d;
      drift += d;
    }
  }
  if (!(m2 <= std::numeric_limits<A>::max())) return moments_in_double(x, keep, count);
  out.count = kept;
  out.mean = static_cast<double>(mean) + static_cast<double>(drift) / kept;
  const double squares = static_cast<double>(m2) - static_cast<double>(drift) * drift / kept;
  out.m2 = squares < 0 ? 0 : squares;  // NaN stays NaN
  return out;
}

// out = (x - mean) / sqrt(var + 1e-8), plus mean unless shift_mean; 0 for masked tokens. in_place:
// `x` views `out`, and its masked tokens are 0 already.
template <typename A>
void whiten(const Tokens& x, const Mask& mask, bool shift_mean, bool unbiased, A* out,
            bool in_place = false) {
  const int64_t tokens = x.count();
  std::vector<Moments> partial((tokens + kBlock - 1) / kBlock);
  for_each_block(tokens, [&](int64_t block, int64_t start, int64_t count) RL_LAMBDA_INLINE {
    A scratch[kBlock];
    const auto [first, last] = mask.kept_range(start, start + count);
    const uint8_t* keep = mask.from(first, last - first);
    partial[block] = block_moments(x.load(first, last - first, keep, scratch), keep, last - first);
  });
  Moments all;
  for (const Moments& moments : partial) all.merge(moments);
  const Whitening<A> to_unit(all, shift_mean, unbiased);
  const A mean = to_unit.mean, scale = to_unit.scale, shift = to_unit.shift;
  for_each_block(tokens, [&](int64_t, int64_t start, int64_t count) RL_LAMBDA_INLINE {
    A scratch[kBlock];
    const auto [first, last] = mask.kept_range(start, start + count);
    const uint8_t* keep = mask.from(first, last - first);
    const A* in = x.load(first, last - first, keep, scratch);
    A* to = out + first;
    if (keep) {
#pragma omp simd
      for (int64_t i = 0; i < last - first; ++i)
        to[i] = blend(keep[i], whitened(in[i], mean, scale, shift), A(0));
    } else {
#pragma omp simd
      for (int64_t i = 0; i < last - first; ++i) to[i] = whitened(in[i], mean, scale, shift);
    }
    if (in_place) return;
    std::fill(out + start, out + first, A(0));
    std::fill(out + last, out + start + count, A(0));
  });
}

}  // namespace rl
