"""The linear ops in surroundings that others set: default devices, modes, tracebacks, compiled callers."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import fastrlhf
from _support.logit_cases import randint, randn
from fastrlhf.ops import _backend, _linear_loss

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
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):  # it looks at its loss
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
