"""gae against a naive loop per sequence, in every layout the public function takes."""

import platform

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from _support import sequence_cases as cases
from _support.tolerance import ENOUGH, assert_near
from fastrlhf import gae as plain_gae
from fastrlhf import reference

LENGTHS = cases.LENGTHS
N, B = sum(LENGTHS), len(LENGTHS)
NAN = float("nan")
gae = cases.anywhere(plain_gae)
each_backend = cases.each_backend("gae")
fused = cases.each_backend("gae", cases.FUSED)
each_triton = cases.each_backend("gae", ("triton",))


def naive(rewards, values, mask, gamma=1.0, lam=0.95, bootstrap=None):
    """[B, T] tensors: the naive loop over the unmasked tokens of each row, in float64."""
    advantages, returns = torch.zeros(2, *rewards.shape, dtype=torch.float64)
    for b in range(rewards.shape[0]):
        keep = mask[b]
        start = 0.0 if bootstrap is None else float(bootstrap[b])
        a, r = cases.naive_gae(
            rewards[b][keep].tolist(), values[b][keep].tolist(), gamma, lam, start
        )
        advantages[b][keep] = torch.tensor(a, dtype=torch.float64)
        returns[b][keep] = torch.tensor(r, dtype=torch.float64)
    return advantages, returns


def packed(dtype=torch.float32, seed=0):
    return cases.randn(N, seed, dtype), cases.randn(N, seed + 1, dtype), cases.cu_of(LENGTHS)


def loop_over_steps(rewards, values, gamma, lam):
    """The loop that trainers run, in the dtype of its input."""
    advantage, steps, last = 0, [], rewards.shape[1] - 1
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] if t < last else 0.0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * advantage
        steps.append(advantage)
    advantages = torch.stack(steps[::-1], dim=1)
    return advantages, advantages + values


@each_backend
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (0.0, 0.5), (0.7, 0.0)])
def test_equals_naive_loop_on_random_masks(backend, gamma, lam):
    shape = (9, 300)
    rewards, values = cases.randn(shape, 1), cases.randn(shape, 2)
    mask, bootstrap = cases.random_mask(shape, 3), cases.randn(9, 4)
    mask[0], mask[1], mask[2, 40:] = False, True, False
    expected = naive(rewards, values, mask, gamma, lam, bootstrap)
    got = gae(
        rewards,
        values,
        gamma=gamma,
        lam=lam,
        mask=mask,
        bootstrap=bootstrap,
        backend=backend,
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@each_backend
def test_packed_equals_naive_loop(backend):
    rewards, values, cu = packed(torch.float64)
    bootstrap = cases.randn(B, 5)
    got = gae(rewards, values, cu_seqlens=cu, bootstrap=bootstrap, backend=backend)
    mask = cases.length_mask(LENGTHS)
    expected = naive(
        cases.pad(rewards, LENGTHS), cases.pad(values, LENGTHS), mask, bootstrap=bootstrap
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, cases.unpad(b, LENGTHS), rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"),
    reason="other compilers may fuse multiply and add in the recurrence",
)
def test_bitwise_equal_to_the_loop_over_steps():
    rewards, values = cases.randn((11, 700), 1, torch.float32), cases.randn((11, 700), 2)
    values = values.float()
    for gamma, lam in ((1.0, 0.95), (0.99, 0.9)):
        got = gae(rewards, values, gamma=gamma, lam=lam, backend="cpu")
        for a, b in zip(got, loop_over_steps(rewards, values, gamma, lam), strict=True):
            assert torch.equal(a, b)


@fused
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("layout", ["packed", "masked", "whitened"])
def test_error_at_most_twice_eager(backend, dtype, layout):
    rewards, values, cu = packed(dtype)
    options = {"cu_seqlens": cu, "whiten": layout == "whitened"}
    if layout == "masked":
        rewards, values = cases.pad(rewards, LENGTHS), cases.pad(values, LENGTHS)
        options = {"mask": cases.random_mask(rewards.shape, 7)}
    ours = gae(rewards, values, **options, backend=backend)
    eager = reference.gae(rewards, values, **options)
    truth = reference.gae(rewards.double(), values.double(), **options)
    for name, a, b, c in zip(("advantages", "returns"), ours, eager, truth, strict=True):
        assert a.dtype == torch.float32
        assert_near(a, b, c, name)


@fused
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_packed_padded_and_one_by_one_agree_bitwise(backend, dtype):
    rewards, values, cu = packed(dtype)
    together = gae(rewards, values, cu_seqlens=cu, backend=backend)
    padded = gae(
        cases.pad(rewards, LENGTHS, fill=NAN),
        cases.pad(values, LENGTHS, fill=NAN),
        mask=cases.length_mask(LENGTHS),
        backend=backend,
    )
    for a, b in zip(together, padded, strict=True):
        assert torch.equal(a, cases.unpad(b, LENGTHS))
        assert (b[~cases.length_mask(LENGTHS)] == 0).all()
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        alone = gae(rewards[None, start:end], values[None, start:end], backend=backend)
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a[start:end], b[0])


