"""gae: generalised advantage estimation over ragged sequences.

Shapes: B sequences, T steps, N tokens; [B, T] with an optional mask, or [N] with cu_seqlens [B+1].
"""

import torch
from torch import Tensor

from fastrlhf import reference
from fastrlhf.ops import _checks
from fastrlhf.ops._register import choose, register

OP = "gae"


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    whiten: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Advantages A and returns R = A + V (before whitening), where

    ``A_t = r_t + gamma V_{t+1} - V_t + gamma lam A_{t+1}``.

    Masked steps are carried through: t+1 is the next *unmasked* step of the sequence, as if the
    masked ones were not there. After the last one stands V = `bootstrap` and A = 0. Not
    differentiable: advantages are constants of the PPO loss, and the outputs never require grad.

    Args:
        rewards: [B, T] or [N], reward of each token. float32, bfloat16, float16, or float64; any
            strides.
        values: the same shape, the value model's estimate *before* the token.
        gamma: discount, in [0, 1]. The paper uses 1.
        lam: GAE's lambda, in [0, 1].
        cu_seqlens: int32 [B+1], rising from 0 to N; makes the input packed. Excludes `mask`.
        mask: [B, T], bool or 0/1. Outputs are 0 where it is 0, whatever stands there.
        bootstrap: [B], value after the last step of each sequence, for sequences that were cut off;
            None for sequences that ended (0).
        whiten: whiten the advantages over all unmasked tokens, as `masked_whiten` does by default.
        backend: see `fastrlhf.backends`.

    Returns:
        (advantages, returns), each in the layout of `rewards`, float32 (or float64, as the inputs).

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or value, by argument name. On a GPU the
            values of `mask` and `cu_seqlens` are not read, which would cost a sync.

    Source: Schulman et al. 2016 (arXiv:1506.02438), eq. 16; Ouyang et al. 2022, C.4.

    >>> gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]]), lam=1.0)
    (tensor([[0.5000, 0.5000]]), tensor([[1., 1.]]))
    """
    gamma, lam = check(OP, "rewards", rewards, values, gamma, lam, whiten)
    cu_seqlens, mask, count = _checks.layout(OP, "rewards", rewards, cu_seqlens, mask)
    if bootstrap is not None:
        _checks.per_sequence(OP, "bootstrap", bootstrap, "rewards", rewards, count)
    chosen = choose(OP, backend, rewards, values, bootstrap)
    if chosen == "reference":
        _checks.has_values(OP, "cu_seqlens", cu_seqlens)
        with torch.no_grad():
            return reference.gae(
                rewards,
                values,
                gamma=gamma,
                lam=lam,
                cu_seqlens=cu_seqlens,
                mask=mask,
                bootstrap=bootstrap,
                whiten=whiten,
            )
    return FWD[chosen](rewards, values, gamma, lam, cu_seqlens, mask, bootstrap, whiten).unbind()


def check(op, first, like, values, gamma, lam, whiten):
    """Checked (gamma, lam)."""
    if values is None:
        _checks.tensor(op, "values", values)
    _checks.same_tokens(op, first, like, values=values)
    gamma = _checks.fraction(op, "gamma", gamma)
    lam = _checks.fraction(op, "lam", lam)
    _checks.flag(op, "whiten", whiten)
    return gamma, lam


FWD = register(
    "gae(Tensor rewards, Tensor values, float gamma, float lam, Tensor? cu_seqlens, Tensor? mask, "
    "Tensor? bootstrap, bool whiten) -> Tensor advantages_returns",
    lambda rewards, *rest: _checks.empty_stacked(rewards, 2),
    op=OP,
    triton="gae.forward",
)
