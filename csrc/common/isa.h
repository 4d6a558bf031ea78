// Run-time choice of the CPU instruction set.
#pragma once

#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

namespace rl {

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

// The widest compiled instruction set that this machine supports. FASTRLHF_CPU_ISA=baseline|avx2
// lowers it, for tests.
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

// Compiles `body` for each instruction set and calls the one for this machine:
//   rl::dispatch_isa([&](auto fma) RL_LAMBDA_INLINE { hot loop });
// `fma` is std::true_type where the instruction set has FMA (see multiply_add). The body and all
// functions it calls must be always_inline (RL_INLINE, RL_HD, RL_LAMBDA_INLINE): inlining is what
// compiles them for the caller's target.
#define RL_LAMBDA_INLINE __attribute__((always_inline))

#ifdef RL_X86
template <typename F>
__attribute__((target("avx2,fma"), noinline)) void run_avx2(const F& body) {
  body(std::true_type{});
}
template <typename F>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512"),
               noinline)) void
run_avx512(const F& body) {
  body(std::true_type{});
}
#endif
template <typename F>
__attribute__((noinline)) void run_baseline(const F& body) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  body(std::true_type{});
#else
  body(std::false_type{});
#endif
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