@fused
def test_masked_steps_are_as_if_they_were_not_there(backend):
    rewards, values = cases.randn((20, 600), 1, torch.float32), cases.randn((20, 600), 2)
    values, mask = values.float(), cases.random_mask((20, 600), 3, keep=0.3)
    masked = gae(rewards, values, mask=mask, backend=backend)
    lengths = mask.sum(1).tolist()
    squeezed = gae(rewards[mask], values[mask], cu_seqlens=cases.cu_of(lengths), backend=backend)
    for a, b in zip(masked, squeezed, strict=True):
        if backend == "cpu":
            assert torch.equal(a[mask], b)
        else:  # a scan groups its sums by place
            torch.testing.assert_close(a[mask], b, rtol=1e-5, atol=1e-5)


@each_backend
def test_whitens_like_the_statistics_of_the_unmasked_tokens(backend):
    rewards, values, cu = packed(torch.float64)
    plain, returns = gae(rewards, values, cu_seqlens=cu, backend=backend)
    white, same = gae(rewards, values, cu_seqlens=cu, whiten=True, backend=backend)
    expected = torch.tensor(cases.naive_whiten(plain.tolist()), dtype=torch.float64)
    torch.testing.assert_close(white, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(returns, same)


@fused
def test_more_steps_than_a_16_bit_counter(backend):
    steps = 65_537
    rewards, values = cases.randn((1, steps), 1, torch.float32), cases.randn((1, steps), 2)
    values, mask = values.float(), cases.random_mask((1, steps), 3, keep=0.9)
    got = gae(rewards, values, gamma=0.99, mask=mask, backend=backend)
    expected = naive(rewards, values, mask, gamma=0.99)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
    if cases.interpreted(backend):
        return  # 5 ms per row
    rows = torch.full((65_537, 1), 2.0)
    assert torch.equal(gae(rows, rows, backend=backend)[1], rows)


@each_triton
def test_a_program_takes_several_sequences(backend, monkeypatch):
    from fastrlhf.kernels import _launch

    rewards, values, cu = packed()
    mask = cases.random_mask((7, 30), 1)
    x = cases.randn((7, 30), 2, torch.float32)
    calls = (
        lambda: gae(rewards, values, cu_seqlens=cu, whiten=True, backend=backend),
        lambda: gae(x, x + 1, mask=mask, bootstrap=torch.ones(7), backend=backend),
    )
    many = [call() for call in calls]
    monkeypatch.setattr(_launch, "PROGRAMS", 3)
    for before, call in zip(many, calls, strict=True):
        for a, b in zip(before, call(), strict=True):
            torch.testing.assert_close(a, b)


@each_triton
def test_two_launches_with_whitening(backend):
    with cases.triton_launches() as names:
        gae(torch.ones(2, 3), torch.ones(2, 3), whiten=True, backend=backend)
    assert names == ["gae_kernel", "masked_whiten_kernel"]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_layout(data):
    lengths = data.draw(st.lists(st.integers(0, 40), max_size=12))
    seed, whiten = data.draw(st.integers(0, 999)), data.draw(st.booleans())
    tokens, options = sum(lengths), {"cu_seqlens": cases.cu_of(lengths), "whiten": whiten}
    inputs = [cases.randn(tokens, seed + i, torch.float32) for i in (0, 1)]
    truth = reference.gae(*(x.double() for x in inputs), **options)
    got = gae(*(x.double() for x in inputs), **options, backend="cpu")
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    if tokens >= ENOUGH:
        eager = reference.gae(*inputs, **options)
        for a, b, c in zip(gae(*inputs, **options, backend="cpu"), eager, truth, strict=True):
            assert_near(a, b, c)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_mask(data):
    rows, steps = data.draw(st.integers(0, 10)), data.draw(st.integers(0, 30))
    kept = data.draw(st.lists(st.booleans(), min_size=rows * steps, max_size=rows * steps))
    mask = torch.tensor(kept, dtype=torch.bool).reshape(rows, steps)
    rewards, values = (cases.randn((rows, steps), i) for i in (0, 1))
    for backend in ("reference", "cpu", "triton"):
        got = gae(rewards, values, mask=mask, backend=backend)
        for a, b in zip(got, naive(rewards, values, mask), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_bad_cu_seqlens_cannot_reach_memory():
    """torch.compile skips the checks in Python, so the kernel checks too."""
    x = torch.zeros(4)
    for bad in ([0, 9], [0, 5, 4], [1, 4]):
        with pytest.raises(RuntimeError, match="cu_seqlens"):
            torch.ops.fastrlhf.gae(
                x, x, 1.0, 1.0, torch.tensor(bad, dtype=torch.int32), None, None, False
            )
