"""token_logprob: the forward reads the logits once, the backward reads and writes them once."""

import torch

import peers
from cases import Case
from harness import Problem, Yardstick


def token_logprob(case: Case, device: str) -> Problem:
    n, v, entropy = (case.sizes[k] for k in ("N", "V", "entropy"))
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, case.dtype)
    logits = (2 * torch.randn(n, v, generator=generator, device=device)).to(dtype)
    targets = torch.randint(v, (n,), generator=generator, device=device)
    size, outputs = logits.element_size(), 4 * (1 + entropy)
    # Outputs and saved row statistics (row_max, shifted_lse, shifted_mean); nothing of size N*V.
    extra = 64 * n + 2**16
    return Problem(
        "token_logprob",
        {
            "logits": logits,
            "targets": targets,
            "return_entropy": bool(entropy),
        },
        wrt=("logits",),
        forward_bytes=n * v * size + n * (8 + outputs),
        backward_bytes=2 * n * v * size + n * (8 + outputs),
        roofline_note="forward reads N*V, backward reads and writes N*V",
        # Covers 50 ms of eager and the other providers; with entropy the kernel is the same.
        seconds=1.5 if entropy else 3.0,
        compiled=not entropy,
        backward_alone=True,
        peers=peers.token_logprob(logits, bool(entropy)),
        rows=lambda at: {
            "logits": logits[at],
            "targets": targets[at],
            "return_entropy": bool(entropy),
        },
        yardsticks={
            "read": Yardstick(lambda: logits.detach().sum(), bytes=n * v * size),
        },
        peak_limits={
            "forward": extra,
            "backward": n * v * size + extra,
            "forward+backward": n * v * size + extra,
        },
    )


PROBLEMS = {"token_logprob": token_logprob}
