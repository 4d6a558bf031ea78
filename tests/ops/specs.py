"""One description of each op, which drives the checks of test_conformance.py.

An `OpSpec` names the op's tensors and their roles, and draws inputs for a few situations. It holds no expected
numbers: those are in test_<op>.py, which tests what only that op does.

B sequences, T steps, N tokens, V vocabulary, H hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import fastrlhf
from _support import logit_cases, sequence_cases
from _support.logit_cases import randint, randn
from _support.ppo_cases import batch

# The situations that `inputs` draws. It also takes a shape of the tokens, or ("packed", *lengths).
SMALL = "small"  # a few rows, every setting in use: gradcheck, opcheck, torch.compile
MASKED = "masked"  # [B, T] with holes in the mask
PACKED = "packed"  # ragged sequences behind one another, with cu_seqlens
RAGGED = "ragged"  # sizes around the kernels' blocks
THREADS = "threads"  # enough work for three threads


@dataclass(frozen=True)
class OpSpec:
    """What the generic checks need to know about a public op.

    Attributes:
        name: of the function in `fastrlhf`.
        inputs: (situation, float dtype) -> arguments by name, tensors on the CPU. None: the op has no such situation.
        shapes: empty and tiny ones that the op takes.
        variants: changes of the small arguments that meet other branches.
        differentiable: the tensors that have a gradient.
        constant: the tensors that must not require grad, because they have none. A differentiable op refuses them.
        masked: the tensors with one entry, or one row, per token. Where `mask` is 0 they are not read.
        raw: endings of the raw ops that a forward and a backward pass through.
        gemm: whether the op multiplies matrices. Its results may differ bitwise with the layout of its operands and
            with the number of threads, and 16-bit operands are summed in another order.
        rounds_once: whether a gradient is rounded once. token_loss writes it in the forward, in the dtype of the
            logits, and multiplies the upstream gradient into it in the backward.
    """

    name: str
    inputs: Callable[[str | tuple, torch.dtype], dict | None]
    shapes: tuple[tuple, ...]
    variants: tuple[dict, ...] = ()
    differentiable: tuple[str, ...] = ()
    constant: tuple[str, ...] = ()
    masked: tuple[str, ...] = ()
    raw: tuple[str, ...] = ("",)
    gemm: bool = False
    rounds_once: bool = True

    @property
    def in_place(self) -> bool:
        """Whether the op takes inplace_backward=True."""
        return "_bwd_" in self.raw

    def call(self, backend: str, arguments: dict):
        return getattr(fastrlhf, self.name)(**arguments, backend=backend)

    def small(self, dtype=torch.float32) -> list[dict]:
        """The small arguments, and their variants."""
        first = self.inputs(SMALL, dtype)
        return [first, *(first | change for change in self.variants)]

    def situations(self, names=(SMALL, MASKED, PACKED, RAGGED)) -> dict[str, dict]:
        """fp32 arguments by situation; of the small ones every variant."""
        drawn = {s: self.inputs(s, torch.float32) for s in names}
        more = self.small()[1:] if SMALL in names else []
        drawn |= {
            f"{SMALL}, {', '.join(c)}": a for c, a in zip(self.variants, more, strict=bool(more))
        }
        return {s: arguments for s, arguments in drawn.items() if arguments is not None}


def flat(out) -> list[torch.Tensor]:
    """The tensors of an op's result in a fixed order, metrics too."""
    if isinstance(out, torch.Tensor):
        return [out]
    if isinstance(out, dict):
        return [x for name in out for x in flat(out[name])]
    return [x for part in out if part is not None for x in flat(part)]


def tensors_of(arguments: dict) -> dict[str, torch.Tensor]:
    return {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}


def moved(arguments: dict, backend: str) -> dict:
    """The same arguments where `backend` runs."""
    return sequence_cases.at(backend, arguments)


def with_leaves(spec: OpSpec, arguments: dict) -> dict:
    """The same arguments, the differentiable ones as leaves that require grad. Views keep their strides."""
    return {
        name: x.detach().requires_grad_() if name in spec.differentiable and x is not None else x
        for name, x in arguments.items()
    }


