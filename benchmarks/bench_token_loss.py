"""token_loss, clipped, forward and backward: one read and one write of the logits in all.

The upstream gradient is that of `loss.sum()`, ones: the mean is folded into `scale`.
"""

import torch

from cases import Case
from harness import Problem


def token_loss(case: Case, device: str) -> Problem:
    n, v = case.sizes["N"], case.sizes["V"]
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    logits = (2 * draw(n, v)).to(getattr(torch, case.dtype))
    targets = torch.randint(v, (n,), generator=generator, device=device)
    logprob = torch.cat(
        [torch.log_softmax(z.float(), -1)[range(len(t)), t] for z, t in chunks(logits, targets)]
    )
    size = logits.element_size()
    return Problem(
        "token_loss",
        {
            "logits": logits,
            "targets": targets,
            "advantages": draw(n),
            "old_logprob": logprob + 0.1 * draw(n),
            "scale": 1 / n,
        },
        wrt=("logits",),
        forward_bytes=n * v * size + n * (8 + 4 + 4 + 8),
        backward_bytes=n * v * size,
        floor_note="N*V read once and written once",
        ones=True,
    )


def chunks(logits, targets):
    """256 rows at a time: fp32 copies of all logits might not fit."""
    return zip(logits.split(256), targets.split(256), strict=True)


PROBLEMS = {"token_loss": token_loss}
