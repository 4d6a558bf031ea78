"""sequence_sums in Triton: of each sequence the number of unmasked tokens, and their sum of x - y.

Each program moves the differences of a sequence's unmasked tokens together before it adds them, so that the order of
the sum depends only on these tokens: bitwise identical for masked tokens and for tokens that are left out.

Shapes: S sequences, N tokens, [N] or [B, T]; cu_seqlens [S + 1]; sums [2, S] fp64.
"""

import torch
import triton.language as tl

from ._launch import device_guard, one_order, token_layout, token_offset
from ._moments import PROGRAMS
from ._sequence import BLOCK, bounds


@one_order
def sequence_sums_kernel(
    x_ptr,
    y_ptr,
    mask_ptr,
    cu_seqlens_ptr,
    found_ptr,
    sums_ptr,
    S,
    T,
    N,
    stride_x_row,
    stride_x_col,
    stride_y_row,
    stride_y_col,
    stride_mask_row,
    stride_mask_col,
    HAS_Y: tl.constexpr,
    HAS_MASK: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for s in range(tl.program_id(0), S, tl.num_programs(0)):
        start, steps = bounds(tl.full((), s, tl.int64), cu_seqlens_ptr, T, N, True)
        count = tl.zeros((), tl.int64)
        for first in range(0, steps, BLOCK):
            t = first + tl.arange(0, BLOCK)
            index = start + t
            keep = t < steps
            if HAS_MASK:
                place = token_offset(index, T, stride_mask_row, stride_mask_col, FLAT)
                keep &= tl.load(mask_ptr + place, mask=keep, other=0) != 0
            place = token_offset(index, T, stride_x_row, stride_x_col, FLAT)
            d = tl.load(x_ptr + place, mask=keep, other=0.0).to(tl.float64)
            if HAS_Y:
                place = token_offset(index, T, stride_y_row, stride_y_col, FLAT)
                d -= tl.load(y_ptr + place, mask=keep, other=0.0).to(tl.float64)
            place = count + tl.cumsum(keep.to(tl.int64), axis=0) - 1
            tl.store(found_ptr + start + place, d, mask=keep)
            count += tl.sum(keep.to(tl.int64), axis=0)
        tl.debug_barrier()  # the other threads' differences
        total = tl.zeros((), tl.float64)
        for first in range(0, count, BLOCK):
            t = first + tl.arange(0, BLOCK)
            total += tl.sum(tl.load(found_ptr + start + t, mask=t < count, other=0.0), axis=0)
        tl.store(sums_ptr + s, count.to(tl.float64))
        tl.store(sums_ptr + S + s, total)


def forward(x, y, mask, cu_seqlens):
    """[2, S] of the tokens; the caller checks the arguments."""
    count = cu_seqlens.shape[0] - 1
    sums = torch.empty((2, count), dtype=torch.float64, device=x.device)
    if count == 0:
        return sums
    found = torch.empty(x.numel(), dtype=torch.float64, device=x.device)
    (x, y, mask), steps, flat, strides = token_layout(x, y, mask)
    with device_guard(x):
        sequence_sums_kernel[(min(count, PROGRAMS),)](
            x,
            x if y is None else y,
            x if mask is None else mask,
            cu_seqlens.contiguous(),
            found,
            sums,
            count,
            steps,
            x.numel(),
            *(stride for pair in strides for stride in pair),
            HAS_Y=y is not None,
            HAS_MASK=mask is not None,
            FLAT=flat,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return sums
