"""Random calls of every op, odd ones included: `make fuzz`.

    python tests/fuzz_ops.py [--calls 50000] [--seed 0] [--backend cpu] [--op NAME] [--only SEED]

A call is drawn from one number, which is printed with a finding; `--only` repeats it. About a third of the calls have
one or two arguments replaced by something that a user might pass by mistake.

The oracle: a call either raises a TypeError or a ValueError that names the op and one of its arguments, and then the
reference raises one too; or it returns what the reference returns in float64, results and gradients, within the error
of the reference in the working dtype and of a rounding of the inputs. No argument changes, except one that the caller
offers for overwriting.
"""

import argparse
import collections
import inspect
import math
import os
import re
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "ops")]
os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402

import fastrlhf  # noqa: E402

OPS = sorted(fastrlhf.backends())
PARAMETERS = {op: set(inspect.signature(getattr(fastrlhf, op)).parameters) for op in OPS}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The tensors with a gradient. The linear losses take the first three, or values.
TRAINED = {"logits", "hidden", "weight", "bias", "logprob", "values", "entropy", "scores"}
CONSTANT = {"kl_reward": TRAINED, "gae": TRAINED, "kl_gae": TRAINED, "masked_whiten": TRAINED}


class Draw:
    """Random arguments from one seed."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def pick(self, *options):
        return options[self.rng.integers(len(options))]

    def dtype(self):
        return self.pick(torch.float32, torch.float32, torch.float32, *DTYPES[1:])

    def number(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def shape(self) -> tuple[int, ...]:
        count = self.pick(0, 1, 1, 2, 2, 2, 3)
        return tuple(int(self.pick(0, 1, 1, 2, 3, 5, 9)) for _ in range(count))

    def layout(self, x: torch.Tensor) -> torch.Tensor:
        """`x`, or a view of the same values with other strides."""
        kind = self.pick("plain", "plain", "transposed", "sliced", "offset")
        if kind == "transposed" and x.dim() > 1:
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        if kind == "sliced" and x.dim():
            wide = x.new_full(
                (*x.shape[:-1], 2 * x.shape[-1]), math.nan if x.is_floating_point() else 0
            )
            wide[..., ::2] = x
            return wide[..., ::2]
        if kind == "offset":
            flat = torch.cat([x.new_zeros(1), x.flatten()])
            return flat[1:].view(x.shape)
        return x

    def floats(self, shape, dtype, scale=1.0) -> torch.Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        kind = self.rng.random()
        if kind < 0.05:
            x = x.new_full(shape, self.number(-3, 3))
        elif kind < 0.1:
            x = x.round()
        elif kind < 0.15:
            x = 100 * x
        elif kind < 0.18:
            x = 1e-3 * x
        return self.layout((scale * x).to(dtype))

    def integers(self, high: int, shape) -> torch.Tensor:
        dtype = self.pick(torch.int64, torch.int64, torch.int32)
        x = torch.randint(max(high, 1), shape, generator=self.generator)
        return self.layout(x.to(dtype))

    def mask(self, shape):
        if self.chance(0.5):
            return None
        keep = self.pick(0.0, 0.5, 0.5, 0.8, 1.0)
        mask = torch.rand(shape, generator=self.generator) < keep
        return self.layout(mask.to(self.pick(torch.bool, torch.bool, torch.int64, torch.float32)))

    def spoil(self, x: torch.Tensor, mask, lowest=False) -> torch.Tensor:
        """NaN or inf where `mask` is 0, at times elsewhere; there also the lowest number."""
        if mask is not None and self.chance(0.3):
            x = x.clone()
            x[mask == 0] = self.pick(math.nan, math.inf, -math.inf)
        elif x.numel() and self.chance(0.03):
            at = int(self.rng.integers(x.numel()))
            odd = self.pick(-math.inf, math.nan, torch.finfo(x.dtype).min if lowest else math.inf)
            x = x.flatten().index_fill(0, torch.tensor(at), odd).view(x.shape)
        return x


# ---- arguments of each family of ops


def row_options(draw: Draw, shape, dtype, masked=True) -> dict:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    temperature = draw.pick(1.0, 1.0, 0.3, 0.7, 1.3, 8.0, 1e-3)
    if draw.chance(0.2):
        temperature = torch.rand(shape, generator=draw.generator).to(wide) + 0.3
    found = {
        "temperature": temperature,
        "softcap": draw.pick(None, None, None, 3.0, 30.0, 1e4),
        "mask": draw.mask(shape) if masked else None,
    }
    return {name: x for name, x in found.items() if x is not None}


def token_rows(draw: Draw, dtype) -> dict:
    shape, width = draw.shape(), int(draw.pick(1, 2, 3, 7, 31, 64, 65, 301))
    options = row_options(draw, shape, dtype)
    logits = draw.floats((*shape, width), dtype, draw.pick(1, 4, 30))
    logits = draw.spoil(logits, options.get("mask"), lowest=True)
    return {"logits": logits, "targets": draw.integers(width, shape), **options}


def token_logprob(draw: Draw) -> dict:
    more = {"return_entropy": draw.chance(0.5), "inplace_backward": draw.chance(0.2)}
    return token_rows(draw, draw.dtype()) | more


def wide(logprob) -> torch.Tensor:
    """Finite log-probs in fp32 or fp64."""
    return logprob.detach().nan_to_num(-1.0, -1.0, -1.0).clamp(-30, 0)


def policy_tensors(draw: Draw, shape, dtype, logprob) -> dict:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    old = logprob.detach().to(wide).nan_to_num(-1.0, -1.0, -1.0).clamp(-30, 0)
    step = torch.randn(shape, generator=draw.generator).to(wide)
    return {
        "advantages": draw.floats(shape, wide),
        "old_logprob": old + draw.pick(0.0, 0.1, 1.0) * step,
    }


def policy_settings(draw: Draw, shape, dtype, logprob, value=False) -> dict:
    """Settings beyond plain PPO of tokens of this shape, or none; half of the calls with sequences."""
    if draw.chance(0.4):
        return {}
    objective = draw.pick("ppo", "reinforce", "cispo", "gspo", "sapo")
    found, count = {"objective": objective}, shape[0] if len(shape) == 2 else None
    if len(shape) == 1 and draw.chance(0.7):
        cuts = sorted(int(x) for x in draw.rng.integers(0, shape[0] + 1, size=draw.pick(0, 1, 3)))
        found["cu_seqlens"] = torch.tensor([0, *cuts, shape[0]], dtype=torch.int32)
        count = len(cuts) + 1
    if objective == "gspo" and count is None:
        found["objective"] = objective = "cispo"
    sides = draw.number(0.05, 0.5), draw.number(0.05, 0.5), None
    if objective in ("ppo", "gspo", "cispo") and draw.chance(0.6):
        found["clip"] = draw.pick(
            sides[0], (sides[0], sides[1]), (None, sides[1]), (sides[0], None)
        )
    if objective in ("ppo", "gspo"):
        found["dual_clip"] = draw.pick(None, None, 1.5)
    if objective == "sapo":
        found |= {"tau_pos": draw.number(0.3, 2), "tau_neg": draw.number(0.3, 2)}

    def near(size):
        step = torch.randn(shape, generator=draw.generator).to(logprob.dtype)
        return draw.layout(logprob + size * step)

    # A log-prob below -30 is far from what is near its bound: k3 would overflow there, and with it 16-bit gradients.
    if draw.chance(0.5) and bool((logprob > -30).all()):
        found |= {"ref_logprob": near(draw.pick(0.1, 1.0)), "kl_coef": draw.number(-0.2, 0.5)}
        found |= {"kl_estimator": draw.pick("k1", "k2", "k3", "abs"), "kl_clamp": draw.chance(0.5)}
        gradients = ("estimator", "k2", "ratio")[: 2 if objective == "reinforce" else 3]
        found["kl_gradient"] = draw.pick(*gradients)
    kind = draw.pick("none", "weights", "logprob")
    per_sequence = count is not None and draw.chance(0.5)
    if kind == "weights":
        found["rollout_weights"] = draw.floats(
            (count,) if per_sequence else shape, logprob.dtype
        ).abs()
    elif kind == "logprob":
        levels = ("token", "sequence", "sequence_mean")[: 3 if count is not None else 1]
        found |= {"rollout_logprob": near(0.2), "rollout_level": draw.pick(*levels)}
        found |= {"rollout_mode": draw.pick("truncate", "mask")}
        # Bounds that a rounding of the weight does not meet: what is on the other side differs by the bound.
        found["rollout_bounds"] = draw.pick((None, None), (None, 2.7), (0.3, None), (0.3, 2.7))
    if count is not None and draw.chance(0.3):
        found["advantages"] = draw.floats(
            (count, 1) if draw.chance(0.3) else (count,), logprob.dtype
        )
    modes = ("token-mean", "token-sum")
    if count is not None:
        modes += ("seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
    used = [draw.pick(*modes)]
    if value or draw.chance(0.8):
        found["aggregation"] = used[0]
    else:
        used = []
    if value and draw.chance(0.3):
        found["value_aggregation"] = draw.pick(*modes)
        used.append(found["value_aggregation"])
    if "seq-mean-token-sum-norm" in used:
        found["length"] = draw.number(1, 30)
    if "token-mean" in used and draw.chance(0.3):
        found["num_tokens"] = draw.pick(
            7, 3.5, torch.tensor(9.0, dtype=torch.float64), torch.tensor(3)
        )
    if any(mode.startswith("seq") for mode in used) and draw.chance(0.3):
        found["num_sequences"] = draw.pick(4, torch.tensor(5.0))
    return found


def token_loss(draw: Draw) -> dict:
    dtype = draw.dtype()
    found = token_rows(draw, dtype)
    logprob = fastrlhf.token_logprob(**found, backend="reference")
    policy = policy_tensors(draw, logprob.shape, dtype, logprob)
    if draw.chance(0.3):
        del policy["old_logprob"]
        if draw.chance(0.3):
            del policy["advantages"]
    found |= policy | {"clip": draw.number(0.05, 0.5), "scale": draw.pick(1.0, 0.3, -2.0)}
    found["dual_clip"] = draw.pick(None, 1.5, 3.0)
    more = policy_settings(draw, logprob.shape, dtype, wide(logprob))
    for name in () if "objective" not in more and "old_logprob" in found else ("clip", "dual_clip"):
        del found[name]
    return found | more | {"inplace_backward": draw.chance(0.2)}


def head_rows(draw: Draw, masked=True) -> tuple[dict, torch.dtype]:
    dtype = draw.dtype()
    shape, width, vocab = (
        draw.shape(),
        int(draw.pick(1, 3, 8, 17)),
        int(draw.pick(1, 2, 7, 65, 301)),
    )
    options = row_options(draw, shape, dtype, masked)
    hidden = draw.floats((*shape, width), dtype)
    mask = options.get("mask")
    hidden = draw.spoil(hidden, mask)
    found = {
        "hidden": hidden,
        "weight": draw.floats((vocab, width), dtype),
        "targets": draw.integers(vocab, shape),
        "workspace": draw.pick("fast", "fast", "compact"),
        **options,
    }
    if draw.chance(0.4):
        found["bias"] = draw.floats((vocab,), dtype)
    return found, dtype


def linear_logprob(draw: Draw) -> dict:
    found, _ = head_rows(draw)
    return found | {"return_entropy": draw.chance(0.5), "return_lse": draw.chance(0.3)}


def linear_cross_entropy(draw: Draw) -> dict:
    found, dtype = head_rows(draw, masked=False)
    targets = found["targets"].clone()
    if draw.chance(0.5) and targets.numel():
        found["ignore_index"] = draw.pick(-100, -100, int(targets.flatten()[0]))
        targets[torch.rand(targets.shape, generator=draw.generator) < 0.4] = found["ignore_index"]
    found |= {"targets": targets, "reduction": draw.pick("mean", "sum", "none")}
    if draw.chance(0.3):
        # Above 0: with 0, a row of NaN has a loss of NaN, and no gradient.
        found["class_weight"] = draw.floats((len(found["weight"]),), draw.dtype()).abs() + 0.01
    if draw.chance(0.3):
        found |= {"label_smoothing": draw.number(0, 1), "z_loss": draw.pick(0.0, 1e-4, 0.1)}
        found["return_lse"] = draw.chance(0.5)
    return found | linear_options(draw, found, dtype)


def linear_options(draw: Draw, found: dict, dtype) -> dict:
    more = {"scale": draw.pick(1.0, 1.0, 0.25)}
    if draw.chance(0.2):
        wide = draw.pick(dtype, torch.float64 if dtype == torch.float64 else torch.float32)
        more["accumulate_into"] = torch.zeros(found["weight"].shape, dtype=wide)
    return more


def head_logprob(found: dict) -> torch.Tensor:
    return fastrlhf.linear_logprob(**found, backend="reference")


def linear_ppo_loss(draw: Draw) -> dict:
    found, dtype = head_rows(draw)
    shape = found["targets"].shape
    more = policy_tensors(draw, shape, dtype, head_logprob(found))
    wide = more["advantages"].dtype
    if draw.chance(0.5):
        more |= {n: draw.floats(shape, wide) for n in ("values", "old_values", "returns")}
        more |= {"value_clip": draw.pick(0.2, 1.0, None)}
    more |= {"entropy_coef": draw.pick(0.0, 0.1), "compact_rows": draw.chance(0.2)}
    settings = policy_settings(draw, shape, dtype, more["old_logprob"], value="values" in more)
    if "objective" not in settings:
        more |= {"clip": draw.number(0.05, 0.5), "dual_clip": draw.pick(None, 1.5)}
    elif "aggregation" not in settings:
        settings["aggregation"] = "token-sum"
    return found | more | settings | linear_options(draw, found, dtype)


def squared(logprob, weight):
    return weight * logprob * logprob


def with_entropy(logprob, entropy, weight):
    return -weight * logprob - 0.1 * entropy, {"size": logprob.detach().abs()}


def linear_token_loss(draw: Draw) -> dict:
    found, dtype = head_rows(draw)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    entropy = draw.chance(0.4)
    found |= {"loss_fn": with_entropy if entropy else squared, "with_entropy": entropy}
    found |= {"per_token": {"weight": draw.floats(found["targets"].shape, wide)}}
    found |= {"reduction": draw.pick("mean", "sum", "none"), "compact_rows": draw.chance(0.2)}
    return found | linear_options(draw, found, dtype)


def sequences(draw: Draw) -> tuple[tuple, int, dict]:
    """(shape of the tokens, sequences, how they lie)."""
    if draw.chance(0.5):
        lengths = [
            int(draw.pick(0, 1, 1, 2, 5, 17, 300)) for _ in range(int(draw.pick(0, 1, 2, 4)))
        ]
        ends = np.concatenate([[0], np.cumsum(lengths)])
        cu = torch.tensor(ends, dtype=torch.int32)
        return (int(sum(lengths)),), len(lengths), {"cu_seqlens": cu}
    shape = (int(draw.pick(0, 1, 2, 5)), int(draw.pick(0, 1, 2, 7, 33, 270)))
    mask = draw.mask(shape)
    return shape, shape[0], {} if mask is None else {"mask": mask}


def kl_reward(draw: Draw) -> dict:
    (shape, count, where), dtype = sequences(draw), draw.dtype()
    mask = where.get("mask")
    return {
        "logprob": draw.spoil(draw.floats(shape, dtype), mask),
        "ref_logprob": draw.spoil(draw.floats(shape, dtype), mask),
        "score": draw.floats((count,), dtype),
        "beta": draw.number(0, 0.3),
        "estimator": draw.pick("k1", "k2", "k3", "abs"),
        **where,
    }


def gae(draw: Draw) -> dict:
    (shape, count, where), dtype = sequences(draw), draw.dtype()
    mask = where.get("mask")
    found = {name: draw.spoil(draw.floats(shape, dtype), mask) for name in ("rewards", "values")}
    if draw.chance(0.4):
        found["bootstrap"] = draw.floats((count,), dtype)
    factors = {"gamma": draw.number(0, 1), "lam": draw.number(0, 1), "whiten": draw.chance(0.4)}
    return found | where | factors


def kl_gae(draw: Draw) -> dict:
    found = kl_reward(draw)
    like = found["logprob"]
    found["values"] = draw.spoil(draw.floats(like.shape, like.dtype), found.get("mask"))
    return found | {
        "gamma": draw.number(0, 1),
        "lam": draw.number(0, 1),
        "whiten": draw.chance(0.4),
    }


def masked_whiten(draw: Draw) -> dict:
    (shape, _, where), dtype = sequences(draw), draw.dtype()
    x = draw.spoil(draw.floats(shape, dtype), where.get("mask"))
    return {"x": x, **where, "shift_mean": draw.chance(0.5), "unbiased": draw.chance(0.5)}


def ppo_loss(draw: Draw) -> dict:
    shape, dtype = draw.shape(), draw.dtype()
    mask = draw.mask(shape)
    names = ["logprob", "old_logprob", "advantages"]
    if draw.chance(0.6):
        names += ["values", "old_values", "returns"]
    if draw.chance(0.4):
        names += ["entropy"]
    found = {name: draw.spoil(draw.floats(shape, dtype), mask) for name in names}
    if mask is not None:
        found["mask"] = mask
    old_logprob = found["old_logprob"].nan_to_num(0, 0, 0)
    settings = policy_settings(draw, shape, dtype, old_logprob, value="values" in names)
    if "objective" not in settings:
        found |= {"clip": draw.number(0.05, 0.5), "dual_clip": draw.pick(None, 1.5)}
    found |= settings
    coefficients = {"value_coef": draw.number(0, 1), "value_clip": draw.pick(0.2, None)}
    coefficients["entropy_coef"] = draw.number(0, 0.2) if "entropy" in found else 0.0
    return found | coefficients


def ranking_loss(draw: Draw) -> dict:
    sizes = [int(draw.pick(0, 1, 2, 4, 9, 33)) for _ in range(int(draw.pick(0, 1, 3)))]
    cu = torch.tensor(np.concatenate([[0], np.cumsum(sizes)]), dtype=torch.int32)
    count = int(sum(sizes))
    scores = draw.floats((count,), draw.dtype(), 2.0)
    margin = draw.pick(0.0, 0.0, draw.number(-2, 2), draw.floats((len(sizes),), scores.dtype))
    return {
        "scores": scores,
        "ranks": draw.integers(4, (count,)) + 1,
        "cu_groups": cu,
        "margin": margin,
    }


def group_advantage(draw: Draw) -> dict:
    sizes = [int(draw.pick(0, 1, 2, 4, 9, 33, 70)) for _ in range(int(draw.pick(0, 1, 3)))]
    return {
        "rewards": draw.floats((int(sum(sizes)),), draw.dtype()),
        "cu_groups": torch.tensor(np.concatenate([[0], np.cumsum(sizes)]), dtype=torch.int32),
        "baseline": draw.pick("mean", "leave_one_out", "none"),
        "scale": draw.pick("std", "batch_std", "gpg", "none"),
        "eps": draw.pick(1e-6, 1e-4, 0.1),
    }


# ---- mistakes

ODD_VALUES = (
    None, "x", "", True, False, 0, -1, 1, 2**70, -(2**70), 1.5, math.nan, math.inf, 1e39, 1e-320,
    [], {}, (1,), b"x", object(), 1j, np.float32(0.5), np.int64(3), np.bool_(True), np.ones(2),
    np.array(0.5),
)  # fmt: skip


def two_bytes(x):
    """Bools whose bytes are not 0 or 1, as from a numpy view."""
    return torch.from_numpy((2 * x.bool().numpy()).astype(np.uint8).view(np.bool_))


def inference(x):
    with torch.inference_mode():
        return x.clone()


CHANGES = (
    lambda x: x.long(), lambda x: x.double(), lambda x: x.half(), lambda x: x.bool(),
    lambda x: x.to(torch.int8), lambda x: x.to(torch.complex64), lambda x: x.to("meta"),
    lambda x: x.to_sparse(), lambda x: x.unsqueeze(0), lambda x: x.unsqueeze(-1),
    lambda x: x.flatten(), lambda x: x[..., :1], lambda x: x[:0], lambda x: x.tolist(),
    lambda x: x.numpy(), lambda x: torch.nn.Parameter(x), lambda x: x.clone().requires_grad_(),
    lambda x: torch._neg_view(-x), lambda x: x.T, lambda x: x - 1, lambda x: x + 2**31,
    lambda x: x.flip(0), lambda x: torch.empty(0), lambda x: torch.tensor(1.0),
    lambda x: x.expand(2, *x.shape), two_bytes, inference, lambda x: x * math.nan,
    lambda x: x.to(torch.float8_e4m3fn), lambda x: torch.nested.nested_tensor([x]),
)  # fmt: skip


def mistake(draw: Draw, op: str, arguments: dict) -> None:
    name = draw.pick(*sorted(PARAMETERS[op] - {"process_group", "backend"}))
    value = arguments.get(name)
    if isinstance(value, torch.Tensor) and draw.chance(0.7):
        try:
            arguments[name] = draw.pick(*CHANGES)(value)
        except Exception:  # the change does not apply to this tensor
            arguments[name] = None
    else:
        arguments[name] = draw.pick(*ODD_VALUES)


def arguments_of(seed: int, op: str | None = None) -> tuple[str, dict, bool]:
    """(op, arguments, whether some are replaced) of a seed; a second call draws fresh equal ones."""
    draw = Draw(seed)
    drawn = draw.pick(*OPS)
    op = op or drawn
    found = globals()[op](draw)
    odd = draw.chance(0.35)
    for _ in range(1 + draw.chance(0.3) if odd else 0):
        mistake(draw, op, found)
    return op, found, odd


# ---- the oracle


@dataclass
class Outcome:
    """What a call gave: an error, or results and gradients by name."""

    error: Exception | None
    tensors: dict[str, torch.Tensor]


def flat(out, name="out") -> dict[str, torch.Tensor]:
    if isinstance(out, torch.Tensor):
        return {name: out}
    if out is None:
        return {}
    items = out.items() if isinstance(out, dict) else enumerate(out)
    return {k: v for key, part in items for k, v in flat(part, f"{name}.{key}").items()}


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    x, y = (z.double() if z.is_floating_point() else z for z in (x, y))
    return x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all())


def plain(x) -> bool:
    """A tensor that copies and compares: no sparse, nested or meta one."""
    return (
        isinstance(x, torch.Tensor)
        and not x.is_nested
        and x.layout is torch.strided
        and x.device.type == "cpu"
    )


def call(op: str, backend: str, arguments: dict) -> Outcome:
    """Run the op forward and backward with fixed upstream gradients."""
    given, leaves = dict(arguments), {}
    for name in TRAINED - CONSTANT.get(op, set()):
        x = given.get(name)
        if plain(x) and x.is_floating_point() and not x.is_inference():
            given[name] = leaves[name] = x.detach().requires_grad_()
    if given.get("inplace_backward") is True and "logits" in leaves:
        given["logits"] = leaves["logits"].clone()  # an intermediate: leaves are not overwritten
    try:
        outputs = flat(getattr(fastrlhf, op)(**given, backend=backend))
        trained = {k: x for k, x in outputs.items() if x.requires_grad}
        found = {k: x.detach() for k, x in outputs.items()}
        wanted = {k: x for k, x in leaves.items() if x.requires_grad}
        if trained and wanted:
            generator = torch.Generator().manual_seed(1)
            # With accumulate_into the weight's gradient has been added in the forward.
            ones = given.get("accumulate_into") is not None
            upstream = [
                torch.ones_like(x)
                if ones
                else torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
                for x in trained.values()
            ]
            got = torch.autograd.grad(
                list(trained.values()), list(wanted.values()), upstream, allow_unused=True
            )
            found |= {f"d {k}": g for k, g in zip(wanted, got, strict=True) if g is not None}
        into = given.get("accumulate_into")
        if plain(into):
            found["accumulated"] = into.clone()
        return Outcome(None, found)
    except Exception as error:
        return Outcome(error, {})


def in_double(arguments: dict, generator=None) -> dict:
    """Float tensors as float64; with a generator, each moved by a relative 2^-24 up or down."""
    found = {}
    for name, x in arguments.items():
        if isinstance(x, dict):
            x = in_double(x, generator)
        elif plain(x) and x.is_floating_point():
            x = x.double()
            if generator is not None and name not in ("mask", "accumulate_into"):
                sign = torch.randint(0, 2, x.shape, generator=generator) * 2 - 1
                if x.numel() == 2:  # one up, one down: both up leave a difference as it is
                    sign = torch.tensor([1, -1]).view(x.shape)
                x = x * (1 + 2.0**-24 * sign)
        found[name] = x
    return found


def refusal(op: str, error: Exception) -> str:
    """Why this is no error that a user can act on; empty if it is one."""
    text = str(error)
    if op == "linear_token_loss" and re.match(r"(squared|with_entropy)\(\) ", text):
        return ""  # raised by the caller's loss_fn
    if not isinstance(error, TypeError | ValueError | NotImplementedError):
        return f"{type(error).__name__} instead of a TypeError or a ValueError: {text[:200]}"
    if not text.startswith(f"{op}: "):
        return f"the message does not begin with the op: {text[:200]}"
    if not PARAMETERS[op] & set(re.findall(r"\w+", text)):
        return f"the message names no argument: {text[:200]}"
    return ""


def distance(ours, other, bar) -> torch.Tensor:
    """Which elements are farther than `bar` from `other`. Infinity for NaN is near: inf - inf depends on the order."""
    near = (ours - other).abs() <= bar
    return ~(near | (ours == other) | (~ours.isfinite() & other.isnan()))


def unit(name: str, arguments: dict) -> float:
    """The size below which a result of this name may round as a number of this size does.

    A log-prob near 0 is the difference of two numbers; a gradient of the head sums p - 1 times a hidden state.
    """
    factor = {"d weight": "hidden", "accumulated": "hidden", "d hidden": "weight"}.get(name)
    found = 1.0
    x, temperature = arguments.get(factor), arguments.get("temperature")
    if plain(x) and x.numel():
        found = max(1.0, float(x.double().nan_to_num(0, 0, 0).abs().max()))
    if isinstance(temperature, float):
        found /= min(1.0, temperature)
    for factor in ("advantages", "scale"):
        size = arguments.get(factor, 1.0)
        if plain(size):
            size = float(size.double().nan_to_num(0, 0, 0).abs().max()) if size.numel() else 1.0
        found *= max(1.0, abs(size)) if isinstance(size, float) else 1.0
    return found


def wrong(name, ours, eager, truth, moved, unit=1.0) -> str:
    """Why a result differs from the reference's; empty if it does not."""
    if ours.dtype != eager.dtype or ours.shape != eager.shape:
        return (
            f"{name}: {ours.dtype} {tuple(ours.shape)}; {eager.dtype} {tuple(eager.shape)} expected"
        )
    if not ours.numel() or not ours.is_floating_point():
        return "" if torch.equal(ours, eager) else f"{name}: differs"
    eps = torch.finfo(ours.dtype).eps
    ours, eager, truth = ours.double(), eager.double(), truth.double()
    finite = truth.isfinite() & eager.isfinite()
    none = torch.zeros((), dtype=torch.float64)
    of_eager = (eager - truth).abs()[finite].max() if finite.any() else none
    size = truth.nan_to_num(0, 0, 0).abs()
    size = size.amax(-1, keepdim=True) if size.dim() else size
    off = sum((m.double() - truth).abs().nan_to_num(0, 0, 0) for m in moved) if moved else none
    off = off.max() if off.numel() else none
    bar = 8 * of_eager + 8 * eps * size.clamp(min=unit) + 16 * off
    bad = distance(ours, truth, bar) & distance(ours, eager, bar)
    if not bad.any():
        return ""
    i = int(bad.flatten().nonzero()[0])
    values = [f"{x.flatten()[i].item():.9g}" for x in (ours, eager, truth)]
    return f"{name}[{i}]: {values[0]}; reference {values[1]}, in float64 {values[2]}, bar {float(bar.max()):.2g}"


