"""verl's policy and value losses on fastrlhf's ops: value, gradient and metrics against verl's own over a grid.

The grid has every combination of verl's settings: 2,160 of the vanilla loss, and those of its axes that another loss
reads. `make test` runs some of each; `make nightly` runs all.
"""

import functools

import pytest
import torch

from _support.oracles import VerlActorConfig
from _support.patched import (
    agree_on_grid,
    combinations,
    compare,
    each,
    ragged,
    randn,
    sample,
    served,
)
from fastrlhf.integrations import verl as integration

STEP_DTYPES = (torch.float32, torch.float64)
ALGOS = "verl.trainer.ppo.core_algos"
VALUE = f"{ALGOS}.compute_value_loss"
# Name in verl's registry -> the name under which the patch serves it.
LOSSES = {"vanilla": "fastrlhf", "gspo": "gspo", "sapo": "sapo", "gpg": "gpg", "cispo": "cispo"}
BATCH, STEPS = 6, 17


@pytest.fixture(autouse=True)
def algos(verl, monkeypatch):
    monkeypatch.setattr(verl[ALGOS], "ActorConfig", VerlActorConfig)  # a stub, which verl asserts
    return verl[ALGOS]


def entry(loss):
    return f"{ALGOS}.POLICY_LOSS_REGISTRY[{LOSSES[loss]}]"


# ---- the grid ----


def empty_rows(dtype):
    keep = ragged(4, BATCH, STEPS, dtype=dtype)
    keep[1:3] = 0
    return keep


MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)
MASKS = {
    "full": torch.ones(BATCH, STEPS, dtype=torch.bool),
    "holes": ragged(1, BATCH, STEPS, holes=True, dtype=torch.int64),
    "missing first": ragged(2, BATCH, STEPS, holes=True, lead=True, dtype=torch.float32),
    "empty rows": empty_rows(torch.bool),
}
CLIPS = ((0.2, 0.2), (0.2, 0.28), (0.3, 0.1), (None, None))
DUAL_CLIPS = (1.2, 3.0, 10.0)
TAUS = ((1.0, 1.05), (2.0, 0.5))
WEIGHTS = (None, "token", "sequence")
SHARE = {"dp_size": 2, "batch_num_tokens": 70, "global_batch_size": 9}
BATCHES = ({}, SHARE, SHARE | {"loss_scale_factor": 37})
READS = {
    "vanilla": {"clip": CLIPS, "dual_clip": DUAL_CLIPS},
    "gspo": {"clip": CLIPS},
    "sapo": {"taus": TAUS},
    "gpg": {},
    "cispo": {"clip": CLIPS},
}


def grid(loss):
    """All settings of a loss."""
    return combinations(mode=MODES, mask=MASKS, weights=WEIGHTS, batch=BATCHES, **READS[loss])


class Config(VerlActorConfig):
    def __init__(self, clip=(None, None), dual_clip=3.0, taus=(1.0, 1.05), batch=None, **_):
        super().__init__(0.15, dual_clip)
        self.clip_ratio_low, self.clip_ratio_high = clip
        self.tau_pos, self.tau_neg = taus
        self.global_batch_info = batch or {}


def draw(dtype, *shape):
    """(old log-probs, log-probs with ratios on both sides of every clip, advantages, weights)."""
    old = randn(*shape, seed=1, dtype=dtype) - 2.0
    new = (old + randn(*shape, seed=2, dtype=dtype, scale=0.6)).requires_grad_()
    return old, new, randn(*shape, seed=3, dtype=dtype), randn(*shape, seed=4, dtype=dtype).exp()


def policy_call(algos, loss, setting, dtype):
    """{"loss", "gradient", metrics...} of one setting."""
    old, new, advantages, weights = draw(dtype, BATCH, STEPS)
    weights = {None: None, "token": weights, "sequence": weights[:, :1]}[setting["weights"]]
    value, metrics = algos.get_policy_loss_fn(loss)(
        old_log_prob=old,
        log_prob=new,
        advantages=advantages,
        response_mask=MASKS[setting["mask"]],
        loss_agg_mode=setting["mode"],
        config=Config(**setting),
        rollout_is_weights=weights,
    )
    value -= 0.0 * value.detach()  # verl's ppo_loss subtracts the entropy in place
    (grad,) = torch.autograd.grad(value, new)
    assert all(type(x) is float for x in metrics.values())
    return {"loss": value.detach(), "gradient": grad, **metrics}


