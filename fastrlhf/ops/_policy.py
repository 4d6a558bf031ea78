"""Settings of the policy loss beyond plain PPO: checks, and the arguments that the raw ops take for them.

ppo_loss, token_loss and linear_ppo_loss share these settings (docs/losses.md). N tokens in S sequences, packed or
[B, T]. A raw op gets them as `more` = [ref_logprob, rollout, cu_seqlens, sequences] (None: absent) and `options`,
numbers in the order of `Option`. Both are empty for plain PPO, which is what most calls are.

`sequences` [5, S], in the order of `Sequence`, has one number of each kind a sequence; it comes with cu_seqlens.
"""

import math
import numbers
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf.ops import _checks
from fastrlhf.ops._register import register
from fastrlhf.reference import AGGREGATIONS, LOG_RATIO_LIMIT, OBJECTIVES, POLICY_DEFAULTS

KL_GRADIENTS = ("estimator", "k2", "ratio")
ROLLOUT_LEVELS = ("token", "sequence", "sequence_mean")
ROLLOUT_MODES = ("truncate", "mask")
# Objectives as the kernels take them. gspo is ppo with the ratio of a sequence.
_KERNEL_OBJECTIVES = ("ppo", "reinforce", "cispo", "sapo")
CLIPPED = ("ppo", "gspo", "cispo")  # objectives that use `clip`
# Methods that are an objective with settings: the nearest name is another method's.
_METHODS = {
    "vanilla": "'ppo'",
    **dict.fromkeys(
        ("grpo", "dapo", "dr_grpo", "bnpo"), "'ppo' with the settings in docs/losses.md"
    ),
    "luspo": "'gspo' with the settings in docs/losses.md",
    "gpg": "'reinforce' with the settings in docs/losses.md",
}


class Option(IntEnum):
    """Places in `options`; the same as in csrc/common/policy.h and kernels/_policy.py."""

    OBJECTIVE = 0  # index in _KERNEL_OBJECTIVES
    SEQUENCE_RATIO = 1  # 1: the log-ratio is that of the sequence
    TAU_POS = 2
    TAU_NEG = 3
    KL_COEF = 4
    KL_ESTIMATOR = 5  # index in _checks.ESTIMATORS
    KL_CLAMP = 6
    KL_GRADIENT = 7  # index in KL_GRADIENTS
    ROLLOUT = 8  # index in _ROLLOUT
    ROLLOUT_LOW = 9
    ROLLOUT_HIGH = 10
    FIRST_ROW = (
        11  # place of the first row among the tokens of cu_seqlens: a chunk starts in the middle
    )


# What `rollout` [N] holds, or Sequence.ROLLOUT if it is absent: nothing; weights; log-probs (of a sequence: the weight
# before its bounds) whose weight is truncated to the bounds, or 0 outside them.
_ROLLOUT = ("none", "weights", "truncate", "mask")


class Sequence(IntEnum):
    """Rows of `sequences`."""

    WEIGHT = 0  # factor of the policy loss, KL and entropy of each token
    VALUE_WEIGHT = 1  # factor of the value loss of each token
    ADVANTAGE = 2  # where advantages [N] are absent
    LOG_RATIO = 3  # with SEQUENCE_RATIO: the mean of logprob - old_logprob, not clamped
    ROLLOUT = 4


class Policy(NamedTuple):
    """Checked settings. `plain`: nothing beyond plain PPO was asked for."""

    options: dict  # every setting by name, as reference.py takes them
    low: float  # limits of the ratio
    high: float
    dual_clip: float
    plain: bool
    aggregation: str | None
    value_aggregation: str | None
    length: float | None
    num_tokens: float | Tensor | None
    num_sequences: float | Tensor | None
    given_cu_seqlens: Tensor | None
    cu_seqlens: Tensor | None  # given, or made of [B, T]; None where no sequence matters
    count: int  # S
    advantages: Tensor | None  # per token, as given
    advantage: Tensor | None  # [S]
    rollout: Tensor | None  # per token: weights or log-probs
    rollout_weight: Tensor | None  # [S], ready weights

    @property
    def sequence_ratio(self) -> bool:
        return self.options["objective"] == "gspo"

    @property
    def limits(self) -> tuple[float, float, float]:
        return self.low, self.high, self.dual_clip