def copied(x: torch.Tensor) -> torch.Tensor:
    """A copy that is an inference tensor if `x` is one."""
    with torch.inference_mode(x.is_inference()):
        return x.clone()


def check(seed: int, backend: str, op: str | None = None) -> tuple[str, str, str]:
    """(op, kind of outcome, finding) of one call; an empty finding is a pass."""
    op, arguments, odd = arguments_of(seed, op)
    before = {k: copied(x) for k, x in arguments.items() if plain(x)}
    ours = call(op, backend, arguments)
    overwritten = {"accumulate_into"} | (
        {"logits"} if arguments.get("inplace_backward") is True else set()
    )
    for name, x in before.items():
        if name not in overwritten and not same_bits(x, arguments[name]):
            return op, "value", f"{name} was overwritten"
    if any(x.is_inference() for x in before.values()):
        # torch changes and saves no inference tensor under autograd, and says so in its own words.
        known = ours.error is None or "nference" in str(ours.error)
        return op, "refused", "" if known else refusal(op, ours.error)
    eager = call(op, "reference", arguments_of(seed, op)[1])
    if eager.error is None and f"backend={backend!r} cannot run" in str(ours.error):
        return op, "refused", ""  # e.g. meta tensors, which the reference takes
    if ours.error is not None or eager.error is not None:
        for which, outcome in (("", ours), ("reference: ", eager)):
            if outcome.error is None:
                other = ours.error or eager.error
                return op, "refused", f"{which}no error; the other raises {other}"
            why = refusal(op, outcome.error)
            if why:
                return op, "refused", which + why
        if type(ours.error) is not type(eager.error):
            return op, "refused", f"{ours.error!r}; reference {eager.error!r}"
        return op, "refused", ""
    drawn = arguments_of(seed, op)[1]
    truth = call(op, "reference", in_double(drawn))
    if truth.error is not None:  # e.g. a float32 tensor that must stay one
        truth = eager
    generator = torch.Generator().manual_seed(seed)
    moved = [
        call(op, "reference", in_double(arguments_of(seed, op)[1], generator)) for _ in range(3)
    ]
    if any(isinstance(x, int | float) and abs(x) > 1e12 for x in arguments.values()):
        return (
            op,
            "value",
            "",
        )  # a valid number at which results overflow, in one order of operations or another
    if ours.tensors.keys() != eager.tensors.keys():
        return op, "value", f"results {sorted(ours.tensors)}; {sorted(eager.tensors)} expected"
    # A NaN that reaches a result may reach the gradients, although torch's clamp and minimum stop some.
    forward = [name for name in truth.tensors if name.startswith("out")]
    spoilt = any(truth.tensors[name].isnan().any() for name in forward)
    for name, x in ours.tensors.items():
        others = [m.tensors[name] for m in moved if name in m.tensors]
        if name not in forward:
            kept = x.isfinite() if spoilt else torch.ones_like(x, dtype=torch.bool)
            if (
                drawn.get("compact_rows") is True
            ):  # a row without a gradient enters no product, nor does its NaN
                kept &= eager.tensors[name].isfinite()
            x = x.where(kept, eager.tensors[name])
        why = wrong(name, x, eager.tensors[name], truth.tensors[name], others, unit(name, drawn))
        if why:
            return op, "value", why
    return op, "value", ""


