"""kl_gae: KL-penalised rewards, advantages and returns in one pass.

Shapes: B sequences, T steps, N tokens; [B, T] with an optional mask, or [N] with cu_seqlens [B+1].
"""

import torch
from torch import Tensor

from fastrlhf import reference
from fastrlhf.ops import _checks
from fastrlhf.ops import gae as _gae
from fastrlhf.ops import kl_reward as _kl_reward
from fastrlhf.ops._register import choose, register
from fastrlhf.reference import KLGAEOutput

OP = "kl_gae"


def kl_gae(
    logprob: Tensor,
    ref_logprob: Tensor,
    score: Tensor,
    values: Tensor,
    *,
    beta: float,
    estimator: str = "k1",
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten: bool = False,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> KLGAEOutput:
    """`kl_reward` and then `gae` of its rewards, bitwise identical to the two, in one pass.

    ``r_t = -beta kl_t + [t is last] score_b``, ``A_t = r_t + gamma V_{t+1} - V_t + gamma lam
    A_{t+1}``, ``R_t = A_t + V_t``; then A is whitened on request. Not differentiable: the outputs
    never require grad.

    Args:
        logprob, ref_logprob, score, beta, estimator: as in `kl_reward`.
        values: the shape of `logprob`, as in `gae`.
        gamma, lam, whiten: as in `gae`.
        cu_seqlens: int32 [B+1], rising from 0 to N; makes the input packed. Excludes `mask`.
        mask: [B, T], bool or 0/1; masked steps are carried through, outputs are 0 there.
        backend: see `fastrlhf.backends`.

    Returns:
        KLGAEOutput(advantages, returns, rewards, kl), each in the layout of `logprob`, float32
        (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: as `kl_reward` and `gae`.

    Source: Ouyang et al. 2022 (arXiv:2203.02155), eq. 2 and C.4; Schulman et al. 2016, eq. 16.

    >>> lp = torch.tensor([-1.0, -1.0])
    >>> out = kl_gae(lp, lp, torch.tensor([1.0]), torch.tensor([0.5, 0.5]), beta=0.1, lam=1.0,
    ...              cu_seqlens=torch.tensor([0, 2], dtype=torch.int32))
    >>> out.advantages
    tensor([0.5000, 0.5000])
    """
    index, beta = _kl_reward.check(OP, logprob, ref_logprob, beta, estimator)
    gamma, lam = _gae.check(OP, "logprob", logprob, values, gamma, lam, whiten)
    cu_seqlens, mask, count = _checks.layout(OP, "logprob", logprob, cu_seqlens, mask)
    _checks.per_sequence(OP, "score", score, "logprob", logprob, count)
    chosen = choose(OP, backend, logprob, ref_logprob, score, values)
    if chosen == "reference":
        _checks.has_values(OP, "cu_seqlens", cu_seqlens)
        with torch.no_grad():
            return reference.kl_gae(
                logprob,
                ref_logprob,
                score,
                values,
                beta=beta,
                estimator=estimator,
                gamma=gamma,
                lam=lam,
                whiten=whiten,
                cu_seqlens=cu_seqlens,
                mask=mask,
            )
    rewarded = (logprob, ref_logprob, score, values, beta, index)
    return KLGAEOutput(*FWD[chosen](*rewarded, gamma, lam, whiten, cu_seqlens, mask).unbind())


FWD = register(
    "kl_gae(Tensor logprob, Tensor ref_logprob, Tensor score, Tensor values, float beta, int estimator, float gamma, "
    "float lam, bool whiten, Tensor? cu_seqlens, Tensor? mask) -> Tensor advantages_returns_rewards_kl",
    lambda logprob, *rest: _checks.empty_stacked(logprob, len(KLGAEOutput._fields)),
    op=OP,
    triton="kl_gae.forward",
)
