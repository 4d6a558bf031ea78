// The schema of every C++/CUDA op.
//
// Implementations register beside their code: STABLE_TORCH_LIBRARY_IMPL(fastrlhf, CPU|CUDA, m) in
// csrc/cpu/<op>.cpp and csrc/cuda/<op>.cu. fastrlhf/ops/<op>.py adds fake implementations and
// autograd.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastrlhf, m) {
  // token_logprob: logits [..., V], targets [...]; stats [3, N] = (row max, log of the sum of
  // exp(z - max), mean of z - max under the softmax). The entropy and that mean are only made
  // with_entropy: a GPU's kernel is bound by its instructions. bwd_ writes dL/dlogits to `out`,
  // which may be the logits, or of a 16-bit dtype where they are fp32.
  m.def(
      "token_logprob_fwd(Tensor logits, Tensor targets, Tensor? row_temperature, float "
      "temperature, "
      "float softcap, Tensor? mask, bool with_entropy, bool inplace_backward) -> (Tensor logprob, "
      "Tensor entropy, Tensor stats)");
  // The forward in parts, on CPU: part_ adds the columns [first, first + w) of [n, w] logits to the
  // state [6, n], a running max, sum of exp(z - max) and of (z - max) exp(z - max), each with what
  // its roundings have lost, and the target's logit; first = 0 starts it. Parts come in ascending
  // order and begin at multiples of 2048 columns. whole makes of the state of all `vocab` columns
  // the bits of fwd, and refuses what fwd refuses.
  m.def(
      "token_logprob_part_(Tensor logits, Tensor targets, int first, Tensor? row_temperature, "
      "float temperature, float softcap, Tensor? mask, Tensor(a!) state) -> ()");
  m.def(
      "token_logprob_whole(Tensor state, int vocab, Tensor targets, Tensor? row_temperature, "
      "float temperature, float softcap, Tensor? mask) -> (Tensor logprob, Tensor entropy, "
      "Tensor stats)");
  m.def(
      "token_logprob_bwd(Tensor? grad_logprob, Tensor? grad_entropy, Tensor logits, Tensor "
      "targets, Tensor stats, Tensor? row_temperature, float temperature, float softcap, "
      "Tensor? mask) -> Tensor");
  m.def(
      "token_logprob_bwd_(Tensor? grad_logprob, Tensor? grad_entropy, Tensor logits, "
      "Tensor targets, Tensor stats, Tensor? row_temperature, float temperature, "
      "float softcap, Tensor? mask, Tensor(a!) out) -> ()");

  // token_loss: grad_logprob = d loss / d logprob, stats [2, N] the first two; fwd_ writes
  // dL/dlogits to `out`, which may be the logits, and bwd_ multiplies its rows by the upstream
  // gradients that are not 1.
  m.def(
      "token_loss_fwd(Tensor logits, Tensor targets, Tensor? advantages, Tensor? old_logprob, "
      "float clip, float dual_clip, Tensor? row_temperature, float temperature, float softcap, "
      "Tensor? mask, Tensor? scale_tensor, float scale) "
      "-> (Tensor loss, Tensor logprob, Tensor grad_logprob, Tensor stats)");
  m.def(
      "token_loss_fwd_(Tensor logits, Tensor targets, Tensor? advantages, Tensor? old_logprob, "
      "float clip, float dual_clip, Tensor? row_temperature, float temperature, float softcap, "
      "Tensor? mask, Tensor? scale_tensor, float scale, Tensor(a!) out) "
      "-> (Tensor loss, Tensor logprob, Tensor grad_logprob, Tensor stats)");
  m.def("token_loss_bwd_(Tensor(a!) grad, Tensor upstream) -> ()");
  // The row pass of the linear losses, on the logits [n, V] of a chunk: log-probs, entropies and
  // grad_logprobs [n], and dL/dlogits, which may be the logits, or of a 16-bit dtype where they are
  // fp32. L = sum over the rows of scale * (token_loss - entropy_coef * entropy). Masked rows give
  // 0.
  m.def(
      "token_loss_rows_(Tensor logits, Tensor targets, Tensor? advantages, Tensor? old_logprob, "
      "float clip, float dual_clip, float entropy_coef, Tensor? row_temperature, "
      "float temperature, float softcap, Tensor? mask, Tensor scale, Tensor(a!) dlogits, "
      "Tensor(b!) logprob, Tensor(c!)? entropy, Tensor(d!)? grad_logprob) -> ()");

  // Sequence ops: tokens [B, T], or [N] with cu_seqlens [B + 1]; estimator 0..3 = k1, k2, k3, abs.
  // Their outputs are stacked along a new first axis: one allocation a call.
  m.def(
      "kl_reward(Tensor logprob, Tensor ref_logprob, Tensor score, float beta, int estimator, "
      "Tensor? cu_seqlens, Tensor? mask) -> Tensor rewards_kl");
  m.def(
      "gae(Tensor rewards, Tensor values, float gamma, float lam, Tensor? cu_seqlens, "
      "Tensor? mask, Tensor? bootstrap, bool whiten) -> Tensor advantages_returns");
  m.def(
      "kl_gae(Tensor logprob, Tensor ref_logprob, Tensor score, Tensor values, float beta, "
      "int estimator, float gamma, float lam, bool whiten, Tensor? cu_seqlens, Tensor? mask) "
      "-> Tensor advantages_returns_rewards_kl");
  m.def("masked_whiten(Tensor x, Tensor? mask, bool shift_mean, bool unbiased) -> Tensor");

  // Losses: no dual clip, or no value clip, is infinity; gradients are empty unless with_grad.
  // grads [k, ...]: of logprob, values and entropy, one after the other, of the tensors that are
  // given.
  m.def(
      "ppo_loss_fwd(Tensor logprob, Tensor old_logprob, Tensor advantages, Tensor? values, "
      "Tensor? old_values, Tensor? returns, Tensor? entropy, Tensor? mask, float clip, "
      "float dual_clip, float value_clip, float value_coef, float entropy_coef, bool with_grad) "
      "-> (Tensor loss, Tensor metrics, Tensor grads)");
  m.def(
      "ranking_loss_fwd(Tensor scores, Tensor ranks, Tensor cu_groups, bool with_grad) "
      "-> (Tensor loss, Tensor grad)");
}
