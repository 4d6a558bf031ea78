"""token_logprob with entropy: one read of the logits forward, one read and one write backward."""

import torch

from cases import Case
from harness import Problem


def token_logprob(case: Case, device: str) -> Problem:
    n, v = case.sizes["N"], case.sizes["V"]
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, case.dtype)
    logits = (2 * torch.randn(n, v, generator=generator, device=device)).to(dtype)
    size = logits.element_size()
    return Problem(
        "token_logprob",
        {
            "logits": logits,
            "targets": torch.randint(v, (n,), generator=generator, device=device),
            "return_entropy": True,
        },
        wrt=("logits",),
        forward_bytes=n * v * size + n * (8 + 8),
        backward_bytes=2 * n * v * size + n * (8 + 8),
        floor_note="forward reads N*V, backward reads and writes N*V",
    )


PROBLEMS = {"token_logprob": token_logprob}
