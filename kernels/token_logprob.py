"""token_logprob in Triton: forward one read of the logits, backward one read and one write.

Shapes: logits [..., V], N rows; targets, row_temperature, mask, logprob, entropy, gradients: N.
stats [3, N] = (max of z, log of the sum of e^(z - max), mean of z - max under the softmax), z up to a constant of the
call (see `_softmax`): max is rounded, and the others are as exact with respect to what was rounded.
Offsets are int64, so N * V may pass 2^31.
"""

import torch
import triton
import triton.language as tl

from ._launch import (
    device_guard,
    elements_a_thread,
    gradient_rows,
    logit_rows,
    row_block,
    row_tile,
    walkers,
)
from ._softmax import (
    cap_kind,
    row_logprob,
    row_slope,
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
    stats_ptr,
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
            tl.store(stats_ptr + row, 0.0)
            tl.store(stats_ptr + N + row, 0.0)
            tl.store(stats_ptr + 2 * N + row, 0.0)
            return
    cap = tl.full((), softcap, ACC)
    c, _, scale, scale_low, _ = row_slope(
        row, row_temperature_ptr, temperature, cap, HAS_ROW_T, CAP, ACC
    )
    row_ptr = (
        logits_ptr + (row // inner) * stride_logits_outer + (row % inner) * stride_logits_inner
    )
    logprob, entropy, z, shifted_lse, mean = row_logprob(
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
    tl.store(stats_ptr + row, z)
    tl.store(stats_ptr + N + row, shifted_lse)
    tl.store(stats_ptr + 2 * N + row, mean)


@triton.jit
def token_logprob_bwd_kernel(
    grad_logprob_ptr,
    grad_entropy_ptr,
    logits_ptr,
    targets_ptr,
    stats_ptr,
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
    # out may be logits: a program reads and writes the same blocks of one row, nothing else.
    row = tl.program_id(0).to(tl.int64)
    first, step = tl.program_id(1), tl.num_programs(1)
    out = out_ptr + (row // inner_out) * stride_out_outer + (row % inner_out) * stride_out_inner
    # Rows that do not count or carry no gradient are not read.
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
    c, c_error, scale, _, inverse = row_slope(
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
        tl.load(stats_ptr + row),
        tl.load(stats_ptr + N + row),
        tl.load(stats_ptr + 2 * N + row),
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


def forward(logits, targets, row_temperature, temperature, softcap, mask, with_entropy=True):
    """(logprob, entropy, stats) of `fastrlhf.token_logprob`, whose checks were made before.

    Without `with_entropy` the entropy and its statistic, stats[2], are not made: zeros.
    """
    logits, rows, targets, row_t, mask, flags = logit_rows(logits, targets, row_temperature, mask)
    count, inner, stride_inner, stride_outer = rows
    double = logits.dtype == torch.float64
    dtype = torch.float64 if double else torch.float32
    logprob = torch.empty(targets.shape, dtype=dtype, device=logits.device)
    entropy = torch.empty_like(logprob)
    stats = torch.empty((3, count), dtype=dtype, device=logits.device)
    if count == 0:
        return logprob, entropy, stats
    cap = cap_kind(softcap, double)
    with device_guard(logits):
        token_logprob_fwd_kernel[(count,)](
            logits,
            targets,
            row_t,
            mask,
            logprob,
            entropy,
            stats,
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
    return logprob, entropy, stats


def backward(
    grad_logprob,
    grad_entropy,
    logits,
    targets,
    stats,
    row_temperature,
    temperature,
    softcap,
    mask,
    out,
):
    """Writes dL/dlogits into `out`: `logits` themselves, or another tensor as `gradient_rows` takes it."""
    out_rows = gradient_rows(logits, out)
    logits, rows, targets, row_t, mask, flags = logit_rows(logits, targets, row_temperature, mask)
    count, inner, stride_inner, stride_outer = rows
    width = logits.shape[-1]
    if count == 0 or width == 0:
        return
    double = logits.dtype == torch.float64
    cap = cap_kind(softcap, double)
    block, warps = row_block(width, elements_a_thread(double, cap))
    grads = [None if g is None else g.contiguous() for g in (grad_logprob, grad_entropy)]
    with device_guard(logits):
        token_logprob_bwd_kernel[(count, walkers(count, width, block))](
            stats if grads[0] is None else grads[0],
            stats if grads[1] is None else grads[1],
            logits,
            targets,
            stats,
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
