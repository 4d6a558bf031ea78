"""token_loss, the clipped policy loss or the cross entropy: one read and one write of the logits in total.

The upstream gradient is ones, as of `loss.sum()`; `scale` = 1 / N makes it a mean.
"""

import torch

import peers
from cases import Case
from harness import Problem, written_over

in_place = written_over("logits", inplace_backward=True)


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
    args = {"logits": logits, "targets": targets, "scale": 1 / n}
    policy = case.sizes.get("policy", 1)
    if policy:
        # One advantage per sequence: some peers support nothing else.
        sequences = peers.SEQUENCES if n % peers.SEQUENCES == 0 else 1
        args["advantages"] = draw(sequences).repeat_interleave(n // sequences)
        args["old_logprob"] = logprob + 0.1 * draw(n)

    def rows(at):
        return {k: x[at] if isinstance(x, torch.Tensor) else x for k, x in args.items()}

    return Problem(
        "token_loss",
        args,
        wrt=("logits",),
        forward_bytes=n * v * size + n * (8 + 8 + policy * (4 + 4)),
        backward_bytes=n * v * size,
        roofline_note="N*V read once and written once",
        ones=True,
        rows=rows,
        peers=peers.token_loss(logits, policy),
        # On a CPU the in-place gradient runs the same kernel.
        variants={"in place": in_place} if device == "cuda" else {},
    )


def chunks(logits, targets):
    """256 rows at a time, since an fp32 copy of all logits might not fit."""
    return zip(logits.split(256), targets.split(256), strict=True)


PROBLEMS = {"token_loss": token_loss}