def gradients(outputs: list[torch.Tensor], arguments: dict) -> list[torch.Tensor]:
    """Gradients of the arguments that require grad, by random upstream gradients of the outputs that have one."""
    wanted = [x for x in tensors_of(arguments).values() if x.requires_grad]
    outputs = [o for o in outputs if o.requires_grad]
    if not wanted or not outputs:
        return []
    upstream = [
        randn(*o.shape, seed=90 + i, dtype=torch.float64).to(o) for i, o in enumerate(outputs)
    ]
    return list(torch.autograd.grad(outputs, wanted, upstream))


def run(spec: OpSpec, backend: str, arguments: dict) -> list[torch.Tensor]:
    """Outputs, then gradients; inputs go to where `backend` runs, results stay there."""
    arguments = with_leaves(spec, moved(arguments, backend))
    outputs = flat(spec.call(backend, arguments))
    return [o.detach() for o in outputs] + gradients(outputs, arguments)


# ---------------------------------------------------------------------------------------------
# rows of logits: [..., V]

# situation -> (shape of the rows, V)
ROWS = {SMALL: ((4,), 3), MASKED: ((3, 4), 301), RAGGED: ((2, 3), 4133), THREADS: ((64,), 1037)}
ROWS[(1,)] = ((1,), 1)


def problem(table, situation, *sizes):
    """The sizes of a situation; those of a shape are `sizes`. None: a layout that rows do not have."""
    if situation in table:
        return table[situation]
    return None if situation == PACKED or situation[:1] == (PACKED,) else (situation, *sizes)


def row_settings(situation: str, shape: tuple, dtype) -> dict:
    """Every setting in use where the situation asks for it, else none."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if situation not in (SMALL, MASKED):
        return {}
    count = torch.Size(shape).numel()
    mask = (torch.arange(count) % 3 != 1).view(shape)
    rows = torch.linspace(0.5, 1.5, count, dtype=torch.float64).view(shape)
    return {"temperature": rows.to(wide), "softcap": 2.5, "mask": mask}


def token_logprob(situation, dtype):
    if (sizes := problem(ROWS, situation, 5)) is None:
        return None
    shape, width = sizes
    return {
        "logits": randn(*shape, width, seed=0, dtype=dtype, scale=2),
        "targets": randint(width, shape, 1),
        "return_entropy": True,
        **row_settings(situation, shape, dtype),
    }


def policy(shape, dtype, logprob):
    """Advantages of both signs and 0, and old log-probs on both sides of the clip, off its edges."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    advantages = randn(*shape, seed=3, dtype=wide)
    steps = torch.tensor([0.05, -0.1, 0.6, -0.7])
    if advantages.numel():
        advantages.view(-1)[-1] = 0.0
    step = steps[torch.arange(advantages.numel()) % 4].view(shape)
    return {"advantages": advantages, "old_logprob": (logprob.double() + step).to(wide)}


def more_policy(shape, dtype, logprob, count=None):
    """Settings beyond plain PPO, of `count` sequences; their gradient is the derivative of the value, for gradcheck."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ref_logprob, rollout_logprob = (
        (logprob.double() + 0.3 * randn(*shape, seed=seed, dtype=torch.float64)).to(wide)
        for seed in (14, 15)
    )
    found = {"clip": (0.25, 0.35), "dual_clip": 1.3, "ref_logprob": ref_logprob, "kl_coef": 0.2}
    found |= {
        "kl_gradient": "ratio",
        "rollout_logprob": rollout_logprob,
        "rollout_bounds": (0.8, 1.3),
    }
    if count is not None:
        found |= {"aggregation": "seq-mean-token-mean", "rollout_level": "sequence_mean"}
    return found


def sequence_policy(shape, dtype, logprob, count):
    """The ratio, the advantages and ready rollout weights of `count` sequences; the rest of the settings."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ref_logprob = (logprob.double() + 0.3 * randn(*shape, seed=14, dtype=torch.float64)).to(wide)
    weights, advantages = (randn(count, seed=seed, dtype=wide) for seed in (16, 17))
    found = {"objective": "gspo", "clip": (0.1, None), "advantages": advantages}
    found |= {
        "rollout_weights": weights.exp(),
        "ref_logprob": ref_logprob,
        "kl_coef": 0.2,
        "kl_gradient": "k2",
    }
    return found | {"aggregation": "seq-mean-token-sum-norm", "length": 9, "num_sequences": 5}


