"""What stands in for the interpreter's scan gives what the interpreter's own gives."""

import pytest
import torch

import fast_scan

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


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is compiled here")
@pytest.mark.parametrize("size", [1, 2, 64])
@pytest.mark.parametrize("reverse", [False, True])
def test_equals_the_interpreters_own(size, reverse, monkeypatch):
    from triton.runtime.interpreter import ScanOps

    assert ScanOps.generic_scan.__module__ == "fast_scan"
    generator = torch.Generator().manual_seed(size)
    # Small integers, which every order of the sums gives exactly; the function does not commute.
    start = torch.randint(-1, 3, (2, size), generator=generator).double()
    got, expected = start.clone(), start.clone()
    scan_kernel[(1,)](*got, REVERSE=reverse, BLOCK=size)
    monkeypatch.setattr(ScanOps, "generic_scan", fast_scan.one_by_one)
    scan_kernel[(1,)](*expected, REVERSE=reverse, BLOCK=size)
    assert torch.equal(got, expected)
