"""linear_logprob and linear_cross_entropy: log-probs from hidden states, logits by chunks."""

import torch

import peers
from cases import Case
from harness import Problem


def _linear(case: Case, device: str) -> Problem:
    n, h, v = (case.sizes[k] for k in ("N", "H", "V"))
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, case.dtype)
    hidden = torch.randn(n, h, generator=generator, device=device).to(dtype)
    weight = (torch.randn(v, h, generator=generator, device=device) / h**0.5).to(dtype)
    return Problem(
        case.op,
        {
            "hidden": hidden,
            "weight": weight,
            "targets": torch.randint(v, (n,), generator=generator, device=device),
        },
        wrt=("hidden", "weight"),
        forward_bytes=(n + v) * h * hidden.element_size() + 4 * n,
        backward_bytes=2 * (n + v) * h * hidden.element_size(),
        forward_flops=2 * n * h * v,
        backward_flops=6 * n * h * v,
        floor_note="2*N*H*V FLOP forward, 6*N*H*V backward (recomputed logits, dX, dW)",
        seconds=6.0,
        peers=getattr(peers, case.op)(),
    )


PROBLEMS = {"linear_logprob": _linear, "linear_cross_entropy": _linear}
