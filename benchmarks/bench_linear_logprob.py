"""The linear ops: log-prob, cross entropy and policy loss from hidden states, with logits chunk by chunk.

The yardsticks are bare matrix products over the unmasked rows: the logits (for 16-bit operands on a GPU also with
fp32 logits), and three products of that size for a loss with its gradients.
"""

import torch

import blocks
import peers
from cases import POLICIES, Case
from harness import Problem, Provider, Yardstick, with_options


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
    # -11 is about the mean log-prob of random targets, so ratios fall on both sides of the clip.
    rows = {"old_logprob": draw(n) - 11, "advantages": draw(n)}
    count = n
    if case.sizes["masked"]:
        args["mask"] = torch.arange(n, device=device) * 100 >= case.sizes["masked"] * n
        count = int(args["mask"].sum())
    if case.op == "linear_ppo_loss":
        args |= {**rows, "clip": 2.0} | _policy(
            case.sizes.get("policy", 0), rows["old_logprob"], draw(n)
        )
    if case.op == "linear_token_loss":
        args |= {"loss_fn": _policy_gradient, "per_token": {"advantages": rows["advantages"]}}
    has_loss = case.op != "linear_logprob"
    product = 2 * count * h * v
    one, wide, three = _products(hidden[:count], weight)
    yardsticks = {"gemm": Yardstick(one, flops=product)}
    if wide is not None:
        yardsticks["gemm_fp32_out"] = Yardstick(wide, flops=product)
    return Problem(
        case.op,
        args,
        wrt=() if case.sizes["frozen"] else ("hidden", "weight"),
        forward_bytes=(n + v) * h * hidden.element_size() + 4 * n,
        backward_bytes=2 * (n + v) * h * hidden.element_size(),
        forward_flops=product,
        backward_flops=(2 if has_loss else 3) * product,
        roofline_note="2*N*H*V FLOP forward; backward 6*N*H*V (logits again, dX, dW), or 4*N*H*V if the op "
        "computes the loss; N: unmasked rows",
        seconds=3.0,
        ones=has_loss,  # as in loss.backward(), which returns the gradients of the forward unscaled
        # Plain heads are timed once, in the case without a mask.
        peers={}
        if case.sizes.get("policy", 0)
        else getattr(peers, case.op)(hidden, side_by_side=count == n),
        variants=_variants(case.op, args, count) if case.sizes["variants"] else {},
        yardsticks=yardsticks,
        full_yardsticks={"three_gemms": Yardstick(three, flops=3 * product)} if has_loss else {},
    )


def _policy(which, old_logprob, noise):
    """The settings of POLICIES[which], over packed sequences of 256 tokens."""
    n = len(old_logprob)
    ends = [*range(0, n, 256), n]
    sequences = {"cu_seqlens": torch.tensor(ends, dtype=torch.int32, device=noise.device)}
    sequences["aggregation"] = "seq-mean-token-mean"
    near = old_logprob + 0.1 * noise
    return {
        "": {},
        "clip pair and dual clip": {"clip": (0.2, 0.3), "dual_clip": 3.0},
        "cispo, KL, rollout": {
            **{"objective": "cispo", "clip": (None, 0.3), "ref_logprob": near, "kl_coef": 0.1},
            **{"rollout_logprob": near, "rollout_bounds": (None, 2.0), **sequences},
        },
        "gspo": {"objective": "gspo", "clip": (0.3, 0.4), **sequences},
    }[POLICIES[which]]


def _products(x, weight):
    """The bare GEMMs (x: [N, H], weight: [V, H]): logits in the operands' dtype; fp32 logits of 16-bit operands
    (None on a CPU, where torch has no such product); the three products of an update."""
    (n, _), v = x.shape, len(weight)
    logits = torch.empty(n, v, dtype=x.dtype, device=x.device)

    @torch.no_grad()
    def one():
        torch.mm(x, weight.t(), out=logits)

    @torch.no_grad()
    def wide():
        torch.mm(x, weight.t(), out_dtype=torch.float32)

    @torch.no_grad()
    def three():
        one()
        torch.mm(logits, weight)
        torch.mm(logits.t(), x)

    return one, wide if x.is_cuda and x.dtype.itemsize == 2 else None, three


def _variants(op, args, count):
    """Other ways to call ours, on CUDA and CPU only: the GEMMs do not depend on the row kernels."""
    found = {"compact": with_options(workspace="compact")}
    if "mask" in args:
        found["rows selected by the caller"] = _rows_selected
        found["num_rows"] = with_options(num_rows=count)
    elif op == "linear_ppo_loss":
        found["dW added to fp32"] = _accumulating(args["weight"])
    elif op == "linear_logprob":
        limits = blocks.device_limits(args["hidden"].device)
        for shape in blocks.shapes(*limits, (*args["hidden"].shape, len(args["weight"]))):
            found[f"blocks of {shape[0]}x{shape[1]}"] = blocks.variant(shape)
    return {name: _not_on_triton(make) for name, make in found.items()}


def _not_on_triton(make):
    return lambda op: None if op.keywords["backend"] == "triton" else make(op)


def _rows_selected(op):
    """Without a mask: the caller selects the unmasked rows, which costs a host sync on a GPU."""

    def call(mask, **args):
        index = mask.nonzero().squeeze(1)
        rows = ("hidden", "targets", "old_logprob", "advantages")
        return op(**{k: x.index_select(0, index) if k in rows else x for k, x in args.items()})

    return Provider(call, ours=True)


def _accumulating(weight):
    """A micro-batch whose forward adds dW to an fp32 gradient. The clearing is not timed."""
    into = []

    def make(op):
        def lay_out(args):
            if not into:
                into.append(torch.empty_like(weight, dtype=torch.float32))
            return {**args, "accumulate_into": into[0].zero_()}

        def read(results):
            return [*results, into[0].clone()]

        return Provider(op, ours=True, lay_out=lay_out, wrt=("hidden",), read=read)

    return make


def _policy_gradient(logprob, advantages):
    return -advantages * logprob


OPS = ("linear_logprob", "linear_cross_entropy", "linear_ppo_loss", "linear_token_loss")
PROBLEMS = dict.fromkeys(OPS, _linear)
