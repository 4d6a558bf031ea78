"""Argument checks of all ops: TypeError or ValueError with the argument's name, what was expected and what was given.

Shapes: logits [..., V] and hidden [..., H] of N rows, B sequences, T steps. A check that reads values (a mask of 0 and
1, the ends of cu_seqlens, targets) is made on CPU only: on a GPU it would synchronize with the device.
"""

import difflib
import math
import numbers
import operator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.compiler import is_compiling

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)
WORKSPACES = ("fast", "compact")
# In the order of KlEstimator in csrc/common/sequence.h.
ESTIMATORS = ("k1", "k2", "k3", "abs")
# The types of nearly all tensor arguments: they pass on one look, anything else is examined.
_PLAIN = (Tensor, torch.nn.Parameter)
_STRIDED = torch.strided  # a global is found faster
# The kernels take numbers in float32. A divisor (a temperature, a soft-cap) below _TINY would be 0 there, or its
# reciprocal infinite.
_MAX, _TINY = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
# A clip that is None, as the raw ops take it: no ratio reaches it. (Infinity is no number in the JSON of AOTInductor.)
UNLIMITED = _MAX


# ---- one argument -------------------------------------------------------------------------------


def tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor; got {type(value).__name__}")
    if type(value) not in _PLAIN and hasattr(value, "device_mesh"):
        # The kernels would read one rank's part of it.
        raise TypeError(
            f"{op}: {name} must be a plain tensor; got a DTensor {tuple(value.shape)} with placements "
            f"{value.placements}. Under FSDP2 (fully_shard) call {op} inside the forward of the module "
            f"that owns {name}, where it is gathered, or pass {name}.full_tensor()"
        )
    if value.layout is not torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else str(value.layout)
        raise TypeError(f"{op}: {name} must be a dense tensor (torch.strided); got {kind}")


def float_tensor(op: str, name: str, value: object) -> None:
    if type(value) in _PLAIN and value.dtype in FLOAT_DTYPES and value.layout is _STRIDED:
        if not value.is_nested:
            return
    tensor(op, name, value)
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{op}: {name} must be float32, bfloat16, float16 or float64; got {value.dtype}"
        )


def index_tensor(op: str, name: str, value: object) -> None:
    if type(value) in _PLAIN and value.dtype in INDEX_DTYPES and value.layout is _STRIDED:
        if not value.is_nested:
            return
    tensor(op, name, value)
    if value.dtype not in INDEX_DTYPES:
        raise TypeError(f"{op}: {name} must be int32 or int64; got {value.dtype}")


def shape(op: str, name: str, value: Tensor, expected: tuple) -> None:
    if not _same_shape(value.shape, expected):
        packed = name in ("advantages", "rollout_weights") and len(expected) == 1
        other = ", or one a sequence with cu_seqlens" if packed else ""
        raise ValueError(
            f"{op}: {name} must have shape {tuple(expected)}{other}; got {tuple(value.shape)}"
        )


def has_shape(value: object, expected: tuple, *, unknown: bool = True) -> bool:
    """Whether it is a tensor of this shape. A nested tensor has none. `unknown`: see `_same_shape`."""
    dense = isinstance(value, Tensor) and not value.is_nested
    return dense and _same_shape(value.shape, expected, unknown)


def _same_shape(a: tuple, b: tuple, unknown: bool = True) -> bool:
    """Under torch.compile `unknown` for sizes that only the data will tell; the kernels check them again."""
    if not is_compiling():
        return a == b
    from torch.fx.experimental import symbolic_shapes  # slow to import

    guard = symbolic_shapes.guard_or_true if unknown else symbolic_shapes.guard_or_false
    return len(a) == len(b) and all(guard(x == y) for x, y in zip(a, b, strict=True))


def same_device(op: str, name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{op}: {name} must be on {device}; got {value.device}")


def constants(op: str, **tensors: Tensor | None) -> None:
    """Refuses tensors that require grad: no gradient reaches them, and none would be reported missing."""
    for name, value in tensors.items():
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{op}: {name} must be a constant, for no gradient would reach it (detach it); "
                "got a tensor that requires grad"
            )


