"""The ops of sequences and of groups in plain PyTorch, a part of `fastrlhf.reference`.

Shapes: B sequences, T steps, N tokens (packed), M completions of P prompts. Sequences come packed, `[N]` with
`cu_seqlens` `[B+1]`, or padded, `[B, T]` with an optional `mask`. Leaf module: imports torch alone.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

WHITEN_EPS = 1e-8  # added to the variance
LOG_RATIO_LIMIT = 20.0  # |log rho| and |log ratio of k3| are clamped here: exp stays finite
K3_LIMIT = 10.0  # largest value of the k3 estimator


class KLGAEOutput(NamedTuple):
    """Outputs of `kl_gae`, each in the layout of the inputs and 0 where the mask is 0."""

    advantages: Tensor
    returns: Tensor
    rewards: Tensor
    kl: Tensor


def upcast(x: Tensor) -> Tensor:
    """fp64 stays; everything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


class _Padded:
    """Packed tensors as [B, T] and back; padded ones pass through. Makes the mask explicit."""

    def __init__(self, like: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None):
        self.index = None
        if cu_seqlens is None:
            self.mask = torch.ones_like(like, dtype=torch.bool) if mask is None else mask.bool()
            return
        start, length = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        steps = int(length.max()) if length.numel() else 0
        position = torch.arange(steps, device=like.device)
        self.mask = position < length.unsqueeze(1)
        self.index = (start.unsqueeze(1) + position).clamp(max=like.numel())

    def pad(self, x: Tensor) -> Tensor:
        x = upcast(x)
        if self.index is not None:
            x = F.pad(x, (0, 1))[self.index]  # one more, so that there is one to index
        return x.masked_fill(~self.mask, 0.0)

    def unpad(self, x: Tensor) -> Tensor:
        x = x.masked_fill(~self.mask, 0.0)
        return x if self.index is None else x[self.mask]


def kl_term(logprob: Tensor, ref_logprob: Tensor, estimator: str) -> Tensor:
    d = logprob - ref_logprob
    if estimator == "k1":
        return d
    if estimator == "abs":
        return d.abs()
    if estimator == "k2":
        return 0.5 * d * d
    log_ratio = (-d).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return (torch.expm1(log_ratio) - log_ratio).clamp(max=K3_LIMIT)


def kl_reward(logprob, ref_logprob, score, *, beta, estimator="k1", cu_seqlens=None, mask=None):
    """r_t = -beta * kl_t, plus score[b] on the last unmasked token of sequence b -> (rewards, kl).

    Reads 2*s (+1 for the mask), writes 8 per token.
    """
    layout = _Padded(logprob, cu_seqlens, mask)
    kl = kl_term(layout.pad(logprob), layout.pad(ref_logprob), estimator)
    # The last unmasked step is the one with no unmasked step after it.
    after = layout.mask.flip(1).cumsum(1).flip(1)
    last = layout.mask & (after == 1)
    rewards = -beta * kl
    rewards = torch.where(last, rewards + upcast(score).unsqueeze(1), rewards)
    return layout.unpad(rewards), layout.unpad(kl)


def gae(
    rewards,
    values,
    *,
    gamma=1.0,
    lam=0.95,
    cu_seqlens=None,
    mask=None,
    bootstrap=None,
    whiten=False,
):
    """A_t = r_t + gamma * V_{t+1} - V_t + gamma * lam * A_{t+1}, R_t = A_t + V_t -> (A, R).

    A masked step is carried through: t+1 is the next *unmasked* step; after the last one stands
    `bootstrap[b]` (default 0). Reads 2*s (+1), writes 8 per token; whitening 8 more.
    """
    layout = _Padded(rewards, cu_seqlens, mask)
    r, v = layout.pad(rewards), layout.pad(values)
    next_advantage = r.new_zeros(r.shape[0])
    next_value = next_advantage if bootstrap is None else bootstrap.to(r.dtype)
    steps = []
    for t in reversed(range(r.shape[1])):
        real = layout.mask[:, t]
        delta = r[:, t] + gamma * next_value - v[:, t]
        advantage = delta + (gamma * lam) * next_advantage
        steps.append(advantage)
        next_advantage = torch.where(real, advantage, next_advantage)
        next_value = torch.where(real, v[:, t], next_value)
    advantages = torch.stack(steps[::-1], dim=1) if steps else torch.zeros_like(r)
    returns = layout.unpad(advantages + v)
    advantages = layout.unpad(advantages)
    if whiten:
        advantages = masked_whiten(advantages, cu_seqlens=cu_seqlens, mask=mask)
    return advantages, returns


