"""OpenRLHF's policy, value and pairwise losses on fastrlhf's ops: everything they return, and gradients, over a grid.

The grid has every combination of PolicyLoss's settings. `make test` runs some; `make nightly` runs all.
"""

import functools

import pytest
import torch

from _support.patched import (
    agree_on_grid,
    combinations,
    compare,
    each,
    outputs_and_gradients,
    ragged,
    randn,
    sample,
    served,
)
from fastrlhf.integrations import openrlhf as integration

STEP_DTYPES = (torch.float32, torch.float64)
LOSS = "openrlhf.models.loss"
POLICY, VALUE = f"{LOSS}.PolicyLoss.forward", f"{LOSS}.ValueLoss.forward"
BATCH, ACTIONS = 6, 17
each_step_dtype = pytest.mark.parametrize("dtype", STEP_DTYPES, ids=lambda d: str(d)[6:])


@pytest.fixture(autouse=True)
def losses(openrlhf):
    return openrlhf[LOSS]


def against(name, call, *inputs, **options):
    compare(integration.patch, name, call, *inputs, **options)


# ---- the grid ----


def empty_rows():
    keep = ragged(4, BATCH, ACTIONS)
    keep[1:3] = 0
    return keep


MASKS = {
    "holes": ragged(1, BATCH, ACTIONS, holes=True),
    "missing first": ragged(2, BATCH, ACTIONS, holes=True, lead=True, dtype=torch.float32),
    "empty rows": empty_rows(),
}
MEANS = ({}, {"token_level_loss": False}, {"policy_loss_type": "gspo"})
CLIPS = ((0.2, 0.2), (0.2, 0.28), (0.3, 0.1))
DUAL_CLIPS = (None, 1.2, 3.0)
# Level, mode, gate, thresholds that some units pass and others do not.
CORRECTIONS = (
    ("off", "mask", "ratio", (0.5, 5.0)),
    ("token", "clip", "ratio", (0.8, 1.2)),
    ("token", "clip", "ratio", (0.0, float("inf"))),
    ("token", "mask", "ratio", (0.8, 1.2)),
    ("token", "mask", "binary_kl", (0.0, 0.003)),
    ("token", "mask", "tv", (0.0, 0.03)),
    ("seq", "mask", "ratio", (0.95, 1.05)),
    ("seq", "mask", "binary_kl", (0.0, 0.02)),
    ("seq", "mask", "tv", (0.0, 0.05)),
)
BATCHES = (
    {},
    {"dp_size": 2, "batch_num_tokens": 70, "global_batch_size": 9.0},
    # As OpenRLHF's trainer passes them.
    {"dp_size": 1, "batch_num_tokens": torch.tensor(70.0), "global_batch_size": torch.tensor(9.0)},
)


def policy_grid():
    shared = {"clip": CLIPS, "dual_clip": DUAL_CLIPS, "correction": CORRECTIONS}
    masked = combinations(mean=MEANS, mask=tuple(MASKS), batch=BATCHES, **shared)
    # OpenRLHF's other means need a mask.
    return masked + combinations(mean=({},), mask=(None,), batch=({},), **shared)


def draw(dtype, *shape):
    """(old log-probs, log-probs with ratios on both sides of every clip, advantages, log-probs of the rollout)."""
    old = -0.3 - 2 * randn(*shape, seed=1, dtype=dtype).abs()
    new = (old + randn(*shape, seed=2, dtype=dtype, scale=0.6)).requires_grad_()
    return old, new, randn(*shape, seed=3, dtype=dtype), old + randn(*shape, seed=4, scale=0.3)


def policy_call(losses, setting, dtype):
    """{name: what PolicyLoss returns, or the gradient}."""
    level, mode, gate, threshold = setting["correction"]
    loss = losses.PolicyLoss(
        *setting["clip"],
        setting["dual_clip"],
        is_correction_level=level,
        is_correction_mode=mode,
        is_correction_gating=gate,
        is_correction_threshold=threshold,
        **setting["mean"],
    )
    old, new, advantages, rollout = draw(dtype, BATCH, ACTIONS)
    mask = None if setting["mask"] is None else MASKS[setting["mask"]]
    value, *others = loss(
        new,
        old,
        advantages,
        mask,
        None if level == "off" else rollout.to(dtype),
        **setting["batch"],
    )
    (grad,) = torch.autograd.grad(value, new)
    names = ("clip_ratio", "ppo_kl", "vllm_kl", "is_filter_ratio")
    return {"loss": value.detach(), "gradient": grad, **dict(zip(names, others, strict=True))}


