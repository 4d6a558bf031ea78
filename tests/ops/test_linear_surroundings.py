"""The linear ops in surroundings that others set: default devices, modes, tracebacks, compiled callers."""

import functools
import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import fastrlhf
from _support.logit_cases import randint, randn
from fastrlhf.ops import _backend, _gemms, _linear_loss

N, H, V = 6, 8, 37
pytestmark = pytest.mark.skipif(
    bool(_backend.unavailable_reason("linear_ppo_loss", "cpu", "cpu")),
    reason="the C++ extension is not built",
)


def leaves():
    return randn(N, H, seed=0).requires_grad_(), randn(V, H, seed=1).requires_grad_()


def ppo(x, w, **options):
    rows = (randint(V, (N,), 2), randn(N, seed=3) - 4, randn(N, seed=4))
    return fastrlhf.linear_ppo_loss(x, w, *rows, **options)


def gradients(loss, x, w):
    return torch.autograd.grad(loss, (x, w))


def under_a_default_device(x, w):
    rows = (randint(V, (N,), 2), randn(N, seed=3) - 4, randn(N, seed=4))
    with torch.device("meta"):
        return gradients(fastrlhf.linear_ppo_loss(x, w, *rows).loss, x, w)


def under_inference(x, w):
    with torch.inference_mode():
        ppo(x, w)


def under_fake_tensors(x, w):
    with FakeTensorMode():
        hidden, weight = torch.zeros(0, H), torch.zeros(V, H)
        targets = torch.zeros(0, dtype=torch.long)
        fastrlhf.linear_token_loss(hidden, weight, targets, torch.neg, reduction="sum")


@pytest.mark.parametrize("first", [under_a_default_device, under_inference, under_fake_tensors])
def test_state_cached_by_one_call_serves_the_next(first):
    """Cached tensors do not keep the mode of the first caller."""
    x, w = leaves()
    mask = torch.ones(N, dtype=torch.bool)
    expected = gradients(ppo(x, w, mask=mask, backend="reference").loss, x, w)
    targets = randint(V, (N,), 2)
    total = fastrlhf.linear_cross_entropy(x, w, targets, reduction="sum", backend="reference")
    _linear_loss._cpu_scalar.cache_clear()
    found = first(x, w)
    for grads in (found, gradients(ppo(x, w).loss, x, w)):
        if grads is not None:
            torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-6)
    again = fastrlhf.linear_cross_entropy(x, w, targets, reduction="sum")
    torch.testing.assert_close(again, total)
    again.backward()


@pytest.mark.parametrize("op", ["linear_logprob", "linear_cross_entropy", "linear_ppo_loss"])
def test_gradients_of_a_column_major_weight_lie_as_compiled_code_expects(op):
    """Also where no row counts and no GEMM runs."""
    x, w = randn(N, H, seed=0).requires_grad_(), randn(H, V, seed=1).t().requires_grad_()
    targets, none = randint(V, (N,), 2), torch.zeros(N, dtype=torch.bool)
    if op == "linear_ppo_loss":
        loss = ppo(x, w, mask=none).loss
    elif op == "linear_logprob":
        loss = fastrlhf.linear_logprob(x, w, targets, mask=none).sum()
    else:
        loss = fastrlhf.linear_cross_entropy(x, w, targets.masked_fill(~none, -100))
    (dw,) = torch.autograd.grad(loss, w)
    assert (dw == 0).all() and dw.is_contiguous()


@pytest.mark.parametrize("name", ["temperature", "scale"])
def test_accumulate_into_shares_no_memory_with_a_setting(name):
    x, w = leaves()
    into = torch.ones(V, H)
    other = {"temperature": into.view(-1)[:N], "scale": into[0, 0]}[name]
    with pytest.raises(ValueError, match=f"accumulate_into must not share memory with {name}"):
        ppo(x, w, accumulate_into=into, **{name: other})
    assert (into == 1).all()


