"""kl_reward in Triton: r_t = -beta kl_t, plus the score at the last unmasked step.

One pass over each sequence, from its end, where the score is added.

Shapes: B sequences, T steps, N tokens; [B, T] with an optional mask, or [N] with cu_seqlens [B + 1].
score [B].
"""

import torch
import triton
import triton.language as tl

from ._launch import device_guard, row_strides, sequence_grid
from ._math import kl_term
from ._sequence import BLOCK, WARPS, bounds, kept, last_kept


@triton.jit
def kl_reward_kernel(
    logprob_ptr,
    ref_logprob_ptr,
    score_ptr,
    cu_seqlens_ptr,
    mask_ptr,
    rewards_out_ptr,
    kl_out_ptr,
    beta: tl.float64,
    B,
    T,
    N,
    stride_logprob_row,
    stride_logprob_col,
    stride_ref_logprob_row,
    stride_ref_logprob_col,
    stride_mask_row,
    stride_mask_col,
    stride_score,
    stride_out_row,
    ESTIMATOR: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    weight = tl.full((), beta, ACC)
    for b in range(tl.program_id(0), B, tl.num_programs(0)):
        row = tl.full((), b, tl.int64)
        first, steps = bounds(row, cu_seqlens_ptr, T, N, PACKED)
        logprob_row = logprob_ptr + row * stride_logprob_row + first * stride_logprob_col
        ref_row = ref_logprob_ptr + row * stride_ref_logprob_row + first * stride_ref_logprob_col
        mask_row = mask_ptr + row * stride_mask_row
        out_row = row * stride_out_row + first
        score = tl.load(score_ptr + row * stride_score).to(ACC)
        scored = tl.full((), -1, tl.int64)
        blocks = tl.cdiv(steps, BLOCK)
        for i in tl.range(0, blocks, disable_licm=True):  # hoisted addresses would spill
            t = (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
            keep = kept(mask_row, t, steps, stride_mask_col, HAS_MASK)
            scored = last_kept(t, keep, scored)
            logprob = tl.load(logprob_row + t * stride_logprob_col, mask=keep, other=0.0)
            ref = tl.load(ref_row + t * stride_ref_logprob_col, mask=keep, other=0.0)
            kl = kl_term(logprob.to(ACC), ref.to(ACC), ESTIMATOR)
            reward = 0.0 - weight * kl
            reward = tl.where(t == scored, reward + score, reward)
            tl.store(rewards_out_ptr + out_row + t, tl.where(keep, reward, 0.0), mask=t < steps)
            tl.store(kl_out_ptr + out_row + t, tl.where(keep, kl, 0.0), mask=t < steps)


def forward(logprob, ref_logprob, score, beta, estimator, cu_seqlens, mask):
    """Stacked (rewards, kl) [2, ...] of `fastrlhf.kl_reward`; the caller checks the arguments."""
    acc = torch.float64 if logprob.dtype == torch.float64 else torch.float32
    out = torch.empty((2, *logprob.shape), dtype=acc, device=logprob.device)
    if logprob.numel() == 0:
        return out
    sequences, steps, grid = sequence_grid(logprob, cu_seqlens)
    with device_guard(logprob):
        kl_reward_kernel[grid](
            logprob,
            ref_logprob,
            score,
            score if cu_seqlens is None else cu_seqlens,
            score if mask is None else mask,
            *out.unbind(),
            beta,
            sequences,
            steps,
            logprob.numel(),
            *row_strides(logprob),
            *row_strides(ref_logprob),
            *row_strides(mask),
            score.stride(0),
            0 if cu_seqlens is not None else steps,
            ESTIMATOR=estimator,
            PACKED=cu_seqlens is not None,
            HAS_MASK=mask is not None,
            ACC=tl.float64 if acc == torch.float64 else tl.float32,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,  # bitwise identical to kl_gae
        )
    return out
