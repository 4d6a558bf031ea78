"""What the policy losses are made of, on every backend: sums over sequences, tokens of many blocks, NaN, chunks.

The settings themselves are tested against loops in test_policy_losses.py.
"""

import math

import pytest
import torch

from _support import sequence_cases as cases
from _support.logit_cases import randint, randn
from fastrlhf import reference
from fastrlhf.ops import _policy, token_loss
from fastrlhf.ops._policy import Option, Sequence
from fastrlhf.ops.ppo_loss import ppo_loss

NAN = math.nan
LENGTHS = (5, 0, 1, 1030, 64, 300, 2)

each_backend = cases.each_backend("ppo_loss", cases.FUSED)


def sums(backend, x, y, mask, cu_seqlens):
    arguments = cases.at(backend, (x, y, mask, cu_seqlens))
    return _policy.SUMS[backend](*arguments).cpu()


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sums_over_sequences(backend, dtype, poisoned):
    """Counts and fp64 sums; masked tokens, which hold NaN here, are as if left out, in the same bits."""
    count, cu_seqlens = sum(LENGTHS), cases.cu_of(LENGTHS)
    x, y = (randn(count, seed=seed, dtype=dtype, scale=4) for seed in (0, 1))
    keep = torch.rand(count, generator=torch.Generator().manual_seed(2)) < 0.7
    keep[5] = False  # the sequence of one token
    parts = [slice(*ends) for ends in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)]
    truth = [[float(keep[part].sum()) for part in parts]]
    differences = (x.double() - y.double()).tolist()
    truth += [
        [
            math.fsum(d for d, k in zip(differences[part], keep[part], strict=True) if k)
            for part in parts
        ]
    ]
    masked = [t.masked_fill(~keep, NAN) for t in (x, y)]
    found = sums(backend, *masked, keep, cu_seqlens)
    torch.testing.assert_close(
        found, torch.tensor(truth, dtype=torch.float64), rtol=1e-13, atol=1e-12
    )
    left = cases.cu_of([int(n) for n in truth[0]])
    assert torch.equal(sums(backend, x[keep], y[keep], None, left), found)
    apart = sums(backend, torch.stack((x, x), 1)[:, 0], None, keep, cu_seqlens)  # strided
    assert torch.equal(apart, sums(backend, x, torch.zeros_like(x), keep, cu_seqlens))
    x[7] = NAN
    assert sums(backend, x, None, None, cu_seqlens)[1].isnan().tolist() == [
        length == 1030 for length in LENGTHS
    ]


@each_backend
def test_sums_over_padded_rows(backend, poisoned):
    x, y = (randn(3, 1100, seed=seed) for seed in (0, 1))
    keep = torch.rand(3, 1100, generator=torch.Generator().manual_seed(2)) < 0.7
    cu_seqlens = torch.arange(4, dtype=torch.int32) * 1100
    found = sums(backend, x, y, keep, cu_seqlens)
    flat = sums(backend, *(t.flatten() for t in (x, y, keep)), cu_seqlens)
    assert torch.equal(found, flat)
    turned = sums(backend, x.T.contiguous().T, y, torch.cat((keep, keep), 1)[:, :1100], cu_seqlens)
    assert torch.equal(turned, found)
    assert sums(backend, x[:0], None, None, cu_seqlens[:1]).shape == (2, 0)


