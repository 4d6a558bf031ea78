"""Checks shared by the per-token ops: packed [N] with cu_seqlens, or padded [B, T] with a mask.

B sequences, T steps, N tokens. Checks of values (a mask of 0 and 1, the ends of cu_seqlens) are for
CPU tensors only: on a GPU they would wait for the device.
"""

import difflib

import torch
from torch import Tensor

from fastrlhf.ops import _checks

# In the order of KlEstimator in csrc/common/sequence.h.
ESTIMATORS = ("k1", "k2", "k3", "abs")


def same_tokens(op: str, first: str, like: Tensor, **others: Tensor | None) -> None:
    """Float tensors of one shape on one device; float64 only together with float64. None passes."""
    _checks.float_tensor(op, first, like)
    tokens_of(op, first, like.shape, like.dtype, like.device, **others)


def tokens_of(op, first, shape, dtype, device, **others: Tensor | None) -> None:
    """The same of the others, where `first` has this shape, dtype and device."""
    for name, value in others.items():
        if value is None:
            continue
        if isinstance(value, Tensor) and value.dtype is dtype and value.device == device:
            if value.layout is torch.strided and not value.is_nested and value.shape == shape:
                continue  # nearly always: nothing to look at more closely
        _checks.float_tensor(op, name, value)
        _checks.shape(op, name, value, shape)
        _same_kind(op, name, value, first, dtype, device)


def per_sequence(op: str, name: str, value: Tensor, first: str, like: Tensor, count: int) -> None:
    """One float per sequence, on the device of `like`."""
    _checks.float_tensor(op, name, value)
    _checks.shape(op, name, value, (count,))
    _same_kind(op, name, value, first, like.dtype, like.device)


def _same_kind(op, name, value, first, dtype, device):
    _checks.same_device(op, name, value, device)
    if (value.dtype == torch.float64) != (dtype == torch.float64):
        raise TypeError(
            f"{op}: {name} must be float64 if and only if {first} is ({dtype}); got {value.dtype}"
        )


def mask(op: str, value: Tensor | None, like: Tensor) -> Tensor | None:
    """The mask as bool, or None. Bool, or integer or float of 0 and 1."""
    if value is None:
        return None
    checked = _checks.mask(op, value, like.shape, like.device)
    on_cpu = like.device.type == "cpu" and not torch.compiler.is_compiling()
    if value.dtype != torch.bool and on_cpu:
        wrong = value[checked & (value != 1)]
        if wrong.numel():
            raise ValueError(
                f"{op}: mask must be bool, or hold only 0 and 1; got {wrong[0].item()}"
            )
    return checked


def layout(
    op: str, first: str, like: Tensor, cu_seqlens: Tensor | None, mask_value: Tensor | None
) -> tuple[Tensor | None, Tensor | None, int]:
    """Checked (cu_seqlens, bool mask, number of sequences) of the tokens `like`."""
    if cu_seqlens is not None:
        if mask_value is not None:
            raise ValueError(f"{op}: give cu_seqlens (packed) or mask (padded), not both; got both")
        if like.dim() != 1:
            raise ValueError(
                f"{op}: {first} must be packed, [N], with cu_seqlens; got {tuple(like.shape)}"
            )
        cu_seqlens = _checks.cu_seqlens(op, cu_seqlens, like.shape[0], like.device)
        return cu_seqlens, None, cu_seqlens.shape[0] - 1
    if like.dim() != 2:
        raise ValueError(
            f"{op}: {first} must be [B, T], or packed [N] with cu_seqlens; got {tuple(like.shape)}"
        )
    return None, mask(op, mask_value, like), like.shape[0]


def estimator(op: str, value: object) -> int:
    """Index of a KL estimator, as the C++ and CUDA ops take it."""
    if value in ESTIMATORS:
        return ESTIMATORS.index(value)
    close = difflib.get_close_matches(str(value), ESTIMATORS, n=1, cutoff=0.3)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(f"{op}: estimator must be one of {ESTIMATORS}; got {value!r}{hint}")


def fraction(op: str, name: str, value: object) -> float:
    """A number in [0, 1]."""
    number = _checks.number(op, name, value, low=0)
    if number > 1:
        raise ValueError(f"{op}: {name} must be in [0, 1]; got {value}")
    return number


def acc_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums and of outputs: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def empty_tokens(x: Tensor) -> Tensor:
    """What the C++ and CUDA ops allocate for an output shaped as `x`: contiguous, acc dtype."""
    return x.new_empty(x.shape, dtype=acc_dtype(x))


def empty_stacked(x: Tensor, count: int) -> Tensor:
    """The same for `count` outputs, which the ops return as one tensor [count, ...]."""
    return x.new_empty((count, *x.shape), dtype=acc_dtype(x))


def rows(x: Tensor | None) -> Tensor | None:
    """The same tokens as a 1-d or 2-d tensor, which is what the C++ and CUDA ops read in place."""
    if x is None or x.dim() in (1, 2):
        return x
    return x.reshape(1) if x.dim() == 0 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
