"""token_logprob_part_ and token_logprob_whole (CPU): bitwise equal to token_logprob_fwd, however a row is cut."""

import itertools

import pytest
import torch

from _support import logit_cases as cases
from _support.logit_cases import randint, randn

BLOCK = 2048  # columns: a part begins at a multiple of it
NAN, INF = float("nan"), float("inf")
ops = torch.ops.fastrlhf

on_cpu = cases.each_backend("token_logprob", ("cpu",))


def odd_rows(width, dtype):
    """[14, width]: ramps whose maximum moves with every block, and values at the edge of the format."""
    rows = randn(14, width, seed=0, scale=3, dtype=torch.float64)
    ramp = torch.linspace(-12, 12, width, dtype=torch.float64)
    rows[0] += ramp
    rows[1] -= ramp
    rows[2] = -INF
    rows[3, width // 2] = NAN
    rows[4, : width // 2] = -INF
    rows[5, width // 3 :] = torch.finfo(dtype).min
    rows[6] = torch.finfo(dtype).min
    rows[7, -1] = INF
    rows[8] += 1e4
    rows[9] += 1e4 * ramp
    rows[10, 0] = NAN
    rows[10, width // 2 :] += 500
    huge = torch.finfo(dtype).max / 64  # an ulp of z is more than exp can take
    rows[11] *= huge
    rows[12, width // 2 :] *= huge
    return rows.to(dtype)


def same(ours, theirs):
    """Bitwise equal, NaN in the same places."""
    for ours_one, theirs_one in zip(ours, theirs, strict=True):
        assert ours_one.dtype == theirs_one.dtype and ours_one.shape == theirs_one.shape
        torch.testing.assert_close(ours_one, theirs_one, rtol=0, atol=0, equal_nan=True)


def settings_of(options, shape):
    """(row_temperature, temperature, softcap, mask) as the raw ops take them."""
    kwargs = cases.OPTIONS[options](shape, "cpu")
    temperature = kwargs.get("temperature", 1.0)
    row_temperature = temperature if isinstance(temperature, torch.Tensor) else None
    number = temperature if row_temperature is None else 1.0
    return row_temperature, number, kwargs.get("softcap", 0.0), kwargs.get("mask")


def by_parts(logits, targets, settings, cuts):
    """(logprob, entropy, stats) of parts that end at `cuts`, each in separate memory."""
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    state = torch.full((6, len(logits)), NAN, dtype=acc)
    for first, end in itertools.pairwise((0, *cuts)):
        part = logits[:, first:end].clone()
        ops.token_logprob_part_(part, targets, first, *settings, state)
    return ops.token_logprob_whole(state, logits.shape[1], targets, *settings)


def cuts(width, blocks):
    """Ends of parts of so many blocks."""
    return (*range(blocks * BLOCK, width, blocks * BLOCK), width)


@on_cpu
@pytest.mark.parametrize("dtype", [*cases.DTYPES, torch.float64])
@pytest.mark.parametrize("options", cases.OPTIONS)
@pytest.mark.parametrize("width", [7, 2047, 2049, 4095, 4096, 4097, 50257, 128256])
def test_bitwise_equal_to_whole_rows(backend, width, options, dtype, poisoned):
    logits = odd_rows(width, dtype)
    targets, settings = randint(width, (14,), 1), settings_of(options, (14,))
    expected = ops.token_logprob_fwd(logits, targets, *settings, True, False)
    assert expected[0][[0, 1, 8, 11, 13]].isfinite().all()
    ends = {cuts(width, blocks) for blocks in (1, 2, 5, 1 << 20)}
    ends.add(tuple(e for i, e in enumerate(cuts(width, 1)) if i % 3 or e == width))  # uneven
    for some in ends:
        same(by_parts(logits, targets, settings, some), expected)


@on_cpu
def test_a_target_in_each_part_is_found(backend):
    width = 3 * BLOCK + 5
    logits = randn(1, width, seed=0, scale=3).repeat(8, 1)
    targets = torch.tensor(
        [0, BLOCK - 1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK, width - 6, width - 5, width - 1]
    )
    logits[torch.arange(8), targets] += torch.arange(8)
    for index in (torch.int32, torch.int64):
        settings = (None, 1.0, 0.0, None)
        out = by_parts(logits, targets.to(index), settings, cuts(width, 1))
        expected = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(out[0], expected)


@on_cpu
def test_masked_rows_and_bad_targets_are_not_looked_at(backend, poisoned):
    logits, mask = randn(4, 5000, seed=0), torch.tensor([True, False, True, False])
    logits[~mask] = NAN
    targets = torch.tensor([3, -(2**40), 4999, 2**40])
    settings = (None, 1.0, 0.0, mask)
    out = by_parts(logits, targets, settings, cuts(5000, 1))
    same(out, ops.token_logprob_fwd(logits, targets, *settings, True, False))
    assert all((x[..., ~mask] == 0).all() for x in out)


@on_cpu
@pytest.mark.parametrize("bad", [-1, 5000, 2**40])
def test_a_bad_target_or_temperature_is_refused(backend, bad):
    logits, targets = randn(3, 5000, seed=0), torch.tensor([0, bad, 4])
    with pytest.raises(RuntimeError, match=rf"targets must be in \[0, 5000\); got {bad} at row 1"):
        by_parts(logits, targets, (None, 1.0, 0.0, None), cuts(5000, 1))
    row_temperature = torch.tensor([1.0, 1.0, 0.0])
    with pytest.raises(RuntimeError, match=r"temperature must be above 0; got 0\.0+ at row 2"):
        by_parts(logits, targets.clamp(0, 9), (row_temperature, 1.0, 0.0, None), cuts(5000, 1))


@on_cpu
def test_a_part_begins_with_a_block_and_has_its_state(backend):
    logits, targets, settings = randn(2, 64, seed=0), torch.tensor([1, 2]), (None, 1.0, 0.0, None)
    state = torch.zeros(6, 2)
    for first in (-BLOCK, 1, BLOCK // 2):
        with pytest.raises(RuntimeError, match=f"first must be a multiple of {BLOCK}; got {first}"):
            ops.token_logprob_part_(logits, targets, first, *settings, state)
    for wrong in (state.double(), torch.zeros(5, 2), torch.zeros(6, 3), torch.zeros(2, 6).t()):
        with pytest.raises(RuntimeError, match="state must be contiguous"):
            ops.token_logprob_part_(logits, targets, 0, *settings, wrong)
    with pytest.raises(RuntimeError, match="state must be contiguous"):
        ops.token_logprob_whole(torch.zeros(5, 2), 64, targets, *settings)


@on_cpu
def test_nan_survives_a_far_larger_logit_in_a_later_block(backend):
    logits = torch.zeros(2, 3 * BLOCK)
    logits[0, 5], logits[:, 2 * BLOCK :] = NAN, 300.0
    logprob, entropy, _ = ops.token_logprob_fwd(
        logits, torch.tensor([1, 1]), None, 1.0, 0.0, None, True, False
    )
    assert logprob.isnan().tolist() == entropy.isnan().tolist() == [True, False]