# The second sequence is longer than a chunk of two rows.
GSPO = {
    "objective": "gspo",
    "cu_seqlens": torch.tensor([0, 2, 6], dtype=torch.int32),
    "rollout_weights": torch.tensor([0.5, 2.0]),
}
LOSSES = {
    "linear_cross_entropy": lambda x, w, **options: fastrlhf.linear_cross_entropy(
        x, w, randint(V, (N,), 2), **options
    ),
    "linear_ppo_loss": lambda x, w, **options: ppo(x, w, **options).loss,
    "linear_ppo_loss gspo": lambda x, w, **options: ppo(x, w, **GSPO, **options).loss,
    "linear_token_loss": lambda x, w, **options: (
        fastrlhf.linear_token_loss(x, w, randint(V, (N,), 2), torch.neg, **options).loss
    ),
}
each_loss = pytest.mark.parametrize("op", LOSSES)


def own_checkpoint(function):
    """A checkpoint with hooks of its own, as other libraries have: it saves nothing, and runs again when asked."""
    hooks = torch.autograd.graph.saved_tensors_hooks

    def call(x):
        count, again = itertools.count(), []

        def keep(saved):
            again.append(saved)
            return saved

        def unpack(place):
            if not again:
                with torch.enable_grad(), hooks(keep, lambda saved: saved):
                    function(x)
            return again[place]

        with hooks(lambda _: next(count), unpack):
            return function(x)

    return call


def in_save_on_cpu(function):
    def inside(x):
        with torch.autograd.graph.save_on_cpu():
            return function(x)

    return inside


SURROUNDINGS = {
    "reentrant": lambda f: lambda x: checkpoint(f, x, use_reentrant=True),
    "not reentrant": lambda f: lambda x: checkpoint(f, x, use_reentrant=False),
    "save_on_cpu": in_save_on_cpu,
    "save_on_cpu inside": lambda f: lambda x: checkpoint(in_save_on_cpu(f), x, use_reentrant=False),
    "save_on_cpu around": lambda f: in_save_on_cpu(lambda x: checkpoint(f, x, use_reentrant=False)),
    "own hooks": own_checkpoint,
    "own hooks, save_on_cpu inside": lambda f: own_checkpoint(in_save_on_cpu(f)),
}


@each_loss
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("around", SURROUNDINGS)
def test_accumulate_into_adds_dw_once_wherever_the_forward_runs_again(op, around, backend):
    x, w = leaves()
    dx, dw = gradients(LOSSES[op](x, w, backend=backend), x, w)
    into = torch.ones(V, H)
    call = SURROUNDINGS[around](lambda x: LOSSES[op](x, w, accumulate_into=into, backend=backend))
    loss = call(x * 1)
    loss.backward(retain_graph=around == "save_on_cpu")
    torch.testing.assert_close(into - 1, dw)
    torch.testing.assert_close(x.grad, dx)
    assert w.grad is None
    if around == "save_on_cpu":
        with pytest.raises(
            RuntimeError, match=f"{op.split()[0]}: with accumulate_into the backward runs once"
        ):
            loss.backward()
        torch.testing.assert_close(into - 1, dw)


def selective_checkpoint(function, saves, *arguments):
    """A checkpoint that keeps the results of the ops that have `saves` in their name."""

    def policy(context, op, *arguments, **options):
        kept = saves in str(op)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(function, *arguments, use_reentrant=False, context_fn=contexts)


@each_loss
@pytest.mark.parametrize("saves", ["aten.mm", "fastrlhf", "aten.new_zeros"])
@pytest.mark.parametrize("accumulate", [True, False])
def test_a_selective_checkpoint_keeps_no_result_that_a_loss_overwrites(
    op, saves, accumulate, monkeypatch
):
    """In several chunks, with rows that do not count."""
    monkeypatch.setattr(_gemms, "chunk_rows", lambda *_: 2)
    x, w = leaves()
    more = {"mask": torch.arange(N) % 3 > 0} if op != "linear_cross_entropy" else {}
    expected = gradients(LOSSES[op](x.tanh(), w, **more), x, w)
    w.grad = torch.zeros_like(w)

    def loss(x, w):
        into = w.grad if accumulate else None
        return LOSSES[op](x.tanh(), w, accumulate_into=into, **more)

    selective_checkpoint(loss, saves, x, w).backward()
    torch.testing.assert_close((x.grad, w.grad), expected)


