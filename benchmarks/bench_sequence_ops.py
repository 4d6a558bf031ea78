"""kl_reward, gae, kl_gae and masked_whiten on ragged sequences, padded with a mask or packed."""

import torch

import fastrlhf
import peers
from cases import Case
from harness import Problem, Provider, Yardstick

# Number of fp32 tensors that an op reads (unmasked tokens only) and writes (padding too).
READS = {"kl_reward": 2, "gae": 2, "kl_gae": 3, "masked_whiten": 1}
WRITES = {"kl_reward": 2, "gae": 2, "kl_gae": 4, "masked_whiten": 1}
LOOPS = {"gae": peers.python_loop_gae, "kl_gae": peers.python_loop_kl_gae}


def _sequences(case: Case, device: str) -> Problem:
    b, t, packed, whiten = (case.sizes[k] for k in ("B", "T", "packed", "whiten"))
    generator = torch.Generator(device).manual_seed(0)
    lengths = torch.randint(t // 2, t + 1, (b,), generator=generator, device=device)
    mask = torch.arange(t, device=device) < lengths[:, None]
    layout = {"mask": mask}
    if packed:
        cu_seqlens = torch.zeros(b + 1, dtype=torch.int32, device=device)
        cu_seqlens[1:] = lengths.cumsum(0)
        layout = {"cu_seqlens": cu_seqlens}

    def draw():
        x = torch.randn(b, t, generator=generator, device=device)
        return x[mask] if packed else x

    args = {
        "kl_reward": lambda: {"logprob": draw(), "ref_logprob": draw(), "beta": 0.02},
        "gae": lambda: {"rewards": draw(), "values": draw(), "whiten": bool(whiten)},
        "kl_gae": lambda: {
            "logprob": draw(),
            "ref_logprob": draw(),
            "values": draw(),
            "beta": 0.02,
            "whiten": bool(whiten),
        },
        "masked_whiten": lambda: {"x": draw()},
    }[case.op]()
    if "beta" in args:
        args["score"] = torch.randn(b, generator=generator, device=device)
    written, read = args[next(iter(args))].numel(), int(lengths.sum())
    yardsticks = {}
    if case.op == "kl_gae":  # the cost of the fusion over gae alone
        rewards, values = draw(), args["values"]
        yardsticks["gae"] = Yardstick(
            lambda: fastrlhf.gae(rewards, values, whiten=bool(whiten), **layout)
        )
    return Problem(
        case.op,
        {**args, **layout},
        forward_bytes=4 * (READS[case.op] * read + WRITES[case.op] * written)
        + (0 if packed else written),
        # Whitening adds no bytes: its second pass may read from the chip.
        roofline_note="each fp32 input read once where the mask is set, each output written once",
        # torch.compile unrolls the loop over T steps for minutes; packed sequences have dynamic shapes.
        compiled=case.op in ("kl_reward", "masked_whiten"),
        peers={"python loop": Provider(LOOPS[case.op])} if case.op in LOOPS and not packed else {},
        yardsticks=yardsticks,
    )


PROBLEMS = dict.fromkeys(READS, _sequences)