def kl_gae(
    logprob,
    ref_logprob,
    score,
    values,
    *,
    beta,
    estimator="k1",
    gamma=1.0,
    lam=0.95,
    whiten=False,
    cu_seqlens=None,
    mask=None,
):
    """`kl_reward`, then `gae` of its rewards. Reads 3*s (+1), writes 16 per token."""
    layout = {"cu_seqlens": cu_seqlens, "mask": mask}
    rewards, kl = kl_reward(logprob, ref_logprob, score, beta=beta, estimator=estimator, **layout)
    advantages, returns = gae(rewards, values, gamma=gamma, lam=lam, whiten=whiten, **layout)
    return KLGAEOutput(advantages, returns, rewards, kl)


def masked_whiten(x, *, cu_seqlens=None, mask=None, shift_mean=True, unbiased=True):
    """(x - mean) * rsqrt(var + 1e-8) over all unmasked elements (+ mean if not `shift_mean`).

    The unbiased variance divides by n - 1, and by 1 where n < 2. Reads s (+1) twice, writes 4.
    """
    del cu_seqlens  # a packed tensor has no padding: every element counts
    x = upcast(x)
    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool()
    count = keep.sum()
    mean = x.masked_fill(~keep, 0.0).sum() / count.clamp(min=1)
    if (
        x.numel()
    ):  # equal elements are their mean, whatever their size; the sum would round, or overflow
        smallest = x.masked_fill(~keep, torch.inf).min()
        mean = torch.where(smallest == x.masked_fill(~keep, -torch.inf).max(), smallest, mean)
    centered = (x - mean).masked_fill(~keep, 0.0)
    variance = (centered * centered).sum() / (count - int(unbiased)).clamp(min=1)
    out = centered * torch.rsqrt(variance + WHITEN_EPS)
    return (out if shift_mean else out + mean).masked_fill(~keep, 0.0)


def group_advantage(rewards, cu_groups, *, baseline="mean", scale="std", eps=1e-6):
    """(r - b) * f for each reward r of a group of K; M rewards in all.

    b: the mean of the group, the mean of its other rewards, or 0. f: 1 / (std of the group + eps),
    1 / (std of all rewards + eps), M / count_nonzero(all rewards), or 1. The stds are unbiased, and
    0 of one reward. Differences to the first reward are exactly 0 for equal rewards. Reads s, writes 4.
    """
    layout = _Padded(rewards, cu_groups, None)
    r, count = layout.pad(rewards), layout.mask.sum(1, keepdim=True)
    centered, std = _centered(r - r[:, :1], layout.mask)
    if baseline == "none":
        out = r
    elif baseline == "leave_one_out":
        out = centered * count / (count - 1).clamp(min=1)
    else:
        out = centered
    if scale == "std":
        out = out / (std + eps)
    elif scale == "batch_std":
        x = upcast(rewards)
        _, std = _centered((x - x[:1]).unsqueeze(0), torch.ones_like(x, dtype=torch.bool))
        out = out / (std + eps)
    elif scale == "gpg":
        out = out * rewards.numel() / rewards.count_nonzero().clamp(min=1)
    return layout.unpad(out)


def _centered(x, mask):
    """(x - mean, unbiased std [P, 1]) of the rows of x [P, K], over the elements with a mask."""
    x, count = x.masked_fill(~mask, 0.0), mask.sum(-1, keepdim=True)
    centered = (x - x.sum(1, keepdim=True) / count.clamp(min=1)).masked_fill(~mask, 0.0)
    return centered, (centered.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()


def ranking_loss(scores, ranks, cu_groups, *, margin=0.0):
    """Mean over prompts of mean over strict pairs of -log sigmoid(s_better - s_worse - margin).

    Ties are dropped; a prompt without a strict pair is not counted; 0 if no prompt has one.
    `margin`: a number, or [P]. Reads 8 + s, writes 4 (the gradient) per completion.
    """
    layout = _Padded(scores, cu_groups, None)
    s, rank = layout.pad(scores), layout.pad(ranks.double())  # exact to 2^53
    both = layout.mask.unsqueeze(2) & layout.mask.unsqueeze(1)
    pairs = both & (rank.unsqueeze(2) < rank.unsqueeze(1))  # [P, better, worse]
    # Masked before logsigmoid too, whose backward multiplies a NaN by the gradient 0.
    difference = s.unsqueeze(2) - s.unsqueeze(1)
    if isinstance(margin, Tensor):
        margin = margin.to(difference.dtype)[:, None, None]
    difference = (difference - margin).masked_fill(~pairs, 0.0)
    pair_loss = -F.logsigmoid(difference).masked_fill(~pairs, 0.0)
    pair_count = pairs.sum((1, 2))
    prompt_loss = pair_loss.sum((1, 2)) / pair_count.clamp(min=1)
    return prompt_loss.sum() / (pair_count > 0).sum().clamp(min=1)
