"""Host side of the kernels: strides without copies, block sizes, grids, the device guard."""

import inspect
from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from ._moments import PROGRAMS
from ._softmax import EXACT_CAP, NO_CAP


def one_order(kernel):
    """`triton.jit` of a kernel whose sums have the same bits in every layout of its arguments.

    The order of a sum or a scan is that of the registers, and Triton lays those out by how wide a load may be. Without
    the alignment of pointers, strides and sizes each load is of one element, in every variant.
    """
    parameters = inspect.signature(kernel).parameters.values()
    names = [p.name for p in parameters if p.annotation is not tl.constexpr]
    return triton.jit(kernel, do_not_specialize_on_alignment=names)


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


def gradient_rows(logits, out):
    """(inner, stride_inner, stride_outer) of `out`, which takes dL/dlogits: `logits`, or like them in shape.

    Its dtype is that of the logits, or of 16 bits where they are fp32.
    """
    halves = (torch.bfloat16, torch.float16) if logits.dtype == torch.float32 else ()
    if out.shape != logits.shape or out.dtype not in (logits.dtype, *halves):
        raise ValueError(
            f"dL/dlogits of {logits.dtype} {tuple(logits.shape)} cannot go into {out.dtype} {tuple(out.shape)}"
        )
    rows = rows_of(out)
    if rows is None:
        raise ValueError("dL/dlogits needs a unit last stride and at most two row strides")
    return rows[1:]


def row_tile(double, cap):
    """Constants of a row's walk for its statistics: tiles [R, L], STAGES of them in flight, of one warp a row.

    64 logits a thread, as far as registers allow. The order of a row's sums is that of its tiles, so every kernel that
    makes statistics takes these: their bits are then the same. Products are fused where the kernel says so, alone.
    """
    return {
        "R": 2 if double or cap == EXACT_CAP.value else 8,
        "L": 128 if double else 256,
        "STAGES": 4,
        "num_warps": 1,
        "enable_fp_fusion": False,
    }


def elements_a_thread(double, cap):
    """Of a row's block whose gradient is made, as far as registers allow."""
    return 8 if double else 32 if cap == NO_CAP.value else 16


def row_block(width, a_thread=32):
    """(BLOCK, num_warps) for a walk along rows of `width` elements, each by itself: four warps, or as few as do."""
    block = max(128, min(128 * a_thread, triton.next_power_of_2(max(width, 1))))
    return block, max(1, block // (32 * a_thread))


def walkers(count, width, block):
    """Programs that share a row: enough for a GPU where rows are few, else one, which looks at the row once."""
    return max(1, min(triton.cdiv(width, block), triton.cdiv(4 * PROGRAMS, count)))


_NO_GUARD = nullcontext()


def device_guard(x):
    """Makes the device of x the current one, which it nearly always is."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _NO_GUARD
    return torch.cuda.device(x.device)


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
    first = tensors[0]
    for x in tensors:
        if x is not None and not x.is_contiguous():
            break
    else:  # nearly always
        return tensors, first.shape[-1], True, [(0, 0) if x is None else (0, 1) for x in tensors]
    pairs = [_flat_strides(x) for x in tensors]
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
