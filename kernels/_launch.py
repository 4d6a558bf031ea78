"""Host side of the kernels: strides without copies, block sizes, grids, the device guard."""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from ._moments import PROGRAMS


def rows_of(x):
    """(N, inner, stride_inner, stride_outer) of a [..., V] tensor, or None where a copy is needed.

    Row r starts at (r // inner) * stride_outer + (r % inner) * stride_inner elements.
    """
    count = x.shape[:-1].numel()
    if count == 0:  # whatever the strides, which a copy of nothing may keep
        return 0, 1, 0, 0
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return None
    sizes, strides = [], []  # leading axes that collapse into one stride, innermost first
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if sizes and stride == strides[-1] * sizes[-1]:
            sizes[-1] *= size
        else:
            sizes.append(size)
            strides.append(stride)
    if len(sizes) > 2:
        return None
    sizes, strides = [*sizes, 1, 1], [*strides, 0, 0]
    return count, sizes[0], strides[0], strides[1]


def logit_rows(logits, targets, row_temperature, mask):
    """(logits, rows_of(logits), targets, row_temperature, mask, flags) as the kernels take them.

    Optional tensors stand in for each other when unused.
    """
    rows = rows_of(logits)
    if rows is None:
        logits = logits.contiguous()
        rows = rows_of(logits)
    targets = targets.contiguous()
    flags = {
        "HAS_MASK": mask is not None,
        "HAS_ROW_T": row_temperature is not None,
        "ACC": tl.float64 if logits.dtype == torch.float64 else tl.float32,
    }
    mask = targets if mask is None else mask.contiguous()
    row_temperature = targets if row_temperature is None else row_temperature.contiguous()
    return logits, rows, targets, row_temperature, mask, flags


def row_block(width, largest=4096):
    """(BLOCK, num_warps) for a walk along rows of `width` elements: 16 elements a thread."""
    block = max(128, min(largest, triton.next_power_of_2(max(width, 1))))
    return block, max(1, min(8, block // 512))


def device_guard(x):
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def row_strides(x):
    """(row stride, column stride) of a [B, T] tensor; (0, stride) of [N]; zeros for None."""
    if x is None:
        return 0, 0
    return (0, *x.stride()) if x.dim() == 1 else x.stride()


def sequence_grid(x, cu_seqlens):
    """(B, T, grid) of the tokens x: a program takes every PROGRAMS-th sequence."""
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return sequences, x.shape[-1], (min(sequences, PROGRAMS),)


FLAT_LIMIT = 2**31  # tokens of a tensor that is walked by rows and columns


def token_layout(*tensors):
    """(tensors, T, FLAT, strides) of tensors [N] or [B, T] of one shape, walked by one flat index.

    FLAT: element i lies at i * column stride in each of them. Else at (i // T) * row stride
    + (i % T) * column stride. `strides` has a pair for each tensor, zeros for None.
    """
    pairs = [_flat_strides(x) for x in tensors]
    first = tensors[0]
    if None not in pairs:
        return tensors, first.shape[-1], True, pairs
    if first.numel() < FLAT_LIMIT:
        return tensors, first.shape[-1], False, [row_strides(x) for x in tensors]
    # The division would have to be one of 64 bits, which costs more than this copy.
    return token_layout(*(None if x is None else x.contiguous() for x in tensors))


def _flat_strides(x):
    row, col = row_strides(x)
    if x is None or x.dim() == 1:
        return 0, col
    if x.shape[1] == 1:
        return 0, row
    return (0, col) if x.shape[0] == 1 or row == col * x.shape[1] else None


@triton.jit
def token_offset(index, T, stride_row, stride_col, FLAT: tl.constexpr):
    if FLAT:
        return index * stride_col
    small = index.to(tl.int32)
    return (small // T).to(tl.int64) * stride_row + (small % T).to(tl.int64) * stride_col
