"""Argument checks shared by the ops: TypeError or ValueError with name, expected and got."""

import operator
import sys

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What nearly every argument is. The checks have one look at it, and a closer one at anything else.
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_MAX = sys.float_info.max
INDEX_DTYPES = (torch.int32, torch.int64)


def tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor; got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else str(value.layout)
        raise TypeError(f"{op}: {name} must be a dense tensor (torch.strided); got {kind}")


def float_tensor(op: str, name: str, value: object) -> None:
    if type(value) in _PLAIN and value.dtype in FLOAT_DTYPES and value.layout is torch.strided:
        if not value.is_nested:
            return
    tensor(op, name, value)
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{op}: {name} must be float32, bfloat16, float16 or float64; got {value.dtype}"
        )


def whole_tensor(op: str, name: str, value: object) -> None:
    """Refuses a DTensor: the kernels would read one rank's part of it."""
    if type(value) not in _PLAIN and hasattr(value, "device_mesh"):
        raise TypeError(
            f"{op}: {name} must be a plain tensor; got a DTensor {tuple(value.shape)} with placements "
            f"{value.placements}. Under FSDP2 (fully_shard) call {op} inside the forward of the module "
            f"that owns {name}, where it is gathered, or pass {name}.full_tensor()"
        )


def whole_float_tensor(op: str, name: str, value: object) -> None:
    """Both of the above."""
    if type(value) in _PLAIN and value.dtype in FLOAT_DTYPES and value.layout is torch.strided:
        if not value.is_nested:
            return
    whole_tensor(op, name, value)
    float_tensor(op, name, value)


def index_tensor(op: str, name: str, value: object) -> None:
    if type(value) in _PLAIN and value.dtype in INDEX_DTYPES and value.layout is torch.strided:
        if not value.is_nested:
            return
    tensor(op, name, value)
    if value.dtype not in INDEX_DTYPES:
        raise TypeError(f"{op}: {name} must be int32 or int64; got {value.dtype}")


def shape(op: str, name: str, value: torch.Tensor, expected: tuple) -> None:
    if value.shape != expected:
        raise ValueError(
            f"{op}: {name} must have shape {tuple(expected)}; got {tuple(value.shape)}"
        )


def same_device(op: str, name: str, value: torch.Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{op}: {name} must be on {device}; got {value.device}")


def constants(op: str, **tensors: torch.Tensor | None) -> None:
    """Refuses tensors that ask for a gradient which the op does not give: it would be lost without a word."""
    for name, value in tensors.items():
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{op}: {name} must be a constant, for no gradient would reach it (detach it); "
                "got a tensor that requires grad"
            )


def number(op: str, name: str, value: object, *, low: float | None = None, strict=False) -> float:
    """A finite Python number, at least (or, if strict, above) `low`."""
    # What nearly every call has; the rest finds out what is wrong, or makes a float of an int.
    if type(value) is float and -_MAX <= value <= _MAX and (low is None or value > low):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number; got {type(value).__name__}")
    bound = "" if low is None else (f" above {low:g}" if strict else f" of at least {low:g}")
    finite = abs(value) <= _MAX
    if not finite or (low is not None and (value < low or (strict and value == low))):
        raise ValueError(f"{op}: {name} must be a finite number{bound}; got {value}")
    return float(value)


def mask(op: str, value: object, expected: tuple, device: torch.device) -> torch.Tensor | None:
    """The mask as bool (True = counts), or None. Masks of 0 and 1 of any real dtype are taken."""
    if value is None:
        return None
    tensor(op, "mask", value)
    if value.is_complex():
        raise TypeError(f"{op}: mask must be bool, or 0 and 1; got {value.dtype}")
    shape(op, "mask", value, expected)
    same_device(op, "mask", value, device)
    return value if value.dtype == torch.bool else value != 0


def cu_seqlens(op: str, value: object, tokens: int, device: torch.device) -> torch.Tensor:
    """int32 [B + 1]. On CPU the values are checked: from 0 to the tokens, never falling."""
    tensor(op, "cu_seqlens", value)
    if value.dtype != torch.int32:
        raise TypeError(f"{op}: cu_seqlens must be int32; got {value.dtype}")
    if value.dim() != 1 or value.numel() < 1:
        raise ValueError(
            f"{op}: cu_seqlens must have shape (B + 1,) with B >= 0; got {tuple(value.shape)}"
        )
    same_device(op, "cu_seqlens", value, device)
    if device.type == "cpu" and not torch.compiler.is_compiling():
        ends = value.tolist()  # one copy; three tensor ops cost more at the B of a batch
        if ends[0] != 0 or ends[-1] != tokens or any(map(operator.gt, ends, ends[1:])):
            raise ValueError(
                f"{op}: cu_seqlens must rise from 0 to {tokens}; got {ends[:8]}"
                f"{' ...' if len(ends) > 8 else ''}"
            )
    return value.contiguous()


def overwritable(logits: torch.Tensor) -> bool:
    """Whether a backward may write the gradient of [..., V] logits over them.

    Not where rows share memory (an expanded view), nor in layouts that the kernels copy before they
    read (more than two row strides, or a last stride that is not 1), nor under torch.func.vmap.
    """
    if torch._C._are_functorch_transforms_active():
        return False
    *row_sizes, width = logits.shape
    *row_strides, last = logits.stride()
    if width > 1 and last != 1:
        return False
    row_axes, end, merges_at = 0, width, None
    for size, stride in zip(reversed(row_sizes), reversed(row_strides), strict=True):
        if size == 1:
            continue
        if stride < end:
            return False
        row_axes += stride != merges_at
        end = merges_at = stride * size
    return row_axes <= 2
