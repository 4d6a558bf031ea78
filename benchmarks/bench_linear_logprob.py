"""The linear ops: log-probs, cross entropy and policy losses from hidden states, logits by chunks.

The yardsticks are bare matrix products: the logits of the rows that count, and for a loss with its
gradients three products of that size.
"""

import torch

import peers
from cases import Case
from harness import Problem, Yardstick


def _linear(case: Case, device: str) -> Problem:
    n, h, v = (case.sizes[k] for k in ("N", "H", "V"))
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def draw(*shape):
        return torch.randn(shape, generator=generator, device=device)

    hidden, weight = draw(n, h).to(dtype), (draw(v, h) / h**0.5).to(dtype)
    args = {
        "hidden": hidden,
        "weight": weight,
        "targets": torch.randint(v, (n,), generator=generator, device=device),
    }
    # The mean log-prob of random targets; near it the ratio lies on both sides of the clip.
    rows = {"old_logprob": draw(n) - 11, "advantages": draw(n)}
    count = n
    if case.sizes["masked"]:
        args["mask"] = torch.arange(n, device=device) * 100 >= case.sizes["masked"] * n
        count = int(args["mask"].sum())
    if case.op == "linear_ppo_loss":
        args |= {**rows, "clip": 2.0}
    if case.op == "linear_token_loss":
        args |= {"token_loss": _policy_gradient, "rows": {"advantages": rows["advantages"]}}
    knows_loss = case.op != "linear_logprob"
    chosen = hidden[:count]
    logits = torch.empty(count, v, dtype=dtype, device=device)
    product = 2 * count * h * v

    @torch.no_grad()
    def one():
        torch.mm(chosen, weight.t(), out=logits)

    @torch.no_grad()
    def three():
        one()
        torch.mm(logits, weight)
        torch.mm(logits.t(), chosen)

    variants = {"compact": ({"workspace": "compact"}, False)}

    return Problem(
        case.op,
        args,
        wrt=() if case.sizes["frozen"] else ("hidden", "weight"),
        forward_bytes=(n + v) * h * hidden.element_size() + 4 * n,
        backward_bytes=2 * (n + v) * h * hidden.element_size(),
        forward_flops=product,
        backward_flops=(2 if knows_loss else 3) * product,
        floor_note="2*N*H*V FLOP forward; backward 6*N*H*V (logits again, dX, dW), or 4*N*H*V where "
        "the op knows its loss; N: rows that count",
        seconds=3.0,
        ones=knows_loss,  # as loss.backward() asks, where the gradients of the forward stay as they are
        peers=getattr(peers, case.op)(hidden),
        # On a CPU "compact" is half of "fast", and its time stands in LOG.md.
        variants=variants if device == "cuda" else {},
        yardsticks={"gemm": Yardstick(one, flops=product)},
        full_yardsticks={"three_gemms": Yardstick(three, flops=3 * product)} if knows_loss else {},
    )


def _policy_gradient(logprob, advantages):
    return -advantages * logprob


OPS = ("linear_logprob", "linear_cross_entropy", "linear_ppo_loss", "linear_token_loss")
PROBLEMS = dict.fromkeys(OPS, _linear)