# ---- checks -------------------------------------------------------------------------------------


def _is_default(name, value) -> bool:
    """An array has no truth, and a tensor's would be waited for."""
    plain = isinstance(value, (bool, str, tuple, numbers.Real))
    return plain and value == POLICY_DEFAULTS[name]


def _unused(op, objective, **given):
    for name, value in given.items():
        if value is not None and not _is_default(name, value):
            raise ValueError(
                f"{op}: {name} must not be given with objective={objective!r}, which does not use it; "
                f"got {value!r}"
            )


def _bounds(op, bounds):
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise ValueError(
            f"{op}: rollout_bounds must be a pair (low or None, high or None); got {bounds!r}"
        )
    low, high = (
        None if b is None else _checks.number(op, f"rollout_bounds ({side})", b, low=0)
        for side, b in zip(("low", "high"), bounds, strict=True)
    )
    if low is not None and high is not None and low > high:
        raise ValueError(f"{op}: rollout_bounds must rise; got {bounds!r}")
    return low, high


def _denominator(op, name, value, device):
    """A count above 0: a number, or a 0-d tensor, which is not read."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        _checks.tensor(op, name, value)
        _checks.shape(op, name, value, ())
        _checks.same_device(op, name, value, device)
        _checks.constants(op, **{name: value})
        if value.is_complex():
            raise TypeError(f"{op}: {name} must be a real number; got {value.dtype}")
        if _checks.readable(value) and not 0 < value.item() < math.inf:
            raise ValueError(f"{op}: {name} must be a finite number above 0; got {value.item()}")
        return value.detach()
    return _checks.number(op, name, value, low=0, strict=True)


def _per_token_or_sequence(op, name, value, first, shape, dtype, device, count):
    """(per token, per sequence [S]): one of them is None. [S] and [S, 1] are per sequence unless they are `shape`."""
    if value is None:
        return None, None
    _checks.float_tensor(op, name, value)
    _checks.constants(op, **{name: value})
    # Of sizes that only the data will tell: [S] beside [B, T] can be nothing else, what is not known to be one a
    # sequence has one a token.
    only = value.dim() == 1 and len(shape) == 2
    per_sequence = count is not None and any(
        _checks.has_shape(value, one, unknown=only) for one in ((count,), (count, 1))
    )
    per_token = _checks.has_shape(value, shape, unknown=not per_sequence)
    if per_token and not (per_sequence and value.dim() == 2):
        _checks.tokens_of(op, first, shape, dtype, device, **{name: value})
        return value, None
    if not per_sequence:
        if count is None:
            _checks.shape(op, name, value, shape)
        raise ValueError(
            f"{op}: {name} must have shape {tuple(shape)}, or ({count},) or ({count}, 1) for one a sequence; "
            f"got {tuple(value.shape)}"
        )
    _checks.tokens_of(op, first, value.shape, dtype, device, **{name: value})
    return None, value.reshape(-1)


def check_settings(
    op: str, *, aggregation, value_aggregation=None, length=None, rows=False, **settings
) -> tuple[dict, float | None]:
    """The settings that are no tensors, checked: (those of POLICY_DEFAULTS by name, length)."""
    objective = _checks.choice(op, "objective", settings["objective"], OBJECTIVES, meant=_METHODS)
    clip, dual_clip = settings["clip"], settings["dual_clip"]
    taus = {name: settings[name] for name in ("tau_pos", "tau_neg")}
    if objective not in CLIPPED:
        _unused(op, objective, clip=clip)
    if objective not in ("ppo", "gspo"):
        _unused(op, objective, dual_clip=dual_clip)
    if objective != "sapo":
        _unused(op, objective, **taus)
    clip = _checks.clip_limits(op, clip)
    if dual_clip is not None:
        dual_clip = _checks.number(op, "dual_clip", dual_clip, low=1, strict=True)
    taus = {name: _checks.number(op, name, tau, low=0, strict=True) for name, tau in taus.items()}

    coef = _checks.number(op, "kl_coef", settings["kl_coef"])
    _checks.choice(op, "kl_estimator", settings["kl_estimator"], _checks.ESTIMATORS)
    _checks.flag(op, "kl_clamp", settings["kl_clamp"])
    gradient = _checks.choice(op, "kl_gradient", settings["kl_gradient"], KL_GRADIENTS)
    if gradient == "ratio" and objective == "reinforce":
        raise ValueError(
            f"{op}: kl_gradient must not be 'ratio' with objective='reinforce', which has no ratio; got 'ratio'"
        )
    _checks.choice(op, "rollout_level", settings["rollout_level"], ROLLOUT_LEVELS)
    _checks.choice(op, "rollout_mode", settings["rollout_mode"], ROLLOUT_MODES)
    bounds = _bounds(op, settings["rollout_bounds"])

    if aggregation is not None or not rows:
        _checks.choice(op, "aggregation", aggregation, AGGREGATIONS)
    if value_aggregation is not None:
        _checks.choice(op, "value_aggregation", value_aggregation, AGGREGATIONS)
    norm = "seq-mean-token-sum-norm" in (aggregation, value_aggregation)
    if norm and length is None:
        raise ValueError(
            f"{op}: length must be given with aggregation='seq-mean-token-sum-norm'; got None"
        )
    if length is not None:
        if not norm:
            raise ValueError(
                f"{op}: length must come with aggregation='seq-mean-token-sum-norm'; got length={length}"
            )
        length = _checks.number(op, "length", length, low=0, strict=True)
    checked = {
        "clip": clip,
        "dual_clip": dual_clip,
        **taus,
        "kl_coef": coef,
        "rollout_bounds": bounds,
    }
    return {**settings, **checked}, length


def _together(op, tensor, value, settings, names):
    """Refuses settings without the tensor that they are about."""
    for name in names:
        if value is None and not _is_default(name, settings[name]):
            raise ValueError(
                f"{op}: {name} must come with {tensor}; got {settings[name]!r} and {tensor}=None"
            )


def check(
    op: str,
    first: str,
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    *,
    old_logprob: Tensor | None,
    advantages: Tensor | None,
    cu_seqlens: Tensor | None,
    ref_logprob: Tensor | None,
    rollout_weights: Tensor | None,
    rollout_logprob: Tensor | None,
    aggregation: str | None,
    value_aggregation: str | None = None,
    values: bool = True,
    rows: bool = False,
    length: float | None,
    num_tokens: float | Tensor | None,
    num_sequences: float | Tensor | None,
    **settings,
) -> Policy:
    """The settings of one call, for log-probs of this shape, dtype and device. `settings`: the rest of POLICY_DEFAULTS.

    `values`: whether there is a value loss. `rows`: the op's rows may stay without the weights of an aggregate.
    """
    modes = {"aggregation": aggregation, "value_aggregation": value_aggregation}
    settings, length = check_settings(op, **modes, length=length, rows=rows, **settings)
    objective, (low, high), dual_clip = (
        settings[name] for name in ("objective", "clip", "dual_clip")
    )
    clips = objective in CLIPPED
    given_cu_seqlens = cu_seqlens
    if cu_seqlens is not None:
        if len(shape) != 1:
            raise ValueError(
                f"{op}: {first} must be packed, [N], with cu_seqlens; got {tuple(shape)}"
            )
        cu_seqlens = _checks.offsets(op, cu_seqlens, shape[0], device, axis="S")
        count = cu_seqlens.shape[0] - 1
    else:
        count = shape[0] if len(shape) == 2 else None
    advantages, advantage = _per_token_or_sequence(
        op, "advantages", advantages, first, shape, dtype, device, count
    )
    given = {"ref_logprob": ref_logprob, "rollout_logprob": rollout_logprob}
    _checks.tokens_of(op, first, shape, dtype, device, **given)
    _checks.constants(op, **given)
    if old_logprob is not None:
        _checks.constants(op, old_logprob=old_logprob)

    kl = ("kl_coef", "kl_estimator", "kl_clamp", "kl_gradient")
    _together(op, "ref_logprob", ref_logprob, settings, kl)
    if rollout_weights is not None and rollout_logprob is not None:
        raise ValueError(f"{op}: give rollout_weights or rollout_logprob, not both; got both")
    of_weights = ("rollout_level", "rollout_mode", "rollout_bounds")
    _together(op, "rollout_logprob", rollout_logprob, settings, of_weights)
    per_token, rollout_weight = _per_token_or_sequence(
        op, "rollout_weights", rollout_weights, first, shape, dtype, device, count
    )
    if value_aggregation is not None and not values:
        raise ValueError(
            f"{op}: value_aggregation must come with values; got {value_aggregation!r} and values=None"
        )
    needs = [f"{name}={mode!r}" for name, mode in modes.items() if _over_sequences(mode)]
    if objective == "gspo":
        needs.append("objective='gspo'")
    if rollout_logprob is not None and settings["rollout_level"] != "token":
        needs.append(f"rollout_level={settings['rollout_level']!r}")
    if needs and count is None:
        raise ValueError(
            f"{op}: {needs[0]} needs sequences: {first} must be [B, T], or [N] with cu_seqlens; "
            f"got {tuple(shape)} without cu_seqlens"
        )
    num_tokens = _denominator(op, "num_tokens", num_tokens, device)
    num_sequences = _denominator(op, "num_sequences", num_sequences, device)
    if num_tokens is not None and "token-mean" not in modes.values():
        raise ValueError(
            f"{op}: num_tokens must come with aggregation='token-mean'; got {aggregation!r}"
        )
    if num_sequences is not None and not any(map(_over_sequences, modes.values())):
        raise ValueError(
            f"{op}: num_sequences must come with an aggregation over sequences; got {aggregation!r}"
        )

    sequences = bool(needs) or advantage is not None or rollout_weight is not None
    if sequences and cu_seqlens is None:
        cu_seqlens = torch.arange(count + 1, dtype=torch.int32, device=device) * shape[1]
    plain = (
        objective == "ppo" and not sequences and old_logprob is not None and ref_logprob is None
        and per_token is None and rollout_logprob is None
    )  # fmt: skip
    unlimited = _checks.UNLIMITED
    return Policy(
        options={**settings, **given, "rollout_weights": rollout_weights},
        low=-unlimited if low is None or not clips else 1 - low,
        high=unlimited if high is None or not clips else 1 + high,
        dual_clip=unlimited if dual_clip is None else dual_clip,
        plain=plain,
        aggregation=aggregation,
        value_aggregation=value_aggregation,
        length=length,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        given_cu_seqlens=given_cu_seqlens,
        cu_seqlens=cu_seqlens if sequences else None,
        count=0 if count is None else count,
        advantages=advantages,
        advantage=advantage,
        rollout=rollout_logprob if per_token is None else per_token,
        rollout_weight=rollout_weight,
    )  # fmt: skip


# ---- what the raw ops take ----------------------------------------------------------------------


def options(policy: Policy, first_row: int = 0) -> list[float]:
    """The numbers of `Option`; [] for plain PPO."""
    if policy.plain:
        return []
    given, unlimited = policy.options, _checks.UNLIMITED
    objective = "ppo" if given["objective"] == "gspo" else given["objective"]
    rollout = "none"
    if given["rollout_weights"] is not None:
        rollout = "weights"
    elif given["rollout_logprob"] is not None:
        rollout = given["rollout_mode"]
    low, high = given["rollout_bounds"]
    return [
        float(x)
        for x in (
            _KERNEL_OBJECTIVES.index(objective),
            policy.sequence_ratio,
            given["tau_pos"],
            given["tau_neg"],
            given["kl_coef"],
            _checks.ESTIMATORS.index(given["kl_estimator"]),
            given["kl_clamp"],
            KL_GRADIENTS.index(given["kl_gradient"]),
            _ROLLOUT.index(rollout),
            0.0 if low is None else low,
            unlimited if high is None else high,
            first_row,
        )
    ]


def sequence_rows(
    policy: Policy, logprob: Tensor, old_logprob: Tensor | None, mask: Tensor | None, backend: str
) -> Tensor | None:
    """`sequences` [5, S]; None where no sequence matters.

    The log-ratios are 0 if `logprob` is not known yet: pass `old_logprob` in its place, and see `log_ratio_row`.
    """
    if policy.cu_seqlens is None:
        return None
    acc = _checks.acc_dtype(logprob)
    weight = value_weight = ones = logprob.new_ones(policy.count, dtype=acc)
    mode, value_mode = policy.aggregation, policy.value_aggregation or policy.aggregation
    if _over_sequences(mode) or _over_sequences(value_mode):
        counts = SUMS[backend](logprob, None, mask, policy.cu_seqlens)[0]
        if _over_sequences(mode):
            weight = _weight(policy, mode, counts).to(acc)
        if value_mode == mode:
            value_weight = weight
        elif _over_sequences(value_mode):
            value_weight = _weight(policy, value_mode, counts).to(acc)
    advantage = ones if policy.advantage is None else policy.advantage.to(acc)
    log_ratio = torch.zeros_like(ones) if policy.sequence_ratio else ones
    rollout = ones if policy.rollout_weight is None else policy.rollout_weight.to(acc)
    # The rows are stacked and not written to: vmap refuses to write a row that differs between its calls.
    if sequence_rollout(policy):
        old = logprob.detach() if old_logprob is None else old_logprob
        given = (old, policy.rollout, mask, policy.cu_seqlens, backend)
        mean = policy.options["rollout_level"] == "sequence_mean"
        rollout = rollout_row(*given, mean=mean).to(acc)
    if policy.sequence_ratio and old_logprob is not None and logprob is not old_logprob:
        log_ratio = log_ratio_row(logprob, old_logprob, mask, policy.cu_seqlens, backend).to(acc)
    return torch.stack((weight, value_weight, advantage, log_ratio, rollout))


def log_ratio_row(
    logprob: Tensor, old_logprob: Tensor, mask: Tensor | None, cu_seqlens: Tensor, backend: str
) -> Tensor:
    """[S], fp64: the mean log-ratio of each sequence of the tokens."""
    count, total = SUMS[backend](logprob.detach(), old_logprob, mask, cu_seqlens)
    return total / count.clamp(min=1)


def rollout_row(
    old_logprob: Tensor, rollout_logprob: Tensor, mask: Tensor | None, cu_seqlens: Tensor, backend: str, *, mean: bool
) -> Tensor:  # fmt: skip
    """[S], fp64: the rollout weight of each sequence, before its bounds."""
    count, total = SUMS[backend](old_logprob, rollout_logprob, mask, cu_seqlens)
    log_weight = total / count.clamp(min=1) if mean else total
    return log_weight.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def _over_sequences(mode: str | None) -> bool:
    return mode is not None and mode.startswith("seq-")


def _weight(policy: Policy, mode: str, counts: Tensor) -> Tensor:
    """[S]: what a token's loss is multiplied by, in an aggregation over sequences."""
    number = policy.num_sequences
    if number is None:
        number = (counts > 0).sum(dtype=counts.dtype).clamp(min=1)
    if mode == "seq-mean-token-mean":
        return (counts.clamp(min=1) * number).reciprocal()
    each = policy.length if mode == "seq-mean-token-sum-norm" else 1.0
    return (torch.full_like(counts, each) * number).reciprocal()


