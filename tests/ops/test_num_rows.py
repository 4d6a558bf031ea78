"""num_rows of the linear ops on CPU, where a wrong number is an error."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastrlhf
from _support.logit_cases import randint, randn
from fastrlhf.ops import _backend

N, H, V = 11, 8, 50
MASK = torch.arange(N).reshape(1, N) % 3 > 0
COUNT = int(MASK.sum())
OPS = ("linear_logprob", "linear_cross_entropy", "linear_ppo_loss", "linear_token_loss")
BACKENDS = [
    name
    for name in ("reference", "cpu")
    if not _backend.unavailable_reason("linear_logprob", name, "cpu")
]
each_op = pytest.mark.parametrize("op", OPS)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def call(op, leaves, *, mask=MASK, **options):
    """[...] results that a backward starts from."""
    x, w = leaves
    targets, old, advantages = randint(V, (1, N), 2), randn(1, N, seed=3), randn(1, N, seed=4)
    function = getattr(fastrlhf, op)
    if op == "linear_logprob":
        return function(x, w, targets, mask=mask, **options)
    if op == "linear_cross_entropy":
        targets = targets if mask is None else targets.masked_fill(~mask, -100)
        return function(x, w, targets, **options)
    if op == "linear_ppo_loss":
        return function(x, w, targets, old, advantages, mask=mask, **options).loss
    return function(x, w, targets, torch.neg, mask=mask, **options).loss


def leaves():
    return randn(1, N, H, seed=0).requires_grad_(), randn(V, H, seed=1).requires_grad_()


@each_op
@each_backend
def test_the_right_number_changes_nothing(op, backend):
    results = []
    for options in ({}, {"num_rows": COUNT}):
        parameters = leaves()
        out = call(op, parameters, backend=backend, **options)
        results.append((out, *torch.autograd.grad(out.sum(), parameters)))
    for plain, given in zip(*results, strict=True):
        assert torch.equal(plain, given)


@each_op
@each_backend
@pytest.mark.parametrize("wrong", [0, COUNT - 1, COUNT + 1, N])
def test_a_wrong_number_is_refused(op, backend, wrong):
    with pytest.raises(ValueError, match=f"^{op}: num_rows must be {COUNT}, .*; got {wrong}$"):
        call(op, leaves(), num_rows=wrong, backend=backend)


@pytest.mark.parametrize("op", [op for op in OPS if op != "linear_logprob"])
@each_backend
def test_a_wrong_number_leaves_accumulate_into_alone(op, backend):
    into = torch.ones(V, H)
    with pytest.raises(ValueError, match="num_rows must be"):
        call(op, leaves(), num_rows=COUNT + 1, accumulate_into=into, backend=backend)
    assert (into == 1).all()


@each_op
@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (-1, ValueError, rf"num_rows must be in \[0, {N}\]; got -1"),
        (N + 1, ValueError, rf"num_rows must be in \[0, {N}\]; got {N + 1}"),
        (True, TypeError, "num_rows must be an int; got bool"),
        (3.0, TypeError, "num_rows must be an int; got float"),
    ],
)
def test_an_invalid_number_of_rows_is_refused(op, value, error, match):
    with pytest.raises(error, match=f"^{op}: {match}"):
        call(op, leaves(), num_rows=value)


@pytest.mark.parametrize("op", [op for op in OPS if op != "linear_cross_entropy"])
def test_it_comes_with_a_mask(op):
    with pytest.raises(ValueError, match=f"^{op}: num_rows must come with mask; got mask=None"):
        call(op, leaves(), mask=None, num_rows=N)


@pytest.mark.parametrize("op", ["linear_cross_entropy", "linear_ppo_loss", "linear_token_loss"])
def test_the_modules_take_it(op):
    module = getattr(fastrlhf.nn, {"linear_ppo_loss": "LinearPPOLoss"}.get(op, ""), None)
    if op == "linear_cross_entropy":
        module = fastrlhf.nn.LinearCrossEntropy
    if module is None:
        pytest.skip("it has no module")
    x, w = leaves()
    targets = randint(V, (1, N), 2).masked_fill(~MASK, -100)
    more = () if op == "linear_cross_entropy" else (randn(1, N, seed=3), randn(1, N, seed=4))
    mask = {} if op == "linear_cross_entropy" else {"mask": MASK}
    with pytest.raises(ValueError, match="num_rows must be"):
        module()(x, w, targets, *more, num_rows=COUNT + 1, **mask)


def test_all_rows_and_none():
    parameters = leaves()
    every, none = torch.ones_like(MASK), torch.zeros_like(MASK)
    for op in OPS:
        assert torch.equal(
            call(op, parameters, mask=every, num_rows=N), call(op, parameters, mask=every)
        )
        out = call(op, parameters, mask=none, num_rows=0)
        for grad in torch.autograd.grad(out.sum(), parameters):
            assert (grad == 0).all()


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension is not built")
@pytest.mark.parametrize("op", OPS)
def test_one_mask_a_call_under_vmap(op):
    """The op counts each call's rows, since vmap hides them from the caller."""
    parameters = leaves()
    masks = torch.stack([MASK, MASK.flip(1), MASK])
    more = {"reduction": "none"} if op == "linear_token_loss" else {}

    def total(mask, count=COUNT):
        return call(op, parameters, mask=mask, num_rows=count, backend="cpu", **more).sum()

    found = torch.vmap(total, randomness="same")(masks)
    expected = torch.stack([total(mask) for mask in masks])
    torch.testing.assert_close(found, expected)
    both = [torch.autograd.grad(each.sum(), parameters) for each in (found, expected)]
    torch.testing.assert_close(*both)
    with pytest.raises(ValueError, match=f"num_rows must be {COUNT}, .*; got {COUNT - 1}"):
        torch.vmap(lambda mask: total(mask, COUNT - 1), randomness="same")(masks)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension is not built")
@pytest.mark.parametrize("op", [op for op in OPS if op != "linear_token_loss"])
def test_fake_tensors_are_not_counted(op):
    """linear_token_loss looks at its loss, and is refused by the mode."""
    with FakeTensorMode():
        hidden, weight = (torch.empty(like.shape, requires_grad=True) for like in leaves())
        mask = torch.empty(MASK.shape, dtype=torch.bool)
        call(op, (hidden, weight), mask=mask, num_rows=COUNT, backend="cpu").sum().backward()
    assert hidden.grad.shape == hidden.shape and weight.grad.shape == weight.shape
