"""group_advantage in Triton: rewards relative to those of the same prompt, in one launch.

Shapes: P prompts, M completions in all; rewards, out [M], cu_groups [P + 1]. Sums are fp64. Each program computes the
factor that all groups share (the batch's std, or its number of rewards), in time linear in M: a batch has a few
thousand rewards.
"""

import torch
import triton
import triton.language as tl

from ._launch import device_guard, one_order
from ._moments import PROGRAMS, reciprocal
from ._sequence import bounds

BLOCK = 64  # completions of a group
BATCH_BLOCK = 1024  # completions of the batch
# In the order of BASELINES and SCALES in fastrlhf/ops/group_advantage.py.
LEAVE_ONE_OUT, NO_BASELINE = tl.constexpr(1), tl.constexpr(2)
STD, BATCH_STD, GPG = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _load(x_ptr, index, count, stride):
    return tl.load(x_ptr + index * stride, mask=index < count, other=0.0).to(tl.float64)


@triton.jit
def _deviations(x_ptr, count, stride, SQUARES: tl.constexpr, BLOCK: tl.constexpr):
    """(pivot, mean, squares) of `count` > 0 values: the first, the mean of the differences to it, m2 about that."""
    pivot = tl.load(x_ptr).to(tl.float64)
    total = tl.zeros((), tl.float64)
    squares = tl.zeros((), tl.float64)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK).to(tl.int64)
        d = _load(x_ptr, index, count, stride) - pivot
        total += tl.sum(tl.where(index < count, d, 0.0), axis=0)
    mean = total * reciprocal(count.to(tl.float64))
    if SQUARES:
        for start in range(0, count, BLOCK):
            index = start + tl.arange(0, BLOCK).to(tl.int64)
            d = _load(x_ptr, index, count, stride) - pivot - mean
            squares += tl.sum(tl.where(index < count, d * d, 0.0), axis=0)
    return pivot, mean, squares


@triton.jit
def _inverse_std(squares, count, eps):
    degrees = tl.maximum(count - 1, 1).to(tl.float64)
    return 1.0 / (tl.sqrt(squares * reciprocal(degrees)) + eps)


@one_order
def group_advantage_kernel(
    rewards_ptr,
    cu_groups_ptr,
    out_ptr,
    P,
    M,
    stride_rewards,
    eps: tl.float64,
    BASELINE: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    BATCH_BLOCK: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    count = tl.full((), M, tl.int64)
    factor = tl.full((), 1.0, tl.float64)
    if SCALE == BATCH_STD:
        _, _, squares = _deviations(rewards_ptr, count, stride_rewards, True, BATCH_BLOCK)
        factor = _inverse_std(squares, count, eps)
    if SCALE == GPG:
        nonzero = tl.zeros((), tl.int64)
        for start in range(0, count, BATCH_BLOCK):
            index = start + tl.arange(0, BATCH_BLOCK).to(tl.int64)
            there = _load(rewards_ptr, index, count, stride_rewards) != 0.0
            nonzero += tl.sum(there.to(tl.int32), axis=0)
        factor = count.to(tl.float64) * reciprocal(tl.maximum(nonzero, 1).to(tl.float64))
    for p in range(program, P, programs):
        first, size = bounds(tl.full((), p, tl.int64), cu_groups_ptr, M, M, True)
        if size > 0:
            row_ptr = rewards_ptr + first * stride_rewards
            pivot, mean, squares = _deviations(row_ptr, size, stride_rewards, SCALE == STD, BLOCK)
            if SCALE == STD:
                factor = _inverse_std(squares, size, eps)
            scaled = factor
            if BASELINE == NO_BASELINE:
                pivot = tl.zeros((), tl.float64)
                mean = tl.zeros((), tl.float64)
            if BASELINE == LEAVE_ONE_OUT:
                others = reciprocal(tl.maximum(size - 1, 1).to(tl.float64))
                scaled = factor * tl.where(size > 1, size.to(tl.float64) * others, 1.0)
            for start in range(0, size, BLOCK):
                index = start + tl.arange(0, BLOCK).to(tl.int64)
                reward = _load(row_ptr, index, size, stride_rewards)
                tl.store(
                    out_ptr + first + index, (reward - pivot - mean) * scaled, mask=index < size
                )


def forward(rewards, cu_groups, baseline, scale, eps):
    """`fastrlhf.group_advantage` of rewards [M]; the caller checks the arguments."""
    count, prompts = rewards.shape[0], cu_groups.shape[0] - 1
    acc = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    out = torch.empty(count, dtype=acc, device=rewards.device)
    if count == 0 or prompts == 0:
        return out
    with device_guard(rewards):
        group_advantage_kernel[(min(prompts, PROGRAMS),)](
            rewards,
            cu_groups,
            out,
            prompts,
            count,
            rewards.stride(0),
            eps,
            BASELINE=baseline,
            SCALE=scale,
            BLOCK=BLOCK,
            BATCH_BLOCK=BATCH_BLOCK,
            num_warps=2,
            enable_fp_fusion=False,  # bitwise identical in every layout
        )
    return out