def run_grid(algos, loss, settings):
    ours, theirs = (functools.partial(policy_call, algos, n) for n in (LOSSES[loss], loss))
    agree_on_grid(integration, entry(loss), settings, ours, theirs)


@pytest.mark.parametrize("loss", LOSSES)
def test_some_policy_losses(algos, loss):
    run_grid(algos, loss, sample(grid(loss), 24))


@pytest.mark.nightly
@pytest.mark.parametrize("loss", LOSSES)
def test_all_policy_losses(algos, loss):
    run_grid(algos, loss, grid(loss))


def value_grid():
    return combinations(mode=MODES, mask=MASKS, batch=BATCHES, clip=(0.1, 0.5, 100.0))


def value_call(algos, setting, dtype):
    old, new, returns, _ = draw(dtype, BATCH, STEPS)
    mask, mode = MASKS[setting["mask"]], setting["mode"]
    loss, clipped = algos.compute_value_loss(
        new, returns, old, mask, setting["clip"], mode, **setting["batch"]
    )
    (grad,) = torch.autograd.grad(loss, new)
    return {"loss": loss.detach(), "gradient": grad, "clip fraction": clipped}


def test_some_value_losses(algos):
    call = functools.partial(value_call, algos)
    agree_on_grid(integration, VALUE, sample(value_grid(), 24), call)


@pytest.mark.nightly
def test_all_value_losses(algos):
    agree_on_grid(integration, VALUE, value_grid(), functools.partial(value_call, algos))


# ---- accuracy in fp32, over some hundred rows ----


def stacked(dtype, stack=6):
    old, new, advantages, weights = draw(dtype, stack, 8, 40)
    return new, old, advantages, weights, [ragged(i, 8, 40) for i in range(stack)]


def one_of(algos, loss, mode):
    def call(new, old, advantages, weights, mask):
        config = Config(clip=(0.2, 0.28), dual_clip=1.5)
        value, metrics = algos.get_policy_loss_fn(loss)(
            old, new, advantages, mask, mode, config, weights
        )
        return value, *(torch.tensor(x, dtype=torch.float32) for x in metrics.values())

    return call


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", STEP_DTYPES)
def test_policy_loss(algos, loss, mode, dtype):
    *tensors, masks = stacked(dtype)

    def theirs(*inputs):
        return each(one_of(algos, loss, mode), *inputs, masks)

    def ours(*inputs):
        return each(one_of(algos, LOSSES[loss], mode), *inputs, masks)

    compare(integration.patch, entry(loss), ours, *tensors, original=theirs, truth=theirs)


# ---- no token, unserved calls, other losses ----


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("mode", MODES)
def test_policy_loss_of_no_token(algos, loss, mode):
    """verl's mean over no token is NaN. Its gradient is 0, which a step with other micro-batches needs."""
    setting = {"mode": mode, "mask": "none", "weights": None}
    mask = torch.zeros(BATCH, STEPS)

    def run(name):
        old, new, advantages, _ = draw(torch.float32, BATCH, STEPS)
        value, metrics = algos.get_policy_loss_fn(name)(
            old, new, advantages, mask, mode, Config(**setting)
        )
        return [value.detach(), *torch.autograd.grad(value, new)], metrics

    (value, grad), metrics = run(loss)
    with served(integration, entry(loss)):
        (our_value, our_grad), our_metrics = run(LOSSES[loss])
    torch.testing.assert_close(our_value, value, equal_nan=True)
    assert our_metrics == metrics
    assert not our_grad.any()
    assert not grad.any()


@pytest.mark.parametrize("loss", LOSSES)
def test_ratios_at_verls_clamps(algos, loss):
    """Both clamp log-ratios at 20 nats; for gspo verl clamps its mean at 10 from above only, and we at +-20."""
    old, new, advantages, _ = draw(torch.float64, BATCH, STEPS)
    old = old + (
        torch.linspace(-10, 30, STEPS) if loss == "gspo" else torch.linspace(-60, 60, STEPS)
    )

    def run(name):
        value, metrics = algos.get_policy_loss_fn(name)(
            old, new, advantages, MASKS["holes"], "token-mean", Config(clip=(0.9, 1e9))
        )
        return [value.detach(), *torch.autograd.grad(value, new)], metrics

    theirs, metrics = run(loss)
    with served(integration, entry(loss)):
        ours, our_metrics = run(LOSSES[loss])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    assert our_metrics == pytest.approx(metrics)


