"""kl_reward: per-token KL penalty plus the sequence's score on its last token.

Shapes: B sequences, T steps, N tokens; [B, T] with an optional mask, or [N] with cu_seqlens [B+1].
"""

import torch
from torch import Tensor

from fastrlhf import reference
from fastrlhf.ops import _checks
from fastrlhf.ops._register import choose, register

OP = "kl_reward"


def kl_reward(
    logprob: Tensor,
    ref_logprob: Tensor,
    score: Tensor,
    *,
    beta: float,
    estimator: str = "k1",
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """r_t = -beta * kl_t, plus score[b] on the last unmasked token of sequence b.

    With d = logprob - ref_logprob, in nats, the estimate kl_t of KL(policy || reference) is

    - ``"k1"``: d, signed and unbiased (the paper's penalty, the default);
    - ``"k2"``: d^2 / 2;
    - ``"k3"``: e^-d - 1 + d, unbiased and never negative; -d is clamped to +-20 and the result to
      at most 10, so that one bad token cannot overflow;
    - ``"abs"``: ``|d|``.

    Not differentiable: rewards are constants of the PPO loss, and the outputs never require grad.

    Args:
        logprob: [B, T] or [N], log-probability of each token under the policy. float32, bfloat16,
            float16, or float64; any strides.
        ref_logprob: the same shape, under the reference policy.
        score: [B], reward-model score of each sequence. A sequence without an unmasked token has no
            place for its score, which is dropped.
        beta: at least 0, reward units per nat.
        cu_seqlens: int32 [B+1], rising from 0 to N; makes the input packed. Excludes `mask`.
        mask: [B, T], bool or 0/1: which tokens are responses. Outputs are 0 elsewhere, whatever
            stands there.
        backend: see `fastrlhf.backends`.

    Returns:
        (rewards, kl), each in the layout of `logprob`, float32 (or float64, as the inputs).

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or value, by argument name. On a GPU the
            values of `mask` and `cu_seqlens` are not read, which would cost a sync.

    Source: Ouyang et al. 2022 (arXiv:2203.02155), eq. 2; Schulman, "Approximating KL divergence".

    >>> policy, ref = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.5, -1.0]])
    >>> kl_reward(policy, ref, torch.tensor([2.0]), beta=0.1)[0]
    tensor([[-0.0500,  2.0000]])
    """
    index, beta = check(OP, logprob, ref_logprob, beta, estimator)
    cu_seqlens, mask, count = _checks.layout(OP, "logprob", logprob, cu_seqlens, mask)
    _checks.per_sequence(OP, "score", score, "logprob", logprob, count)
    chosen = choose(OP, backend, logprob, ref_logprob, score)
    if chosen == "reference":
        _checks.has_values(OP, "cu_seqlens", cu_seqlens)
        with torch.no_grad():
            return reference.kl_reward(
                logprob,
                ref_logprob,
                score,
                beta=beta,
                estimator=estimator,
                cu_seqlens=cu_seqlens,
                mask=mask,
            )
    return FWD[chosen](logprob, ref_logprob, score, beta, index, cu_seqlens, mask).unbind()


def check(op, logprob, ref_logprob, beta, estimator):
    """Checked (estimator index, beta)."""
    if ref_logprob is None:
        _checks.tensor(op, "ref_logprob", ref_logprob)
    _checks.same_tokens(op, "logprob", logprob, ref_logprob=ref_logprob)
    index = _checks.estimator(op, estimator)
    return index, _checks.number(op, "beta", beta, low=0)


FWD = register(
    "kl_reward(Tensor logprob, Tensor ref_logprob, Tensor score, float beta, int estimator, Tensor? cu_seqlens, "
    "Tensor? mask) -> Tensor rewards_kl",
    lambda logprob, *rest: _checks.empty_stacked(logprob, 2),
    op=OP,
    triton="kl_reward.forward",
)
