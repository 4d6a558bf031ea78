"""linear_logprob with the vocabulary shared out over two gloo processes, against one that has it all.

Also what an FSDP2-sharded weight (a DTensor) is to the linear ops, inside and outside its module's forward.
"""

import functools
import importlib

import pytest
import torch
import torch.distributed as dist
from test_linear_logprob import eager
from torch import nn

import fastrlhf
from _support import logit_cases as cases
from _support import ranks
from _support.logit_cases import randint, randn
from _support.tolerance import assert_near
from fastrlhf import linear_cross_entropy, linear_logprob
from fastrlhf.ops import _backend, _gemms
from fastrlhf.ops._rows import combine

module = importlib.import_module("fastrlhf.ops.linear_logprob")  # the name is the function's too
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
N, H, V = 11, 19, 302
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
BACKENDS = [b for b in ("reference", "cpu") if not _backend.unavailable_reason(module.OP, b, "cpu")]
NAMES = ("logprob", "entropy", "dX", "dW", "db")
# Which parameters get a gradient, and which outputs have an upstream one.
PARTS = {
    "everything": ((0, 1, 2), (0, 1)),
    "frozen weight": ((0,), (0,)),
    "frozen hidden": ((1,), (0, 1)),
    "entropy only": ((0, 1), (1,)),
}


def tensors(dtype):
    hidden = randn(1, N, H, seed=0, dtype=dtype)
    weight = randn(V, H, seed=1, dtype=dtype, scale=0.4)
    return [hidden, weight, randn(V, seed=2, dtype=dtype)]


def outputs(function, values, part, **options):
    """(logprob, entropy, gradients asked for) of linear_logprob or of eager PyTorch."""
    trained, upstream = PARTS[part]
    leaves = [v.detach().clone().requires_grad_(i in trained) for i, v in enumerate(values)]
    x, w, b = leaves
    targets = randint(V, (1, N), 3)
    out = function(x, w, targets, bias=b, **options)
    grads = [randn(1, N, seed=4 + i, dtype=torch.float64).to(out[i].dtype) for i in upstream]
    found = torch.autograd.grad([out[i] for i in upstream], [leaves[i] for i in trained], grads)
    return [*(o.detach() for o in out), *found]


def shard(values, rank):
    """Hidden, and the rank's rows of weight and bias."""
    each = V // ranks.WORLD
    mine = slice(rank * each, (rank + 1) * each)
    return [values[0], values[1][mine], values[2][mine]]


def combinations():
    for backend in BACKENDS:
        for dtype in DTYPES:
            for name in cases.OPTIONS:
                yield backend, dtype, name, "everything"
    for part in PARTS:
        yield BACKENDS[-1], torch.float32, "all", part
    if not _backend.unavailable_reason(module.OP, "triton", "cpu"):
        yield "triton", torch.float32, "softcap", "everything"  # Triton's own statistics


def sharded_outputs(rank):
    """Runs on each rank: {combination: outputs}."""
    _gemms.chunk_rows = lambda *_: 4  # several chunks and a short last one
    found = {}
    for case in combinations():
        backend, dtype, name, part = case
        options = cases.OPTIONS[name]((1, N), "cpu")
        values = shard(tensors(dtype), rank)
        options |= {"backend": backend, "return_entropy": True, "process_group": dist.group.WORLD}
        found[str(case)] = outputs(linear_logprob, values, part, **options)
    return found


@functools.lru_cache
def sharded():
    return ranks.run(sharded_outputs)


