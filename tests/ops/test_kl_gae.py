"""kl_gae is kl_reward followed by gae, bit for bit; its parts are tested in their own files."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from _support import sequence_cases as cases
from _support.tolerance import ENOUGH, assert_near
from fastrlhf import KLGAEOutput, reference
from fastrlhf import gae as plain_gae
from fastrlhf import kl_gae as plain_kl_gae
from fastrlhf import kl_reward as plain_kl_reward
from fastrlhf.ops import _checks

LENGTHS = cases.LENGTHS
NAN = float("nan")
gae, kl_gae, kl_reward = map(cases.anywhere, (plain_gae, plain_kl_gae, plain_kl_reward))
each_backend = cases.each_backend("kl_gae")
fused = cases.each_backend("kl_gae", cases.FUSED)
each_triton = cases.each_backend("kl_gae", ("triton",))


def packed(dtype=torch.float32, lengths=LENGTHS):
    logprob, ref_logprob, values = (cases.randn(sum(lengths), seed, dtype) for seed in (1, 2, 3))
    return logprob, ref_logprob, cases.randn(len(lengths), 4, dtype), values


def parts(logprob, ref_logprob, score, values, *, beta, estimator, gamma, lam, whiten, **layout):
    rewards, kl = kl_reward(logprob, ref_logprob, score, beta=beta, estimator=estimator, **layout)
    exact = logprob.dtype in (torch.float32, torch.float64)
    values = values if exact else values.float()
    advantages, returns = gae(rewards, values, gamma=gamma, lam=lam, whiten=whiten, **layout)
    return KLGAEOutput(advantages, returns, rewards, kl)


@fused
@pytest.mark.parametrize("estimator", _checks.ESTIMATORS)
@pytest.mark.parametrize("dtype", [*cases.DTYPES, torch.float64])
@pytest.mark.parametrize("layout", ["packed", "masked"])
def test_equals_its_parts_bitwise(backend, estimator, dtype, layout):
    # Under the interpreter: empty, one step, within a block, and two blocks.
    lengths = (5, 1, 0, 300, 1030) if cases.interpreted(backend) else LENGTHS
    logprob, ref_logprob, score, values = packed(dtype, lengths)
    options = {"cu_seqlens": cases.cu_of(lengths)}
    if layout == "masked":
        logprob, ref_logprob, values = (
            cases.pad(x, lengths, fill=NAN) for x in (logprob, ref_logprob, values)
        )
        mask = cases.length_mask(lengths)
        options = {"mask": mask & cases.random_mask(mask.shape, 5)}
    options |= {"beta": 0.1, "estimator": estimator, "gamma": 0.99, "lam": 0.9, "whiten": True}
    inputs = (logprob, ref_logprob, score, values)
    options["backend"] = backend
    together, separate = kl_gae(*inputs, **options), parts(*inputs, **options)
    for name, a, b in zip(KLGAEOutput._fields, together, separate, strict=True):
        assert torch.equal(a, b), name


@fused
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("whiten", [False, True])
def test_error_at_most_twice_eager(backend, dtype, whiten):
    inputs = packed(dtype)
    options = {"beta": 0.05, "cu_seqlens": cases.cu_of(LENGTHS), "whiten": whiten}
    ours = kl_gae(*inputs, **options, backend=backend)
    eager = reference.kl_gae(*inputs, **options)
    truth = reference.kl_gae(*(x.double() for x in inputs), **options)
    for name, a, b, c in zip(KLGAEOutput._fields, ours, eager, truth, strict=True):
        assert a.dtype == torch.float32
        assert_near(a, b, c, name)


@each_backend
def test_equals_naive_loops(backend):
    logprob, ref_logprob, score, values = packed(torch.float64)
    cu = cases.cu_of(LENGTHS)
    out = kl_gae(
        logprob, ref_logprob, score, values, beta=0.1, lam=0.9, cu_seqlens=cu, backend=backend
    )
    for b, (start, end) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
        kl = (logprob - ref_logprob)[start:end].tolist()
        rewards = [-0.1 * x for x in kl]
        if rewards:
            rewards[-1] += float(score[b])
        advantages, returns = cases.naive_gae(rewards, values[start:end].tolist(), 1.0, 0.9)
        for got, expected in zip(out, (advantages, returns, rewards, kl), strict=True):
            torch.testing.assert_close(
                got[start:end], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
            )


@fused
def test_packed_padded_and_one_by_one_agree_bitwise(backend):
    logprob, ref_logprob, score, values = packed()
    cu = cases.cu_of(LENGTHS)
    options = {"beta": 0.1, "backend": backend}
    together = kl_gae(logprob, ref_logprob, score, values, cu_seqlens=cu, **options)
    padded = kl_gae(
        cases.pad(logprob, LENGTHS, fill=NAN),
        cases.pad(ref_logprob, LENGTHS, fill=NAN),
        score,
        cases.pad(values, LENGTHS, fill=NAN),
        mask=cases.length_mask(LENGTHS),
        **options,
    )
    for a, b in zip(together, padded, strict=True):
        assert torch.equal(a, cases.unpad(b, LENGTHS))
        assert (b[~cases.length_mask(LENGTHS)] == 0).all()
    for b, (start, end) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
        one = (x[None, start:end] for x in (logprob, ref_logprob))
        alone = kl_gae(*one, score[b : b + 1], values[None, start:end], **options)
        for x, y in zip(together, alone, strict=True):
            assert torch.equal(x[start:end], y[0])


@each_triton
def test_two_launches_with_whitening(backend):
    x = torch.ones(2, 3)
    with cases.triton_launches() as names:
        kl_gae(x, x, torch.ones(2), x, beta=0.1, whiten=True, backend=backend)
    assert names == ["kl_gae_kernel", "masked_whiten_kernel"]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=20), st.booleans())
def test_any_layout(lengths, whiten):
    logprob, ref_logprob, values = cases.randn((3, sum(lengths)), 1, torch.float32)
    inputs = (logprob, ref_logprob, cases.randn(len(lengths), 2, torch.float32), values)
    options = {"beta": 0.1, "cu_seqlens": cases.cu_of(lengths), "whiten": whiten}
    truth = reference.kl_gae(*(x.double() for x in inputs), **options)
    doubles = kl_gae(*(x.double() for x in inputs), **options, backend="cpu")
    for a, b in zip(doubles, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    if sum(lengths) >= ENOUGH:
        ours, eager = (
            kl_gae(*inputs, **options, backend="cpu"),
            reference.kl_gae(*inputs, **options),
        )
        for a, b, c in zip(ours, eager, truth, strict=True):
            assert_near(a, b, c)
