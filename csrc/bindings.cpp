// fastrlhf._C: build facts, the sequence packer, and the schema of every C++/CUDA op (the one
// place).
//
// Implementations register themselves next to their code: STABLE_TORCH_LIBRARY_IMPL(fastrlhf,
// CPU|CUDA, m) in csrc/cpu/<op>.cpp and csrc/cuda/<op>.cu. Fake implementations and autograd are
// added by fastrlhf/ops/<op>.py.

#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>

#include "packer.h"
#include "rl_math.h"

#ifndef FASTRLHF_CUDA_ARCHS
#define FASTRLHF_CUDA_ARCHS ""
#endif

namespace py = pybind11;

STABLE_TORCH_LIBRARY(fastrlhf, m) {
  // token_logprob: logits [..., V], targets [...]; stats [2, N] = (row max, log of the sum of exp(z
  // - max)).
  m.def(
      "token_logprob_fwd(Tensor logits, Tensor targets, Tensor? row_temperature, float "
      "temperature, "
      "float softcap, Tensor? mask) -> (Tensor logprob, Tensor entropy, Tensor stats)");
  m.def(
      "token_logprob_bwd(Tensor? grad_logprob, Tensor? grad_entropy, Tensor logits, Tensor "
      "targets, "
      "Tensor entropy, Tensor stats, Tensor? row_temperature, float temperature, float softcap, "
      "Tensor? mask) -> Tensor");
  m.def(
      "token_logprob_bwd_(Tensor? grad_logprob, Tensor? grad_entropy, Tensor(a!) logits, "
      "Tensor targets, Tensor entropy, Tensor stats, Tensor? row_temperature, float temperature, "
      "float softcap, Tensor? mask) -> ()");

  // Schemas of kl_reward, gae, kl_gae, masked_whiten, ppo_loss and ranking_loss go below this line.
}

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = "0.1.0";
  info["torch_target_version"] = "2.10";
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  py::list compiled;
  for (const char* name : rl::compiled_isas()) compiled.append(name);
  info["cpu_isa_compiled"] = compiled;
  info["cpu_isa_running"] = rl::isa_name(rl::running_isa());
  py::list archs;
  const std::string text = FASTRLHF_CUDA_ARCHS;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find(' ', at), text.size());
    if (end > at) archs.append(text.substr(at, end - at));
    at = end + 1;
  }
  info["cuda_archs"] = archs;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ and CUDA kernels of fastrlhf; the ops are reached through torch.ops.fastrlhf.";
  m.def("build_info", &build_info, "Facts of this build, as a dict.");
  fastrlhf::bind_packer(m);
}
