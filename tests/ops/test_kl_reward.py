"""kl_reward against a loop over Python floats, and the place of the score."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from _support import sequence_cases as cases
from _support.tolerance import assert_near
from fastrlhf import kl_reward as plain_kl_reward
from fastrlhf import reference
from fastrlhf.ops import _checks

LENGTHS = cases.LENGTHS
N, B = sum(LENGTHS), len(LENGTHS)
NAN = float("nan")
kl_reward = cases.anywhere(plain_kl_reward)
each_backend = cases.each_backend("kl_reward")
fused = cases.each_backend("kl_reward", cases.FUSED)
each_triton = cases.each_backend("kl_reward", ("triton",))
each_estimator = pytest.mark.parametrize("estimator", _checks.ESTIMATORS)


def naive(logprob, ref_logprob, score, mask, beta, estimator):
    rewards, kl = torch.zeros(2, *logprob.shape, dtype=torch.float64)
    for b in range(logprob.shape[0]):
        kept = mask[b].nonzero().flatten().tolist()
        for t in kept:
            kl[b, t] = cases.naive_kl(float(logprob[b, t]), float(ref_logprob[b, t]), estimator)
            rewards[b, t] = -beta * kl[b, t] + (float(score[b]) if t == kept[-1] else 0.0)
    return rewards, kl


def packed(dtype=torch.float32, scale=0.3):
    logprob = cases.randn(N, 1, torch.float32).to(dtype)
    ref_logprob = (logprob.double() + cases.randn(N, 2, scale=scale)).to(dtype)
    return logprob, ref_logprob, cases.randn(B, 3, dtype), cases.cu_of(LENGTHS)


@each_backend
@each_estimator
def test_equals_naive_loop_on_random_masks(backend, estimator):
    shape = (8, 60)
    logprob, ref_logprob, score = cases.randn(shape, 1), cases.randn(shape, 2), cases.randn(8, 3)
    ref_logprob[3] *= 100  # far enough for the clamps of k3
    mask = cases.random_mask(shape, 4)
    mask[0], mask[1], mask[2, 10:] = False, True, False
    expected = naive(logprob, ref_logprob, score, mask, 0.2, estimator)
    got = kl_reward(
        logprob, ref_logprob, score, beta=0.2, estimator=estimator, mask=mask, backend=backend
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@fused
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("scale", [0.01, 0.3, 10.0])
@each_estimator
def test_error_at_most_twice_eager(backend, dtype, scale, estimator):
    logprob, ref_logprob, score, cu = packed(dtype, scale)
    options = {"beta": 0.1, "estimator": estimator, "cu_seqlens": cu}
    ours = kl_reward(logprob, ref_logprob, score, **options, backend=backend)
    eager = reference.kl_reward(logprob, ref_logprob, score, **options)
    doubles = (x.double() for x in (logprob, ref_logprob, score))
    truth = reference.kl_reward(*doubles, **options)
    for name, a, b, c in zip(("rewards", "kl"), ours, eager, truth, strict=True):
        assert a.dtype == torch.float32
        assert_near(a, b, c, name)


@fused
def test_small_k3_has_no_cancellation(backend):
    # k3 = d^2/2 + O(d^3): exp(x) - 1 - x in fp32 would leave no digit here.
    d = torch.tensor([[1e-4, -1e-4, 1e-3]])
    kl = kl_reward(d, torch.zeros(1, 3), torch.zeros(1), beta=0.0, estimator="k3", backend=backend)[
        1
    ]
    expected = torch.expm1(-d.double()) + d.double()
    torch.testing.assert_close(kl.double(), expected, rtol=1e-6, atol=0)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_cannot_overflow(backend, dtype):
    d = torch.tensor([[1e4, -1e4, 100.0, -100.0, 3.0, -3.0]], dtype=dtype)
    options = {"beta": 0.0, "estimator": "k3", "backend": backend}
    kl = kl_reward(d, torch.zeros_like(d), torch.zeros(1, dtype=dtype), **options)[1]
    near = torch.expm1(-d[0, 4:]) + d[0, 4:]
    expected = torch.cat([torch.full((4,), 10.0, dtype=dtype), near.clamp(max=10)])
    torch.testing.assert_close(kl[0], expected)


@each_backend
def test_score_lands_on_the_last_unmasked_token_only(backend):
    zeros, score = torch.zeros(4, 5), torch.tensor([1.0, 2.0, 3.0, 4.0])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 1, 0, 0]])
    rewards, _ = kl_reward(zeros, zeros, score, beta=1.0, mask=mask, backend=backend)
    expected = torch.zeros(4, 5)
    expected[0, 4], expected[1, 2], expected[3, 2] = 1.0, 2.0, 4.0
    assert torch.equal(rewards, expected)
    cu = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    zeros, score = torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])
    rewards, _ = kl_reward(zeros, zeros, score, beta=1.0, cu_seqlens=cu, backend=backend)
    assert torch.equal(rewards, torch.tensor([0.0, 1.0, 3.0]))


@fused
def test_packed_padded_and_one_by_one_agree_bitwise(backend):
    logprob, ref_logprob, score, cu = packed()
    options = {"beta": 0.1, "estimator": "k3", "backend": backend}
    together = kl_reward(logprob, ref_logprob, score, cu_seqlens=cu, **options)
    padded = kl_reward(
        cases.pad(logprob, LENGTHS, fill=NAN),
        cases.pad(ref_logprob, LENGTHS, fill=NAN),
        score,
        mask=cases.length_mask(LENGTHS),
        **options,
    )
    for a, b in zip(together, padded, strict=True):
        assert torch.equal(a, cases.unpad(b, LENGTHS))
        assert (b[~cases.length_mask(LENGTHS)] == 0).all()
    for b, (start, end) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
        part = slice(start, end)
        alone = kl_reward(logprob[None, part], ref_logprob[None, part], score[b : b + 1], **options)
        for x, y in zip(together, alone, strict=True):
            assert torch.equal(x[part], y[0])


@each_triton
def test_one_launch(backend):
    x = torch.ones(2, 3)
    with cases.triton_launches() as names:
        kl_reward(x, x, torch.ones(2), beta=0.1, backend=backend)
    assert names == ["kl_reward_kernel"]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=10), st.sampled_from(_checks.ESTIMATORS))
def test_any_layout(lengths, estimator):
    logprob, ref_logprob = cases.randn((2, sum(lengths)), 1)
    score, options = cases.randn(len(lengths), 2), {"beta": 0.1, "estimator": estimator}
    got = kl_reward(
        logprob, ref_logprob, score, cu_seqlens=cases.cu_of(lengths), **options, backend="cpu"
    )
    if lengths:
        padded = (cases.pad(x, lengths) for x in (logprob, ref_logprob))
        expected = naive(*padded, score, cases.length_mask(lengths), **options)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, cases.unpad(b, lengths), rtol=1e-12, atol=1e-12)
