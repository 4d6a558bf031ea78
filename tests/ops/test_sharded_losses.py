"""The losses from hidden states with the vocabulary shared out over two gloo processes, against one that has it all."""

import functools

import pytest
import torch
import torch.distributed as dist

from _support import logit_cases as cases
from _support import ranks, sequence_cases
from _support.logit_cases import randint, randn
from fastrlhf import linear_cross_entropy, linear_ppo_loss, linear_token_loss, nn
from fastrlhf.ops import _backend, _gemms

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
N, H, V = 23, 19, 302
BACKENDS = [
    b for b in ("reference", "cpu") if not _backend.unavailable_reason("linear_ppo_loss", b, "cpu")
]


def grpo(logprob, entropy, old_logprob, advantages):
    ratio = (logprob - old_logprob).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) - 0.01 * entropy


def inputs(dtype):
    """hidden, weight, bias, targets and the rows; a third of the advantages are 0."""
    tensors = [randn(1, N, H, seed=0, dtype=dtype), randn(V, H, seed=1, dtype=dtype, scale=0.4)]
    tensors.append(randn(V, seed=2, dtype=dtype))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows = {name: randn(1, N, seed=5 + i, dtype=wide) for i, name in enumerate("oavrw")}
    rows["a"][0, ::3] = 0
    return tensors, randint(V, (1, N), 3), rows