@each_backend
@pytest.mark.parametrize("objective", ["gspo", "sapo"])
def test_tokens_of_many_blocks(backend, objective, poisoned):
    """Sequences that begin and end inside the kernels' blocks, in both layouts."""
    shape = (7, 400)
    t = {name: randn(*shape, seed=seed, dtype=torch.float64) for seed, name in enumerate(
        ("logprob", "old_logprob", "ref_logprob", "rollout_logprob", "values", "returns", "entropy")
    )}  # fmt: skip
    for name in ("old_logprob", "ref_logprob", "rollout_logprob"):
        t[name] = t["logprob"] + 0.3 * t[name]
    t["mask"] = torch.rand(shape, generator=torch.Generator().manual_seed(9)) < 0.8
    settings = {
        "objective": objective,
        "aggregation": "seq-mean-token-mean",
        "value_clip": None,
        "entropy_coef": 0.1,
    }
    settings |= {
        "kl_coef": 0.4,
        "kl_gradient": "ratio",
        "rollout_level": "sequence_mean",
        "rollout_mode": "mask",
    }
    settings |= {
        "rollout_bounds": (None, 1.01),
        "value_aggregation": "token-mean",
        "num_tokens": 900,
    }
    advantages = randn(7, seed=8, dtype=torch.float64)

    def run(function, tensors, **more):
        leaves = {n: x.clone().requires_grad_() if n in ("logprob", "values", "entropy") else x
                  for n, x in tensors.items()}  # fmt: skip
        out = function(**leaves, advantages=advantages, **settings, **more)
        grads = torch.autograd.grad(out.loss, [leaves[n] for n in ("logprob", "values", "entropy")])
        return [out.loss.detach(), *out.metrics.values()], [g.flatten() for g in grads]

    truth = run(reference.ppo_loss, t)
    call = cases.anywhere(ppo_loss)
    padded = run(call, t, backend=backend)
    packed = {n: x.flatten() for n, x in t.items()}
    packed = run(call, packed, cu_seqlens=cases.cu_of([400] * 7), backend=backend)
    for ours, theirs, same in zip(padded, truth, packed, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6 if ours[1:] == [] else 2e-7, atol=1e-12)
        assert all(map(torch.equal, ours, same))


@each_backend
def test_a_nan_reaches_the_maxima(backend):
    """A maximum over tokens one of which is NaN is NaN, in whichever block it is."""
    old, rollout = randn(2, 1500, seed=0)
    logprob, advantages = old + 0.1, torch.ones(1500)
    call = cases.anywhere(ppo_loss)
    for place in (3, 1400):
        bad = rollout.clone()
        bad[place] = NAN
        metrics = call(logprob, old, advantages, rollout_logprob=bad, backend=backend).metrics
        assert metrics["rollout_weight_max"].isnan() and metrics["ratio_max"].isfinite()
        bad = old.clone()
        bad[place] = NAN
        metrics = call(logprob, bad, advantages, rollout_weights=rollout, backend=backend).metrics
        assert metrics["ratio_max"].isnan() and metrics["rollout_weight_max"].isfinite()


# ---- rows of logits -----------------------------------------------------------------------------


def options(**given):
    """`options` of the raw ops: k1 without a clamp of its own, its weights in truncate mode, by default."""
    found = dict.fromkeys(Option, 0.0) | {
        Option.TAU_POS: 1.0,
        Option.TAU_NEG: 1.05,
        Option.KL_COEF: 0.3,
    }
    found |= {Option.ROLLOUT: 2.0, Option.ROLLOUT_LOW: 0.5, Option.ROLLOUT_HIGH: 1.2}
    return [float(x) for x in (found | {Option[n.upper()]: x for n, x in given.items()}).values()]


def rows_of(backend, count=5):
    """(logits, targets), then by name what token_loss reads a row, with three sequences."""
    logits, targets = randn(count, 11, seed=0), randint(11, (count,), 1)
    logprob = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    near = [logprob + randn(count, seed=seed, scale=0.2) for seed in (2, 3, 4)]
    t = dict(zip(("old_logprob", "ref_logprob", "rollout"), near, strict=True))
    t |= {
        "advantages": randn(count, seed=5),
        "sequences": 0.5 + randn(len(Sequence), 3, seed=6).abs(),
    }
    t["cu_seqlens"] = torch.tensor([0, 2, 2, count], dtype=torch.int32)
    return cases.at(backend, (logits, targets, t))


def forward(backend, logits, targets, t, given, mask=None):
    """(loss, logprob, grad_logprob) of raw token_loss."""
    more = [t[n] for n in ("ref_logprob", "rollout", "cu_seqlens", "sequences")]
    policy = (t["advantages"], t["old_logprob"], more, 0.9, 1.1, 1.5, given)
    return token_loss.FWD[backend](logits, targets, *policy, None, 1.0, 0.0, mask, None, 0.7)[:3]


