"""gae in Triton: A_t = delta_t + gamma lam A_{t+1} by a reverse scan over blocks of each sequence.

Shapes: B sequences, T steps, N tokens; [B, T] with an optional mask, or [N] with cu_seqlens [B + 1].
bootstrap [B]; partials [3, P] fp64: (count, mean, m2) of each program's advantages, for whitening in a second launch.
"""

import torch
import triton.language as tl

from . import masked_whiten
from ._launch import device_guard, one_order, row_strides, sequence_grid
from ._moments import block_moments, merge, store_partial
from ._sequence import BLOCK, WARPS, bounds, gae_block, kept


@one_order
def gae_kernel(
    rewards_ptr,
    values_ptr,
    cu_seqlens_ptr,
    mask_ptr,
    bootstrap_ptr,
    advantages_out_ptr,
    returns_out_ptr,
    partials_ptr,
    gamma: tl.float64,
    gamma_lam: tl.float64,
    B,
    T,
    N,
    stride_rewards_row,
    stride_rewards_col,
    stride_values_row,
    stride_values_col,
    stride_mask_row,
    stride_mask_col,
    stride_bootstrap,
    stride_out_row,
    PACKED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_BOOTSTRAP: tl.constexpr,
    WHITEN: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    discount, decay = tl.full((), gamma, ACC), tl.full((), gamma_lam, ACC)
    count = tl.zeros((), tl.float64)
    mean = tl.zeros((), tl.float64)
    m2 = tl.zeros((), tl.float64)
    for b in range(program, B, programs):
        row = tl.full((), b, tl.int64)
        first, steps = bounds(row, cu_seqlens_ptr, T, N, PACKED)
        reward_row = rewards_ptr + row * stride_rewards_row + first * stride_rewards_col
        value_row = values_ptr + row * stride_values_row + first * stride_values_col
        mask_row = mask_ptr + row * stride_mask_row
        out_row = row * stride_out_row + first
        next_advantage = tl.zeros((), ACC)
        next_value = tl.zeros((), ACC)
        if HAS_BOOTSTRAP:
            next_value = tl.load(bootstrap_ptr + row * stride_bootstrap).to(ACC)
        blocks = tl.cdiv(steps, BLOCK)
        for i in tl.range(0, blocks, disable_licm=True):  # hoisted addresses would spill
            t = (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
            keep = kept(mask_row, t, steps, stride_mask_col, HAS_MASK)
            keep_after = kept(mask_row, t + 1, steps, stride_mask_col, HAS_MASK)
            here = value_row + t * stride_values_col
            reward = tl.load(reward_row + t * stride_rewards_col, mask=keep, other=0.0).to(ACC)
            value = tl.load(here, mask=keep, other=0.0).to(ACC)
            value_after = tl.load(here + stride_values_col, mask=keep_after, other=0.0).to(ACC)
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
            out = tl.where(keep, advantage, 0.0)
            tl.store(advantages_out_ptr + out_row + t, out, mask=t < steps)
            returns = tl.where(keep, advantage + value, 0.0)
            tl.store(returns_out_ptr + out_row + t, returns, mask=t < steps)
            if WHITEN:
                n, a, s = block_moments(out, keep)
                count, mean, m2 = merge(count, mean, m2, n, a, s)
    if WHITEN:
        store_partial(partials_ptr, program, programs, 0, count, mean, m2)


def forward(rewards, values, gamma, lam, cu_seqlens, mask, bootstrap, whiten):
    """Stacked (advantages, returns) [2, ...] of `fastrlhf.gae`; the caller checks the arguments."""
    acc = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    out = torch.empty((2, *rewards.shape), dtype=acc, device=rewards.device)
    if rewards.numel() == 0:
        return out
    advantages, returns = out.unbind()
    sequences, steps, grid = sequence_grid(rewards, cu_seqlens)
    partials = values  # unused without whitening
    if whiten:
        partials = rewards.new_empty((3, *grid), dtype=torch.float64)
    with device_guard(rewards):
        gae_kernel[grid](
            rewards,
            values,
            values if cu_seqlens is None else cu_seqlens,
            values if mask is None else mask,
            values if bootstrap is None else bootstrap,
            advantages,
            returns,
            partials,
            gamma,
            gamma * lam,
            sequences,
            steps,
            rewards.numel(),
            *row_strides(rewards),
            *row_strides(values),
            *row_strides(mask),
            0 if bootstrap is None else bootstrap.stride(0),
            0 if cu_seqlens is not None else steps,
            PACKED=cu_seqlens is not None,
            HAS_MASK=mask is not None,
            HAS_BOOTSTRAP=bootstrap is not None,
            WHITEN=whiten,
            ACC=tl.float64 if acc == torch.float64 else tl.float32,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,  # bitwise identical to kl_gae
        )
        if whiten:
            masked_whiten.normalise(advantages, mask, partials, advantages)
    return out