def run(loss, dtype, group=None, rank=0, backend="auto", options="all", more=None):
    """[loss, entropy metric or log-probs, dX, dW, db]; of a rank its rows of dW and db."""
    (x, w, b), targets, rows = inputs(dtype)
    if group is not None:
        mine = slice(rank * V // ranks.WORLD, (rank + 1) * V // ranks.WORLD)
        w, b = w[mine], b[mine]
    x, w, b = (t.clone().requires_grad_() for t in (x, w, b))
    kwargs = cases.OPTIONS[options]((1, N), "cpu") | (more or {}) | {"bias": b, "backend": backend}
    if group is not None:
        kwargs["process_group"] = group
    old = rows["o"] - 5
    if loss == "settings":
        lengths = kwargs.pop("lengths")
        flat = {k: v[0] if isinstance(v, torch.Tensor) and v.dim() == 2 and v.shape[0] == 1 else v
                for k, v in kwargs.items()}  # fmt: skip
        flat |= {"cu_seqlens": sequence_cases.cu_of(lengths), "ref_logprob": old[0] + 0.1}
        flat |= {"values": rows["v"][0], "old_values": rows["w"][0], "returns": rows["r"][0]}
        out = linear_ppo_loss(x[0], w, targets[0], old[0], rows["a"][0], **flat)
        total, second = out.loss, torch.stack(list(out.metrics.values()))
    elif loss == "ppo":
        values = {"values": rows["v"], "old_values": rows["w"], "returns": rows["r"]}
        out = linear_ppo_loss(x, w, targets, old, rows["a"], entropy_coef=0.1, **values, **kwargs)
        total, second = out.loss, torch.stack(list(out.metrics.values()))
    elif loss == "token":
        given = {"old_logprob": old, "advantages": rows["a"]}
        kwargs |= {"per_token": given, "with_entropy": True}
        out = linear_token_loss(x, w, targets, grpo, **kwargs)
        total, second = out.loss, out.logprob
    else:
        kwargs.pop("mask", None)
        targets = targets.masked_fill(torch.arange(N) % 4 == 1, -100)
        out = linear_cross_entropy(x, w, targets, **kwargs)
        total, second = out if isinstance(out, tuple) else (out, out.detach().reshape(-1))
    upstream = 1.0 if "accumulate_into" in kwargs else 0.7
    (total * upstream).sum().backward()
    dw = kwargs.get("accumulate_into", w.grad)
    return [total.detach(), second.detach(), x.grad, dw, b.grad]


EVERY = {"class_weight": True, "label_smoothing": 0.2, "z_loss": 0.01, "return_lse": True}
LOSSES = {
    "ppo": {},
    "token": {},
    "token none": {"reduction": "none"},
    "cross entropy": {},
    "ppo compact": {"compact_rows": True},
    "token compact": {"compact_rows": True},
    "ppo into": {"accumulate_into": True, "scale": 0.7},
    "cross entropy into": {"accumulate_into": True, "scale": 0.7},
    "token into": {"accumulate_into": True, "scale": 0.7},
    # Five rows a chunk: the second sequence is longer.
    "settings cispo": {
        **{"objective": "cispo", "lengths": (3, 12, 0, 8), "kl_coef": 0.1, "entropy_coef": 0.1},
        "aggregation": "seq-mean-token-mean",
    },
    "settings gspo": {
        **{"objective": "gspo", "lengths": (3, 12, 0, 4, 4), "kl_coef": 0.1, "compact_rows": True},
        **{"aggregation": "seq-mean-token-sum-norm", "length": 9.0, "scale": 0.7},
    },
    "settings into": {"accumulate_into": True, "objective": "sapo", "lengths": (23,)},
    "cross entropy every": EVERY,
    "cross entropy every none": EVERY | {"reduction": "none"},
    "cross entropy every into": EVERY | {"accumulate_into": True, "scale": 0.7},
    "cross entropy smoothing none": {"label_smoothing": 0.2, "reduction": "none"},
    "cross entropy z-loss": {"z_loss": 0.01},
}


def combinations():
    for backend in BACKENDS:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for options in ("plain", "all"):
                yield from (
                    (name, backend, dtype, options) for name in ("ppo", "token", "cross entropy")
                )
    for name in LOSSES:
        yield name, BACKENDS[-1], torch.float64, "mask"
        if "every" in name:
            for options in ("plain", "all"):
                yield name, BACKENDS[-1], torch.float64, options


def settings(name, rows, dtype):
    more = dict(LOSSES[name])
    if more.pop("accumulate_into", False):
        more["accumulate_into"] = torch.zeros(rows, H, dtype=dtype)
    if "class_weight" in more:
        more["class_weight"] = torch.linspace(0.5, 2, V, dtype=dtype)
    return more


def on_a_rank(rank):
    """Runs on each rank: {combination: results}."""
    _gemms.chunk_rows = lambda *_: 5  # several chunks and a short last one
    found = {}
    for case in combinations():
        name, backend, dtype, options = case
        more = settings(name, V // ranks.WORLD, dtype)
        group = dist.group.WORLD
        found[str(case)] = run(name.split()[0], dtype, group, rank, backend, options, more)
    return found


@functools.lru_cache
def sharded():
    return ranks.run(on_a_rank)


@pytest.mark.parametrize("case", list(combinations()), ids=str)
def test_shards_give_the_whole(case):
    name, backend, dtype, options = case
    first, second = (found[str(case)] for found in sharded())
    whole = run(name.split()[0], dtype, None, 0, backend, options, settings(name, V, dtype))
    # Rounded to bf16 once on either side; what lies in front is fp32.
    tolerance = {
        torch.float64: {"rtol": 1e-11, "atol": 1e-13},
        torch.float32: {"rtol": 2e-5, "atol": 2e-7},
        torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-4},
    }
    for i, what in enumerate(("loss", "second", "dX", "dW", "db")):
        if i < 3:
            assert torch.equal(first[i], second[i]), f"{what}: the ranks differ"
        ours = first[i] if i < 3 else torch.cat((first[i], second[i]))
        assert ours.dtype == whole[i].dtype and ours.shape == whole[i].shape
        bar = tolerance[ours.dtype if i else dtype]
        if i == 1 and dtype == torch.float64:
            bar = tolerance[torch.float32]  # the metrics are fp32
        torch.testing.assert_close(ours, whole[i], **bar, msg=lambda m, w=what: f"{w}: {m}")


def complaints(rank):
    """Runs on each rank: the error of each mistake. Modules pass the group on."""
    (x, w, b), targets, rows = inputs(torch.float32)
    w, world = w[rank * V // 2 : (rank + 1) * V // 2], dist.group.WORLD
    ops = {
        "linear_ppo_loss": lambda w, t, g: linear_ppo_loss(
            x, w, t, rows["o"], rows["a"], process_group=g
        ),
        "linear_token_loss": lambda w, t, g: linear_token_loss(x, w, t, torch.neg, process_group=g),
        "linear_cross_entropy": lambda w, t, g: linear_cross_entropy(x, w, t, process_group=g),
    }
    found = {}
    for name, op in ops.items():
        for what, arguments in {
            "group": (w, targets, "world"),
            "uneven": (w[rank:], targets, world),
            "high": (w, targets.index_fill(1, torch.tensor([2]), V), world),
        }.items():
            with pytest.raises((TypeError, ValueError)) as info:
                op(*arguments)
            found[f"{name} {what}"] = f"{type(info.value).__name__}: {info.value}"
    module = nn.LinearCrossEntropy()(x, w, targets, process_group=world)
    assert torch.equal(module, linear_cross_entropy(x, w, targets, process_group=world))
    return found


def test_mistakes_raise_on_every_rank():
    expected = {
        "group": "TypeError: {}: process_group must be a torch.distributed.ProcessGroup",
        "uneven": "ValueError: {}: weight must have V / 2 rows on every rank of process_group",
        "high": "ValueError: {}: targets must be in [0, 302); got 302 at row 2",
    }
    for found in ranks.run(complaints):
        for key, text in found.items():
            name, what = key.rsplit(" ", 1)
            assert expected[what].format(name) in text
