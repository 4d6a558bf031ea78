"""ppo_loss in Triton: one launch over the tokens for losses, gradients and partial sums, one for the metrics.

Shapes: tokens [N] or [B, T], N in all; partials [ROWS, P] fp64: the sums of each of P programs. Unless
`factors` are given, the gradients of the first launch lack the factor 1 / n, which is known only once the whole mask is
counted. The second launch returns it as a tensor, by which `forward` multiplies them.

A second launch replaces an atomic last-block counter, which would need a memset.
"""

import torch
import triton
import triton.language as tl

from . import _policy
from ._launch import device_guard, one_order, token_layout, token_offset
from ._math import value_term
from ._moments import PROGRAMS, block_moments, load_moments, merge, reciprocal, store_partial
from ._policy import NO_ROLLOUT, policy_token

BLOCK = 1024  # tokens, with four warps
SMALL_BLOCK = 512  # with eight: fp64 and the settings need more registers per token
METRICS = 17  # in the order of METRICS in fastrlhf/ops/ppo_loss.py
# Rows of partials: those of the metrics, then the count of tokens and (count, mean, m2) of the returns and of the value
# errors. The explained variance has 0, and a maximum over tokens with a NaN is NaN.
POLICY_LOSS, RATIO_MAX, VALUE_LOSS, EXPLAINED = (tl.constexpr(i) for i in (0, 8, 9, 11))
ENTROPY, KL, ROLLOUT_MAX, TOKENS = (tl.constexpr(i) for i in (12, 13, 15, 17))
RETURNS, ERRORS = tl.constexpr(18), tl.constexpr(21)
ROWS = 24


@triton.jit
def _count_of(marks, place: tl.constexpr):
    return ((marks >> (12 * place)) & 4095).to(tl.int32)


