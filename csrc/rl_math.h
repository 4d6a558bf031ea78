// Scalar maths shared by csrc/cpu and csrc/cuda, and the choice of the instruction set on CPU.
//
// Host versions are branch-free, so that an `omp simd` loop around them becomes vector code; every
// function is always_inline, so that it takes on the instruction set of the loop it is called from.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#ifdef __CUDACC__
#define RL_HD __host__ __device__ __forceinline__
#else
#define RL_HD inline __attribute__((always_inline))
#endif
#define RL_INLINE inline __attribute__((always_inline))

namespace rl {

// ---- precision
// -----------------------------------------------------------------------------------------------------

// Sums are kept in fp32, and in fp64 for fp64 inputs.
template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// exp(x) of anything below this is 0 in the accumulator; arguments are clamped here so that -inf
// never meets 0 * inf.
template <typename A>
RL_HD constexpr A exp_floor() {
  return std::is_same_v<A, double> ? A(-746) : A(-104);
}

// ---- exp, log, tanh
// ------------------------------------------------------------------------------------------------

#ifndef __CUDA_ARCH__
RL_INLINE float bits_to_float(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

RL_INLINE int32_t float_to_bits(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
#endif

// e^x. Host fp32: relative error < 1.2e-7 for -87.3 <= x <= 88.3; results below FLT_MIN are 0,
// above the range inf; NaN stays NaN.
RL_HD float exp(float x) {
#ifdef __CUDA_ARCH__
  return ::expf(x);
#else
  // x = n ln2 + r with |r| <= ln2/2; adding and taking away 1.5 * 2^23 rounds to the nearest
  // integer.
  const float clamped = x < -104.0f ? -104.0f : (x > 89.0f ? 89.0f : x);
  const float shifted = clamped * 1.44269504088896341f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  float r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.3888889e-3f;
  p = p * r + 8.3333337e-3f;
  p = p * r + 4.1666668e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t exponent = float_to_bits(shifted) << 23;
  const float scaled = bits_to_float(float_to_bits(p) + exponent);
  const float low = x < -87.3f ? 0.0f : scaled;
  const float high = x > 88.3762626647950f ? std::numeric_limits<float>::infinity() : low;
  return x == x ? high : x;
#endif
}

RL_HD double exp(double x) { return ::exp(x); }

// log(x) for positive finite x (host fp32: relative error < 1.5e-7); 0 gives -inf, negative gives
// NaN.
RL_HD float log(float x) {
#ifdef __CUDA_ARCH__
  return ::logf(x);
#else
  return std::log(x);
#endif
}

RL_HD double log(double x) { return ::log(x); }

// tanh(x); odd polynomial near 0, 1 - 2 / (e^{2x} + 1) elsewhere, so that the relative error stays
// below 2e-7.
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
  const float bounded = x > 15.0f ? 15.0f : (x < -15.0f ? -15.0f : x);
  const float far = 1.0f - 2.0f / (exp(2.0f * bounded) + 1.0f);
  const float magnitude = x < 0.0f ? -x : x;
  return magnitude < 0.625f ? near : far;
#endif
}

RL_HD double tanh(double x) { return ::tanh(x); }

// ---- instruction sets
// ----------------------------------------------------------------------------------------------

#if (defined(__x86_64__) || defined(_M_X64)) && !defined(__CUDACC__)
#define RL_X86 1
#endif

enum class Isa { baseline, avx2, avx512 };

inline const char* isa_name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline";
}

inline std::vector<const char*> compiled_isas() {
#ifdef RL_X86
  return {"baseline", "avx2", "avx512"};
#else
  return {"baseline"};
#endif
}

// The widest instruction set of this machine that the hot loops are compiled for.
// FASTRLHF_CPU_ISA=baseline|avx2 lowers it, for tests.
inline Isa running_isa() {
#ifdef RL_X86
  static const Isa isa = [] {
    const char* cap = std::getenv("FASTRLHF_CPU_ISA");
    const bool only_baseline = cap && !std::strcmp(cap, "baseline");
    const bool no_avx512 = cap && !std::strcmp(cap, "avx2");
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq");
    if (only_baseline || !avx2) return Isa::baseline;
    return avx512 && !no_avx512 ? Isa::avx512 : Isa::avx2;
  }();
  return isa;
#else
  return Isa::baseline;
#endif
}

// Calls the generic callable `body` compiled for each instruction set, choosing at run time:
//   rl::dispatch_isa([&]() RL_LAMBDA_INLINE { hot loop });
// The body and all that it calls must be always_inline (RL_INLINE / RL_HD / RL_LAMBDA_INLINE),
// because that is how they take on the caller's instruction set.
#define RL_LAMBDA_INLINE __attribute__((always_inline))

#ifdef RL_X86
template <typename F>
__attribute__((target("avx2,fma"), noinline)) void run_avx2(const F& body) {
  body();
}
template <typename F>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512"),
               noinline)) void
run_avx512(const F& body) {
  body();
}
#endif
template <typename F>
__attribute__((noinline)) void run_baseline(const F& body) {
  body();
}

template <typename F>
void dispatch_isa(const F& body) {
#ifdef RL_X86
  switch (running_isa()) {
    case Isa::avx512:
      return run_avx512(body);
    case Isa::avx2:
      return run_avx2(body);
    default:
      break;
  }
#endif
  run_baseline(body);
}

}  // namespace rl
