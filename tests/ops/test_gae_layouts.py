"""The sequence ops where a GPU cuts its work: any length, offset and mask, few long sequences among many.

The oracle is a loop over Python floats; the layouts are those at which csrc/cuda changes its path.
"""

import pytest
import torch
from test_gae import naive

from _support import sequence_cases as cases
from _support.logit_cases import DEVICE
from _support.logit_cases import each_backend as each_backend_of
from fastrlhf import KLGAEOutput, gae, kl_gae, kl_reward, masked_whiten

NAN = float("nan")

each_kernel = each_backend_of("kl_gae", ("cpu", "cuda"))
# Tiles of 128 tokens, groups of 1, 2, 4 and 8 of them, and more than one round of a group.
STEPS = (1, 2, 127, 128, 129, 256, 300, 511, 513, 1024, 1025, 2051)


@each_kernel
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_any_length_and_any_offset(backend, steps, dtype):
    device = DEVICE[backend]
    for offset in (0, 1, 2, 4):  # elements from an aligned address
        wide = cases.randn((2, 3 * steps + offset), steps).to(dtype).to(device)
        rewards, values = wide[:, offset:].unflatten(1, (3, steps))
        mask = cases.random_mask((3, steps), offset).to(device)
        for options in ({}, {"mask": mask}):
            got = gae(rewards, values, gamma=0.98, **options, backend=backend)
            doubles = (rewards.double().cpu(), values.double().cpu())
            keep = mask.cpu() if options else torch.ones(3, steps, dtype=torch.bool)
            tight = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {}
            for a, b in zip(got, naive(*doubles, keep, gamma=0.98), strict=True):
                torch.testing.assert_close(a.cpu(), b.to(a.dtype), **tight)


@each_kernel
def test_few_long_sequences_are_bitwise_equal_to_themselves_among_many(backend):
    device, lengths = DEVICE[backend], [20_000, 0, 1, 8_193, 33_001]
    few = [cases.randn(sum(lengths), seed, torch.float32).to(device) for seed in (1, 2)]
    together = gae(*few, lam=0.99, cu_seqlens=cases.cu_of(lengths).to(device), backend=backend)
    # The mean length chooses how the work is cut.
    many = [torch.cat([x, x[:300]]) for x in few]
    cu = cases.cu_of([*lengths, *[2] * 150]).to(device)
    for a, b in zip(gae(*many, lam=0.99, cu_seqlens=cu, backend=backend), together, strict=True):
        assert torch.equal(a[: len(b)], b)
    for start, end in zip([0, 28_194], [20_000, 61_195], strict=True):
        one = [x[None, start:end] for x in few]
        doubles, keep = [x.double().cpu() for x in one], torch.ones(1, end - start).bool()
        expected = naive(*doubles, keep, lam=0.99)
        alone = gae(*one, lam=0.99, backend=backend)
        for a, b, c in zip(together, alone, expected, strict=True):
            assert torch.equal(a[start:end], b[0])
            torch.testing.assert_close(b.double().cpu(), c, rtol=1e-4, atol=1e-4)


@each_kernel
def test_long_gaps_in_the_mask(backend):
    device, steps = DEVICE[backend], 20_000
    rewards, values, mask = cases.randn((2, 3, steps), 1), cases.randn((3, steps), 2), None
    rewards, mask = rewards[0], torch.zeros(3, steps, dtype=torch.bool)
    mask[0, ::5000], mask[1, 4095:4097], mask[1, 19_000:] = True, True, True
    bootstrap = cases.randn(3, 3)
    inputs = [x.to(device) for x in (rewards.masked_fill(~mask, NAN), values)]
    got = gae(
        *inputs, mask=mask.to(device), bootstrap=bootstrap.to(device), whiten=True, backend=backend
    )
    advantages, returns = naive(rewards, values, mask, bootstrap=bootstrap)
    white = torch.zeros_like(advantages)
    white[mask] = torch.tensor(cases.naive_whiten(advantages[mask].tolist()), dtype=torch.float64)
    for a, b in zip(got, (white, returns), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-12, atol=1e-12)