# Resets both, for a variant.
PLAIN = dict.fromkeys(("ref_logprob", "rollout_logprob", "rollout_weights", "num_sequences", "length")) | {
    "objective": "ppo", "clip": 0.2, "kl_coef": 0.0, "kl_gradient": "estimator",
    "rollout_level": "token", "rollout_bounds": (None, None),
}  # fmt: skip


def token_loss(situation, dtype):
    packed = situation == PACKED
    arguments = token_logprob((7,) if packed else situation, dtype)
    if arguments is None:
        return None
    del arguments["return_entropy"]
    logprob = fastrlhf.token_logprob(**arguments, backend="reference").detach()
    arguments |= policy(logprob.shape, dtype, logprob)
    if packed:
        more = sequence_policy(logprob.shape, dtype, logprob, 4)
        return arguments | more | {"cu_seqlens": sequence_cases.cu_of((3, 0, 1, 3))}
    if situation == SMALL:
        arguments["cu_seqlens"] = sequence_cases.cu_of((3, 1))
    settings = {"scale": scale(dtype)}
    if situation in (SMALL, MASKED):
        settings |= more_policy(logprob.shape, dtype, logprob, 2 if situation == SMALL else None)
    return arguments | (settings if situation in (SMALL, MASKED) else {})


def scale(dtype):
    return torch.tensor(0.3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)


# ---------------------------------------------------------------------------------------------
# hidden states and a head: [..., H], [V, H]

HEADS = {SMALL: ((5,), 3, 7), MASKED: ((1, 11), 19, 301), RAGGED: ((2, 5), 8, 133)}


def head(situation, dtype):
    if situation == THREADS or (sizes := problem(HEADS, situation, 5, 7)) is None:
        return None
    shape, width, vocab = sizes
    arguments = {
        "hidden": randn(*shape, width, seed=0, dtype=dtype),
        "weight": randn(vocab, width, seed=1, dtype=dtype, scale=0.4),
        "targets": randint(vocab, shape, 2),
        **row_settings(situation, shape, dtype),
    }
    if situation in (SMALL, MASKED):
        arguments["bias"] = randn(vocab, seed=4, dtype=dtype)
    return arguments


def linear_logprob(situation, dtype):
    arguments = head(situation, dtype)
    flags = {"return_entropy": True, "return_lse": situation in (SMALL, MASKED)}
    return None if arguments is None else arguments | flags


def linear_cross_entropy(situation, dtype):
    arguments = head(situation, dtype)
    if arguments is None:
        return None
    mask = arguments.pop("mask", None)
    if mask is not None:
        arguments["targets"] = arguments["targets"].masked_fill(~mask, -1)
        arguments |= {"ignore_index": -1, "scale": scale(dtype)}
    if situation in (SMALL, MASKED):
        vocab = len(arguments["weight"])
        arguments["class_weight"] = torch.linspace(0.5, 2, vocab).to(dtype)
        arguments |= {"label_smoothing": 0.1, "z_loss": 0.01, "return_lse": True}
    return arguments


def linear_policy(situation, dtype):
    arguments = head(situation, dtype)
    if arguments is None:
        return None
    logprob = fastrlhf.linear_logprob(**arguments, backend="reference").detach()
    return arguments | policy(logprob.shape, dtype, logprob)


