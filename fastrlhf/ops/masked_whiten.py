"""masked_whiten: zero mean and unit variance over the unmasked elements of a batch.

Shapes: x [...], mask [...]; or x [N] with cu_seqlens [B+1].
"""

import torch
from torch import Tensor

from fastrlhf import reference
from fastrlhf.ops import _checks
from fastrlhf.ops._register import choose, register

OP = "masked_whiten"


def masked_whiten(
    x: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    shift_mean: bool = True,
    unbiased: bool = True,
    backend: str = "auto",
) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8), with one mean and variance over all unmasked elements.

    The sums are taken in a fixed order, in blocks whose moments are merged in float64: the result
    is bitwise the same for any number of threads. Not differentiable: the output never requires
    grad.

    Args:
        x: [...], float32, bfloat16, float16, or float64; any strides.
        cu_seqlens: int32 [B+1], rising from 0 to N = len(x). Packed tokens have no padding, so all
            of them count; accepted, and checked, so that packed callers can pass one layout to each
            op. Excludes `mask`.
        mask: the shape of `x`, bool or 0/1. The output is 0 where it is 0, whatever stands there.
        shift_mean: False adds the mean back after scaling.
        unbiased: divide the squares by n - 1 (by 1 where n < 2), else by n.
        backend: see `fastrlhf.backends`.

    Returns:
        The shape of `x`, float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or value, by argument name. On a GPU the
            values of `mask` and `cu_seqlens` are not read, which would cost a sync.

    Source: openai/lm-human-preferences `whiten`; the unbiased variance is verl's.

    >>> masked_whiten(torch.tensor([1.0, 2.0, 3.0]))
    tensor([-1.,  0.,  1.])
    """
    _checks.float_tensor(OP, "x", x)
    _checks.flag(OP, "shift_mean", shift_mean)
    _checks.flag(OP, "unbiased", unbiased)
    if cu_seqlens is None:
        mask = _checks.token_mask(OP, mask, x)
    else:
        _, mask, _ = _checks.layout(OP, "x", x, cu_seqlens, mask)
    chosen = choose(OP, backend, x)
    if chosen == "reference":
        with torch.no_grad():
            return reference.masked_whiten(x, mask=mask, shift_mean=shift_mean, unbiased=unbiased)
    out = FWD[chosen](_checks.as_rows(x), _checks.as_rows(mask), shift_mean, unbiased)
    return out if x.dim() in (1, 2) else out.reshape(x.shape)


FWD = register(
    "masked_whiten(Tensor x, Tensor? mask, bool shift_mean, bool unbiased) -> Tensor",
    lambda x, *rest: _checks.empty_tokens(x),
    op=OP,
    triton="masked_whiten.forward",
)