def number(op: str, name: str, value: object, *, low: float | None = None, strict=False) -> float:
    """A finite Python number, at least (or, if strict, above) `low`."""
    # The common case. The rest names the error, or converts an int or a numpy scalar.
    if type(value) is float and -_MAX <= value <= _MAX and (low is None or value > low + _TINY):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{op}: {name} must be a number; got {type(value).__name__}")
    bound = "" if low is None else (f" above {low:g}" if strict else f" of at least {low:g}")
    held = abs(value) <= _MAX and (not strict or low != 0 or not 0 < value < _TINY)
    if not held or (low is not None and (value < low or (strict and value == low))):
        range_ = "" if held or not abs(value) < math.inf else " within the range of float32"
        raise ValueError(f"{op}: {name} must be a finite number{bound}{range_}; got {value}")
    return float(value)


def whole_number(op: str, name: str, value: object) -> int:
    """A Python or numpy integer as a Python one."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, numbers.Integral)):
        raise TypeError(f"{op}: {name} must be an int; got {type(value).__name__}")
    return value if isinstance(value, (int, torch.SymInt)) else int(value)


def word(op: str, name: str, value: object, words: tuple[str, ...]) -> None:
    """One of some strings. (`value in words` alone fails where `value` is an array.)"""
    if not isinstance(value, str) or value not in words:
        listed = " or ".join(filter(None, (", ".join(map(repr, words[:-1])), repr(words[-1]))))
        raise ValueError(f"{op}: {name} must be {listed}; got {value!r}")


def readable(x: Tensor) -> bool:
    """Whether a check may read values of `x`: a GPU would be waited for; a tracer and a fake tensor have none.

    Under vmap `x` may stand for many tensors.
    """
    if not x.is_cpu or is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return type(x) in _PLAIN or not is_fake(x)


def valueless(x: Tensor) -> bool:
    """Whether `x` has a shape and no values: a meta tensor, or a fake one."""
    return x.device.type == "meta" or (type(x) not in _PLAIN and is_fake(x))


def has_values(op: str, name: str, x: Tensor | None) -> None:
    """For a backend whose shapes depend on the values of `x`."""
    if x is not None and not is_compiling() and valueless(x):
        raise NotImplementedError(
            f"{op}: the reference needs the values of {name}, which meta and fake tensors do not have; "
            "use backend='auto'"
        )


def row_mask(op: str, value: object, expected: tuple, device: torch.device) -> Tensor | None:
    """The mask as bool, or None. It may have any real dtype; a row counts where it is not 0."""
    if value is None:
        return None
    tensor(op, "mask", value)
    if value.is_complex():
        raise TypeError(f"{op}: mask must be bool, or 0 and 1; got {value.dtype}")
    shape(op, "mask", value, expected)
    same_device(op, "mask", value, device)
    return value if value.dtype == torch.bool else value != 0


def fraction(op: str, name: str, value: object) -> float:
    """A number in [0, 1]."""
    checked = number(op, name, value, low=0)
    if checked > 1:
        raise ValueError(f"{op}: {name} must be in [0, 1]; got {value}")
    return checked


# ---- tokens of sequences ------------------------------------------------------------------------


def same_tokens(op: str, first: str, like: Tensor, **others: Tensor | None) -> None:
    """Float tensors of one shape on one device; float64 only together with float64. None passes."""
    float_tensor(op, first, like)
    tokens_of(op, first, like.shape, like.dtype, like.device, **others)


def tokens_of(op, first, expected, dtype, device, **others: Tensor | None) -> None:
    """`same_tokens` of `others`, where `first` has this shape, dtype and device."""
    compiling, on_cpu = is_compiling(), device.type == "cpu"
    for name, value in others.items():
        if value is None:
            continue
        if type(value) in _PLAIN and value.dtype is dtype and value.layout is _STRIDED:
            # `is_cpu` makes no torch.device.
            if (value.is_cpu if on_cpu else value.device == device) and not value.is_nested:
                if compiling or value.shape != expected:
                    shape(op, name, value, expected)
                continue  # the common case
        float_tensor(op, name, value)
        shape(op, name, value, expected)
        _same_kind(op, name, value, first, dtype, device)


def per_sequence(op: str, name: str, value: Tensor, first: str, like: Tensor, count: int) -> None:
    """One float per sequence, of the precision and on the device of `like`."""
    float_tensor(op, name, value)
    shape(op, name, value, (count,))
    _same_kind(op, name, value, first, like.dtype, like.device)


def _same_kind(op, name, value, first, dtype, device):
    same_device(op, name, value, device)
    if (value.dtype == torch.float64) != (dtype == torch.float64):
        raise TypeError(
            f"{op}: {name} must be float64 if and only if {first} is ({dtype}); got {value.dtype}"
        )


def token_mask(op: str, value: Tensor | None, like: Tensor) -> Tensor | None:
    """The mask as bool, or None. Its dtype is bool, or any real dtype with the values 0 and 1."""
    if value is None:
        return None
    checked = row_mask(op, value, like.shape, like.device)
    if value.dtype != torch.bool and readable(value):
        wrong = value[checked & (value != 1)]
        if wrong.numel():
            raise ValueError(
                f"{op}: mask must be bool, or hold only 0 and 1; got {wrong[0].item()}"
            )
    return checked


def offsets(
    op: str, value: object, tokens: int, device: torch.device, *, name="cu_seqlens", axis="B"
) -> Tensor:
    """int32 [B + 1]. On CPU the values must rise (not strictly) from 0 to `tokens`."""
    tensor(op, name, value)
    if value.dtype != torch.int32:
        raise TypeError(f"{op}: {name} must be int32; got {value.dtype}")
    if value.dim() != 1 or (not is_compiling() and value.numel() < 1):
        raise ValueError(
            f"{op}: {name} must have shape ({axis} + 1,) with {axis} >= 0; got {tuple(value.shape)}"
        )
    same_device(op, name, value, device)
    if readable(value):
        ends = value.tolist()  # one copy; for a batch's B it is cheaper than three tensor ops
        if ends[0] != 0 or ends[-1] != tokens or any(map(operator.gt, ends, ends[1:])):
            raise ValueError(
                f"{op}: {name} must rise from 0 to {tokens}; got {ends[:8]}"
                f"{' ...' if len(ends) > 8 else ''}"
            )
    return value.contiguous()


def layout(
    op: str, first: str, like: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None, int]:
    """Checked (cu_seqlens, bool mask, number of sequences) of the tokens `like`."""
    if cu_seqlens is not None:
        if mask is not None:
            raise ValueError(f"{op}: give cu_seqlens (packed) or mask (padded), not both; got both")
        if like.dim() != 1:
            raise ValueError(
                f"{op}: {first} must be packed, [N], with cu_seqlens; got {tuple(like.shape)}"
            )
        cu_seqlens = offsets(op, cu_seqlens, like.shape[0], like.device)
        return cu_seqlens, None, cu_seqlens.shape[0] - 1
    if like.dim() != 2:
        raise ValueError(
            f"{op}: {first} must be [B, T], or packed [N] with cu_seqlens; got {tuple(like.shape)}"
        )
    return None, token_mask(op, mask, like), like.shape[0]


def estimator(op: str, value: object) -> int:
    """Index of a KL estimator, which the kernels take in place of its name."""
    return ESTIMATORS.index(choice(op, "estimator", value, ESTIMATORS))


def choice(
    op: str,
    name: str,
    value: object,
    words: tuple[str, ...],
    *,
    meant: dict[str, str] | None = None,
) -> str:
    """One of some strings; the message names the nearest, or what `meant` has for the name of something else."""
    if isinstance(value, str) and value in words:
        return value
    hint = ""
    if isinstance(value, str):
        lower = value.lower()
        close = difflib.get_close_matches(lower, words, n=1, cutoff=0.3)
        if meant and lower in meant:
            hint = f" (use {meant[lower]})"
        elif close:
            hint = f" (did you mean {close[0]!r}?)"
    raise ValueError(f"{op}: {name} must be one of {words}; got {value!r}{hint}")


def acc_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums and of outputs: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def empty_tokens(x: Tensor) -> Tensor:
    """An output with one float per element of `x`, as the kernels allocate it: contiguous, in `acc_dtype`."""
    return x.new_empty(x.shape, dtype=acc_dtype(x))


def empty_stacked(x: Tensor, count: int) -> Tensor:
    """`count` such outputs in one tensor [count, ...]."""
    return x.new_empty((count, *x.shape), dtype=acc_dtype(x))


def as_rows(x: Tensor | None) -> Tensor | None:
    """The tokens as a 1-d or 2-d tensor, the layouts that the kernels read in place."""
    if x is None or x.dim() in (1, 2):
        return x
    return x.reshape(1) if x.dim() == 0 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


# ---- rows of logits -----------------------------------------------------------------------------


def logit_rows(
    op, logits, targets, temperature, softcap, mask, vocab=None, sharded=False, with_lse=False
):
    """Checked (row_temperature | None, temperature, softcap or 0.0, bool mask | None) of logits [..., V].

    `vocab`: V, where `logits` are hidden states [..., H], which `linear_head` has checked. `sharded`: it is one rank's
    part of V. `with_lse`: lse is wanted, and not log-probs and entropies alone.
    """
    if vocab is None:
        float_tensor(op, "logits", logits)
    dense = type(targets) in _PLAIN and targets.layout is _STRIDED
    if not dense or targets.is_nested or targets.dtype not in INDEX_DTYPES:
        index_tensor(op, "targets", targets)
    if logits.dim() < 1:
        name = "logits" if vocab is None else "hidden"
        raise ValueError(f"{op}: {name} must have a last axis; got a 0-d tensor")
    compiling = is_compiling()
    if compiling or targets.shape != logits.shape[:-1]:
        shape(op, "targets", targets, logits.shape[:-1])
    if targets.device != logits.device:
        same_device(op, "targets", targets, logits.device)
    what = "logits" if vocab is None else "weight"
    vocab = logits.shape[-1] if vocab is None else vocab
    if vocab == 0 and targets.numel() > 0:
        raise ValueError(f"{op}: {what} must have a vocabulary of at least 1 entry; got 0")
    softcap = 0.0 if softcap is None else number(op, "softcap", softcap, low=0, strict=True)
    row_temperature = None
    if isinstance(temperature, Tensor):
        row_temperature, temperature = _row_temperature(op, temperature, logits, targets), 1.0
    elif type(temperature) is not float or temperature != 1.0:
        temperature = number(op, "temperature", temperature, low=0, strict=True)
    if mask is not None:
        mask = row_mask(op, mask, targets.shape, logits.device)
    if vocab == 1 and not sharded and not with_lse:
        # Its probability is 1 at any temperature and soft-cap. At 1 the C++ kernel does not round z, so lse = z.
        row_values(op, targets, vocab, mask, row_temperature)
        return None, 1.0, 1.0 if softcap else 0.0, mask
    return row_temperature, temperature, softcap, mask


def _row_temperature(op, temperature, logits, targets):
    float_tensor(op, "temperature", temperature)
    same_device(op, "temperature", temperature, logits.device)
    constants(op, temperature=temperature)
    try:
        rows = temperature.expand(targets.shape)
    except RuntimeError:
        raise ValueError(
            f"{op}: temperature must broadcast to {tuple(targets.shape)}; "
            f"got {tuple(temperature.shape)}"
        ) from None
    return rows.to(acc_dtype(logits)).contiguous()


def row_constant(op: str, name: str, value: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """A float tensor [...] of the rows that is a constant to autograd, in the accumulator's dtype, contiguous."""
    float_tensor(op, name, value)
    shape(op, name, value, targets.shape)
    return _constant(op, name, value, logits)


