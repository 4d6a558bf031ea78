// kl_gae on CUDA: KL-penalised rewards, GAE and returns in one launch; whitening takes a second
// one.
//
// Shapes: logprob, ref_logprob, values, mask, outputs: [B, T], or [N] with cu_seqlens [B + 1];
// score [B].
#include "sequence_scan.cuh"

namespace rl {
namespace {

Tensor kl_gae(Tensor logprob, Tensor ref_logprob, Tensor score, Tensor values, double beta,
              int64_t estimator, double gamma, double lam, bool whiten,
              std::optional<Tensor> cu_seqlens, std::optional<Tensor> mask) {
  const torch::stable::accelerator::DeviceGuard guard(logprob.get_device_index());
  Tensor out = new_stacked_tokens(logprob, 4);
  with_acc(logprob, [&](auto zero) {
    using A = decltype(zero);
    SequenceArgs<A> p{};
    const auto cu = set_layout(p, logprob, cu_seqlens);
    A* const out_ptr = output<A>(out);  // advantages, returns, rewards, kl
    const int64_t n = p.tokens;
    set_kl(p, logprob, ref_logprob, score, beta, estimator, out_ptr + 2 * n, out_ptr + 3 * n);
    set_gae(p, logprob, values, gamma, lam, out_ptr, out_ptr + n);
    p.mask = mask_like(mask, logprob);
    run_sequences<A, true, true>("kl_gae", p, logprob, whiten);
  });
  return out;
}

}  // namespace
}  // namespace rl

STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CUDA, m) { m.impl("kl_gae", TORCH_BOX(&rl::kl_gae)); }