def value_grid():
    clips = (None, 0.2, 0.5)
    masked = combinations(mean=MEANS[:2], mask=tuple(MASKS), batch=BATCHES, clip=clips)
    return masked + combinations(mean=({},), mask=(None,), batch=({},), clip=clips)


def value_call(losses, setting, dtype):
    old, new, returns, _ = draw(dtype, BATCH, ACTIONS)
    mask = None if setting["mask"] is None else MASKS[setting["mask"]]
    loss = losses.ValueLoss(setting["clip"], **setting["mean"])
    value = loss(new, old, returns, mask, **setting["batch"])
    (grad,) = torch.autograd.grad(value, new)
    return {"loss": value.detach(), "gradient": grad}


def run_grid(losses, name, call, settings):
    agree_on_grid(integration, name, settings, functools.partial(call, losses))


def test_some_policy_losses(losses):
    run_grid(losses, POLICY, policy_call, sample(policy_grid(), 60))


def test_some_value_losses(losses):
    run_grid(losses, VALUE, value_call, sample(value_grid(), 16))


@pytest.mark.nightly
def test_all_policy_losses(losses):
    run_grid(losses, POLICY, policy_call, policy_grid())


@pytest.mark.nightly
def test_all_value_losses(losses):
    run_grid(losses, VALUE, value_call, value_grid())


def test_gates_let_some_units_pass(losses):
    """Otherwise the grid would not tell a gate from none, or from one that drops everything."""
    for correction in CORRECTIONS[1:]:
        setting = {"clip": (0.2, 0.2), "dual_clip": None, "correction": correction}
        setting |= {"mean": {}, "mask": "holes", "batch": {}}
        share = policy_call(losses, setting, torch.float64)["is_filter_ratio"]
        assert (0.1 < share < 0.9) or correction[3] == (0.0, float("inf"))


# ---- accuracy in fp32, over some hundred rows ----


def stacked(dtype, stack=6):
    old, new, advantages, _ = draw(dtype, stack, 8, 40)
    return new, old, advantages, [ragged(i, 8, 40) for i in range(stack)]


@each_step_dtype
@pytest.mark.parametrize("mean", MEANS, ids=("tokens", "sequences", "gspo"))
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32])
def test_policy_loss(losses, dtype, mean, mask_dtype):
    *tensors, masks = stacked(dtype)
    loss = losses.PolicyLoss(0.2, 0.28, 1.5, **mean)

    def one(new, old, advantages, mask):
        out = loss(new, old, advantages, mask.to(mask_dtype))
        assert out[3:] == (None, None)
        return out[:3]

    against(POLICY, lambda *x: each(one, *x, masks), *tensors)


@each_step_dtype
@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("mask_dtype", [torch.bool, None])
def test_value_loss(losses, dtype, clip, mask_dtype):
    *tensors, masks = stacked(dtype)
    loss = losses.ValueLoss(clip)

    def one(values, old, returns, mask):
        return (loss(values, old, returns, None if mask_dtype is None else mask),)

    against(VALUE, lambda *x: each(one, *x, masks), *tensors)


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("with_margin", [False, True])
@pytest.mark.parametrize("shape", [(9,), (9, 1)])
def test_pairwise_loss(losses, dtype, with_margin, shape):
    chosen, rejected = (
        randn(8, *shape, seed=i, dtype=dtype, scale=3.0, train=True) for i in (1, 2)
    )
    margin = randn(8, *shape, seed=3, dtype=dtype).abs()
    loss = losses.PairWiseLoss()

    def one(c, r, m):
        return (loss(c, r, m) if with_margin else loss(c, r),)

    against(f"{LOSS}.PairWiseLoss.forward", lambda *x: each(one, *x), chosen, rejected, margin)


def test_pairwise_loss_of_an_existing_object(losses):
    loss = losses.PairWiseLoss()
    scores = randn(5, seed=1), randn(5, seed=2)
    theirs = outputs_and_gradients(loss, *scores)
    with served(integration, f"{LOSS}.PairWiseLoss.forward"):
        ours = outputs_and_gradients(loss, *scores)
    torch.testing.assert_close(ours, theirs)