@each_backend_of("gae", ("cuda",))
def test_a_bad_cu_seqlens_is_clamped_on_a_gpu(backend):
    # Reading it on the host would wait for the device; the kernel stays inside the tensors.
    def run(x, *ends):
        cu = torch.tensor(ends, dtype=torch.int32, device=x.device)
        return torch.ops.fastrlhf.gae(x, x * 2, 0.9, 0.8, cu, None, None, False)

    x = cases.randn(40_000, 1, torch.float32).to(DEVICE[backend])
    for good, *bad in (
        ((0, 40_000), (0, 90_000), (-7, 40_000)),
        ((0, 40_000, 40_000), (0, 50_000, 3)),
    ):
        for ends in bad:
            for a, b in zip(run(x, *good), run(x, *ends), strict=True):
                assert torch.equal(a, b)
    run(x, 30_000, 5, -2_000_000_000, 2_000_000_000, 1)
    run(x[:4], 3, *range(300))


@each_kernel
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_gae_of_few_long_masked_sequences(backend, estimator):
    device, shape = DEVICE[backend], (3, 20_000)
    logprob, ref_logprob, values = cases.randn((3, *shape), 1)
    score, mask = cases.randn(3, 2), cases.random_mask(shape, 3)
    mask[0, 9_000:], mask[1] = False, False
    inputs = [x.to(device) for x in (logprob, ref_logprob, score, values)]
    options = {"beta": 0.1, "estimator": estimator, "mask": mask.to(device), "backend": backend}
    got = kl_gae(*inputs, **options)
    kl, rewards = torch.zeros(2, *shape, dtype=torch.float64)
    for b in range(3):
        kept = mask[b].nonzero().flatten().tolist()
        pairs = zip(logprob[b][kept].tolist(), ref_logprob[b][kept].tolist(), strict=True)
        kl[b, kept] = torch.tensor(
            [cases.naive_kl(x, y, estimator) for x, y in pairs], dtype=torch.float64
        )
        rewards[b] = -0.1 * kl[b]
        if kept:
            rewards[b, kept[-1]] += score[b]
    expected = KLGAEOutput(*naive(rewards, values, mask), rewards, kl)
    for name, a, b in zip(KLGAEOutput._fields, got, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-11, atol=1e-11, msg=name)
    for a, b in zip(kl_reward(*inputs[:3], **options), got[2:], strict=True):
        assert torch.equal(a, b)


@each_backend_of("kl_gae", ("cuda",))
@pytest.mark.parametrize("shape", [(3, 4), (2, 1028), (150, 132), (2, 20_000)])
def test_contiguous_rows_are_bitwise_equal_to_strided_ones(backend, shape):
    # csrc/cuda has a kernel for contiguous fp32 rows of a multiple of four tokens.
    device, seeds = DEVICE[backend], (1, 2, 3)
    mask, score = cases.random_mask(shape, 5, keep=0.97), cases.randn(shape[0], 4, torch.float32)
    mask[0], mask[1:, 2 * shape[1] // 3 :] = True, False
    score, mask = score.to(device), mask.to(device)
    rows = [cases.randn(shape, seed, torch.float32).to(device) for seed in seeds]
    strided, views = [cases.with_strides(x) for x in rows], (mask, mask.T.contiguous().T)
    for keep, view in ((None, None), views):
        for op, tensors in ((gae, 2), (kl_reward, 2), (kl_gae, 3)):
            options = {"backend": backend} | ({} if op is kl_reward else {"gamma": 0.99})
            if op is not gae:
                options["beta"] = 0.1
            several = [(rows, keep), (strided, keep), (rows, view)]
            outs = []
            for inputs, m in several:
                inputs = inputs[:tensors]
                inputs = inputs if op is gae else [*inputs[:2], score, *inputs[2:]]
                outs.append(op(*inputs, mask=m, **options))
            for other in outs[1:]:
                for a, b in zip(outs[0], other, strict=True):
                    assert torch.equal(a, b)


@each_kernel
@pytest.mark.parametrize("shape", [(1,), (127,), (129,), (3, 128), (3, 131), (70, 1001)])
def test_whitening_of_any_shape_and_offset(backend, shape):
    device = DEVICE[backend]
    for offset in (0, 1):
        x = 50 + cases.randn((*shape[:-1], shape[-1] + offset), 1)[..., offset:]
        mask = cases.random_mask((*shape[:-1], shape[-1] + offset), 2)[..., offset:]
        for keep in (None, mask):
            got = masked_whiten(
                x.to(device), mask=keep if keep is None else keep.to(device), backend=backend
            )
            counted = torch.ones_like(mask) if keep is None else mask
            expected = torch.zeros_like(x)
            expected[counted] = torch.tensor(
                cases.naive_whiten(x[counted].tolist()), dtype=torch.float64
            )
            torch.testing.assert_close(got.cpu(), expected, rtol=1e-11, atol=1e-11)
