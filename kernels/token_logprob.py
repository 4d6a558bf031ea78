"""token_logprob in Triton: forward one read of the logits, backward one read and one write.

Shapes: logits [..., V], N rows; targets, row_temperature, mask, logprob, entropy, gradients: N.
stats [3, N] = (max of z, log of the sum of e^(z - max), mean of z - max under the softmax).
Offsets are int64, so N * V may pass 2^31.
"""

import torch
import triton
import triton.language as tl

from ._launch import device_guard, logit_rows, row_block, rows_of
from ._online_softmax import row_scale, scaled_logits, sech2, update


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
    HAS_MASK: tl.constexpr,
    HAS_ROW_T: tl.constexpr,
    HAS_CAP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
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
    scale = row_scale(row, row_temperature_ptr, temperature, HAS_ROW_T, ACC)
    softcap = tl.full((), softcap, ACC)
    row_ptr = (
        logits_ptr + (row // inner) * stride_logits_outer + (row % inner) * stride_logits_inner
    )
    top = tl.full((), float("-inf"), ACC)
    total = tl.zeros((BLOCK,), ACC)
    weighted = tl.zeros((BLOCK,), ACC)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(
            row_ptr + cols, mask=cols < V, other=float("-inf"), eviction_policy="evict_first"
        )
        # The soft-cap would lift the padding from -inf: pad again behind it.
        z = scaled_logits(x.to(ACC), scale, softcap, HAS_CAP)
        if HAS_CAP:
            z = tl.where(cols < V, z, float("-inf"))
        top, total, weighted = update(top, total, weighted, z)
    sum_e = tl.sum(total, axis=0)
    log_sum = tl.log(sum_e)
    # A target outside [0, V) is not read; its row becomes NaN.
    target = tl.load(targets_ptr + row).to(tl.int64)
    inside = (target >= 0) & (target < V)
    z_target = tl.load(row_ptr + target, mask=inside, other=float("nan")).to(ACC)
    z_target = scaled_logits(z_target, scale, softcap, HAS_CAP)
    tl.store(logprob_ptr + row, (z_target - top) - log_sum)
    mean = tl.sum(weighted, axis=0) / sum_e
    tl.store(entropy_ptr + row, log_sum - mean)
    tl.store(stats_ptr + row, top)
    tl.store(stats_ptr + N + row, log_sum)
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
    HAS_CAP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # out may be logits: a program reads and writes the same block of one row, nothing else.
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    out_row = (row // inner_out) * stride_out_outer + (row % inner_out) * stride_out_inner
    out = out_ptr + out_row + cols
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
        tl.store(out, tl.zeros((BLOCK,), ACC).to(out_ptr.dtype.element_ty), mask=cols < V)
        return
    scale = row_scale(row, row_temperature_ptr, temperature, HAS_ROW_T, ACC)
    softcap = tl.full((), softcap, ACC)
    row_ptr = (
        logits_ptr + (row // inner) * stride_logits_outer + (row % inner) * stride_logits_inner
    )
    x = tl.load(row_ptr + cols, mask=cols < V, other=float("-inf")).to(ACC)
    z = scaled_logits(x, scale, softcap, HAS_CAP)
    raw = z - tl.load(stats_ptr + row)
    away = tl.where(raw < -800.0, -800.0, raw)
    p = tl.exp(away - tl.load(stats_ptr + N + row))
    target = tl.load(targets_ptr + row).to(tl.int64)
    grad = tl.zeros((BLOCK,), ACC)
    if HAS_G:
        g = tl.where((target >= 0) & (target < V), g, float("nan"))
        grad += tl.where(cols == target, g, 0.0) - g * p
    if HAS_H:
        # log p + entropy, without the rounding of the log sum that the whole row would share
        grad -= h * p * (away - tl.load(stats_ptr + 2 * N + row))
    grad *= scale
    if HAS_CAP:
        grad *= sech2(x / softcap)
    tl.store(out, grad.to(out_ptr.dtype.element_ty), mask=cols < V)


def forward(logits, targets, row_temperature, temperature, softcap, mask):
    """(logprob, entropy, stats) of `fastrlhf.token_logprob`, whose checks were made before."""
    logits, rows, targets, row_t, mask, flags = logit_rows(logits, targets, row_temperature, mask)
    count, inner, stride_inner, stride_outer = rows
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logprob = torch.empty(targets.shape, dtype=dtype, device=logits.device)
    entropy = torch.empty_like(logprob)
    stats = torch.empty((3, count), dtype=dtype, device=logits.device)
    if count == 0:
        return logprob, entropy, stats
    width = logits.shape[-1]
    block, warps = row_block(width)
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
            width,
            inner,
            stride_inner,
            stride_outer,
            HAS_CAP=softcap > 0,
            BLOCK=block,
            num_warps=warps,
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
    """Writes dL/dlogits into `out` (which may be `logits`); see the forward."""
    logits, rows, targets, row_t, mask, flags = logit_rows(logits, targets, row_temperature, mask)
    count, inner, stride_inner, stride_outer = rows
    width = logits.shape[-1]
    if count == 0 or width == 0:
        return
    out_rows = rows_of(out)
    if out_rows is None:
        raise ValueError("an in-place backward needs logits with at most two row strides")
    block, warps = row_block(width)
    grads = [None if g is None else g.contiguous() for g in (grad_logprob, grad_entropy)]
    with device_guard(logits):
        token_logprob_bwd_kernel[(count, triton.cdiv(width, block))](
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
            *out_rows[1:],
            HAS_G=grads[0] is not None,
            HAS_H=grads[1] is not None,
            HAS_CAP=softcap > 0,
            BLOCK=block,
            num_warps=warps,
            **flags,
        )
