"""masked_whiten against Python's own sums."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sequence_cases as cases
from fastrlhf import masked_whiten, reference

NAN = float("nan")


@cases.each_backend()
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


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("masked", [False, True])
def test_error_at_most_twice_eager(dtype, offset, masked):
    x = (offset + cases.randn((37, 301), 1)).to(dtype)
    mask = cases.random_mask(x.shape, 2) if masked else None
    ours = masked_whiten(x, mask=mask, backend="cpu")
    truth = reference.masked_whiten(x.double(), mask=mask)
    assert ours.dtype == torch.float32
    cases.assert_close_to_eager(ours, reference.masked_whiten(x, mask=mask), truth)


def test_far_from_zero_the_variance_keeps_its_digits():
    # sum(x^2) - n mean^2 in fp32 would be all rounding error here.
    x = (1000 + cases.randn(50_000, 1)).float()
    truth = reference.masked_whiten(x.double())
    torch.testing.assert_close(masked_whiten(x, backend="cpu").double(), truth, rtol=0, atol=1e-4)


@cases.each_backend()
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


@cases.each_backend()
def test_nothing_behind_the_mask_is_used(backend):
    x, mask = cases.randn((7, 300), 1, torch.float32), cases.random_mask((7, 300), 2)
    clean = masked_whiten(x, mask=mask, backend=backend)
    assert torch.equal(clean, masked_whiten(x.masked_fill(~mask, NAN), mask=mask, backend=backend))


def test_any_rank_and_stride():
    x, mask = cases.randn((6, 5, 40), 1, torch.float32), cases.random_mask((6, 5, 40), 2)
    flat = masked_whiten(x.flatten(), mask=mask.flatten(), backend="cpu")
    views = [(x, mask), (x.flatten(1), mask.flatten(1))]
    views.append((cases.with_strides(x.flatten(1)), mask.flatten(1).T.contiguous().T))
    views.append((x.transpose(0, 2).contiguous().transpose(0, 2), mask))
    with cases.poisoned_empty():
        for view, view_mask in views:
            out = masked_whiten(view, mask=view_mask, backend="cpu")
            assert out.shape == view.shape
            assert torch.equal(out.flatten(), flat)
    assert masked_whiten(torch.tensor(3.0), backend="cpu").shape == ()


def test_packed_equals_flat():
    x = cases.randn(20, 1, torch.float32)
    cu = cases.cu_of([4, 0, 16])
    assert torch.equal(masked_whiten(x, cu_seqlens=cu), masked_whiten(x))


def test_same_bits_for_any_number_of_threads():
    x, mask = cases.randn((100, 701), 1, torch.float32), cases.random_mask((100, 701), 2)
    cases.assert_same_for_any_threads(lambda: (masked_whiten(x, backend="cpu"),))
    cases.assert_same_for_any_threads(lambda: (masked_whiten(x, mask=mask, backend="cpu"),))


@cases.each_backend()
def test_is_a_constant_to_autograd(backend):
    assert not masked_whiten(torch.ones(3, requires_grad=True), backend=backend).requires_grad


def test_compiles_without_a_graph_break():
    x, mask = cases.randn((4, 9), 1, torch.float32), cases.random_mask((4, 9), 2)
    cases.assert_compiles(lambda x, m: (masked_whiten(x, mask=m, backend="cpu"),), x, mask)


def test_opcheck():
    x, mask = cases.randn((4, 9), 1, torch.float32), cases.random_mask((4, 9), 2)
    torch.library.opcheck(torch.ops.fastrlhf.masked_whiten.default, (x, mask, True, False))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-100, 100, width=32)), st.booleans(), st.data())
def test_any_values(values, unbiased, data):
    keep = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    x, mask = torch.tensor(values).double(), torch.tensor(keep, dtype=torch.bool)
    expected = torch.tensor(
        cases.naive_whiten(x[mask].tolist(), unbiased=unbiased), dtype=torch.float64
    )
    for backend in cases.BACKENDS:
        got = masked_whiten(x, mask=mask, unbiased=unbiased, backend=backend)
        # Where all values are equal up to rounding, rounding is what 1 / sqrt(var) magnifies.
        torch.testing.assert_close(got[mask], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"x": [1.0]}, TypeError, ("x", "Tensor", "list")),
        ({"x": torch.zeros(4).int()}, TypeError, ("x", "float32", "int32")),
        ({"mask": torch.ones(3)}, ValueError, ("mask", "(4,)", "(3,)")),
        ({"mask": torch.full((4,), 3)}, ValueError, ("mask", "0 and 1", "3")),
        ({"shift_mean": 1}, TypeError, ("shift_mean", "bool", "int")),
        ({"unbiased": None}, TypeError, ("unbiased", "bool", "NoneType")),
        ({"cu_seqlens": torch.tensor([0, 3]).int()}, ValueError, ("cu_seqlens", "[0, 3]")),
        (
            {"cu_seqlens": torch.tensor([0, 4]).int(), "mask": torch.ones(4)},
            ValueError,
            ("cu_seqlens", "mask", "not both"),
        ),
        (
            {"x": torch.zeros(2, 2), "cu_seqlens": torch.tensor([0, 4]).int()},
            ValueError,
            ("x", "[N]", "(2, 2)"),
        ),
        ({"backend": "cuda"}, ValueError, ("cuda", "cannot run")),
    ],
)
def test_errors_name_the_argument(arguments, kind, words):
    call = {"x": torch.zeros(4), **arguments}
    cases.assert_raises(lambda: masked_whiten(**call), kind, "masked_whiten", *words)
