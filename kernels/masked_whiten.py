"""masked_whiten in Triton: out = (x - mean) / sqrt(var + 1e-8) over the unmasked tokens, in two launches.

The first writes partial moments, the second reduces them and normalises. gae and kl_gae write the partials in their
own launch and share the second one.

Shapes: x, mask [N] or [B, T], N tokens in all; out like x, contiguous; partials [3, P] fp64 = (count, mean, m2).
"""

import torch
import triton
import triton.language as tl

from ._launch import device_guard, one_order, token_layout, token_offset
from ._moments import PROGRAMS, block_moments, load_moments, merge, reciprocal, store_partial

BLOCK = 1024


@triton.jit
def _kept(
    mask_ptr, index, N, T, stride_row, stride_col, HAS_MASK: tl.constexpr, FLAT: tl.constexpr
):
    keep = index < N
    if HAS_MASK:
        place = mask_ptr + token_offset(index, T, stride_row, stride_col, FLAT)
        keep &= tl.load(place, mask=keep, other=0) != 0
    return keep


@one_order
def masked_whiten_moments_kernel(
    x_ptr,
    mask_ptr,
    partials_ptr,
    N,
    T,
    stride_x_row,
    stride_x_col,
    stride_mask_row,
    stride_mask_col,
    HAS_MASK: tl.constexpr,
    FLAT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    count = tl.zeros((), tl.float64)
    mean = tl.zeros((), tl.float64)
    m2 = tl.zeros((), tl.float64)
    for block in range(program, tl.cdiv(N, BLOCK), programs):
        index = tl.full((), block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        keep = _kept(mask_ptr, index, N, T, stride_mask_row, stride_mask_col, HAS_MASK, FLAT)
        place = x_ptr + token_offset(index, T, stride_x_row, stride_x_col, FLAT)
        n, a, s = block_moments(tl.load(place, mask=keep, other=0.0).to(ACC), keep)
        count, mean, m2 = merge(count, mean, m2, n, a, s)
    store_partial(partials_ptr, program, programs, 0, count, mean, m2)


@triton.jit
def masked_whiten_kernel(
    x_ptr,
    mask_ptr,
    partials_ptr,
    whitened_ptr,
    partials,
    N,
    T,
    stride_x_row,
    stride_x_col,
    stride_mask_row,
    stride_mask_col,
    SHIFT_MEAN: tl.constexpr,
    UNBIASED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    FLAT: tl.constexpr,
    ACC: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # whitened may be x: a program reads and writes the same elements.
    count, mean64, m2 = load_moments(partials_ptr, partials, 0, PROGRAMS)
    divisor = count - 1.0 if UNBIASED else count
    variance = m2 * reciprocal(tl.where(divisor < 1.0, 1.0, divisor))
    scale = (1.0 / tl.sqrt(variance + 1e-8)).to(ACC)
    mean = mean64.to(ACC)
    for block in range(tl.program_id(0), tl.cdiv(N, BLOCK), tl.num_programs(0)):
        index = tl.full((), block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        keep = _kept(mask_ptr, index, N, T, stride_mask_row, stride_mask_col, HAS_MASK, FLAT)
        place = x_ptr + token_offset(index, T, stride_x_row, stride_x_col, FLAT)
        out = (tl.load(place, mask=keep, other=0.0).to(ACC) - mean) * scale
        if not SHIFT_MEAN:
            out += mean
        tl.store(whitened_ptr + index, tl.where(keep, out, 0.0), mask=index < N)


def _grid(count):
    return (min(triton.cdiv(count, BLOCK), PROGRAMS),)


def normalise(x, mask, partials, out, shift_mean=True, unbiased=True):
    """Whitens x by the moments in `partials` and writes it to `out`, which may be x."""
    (x, mask), steps, flat, strides = token_layout(x, mask)
    masked_whiten_kernel[_grid(x.numel())](
        x,
        x if mask is None else mask,
        partials,
        out,
        partials.shape[1],
        x.numel(),
        steps,
        *strides[0],
        *strides[1],
        SHIFT_MEAN=shift_mean,
        UNBIASED=unbiased,
        HAS_MASK=mask is not None,
        FLAT=flat,
        ACC=tl.float64 if out.dtype == torch.float64 else tl.float32,
        PROGRAMS=PROGRAMS,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=False,  # bitwise identical in every layout
    )


def forward(x, mask, shift_mean, unbiased):
    """`fastrlhf.masked_whiten` of x [N] or [B, T]; the caller checks the arguments."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.empty(x.shape, dtype=acc, device=x.device)
    count = x.numel()
    if count == 0:
        return out
    partials = x.new_empty((3, *_grid(count)), dtype=torch.float64)
    (x, mask), steps, flat, strides = token_layout(x, mask)
    with device_guard(x):
        masked_whiten_moments_kernel[_grid(count)](
            x,
            x if mask is None else mask,
            partials,
            count,
            steps,
            *strides[0],
            *strides[1],
            HAS_MASK=mask is not None,
            FLAT=flat,
            ACC=tl.float64 if acc == torch.float64 else tl.float32,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=False,  # bitwise identical in every layout
        )
        normalise(x, mask, partials, out, shift_mean, unbiased)
    return out