@pytest.mark.parametrize("saves", ["aten.mul", "fastrlhf"])
def test_a_selective_checkpoint_keeps_no_logits_that_token_loss_overwrites(saves):
    logits, targets = randn(N, V, seed=0).requires_grad_(), randint(V, (N,), 2)
    loss = lambda x: fastrlhf.token_loss(2 * x, targets, inplace_backward=True)[0].sum()  # noqa: E731
    (expected,) = torch.autograd.grad(loss(logits), logits)
    selective_checkpoint(loss, saves, logits).backward()
    torch.testing.assert_close(logits.grad, expected)


@each_loss
def test_accumulate_into_where_saved_tensors_may_be_overwritten(op):
    x, w = leaves()
    dx, dw = gradients(LOSSES[op](x, w), x, w)
    into = torch.ones(V, H)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        LOSSES[op](x * 1, w, accumulate_into=into).backward()
    torch.testing.assert_close((x.grad, into - 1), (dx, dw))


@each_loss
@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_accumulate_into_refuses_a_weight_with_a_hook(op, hook):
    """The hook would get no gradient, after dW has been added."""
    x, w = leaves()
    into = torch.zeros(V, H)
    handle = getattr(w, hook)(lambda grad: None)
    with pytest.raises(
        ValueError, match=f"^{op.split()[0]}: accumulate_into must be None for a weight with a"
    ):
        LOSSES[op](x, w, accumulate_into=into)
    assert (into == 0).all()
    handle.remove()
    LOSSES[op](x, w, accumulate_into=into).backward()
    assert into.any()


@pytest.mark.parametrize("op", ["linear_token_loss", "linear_cross_entropy"])
def test_an_error_at_run_time_names_the_op_that_was_called(op):
    """Not linear_logprob, which computes its log-probs. Eager, and in a compiled program."""
    x, w = leaves()
    more = {"loss_fn": torch.neg} if op == "linear_token_loss" else {}
    call = lambda: getattr(fastrlhf, op)(x, w, torch.full((N,), V), reduction="none", **more)  # noqa: E731
    torch._dynamo.reset()
    for function in (call, torch.compile(call, backend="eager", fullgraph=True)):
        with pytest.raises(ValueError, match=f"^{op}: targets must be in "):
            function()


@pytest.mark.parametrize("what", ["targets", "mask"])
def test_a_token_loss_under_vmap(what):
    """vmap over targets or masks; the op refuses what vmap cannot do."""
    x, w = leaves()
    targets, mask = randint(V, (3, N), 2), randn(3, N, seed=5) > 0
    given = {"targets": targets, "mask": mask}

    def loss(one, reduction="none"):
        options = {"targets": targets[0], "mask": mask[0], what: one, "reduction": reduction}
        return fastrlhf.linear_token_loss(x, w, loss_fn=torch.neg, **options).loss

    with pytest.raises(NotImplementedError, match="or use reduction='none'"):
        torch.vmap(lambda one: loss(one, "sum"))(given[what])
    found = torch.vmap(loss)(given[what])
    expected = torch.stack([loss(one) for one in given[what]])
    torch.testing.assert_close(found, expected)
    both = [torch.autograd.grad(each.sum(), (x, w)) for each in (found, expected)]
    torch.testing.assert_close(*both)


@pytest.mark.parametrize("op", ["linear_cross_entropy", "linear_ppo_loss"])
def test_vmap_over_nothing_is_refused(op):
    hidden, weight = torch.zeros(0, N, H), randn(V, H, seed=1)
    rows = {"old_logprob": torch.zeros(N), "advantages": torch.zeros(N)}
    more = rows if op == "linear_ppo_loss" else {}

    def loss(x):
        out = getattr(fastrlhf, op)(x, weight, torch.zeros(N, dtype=torch.long), **more)
        return out.loss if more else out

    with pytest.raises(RuntimeError, match=f"{op}: vmap over a dimension of size 0"):
        torch.vmap(loss)(hidden)