@pytest.mark.parametrize("case", list(combinations()), ids=str)
def test_shards_give_the_whole(case):
    _, dtype, name, part = case
    options = cases.OPTIONS[name]((1, N), "cpu")
    first, second = (found[str(case)] for found in sharded())
    whole = outputs(eager, tensors(dtype), part, **options)
    wide = [v.double() for v in tensors(dtype)]
    truth = outputs(eager, wide, part, **cases.to_double(options))
    trained = PARTS[part][0]
    for i, what in enumerate(["logprob", "entropy", *(("dX", "dW", "db")[i] for i in trained)]):
        replicated = what in ("logprob", "entropy", "dX")
        if replicated:
            assert torch.equal(first[i], second[i]), f"{what}: the ranks differ"
        ours = first[i] if replicated else torch.cat((first[i], second[i]))
        assert ours.dtype == whole[i].dtype and ours.shape == whole[i].shape
        if dtype == torch.float64:
            torch.testing.assert_close(ours, truth[i], rtol=1e-11, atol=1e-13, msg=what)
        else:
            assert_near(ours, whole[i], truth[i], what)


def extreme(rank):
    """Runs on each rank: a shard that is all padding, logits beyond exp's range, no rows, no counted rows."""
    hidden, weight, bias = tensors(torch.float32)
    bias[V // 2 :] = -torch.inf
    targets = randint(V // 2, (1, N), 3)
    found, group = {}, {"process_group": dist.group.WORLD, "return_entropy": True}
    for backend in BACKENDS:
        _, w, b = (v.requires_grad_() for v in shard([hidden, weight, bias.detach()], rank))
        x = hidden.detach().clone().requires_grad_()
        out = linear_logprob(x, w, targets, bias=b, backend=backend, **group)
        grads = torch.autograd.grad(out[0].sum() + out[1].sum(), (x, w, b))
        found[f"padding {backend}"] = [*(o.detach() for o in out), *grads]
        large = linear_logprob(300 * hidden, w.detach(), targets, backend=backend, **group)
        found[f"large {backend}"] = list(large)
        empty = hidden[:, :0].clone().requires_grad_()
        out = linear_logprob(empty, w, targets[:, :0], backend=backend, **group)
        found[f"empty {backend}"] = list(torch.autograd.grad(out[0].sum(), (empty, w)))
        out = linear_logprob(x, w, targets - V, mask=torch.zeros(1, N), backend=backend, **group)
        found[f"masked {backend}"] = list(torch.autograd.grad(out[0].sum(), (x, w)))
    return found


def test_extremes():
    first, second = ranks.run(extreme)
    hidden, weight, bias = (t.double() for t in tensors(torch.float32))
    targets = randint(V // 2, (1, N), 3)
    half = [hidden, weight[: V // 2], bias[: V // 2]]
    x, w, b = (v.requires_grad_() for v in half)
    out = linear_logprob(x, w, targets, bias=b, return_entropy=True, backend="reference")
    truth = [*out, *torch.autograd.grad(out[0].sum() + out[1].sum(), (x, w, b))]
    large = linear_logprob(300 * hidden, weight, targets, return_entropy=True, backend="reference")
    for backend in BACKENDS:
        for name, ours, t in zip(NAMES, first[f"padding {backend}"], truth, strict=True):
            torch.testing.assert_close(ours.double(), t.detach(), rtol=1e-4, atol=1e-5, msg=name)
        for grad in second[f"padding {backend}"][3:]:
            assert torch.equal(grad, torch.zeros_like(grad))
        for ours, t in zip(first[f"large {backend}"], large, strict=True):
            torch.testing.assert_close(ours.double(), t.detach(), rtol=2e-6, atol=2e-3)
        for case in ("empty", "masked"):
            for grad in (*first[f"{case} {backend}"], *second[f"{case} {backend}"]):
                assert torch.equal(grad, torch.zeros_like(grad))


def complaints(rank):
    """Runs on each rank: the error of each mistake."""
    x, w, b = shard(tensors(torch.float32), rank)
    targets, world = randint(V, (1, N), 3), dist.group.WORLD

    def tell(*arguments, **options):
        with pytest.raises((TypeError, ValueError)) as info:
            linear_logprob(*arguments, **options)
        return f"{type(info.value).__name__}: {info.value}"

    found = {
        "string": tell(x, w, targets, process_group="world"),
        "mesh": tell(x, w, targets, process_group=dist.init_device_mesh("cpu", (2,))),
        "uneven": tell(x, w[rank:], targets, process_group=world),
        "rows": tell(x[:, rank:], w, targets[:, rank:], process_group=world),
        "high": tell(x, w, targets.index_fill(1, torch.tensor([2]), V), process_group=world),
        "low": tell(x, w, targets.index_fill(1, torch.tensor([0]), -1), process_group=world),
        "bias": tell(x, w, targets, bias=torch.zeros(V), process_group=world),
    }
    alone = dist.new_group([0])
    if rank == 1:
        found["outsider"] = tell(x, w, targets, process_group=alone)
    return found


def test_mistakes_raise_on_every_rank():
    every = ranks.run(complaints)
    expected = {
        "string": "TypeError: linear_logprob: process_group must be a torch.distributed.ProcessGroup",
        "mesh": "mesh.get_group()); got DeviceMesh",
        "uneven": "weight must have V / 2 rows on every rank of process_group (pad the vocabulary to "
        "a multiple of 2); got [151, 150] rows",
        "rows": "hidden must be the same on every rank of process_group; "
        "got (rows, features) [(11, 19), (10, 19)]",
        "high": "targets must be in [0, 302); got 302 at row 2",
        "low": "targets must be in [0, 302); got -1 at row 0",
        "bias": "bias must have shape (151,); got (302,)",
    }
    for found in every:
        for name, text in expected.items():
            assert text in found[name]
    assert "that this rank belongs to" in every[1]["outsider"]


class Head(nn.Module):
    """A body, a head, and one linear op in their forward."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(H, H), nn.Linear(H, V)

    def forward(self, x, targets, op):
        return op(self.body(x), self.head.weight, targets, bias=self.head.bias)


OPS = {"linear_logprob": linear_logprob, "linear_cross_entropy": linear_cross_entropy}


def under_fsdp(rank):
    """Runs on each rank: value and whole gradients of each op on this rank's rows, and what is refused."""
    from torch.distributed.fsdp import fully_shard

    found = {}
    x, targets = randn(N + 1, H, seed=0), randint(V, (N + 1,), 3)
    mine = slice(rank, None, ranks.WORLD)
    for name, op in OPS.items():
        model = Head()
        fully_shard(model.body)
        fully_shard(model)  # the head is the root's own: gathered while the root's forward runs
        with pytest.raises(TypeError) as info:
            op(x, model.head.weight, targets)
        with pytest.raises(TypeError) as of_bias:
            op(x, model.head.weight.full_tensor(), targets, bias=model.head.bias)
        found[f"{name} refused"] = [str(info.value), str(of_bias.value)]
        whole = [p.full_tensor().detach() for p in (model.head.weight, model.head.bias)]
        found[f"{name} outside"] = op(x, whole[0], targets, bias=whole[1])
        out = model(x[mine], targets[mine], op)
        out.sum().backward()
        found[name] = [out.detach(), *(p.grad.full_tensor() for p in model.parameters())]
    return found


@functools.lru_cache
def fsdp():
    return ranks.run(under_fsdp)


@pytest.mark.parametrize("name", OPS)
def test_fsdp2_weight_inside_and_outside_its_module(name):
    first, second = fsdp()
    op, x, targets, model = OPS[name], randn(N + 1, H, seed=0), randint(V, (N + 1,), 3), Head()
    halves = [model(x[r :: ranks.WORLD], targets[r :: ranks.WORLD], op) for r in range(ranks.WORLD)]
    sum(h.sum() for h in halves).div(ranks.WORLD).backward()
    for found, half in zip((first, second), halves, strict=True):
        torch.testing.assert_close(found[name][0], half.detach())
        for grad, parameter in zip(found[name][1:], model.parameters(), strict=True):
            torch.testing.assert_close(grad, parameter.grad)
        outside = op(x, model.head.weight, targets, bias=model.head.bias)
        torch.testing.assert_close(found[f"{name} outside"], outside.detach())
        weight, bias = found[f"{name} refused"]
        assert f"{name}: weight must be a plain tensor; got a DTensor (302, 19)" in weight
        assert f"call {name} inside the forward of the module that owns weight" in weight
        assert "or pass weight.full_tensor()" in weight
        assert f"{name}: bias must be a plain tensor; got a DTensor (302,)" in bias


def test_a_shard_of_padding_weighs_nothing_and_one_with_a_nan_shows_it():
    """Every backend says log-sum -inf of a row of -inf; NaN with max -inf is a row that holds a NaN."""
    real = torch.tensor([[2.0], [0.5], [0.2], [-1.0]])  # max, log-sum, mean, log-prob
    padding = torch.tensor([[-torch.inf], [-torch.inf], [torch.nan], [torch.nan]])
    logprob, entropy, stats = combine(torch.stack((real, padding)), torch.tensor([0]))
    torch.testing.assert_close(torch.stack((logprob, entropy)), torch.tensor([[-1.0], [0.3]]))
    torch.testing.assert_close(stats, real[:3])
    logprob, entropy, _ = combine(torch.stack((real, padding)), torch.tensor([1]))
    torch.testing.assert_close(torch.stack((logprob, entropy)), torch.tensor([[-torch.inf], [0.3]]))
    padding[1] = torch.nan
    logprob, entropy, _ = combine(torch.stack((real, padding)), torch.tensor([0]))
    assert logprob.isnan().all() and entropy.isnan().all()


CALLS = ("linear_logprob", "linear_cross_entropy", "linear_ppo_loss", "linear_token_loss")


def faults(op, rank):
    """[(what the last rank got wrong, keyword arguments of this rank)]: before and after the op's own collective."""
    own = rank == ranks.WORLD - 1
    rows = {"linear_ppo_loss": ("old_logprob", "advantages")}.get(op, ())
    values = dict(zip(("hidden", "weight"), shard(tensors(torch.float32), rank), strict=False))
    values |= {"targets": randint(V, (1, N), 3), **{name: randn(1, N, seed=5) for name in rows}}
    if op == "linear_token_loss":
        values["loss_fn"] = lambda logprob, *_: -logprob
    yield "hidden", {**values, "hidden": values["hidden"].int() if own else values["hidden"]}
    yield "targets", {**values, "targets": values["targets"] + V * own}
    yield "temperature", {**values, "temperature": -1.0 if own else 1.0}
    yield "weight", {**values, "weight": values["weight"][: -1 if own else None]}
    yield (
        "dtype",
        {**values, "weight": values["weight"].to(torch.bfloat16 if own else torch.float32)},
    )


def fail(rank):
    """On this rank: what it raised for each fault, and whether the group still works."""
    found = []
    for op in CALLS:
        for name, arguments in faults(op, rank):
            try:
                getattr(fastrlhf, op)(**arguments, process_group=dist.group.WORLD)
                found.append((op, name, "no error"))
            except (TypeError, ValueError) as error:
                found.append((op, name, str(error)))
    x = torch.ones(1)
    dist.all_reduce(x)
    return [*found, float(x)]


def test_an_argument_error_on_one_rank_is_raised_on_all():
    """The other ranks do not wait in a collective: they raise that message, and the group stays usable."""
    first, second = ranks.run(fail)
    assert first.pop() == second.pop() == ranks.WORLD
    assert len(first) == len(second) == 5 * len(CALLS)
    for (op, name, others), (_, _, own) in zip(first, second, strict=True):
        if name in ("weight", "dtype"):  # the ranks' operands do not fit together: an error of all
            assert others == own and own.startswith(f"{op}: ") and "every rank" in own
        else:
            assert own.startswith(f"{op}: {name} "), own
            assert others == f"{own} (raised on rank 1 of process_group)"
