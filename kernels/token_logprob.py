"""token_logprob in Triton: forward one read of the logits, backward one read and one write.

Shapes: logits [..., V], N rows; targets, row_temperature, mask, logprob, entropy, their gradients [N].
row_stats [3, N] = (row_max, shifted_lse, shifted_mean) as in csrc/common/softmax.h, with z up to a constant of the
call (see `_softmax`). Offsets are int64, so N * V may exceed 2^31.
"""

import torch
import triton
import triton.language as tl

from ._launch import (
    device_guard,
    elements_per_thread,
    gradient_layout,
    programs_per_row,
    row_block,
    row_inputs,
    row_tile,
)
from ._softmax import (
    cap_kind,
    logit_scale,
    row_logprob,
    write_gradient,
    write_zeros,
)


@triton.jit
def token_logprob_fwd_kernel(
    logits_ptr,
    targets_ptr,
    row_temperature_ptr,
    mask_ptr,
    logprob_ptr,
    entropy_ptr,
    row_stats_ptr,
    temperature: tl.float64,
    softcap: tl.float64,
    N,
    V,
    inner,
    stride_logits_inner,
    stride_logits_outer,
    HAS_ENTROPY: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_ROW_T: tl.constexpr,
    CAP: tl.constexpr,
    ACC: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if HAS_MASK:
        if tl.load(mask_ptr + row) == 0:
            tl.store(logprob_ptr + row, 0.0)
            tl.store(entropy_ptr + row, 0.0)
            tl.store(row_stats_ptr + row, 0.0)
            tl.store(row_stats_ptr + N + row, 0.0)
            tl.store(row_stats_ptr + 2 * N + row, 0.0)
            return
    cap = tl.full((), softcap, ACC)
    c, _, scale, scale_low, _ = logit_scale(
        row, row_temperature_ptr, temperature, cap, HAS_ROW_T, CAP, ACC
    )
    row_ptr = (
        logits_ptr + (row // inner) * stride_logits_outer + (row % inner) * stride_logits_inner
    )
    logprob, entropy, row_max, shifted_lse, shifted_mean = row_logprob(
        row_ptr,
        V,
        tl.load(targets_ptr + row).to(tl.int64),
        c,
        scale,
        scale_low,
        cap,
        HAS_ENTROPY,
        CAP,
        ACC,
        R,
        L,
        STAGES,
        "evict_first",
    )
    tl.store(logprob_ptr + row, logprob)
    tl.store(entropy_ptr + row, entropy)
    tl.store(row_stats_ptr + row, row_max)
    tl.store(row_stats_ptr + N + row, shifted_lse)
    tl.store(row_stats_ptr + 2 * N + row, shifted_mean)


@triton.jit
def token_logprob_bwd_kernel(
    grad_logprob_ptr,
    grad_entropy_ptr,
    logits_ptr,
    targets_ptr,
    row_stats_ptr,
    row_temperature_ptr,
    mask_ptr,
    out_ptr,
    temperature: tl.float64,
    softcap: tl.float64,
    N,
    V,
    inner,
    stride_logits_inner,
    stride_logits_outer,
    inner_out,
    stride_out_inner,
    stride_out_outer,
    HAS_G: tl.constexpr,
    HAS_H: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_ROW_T: tl.constexpr,
    CAP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # out may be logits: a program reads only the blocks that it writes.
    row = tl.program_id(0).to(tl.int64)
    first, step = tl.program_id(1), tl.num_programs(1)
    out = out_ptr + (row // inner_out) * stride_out_outer + (row % inner_out) * stride_out_inner
    # The logits of rows without a gradient are not read.
    active = row >= 0
    if HAS_MASK:
        active = tl.load(mask_ptr + row) != 0
    g = tl.zeros((), ACC)
    h = tl.zeros((), ACC)
    if HAS_G:
        g = tl.load(grad_logprob_ptr + row)
    if HAS_H:
        h = tl.load(grad_entropy_ptr + row)
    if (not active) | ((g == 0.0) & (h == 0.0)):
        write_zeros(out, V, first, step, BLOCK)
        return
    cap = tl.full((), softcap, ACC)
    c, c_error, scale, _, inverse = logit_scale(
        row, row_temperature_ptr, temperature, cap, HAS_ROW_T, CAP, ACC
    )
    row_ptr = (
        logits_ptr + (row // inner) * stride_logits_outer + (row % inner) * stride_logits_inner
    )
    target = tl.load(targets_ptr + row).to(tl.int64)
    if HAS_G:
        g = tl.where((target >= 0) & (target < V), g, float("nan"))
    write_gradient(
        row_ptr,
        out,
        V,
        first,
        step,
        target,
        g,
        h,
        tl.load(row_stats_ptr + row),
        tl.load(row_stats_ptr + N + row),
        tl.load(row_stats_ptr + 2 * N + row),
        c,
        c_error,
        scale,
        inverse,
        cap,
        HAS_G,
        HAS_H,
        CAP,
        ACC,
        BLOCK,
    )


def forward(
    logits,
    targets,
    row_temperature,
    temperature,
    softcap,
    mask,
    with_entropy=True,
    inplace_backward=False,
):
    """(logprob, entropy, row_stats) of `fastrlhf.token_logprob`; the caller checks the arguments.

    Without `with_entropy`, entropy and row_stats[2] are 0. `inplace_backward` concerns the backward only.
    """
    del inplace_backward
    logits, rows, targets, row_t, mask, flags = row_inputs(logits, targets, row_temperature, mask)
    count, inner, stride_inner, stride_outer = rows
    double = logits.dtype == torch.float64
    dtype = torch.float64 if double else torch.float32
    logprob = torch.empty(targets.shape, dtype=dtype, device=logits.device)
    entropy = torch.empty_like(logprob)
    row_stats = torch.empty((3, count), dtype=dtype, device=logits.device)
    if count == 0:
        return logprob, entropy, row_stats
    cap = cap_kind(softcap, double)
    with device_guard(logits):
        token_logprob_fwd_kernel[(count,)](
            logits,
            targets,
            row_t,
            mask,
            logprob,
            entropy,
            row_stats,
            temperature,
            softcap,
            count,
            logits.shape[-1],
            inner,
            stride_inner,
            stride_outer,
            HAS_ENTROPY=with_entropy,
            CAP=cap,
            **row_tile(double, cap),
            **flags,
        )
    return logprob, entropy, row_stats


def backward(
    grad_logprob,
    grad_entropy,
    logits,
    targets,
    row_stats,
    row_temperature,
    temperature,
    softcap,
    mask,
    out,
):
    """Writes dL/dlogits to `out`, which may be `logits` (see `gradient_layout`)."""
    out_rows = gradient_layout(logits, out)
    logits, rows, targets, row_t, mask, flags = row_inputs(logits, targets, row_temperature, mask)
    count, inner, stride_inner, stride_outer = rows
    width = logits.shape[-1]
    if count == 0 or width == 0:
        return
    double = logits.dtype == torch.float64
    cap = cap_kind(softcap, double)
    block, warps = row_block(width, elements_per_thread(double, cap))
    grads = [None if g is None else g.contiguous() for g in (grad_logprob, grad_entropy)]
    with device_guard(logits):
        token_logprob_bwd_kernel[(count, programs_per_row(count, width, block))](
            row_stats if grads[0] is None else grads[0],
            row_stats if grads[1] is None else grads[1],
            logits,
            targets,
            row_stats,
            row_t,
            mask,
            out,
            temperature,
            softcap,
            count,
            width,
            inner,
            stride_inner,
            stride_outer,
            *out_rows,
            HAS_G=grads[0] is not None,
            HAS_H=grads[1] is not None,
            CAP=cap,
            BLOCK=block,
            num_warps=warps,
            enable_fp_fusion=False,
            **flags,
        )


def gradient(grad_logprob, grad_entropy, logits, *rest):
    """dL/dlogits as a new tensor."""
    out = logits.new_empty(logits.shape)
    backward(grad_logprob, grad_entropy, logits, *rest, out)
    return out
