"""Checks and computations that several integrations share.

A `require_*` function raises `Unsupported`, so that the original runs, for arguments that the ops do not take.

Shapes: logits [..., V], targets [...]; hidden [..., H], weight [V, H]; mask [B, T].
"""

import torch
from torch import Tensor

import fastrlhf
from fastrlhf.integrations._targets import Unsupported
from fastrlhf.ops._checks import FLOAT_DTYPES, INDEX_DTYPES

# The trainers accumulate over tokens in the dtype of their tensors; the ops do the same in these two only.
STEP_DTYPES = (torch.float32, torch.float64)


# ---- checks ----


def require_dense(name: str, value, dtypes=FLOAT_DTYPES) -> None:
    """`value` is a dense tensor of one of the dtypes that this rank holds completely."""
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        raise Unsupported(f"{name} of {getattr(value, 'dtype', type(value).__name__)}")
    if hasattr(value, "device_mesh") or value.is_nested:
        raise Unsupported(f"{name} is a {'nested tensor' if value.is_nested else 'DTensor'}")


def require_number(name: str, value, low: float = 0.0) -> float:
    """`value` is a finite Python number above `low`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Unsupported(f"{name} is not a number")
    if not low < value < float("inf"):
        raise Unsupported(f"{name} is not above {low:g} and finite")
    return float(value)


def require_fraction(name: str, value) -> None:
    """`value` is a number in [0, 1]."""
    require_number(name, value, low=-1.0)
    if not 0 <= value <= 1:
        raise Unsupported(f"{name} outside [0, 1]")


def require_logits(logits: Tensor, targets: Tensor | None) -> None:
    """logits [..., V] with at least two axes; targets [...], integers."""
    require_dense("logits", logits)
    if logits.dim() < 2:
        raise Unsupported("logits with one axis")
    if targets is None:
        return
    if not isinstance(targets, Tensor) or targets.dtype not in INDEX_DTYPES:
        raise Unsupported("labels are not an int32 or int64 tensor")
    if targets.shape != logits.shape[:-1]:
        raise Unsupported("the shape of the labels is not logits.shape[:-1]")


def require_alike(first: Tensor, dtypes=STEP_DTYPES, **others) -> None:
    """All tensors have one shape, one device and one of the dtypes."""
    require_dense("rewards, values or log-probs", first, dtypes)
    for name, other in others.items():
        require_dense(name, other, (first.dtype,))
        if other.shape != first.shape or other.device != first.device:
            raise Unsupported(f"{name} of another shape or device")


def require_constants(**tensors) -> None:
    """No tensor needs a gradient, because the op gives it none."""
    for name, tensor in tensors.items():
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise Unsupported(f"{name} that require grad")


def require_binary_mask(mask: Tensor, like: Tensor) -> Tensor:
    """The mask as bool. The values of a float mask are read: other numbers than 0 and 1 are weights."""
    require_dense("the mask", mask, (torch.bool, *INDEX_DTYPES, *FLOAT_DTYPES))
    if mask.shape != like.shape:
        raise Unsupported("the mask has another shape")
    if mask.device != like.device:
        raise Unsupported("the mask is on another device")
    as_bool = mask.bool()
    if mask.is_floating_point() and not torch.equal(mask, as_numbers(as_bool, mask.dtype)):
        raise Unsupported("a mask with other numbers than 0 and 1")
    return as_bool


def require_count(name: str, value, like: Tensor) -> float | Tensor:
    """A number above 0, or a 0-d tensor on the GPU of `like`, which is not read."""
    if isinstance(value, Tensor) and value.dim() == 0 and not hasattr(value, "device_mesh"):
        if value.device.type != "cpu":
            if value.device != like.device:
                raise Unsupported(f"{name} on another device")
            return value
        value = value.item()
    return require_number(name, value)


def is_sharded(weight: Tensor) -> bool:
    """Whether this rank holds a part of the weight: a DTensor, or a parameter that ZeRO-3 gathers for each call."""
    return hasattr(weight, "device_mesh") or hasattr(weight, "ds_id")


# ---- dtypes ----


def as_numbers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as 0.0 and 1.0. torch converts uint8 faster than bool."""
    return (mask.view(torch.uint8) if mask.dtype == torch.bool else mask).to(dtype)


