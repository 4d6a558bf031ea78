"""The faster scan of the Triton interpreter matches the original one, and bf16 is rounded as in torch."""

import pytest
import torch

from _support import fast_scan

pytest.importorskip("triton")

import triton
import triton.language as tl


@triton.jit
def _affine(scale, shift, scale_now, shift_now):
    return scale * scale_now, shift_now + scale_now * shift


@triton.jit
def scan_kernel(scale_ptr, shift_ptr, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    scale, shift = tl.load(scale_ptr + lane), tl.load(shift_ptr + lane)
    scale, shift = tl.associative_scan((scale, shift), 0, _affine, reverse=REVERSE)
    tl.store(scale_ptr + lane, scale)
    tl.store(shift_ptr + lane, shift)


@triton.jit
def cast_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(out_ptr + lane, tl.load(x_ptr + lane).to(out_ptr.dtype.element_ty))


def test_bf16_is_rounded_to_the_nearest():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    x[:8] = torch.tensor(
        [1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8, 3e38, 3.4e38, 1e-40, 0.0, -0.0]
    )
    x[8:11] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    x = x.to(device)
    out = torch.empty(64, dtype=torch.bfloat16, device=device)
    cast_kernel[(1,)](x, out, BLOCK=64)
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is compiled here")
@pytest.mark.parametrize("size", [1, 2, 64])
@pytest.mark.parametrize("reverse", [False, True])
def test_equals_the_interpreters_own(size, reverse, monkeypatch):
    from triton.runtime.interpreter import ScanOps

    assert ScanOps.generic_scan.__module__ == fast_scan.__name__
    generator = torch.Generator().manual_seed(size)
    # Small integers: exact in every order. The combining function does not commute.
    start = torch.randint(-1, 3, (2, size), generator=generator).double()
    got, expected = start.clone(), start.clone()
    scan_kernel[(1,)](*got, REVERSE=reverse, BLOCK=size)
    monkeypatch.setattr(ScanOps, "generic_scan", fast_scan.one_by_one)
    scan_kernel[(1,)](*expected, REVERSE=reverse, BLOCK=size)
    assert torch.equal(got, expected)
