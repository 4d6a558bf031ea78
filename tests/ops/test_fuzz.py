"""The oracle of `make fuzz` sees each kind of fault of an op, and some hundred calls of the ops have none."""

import pytest
import torch

import fastrlhf
import fuzz_ops

CALLS = 60


def quiet(*_, **__):
    pass


def fuzz(op):
    return fuzz_ops.fuzz(CALLS, 0, "cpu", op, say=quiet)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("op", fuzz_ops.OPS)
def test_calls_give_the_reference_or_a_named_error(op):
    assert not fuzz(op)


def broken(monkeypatch, op, change):
    """`op` on the CPU, and not its reference, with its results or its errors changed."""
    original = getattr(fastrlhf, op)

    def call(*args, backend="auto", **kwargs):
        if backend == "reference":
            return original(*args, backend=backend, **kwargs)
        return change(lambda: original(*args, backend=backend, **kwargs), kwargs)

    monkeypatch.setattr(fastrlhf, op, call)


def off(run, _):
    advantages, returns = run()
    return advantages * (1 + 1e-4), returns


def nameless(run, _):
    try:
        return run()
    except (TypeError, ValueError):
        raise ValueError("gae: bad input") from None


def silent(run, arguments):
    try:
        return run()
    except (TypeError, ValueError):
        like = torch.zeros(2)
        return like, like


def overwriting(run, arguments):
    found = run()
    if arguments["rewards"].numel():
        arguments["rewards"].zero_()
    return found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (off, "in float64"),
        (nameless, "names no argument"),
        (silent, "no error; the other raises"),
        (overwriting, "rewards was overwritten"),
    ],
)
def test_a_fault_is_found(monkeypatch, change, words):
    broken(monkeypatch, "gae", change)
    assert any(words in finding for finding in fuzz("gae"))


def test_a_call_is_drawn_again():
    first, second = (fuzz_ops.arguments_of(7) for _ in range(2))
    assert first[0] == second[0] and first[1].keys() == second[1].keys()
    tensors = [k for k, x in first[1].items() if isinstance(x, torch.Tensor)]
    assert tensors and all(torch.equal(first[1][k], second[1][k]) for k in tensors)