def factors(policy: Policy, logprob: Tensor, mask: Tensor | None) -> Tensor | None:
    """[2]: what the policy and the value loss of all tokens are multiplied by; None for 1 / the tokens of this call."""
    modes = (policy.aggregation, policy.value_aggregation or policy.aggregation)
    if policy.num_tokens is None and all(mode == "token-mean" for mode in modes):
        return None
    acc = _checks.acc_dtype(logprob)
    if "token-mean" not in modes:
        return logprob.new_ones(2, dtype=acc)
    return torch.stack([factor(policy, mode, logprob, mask, acc) for mode in modes])


def factor(policy: Policy, mode: str | None, like: Tensor, mask: Tensor | None, acc) -> Tensor:
    """0-d: one of `factors`."""
    one = torch.ones((), dtype=acc, device=like.device)
    if mode != "token-mean":
        return one
    tokens = policy.num_tokens
    if tokens is None:
        tokens = (
            max(1, like.numel()) if mask is None else mask.sum(dtype=torch.float64).clamp(min=1)
        )
    return (one / tokens).to(acc)


def more(policy: Policy, sequences: Tensor | None) -> list[Tensor | None]:
    """The tensors of the raw ops beyond plain PPO; [] for plain PPO."""
    if policy.plain:
        return []
    rollout = None if sequence_rollout(policy) else policy.rollout
    ref_logprob = policy.options["ref_logprob"]
    # PyTorch resolves the negative views among an op's arguments, but not in a list.
    tokens = [_checks.as_rows(x if x is None else x.resolve_neg()) for x in (ref_logprob, rollout)]
    return [*tokens, policy.cu_seqlens, sequences]