# ---- no token, one ratio a sequence, unserved calls ----


@pytest.mark.parametrize("mean", MEANS, ids=("tokens", "sequences", "gspo"))
def test_losses_of_no_token(losses, mean):
    """NaN as from OpenRLHF, with gradients of 0 where OpenRLHF's are NaN; 0 as the share of a batch."""
    new, old, advantages, _ = (x[0] for x in stacked(torch.float32))
    none = torch.zeros(8, 40, dtype=torch.bool)

    def run(batch):
        policy = losses.PolicyLoss(**mean)(new, old, advantages, none, **batch)
        value = losses.ValueLoss(0.2, token_level_loss=mean == {})(
            new, old, advantages, none, **batch
        )
        grads = [torch.autograd.grad(loss, new)[0] for loss in (policy[0], value)]
        return [x.detach() for x in (*policy[:3], value)], grads

    for batch in BATCHES[:2]:
        theirs, _ = run(batch)
        with integration.patch() as patched:
            ours, grads = run(batch)
        assert patched.fallbacks == {}
        assert bool(theirs[0].isnan()) == (batch == {})
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        assert not any(g.any() for g in grads)


UNSERVED = {
    "another shape or device": lambda m, x: m.PolicyLoss()(*x[:2], x[2][:, :1], x[3]),
    "bfloat16": lambda m, x: m.PolicyLoss()(*(t.bfloat16() for t in x[:3]), x[3]),
    "clip_eps_low is not above 0": lambda m, x: m.PolicyLoss(0.0, 0.2)(*x),
    "is_correction_threshold falls": lambda m, x: m.PolicyLoss(
        is_correction_level="token", is_correction_threshold=(5.0, 0.5)
    )(*x, x[1] * 0.9),
    "the number of tokens is not above 0": lambda m, x: m.PolicyLoss()(
        *x, batch_num_tokens=torch.tensor(0.0)
    ),
    "clip_eps is not above 0": lambda m, x: m.ValueLoss(0.0)(*x),
    "require grad": lambda m, x: m.ValueLoss(0.2)(x[1], x[1], x[0], x[3]),
    "with other numbers than 0 and 1": lambda m, x: m.ValueLoss(0.2)(*x[:3], 0.5 * x[3]),
    "margins of another shape or device": lambda m, x: m.PairWiseLoss()(
        x[0][:, 0], x[1][:, 0], x[2][:1, 0]
    ),
}


@pytest.mark.parametrize("reason", UNSERVED)
def test_unsupported_calls_run_openrlhfs_function(losses, reason):
    *tensors, masks = stacked(torch.float32)
    inputs = [x[0].detach().requires_grad_(x.requires_grad) for x in tensors] + [masks[0]]

    def run():
        out = UNSERVED[reason](losses, inputs)
        out = out if isinstance(out, tuple) else (out,)
        return [x.detach() for x in out if x is not None]

    theirs = run()
    with integration.patch() as patched:
        ours = run()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert patched.calls == {}
    ((_, logged),) = patched.fallbacks
    assert reason in logged


ERRORS = {
    "no action_mask": lambda m, x: m.PolicyLoss(token_level_loss=False)(*x[:3]),
    "no action_mask, an error": lambda m, x: m.PolicyLoss(policy_loss_type="gspo")(*x[:3]),
    "an error in OpenRLHF": lambda m, x: m.PolicyLoss()(*x[:3], batch_num_tokens=70),
    "rollout_log_probs of NoneType": lambda m, x: m.PolicyLoss(is_correction_level="token")(*x),
    "policy_loss_type='dpo'": lambda m, x: m.PolicyLoss(policy_loss_type="dpo")(*x),
}


@pytest.mark.parametrize("reason", ERRORS)
def test_errors_stay_openrlhfs(losses, reason):
    *tensors, masks = stacked(torch.float32)
    inputs = [x[0] for x in tensors] + [masks[0]]

    def error():
        with pytest.raises((TypeError, AttributeError, ValueError)) as caught:
            ERRORS[reason](losses, inputs)
        return type(caught.value), str(caught.value)

    theirs = error()
    with integration.patch() as patched:
        assert error() == theirs
    ((_, logged),) = patched.fallbacks
    assert reason in logged