def constant(op: str, name: str, value: Tensor | None, logits: Tensor) -> Tensor | None:
    """A float tensor that is a constant to autograd, in the accumulator's dtype, contiguous; None passes."""
    if value is None:
        return None
    float_tensor(op, name, value)
    return _constant(op, name, value, logits)


def _constant(op, name, value, logits):
    same_device(op, name, value, logits.device)
    if value.requires_grad:
        constants(op, **{name: value})
    dtype = acc_dtype(logits)
    return (value if value.dtype == dtype else value.to(dtype)).contiguous()


def scale_tensor(op: str, scale: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A 0-d scale as a constant of `dtype`."""
    float_tensor(op, "scale", scale)
    shape(op, "scale", scale, ())
    same_device(op, "scale", scale, device)
    constants(op, scale=scale)
    return scale.detach().to(dtype)


def row_values(op: str, targets: Tensor, vocab: int, mask, row_temperature) -> None:
    """On CPU and in eager mode: targets in [0, vocab) and temperatures above 0 wherever the mask is True.

    For backends whose kernels do not check, and for ops that would find out in a later chunk.
    """
    if not readable(targets):
        return
    counted = targets if mask is None else targets[mask]
    if counted.numel() and (int(counted.min()) < 0 or int(counted.max()) >= vocab):
        bad = ((targets < 0) | (targets >= vocab)) & (True if mask is None else mask)
        row = int(bad.reshape(-1).nonzero()[0])
        value = int(targets.reshape(-1)[row])
        raise ValueError(f"{op}: targets must be in [0, {vocab}); got {value} at row {row}")
    if row_temperature is not None:
        bad = ~(row_temperature > 0) & (True if mask is None else mask)
        if bool(bad.any()):
            row = int(bad.reshape(-1).nonzero()[0])
            value = row_temperature.reshape(-1)[row].item()
            raise ValueError(f"{op}: temperature must be above 0; got {value:f} at row {row}")


def overwritable(logits: Tensor) -> bool:
    """Whether a backward may write the gradient of [..., V] logits over them.

    Not where rows share memory (an expanded view), nor in layouts that the kernels copy before they
    read (more than two row strides, a last stride that is not 1, a negative view), nor under torch.func.vmap.
    """
    if torch._C._are_functorch_transforms_active() or logits.is_neg():
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


def scale_argument(op, scale: object, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """A number or 0-d tensor as a 0-d constant of `dtype`; None for 1, which costs nothing."""
    if type(scale) is float and scale == 1:
        return None
    if not isinstance(scale, Tensor):
        return torch.full((), number(op, "scale", scale), dtype=dtype, device=device)
    return scale_tensor(op, scale, device, dtype)


# ---- the head of a linear op --------------------------------------------------------------------


def linear_head(op, hidden, weight, bias, workspace) -> torch.dtype:
    """Checks hidden [..., H], weight [V, H] and bias [V]; returns the dtype of sums over their products."""
    float_tensor(op, "hidden", hidden)
    float_tensor(op, "weight", weight)
    expected, given = hidden.shape, weight.shape
    if not expected or len(given) != 2 or given[1] != expected[-1]:
        width = expected[-1] if expected else "H"
        raise ValueError(
            f"{op}: weight must have shape (V, {width}) for hidden {tuple(expected)}; "
            f"got {tuple(given)}"
        )
    if expected[-1] == 0:
        raise ValueError(f"{op}: hidden must have at least 1 feature; got {tuple(expected)}")
    if weight.device != hidden.device:
        same_device(op, "weight", weight, hidden.device)
    if bias is not None:
        float_tensor(op, "bias", bias)
        shape(op, "bias", bias, given[:1])
        same_device(op, "bias", bias, hidden.device)
    if type(workspace) is not str or workspace not in WORKSPACES:
        word(op, "workspace", workspace, WORKSPACES)
    return torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32


def num_rows(op: str, value: object, mask: Tensor | None, targets: Tensor) -> int:
    """Checked. On CPU and in eager mode, `value` must also be the number of rows that `mask` counts."""
    value = whole_number(op, "num_rows", value)
    if mask is None:
        raise ValueError(f"{op}: num_rows must come with mask; got mask=None")
    if not is_compiling() and not 0 <= value <= targets.numel():
        raise ValueError(f"{op}: num_rows must be in [0, {targets.numel()}]; got {value}")
    if readable(mask):
        count = int(mask.sum())
        if count != value:
            raise ValueError(f"{op}: num_rows must be {count}, the rows that count; got {value}")
    return value


def reduction(op: str, value: object) -> None:
    word(op, "reduction", value, ("mean", "sum", "none"))


def flag(op: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a bool; got {type(value).__name__}")


# ---- the PPO loss -------------------------------------------------------------------------------


def ppo_settings(op, clip, dual_clip, value_clip, value_coef, entropy_coef):
    """(low, high, dual_clip, value_clip, value_coef, entropy_coef) as the raw op takes them.

    low, high: limits of the ratio. A clip that is None is UNLIMITED, the lower one -UNLIMITED.
    """
    floats = type(clip) is type(value_clip) is type(value_coef) is type(entropy_coef) is float
    if floats and dual_clip is None and _TINY < clip < _MAX and _TINY < value_clip < _MAX:
        if -_MAX < value_coef < _MAX and -_MAX < entropy_coef < _MAX:
            # The common case: 0.25 us less, 1.5 % of a forward.
            return 1 - clip, 1 + clip, UNLIMITED, value_clip, value_coef, entropy_coef
    return (
        *ratio_limits(op, clip, dual_clip),
        UNLIMITED
        if value_clip is None
        else number(op, "value_clip", value_clip, low=0, strict=True),
        number(op, "value_coef", value_coef),
        number(op, "entropy_coef", entropy_coef),
    )


def ratio_limits(op: str, clip: object, dual_clip: object) -> tuple[float, float, float]:
    """(low, high, dual_clip) of `ppo_settings`."""
    if type(clip) is float and dual_clip is None and _TINY < clip < _MAX:
        return 1 - clip, 1 + clip, UNLIMITED
    low, high = clip_limits(op, clip)
    return (
        -UNLIMITED if low is None else 1 - low,
        UNLIMITED if high is None else 1 + high,
        UNLIMITED if dual_clip is None else number(op, "dual_clip", dual_clip, low=1, strict=True),
    )


def clip_limits(op: str, clip: object) -> tuple[float | None, float | None]:
    """(low, high) of a number or a pair: the ratio is clipped to [1 - low, 1 + high]."""
    if not isinstance(clip, (tuple, list)):
        if clip is None:
            raise TypeError(
                f"{op}: clip must be a number or a pair (low, high), (None, None) for no clip; got NoneType"
            )
        clip = number(op, "clip", clip, low=0, strict=True)
        return clip, clip
    if len(clip) != 2:
        raise ValueError(f"{op}: clip must be a number or a pair (low, high); got {clip!r}")
    sides = zip(("low", "high"), clip, strict=True)
    return tuple(
        None if c is None else number(op, f"clip ({side})", c, low=0, strict=True)
        for side, c in sides
    )


def ppo_values(op, values, old_values, returns, value_clip):
    """Which of the value tensors must come together."""
    if values is None:
        for name, given in (("old_values", old_values), ("returns", returns)):
            if given is not None:
                raise ValueError(f"{op}: {name} must come with values; got values=None")
        return
    if returns is None:
        raise ValueError(f"{op}: returns must be given with values; got None")
    if old_values is None and value_clip is not None:
        raise ValueError(
            f"{op}: old_values must be given with values, or value_clip=None; got None"
        )


def ppo_constants(op, old_logprob, advantages, old_values, returns):
    given = (old_logprob, advantages, old_values, returns)
    for x in given:
        if x is not None and x.requires_grad:
            names = ("old_logprob", "advantages", "old_values", "returns")
            constants(op, **dict(zip(names, given, strict=True)))
