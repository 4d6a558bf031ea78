"""ranking_loss in Triton: loss and gradients over the strict pairs of each prompt, in tiles; two launches.

Shapes: P prompts, M completions; scores, ranks, grad [M], cu_groups [P + 1], margins [P]; partials [2, G] fp64:
loss and number of prompts with a strict pair, of each of G programs. The second launch reduces the partials. The
gradients of the first lack the factor 1 / prompts, which the second returns as a tensor; `forward` multiplies by it.
"""

import torch
import triton
import triton.language as tl

from ._launch import device_guard
from ._math import neg_log_sigmoid
from ._moments import PROGRAMS, reciprocal
from ._sequence import bounds

BLOCK = 16  # completions along each side of a tile


@triton.jit
def _ranks(ranks_ptr, member, size, stride_ranks):
    return tl.load(ranks_ptr + member * stride_ranks, mask=member < size, other=0).to(tl.int64)


@triton.jit
def ranking_loss_fwd_kernel(
    scores_ptr,
    ranks_ptr,
    cu_groups_ptr,
    margins_ptr,
    grad_ptr,
    partials_ptr,
    P,
    M,
    stride_scores,
    stride_ranks,
    stride_margins,
    HAS_MARGINS: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    loss = tl.zeros((), tl.float64)
    prompts = tl.zeros((), tl.float64)
    for p in range(program, P, programs):
        first, size = bounds(tl.full((), p, tl.int64), cu_groups_ptr, M, M, True)
        score_row = scores_ptr + first * stride_scores
        rank_row = ranks_ptr + first * stride_ranks
        tiles = tl.cdiv(size, BLOCK)
        pairs = tl.zeros((), tl.int64)
        for i in range(0, tiles):
            mine = i * BLOCK + tl.arange(0, BLOCK)[:, None].to(tl.int64)
            my_rank = _ranks(rank_row, mine, size, stride_ranks)
            for j in range(0, tiles):
                other = j * BLOCK + tl.arange(0, BLOCK)[None, :].to(tl.int64)
                better = (mine < size) & (other < size)
                better &= my_rank < _ranks(rank_row, other, size, stride_ranks)
                pairs += tl.sum(tl.sum(better.to(tl.int32), axis=1), axis=0)
        weight = reciprocal(tl.maximum(pairs, 1).to(tl.float64))
        margin = tl.zeros((), ACC)
        if HAS_MARGINS:
            margin = tl.load(margins_ptr + tl.full((), p, tl.int64) * stride_margins)
        total = tl.zeros((), tl.float64)
        for i in range(0, tiles):
            mine = i * BLOCK + tl.arange(0, BLOCK)[:, None].to(tl.int64)
            my_rank = _ranks(rank_row, mine, size, stride_ranks)
            my_score = tl.load(score_row + mine * stride_scores, mask=mine < size, other=0.0)
            grad = tl.zeros((BLOCK,), ACC)
            for j in range(0, tiles):
                other = j * BLOCK + tl.arange(0, BLOCK)[None, :].to(tl.int64)
                rank = _ranks(rank_row, other, size, stride_ranks)
                score = tl.load(score_row + other * stride_scores, mask=other < size, other=0.0)
                both = (mine < size) & (other < size)
                better, worse = both & (my_rank < rank), both & (my_rank > rank)
                d = my_score.to(ACC) - score.to(ACC)
                pair_loss, pair_grad = neg_log_sigmoid(tl.where(better, d, -d) - margin)
                pair_loss = tl.where(better, pair_loss, 0.0)
                total += tl.sum(tl.sum(pair_loss, axis=1), axis=0).to(tl.float64)
                signed = tl.where(better, pair_grad, tl.where(worse, -pair_grad, 0.0))
                grad += tl.sum(signed, axis=1)
            if WITH_GRAD:
                member = i * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
                tl.store(grad_ptr + first + member, grad * weight.to(ACC), mask=member < size)
        loss += total * weight
        prompts += (pairs > 0).to(tl.float64)
    tl.store(partials_ptr + program, loss)
    tl.store(partials_ptr + programs + program, prompts)


@triton.jit
def ranking_loss_sum_kernel(
    partials_ptr, loss_ptr, per_prompt_ptr, programs, PROGRAMS: tl.constexpr
):
    column = tl.arange(0, PROGRAMS)
    there = column < programs
    loss = tl.sum(tl.load(partials_ptr + column, mask=there, other=0.0), axis=0)
    prompts = tl.sum(tl.load(partials_ptr + programs + column, mask=there, other=0.0), axis=0)
    per_prompt = reciprocal(tl.where(prompts < 1.0, 1.0, prompts))
    tl.store(loss_ptr, (loss * per_prompt).to(loss_ptr.dtype.element_ty))
    tl.store(per_prompt_ptr, per_prompt.to(per_prompt_ptr.dtype.element_ty))


def forward(scores, ranks, cu_groups, margins, with_grad):
    """(loss, dL/dscores) of `fastrlhf.ranking_loss`; the gradient is empty unless `with_grad`."""
    count, prompts = scores.shape[0], cu_groups.shape[0] - 1
    acc = torch.float64 if scores.dtype == torch.float64 else torch.float32
    grad = torch.empty(count if with_grad else 0, dtype=acc, device=scores.device)
    fill = torch.zeros if count == 0 else torch.empty
    loss = fill((), dtype=acc, device=scores.device)
    per_prompt = fill((), dtype=acc, device=scores.device)
    if count == 0:
        return loss, grad
    grid = (min(prompts, PROGRAMS),)
    partials = scores.new_empty((2, *grid), dtype=torch.float64)
    with device_guard(scores):
        ranking_loss_fwd_kernel[grid](
            scores,
            ranks,
            cu_groups,
            scores if margins is None else margins,
            grad,
            partials,
            prompts,
            count,
            scores.stride(0),
            ranks.stride(0),
            0 if margins is None else margins.stride(0),
            HAS_MARGINS=margins is not None,
            WITH_GRAD=with_grad,
            ACC=tl.float64 if acc == torch.float64 else tl.float32,
            BLOCK=BLOCK,
            num_warps=1,
        )
        ranking_loss_sum_kernel[(1,)](
            partials, loss, per_prompt, grid[0], PROGRAMS=PROGRAMS, num_warps=4
        )
    return loss, grad.mul_(per_prompt) if with_grad else grad
