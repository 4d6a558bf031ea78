"""group_advantage: advantages of the completions of a prompt relative to each other.

Shapes: P prompts, K completions of one of them, M completions in all; rewards [M], cu_groups [P+1].
"""

import torch
from torch import Tensor

from fastrlhf import reference
from fastrlhf.ops import _checks
from fastrlhf.ops._register import choose, register

OP = "group_advantage"
# In the order of GroupBaseline and GroupScale in csrc/common/groups.h.
BASELINES = ("mean", "leave_one_out", "none")
SCALES = ("std", "batch_std", "gpg", "none")
# Methods and other trainers' words: the nearest name is another scale.
_METHODS = {"grpo": "'std'", "group": "'std'", "dr_grpo": "'none'", "rloo": "'none'"}


def group_advantage(
    rewards: Tensor,
    cu_groups: Tensor,
    *,
    baseline: str = "mean",
    scale: str = "std",
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """A_i = (r_i - b_i) * f for the rewards r of the K completions of each prompt.

    ``b_i`` of `baseline`: "mean" = ``mean(r)`` of the group; "leave_one_out" = ``(sum(r) - r_i) / (K - 1)``,
    the mean of the others; "none" = 0.

    ``f`` of `scale`: "std" = ``1 / (std(r) + eps)`` of the group; "batch_std" = the same of all M
    rewards; "gpg" = ``M / max(1, count_nonzero(rewards))``, verl's; "none" = 1.

    A std is the unbiased one of the rewards, ``sqrt(sum((r - mean)^2) / (n - 1))``, and 0 for n = 1.
    A group of one has the advantage 0, with each baseline but "none": its mean is its reward, and it
    has no others. Equal rewards have exactly the advantage 0, again but for "none", where a std of 0
    leaves ``r / eps``. All sums are fp64 and taken in a fixed order; the result is rounded once.
    Not differentiable: the output never requires grad. One advantage a completion is what the policy
    losses take, e.g. ``ppo_loss(logprob, old_logprob, advantages, cu_seqlens=...)``.

    GRPO is the default; Dr. GRPO has scale "none", RLOO baseline "leave_one_out" and scale "none",
    GPG baseline "mean" and scale "gpg", REINFORCE both "none".

    Args:
        rewards: [M], one per completion, prompt by prompt. float32, bfloat16, float16, or float64; any
            stride. A NaN reaches its group, and with "batch_std" all.
        cu_groups: int32 [P+1], rising from 0 to M: completions cu_groups[p]:cu_groups[p+1] belong
            to prompt p. As in `ranking_loss`.
        baseline, scale: see above.
        eps: above 0, added to a std.
        backend: see `fastrlhf.backends`.

    Returns:
        [M], float32 (float64 for float64 rewards).

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or value, by argument name. On a GPU the
            values of `cu_groups` are not read, which would cost a sync; if they do not rise from 0 to M
            the advantages are NaN under backend "cuda".

    Source: Shao et al. 2024 (arXiv:2402.03300) for GRPO; Liu et al. 2025 (arXiv:2503.20783) for Dr. GRPO;
        Ahmadian et al. 2024 (arXiv:2402.14740) for RLOO; Chu et al. 2025 (arXiv:2504.02546) for GPG.
        verl gives a group of one its reward as advantage (mean 0, std 1) in GRPO, GPG and the loop form of
        RLOO, and 0 in the vectorised RLOO. TRL has eps = 1e-4 and leaves NaN rewards out of mean and std;
        OpenRLHF has eps = 1e-9 and NaN for a group of one. verl's GPG divides by ``f_norm`` as well, which is
        1 there. The factor of the GPG paper is another: groups / groups whose rewards differ. For it, take scale
        "none" here and pass the factor to the loss as its `scale`.

    >>> group_advantage(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0, 2, 3]).int(), scale="none")
    tensor([ 0.5000, -0.5000,  0.0000])
    """
    _checks.float_tensor(OP, "rewards", rewards)
    if rewards.dim() != 1:
        raise ValueError(f"{OP}: rewards must have shape (M,); got {tuple(rewards.shape)}")
    cu_groups = _checks.offsets(
        OP, cu_groups, rewards.shape[0], rewards.device, name="cu_groups", axis="P"
    )
    _checks.choice(OP, "baseline", baseline, BASELINES)
    _checks.choice(OP, "scale", scale, SCALES, meant=_METHODS)
    eps = _checks.number(OP, "eps", eps, low=0, strict=True)
    chosen = choose(OP, backend, rewards)
    if chosen == "reference":
        _checks.has_values(OP, "cu_groups", cu_groups)
        with torch.no_grad():
            return reference.group_advantage(
                rewards, cu_groups, baseline=baseline, scale=scale, eps=eps
            )
    return FWD[chosen](rewards, cu_groups, BASELINES.index(baseline), SCALES.index(scale), eps)


FWD = register(
    "group_advantage(Tensor rewards, Tensor cu_groups, int baseline, int scale, float eps) -> Tensor",
    lambda rewards, *rest: _checks.empty_tokens(rewards),
    op=OP,
    triton="group_advantage.forward",
)
