"""masked_whiten against Python's own sums."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from _support import sequence_cases as cases
from _support.tolerance import assert_near
from fastrlhf import masked_whiten as plain_whiten
from fastrlhf import reference

NAN = float("nan")
masked_whiten = cases.anywhere(plain_whiten)
each_backend = cases.each_backend("masked_whiten")
fused = cases.each_backend("masked_whiten", cases.FUSED)
each_triton = cases.each_backend("masked_whiten", ("triton",))


@each_backend
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("unbiased", [True, False])
def test_equals_naive_sums(backend, shift_mean, unbiased):
    x, mask = 3 + cases.randn((5, 700), 1), cases.random_mask((5, 700), 2)
    got = masked_whiten(x, mask=mask, shift_mean=shift_mean, unbiased=unbiased, backend=backend)
    expected = torch.tensor(
        cases.naive_whiten(x[mask].tolist(), shift_mean, unbiased), dtype=torch.float64
    )
    torch.testing.assert_close(got[mask], expected, rtol=1e-12, atol=1e-12)
    assert (got[~mask] == 0).all()


@fused
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("masked", [False, True])
def test_error_at_most_twice_eager(backend, dtype, offset, masked):
    x = (offset + cases.randn((37, 301), 1)).to(dtype)
    mask = cases.random_mask(x.shape, 2) if masked else None
    ours = masked_whiten(x, mask=mask, backend=backend)
    truth = reference.masked_whiten(x.double(), mask=mask)
    assert ours.dtype == torch.float32
    assert_near(ours, reference.masked_whiten(x, mask=mask), truth)


@fused
def test_far_from_zero_the_variance_keeps_its_digits(backend):
    # sum(x^2) - n mean^2 in fp32 would be all rounding error here.
    x = (1000 + cases.randn(50_000, 1)).float()
    truth = reference.masked_whiten(x.double())
    torch.testing.assert_close(masked_whiten(x, backend=backend).double(), truth, rtol=0, atol=1e-4)


@each_backend
def test_counts_below_two(backend):
    def run(x, **options):
        return masked_whiten(torch.tensor(x), **options, backend=backend)

    assert torch.equal(run([5.0]), torch.zeros(1))
    assert torch.equal(run([5.0], shift_mean=False), torch.tensor([5.0]))
    assert run([]).shape == (0,)
    mask = torch.zeros(1, 2, dtype=torch.bool)
    assert torch.equal(run([[5.0, NAN]], mask=mask), torch.zeros(1, 2))
    mask[0, 0] = True
    assert torch.equal(run([[5.0, NAN]], mask=mask), torch.zeros(1, 2))
    assert torch.equal(run([2.0, 2.0, 2.0]), torch.zeros(3))


@each_backend
@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
def test_one_bad_value_shows_in_all(backend, bad):
    x = cases.randn((7, 300), 1, torch.float32)
    x[3, 5] = bad
    assert masked_whiten(x, backend=backend).isnan().all()
    mask = cases.random_mask((7, 300), 2)
    mask[3, 5] = True
    for shift_mean in (True, False):  # but not behind the mask
        out = masked_whiten(x, mask=mask, shift_mean=shift_mean, backend=backend)
        assert torch.equal(out.isnan(), mask) and not out[~mask].any()


@fused
def test_any_rank_and_stride(backend, poisoned):
    x, mask = cases.randn((6, 5, 40), 1, torch.float32), cases.random_mask((6, 5, 40), 2)
    flat = masked_whiten(x.flatten(), mask=mask.flatten(), backend=backend)
    views = [(x, mask), (x.flatten(1), mask.flatten(1))]
    views.append((cases.with_strides(x.flatten(1)), mask.flatten(1).T.contiguous().T))
    views.append((x.transpose(0, 2).contiguous().transpose(0, 2), mask))
    for view, view_mask in views:
        out = masked_whiten(view, mask=view_mask, backend=backend)
        assert out.shape == view.shape
        assert torch.equal(out.flatten(), flat)
    assert masked_whiten(torch.tensor(3.0), backend=backend).shape == ()


@cases.each_backend("masked_whiten", ("cuda",))
def test_bitwise_the_same_in_any_layout(backend):
    # fp64: nothing is rounded to fewer digits afterwards. Rows of 300 tokens cross tiles of 128.
    for shape in ((7, 300), (40, 33), (3, 1024)):
        x, mask = 7 + cases.randn(shape, 1), cases.random_mask(shape, 2)
        flat = masked_whiten(x.flatten(), mask=mask.flatten(), backend=backend)
        strided = cases.with_strides(x)
        for view, keep in ((x, mask), (strided, mask), (x, mask.T.contiguous().T)):
            assert torch.equal(masked_whiten(view, mask=keep, backend=backend).flatten(), flat)


@cases.each_backend("masked_whiten", ("cuda",))
@pytest.mark.parametrize("first", [0.0, 1e6, -1e12])
def test_the_digits_survive_any_pivot(backend, first):
    # The sums are taken about the first value that is met: an outlier, or far from zero.
    # What cancels is at most count times what is left (csrc/common/moments.h), in a few roundings.
    x = 3 + cases.randn(20_000, 1)
    x[0] = first
    for offset in (0.0, 1e9):
        got = masked_whiten(x + offset, backend=backend)
        exact = torch.tensor(cases.naive_whiten((x + offset).tolist()), dtype=torch.float64)
        relative = 4 * len(x) * 2**-53
        # The mean of numbers around 1e9 is rounded too, before it is subtracted.
        torch.testing.assert_close(got, exact, rtol=relative, atol=relative + offset * 2**-52)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_values_are_whitened_to_0(backend, dtype):
    """Exactly, however large they are; with the mean added back they keep their value."""
    few = cases.interpreted(backend)
    for size in (1e6, -1e25) if few else (0.1, 1e6, -1e25, 3e38):
        x = torch.full((3, 300 if few else 1300), size, dtype=dtype)
        for mask in (None, cases.random_mask(x.shape, 1)):
            keep = torch.ones_like(x) if mask is None else mask
            assert (masked_whiten(x, mask=mask, backend=backend) == 0).all(), size
            whole = masked_whiten(x, mask=mask, shift_mean=False, backend=backend)
            assert torch.equal(whole, x * keep), size


@fused
def test_packed_equals_flat(backend):
    x = cases.randn(20, 1, torch.float32)
    cu = cases.cu_of([4, 0, 16])
    packed = masked_whiten(x, cu_seqlens=cu, backend=backend)
    assert torch.equal(packed, masked_whiten(x, backend=backend))


@each_triton
def test_tensors_too_large_for_short_divisions_are_copied(backend, monkeypatch):
    from fastrlhf.kernels import _launch

    x = cases.with_strides(cases.randn((6, 40), 1, torch.float32))
    plain = masked_whiten(x, backend=backend)
    monkeypatch.setattr(_launch, "FLAT_LIMIT", 240)
    assert torch.equal(masked_whiten(x, backend=backend), plain)


@each_triton
def test_a_program_takes_several_blocks(backend, monkeypatch):
    from fastrlhf.kernels import masked_whiten as kernels

    x, mask = 5 + cases.randn((7, 900), 1), cases.random_mask((7, 900), 2)
    with cases.triton_launches() as names:
        whole = masked_whiten(x, mask=mask, backend=backend)
    assert names == ["masked_whiten_moments_kernel", "masked_whiten_kernel"]
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    torch.testing.assert_close(masked_whiten(x, mask=mask, backend=backend), whole)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-100, 100, width=32)), st.booleans(), st.data())
def test_any_values(values, unbiased, data):
    keep = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    x, mask = torch.tensor(values).double(), torch.tensor(keep, dtype=torch.bool)
    expected = torch.tensor(
        cases.naive_whiten(x[mask].tolist(), unbiased=unbiased), dtype=torch.float64
    )
    for backend in ("reference", "cpu", "triton"):
        got = masked_whiten(x, mask=mask, unbiased=unbiased, backend=backend)
        # Where all values are equal up to rounding, rounding is what 1 / sqrt(var) magnifies.
        torch.testing.assert_close(got[mask], expected, rtol=1e-9, atol=1e-9)