def sequence_rollout(policy: Policy) -> bool:
    """Whether the rollout weight is that of a sequence, from its log-probs."""
    return (
        policy.options["rollout_logprob"] is not None and policy.options["rollout_level"] != "token"
    )


def reference_options(policy: Policy | None, limits, clip, *, value: bool = True) -> dict:
    """What reference.py takes for the settings of this module. `value`: with those of the value loss.

    limits: (low, high, dual_clip) of the ratio, as the raw ops take them.
    """
    if policy is None:
        dual_clip = None if limits[2] == _checks.UNLIMITED else limits[2]
        return {"clip": _checks.clip_limits("", clip), "dual_clip": dual_clip}
    shared = ("aggregation", "length", "num_tokens", "num_sequences")
    shared += ("value_aggregation",) if value else ()
    given = {name: getattr(policy, name) for name in shared}
    return {**policy.options, "cu_seqlens": policy.given_cu_seqlens, **given}


def beyond_plain(policy: Policy, tokens, backend: str):
    """(tokens, factors, more, options) of ppo_loss_fwd; `tokens`: its first eight arguments."""
    logprob, old_logprob, _, *rest, mask = tokens
    sequences = sequence_rows(policy, logprob, old_logprob, mask, backend)
    tokens = (logprob, old_logprob, _checks.as_rows(policy.advantages), *rest, mask)
    return tokens, factors(policy, logprob, mask), more(policy, sequences), options(policy)


# ---- registration -------------------------------------------------------------------------------


def _sums_fake(x, y, mask, cu_seqlens):
    return x.new_empty((2, cu_seqlens.shape[0] - 1), dtype=torch.float64)


# [2, S], fp64: of each sequence the number of unmasked tokens, and their sum of x - y (y = 0 if absent), added in the
# order of the tokens. x, y, mask: [N] or [B, T].
SUMS = register(
    "sequence_sums(Tensor x, Tensor? y, Tensor? mask, Tensor cu_seqlens) -> Tensor",
    _sums_fake,
    op="ppo_loss",
    triton="sequence_sums.forward",
)
