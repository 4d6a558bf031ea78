// C functions of the kernel library that fastrlhf/ops/_library.py calls through ctypes. They need
// neither Python symbols nor the dispatcher.

#include <string>

#include "common/isa.h"
#include "common/tensor.h"

#ifndef FASTRLHF_CUDA_ARCHS
#define FASTRLHF_CUDA_ARCHS ""
#endif

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

std::string make_build_info() {
  std::string isas;
  for (const char* name : rl::compiled_isas())
    isas += (isas.empty() ? "" : " ") + std::string(name);
  std::string text = "version=" FASTRLHF_VERSION "\ntorch_target_version=2.10\n";
#if defined(__clang__)
  text += "compiler=clang " __clang_version__ "\n";
#else
  text += "compiler=gcc " __VERSION__ "\n";
#endif
  text += "cpu_isa_compiled=" + isas + "\n";
  text += std::string("cpu_isa_running=") + rl::isa_name(rl::running_isa()) + "\n";
  text += "cuda_archs=" FASTRLHF_CUDA_ARCHS "\n";
  text += "schemas=" FASTRLHF_SCHEMAS "\n";
  return text;
}

}  // namespace

// Lines of "name=value"; lists are separated by spaces.
EXPORTED const char* fastrlhf_build_info() {
  static const std::string text = make_build_info();
  return text.c_str();
}

// For tests: while on, fresh CPU memory of the C++ ops holds NaN. Returns an element of a fresh
// tensor.
EXPORTED float fastrlhf_poison_fresh_memory(bool on) {
  rl::fresh_memory_is_nan = on;
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return *static_cast<const float*>(rl::empty_on(cpu, {1}, rl::ScalarType::Float).const_data_ptr());
}