def shown(x) -> str:
    if isinstance(x, torch.Tensor):
        return f"{str(x.dtype)[6:]}{list(x.shape)}" + (
            f" {x.device}" if x.device.type != "cpu" else ""
        )
    return repr(x)[:60]


def fuzz(calls: int, seed: int, backend: str, op: str | None = None, say=print) -> list[str]:
    """Check `calls` calls; return the findings, one line each."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    findings, counts = [], collections.Counter()
    started = time.perf_counter()
    for number in range(seed, seed + calls):
        name, kind, why = check(number, backend, op)
        counts[name, kind] += 1
        if why:
            drawn = ", ".join(f"{k}={shown(x)}" for k, x in arguments_of(number, op)[1].items())
            findings.append(" ".join(f"--only {number}: {name}({drawn}): {why}".split()))
            say(findings[-1], flush=True)
    seconds = time.perf_counter() - started
    refused = sum(n for (_, kind), n in counts.items() if kind == "refused")
    say(
        f"{backend}: {calls} calls ({refused} refused) in {seconds:.0f} s, {len(findings)} findings"
    )
    return findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0, help="the first call; -1: a fresh one")
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--op", choices=OPS)
    parser.add_argument("--only", type=int, help="repeat one call and raise its error")
    chosen = parser.parse_args()
    if chosen.only is not None:
        op, arguments, _ = arguments_of(chosen.only, chosen.op)
        print(op, {k: shown(x) for k, x in arguments.items()})
        print(check(chosen.only, chosen.backend, chosen.op)[2] or "no finding")
        return 0
    first = chosen.seed if chosen.seed >= 0 else time.time_ns() % 2**40
    return bool(fuzz(chosen.calls, first, chosen.backend, chosen.op))


if __name__ == "__main__":
    sys.exit(main())
