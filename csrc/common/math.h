// Scalar maths shared by csrc/cpu and csrc/cuda. A is the accumulator type, float or double.
//
// Host versions are branch-free, so that `omp simd` loops around them vectorise, and always_inline,
// so that they are compiled for the instruction set of the calling loop (isa.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#ifdef __CUDACC__
#define RL_HD __host__ __device__ __forceinline__
#else
#define RL_HD inline __attribute__((always_inline))
#endif
#define RL_INLINE inline __attribute__((always_inline))

namespace rl {

// ---- precision -------------------------------------------------------------------------------

// Accumulator type: fp64 for fp64 inputs, else fp32.
template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// exp(x) underflows to 0 below this. Clamping arguments to it keeps -inf out of products with
// exp(x): no 0 * inf.
template <typename A>
RL_HD constexpr A exp_floor() {
  return std::is_same_v<A, double> ? A(-746) : A(-88);
}

RL_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

RL_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

#ifndef __CUDACC__
// 16-bit floats on the host. Conversions are branch-free and round to nearest even.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

RL_INLINE double load(const double& x) { return x; }
RL_INLINE float load(const float& x) { return x; }
RL_INLINE float load(const bf16& x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
RL_INLINE float load(const f16& x) {
  const uint32_t half = x.bits;
  const uint32_t sign = (half & 0x8000u) << 16;
  // Multiplying by 2^112 rebiases the exponent and normalises subnormal halves.
  const uint32_t finite = float_to_bits(bits_to_float((half & 0x7fffu) << 13) * 0x1p112f);
  const uint32_t special = ((half & 0x7fffu) << 13) | 0x7f800000u;
  return bits_to_float(((half & 0x7c00u) == 0x7c00u ? special : finite) | sign);
}

RL_INLINE void store(double& out, double x) { out = x; }
RL_INLINE void store(float& out, float x) { out = x; }
RL_INLINE void store(bf16& out, float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
RL_INLINE void store(f16& out, float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal halves: rebias and round. Subnormal halves: adding 0.5 aligns the mantissa. Otherwise
  // inf or NaN.
  const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t small = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t half = magnitude < 0x38800000u ? small : magnitude < 0x47800000u ? normal : large;
  out.bits = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}
#endif

// ---- exp, log, tanh ---------------------------------------------------------------------------

// e^x for exp_floor <= x <= 88 on the host, exactly 0 below -87.7; NaN stays NaN. kAccurate:
// relative error < 2e-7 at any x. Otherwise one operation fewer, and a relative error of |x| 6e-8.
template <bool kAccurate>
RL_INLINE float exp_host(float x) {
  // x log2(e) = n + r with |r| <= 1/2. Adding and subtracting 1.5 * 2^23 rounds to an integer.
  constexpr float kLog2E = 1.44269504088896341f;
  const float shifted = x * kLog2E + 12582912.0f;
  const float n = shifted - 12582912.0f;
  // log(2) in two parts; the first has so few bits that its product with n is exact.
  const float r = kAccurate ? ((x - n * 0.693145751953125f) - n * 1.428606765330187e-6f) * kLog2E
                            : x * kLog2E - n;
  // 2^r by a minimax polynomial of degree 6: relative error 2e-9 before rounding.
  float p = 1.5353258640971035e-4f;
  p = p * r + 1.3399003073573112e-3f;
  p = p * r + 9.61843878030777e-3f;
  p = p * r + 5.5503319948911667e-2f;
  p = p * r + 0.24022647738456726f;
  p = p * r + 0.6931471824645996f;
  p = p * r + 1.0f;
  // 2^n from its bit pattern; n = -127 gives 0.
  return p * bits_to_float((float_to_bits(shifted) + 127) << 23);
}

// e^x for exp_floor <= x <= 88 (callers clamp). Most accurate near 0, where the terms that
// dominate a softmax sum lie.
RL_HD float exp_clamped(float x) {
#ifdef __CUDA_ARCH__
  // ex2.approx: relative error 2^-22 near 0. The comparison flushes subnormal results to 0.
  return x < -87.7f ? 0.0f : __expf(x);
#else
  return exp_host<false>(x);
#endif
}

// e^x on the same range, accurate to 2e-7 at any x.
RL_HD float exp_accurate(float x) {
#ifdef __CUDA_ARCH__
  return ::expf(x);
#else
  return exp_host<true>(x);
#endif
}

RL_HD double exp_accurate(double x) { return ::exp(x); }

RL_HD double exp_clamped(double x) { return ::exp(x); }

// a * b + c rounded once: an FMA, or for floats a double product, which is exact. fp64 without FMA
// rounds twice. Contraction by the compiler is not enough: it does not fuse a product that is used
// elsewhere as well.
template <bool kFma, typename A>
RL_INLINE A multiply_add(A a, A b, A c) {
  if constexpr (kFma) return std::fma(a, b, c);
  if constexpr (std::is_same_v<A, double>) return a * b + c;
  return static_cast<A>(double{a} * double{b} + double{c});
}

// a * b, never contracted into an FMA on CUDA.
template <typename A>
RL_HD A rounded_product(A a, A b) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<A, double>) return __dmul_rn(a, b);
  if constexpr (std::is_same_v<A, float>) return __fmul_rn(a, b);
#endif
  return a * b;
}

// max(floor, x); NaN stays NaN.
template <typename A>
RL_HD A at_least(A floor, A x) {
  return floor > x ? floor : x;
}

// Hides a value from the optimiser, which would otherwise split a loop on a constant clamp.
template <typename A>
RL_INLINE A opaque(A x) {
  asm volatile("" : "+m"(x));
  return x;
}

// e^x for x <= 88; 0 below -87.7; NaN stays NaN.
template <typename A>
RL_HD A exp_nonpositive(A x) {
  return exp_clamped(at_least(exp_floor<A>(), x));
}

// e^x on the whole range: inf above 88.7, 0 below -87.7; NaN stays NaN.
RL_HD float exp(float x) {
#ifdef __CUDA_ARCH__
  return ::expf(x);
#else
  const float half = exp_accurate(at_least(exp_floor<float>(), 0.5f * (x > 178.0f ? 178.0f : x)));
  return x < -87.7f ? 0.0f : half * half;
#endif
}

RL_HD double exp(double x) { return ::exp(x); }

// log(x); 0 gives -inf, negative x NaN. Host fp32: relative error < 1.5e-7.
RL_HD float log(float x) {
#ifdef __CUDA_ARCH__
  return ::logf(x);
#else
  return std::log(x);
#endif
}

RL_HD double log(double x) { return ::log(x); }

// tanh(x) by an odd polynomial near 0 and 1 - 2 / (e^{2|x|} + 1) elsewhere: relative error < 2e-7.
RL_HD float tanh(float x) {
#ifdef __CUDA_ARCH__
  return ::tanhf(x);
#else
  const float s = x * x;
  float p = -5.70498872745e-3f;
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const float near = x + x * s * p;
  const float magnitude = x < 0.0f ? -x : x;
  const float bounded = magnitude > 15.0f ? 15.0f : magnitude;
  const float far = 1.0f - 2.0f / (exp_clamped(2.0f * bounded) + 1.0f);
  return magnitude < 0.625f ? near : (x < 0.0f ? -far : far);
#endif
}

RL_HD double tanh(double x) { return ::tanh(x); }

// sech(x)^2 = 1 - tanh(x)^2 = u (2 - u) with u = 2 / (e^{2|x|} + 1), without cancellation at large
// |x|.
template <typename A>
RL_HD A sech2(A x) {
  const A magnitude = x < A(0) ? -x : x;
  const A bounded = magnitude > A(40) ? A(40) : magnitude;
  const A u = A(2) / (exp_clamped(A(2) * bounded) + A(1));
  return u * (A(2) - u);
}

// fp64 tolerates the cancellation, and the exp above would make the CUDA kernel spill.
RL_HD double sech2(double x) {
  const double t = ::tanh(x);
  return (1.0 - t) * (1.0 + t);
}

// Bound on |logprob - old_logprob| before exponentiation, in the policy ratio and in the k3
// estimator.
constexpr float kLogRatioLimit = 20.0f;

template <typename A>
RL_HD A clamp(A x, A low, A high) {
  return x < low ? low : (x > high ? high : x);  // NaN stays NaN
}

// e^x - 1 - x for |x| <= 88. The Taylor series near 0 avoids cancellation: relative error < 4e-8.
RL_HD float expm1_excess(float x) {
  float p = 1.0f / 362880;
  p = p * x + 1.0f / 40320;
  p = p * x + 1.0f / 5040;
  p = p * x + 1.0f / 720;
  p = p * x + 1.0f / 120;
  p = p * x + 1.0f / 24;
  p = p * x + 1.0f / 6;
  p = p * x + 0.5f;
  const float direct = exp_accurate(x) - 1.0f - x;
  return (x < 0.0f ? -x : x) < 0.5f ? x * x * p : direct;
}

RL_HD double expm1_excess(double x) { return ::expm1(x) - x; }

// log(1 + x) for 0 <= x <= 1 as 2 atanh(x / (2 + x)) by its series: relative error < 1e-7.
RL_HD float log1p_unit(float x) {
#ifdef __CUDA_ARCH__
  return ::log1pf(x);
#else
  const float s = x / (2.0f + x);
  const float q = s * s;
  float p = 1.0f / 15;
  p = p * q + 1.0f / 13;
  p = p * q + 1.0f / 11;
  p = p * q + 1.0f / 9;
  p = p * q + 1.0f / 7;
  p = p * q + 1.0f / 5;
  p = p * q + 1.0f / 3;
  return 2.0f * s + 2.0f * s * q * p;
#endif
}

RL_HD double log1p_unit(double x) { return ::log1p(x); }

// -log sigmoid(x).
template <typename A>
RL_HD A neg_log_sigmoid(A x) {
  return log1p_unit(exp(x < A(0) ? x : -x)) - (x < A(0) ? x : A(0));
}
// Its derivative, sigmoid(x) - 1.
template <typename A>
RL_HD A neg_log_sigmoid_grad(A x) {
  return A(-1) / (A(1) + exp(x));
}

}  // namespace rl