@one_order
def ppo_loss_fwd_kernel(
    logprob_ptr,
    old_logprob_ptr,
    advantages_ptr,
    values_ptr,
    old_values_ptr,
    returns_ptr,
    entropy_ptr,
    ref_logprob_ptr,
    rollout_ptr,
    mask_ptr,
    cu_seqlens_ptr,
    sequences_ptr,
    factors_ptr,
    grad_logprob_ptr,
    grad_values_ptr,
    grad_entropy_ptr,
    partials_ptr,
    low: tl.float64,
    high: tl.float64,
    dual_clip: tl.float64,
    tau_pos: tl.float64,
    tau_neg: tl.float64,
    kl_coef: tl.float64,
    rollout_low: tl.float64,
    rollout_high: tl.float64,
    value_clip: tl.float64,
    value_coef: tl.float64,
    entropy_coef: tl.float64,
    N,
    T,
    S,
    first_row,
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
    stride_ref_logprob_row,
    stride_ref_logprob_col,
    stride_rollout_row,
    stride_rollout_col,
    stride_mask_row,
    stride_mask_col,
    HAS_OLD: tl.constexpr,
    HAS_ADVANTAGES: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    FLAT: tl.constexpr,
    ACC: tl.constexpr,
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
    program, programs = tl.program_id(0), tl.num_programs(0)
    none, zero = tl.zeros((), tl.int32), tl.zeros((), tl.float64)
    tokens, clipped, clipped_low, dual, outside = none, none, none, none, none
    value_clipped, rollout_outside = none, none
    policy, excess_sum, ratio, ratio_max, kl_sum = zero, zero, zero, zero, zero
    value_loss, entropy_sum, rollout, rollout_max = zero, zero, zero, zero
    target_count, target_mean, target_m2 = zero, zero, zero
    error_count, error_mean, error_m2 = zero, zero, zero
    factor, value_factor = tl.full((), 1.0, ACC), tl.full((), 1.0, ACC)
    if HAS_FACTORS:
        factor, value_factor = tl.load(factors_ptr).to(ACC), tl.load(factors_ptr + 1).to(ACC)
    for block in range(program, tl.cdiv(N, BLOCK), programs):
        index = tl.full((), block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        keep = index < N
        if HAS_MASK:
            place = mask_ptr + token_offset(index, T, stride_mask_row, stride_mask_col, FLAT)
            keep &= tl.load(place, mask=keep, other=0) != 0

        place = token_offset(index, T, stride_logprob_row, stride_logprob_col, FLAT)
        logprob = tl.load(logprob_ptr + place, mask=keep, other=0.0).to(ACC)
        (
            loss,
            kl,
            grad,
            weight,
            value_weight,
            rho,
            excess,
            is_clipped,
            is_low,
            is_dual,
            is_outside,
            weighed,
            is_beyond,
        ) = policy_token(
            index + first_row,
            keep,
            logprob,
            old_logprob_ptr
            + token_offset(index, T, stride_old_logprob_row, stride_old_logprob_col, FLAT),
            advantages_ptr
            + token_offset(index, T, stride_advantages_row, stride_advantages_col, FLAT),
            ref_logprob_ptr
            + token_offset(index, T, stride_ref_logprob_row, stride_ref_logprob_col, FLAT),
            rollout_ptr + token_offset(index, T, stride_rollout_row, stride_rollout_col, FLAT),
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
        if HAS_SEQUENCES:
            loss, kl, grad = loss * weight, kl * weight, grad * weight
        # Five counts in one sum, 12 bits each: every sum over a block costs a barrier.
        marks = keep.to(tl.int64) + (is_clipped.to(tl.int64) << 12) + (is_low.to(tl.int64) << 24)
        marks += (is_dual.to(tl.int64) << 36) + (is_outside.to(tl.int64) << 48)
        marks = tl.sum(tl.where(keep, marks, 0), axis=0)
        tokens += _count_of(marks, 0)
        clipped += _count_of(marks, 1)
        clipped_low += _count_of(marks, 2)
        dual += _count_of(marks, 3)
        outside += _count_of(marks, 4)
        policy += tl.sum(loss, axis=0).to(tl.float64)
        excess_sum += tl.sum(excess, axis=0).to(tl.float64)
        ratio += tl.sum(rho, axis=0).to(tl.float64)
        ratio_max = tl.maximum(ratio_max, tl.max(rho, axis=0).to(tl.float64))
        if HAS_REF:
            kl_sum += tl.sum(kl, axis=0).to(tl.float64)
        if ROLLOUT != NO_ROLLOUT:
            rollout += tl.sum(weighed, axis=0).to(tl.float64)
            rollout_max = tl.maximum(rollout_max, tl.max(weighed, axis=0).to(tl.float64))
            rollout_outside += tl.sum((is_beyond & keep).to(tl.int32), axis=0)
        if WITH_GRAD:
            if HAS_FACTORS:
                grad *= factor
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
            if HAS_SEQUENCES:
                loss, grad = loss * value_weight, grad * value_weight
            value_loss += tl.sum(loss, axis=0).to(tl.float64)
            value_clipped += tl.sum(is_clipped.to(tl.int32), axis=0)
            n, a, s = block_moments(target, keep)
            target_count, target_mean, target_m2 = merge(
                target_count, target_mean, target_m2, n, a, s
            )
            n, a, s = block_moments(value - target, keep)
            error_count, error_mean, error_m2 = merge(error_count, error_mean, error_m2, n, a, s)
            if WITH_GRAD:
                grad *= tl.full((), value_coef, ACC)
                if HAS_FACTORS:
                    grad *= value_factor
                tl.store(grad_values_ptr + index, grad, mask=index < N)

        if HAS_ENTROPY:
            place = token_offset(index, T, stride_entropy_row, stride_entropy_col, FLAT)
            entropy = tl.load(entropy_ptr + place, mask=keep, other=0.0).to(ACC)
            if HAS_SEQUENCES:
                entropy *= weight
            entropy_sum += tl.sum(entropy, axis=0).to(tl.float64)
            if WITH_GRAD:
                grad = tl.where(keep, 0.0 - tl.full((), entropy_coef, ACC), 0.0)
                if HAS_SEQUENCES:
                    grad *= weight
                if HAS_FACTORS:
                    grad *= factor
                tl.store(grad_entropy_ptr + index, grad, mask=index < N)

    place = partials_ptr + program
    tl.store(place, policy)
    tl.store(place + 1 * programs, excess_sum)
    tl.store(place + 2 * programs, clipped)
    tl.store(place + 3 * programs, clipped_low)
    tl.store(place + 4 * programs, clipped - clipped_low)
    tl.store(place + 5 * programs, dual)
    tl.store(place + 6 * programs, outside)
    tl.store(place + 7 * programs, ratio)
    tl.store(place + RATIO_MAX * programs, tl.where(ratio == ratio, ratio_max, ratio))
    tl.store(place + VALUE_LOSS * programs, value_loss)
    tl.store(place + 10 * programs, value_clipped)
    tl.store(place + EXPLAINED * programs, zero)
    tl.store(place + ENTROPY * programs, entropy_sum)
    tl.store(place + KL * programs, kl_sum)
    tl.store(place + 14 * programs, rollout)
    tl.store(place + ROLLOUT_MAX * programs, tl.where(rollout == rollout, rollout_max, rollout))
    tl.store(place + 16 * programs, rollout_outside)
    tl.store(place + TOKENS * programs, tokens)
    if HAS_VALUES:
        store_partial(
            partials_ptr, program, programs, RETURNS, target_count, target_mean, target_m2
        )
        store_partial(partials_ptr, program, programs, ERRORS, error_count, error_mean, error_m2)


@triton.jit
def ppo_loss_metrics_kernel(
    partials_ptr,
    factors_ptr,
    loss_ptr,
    metrics_ptr,
    per_token_ptr,
    kl_coef: tl.float64,
    value_coef: tl.float64,
    entropy_coef: tl.float64,
    programs,
    HAS_VALUES: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    # The rows of the metrics are reduced together, in tiles of 64 programs.
    row, column = tl.arange(0, 32), tl.arange(0, 64)
    sums, largest = tl.zeros((32, 64), tl.float64), tl.zeros((32, 64), tl.float64)
    for first in range(0, programs, 64):
        there = (row[:, None] <= TOKENS) & (first + column[None, :] < programs)
        place = partials_ptr + row[:, None] * programs + (first + column[None, :])
        found = tl.load(place, mask=there, other=0.0)
        sums += found
        largest = tl.maximum(largest, found)
    sums, largest = tl.sum(sums, axis=1), tl.max(largest, axis=1)
    tokens = tl.sum(tl.where(row == TOKENS, sums, 0.0), axis=0)
    per_token = reciprocal(tl.where(tokens < 1.0, 1.0, tokens))
    factor, value_factor = per_token, per_token
    if HAS_FACTORS:
        factor = tl.load(factors_ptr).to(tl.float64)
        value_factor = tl.load(factors_ptr + 1).to(tl.float64)
    # Policy loss, value loss, entropy and KL are aggregated; the other metrics are means.
    one = tl.full((), 1.0, tl.float64)
    coef = tl.where(row == POLICY_LOSS, one, 0.0)
    coef = tl.where(row == VALUE_LOSS, tl.full((), value_coef, tl.float64), coef)
    coef = tl.where(row == ENTROPY, -tl.full((), entropy_coef, tl.float64), coef)
    coef = tl.where(row == KL, tl.full((), kl_coef, tl.float64), coef)
    aggregated = (row == POLICY_LOSS) | (row == ENTROPY) | (row == KL)
    factors = tl.where(aggregated, factor, tl.where(row == VALUE_LOSS, value_factor, per_token))
    means = sums * factors
    loss = tl.sum(tl.where(aggregated | (row == VALUE_LOSS), coef * means, 0.0), axis=0)
    explained = tl.zeros((), tl.float64)
    if HAS_VALUES:
        _, _, target_m2 = load_moments(partials_ptr, programs, RETURNS, PROGRAMS)
        _, _, error_m2 = load_moments(partials_ptr, programs, ERRORS, PROGRAMS)
        explained = 1.0 - error_m2 / tl.where(target_m2 > 0.0, target_m2, 1.0)
        explained = tl.where(target_m2 > 0.0, explained, 0.0)
    tl.store(loss_ptr, loss.to(loss_ptr.dtype.element_ty))
    tl.store(per_token_ptr, per_token.to(per_token_ptr.dtype.element_ty))
    # tl.maximum ignores NaN; the sum propagates it.
    is_max = (row == RATIO_MAX) | (row == ROLLOUT_MAX)
    metrics = tl.where(is_max, tl.where(sums == sums, largest, sums), means)
    metrics = tl.where(row == EXPLAINED, explained, metrics)
    tl.store(metrics_ptr + row, metrics.to(tl.float32), mask=row < TOKENS)


def forward(
    logprob,
    old_logprob,
    advantages,
    values,
    old_values,
    returns,
    entropy,
    mask,
    factors,
    more,
    *numbers,
):
    """(loss, metrics [17], gradients [k, ...]) of `fastrlhf.ppo_loss`, which has checked the arguments.

    The gradients are with respect to logprob, values and entropy, without those of absent tensors; k = 0 unless
    with_grad.
    """
    *limits, value_clip, value_coef, entropy_coef, options, with_grad = numbers
    policy = _policy.settings(more, options)
    count = logprob.numel()
    double = logprob.dtype == torch.float64
    acc = torch.float64 if double else torch.float32
    fill = torch.zeros if count == 0 else torch.empty
    loss = fill((), dtype=acc, device=logprob.device)
    metrics = fill(METRICS, dtype=torch.float32, device=logprob.device)
    per_token = fill((), dtype=acc, device=logprob.device)
    given = 1 + (values is not None) + (entropy is not None) if with_grad else 0
    grads = torch.empty((given, *logprob.shape), dtype=acc, device=logprob.device)
    if count == 0:
        return loss, metrics, grads
    if old_values is None:  # old_values is not used without a value clip
        old_values = values
    tensors = (logprob, old_logprob, advantages, values, old_values, returns, entropy)
    tensors = (*tensors, policy.ref_logprob, policy.rollout, mask)
    tensors, steps, flat, strides = token_layout(*tensors)
    small = double or bool(options)
    block = SMALL_BLOCK if small else BLOCK
    grid = (min(triton.cdiv(count, block), PROGRAMS),)
    partials = logprob.new_empty((ROWS, *grid), dtype=torch.float64)
    pointers = (*tensors, policy.cu_seqlens, policy.sequences, factors)
    coefs = (value_coef, entropy_coef)
    with device_guard(logprob):
        ppo_loss_fwd_kernel[grid](
            *(logprob if x is None else x for x in pointers),
            *_grads_by_input(grads, values is not None),
            partials,
            *limits,
            *policy.numbers,
            value_clip,
            *coefs,
            count,
            steps,
            policy.count,
            policy.first_row,
            *(stride for pair in strides for stride in pair),
            HAS_OLD=old_logprob is not None,
            HAS_ADVANTAGES=advantages is not None,
            HAS_VALUES=values is not None,
            HAS_ENTROPY=entropy is not None,
            HAS_MASK=mask is not None,
            HAS_FACTORS=factors is not None,
            WITH_GRAD=with_grad,
            FLAT=flat,
            ACC=tl.float64 if double else tl.float32,
            BLOCK=block,
            num_warps=8 if small else 4,
            enable_fp_fusion=False,  # bitwise identical in every layout
            **policy.flags,
        )
        ppo_loss_metrics_kernel[(1,)](
            partials,
            partials if factors is None else factors,
            loss,
            metrics,
            per_token,
            policy.kl_coef,
            *coefs,
            grid[0],
            HAS_VALUES=values is not None,
            HAS_FACTORS=factors is not None,
            PROGRAMS=PROGRAMS,
            num_warps=4,
            enable_fp_fusion=False,  # bitwise identical in every layout
        )
    # `factors`, known before the launch, are in the gradients.
    return loss, metrics, grads.mul_(per_token) if with_grad and factors is None else grads


def _grads_by_input(grads, has_values):
    """Output tensors of the gradients of logprob, values and entropy; placeholders for those that are not written."""
    if not grads.shape[0]:
        return grads, grads, grads
    found = grads.unbind()
    return found[0], found[1] if has_values else found[0], found[-1]