def linear_ppo_loss(situation, dtype):
    arguments = linear_policy((7,) if situation == PACKED else situation, dtype)
    if arguments is None or situation not in (SMALL, MASKED, PACKED):
        return arguments
    shape, wide = arguments["targets"].shape, arguments["advantages"].dtype
    logprob = arguments["old_logprob"]
    if situation == PACKED:
        more = sequence_policy(shape, dtype, logprob, 4)
        return arguments | more | {"cu_seqlens": sequence_cases.cu_of((5, 0, 1, 1))}
    values = {k: x.to(wide) for k, x in batch(shape).items() if "values" in k or k == "returns"}
    if situation == SMALL:
        arguments["cu_seqlens"] = sequence_cases.cu_of((3, 2))
    more = more_policy(shape, dtype, logprob, 2) | {"value_aggregation": "token-mean"}
    return arguments | values | more | {"entropy_coef": 0.3, "scale": scale(dtype)}


def grpo(logprob, entropy, old_logprob, advantages):
    """The clipped policy loss, k3 to the sampling policy and an entropy bonus, as a user writes it."""
    ratio = (logprob - old_logprob).exp()
    policy = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    kl = (old_logprob - logprob).exp() - 1 - (old_logprob - logprob)
    return policy + 0.04 * kl - 0.01 * entropy, {"ratio": ratio.detach()}


def linear_token_loss(situation, dtype):
    arguments = linear_policy(situation, dtype)
    if arguments is None:
        return None
    per_token = {name: arguments.pop(name) for name in ("old_logprob", "advantages")}
    return arguments | {"per_token": per_token, "loss_fn": grpo, "with_entropy": True}


# ---------------------------------------------------------------------------------------------
# sequences: [B, T], or [N] with cu_seqlens

# The lengths meet the edges of the kernels: empty, one step, a chunk of 256 steps, a block of 1024.
LENGTHS = (5, 1, 0, 300, 256, 257, 1030)


def layout(situation):
    """(shape of the tokens, sequences, how they lie)."""
    if situation == PACKED:
        situation = (PACKED, *LENGTHS)
    if situation[:1] == (PACKED,):
        lengths = situation[1:]
        return (sum(lengths),), len(lengths), {"cu_seqlens": sequence_cases.cu_of(lengths)}
    shapes = {SMALL: (3, 7), MASKED: (6, 300), RAGGED: (7, 513), THREADS: (60, 701)}
    shape = shapes.get(situation, situation)
    if situation in (SMALL, MASKED, THREADS):
        mask = sequence_cases.random_mask(shape, 3)
        mask[0], mask[1, 4:] = True, False
        return shape, shape[0], {"mask": mask}
    return shape, shape[0] if shape else 1, {}


def kl_reward(situation, dtype):
    shape, count, where = layout(situation)
    logprob, ref_logprob = (randn(*shape, seed=seed, dtype=dtype) for seed in (1, 2))
    score = randn(count, seed=3, dtype=dtype)
    tensors = {"logprob": logprob, "ref_logprob": ref_logprob, "score": score}
    return {**tensors, **where, "beta": 0.1, "estimator": "k3"}


def gae(situation, dtype):
    shape, count, where = layout(situation)
    rewards, values = (randn(*shape, seed=seed, dtype=dtype) for seed in (1, 2))
    if situation == SMALL:
        where["bootstrap"] = randn(count, seed=4, dtype=dtype)
    whiten = situation != RAGGED
    return {"rewards": rewards, "values": values, **where, "gamma": 0.9, "whiten": whiten}


def kl_gae(situation, dtype):
    arguments = kl_reward(situation, dtype)
    arguments["values"] = randn(*arguments["logprob"].shape, seed=4, dtype=dtype)
    return arguments | {"lam": 0.9, "whiten": situation != RAGGED}


def masked_whiten(situation, dtype):
    shape, _, where = layout(situation)
    return {"x": 3 + randn(*shape, seed=1, dtype=dtype), **where}


def ppo_loss(situation, dtype):
    shape, count, where = layout(situation)
    found = {**batch(shape, dtype), **where, "entropy_coef": 0.1}
    if "cu_seqlens" in where or situation == THREADS:
        more = sequence_policy(shape, dtype, found["old_logprob"], count)
        return found | {
            n: x.to(dtype) if isinstance(x, torch.Tensor) else x for n, x in more.items()
        }
    if situation in (SMALL, MASKED):
        more = more_policy(shape, dtype, found["old_logprob"], count)
        more = {n: x.to(dtype) if isinstance(x, torch.Tensor) else x for n, x in more.items()}
        return found | more | {"value_aggregation": "token-sum", "scale": scale(dtype)}
    return found


