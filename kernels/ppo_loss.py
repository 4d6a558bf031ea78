"""ppo_loss in Triton: one launch over the tokens for losses, gradients and partial sums, one for the metrics.

Shapes: tokens [N] or [B, T], N in all; partials [ROWS, P] fp64: the sums of each of P programs. The gradients of the
first launch lack the factor 1 / n, which is known only once the whole mask is counted. The second launch returns it as
a tensor, by which `forward` multiplies them.

A second launch replaces an atomic last-block counter, which would need a memset.
"""

import torch
import triton
import triton.language as tl

from ._launch import device_guard, one_order, token_layout, token_offset
from ._math import policy_term, value_term
from ._moments import PROGRAMS, block_moments, load_moments, merge, reciprocal, store_partial

BLOCK = 1024
METRICS = 9
# Rows of partials: tokens, policy loss, KL, clipped, ratio, maximum ratio, value loss, values clipped,
# entropy; then (count, mean, m2) of the returns and of the value errors.
ROWS = 15


@one_order
def ppo_loss_fwd_kernel(
    logprob_ptr,
    old_logprob_ptr,
    advantages_ptr,
    values_ptr,
    old_values_ptr,
    returns_ptr,
    entropy_ptr,
    mask_ptr,
    grad_logprob_ptr,
    grad_values_ptr,
    grad_entropy_ptr,
    partials_ptr,
    low: tl.float64,
    high: tl.float64,
    dual_clip: tl.float64,
    value_clip: tl.float64,
    value_coef: tl.float64,
    entropy_coef: tl.float64,
    N,
    T,
    stride_logprob_row,
    stride_logprob_col,
    stride_old_logprob_row,
    stride_old_logprob_col,
    stride_advantages_row,
    stride_advantages_col,
    stride_values_row,
    stride_values_col,
    stride_old_values_row,
    stride_old_values_col,
    stride_returns_row,
    stride_returns_col,
    stride_entropy_row,
    stride_entropy_col,
    stride_mask_row,
    stride_mask_col,
    HAS_VALUES: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_MASK: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    FLAT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    zero = tl.zeros((), tl.float64)
    tokens, policy, kl, clipped, ratio, ratio_max = zero, zero, zero, zero, zero, zero
    value_loss, value_clipped, entropy_sum = zero, zero, zero
    target_count, target_mean, target_m2 = zero, zero, zero
    error_count, error_mean, error_m2 = zero, zero, zero
    for block in range(program, tl.cdiv(N, BLOCK), programs):
        index = tl.full((), block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        keep = index < N
        if HAS_MASK:
            place = mask_ptr + token_offset(index, T, stride_mask_row, stride_mask_col, FLAT)
            keep &= tl.load(place, mask=keep, other=0) != 0
        tokens += tl.sum(keep.to(tl.int32), axis=0).to(tl.float64)

        place = token_offset(index, T, stride_logprob_row, stride_logprob_col, FLAT)
        logprob = tl.load(logprob_ptr + place, mask=keep, other=0.0).to(ACC)
        place = token_offset(index, T, stride_old_logprob_row, stride_old_logprob_col, FLAT)
        old_logprob = tl.load(old_logprob_ptr + place, mask=keep, other=0.0).to(ACC)
        place = token_offset(index, T, stride_advantages_row, stride_advantages_col, FLAT)
        advantage = tl.load(advantages_ptr + place, mask=keep, other=0.0).to(ACC)
        loss, grad, rho, excess, is_clipped = policy_term(
            logprob,
            old_logprob,
            advantage,
            tl.full((), low, ACC),
            tl.full((), high, ACC),
            tl.full((), dual_clip, ACC),
        )
        # Masked tokens load as 0: loss, gradient, KL and clip are 0, but the ratio is 1.
        rho = tl.where(keep, rho, 0.0)
        policy += tl.sum(loss, axis=0).to(tl.float64)
        kl += tl.sum(excess, axis=0).to(tl.float64)
        clipped += tl.sum(is_clipped.to(tl.int32), axis=0).to(tl.float64)
        ratio += tl.sum(rho, axis=0).to(tl.float64)
        ratio_max = tl.maximum(ratio_max, tl.max(rho, axis=0).to(tl.float64))
        if WITH_GRAD:
            tl.store(grad_logprob_ptr + index, grad, mask=index < N)

        if HAS_VALUES:
            place = token_offset(index, T, stride_values_row, stride_values_col, FLAT)
            value = tl.load(values_ptr + place, mask=keep, other=0.0).to(ACC)
            place = token_offset(index, T, stride_old_values_row, stride_old_values_col, FLAT)
            old_value = tl.load(old_values_ptr + place, mask=keep, other=0.0).to(ACC)
            place = token_offset(index, T, stride_returns_row, stride_returns_col, FLAT)
            target = tl.load(returns_ptr + place, mask=keep, other=0.0).to(ACC)
            clip = tl.full((), value_clip, ACC)
            loss, grad, is_clipped = value_term(value, old_value, target, clip)
            value_loss += tl.sum(loss, axis=0).to(tl.float64)
            value_clipped += tl.sum(is_clipped.to(tl.int32), axis=0).to(tl.float64)
            n, a, s = block_moments(target, keep)
            target_count, target_mean, target_m2 = merge(
                target_count, target_mean, target_m2, n, a, s
            )
            n, a, s = block_moments(value - target, keep)
            error_count, error_mean, error_m2 = merge(error_count, error_mean, error_m2, n, a, s)
            if WITH_GRAD:
                grad *= tl.full((), value_coef, ACC)
                tl.store(grad_values_ptr + index, grad, mask=index < N)

        if HAS_ENTROPY:
            place = token_offset(index, T, stride_entropy_row, stride_entropy_col, FLAT)
            entropy = tl.load(entropy_ptr + place, mask=keep, other=0.0).to(ACC)
            entropy_sum += tl.sum(entropy, axis=0).to(tl.float64)
            if WITH_GRAD:
                grad = tl.where(keep, 0.0 - tl.full((), entropy_coef, ACC), 0.0)
                tl.store(grad_entropy_ptr + index, grad, mask=index < N)

    place = partials_ptr + program
    tl.store(place, tokens)
    tl.store(place + 1 * programs, policy)
    tl.store(place + 2 * programs, kl)
    tl.store(place + 3 * programs, clipped)
    tl.store(place + 4 * programs, ratio)
    tl.store(place + 5 * programs, ratio_max)
    tl.store(place + 6 * programs, value_loss)
    tl.store(place + 7 * programs, value_clipped)
    tl.store(place + 8 * programs, entropy_sum)
    if HAS_VALUES:
        store_partial(partials_ptr, program, programs, 9, target_count, target_mean, target_m2)
        store_partial(partials_ptr, program, programs, 12, error_count, error_mean, error_m2)


@triton.jit
def _row(partials_ptr, programs, row, PROGRAMS: tl.constexpr):
    column = tl.arange(0, PROGRAMS)
    return tl.load(partials_ptr + row * programs + column, mask=column < programs, other=0.0)


@triton.jit
def ppo_loss_metrics_kernel(
    partials_ptr,
    loss_ptr,
    metrics_ptr,
    per_token_ptr,
    value_coef: tl.float64,
    entropy_coef: tl.float64,
    programs,
    HAS_VALUES: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    tokens = tl.sum(_row(partials_ptr, programs, 0, PROGRAMS), axis=0)
    per_token = reciprocal(tl.where(tokens < 1.0, 1.0, tokens))
    policy = tl.sum(_row(partials_ptr, programs, 1, PROGRAMS), axis=0) * per_token
    kl = tl.sum(_row(partials_ptr, programs, 2, PROGRAMS), axis=0) * per_token
    clipped = tl.sum(_row(partials_ptr, programs, 3, PROGRAMS), axis=0) * per_token
    ratio = tl.sum(_row(partials_ptr, programs, 4, PROGRAMS), axis=0) * per_token
    ratio_max = tl.max(_row(partials_ptr, programs, 5, PROGRAMS), axis=0)
    value_loss = tl.sum(_row(partials_ptr, programs, 6, PROGRAMS), axis=0) * per_token
    value_clipped = tl.sum(_row(partials_ptr, programs, 7, PROGRAMS), axis=0) * per_token
    entropy = tl.sum(_row(partials_ptr, programs, 8, PROGRAMS), axis=0) * per_token
    explained = tl.zeros((), tl.float64)
    if HAS_VALUES:
        _, _, target_m2 = load_moments(partials_ptr, programs, 9, PROGRAMS)
        _, _, error_m2 = load_moments(partials_ptr, programs, 12, PROGRAMS)
        explained = 1.0 - error_m2 / tl.where(target_m2 > 0.0, target_m2, 1.0)
        explained = tl.where(target_m2 > 0.0, explained, 0.0)
    coefs = tl.full((), value_coef, tl.float64), tl.full((), entropy_coef, tl.float64)
    loss = policy + coefs[0] * value_loss - coefs[1] * entropy
    tl.store(loss_ptr, loss.to(loss_ptr.dtype.element_ty))
    tl.store(per_token_ptr, per_token.to(per_token_ptr.dtype.element_ty))
    tl.store(metrics_ptr, policy.to(tl.float32))
    tl.store(metrics_ptr + 1, kl.to(tl.float32))
    tl.store(metrics_ptr + 2, clipped.to(tl.float32))
    tl.store(metrics_ptr + 3, ratio.to(tl.float32))
    # The maximum ignores NaN; the sum propagates it.
    tl.store(metrics_ptr + 4, tl.where(ratio == ratio, ratio_max, ratio).to(tl.float32))
    tl.store(metrics_ptr + 5, value_loss.to(tl.float32))
    tl.store(metrics_ptr + 6, value_clipped.to(tl.float32))
    tl.store(metrics_ptr + 7, explained.to(tl.float32))
    tl.store(metrics_ptr + 8, entropy.to(tl.float32))


def forward(
    logprob, old_logprob, advantages, values, old_values, returns, entropy, mask, *settings
):
    """(loss, metrics [9], gradients [k, ...]) of `fastrlhf.ppo_loss`, which has checked the arguments.

    The gradients are with respect to logprob, values and entropy, without those of absent tensors; k = 0 unless
    with_grad.
    """
    clip, dual_clip, value_clip, value_coef, entropy_coef, with_grad = settings
    tensors = (logprob, old_logprob, advantages, values, old_values, returns, entropy)
    count = logprob.numel()
    acc = torch.float64 if logprob.dtype == torch.float64 else torch.float32
    fill = torch.zeros if count == 0 else torch.empty
    loss = fill((), dtype=acc, device=logprob.device)
    metrics = fill(METRICS, dtype=torch.float32, device=logprob.device)
    per_token = fill((), dtype=acc, device=logprob.device)
    given = 1 + (values is not None) + (entropy is not None) if with_grad else 0
    grads = torch.empty((given, *logprob.shape), dtype=acc, device=logprob.device)
    if count == 0:
        return loss, metrics, grads
    (*tensors, mask), steps, flat, strides = token_layout(*tensors, mask)
    if tensors[4] is None:  # old_values is not used without a value clip
        tensors[4], strides[4] = tensors[3], strides[3]
    grid = (min(triton.cdiv(count, BLOCK), PROGRAMS),)
    partials = logprob.new_empty((ROWS, *grid), dtype=torch.float64)
    with device_guard(logprob):
        ppo_loss_fwd_kernel[grid](
            *(tensors[0] if x is None else x for x in (*tensors, mask)),
            *_grads_by_input(grads, values is not None),
            partials,
            1.0 - clip,
            1.0 + clip,
            dual_clip,
            value_clip,
            value_coef,
            entropy_coef,
            count,
            steps,
            *(stride for pair in strides for stride in pair),
            HAS_VALUES=values is not None,
            HAS_ENTROPY=entropy is not None,
            HAS_MASK=mask is not None,
            WITH_GRAD=with_grad,
            FLAT=flat,
            ACC=tl.float64 if acc == torch.float64 else tl.float32,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=False,  # bitwise identical in every layout
        )
        ppo_loss_metrics_kernel[(1,)](
            partials,
            loss,
            metrics,
            per_token,
            value_coef,
            entropy_coef,
            grid[0],
            HAS_VALUES=values is not None,
            PROGRAMS=PROGRAMS,
            num_warps=4,
            enable_fp_fusion=False,  # bitwise identical in every layout
        )
    return loss, metrics, grads.mul_(per_token) if with_grad else grads


def _grads_by_input(grads, has_values):
    """Output tensors of the gradients of logprob, values and entropy; placeholders for those that are not written."""
    if not grads.shape[0]:
        return grads, grads, grads
    found = grads.unbind()
    return found[0], found[1] if has_values else found[0], found[-1]
