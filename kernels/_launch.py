"""Host side of the kernels: memory layouts, block sizes, grids, device guard."""

import inspect
from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from ._moments import PROGRAMS
from ._softmax import EXACT_CAP, NO_CAP


def one_order(kernel):
    """`triton.jit` for kernels whose sums must be bitwise identical for every layout of their arguments.

    Triton reduces in register order, and chooses the register layout by the width of loads. Without specialisation on
    alignment, every variant loads single elements.
    """
    parameters = inspect.signature(kernel).parameters.values()
    names = [p.name for p in parameters if p.annotation is not tl.constexpr]
    return triton.jit(kernel, do_not_specialize_on_alignment=names)


def row_layout(x):
    """(N, inner, stride_inner, stride_outer) of a [..., V] tensor; None if it must be copied first.

    Row r starts at element (r // inner) * stride_outer + (r % inner) * stride_inner.
    """
    count = x.shape[:-1].numel()
    if count == 0:  # copying an empty tensor may keep its odd strides
        return 0, 1, 0, 0
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return None
    sizes, strides = [], []  # runs of leading axes that share one stride, innermost first
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


def row_inputs(logits, targets, row_temperature, mask):
    """(logits, row_layout(logits), targets, row_temperature, mask, flags) as the kernels take them.

    `targets` is passed in place of an absent tensor; the flags keep it from being read as one.
    """
    rows = row_layout(logits)
    if rows is None:
        logits = logits.contiguous()
        rows = row_layout(logits)
    targets = targets.contiguous()
    flags = {
        "HAS_MASK": mask is not None,
        "HAS_ROW_T": row_temperature is not None,
        "ACC": tl.float64 if logits.dtype == torch.float64 else tl.float32,
    }
    mask = targets if mask is None else mask.contiguous()
    row_temperature = targets if row_temperature is None else row_temperature.contiguous()
    return logits, rows, targets, row_temperature, mask, flags


def gradient_layout(logits, out):
    """(inner, stride_inner, stride_outer) of `out`, the output of dL/dlogits, which may be `logits`.

    `out` has the shape and dtype of the logits, or is 16-bit for fp32 logits.
    """
    halves = (torch.bfloat16, torch.float16) if logits.dtype == torch.float32 else ()
    if out.shape != logits.shape or out.dtype not in (logits.dtype, *halves):
        raise ValueError(
            f"dL/dlogits of {logits.dtype} {tuple(logits.shape)} cannot go into {out.dtype} {tuple(out.shape)}"
        )
    rows = row_layout(out)
    if rows is None:
        raise ValueError("dL/dlogits needs a unit last stride and at most two row strides")
    return rows[1:]


def row_tile(double, cap):
    """Constants of the statistics pass: tiles [R, L], STAGES of them in flight, one warp per row.

    64 logits per thread, registers permitting. The tiles determine the order of a row's sums, so all kernels use these
    constants and get bitwise identical statistics. Products are contracted only by explicit tl.fma.
    """
    return {
        "R": 2 if double or cap == EXACT_CAP.value else 8,
        "L": 128 if double else 256,
        "STAGES": 4,
        "num_warps": 1,
        "enable_fp_fusion": False,
    }


def elements_per_thread(double, cap):
    """Elements per thread of a block of the gradient pass, as many as registers allow."""
    return 8 if double else 32 if cap == NO_CAP.value else 16


def row_block(width, per_thread=32):
    """(BLOCK, num_warps) for elementwise passes over rows of `width` elements: four warps, fewer for short rows."""
    block = max(128, min(128 * per_thread, triton.next_power_of_2(max(width, 1))))
    return block, max(1, block // (32 * per_thread))


def programs_per_row(count, width, block):
    """Programs per row: enough to fill a GPU if rows are few, else one."""
    return max(1, min(triton.cdiv(width, block), triton.cdiv(4 * PROGRAMS, count)))


_NO_GUARD = nullcontext()


def device_guard(x):
    """Context manager that makes the device of x current; a no-op if it already is."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _NO_GUARD
    return torch.cuda.device(x.device)


def row_strides(x):
    """(row stride, column stride) of a [B, T] tensor; (0, stride) of [N]; zeros for None."""
    if x is None:
        return 0, 0
    return (0, *x.stride()) if x.dim() == 1 else x.stride()


def sequence_grid(x, cu_seqlens):
    """(B, T, grid) of the tokens x; programs take sequences in a grid-stride loop."""
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return sequences, x.shape[-1], (min(sequences, PROGRAMS),)


FLAT_LIMIT = 2**31  # tokens; token_offset divides 32-bit indices


def token_layout(*tensors):
    """(tensors, T, FLAT, strides) for tensors [N] or [B, T] of one shape that are indexed by flat token index i.

    FLAT: element i is at i * column stride. Otherwise at (i // T) * row stride + (i % T) * column stride.
    strides: one (row, column) pair per tensor, zeros for None.
    """
    first = tensors[0]
    for x in tensors:
        if x is not None and not x.is_contiguous():
            break
    else:  # all contiguous, the common case
        return tensors, first.shape[-1], True, [(0, 0) if x is None else (0, 1) for x in tensors]
    pairs = [_flat_strides(x) for x in tensors]
    if None not in pairs:
        return tensors, first.shape[-1], True, pairs
    if first.numel() < FLAT_LIMIT:
        return tensors, first.shape[-1], False, [row_strides(x) for x in tensors]
    # A 64-bit division per element costs more than this copy.
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