def group_sizes(situation, many):
    """Completions of each prompt; `many` prompts for several threads."""
    groups = {
        SMALL: (3, 2),
        PACKED: (4, 9, 1, 0, 2, 6, 3, 2),
        RAGGED: (75, 33),
        THREADS: (9,) * many,
    }
    return groups.get(situation, situation[1:])


def ranking_loss(situation, dtype):
    if situation == MASKED:
        return None
    sizes = group_sizes(situation, 600)
    arguments = {
        "scores": randn(sum(sizes), seed=1, dtype=dtype, scale=2),
        "ranks": 1 + randint(4, (sum(sizes),), 2),
        "cu_groups": sequence_cases.cu_of(sizes),
    }
    if situation in (SMALL, PACKED):
        arguments["margin"] = randn(len(sizes), seed=3, dtype=dtype)
    return arguments


def group_advantage(situation, dtype):
    if situation == MASKED:
        return None
    sizes = group_sizes(situation, 4000)
    return {
        "rewards": randn(sum(sizes), seed=1, dtype=dtype, scale=2),
        "cu_groups": sequence_cases.cu_of(sizes),
    }


# ---------------------------------------------------------------------------------------------

HEAD = ("hidden", "weight", "bias")
ROW_SHAPES = ((0,), (2, 0), (), (1,), (2, 1, 3))
SEQUENCE_SHAPES = (
    (0, 5),
    (5, 0),
    (0, 0),
    (3, 1),
    (1, 1),
    (PACKED,),
    (PACKED, 0, 0),
    (PACKED, 1, 0, 2),
)
PLAIN_CE = {"class_weight": None, "label_smoothing": 0.0, "z_loss": 0.0, "return_lse": False}
WITHOUT_VALUES = dict.fromkeys(("values", "old_values", "returns", "value_aggregation"))
POLICY_ONLY = WITHOUT_VALUES | {"entropy": None, "entropy_coef": 0.0}
OF_MORE = ("ref_logprob", "rollout_logprob")  # of more_policy
SPECS = {
    spec.name: spec
    for spec in (
        OpSpec(
            "token_logprob",
            token_logprob,
            ROW_SHAPES,
            variants=({"return_entropy": False},),
            differentiable=("logits",),
            constant=("temperature",),
            masked=("logits", "targets", "temperature"),
            raw=("_fwd", "_bwd", "_bwd_"),
        ),
        OpSpec(
            "token_loss",
            token_loss,
            ROW_SHAPES,
            variants=(
                PLAIN
                | {
                    "aggregation": None,
                    "old_logprob": None,
                    "objective": None,
                    "dual_clip": None,
                    "scale": 1.0,
                },
                PLAIN | {"aggregation": None, "objective": None, "advantages": None},
            ),
            differentiable=("logits",),
            constant=(
                "temperature",
                "advantages",
                "old_logprob",
                "scale",
                *OF_MORE,
                "num_sequences",
            ),
            masked=("logits", "targets", "temperature", "advantages", "old_logprob", *OF_MORE),
            raw=("_fwd", "_fwd_", "_bwd_"),
            rounds_once=False,
        ),
        OpSpec(
            "linear_logprob",
            linear_logprob,
            ROW_SHAPES,
            variants=({"return_entropy": False, "return_lse": False, "bias": None},),
            differentiable=HEAD,
            constant=("temperature",),
            masked=("hidden", "targets", "temperature"),
            raw=("_fwd", "_bwd"),
            gemm=True,
        ),
        OpSpec(
            "linear_cross_entropy",
            linear_cross_entropy,
            ROW_SHAPES,
            variants=(PLAIN_CE | {"reduction": "sum"}, {"reduction": "none", "bias": None}),
            differentiable=HEAD,
            constant=("temperature", "scale", "class_weight"),
            raw=("_fwd",),
            gemm=True,
        ),
        OpSpec(
            "linear_ppo_loss",
            linear_ppo_loss,
            ROW_SHAPES,
            variants=(
                PLAIN
                | WITHOUT_VALUES
                | {"aggregation": "token-mean", "bias": None, "entropy_coef": 0.0},
                {"value_clip": None},
            ),
            differentiable=(*HEAD, "values"),
            constant=(
                "temperature",
                "scale",
                "old_logprob",
                "advantages",
                "old_values",
                "returns",
                *OF_MORE,
                "num_sequences",
            ),
            masked=(
                "hidden",
                "targets",
                "temperature",
                "old_logprob",
                "advantages",
                "values",
                *OF_MORE,
            ),
            raw=("_fwd",),
            gemm=True,
        ),
        OpSpec(
            "linear_token_loss",
            linear_token_loss,
            ROW_SHAPES,
            variants=({"reduction": "sum", "bias": None}, {"reduction": "none"}),
            differentiable=HEAD,
            constant=("temperature", "scale"),
            masked=("hidden", "targets", "temperature"),
            raw=("_fwd",),
            gemm=True,
        ),
        OpSpec(
            "kl_reward",
            kl_reward,
            SEQUENCE_SHAPES,
            ({"estimator": "k2"}, {"estimator": "abs"}),
            masked=("logprob", "ref_logprob"),
        ),
        OpSpec("gae", gae, SEQUENCE_SHAPES, ({"whiten": False},), masked=("rewards", "values")),
        OpSpec(
            "kl_gae",
            kl_gae,
            SEQUENCE_SHAPES,
            ({"whiten": False, "estimator": "k1"},),
            masked=("logprob", "ref_logprob", "values"),
        ),
        OpSpec(
            "masked_whiten",
            masked_whiten,
            SEQUENCE_SHAPES,
            ({"shift_mean": False, "unbiased": False},),
            masked=("x",),
        ),
        OpSpec(
            "ppo_loss",
            ppo_loss,
            ((0,), (0, 5), (5, 0), (1,), (2, 1), *SEQUENCE_SHAPES[-3:]),
            variants=(
                PLAIN | POLICY_ONLY | {"aggregation": "token-mean", "dual_clip": None},
                PLAIN
                | {"aggregation": "token-mean", "value_aggregation": None, "value_clip": None},
            ),
            differentiable=("logprob", "values", "entropy"),
            constant=(
                "old_logprob",
                "advantages",
                "old_values",
                "returns",
                *OF_MORE,
                "num_sequences",
                "scale",
            ),
            masked=(*batch((1,)), *OF_MORE),
            raw=("_fwd",),
        ),
        OpSpec(
            "ranking_loss",
            ranking_loss,
            ((PACKED,), (PACKED, 0, 0), (PACKED, 1, 1), (PACKED, 2)),
            variants=({"margin": 0.5},),
            differentiable=("scores",),
            constant=("margin",),
            raw=("_fwd",),
        ),
        OpSpec(
            "group_advantage",
            group_advantage,
            ((PACKED,), (PACKED, 0, 0), (PACKED, 1, 1), (PACKED, 2)),
            variants=(
                {"baseline": "leave_one_out", "scale": "batch_std"},
                {"baseline": "none", "scale": "gpg"},
            ),
        ),
    )
}


BACKENDS = ("reference", "cpu", "triton", "cuda")


def backend_params(names=BACKENDS, ops=SPECS):
    """(spec, backend) pairs as pytest parameters; one that cannot run here is skipped and says why."""
    return [
        pytest.param(SPECS[op], *param.values, id=f"{op}-{param.values[0]}", marks=param.marks)
        for op in ops
        for param in logit_cases.backend_params(op, names)
    ]


def each_backend(names=BACKENDS, ops=SPECS):
    """Parametrises `spec` and `backend`."""
    return pytest.mark.parametrize(("spec", "backend"), backend_params(names, ops))


fused = each_backend(BACKENDS[1:])
differentiable = [op for op, spec in SPECS.items() if spec.differentiable]
assert set(SPECS) == set(fastrlhf.backends()), "each op has a spec"
