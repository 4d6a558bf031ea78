"""token_loss in Triton: loss and dL/dlogits of each row in one launch, with two reads and one write of the logits.

Shapes: logits [..., V], N rows; targets, row_temperature, mask, advantages, old_logprob, loss, logprob, entropy,
grad_logprob = d loss / d logprob [N]; scale 0-d; row_stats [2, N] = (row_max, shifted_lse).
One warp takes a row: one pass for its statistics, then one for its gradient from the last block to the first, because
the end of the row was read last and may still be cached. Offsets are int64.
"""

import torch
import triton
import triton.language as tl

from . import _policy
from ._launch import (
    device_guard,
    elements_per_thread,
    gradient_layout,
    programs_per_row,
    row_block,
    row_inputs,
    row_layout,
    row_tile,
)
from ._moments import PROGRAMS
from ._policy import PPO, REINFORCE, policy_token
from ._softmax import (
    cap_kind,
    logit_scale,
    row_logprob,
    write_gradient,
    write_zeros,
)


@triton.jit(do_not_specialize=["first_row"])  # that of each chunk
def token_loss_fwd_kernel(
    logits_ptr,
    targets_ptr,
    row_temperature_ptr,
    mask_ptr,
    advantages_ptr,
    old_logprob_ptr,
    ref_logprob_ptr,
    rollout_ptr,
    cu_seqlens_ptr,
    sequences_ptr,
    scale_ptr,
    loss_ptr,
    logprob_ptr,
    entropy_ptr,
    grad_logprob_ptr,
    row_stats_ptr,
    out_ptr,
    temperature: tl.float64,
    softcap: tl.float64,
    scale: tl.float64,
    low: tl.float64,
    high: tl.float64,
    dual_clip: tl.float64,
    tau_pos: tl.float64,
    tau_neg: tl.float64,
    kl_coef: tl.float64,
    rollout_low: tl.float64,
    rollout_high: tl.float64,
    entropy_coef: tl.float64,
    N,
    V,
    S,
    first_row,
    inner,
    stride_logits_inner,
    stride_logits_outer,
    inner_out,
    stride_out_inner,
    stride_out_outer,
    HAS_MASK: tl.constexpr,
    HAS_ROW_T: tl.constexpr,
    CAP: tl.constexpr,
    HAS_ADVANTAGES: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_H: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    WITH_LOSS: tl.constexpr,
    WITH_GRAD_LOGPROB: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    ACC: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
    OBJECTIVE: tl.constexpr = 0,  # PPO
    HAS_SEQUENCES: tl.constexpr = False,
    SEQUENCE_RATIO: tl.constexpr = False,
    HAS_REF: tl.constexpr = False,
    KL_ESTIMATOR: tl.constexpr = 0,
    KL_CLAMP: tl.constexpr = True,
    KL_GRADIENT: tl.constexpr = 0,
    ROLLOUT: tl.constexpr = 0,  # NO_ROLLOUT
    HAS_ROLLOUT: tl.constexpr = False,
):
    # WITH_LOSS: loss and row_stats are wanted. HAS_H: the loss includes -entropy_coef * scale * entropy.
    row = tl.program_id(0).to(tl.int64)
    out = out_ptr + (row // inner_out) * stride_out_outer + (row % inner_out) * stride_out_inner
    if HAS_MASK:
        if tl.load(mask_ptr + row) == 0:
            tl.store(logprob_ptr + row, 0.0)
            if WITH_ENTROPY:
                tl.store(entropy_ptr + row, 0.0)
            if WITH_GRAD_LOGPROB:
                tl.store(grad_logprob_ptr + row, 0.0)
            if WITH_LOSS:
                tl.store(loss_ptr + row, 0.0)
                tl.store(row_stats_ptr + row, 0.0)
                tl.store(row_stats_ptr + N + row, 0.0)
            if WITH_GRAD:
                write_zeros(out, V, 0, 1, BLOCK)
            return
    cap = tl.full((), softcap, ACC)
    c, c_error, dz_du, dz_du_low, inverse = logit_scale(
        row, row_temperature_ptr, temperature, cap, HAS_ROW_T, CAP, ACC
    )
    row_ptr = (
        logits_ptr + (row // inner) * stride_logits_outer + (row % inner) * stride_logits_inner
    )
    target = tl.load(targets_ptr + row).to(tl.int64)
    logprob, entropy, row_max, shifted_lse, shifted_mean = row_logprob(
        row_ptr,
        V,
        target,
        c,
        dz_du,
        dz_du_low,
        cap,
        WITH_ENTROPY,
        CAP,
        ACC,
        R,
        L,
        STAGES,
        "evict_last" if WITH_GRAD else "evict_first",
    )
    factor = tl.full((), scale, ACC)
    if HAS_SCALE:
        factor = tl.load(scale_ptr).to(ACC)
    loss, kl, grad_logprob, weight, _, _, _, _, _, _, _, _, _ = policy_token(
        row + first_row,
        row >= 0,  # always
        logprob,
        old_logprob_ptr + row,
        advantages_ptr + row,
        ref_logprob_ptr + row,
        rollout_ptr + row,
        cu_seqlens_ptr,
        sequences_ptr,
        S,
        low,
        high,
        dual_clip,
        tau_pos,
        tau_neg,
        kl_coef,
        rollout_low,
        rollout_high,
        HAS_OLD,
        HAS_ADVANTAGES,
        HAS_REF,
        HAS_ROLLOUT,
        HAS_SEQUENCES,
        OBJECTIVE,
        SEQUENCE_RATIO,
        KL_ESTIMATOR,
        KL_CLAMP,
        KL_GRADIENT,
        ROLLOUT,
        ACC,
    )
    if HAS_REF:
        loss += tl.full((), kl_coef, ACC) * kl
    if HAS_SEQUENCES:
        factor *= weight
    # A NaN takes a branch whose gradient is 0: propagate it instead. Only the KL of reinforce has branches.
    if HAS_REF or OBJECTIVE != REINFORCE:
        grad_logprob = tl.where(loss == loss, grad_logprob, loss)
    grad_logprob *= factor
    loss *= factor
    grad_logprob = tl.where((target >= 0) & (target < V), grad_logprob, float("nan"))
    h = tl.zeros((), ACC)
    if HAS_H:
        h = -tl.full((), entropy_coef, ACC) * factor
    tl.store(logprob_ptr + row, logprob)
    if WITH_ENTROPY:
        tl.store(entropy_ptr + row, entropy)
    if WITH_GRAD_LOGPROB:
        tl.store(grad_logprob_ptr + row, grad_logprob)
    if WITH_LOSS:
        tl.store(loss_ptr + row, loss)
        tl.store(row_stats_ptr + row, row_max)
        tl.store(row_stats_ptr + N + row, shifted_lse)
    if WITH_GRAD:
        if (grad_logprob == 0.0) & (h == 0.0):
            write_zeros(out, V, 0, 1, BLOCK)
            return
        write_gradient(
            row_ptr,
            out,
            V,
            0,
            1,
            target,
            grad_logprob,
            h,
            row_max,
            shifted_lse,
            shifted_mean,
            c,
            c_error,
            dz_du,
            inverse,
            cap,
            True,
            HAS_H,
            CAP,
            ACC,
            BLOCK,
        )


@triton.jit
def token_loss_bwd_kernel(
    out_ptr,
    upstream_ptr,
    N,
    V,
    inner_out,
    stride_out_inner,
    stride_out_outer,
    stride_upstream,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A row with 1 is neither read nor written; one with 0 is not read.
    for index in range(tl.program_id(0), N, tl.num_programs(0)):
        row = tl.full((), index, tl.int64)
        factor = tl.load(upstream_ptr + row * stride_upstream).to(ACC)
        if factor != 1.0:
            readable = tl.where(factor == 0.0, 0, V)
            out = (
                out_ptr
                + (row // inner_out) * stride_out_outer
                + (row % inner_out) * stride_out_inner
            )
            for start in range(tl.program_id(1) * BLOCK, V, tl.num_programs(1) * BLOCK):
                cols = start + tl.arange(0, BLOCK)
                grad = tl.load(out + cols, mask=cols < readable, other=0.0).to(ACC) * factor
                tl.store(out + cols, grad.to(out_ptr.dtype.element_ty), mask=cols < V)


def _launch(
    logits,
    targets,
    advantages,
    old_logprob,
    more,
    low,
    high,
    dual_clip,
    options,
    entropy_coef,
    row_temperature,
    temperature,
    softcap,
    mask,
    scale_tensor,
    scale,
    out,
    logprob,
    entropy=None,
    grad_logprob=None,
    loss=None,
    row_stats=None,
):
    """One program per row. Outputs are contiguous; None: not wanted. loss and row_stats come together."""
    out_rows = None if out is None else gradient_layout(logits, out)
    logits, rows, targets, row_t, mask, flags = row_inputs(logits, targets, row_temperature, mask)
    count, inner, stride_inner, stride_outer = rows
    if count == 0:
        return
    policy = _policy.settings(more, options, (REINFORCE if old_logprob is None else PPO).value)
    double = logits.dtype == torch.float64
    cap = cap_kind(softcap, double)
    constants = (advantages, old_logprob, policy.ref_logprob, policy.rollout)
    constants = (*constants, policy.cu_seqlens, policy.sequences, scale_tensor)
    outputs = (loss, logprob, entropy, grad_logprob, row_stats)
    with device_guard(logits):
        token_loss_fwd_kernel[(count,)](
            logits,
            targets,
            row_t,
            mask,
            *(targets if x is None else x.contiguous() for x in constants),
            *(logprob if x is None else x for x in outputs),
            logits if out is None else out,
            temperature,
            softcap,
            scale,
            low,
            high,
            dual_clip,
            *policy.numbers,
            entropy_coef,
            count,
            logits.shape[-1],
            policy.count,
            policy.first_row,
            inner,
            stride_inner,
            stride_outer,
            *(rows[1:] if out is None else out_rows),
            CAP=cap,
            HAS_ADVANTAGES=advantages is not None,
            HAS_OLD=old_logprob is not None,
            HAS_SCALE=scale_tensor is not None,
            HAS_H=entropy_coef != 0.0,
            WITH_ENTROPY=entropy is not None,
            WITH_LOSS=loss is not None,
            WITH_GRAD_LOGPROB=grad_logprob is not None,
            WITH_GRAD=out is not None,
            BLOCK=32 * elements_per_thread(double, cap),
            **row_tile(double, cap),
            **flags,
            **policy.flags,
        )


def forward(
    logits,
    targets,
    advantages,
    old_logprob,
    more,
    low,
    high,
    dual_clip,
    options,
    row_temperature,
    temperature,
    softcap,
    mask,
    scale_tensor,
    scale,
    out=None,
):
    """(loss, logprob, grad_logprob, row_stats) of `fastrlhf.token_loss`; the caller checks the arguments.

    Writes dL/dlogits for an upstream gradient of 1 to `out`, which may be `logits`; None: not computed.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss, logprob, grad_logprob = (
        torch.empty(targets.shape, dtype=dtype, device=logits.device) for _ in range(3)
    )
    row_stats = torch.empty((2, targets.numel()), dtype=dtype, device=logits.device)
    policy = (advantages, old_logprob, more, low, high, dual_clip, options)
    settings = (row_temperature, temperature, softcap, mask, scale_tensor, scale)
    _launch(
        logits,
        targets,
        *policy,
        0.0,
        *settings,
        out,
        logprob,
        grad_logprob=grad_logprob,
        loss=loss,
        row_stats=row_stats,
    )
    return loss, logprob, grad_logprob, row_stats


def rows_(
    logits,
    targets,
    advantages,
    old_logprob,
    more,
    low,
    high,
    dual_clip,
    options,
    entropy_coef,
    row_temperature,
    temperature,
    softcap,
    mask,
    scale,
    dlogits,
    logprob,
    entropy,
    grad_logprob,
):
    """Row pass of the linear losses: L = sum over rows of scale * weight * (token_loss - entropy_coef * entropy), with
    the weight of the row's sequence.

    Writes dL/dlogits to `dlogits` (see `gradient_layout`; it may be `logits`), logprob [N] and, where given,
    entropy [N] and grad_logprob [N] = scale * d token_loss / d logprob. Masked rows are not read and give 0.
    """
    if entropy_coef != 0.0 and entropy is None:
        raise ValueError("entropy must be given where entropy_coef is not 0")
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    for name, x in (("logprob", logprob), ("entropy", entropy), ("grad_logprob", grad_logprob)):
        if x is not None and not (
            x.dtype == dtype and x.numel() == targets.numel() and x.is_contiguous()
        ):
            raise ValueError(f"{name} must be contiguous, of {dtype} and of the rows")
    policy = (advantages, old_logprob, more, low, high, dual_clip, options)
    settings = (row_temperature, temperature, softcap, mask, scale, 1.0)
    _launch(
        logits, targets, *policy, entropy_coef, *settings, dlogits, logprob, entropy, grad_logprob
    )


def backward(grad, upstream):
    """Multiplies row i of `grad` [..., V] by upstream[i]."""
    rows = row_layout(grad)
    if rows is None:
        raise ValueError("grad needs a unit last stride and at most two row strides")
    count, width = rows[0], grad.shape[-1]
    if count == 0 or width == 0:
        return
    # An expanded scalar is read with stride 0, not copied.
    axes = zip(upstream.shape, upstream.stride(), strict=True)
    expanded = all(stride == 0 or size == 1 for size, stride in axes)
    block, warps = row_block(width)
    # Most upstream gradients are 1: few programs check many rows each. Few rows get several programs each.
    across = min(count, PROGRAMS)
    down = programs_per_row(across, width, block)
    with device_guard(grad):
        token_loss_bwd_kernel[(across, down)](
            grad,
            upstream if expanded else upstream.contiguous(),
            count,
            width,
            *rows[1:],
            0 if expanded else 1,
            ACC=tl.float64 if grad.dtype == torch.float64 else tl.float32,
            BLOCK=block,
            num_warps=warps,
        )
