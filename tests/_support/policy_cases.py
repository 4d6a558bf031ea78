"""Calls of the policy losses: their settings, a pairwise covering of them, a grid, and tensors that meet each branch.

A case is a dict of settings by the names of FACTORS; `canonical` resets those that the others leave without a use.
N tokens in S sequences, V vocabulary, H hidden.
"""

import itertools
import random

import numpy as np
import torch

from _support import policy_oracle as oracle
from _support import sequence_cases

PACKED = (5, 0, 1, 9, 3, 8, 0)
KEPT = "11011 0 111101011 000 11011110".replace(" ", "")  # the fifth sequence counts no token
PADDED = ("111111", "101100", "000000", "011111")
LAYOUTS = ("packed", "packed, masked", "padded, masked", "padded")
ROLLOUTS = ("none", "weights", "weights a sequence") + tuple(
    f"{level}, {mode}"
    for level in ("token", "sequence", "sequence_mean")
    for mode in ("truncate", "mask")
)
FACTORS = {
    "objective": ("ppo", "reinforce", "cispo", "gspo", "sapo"),
    "clip": (0.2, (0.2, 0.3), (None, 0.3), (0.2, None), (None, None)),
    "dual_clip": (None, 1.5),
    "old": (True, False),
    "aggregation": ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"),
    "kl_estimator": (None, "k1", "k2", "k3", "abs"),
    "kl_clamp": (True, False),
    "kl_gradient": ("estimator", "k2", "ratio"),
    "rollout": ROLLOUTS,
    "rollout_bounds": ((None, None), (None, 1.1), (0.9, None), (0.9, 1.1)),
    "advantages": ("per token", "per sequence", "per sequence [S, 1]"),
    "layout": LAYOUTS,
    "counts": (None, "number", "tensor"),
    "values": (None, "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"),
    "taus": ((1.0, 1.05), (0.5, 2.0)),
    "scale": (1.0, -0.3, "tensor"),
    "dtype": (torch.float64, torch.float32),
}  # fmt: skip
# The full grid crosses these; the others take turns.
GRID = ("kl_estimator", "kl_clamp", "kl_gradient", "rollout")


def canonical(case):
    """The case with the first value of each setting that its other settings do not use."""
    found = dict(case)

    def reset(*names):
        for name in names:
            found[name] = FACTORS[name][0]

    if found["objective"] not in ("ppo", "gspo", "cispo"):
        reset("clip")
    if found["objective"] not in ("ppo", "gspo"):
        reset("dual_clip")
    if found["objective"] != "sapo":
        reset("taus")
    if found["kl_estimator"] is None:
        reset("kl_clamp", "kl_gradient")
    if found["kl_gradient"] == "ratio" and found["objective"] == "reinforce":
        reset("kl_gradient")
    if found["rollout"] in ROLLOUTS[:3]:
        reset("rollout_bounds")
    if found["counts"] and (found["aggregation"], found["values"]) in (
        ("token-sum", None),
        ("token-sum", "token-sum"),
    ):
        reset("counts")
    return found


def covering(seed=0):
    """A few dozen canonical cases in which each pair of values of any two factors occurs, if it can."""
    names, rng = tuple(FACTORS), random.Random(seed)

    def draw(**fixed):
        return canonical({name: fixed.get(name, rng.choice(FACTORS[name])) for name in names})

    def pairs(case):
        return set(itertools.combinations(((name, repr(case[name])) for name in names), 2))

    left = {}
    for a, b in itertools.combinations(names, 2):
        for x, y in itertools.product(FACTORS[a], FACTORS[b]):
            left[(a, repr(x)), (b, repr(y))] = {a: x, b: y}
    found = []
    while left:
        pair, fixed = next(iter(left.items()))
        drawn = [case for case in (draw(**fixed) for _ in range(40)) if pair in pairs(case)]
        if not drawn:
            del left[pair]  # it cannot occur
            continue
        best = max(drawn, key=lambda case: len(pairs(case) & left.keys()))
        found.append(best)
        for done in pairs(best):
            left.pop(done, None)
    plain = {name: values[0] for name, values in FACTORS.items()}  # PPO with another weight
    found += [
        plain | {"aggregation": how, "counts": counts, "layout": "padded, masked"}
        for how, counts in (("token-mean", None), ("token-mean", "tensor"), ("token-sum", None))
    ]
    random.Random(3).shuffle(found)  # so that every few of them have each objective
    return found


def grid(objective, aggregation):
    """Every canonical crossing of KL and rollout settings; the other factors take turns, each at its own pace."""
    rest = [n for n in FACTORS if n not in (*GRID, "objective", "aggregation", "dtype")]
    seen, found = set(), []
    rng = random.Random(f"{objective} {aggregation}")
    for crossed in itertools.product(*(FACTORS[name] for name in GRID)):
        case = dict(zip(GRID, crossed, strict=True)) | {
            "objective": objective,
            "aggregation": aggregation,
        }
        key = repr(
            sorted(
                (name, canonical(case | {n: FACTORS[n][0] for n in rest})[name]) for name in GRID
            )
        )
        if key in seen:
            continue
        seen.add(key)
        case |= {name: rng.choice(FACTORS[name]) for name in rest}
        found.append(canonical(case | {"dtype": torch.float64}))
    return found


