"""Inputs, naive oracles and bars for the tests of the sequence ops and the losses.

The oracles are loops over Python floats, one unmasked token after another: they share no code and no
layout with the package.
"""

import contextlib
import functools
import math

import pytest
import torch
from torch.utils._pytree import tree_map_only

from _support.logit_cases import DEVICE, each_backend, emulated, interpreted  # noqa: F401

FUSED = ("cpu", "triton", "cuda")
CPP = ("cpu", "cuda")  # the backends that are one C++ op on two devices
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The lengths meet the edges of the C++ kernels: chunks of 256 steps, blocks of 1024, eight lanes.
LENGTHS = (5, 1, 0, 300, 256, 0, 257, 31, 2, 1, 1030, 64, 7, 513, 3, 0)


def anywhere(function):
    """`function` with its tensors moved to where `backend` runs, and its results moved back."""

    @functools.wraps(function)
    def call(*args, backend="auto", **kwargs):
        device = DEVICE.get(backend, "cpu") if torch.cuda.is_available() else "cpu"
        if device != "cpu":
            args, kwargs = tree_map_only(torch.Tensor, lambda x: x.to(device), (args, kwargs))
        out = function(*args, backend=backend, **kwargs)
        return out if device == "cpu" else tree_map_only(torch.Tensor, lambda x: x.cpu(), out)

    return call


@contextlib.contextmanager
def triton_launches():
    """The names of the Triton kernels that are launched inside."""
    from fastrlhf.kernels import masked_whiten

    kind, names = type(masked_whiten.masked_whiten_kernel), []
    run = kind.run

    def recording(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    kind.run = recording
    try:
        yield names
    finally:
        kind.run = run


def at(backend, arguments):
    """The same arguments with their tensors where `backend` runs."""
    return tree_map_only(torch.Tensor, lambda x: x.to(DEVICE[backend]), arguments)


def cu_of(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def randn(shape, seed, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def random_mask(shape, seed, keep=0.6):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator) < keep


def pad(packed, lengths, steps=None, fill=0.0):
    """[N] -> [B, T], with `fill` behind the end of each sequence."""
    steps = max(lengths) if steps is None else steps
    out = packed.new_full((len(lengths), steps), fill)
    for b, part in enumerate(packed.split(list(lengths))):
        out[b, : len(part)] = part
    return out


def unpad(padded, lengths):
    return torch.cat([row[:length] for row, length in zip(padded, lengths, strict=True)])


def length_mask(lengths, steps=None):
    steps = max(lengths) if steps is None else steps
    return torch.arange(steps) < torch.tensor(lengths).unsqueeze(1)


def with_strides(x):
    """The same values in a layout that is neither contiguous nor of unit stride."""
    if x.dim() == 1:
        wide = x.new_full((x.shape[0], 3), math.nan)
        wide[:, 1] = x
        return wide[:, 1]
    wide = x.new_full((x.shape[0], x.shape[1] + 5), math.nan)
    wide[:, 2 : 2 + x.shape[1]] = x
    return wide[:, 2 : 2 + x.shape[1]]


def naive_gae(rewards, values, gamma, lam, bootstrap=0.0):
    """One sequence, lists of floats -> (advantages, returns)."""
    advantages, advantage, next_value = [], 0.0, bootstrap
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        advantage = reward + gamma * next_value - value + gamma * lam * advantage
        advantages.append(advantage)
        next_value = value
    advantages.reverse()
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def naive_kl(logprob, ref_logprob, estimator):
    d = logprob - ref_logprob
    if estimator == "k3":
        log_ratio = min(max(-d, -20.0), 20.0)
        return min(math.expm1(log_ratio) - log_ratio, 10.0)
    return {"k1": d, "k2": d * d / 2, "abs": abs(d)}[estimator]


def naive_whiten(x, shift_mean=True, unbiased=True):
    if not x:
        return []
    mean = math.fsum(x) / len(x)
    squares = math.fsum((value - mean) ** 2 for value in x)
    variance = squares / max(len(x) - unbiased, 1)
    return [(v - mean) / math.sqrt(variance + 1e-8) + (0 if shift_mean else mean) for v in x]


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_same_for_any_threads(call):
    """Bitwise the same result twice, and with one, two and three threads."""
    with threads(1):
        first = call()
    for count in (1, 2, 3):
        with threads(count):
            for a, b in zip(first, call(), strict=True):
                assert torch.equal(a, b), f"{count} threads"


def assert_raises(call, kind, *words):
    """`call` raises exactly `kind`, with every one of `words` in the message."""
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert caught.type is kind, (caught.type, str(caught.value))
    for word in words:
        assert word in str(caught.value), f"{word!r} not in {str(caught.value)!r}"
