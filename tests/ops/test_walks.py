"""How many of our functions one call enters before and around its kernels: what a reader must follow."""

import sys
from pathlib import Path

import pytest
import torch

import fastrlhf
from fastrlhf.ops import _backend

PACKAGE = str(Path(fastrlhf.__file__).resolve().parent)
pytestmark = pytest.mark.skipif(
    bool(_backend.unavailable_reason("gae", "cpu")), reason="the C++ extension is not built"
)


def walk(call):
    """[(file, function) of ours] that one eager call enters, in order, when everything is cached."""
    call()
    entered = []

    def profile(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            entered.append((code.co_filename, code.co_qualname))

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered


def token_logprob():
    logits, targets = torch.randn(8, 50, requires_grad=True), torch.arange(8)
    return lambda: fastrlhf.token_logprob(logits, targets, backend="cpu")


def linear_ppo_loss():
    hidden, weight = torch.randn(8, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    given = (hidden, weight, torch.arange(8), torch.randn(8), torch.randn(8))
    return lambda: fastrlhf.linear_ppo_loss(*given, backend="cpu")


@pytest.mark.parametrize(
    ("make", "functions", "files"), [(token_logprob, 8, 3), (linear_ppo_loss, 25, 6)]
)
def test_walk(make, functions, files):
    entered = walk(make())
    distinct = set(entered)
    print(f"{make.__name__}: {len(distinct)} functions, {len(entered)} calls")
    assert any(name == make.__name__ for _, name in distinct)  # the profiler sees ours
    assert len(distinct) <= functions, sorted(distinct)
    assert len({file for file, _ in distinct}) <= files, sorted(distinct)