# ---- tensors ------------------------------------------------------------------------------------


def where(case):
    """(shape of the tokens, mask or None, cu_seqlens or None, lengths)."""
    if case["layout"].startswith("packed"):
        kept = torch.tensor([k == "1" for k in KEPT])
        mask = kept if "masked" in case["layout"] else None
        return (sum(PACKED),), mask, sequence_cases.cu_of(PACKED), PACKED
    mask = torch.tensor([[k == "1" for k in row] for row in PADDED])
    return tuple(mask.shape), mask if "masked" in case["layout"] else None, None, (6,) * 4


def settings(case, dtype):
    """The op's settings that are no tensors of tokens, with values for the oracle beside them: (op's, oracle's)."""
    ours = {n: case[n] for n in ("objective", "clip", "dual_clip", "aggregation")}
    ours |= dict(zip(("tau_pos", "tau_neg"), case["taus"], strict=True))
    if case["kl_estimator"]:
        ours |= {n: case[n] for n in ("kl_estimator", "kl_clamp", "kl_gradient")} | {"kl_coef": 0.7}
    if "," in case["rollout"]:
        level, mode = case["rollout"].split(", ")
        ours |= {
            "rollout_level": level,
            "rollout_mode": mode,
            "rollout_bounds": case["rollout_bounds"],
        }
    modes = (case["aggregation"], case["values"])
    if case["values"]:
        ours |= {"value_aggregation": case["values"], "value_coef": 0.6, "value_clip": 0.25}
    if "seq-mean-token-sum-norm" in modes:
        ours["length"] = 17
    oracles = dict(ours)
    number = (lambda x: x) if case["counts"] == "number" else lambda x: torch.tensor(x, dtype=dtype)
    if case["counts"] and "token-mean" in modes:
        ours["num_tokens"], oracles["num_tokens"] = number(37.0), 37.0
    if case["counts"] and any(mode and mode.startswith("seq-") for mode in modes):
        ours["num_sequences"], oracles["num_sequences"] = number(5.0), 5.0
    tensor = case["scale"] == "tensor"
    ours["scale"] = torch.tensor(0.4, dtype=dtype) if tensor else case["scale"]
    oracles["scale"] = float(ours["scale"])
    return ours, oracles


def tokens(case, dtype, logprob=None, seed=0):
    """Tensors of a call by name; `logprob` in fp64, or drawn. Masked tokens and empty sequences hold NaN."""
    shape, mask, _, lengths = where(case)
    count, sequences = int(np.prod(shape)), len(lengths)
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(size or (count,), generator=generator, dtype=torch.float64)

    logprob = -randn().abs() - 0.2 if logprob is None else logprob.double().flatten()
    steps = torch.tensor([0.05, -0.3, 0.33, -0.7, 0.22, -0.1, 0.6, 1.0])
    of_sequence = torch.tensor([0.3, 0.0, -0.4, 0.02, 0.5, -0.35, 0.1])[:sequences].double()
    owner = torch.arange(sequences).repeat_interleave(torch.tensor(lengths))
    found = {"logprob": logprob}
    found["old_logprob"] = (
        logprob - steps[torch.arange(count) % 8] - of_sequence[owner] - 0.01 * randn()
    )
    d = 0.5 * randn()
    d[::9] = -3.5  # k3 is above 10
    found["ref_logprob"] = logprob - d
    found["rollout_logprob"] = found["old_logprob"] - 0.15 * randn()
    found["rollout_weights"] = (
        randn(sequences).exp() if "sequence" in case["rollout"] else randn().exp()
    )
    per_token = case["advantages"] == "per token"
    found["advantages"] = 0.8 * (randn() if per_token else randn(sequences)) + 0.35
    values, noise, returns = randn(), randn(), randn()
    found |= {
        "values": values,
        "old_values": values + 0.3 * noise,
        "returns": returns,
        "entropy": randn().abs(),
    }
    if not case["old"]:
        del found["old_logprob"]
        found["rollout_logprob"] = logprob - 0.15 * randn()
    if not case["kl_estimator"]:
        del found["ref_logprob"]
    if "," not in case["rollout"]:
        del found["rollout_logprob"]
    if "weights" not in case["rollout"]:
        del found["rollout_weights"]
    if not case["values"]:
        for name in ("values", "old_values", "returns"):
            del found[name]
    groups = oracle.counted(lengths, None if mask is None else mask.flatten().tolist())
    for name, x in found.items():
        if x.numel() != count:
            x = x.masked_fill(torch.tensor([not group for group in groups]), torch.nan)
            x = x.view(-1, 1) if name == "advantages" and "[S, 1]" in case["advantages"] else x
        else:
            x = x.view(shape)
            x = x if mask is None else x.masked_fill(~mask, torch.nan)
        found[name] = x.to(dtype)
    return found


def lists(tensors):
    return {name: x.double().flatten().tolist() for name, x in tensors.items()}


def groups_of(case):
    _, mask, _, lengths = where(case)
    return oracle.counted(lengths, None if mask is None else mask.flatten().tolist())


def placed(case):
    """mask and cu_seqlens, where the layout has them."""
    _, mask, cu_seqlens, _ = where(case)
    found = {"mask": mask, "cu_seqlens": cu_seqlens}
    return {name: x for name, x in found.items() if x is not None}
