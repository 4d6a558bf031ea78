// The rows of token_loss on CUDA: the online sum of a softmax in base 2, and who works where.
//
// Shapes: a row of V logits. e_j = 2^(c u_j - b) with u the logits (or tanh(logits / softcap)), c =
// log2(e) dz/du, and b = c max u rounded, the same b everywhere, so that its rounding cancels.
#pragma once

#include "../token_logprob.h"
#include "device.cuh"

namespace rl {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

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

// u: what the exponent is linear in. z = u * dz_du.
template <bool kCap, typename T, typename A>
__device__ __forceinline__ A unscaled(T x, const RowMaths<A>& f) {
  if constexpr (kCap) return tanh(load(x) * f.inv_softcap);
  return load(x);
}

// Largest u so far and the sum of e^(z - largest z). Before a logit above -inf, b is 0.
template <typename A>
struct Running {
  A max, sum;

  __device__ __forceinline__ static Running empty() { return {-A(INFINITY), A(0)}; }
  __device__ __forceinline__ A base(A c) const { return max > -A(INFINITY) ? max * c : A(0); }

  // Moves the maximum up to at least `to`.
  __device__ __forceinline__ void raise(A to, A c) {
    if (!(to > max)) return;
    const A old = max, from = base(c);
    max = to;
    sum *= old > -A(INFINITY) ? exp2_fast(from - base(c)) : A(0);  // 0 * NaN stays NaN
  }

  template <int kCount>
  __device__ __forceinline__ void add(const A (&u)[kCount], A c) {
    A top = u[0];
#pragma unroll
    for (int j = 1; j < kCount; ++j)
      top = std::fmax(top, u[j]);  // of a NaN and a number: the number
    raise(top, c);
    const A b = base(c);
    A e[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) e[j] = exp2_fast(std::fma(u[j], c, -b));
#pragma unroll
    for (int half = kCount / 2; half > 0; half /= 2) {
#pragma unroll
      for (int j = 0; j < half; ++j) e[j] += e[j + half];
    }
    sum += e[0];
  }

  // The same bits whichever of the two is merged into the other.
  __device__ __forceinline__ void merge(Running other, A c) {
    if (max > other.max) {
      other.raise(max, c);
    } else {
      raise(other.max, c);
    }
    sum += other.sum;
  }

  __device__ __forceinline__ void merge_warp(A c) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      Running other;
      other.max = __shfl_xor_sync(~0u, max, lanes);
      other.sum = __shfl_xor_sync(~0u, sum, lanes);
      merge(other, c);
    }
  }
};

// (u - max) factor / temperature - log_sum with one rounding at the size of the result: what the
// difference (Dekker's sum of two) and 1 / temperature lost is added to the small term first.
template <typename A>
__device__ __forceinline__ A log_softmax(A u, A max, A log_sum, A factor, const RowMaths<A>& f) {
  const A distance = u - max;
  if (!(distance > -A(INFINITY))) return distance - log_sum;  // -inf, or NaN
  const A back = distance - u;
  const A lost = (u - (distance - back)) - (max + back);
  const A missed = std::fma(distance, f.scale_low, lost * f.scale) * factor;
  return std::fma(distance * factor, f.scale, missed - log_sum);
}

// Where a block works: 16-byte vectors [first, first + count) of the row, and in the first block
// the elements before the first and after the last vector, one a thread.
template <typename T>
struct Share {
  static constexpr int kSize = Vector<T>::kSize;
  int head, first, count, single;

  __device__ __forceinline__ Share(const T* row, int width, int rank, int blocks) {
    head = static_cast<int>(misaligned_head(row, width));
    const int vectors = (width - head) / kSize, share = (vectors + blocks - 1) / blocks;
    first = rank * share;
    count = vectors - first < share ? vectors - first : share;
    const int thread = threadIdx.x, tail = head + vectors * kSize;
    single = rank > 0 ? width : thread < head ? thread : tail + (thread - head);
  }
  __device__ __forceinline__ int column(int v) const { return head + (first + v) * kSize; }
};

}  // namespace rl