def log_softmax_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of torch.log_softmax(logits), which under autocast may differ from that of the logits."""
    return torch.log_softmax(logits.new_empty(1), -1).dtype


def to_autocast_dtype(x: Tensor, on_cpu: bool = False) -> Tensor:
    """x in autocast's dtype where autocast is on, as an operand of the original's GEMM; fp64 is unchanged.

    On CPU only with `on_cpu`: the ops' CPU GEMMs are fp32, so that rounding their operands only loses accuracy.
    """
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x
    return x if device == "cpu" and not on_cpu else x.to(torch.get_autocast_dtype(device))


# ---- computations ----


def entropy(logits: Tensor, **options) -> Tensor:
    """-sum_j p_j log p_j in nats, [...], float32 (float64 for float64 logits); options of `token_logprob`."""
    # The entropy does not depend on the targets.
    targets = torch.zeros((), dtype=torch.int64, device=logits.device).expand(logits.shape[:-1])
    return fastrlhf.token_logprob(logits, targets, return_entropy=True, **options)[1]


def head_logprob(hidden, weight, targets, temperature, backend: str) -> tuple[Tensor, Tensor]:
    """(logprob, entropy) [...], float32, of the logits hidden @ weight.T / temperature."""
    require_dense("hidden states", hidden)
    require_dense("the head's weight", weight)
    if torch.float64 in (hidden.dtype, weight.dtype):
        raise Unsupported("float64 hidden states or weight: the original computes in float32")
    return fastrlhf.linear_logprob(
        to_autocast_dtype(hidden, on_cpu=True),
        to_autocast_dtype(weight, on_cpu=True),
        targets,
        temperature=require_number("temperature", temperature),
        return_entropy=True,
        backend=backend,
    )


def aggregation(
    mode: str, like: Tensor, *, ranks, tokens=None, sequences=None, length=None
) -> dict:
    """Options of `ppo_loss` for an aggregation: this rank's share of a batch, times the number of ranks.

    `tokens` or `sequences`, whichever the mode divides by, is the number in the whole batch. None: the mean of this
    call, not multiplied.
    """
    options = {"aggregation": mode}
    if mode == "seq-mean-token-sum-norm":
        options["length"] = require_number("the length", length)
    if mode != "token-sum":
        per_token = mode == "token-mean"
        number = tokens if per_token else sequences
        if number is None:
            return options
        what = "tokens" if per_token else "sequences"
        options[f"num_{what}"] = require_count(f"the number of {what}", number, like)
    return options | {"scale": require_number("dp_size", ranks)}


def local_mean(loss: Tensor, keep: Tensor | None, options: dict) -> Tensor:
    """The loss, NaN where it is the mean over no token, as in the hosts; its gradients are 0 and stay finite."""
    if keep is None or "scale" in options:
        return loss
    count = keep.sum()
    return loss + (count / count - 1)


def value_loss(values, old_values, returns, *, clip: float | None, **options):
    """`ppo_loss` of the value term alone: the aggregate of 0.5 max of the squared errors."""
    # With advantages of 0 the policy term is 0. One expanded zero serves as all three of its tensors.
    zero = torch.zeros((), dtype=values.dtype, device=values.device).expand(values.shape)
    return fastrlhf.ppo_loss(
        zero,
        zero,
        zero,
        values=values,
        old_values=old_values,
        returns=returns,
        value_clip=clip,
        value_coef=1.0,
        **options,
    )


def pairwise_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """mean over the pairs of -log sigmoid(chosen - rejected - margin); all [B], 0-d out."""
    if margin is not None:
        chosen = chosen - margin
    pairs = chosen.shape[0]
    scores = torch.stack((chosen, rejected), dim=1).reshape(-1)
    ranks = torch.tensor([1, 2], device=scores.device).repeat(pairs)
    starts = torch.arange(0, 2 * pairs + 1, 2, dtype=torch.int32, device=scores.device)
    return fastrlhf.ranking_loss(scores, ranks, starts, backend=backend)