@cases.each_backend("token_loss", cases.FUSED)
@pytest.mark.parametrize("objective", range(4))
def test_a_nan_stays_in_its_rows(backend, objective):
    """Loss and gradient of a row are NaN if anything that its loss reads is; a masked row reads nothing."""
    logits, targets, t = rows_of(backend)
    given = options(objective=objective, sequence_ratio=0)
    clean = forward(backend, logits, targets, t, given)
    assert all(x.isfinite().all() for x in clean)
    keep = torch.arange(5, device=logits.device) != 3
    for name in ("old_logprob", "ref_logprob", "rollout", "advantages"):
        bad = t | {name: t[name].masked_fill(~keep, NAN)}
        loss, _, grad = found = forward(backend, logits, targets, bad, given)
        assert loss[3].isnan() and grad[3].isnan(), name
        assert all(torch.equal(x[keep], y[keep]) for x, y in zip(found, clean, strict=True)), name
        masked = forward(backend, logits, targets, bad, given, keep)
        assert all(
            torch.equal(x, y.masked_fill(~keep, 0.0)) for x, y in zip(masked, clean, strict=True)
        )
    bad = t | {"advantages": None, "sequences": t["sequences"].clone()}
    bad["sequences"][Sequence.ADVANTAGE, 0] = NAN
    loss, _, grad = forward(backend, logits, targets, bad, given)
    assert loss.isnan().tolist() == grad.isnan().tolist() == [True] * 2 + [False] * 3


@cases.each_backend("token_loss", cases.FUSED)
@pytest.mark.parametrize("ratio", [0, 1])
def test_a_chunk_finds_the_sequences_of_its_rows(backend, ratio):
    """With FIRST_ROW, in the same bits as the rows of the whole."""
    logits, targets, t = rows_of(backend)
    rows = ("old_logprob", "ref_logprob", "rollout", "advantages")
    for absent in ((), ("advantages", "rollout")):
        t |= dict.fromkeys(absent)
        whole = forward(backend, logits, targets, t, options(sequence_ratio=ratio))
        for first, last in ((0, 1), (1, 4), (4, 5)):
            part = {n: x[first:last] if n in rows and x is not None else x for n, x in t.items()}
            given = options(sequence_ratio=ratio, first_row=first)
            found = forward(backend, logits[first:last], targets[first:last], part, given)
            assert all(torch.equal(x, y[first:last]) for x, y in zip(found, whole, strict=True))
    moved = forward(backend, logits, targets, t, options(sequence_ratio=ratio, first_row=1))
    assert (moved[0] != whole[0]).tolist() == [i == 1 for i in range(5)]  # it changes sides


@each_backend
@pytest.mark.parametrize("clamp", [True, False])
def test_a_nan_of_the_reference_policy_reaches_the_gradient(backend, clamp):
    """The clamp of k3 is a branch whose gradient is 0."""
    leaf, ref_logprob = torch.zeros(2).requires_grad_(), torch.tensor([0.0, NAN])
    given = {"ref_logprob": ref_logprob, "kl_coef": 1.0, "kl_clamp": clamp}
    out = cases.anywhere(ppo_loss)(leaf, leaf.detach(), torch.ones(2), **given, backend=backend)
    (grad,) = torch.autograd.grad(out.loss, leaf)
    assert grad[0] == -0.5 and grad[1].isnan()


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_mean"])
def test_vmap_over_what_sequences_depend_on(level):
    """Offsets, counts and log-probs of each call: no check reads them, and no row of sequences is written to."""
    count, calls = 12, 2
    logits, targets = randn(count, 5, seed=0), randint(5, (count,), 1)
    advantages, rollout = randn(3, seed=2), randn(count, seed=3, scale=0.1) - 1.5
    old_logprobs = randn(calls, count, seed=4, scale=0.1) - 1.5
    offsets = torch.tensor([[0, 3, 3, count], [0, 5, 7, count]], dtype=torch.int32)
    counts = torch.tensor([2.0, 5.0])
    given = {"rollout_logprob": rollout, "rollout_level": level}

    def losses(old_logprob, cu_seqlens, num_sequences):
        more = {"cu_seqlens": cu_seqlens, "num_sequences": num_sequences, **given}
        more |= {"aggregation": "seq-mean-token-mean"}
        rows, logprob = token_loss.token_loss(
            logits, targets, advantages, old_logprob=old_logprob, objective="gspo", **more
        )
        return rows.sum(), ppo_loss(logprob, old_logprob, advantages, objective="gspo", **more).loss

    found = torch.vmap(losses)(old_logprobs, offsets, counts)
    each = [losses(*x) for x in zip(old_logprobs, offsets, counts, strict=True)]
    for many, one in zip(found, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(many, torch.stack(one))
