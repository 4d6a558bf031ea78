"""Host side of the kernels: row strides without copies, block sizes, the device guard."""

from contextlib import nullcontext

import torch
import triton


def rows_of(x):
    """(N, inner, stride_inner, stride_outer) of a [..., V] tensor, or None where a copy is needed.

    Row r starts at (r // inner) * stride_outer + (r % inner) * stride_inner elements.
    """
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return None
    count = x.shape[:-1].numel()
    if count == 0:
        return 0, 1, 0, 0
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


def row_block(width, largest=4096):
    """(BLOCK, num_warps) for a walk along rows of `width` elements: 16 elements a thread."""
    block = max(128, min(largest, triton.next_power_of_2(max(width, 1))))
    return block, max(1, min(8, block // 512))


def device_guard(x):
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
