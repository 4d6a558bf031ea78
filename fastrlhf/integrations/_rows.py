"""What the patches of several hosts share: which logits, heads and masks the ops serve, and in which dtype.

Shapes: logits [..., V], targets [...]; hidden [..., H], weight [V, H]; mask [B, T].
"""

import torch
from torch import Tensor

from fastrlhf.integrations._patch import Unserved
from fastrlhf.ops import _checks
from fastrlhf.ops.linear_logprob import linear_logprob
from fastrlhf.ops.token_logprob import token_logprob


def plain(name: str, value, dtypes=_checks.FLOAT_DTYPES) -> None:
    """Unserved unless `value` is a dense tensor of one of the dtypes, and whole on this rank."""
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        raise Unserved(f"{name} of {getattr(value, 'dtype', type(value).__name__)}")
    if hasattr(value, "device_mesh") or value.is_nested:
        raise Unserved(f"{name} is a {'nested tensor' if value.is_nested else 'DTensor'}")


def sharded(weight: Tensor) -> bool:
    """Whether this rank has a part of it only: a DTensor, or gathered by ZeRO-3 for the time of a call."""
    return hasattr(weight, "device_mesh") or hasattr(weight, "ds_id")


def number(name: str, value, low: float = 0.0) -> float:
    """Unserved unless `value` is a Python number above `low`, and finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Unserved(f"{name} is not a number")
    if not low < value < float("inf"):
        raise Unserved(f"{name} is not above {low:g} and finite")
    return float(value)


def served_rows(logits: Tensor, targets: Tensor | None) -> None:
    plain("logits", logits)
    if logits.dim() < 2:
        raise Unserved("logits with one axis")
    if targets is None:
        return
    if not isinstance(targets, Tensor) or targets.dtype not in _checks.INDEX_DTYPES:
        raise Unserved("labels that are no tensor of int32 or int64")
    if targets.shape != logits.shape[:-1]:
        raise Unserved("labels have a shape other than logits.shape[:-1]")


def entropy(logits: Tensor, backend: str) -> Tensor:
    """[...], float32 (float64 for float64 logits)."""
    # Any target does: the entropy does not look at it.
    targets = torch.zeros((), dtype=torch.int64, device=logits.device).expand(logits.shape[:-1])
    return token_logprob(logits, targets, return_entropy=True, backend=backend)[1]


def autocast(x: Tensor) -> Tensor:
    """A GEMM operand in autocast's dtype, where autocast is on."""
    device = x.device.type
    on = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(device)) if on else x


def head(hidden, weight, targets, temperature, backend: str) -> tuple[Tensor, Tensor]:
    """(logprob, entropy) [...], float32, of hidden @ weight.T / temperature."""
    plain("hidden states", hidden)
    plain("the head's weight", weight)
    if torch.float64 in (hidden.dtype, weight.dtype):
        raise Unserved("float64 hidden states or weight, whose results the host makes in float32")
    temperature = number("temperature", temperature)
    hidden, weight = autocast(hidden), autocast(weight)
    return linear_logprob(
        hidden, weight, targets, temperature=temperature, return_entropy=True, backend=backend
    )


def keep(mask: Tensor, like: Tensor) -> Tensor:
    """A mask of 0 and 1 as bool. Float masks are looked at: other numbers weigh steps, which no op does."""
    plain("the mask", mask, (torch.bool, *_checks.INDEX_DTYPES, *_checks.FLOAT_DTYPES))
    if mask.shape != like.shape:
        raise Unserved("the mask has another shape")
    if mask.device != like.device:
        raise Unserved("the mask is on another device")
    kept = mask.bool()
    if mask.is_floating_point() and not torch.equal(mask, weights(kept, mask.dtype)):
        raise Unserved("a mask of other numbers than 0 and 1")
    return kept


def weights(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as numbers to multiply by; from bytes, which torch converts and multiplies faster than bool."""
    return (mask.view(torch.uint8) if mask.dtype == torch.bool else mask).to(dtype)


def log_softmax_dtype(logits: Tensor) -> torch.dtype:
    """What torch makes of these logits here: under autocast it is not always their own dtype."""
    return torch.log_softmax(logits.new_empty(1), -1).dtype


# The hosts add up steps in the dtype they are given; only in these do the ops as well.
STEP_DTYPES = (torch.float32, torch.float64)


def same_steps(first: Tensor, dtypes=STEP_DTYPES, **others) -> None:
    """Unserved unless all have one shape, one of the dtypes and one device."""
    plain("rewards, values or log-probs", first, dtypes)
    for name, other in others.items():
        plain(name, other, (first.dtype,))
        if other.shape != first.shape or other.device != first.device:
            raise Unserved(f"{name} of another shape or device")


def constants(**tensors) -> None:
    """Unserved where one asks for a gradient that the ops do not give."""
    for name, tensor in tensors.items():
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise Unserved(f"{name} that require grad")


def fraction(name: str, value) -> None:
    """Unserved unless `value` is a number in [0, 1]."""
    number(name, value, low=-1.0)
    if not 0 <= value <= 1:
        raise Unserved(f"{name} outside [0, 1]")
