"""linear_ppo_loss of uneven micro-batches on one, two and three processes equals one big batch.

N tokens in S sequences, packed; H hidden, V vocabulary. The caller counts once and sums the gradients: each
micro-batch's loss is divided by the counts of the whole batch, and nothing is multiplied by the world size.
"""

import functools

import pytest
import torch
import torch.distributed as dist

from _support import ranks, sequence_cases
from _support.logit_cases import randint, randn
from fastrlhf import linear_ppo_loss
from fastrlhf.ops import _backend

pytestmark = pytest.mark.skipif(
    not dist.is_gloo_available()
    or bool(_backend.unavailable_reason("linear_ppo_loss", "cpu", "cpu")),
    reason="torch without gloo, or the C++ extension is not built",
)
LENGTHS, H, V = (5, 1, 7, 0, 3, 4, 2, 6), 6, 23
N = sum(LENGTHS)
MASK = torch.arange(N) % 4 != 1  # drops the second sequence, of one token
WORLDS = (1, 2, 3)
# Sequences of each micro-batch: (rank, first, last). Ranks get other numbers of them, and of tokens.
SHARES = {
    1: [(0, 0, 3), (0, 3, 4), (0, 4, 8)],
    2: [(0, 0, 1), (0, 1, 5), (1, 5, 8)],
    3: [(0, 0, 2), (1, 2, 3), (1, 3, 4), (1, 4, 6), (2, 6, 8)],
}
SETTINGS = {
    "token-mean": {"aggregation": "token-mean", "objective": "cispo"},
    "seq-mean-token-mean": {"aggregation": "seq-mean-token-mean", "objective": "gspo"},
    "seq-mean-token-sum-norm": {
        "aggregation": "seq-mean-token-sum-norm",
        "length": 7.0,
        "value_aggregation": "token-mean",
    },
}
COUNTS = {
    "num_tokens": int(MASK.sum()),
    "num_sequences": sum(bool(mine.any()) for mine in MASK.split(LENGTHS)),
}


def batch():
    x, w = randn(N, H, seed=0, dtype=torch.float64), randn(V, H, seed=1, dtype=torch.float64)
    rows = [randn(N, seed=5 + i, dtype=torch.float64) for i in range(5)]
    rows[0] -= 4
    names = ("old_logprob", "advantages", "old_values", "returns", "ref_logprob")
    return x, w, randn(N, seed=4, dtype=torch.float64), dict(zip(names, rows, strict=True))


def gradients(name, first, last, *, into=None, **more):
    """(loss, dX, dW, dvalues) of some sequences; dX and dvalues of all N tokens."""
    x, w, values, rows = batch()
    start, stop = sum(LENGTHS[:first]), sum(LENGTHS[:last])
    mine = slice(start, stop)
    x, values = x.requires_grad_(), values.requires_grad_()
    w.requires_grad_()
    given = {key: value[mine] for key, value in rows.items()}
    settings = {**SETTINGS[name], "kl_coef": 0.1, "entropy_coef": 0.05, **more}
    out = linear_ppo_loss(
        x[mine],
        w,
        randint(V, (N,), 3)[mine],
        values=values[mine],
        mask=MASK[mine],
        cu_seqlens=sequence_cases.cu_of(LENGTHS[first:last]),
        accumulate_into=into,
        **given,
        **settings,
    )
    out.loss.backward()
    return out.loss.detach(), x.grad, into if into is not None else w.grad, values.grad


def counts(name, rank_counts=COUNTS):
    """Those counts that the settings divide by."""
    settings = SETTINGS[name]
    modes = (settings["aggregation"], settings.get("value_aggregation"))
    found = {"num_tokens": rank_counts["num_tokens"]} if "token-mean" in modes else {}
    if any(mode and mode.startswith("seq-") for mode in modes):
        found["num_sequences"] = rank_counts["num_sequences"]
    return found


def on_a_rank(rank):
    """{world and settings: what this rank has after the sums}; nothing of worlds without this rank."""
    found = {}
    for world in WORLDS:
        group = dist.new_group(list(range(world)))
        if rank >= world:
            continue
        shares = [(first, last) for r, first, last in SHARES[world] if r == rank]
        # Counted by the ranks, from their own sequences.
        local = torch.tensor(
            [
                [int(m.sum()), bool(m.any())]
                for first, last in shares
                for m in MASK.split(LENGTHS)[first:last]
            ]
        ).sum(0)
        dist.all_reduce(local, group=group)
        tokens, sequences = (int(x) for x in local)
        assert {"num_tokens": tokens, "num_sequences": sequences} == COUNTS
        for name in SETTINGS:
            into = torch.zeros(V, H, dtype=torch.float64)
            given = counts(
                name,
                {"num_tokens": torch.tensor(tokens * 1.0).double(), "num_sequences": sequences},
            )
            # As under DDP, which divides by the world size: `scale` takes that back.
            parts = [
                gradients(name, *share, into=into, scale=float(world), **given) for share in shares
            ]
            loss, dx, _, dv = (sum(column) for column in zip(*parts, strict=True))
            sums = [loss, dx, into, dv]
            for x in sums:
                dist.all_reduce(x, group=group)
                x /= world
            found[f"{world} {name}"] = sums
    return found


@functools.lru_cache
def on_all_ranks():
    return ranks.run(on_a_rank, world=max(WORLDS))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", SETTINGS)
def test_micro_batches_on_ranks_equal_one_batch(name, world):
    expected = gradients(name, 0, len(LENGTHS))
    every = [found[f"{world} {name}"] for found in on_all_ranks() if f"{world} {name}" in found]
    assert len(every) == world
    for found in every:
        for what, a, b in zip(("loss", "dX", "dW", "dv"), found, expected, strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-11, atol=1e-14, msg=lambda m, w=what: f"{w}: {m}"
            )


@pytest.mark.parametrize("name", SETTINGS)
def test_counts_of_each_micro_batch_are_not_enough(name):
    """Without the counts of the whole batch, the means of uneven micro-batches do not add up."""
    whole = gradients(name, 0, len(LENGTHS))
    parts = [gradients(name, first, last) for _, first, last in SHARES[1]]
    dw = sum(part[2] for part in parts) / len(parts)
    assert (dw - whole[2]).abs().max() > 1e-3 * whole[2].abs().max()
