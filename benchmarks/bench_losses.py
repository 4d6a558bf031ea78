"""ppo_loss with values and entropy, and ranking_loss: losses and their gradients. group_advantage: its forward."""

import torch

from cases import Case
from harness import Problem


def ppo_loss(case: Case, device: str) -> Problem:
    b, t = case.sizes["B"], case.sizes["T"]
    generator = torch.Generator(device).manual_seed(0)

    def draw(scale=1.0):
        return scale * torch.randn(b, t, generator=generator, device=device)

    logprob, values = draw() - 3, draw()
    tokens = b * t
    return Problem(
        "ppo_loss",
        {
            "logprob": logprob,
            "old_logprob": logprob + draw(0.1),
            "advantages": draw(),
            "values": values,
            "old_values": values + draw(0.1),
            "returns": values + draw(),
            "entropy": draw().abs(),
            "mask": torch.rand(b, t, generator=generator, device=device) < 0.9,
            "entropy_coef": 0.01,
        },
        wrt=("logprob", "values", "entropy"),
        forward_bytes=tokens * (7 * 4 + 1),
        backward_bytes=tokens * 3 * 4,
        roofline_note="seven fp32 inputs and the mask read once, three gradients written once",
        compiled=True,
    )


def ranking_loss(case: Case, device: str) -> Problem:
    prompts, k = case.sizes["P"], case.sizes["K"]
    generator = torch.Generator(device).manual_seed(0)
    scores = torch.randn(prompts * k, generator=generator, device=device)
    ranks = torch.randint(1, k + 1, (prompts * k,), generator=generator, device=device)
    groups = torch.arange(0, prompts * k + 1, k, dtype=torch.int32, device=device)
    return Problem(
        "ranking_loss",
        {"scores": scores, "ranks": ranks, "cu_groups": groups},
        wrt=("scores",),
        forward_bytes=prompts * k * (4 + 8),
        backward_bytes=prompts * k * 4,
        roofline_note="scores and ranks read once, one gradient written once",
    )


def group_advantage(case: Case, device: str) -> Problem:
    prompts, k = case.sizes["P"], case.sizes["K"]
    generator = torch.Generator(device).manual_seed(0)
    return Problem(
        "group_advantage",
        {
            "rewards": torch.rand(prompts * k, generator=generator, device=device),
            "cu_groups": torch.arange(0, prompts * k + 1, k, dtype=torch.int32, device=device),
        },
        forward_bytes=prompts * k * 8,
        roofline_note="rewards read once, advantages written once",
    )


PROBLEMS = {
    "ppo_loss": ppo_loss,
    "ranking_loss": ranking_loss,
    "group_advantage": group_advantage,
}
