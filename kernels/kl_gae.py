"""kl_gae in Triton: KL rewards, GAE and returns in one launch; whitening takes a second one.

Shapes: B sequences, T steps, N tokens; [B, T] with an optional mask, or [N] with cu_seqlens [B + 1].
score [B]; partials [3, P] fp64: (count, mean, m2) of each program's advantages.
"""

import torch
import triton.language as tl

from . import masked_whiten
from ._launch import device_guard, one_order, row_strides, sequence_grid
from ._math import kl_term
from ._moments import block_moments, merge, store_partial
from ._sequence import BLOCK, WARPS, bounds, gae_block, kept, last_kept


@one_order
def kl_gae_kernel(
    logprob_ptr,
    ref_logprob_ptr,
    score_ptr,
    values_ptr,
    cu_seqlens_ptr,
    mask_ptr,
    advantages_out_ptr,
    returns_out_ptr,
    rewards_out_ptr,
    kl_out_ptr,
    partials_ptr,
    beta: tl.float64,
    gamma: tl.float64,
    gamma_lam: tl.float64,
    B,
    T,
    N,
    stride_logprob_row,
    stride_logprob_col,
    stride_ref_logprob_row,
    stride_ref_logprob_col,
    stride_values_row,
    stride_values_col,
    stride_mask_row,
    stride_mask_col,
    stride_score,
    stride_out_row,
    ESTIMATOR: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    WHITEN: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    weight = tl.full((), beta, ACC)
    discount, decay = tl.full((), gamma, ACC), tl.full((), gamma_lam, ACC)
    count = tl.zeros((), tl.float64)
    mean = tl.zeros((), tl.float64)
    m2 = tl.zeros((), tl.float64)
    for b in range(program, B, programs):
        row = tl.full((), b, tl.int64)
        first, steps = bounds(row, cu_seqlens_ptr, T, N, PACKED)
        logprob_row = logprob_ptr + row * stride_logprob_row + first * stride_logprob_col
        ref_row = ref_logprob_ptr + row * stride_ref_logprob_row + first * stride_ref_logprob_col
        value_row = values_ptr + row * stride_values_row + first * stride_values_col
        mask_row = mask_ptr + row * stride_mask_row
        out_row = row * stride_out_row + first
        score = tl.load(score_ptr + row * stride_score).to(ACC)
        scored = tl.full((), -1, tl.int64)
        next_advantage = tl.zeros((), ACC)
        next_value = tl.zeros((), ACC)
        blocks = tl.cdiv(steps, BLOCK)
        for i in tl.range(0, blocks, disable_licm=True):  # hoisted addresses would spill
            t = (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
            inside = t < steps
            keep = kept(mask_row, t, steps, stride_mask_col, HAS_MASK)
            keep_after = kept(mask_row, t + 1, steps, stride_mask_col, HAS_MASK)
            scored = last_kept(t, keep, scored)
            here = value_row + t * stride_values_col
            logprob = tl.load(logprob_row + t * stride_logprob_col, mask=keep, other=0.0)
            ref = tl.load(ref_row + t * stride_ref_logprob_col, mask=keep, other=0.0)
            value = tl.load(here, mask=keep, other=0.0).to(ACC)
            value_after = tl.load(here + stride_values_col, mask=keep_after, other=0.0).to(ACC)
            kl = kl_term(logprob.to(ACC), ref.to(ACC), ESTIMATOR)
            reward = 0.0 - weight * kl
            reward = tl.where(t == scored, reward + score, reward)
            advantage, next_value, next_advantage = gae_block(
                reward,
                value,
                value_after,
                keep,
                keep_after,
                next_value,
                next_advantage,
                discount,
                decay,
                HAS_MASK,
            )
            out = out_row + t
            advantage = tl.where(keep, advantage, 0.0)
            tl.store(advantages_out_ptr + out, advantage, mask=inside)
            tl.store(returns_out_ptr + out, tl.where(keep, advantage + value, 0.0), mask=inside)
            tl.store(rewards_out_ptr + out, tl.where(keep, reward, 0.0), mask=inside)
            tl.store(kl_out_ptr + out, tl.where(keep, kl, 0.0), mask=inside)
            if WHITEN:
                n, a, s = block_moments(advantage, keep)
                count, mean, m2 = merge(count, mean, m2, n, a, s)
    if WHITEN:
        store_partial(partials_ptr, program, programs, 0, count, mean, m2)


def forward(
    logprob, ref_logprob, score, values, beta, estimator, gamma, lam, whiten, cu_seqlens, mask
):
    """Stacked (advantages, returns, rewards, kl) [4, ...] of `fastrlhf.kl_gae`; the caller checks the arguments."""
    acc = torch.float64 if logprob.dtype == torch.float64 else torch.float32
    out = torch.empty((4, *logprob.shape), dtype=acc, device=logprob.device)
    if logprob.numel() == 0:
        return out
    sequences, steps, grid = sequence_grid(logprob, cu_seqlens)
    partials = values  # unused without whitening
    if whiten:
        partials = logprob.new_empty((3, *grid), dtype=torch.float64)
    with device_guard(logprob):
        kl_gae_kernel[grid](
            logprob,
            ref_logprob,
            score,
            values,
            values if cu_seqlens is None else cu_seqlens,
            values if mask is None else mask,
            *out.unbind(),
            partials,
            beta,
            gamma,
            gamma * lam,
            sequences,
            steps,
            logprob.numel(),
            *row_strides(logprob),
            *row_strides(ref_logprob),
            *row_strides(values),
            *row_strides(mask),
            score.stride(0),
            0 if cu_seqlens is not None else steps,
            ESTIMATOR=estimator,
            PACKED=cu_seqlens is not None,
            HAS_MASK=mask is not None,
            WHITEN=whiten,
            ACC=tl.float64 if acc == torch.float64 else tl.float32,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,  # bitwise identical to kl_reward followed by gae
        )
        if whiten:
            masked_whiten.normalise(out[0], mask, partials, out[0])
    return out