def arguments(stack=1):
    new, old, advantages, weights, (mask,) = stacked(torch.float32, stack)
    names = ("old_log_prob", "log_prob", "advantages", "response_mask", "rollout_is_weights")
    new = new[0].detach().requires_grad_()
    given = dict(zip(names, (old[0], new, advantages[0], mask, weights[0]), strict=True))
    return given | {"loss_agg_mode": "token-mean", "config": Config(clip=(0.2, 0.28))}


UNSERVED = {
    "bfloat16": {"log_prob": torch.bfloat16},
    "advantages of torch.float64": {"advantages": torch.float64},
    "with other numbers than 0 and 1": {"response_mask": torch.full((8, 40), 0.5)},
    "rollout_is_weights of another shape": {"rollout_is_weights": torch.ones(40)},
    "rollout_is_weights that require grad": {
        "rollout_is_weights": torch.ones(8, 40, requires_grad=True)
    },
    "clip_ratio_low is not above 0": {"config": Config(clip=(0.0, 0.2))},
    "clip_ratio_high is not above 0": {"config": Config(clip=(0.2, float("inf")))},
    "the number of tokens is not above 0": {"config": Config(batch={"batch_num_tokens": 0})},
}


@pytest.mark.parametrize("loss", ["vanilla", "gspo"])
@pytest.mark.parametrize("reason", UNSERVED)
def test_unsupported_calls_run_verls_function(algos, loss, reason):
    given = arguments()
    for name, value in UNSERVED[reason].items():
        given[name] = given[name].detach().to(value) if isinstance(value, torch.dtype) else value

    def run(name):
        value, metrics = algos.get_policy_loss_fn(name)(**given)
        return [value.detach(), torch.tensor(list(metrics.values()))]

    theirs = run(loss)
    with integration.patch() as patched:
        ours = run(LOSSES[loss])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert patched.calls == {}
    (((where, logged), _),) = patched.fallbacks.items()
    assert where == entry(loss)
    assert reason in logged


ERRORS = {
    "no config": {"config": None},
    "loss_agg_mode='mean'": {"loss_agg_mode": "mean"},
    "dp_size without the number": {"config": Config(batch={"dp_size": 2})},
    "clip_ratio_c is not above 1": {"config": Config(dual_clip=1.0)},
    "the batch info tokens": {"config": Config(batch={"tokens": 2})},
}


@pytest.mark.parametrize("reason", ERRORS)
def test_errors_stay_verls(algos, reason):
    def error(name):
        with pytest.raises((AssertionError, TypeError, ValueError)) as caught:
            algos.get_policy_loss_fn(name)(**arguments() | ERRORS[reason])
        return type(caught.value), str(caught.value)

    theirs = error("vanilla")
    with integration.patch() as patched:
        assert error("fastrlhf") == theirs
    ((_, logged),) = patched.fallbacks
    assert reason in logged


def test_unsupported_values_run_verls_function(algos):
    old, new, returns, _ = draw(torch.float32, BATCH, STEPS)
    given = (new, returns, old, MASKS["holes"], 0.0)
    theirs = algos.compute_value_loss(*given)
    with integration.patch() as patched:
        ours = algos.compute_value_loss(*given)
    assert all(map(torch.equal, ours, theirs))
    assert patched.fallbacks == {(VALUE, "cliprange_value is not above 0 and finite"): 1}


def test_every_policy_loss_is_served_or_named(algos):
    """Of verl's registry; an entry that neither has is new in verl."""
    registry = algos.POLICY_LOSS_REGISTRY
    before = dict(registry)
    with integration.patch() as patched:
        changed = {name for name in registry if registry[name] is not before.get(name)}
        assert changed == set(LOSSES.values())
        assert algos.compute_policy_loss_gspo is registry["gspo"]  # references in modules too
        for name in set(before) - changed:
            function = before[name].__name__
            (line,) = (line for line in patched.report if f".{function} is left" in line)
            assert len(line.split(": ", 1)[1]) > 20
    assert registry == before
    assert algos.compute_policy_loss_gspo is registry["gspo"]


def test_the_added_loss_exists_only_while_patched(algos):
    with integration.patch():
        kept = algos.get_policy_loss_fn("fastrlhf")
    with pytest.raises(ValueError, match="Unsupported loss mode: fastrlhf"):
        algos.get_policy_loss_fn("fastrlhf")
    # A reference kept by user code now runs verl's vanilla loss.
    theirs, metrics = algos.compute_policy_loss_vanilla(**arguments())
    ours, our_metrics = kept(**arguments())
    assert torch.equal(ours, theirs)
    assert our_metrics == metrics
