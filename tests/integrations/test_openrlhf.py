"""The OpenRLHF integration: each replaced function against OpenRLHF's own, values and gradients, in fp64.

Its losses have their own file, test_openrlhf_losses.py. tests/_support/unpacked.py loads OpenRLHF's modules.
B sequences, A actions, N tokens, V vocabulary.
"""

import warnings

import pytest
import torch

from _support import small_llama
from _support.patched import compare, ragged, randint, randn
from fastrlhf.integrations import PatchError
from fastrlhf.integrations import openrlhf as integration

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STEP_DTYPES = (torch.float32, torch.float64)
UTILS, LOSS = "openrlhf.models.utils", "openrlhf.models.loss"
MAKER = "openrlhf.trainer.ppo_utils.experience_maker"
GAE = f"{MAKER}.RemoteExperienceMaker.get_advantages_and_returns"
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
each_step_dtype = pytest.mark.parametrize("dtype", STEP_DTYPES, ids=lambda d: str(d)[6:])


pytestmark = pytest.mark.usefixtures("openrlhf")


def against(name, call, *inputs, **options):
    compare(integration.patch, name, call, *inputs, **options)


# ---- logits ----


@each_dtype
@pytest.mark.parametrize("shape", [(1, 1), (300,), (5, 60)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_from_logits(openrlhf, dtype, shape, temperature):
    """The logits are divided by the temperature in place, as by OpenRLHF."""
    logits = randn(*shape, 307, seed=1, dtype=dtype, scale=4.0, train=True)
    labels = randint(307, shape, seed=2)
    scaled = []

    def call(x):
        x = x * 1.0  # not a leaf
        logprob = openrlhf[UTILS].log_probs_from_logits(x, labels, temperature=temperature)
        scaled.append(x.detach())
        return logprob

    against(f"{UTILS}.log_probs_from_logits", call, logits)
    assert torch.equal(scaled[0], scaled[2])  # unpatched, fp64, patched


@each_dtype
@pytest.mark.parametrize("shape", [(1, 1), (300,), (5, 60)])
def test_compute_entropy(openrlhf, dtype, shape):
    logits = randn(*shape, 307, seed=1, dtype=dtype, scale=4.0, train=True)
    against(f"{UTILS}.compute_entropy", lambda x: openrlhf[UTILS].compute_entropy(x), logits)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_actor(openrlhf, temperature):
    """OpenRLHF's Actor with a tiny model: log-probs of actions, entropy, every gradient."""
    model = small_llama.causal_lm()
    actor = openrlhf["openrlhf.models.actor"].Actor(model, temperature=temperature)
    actor.packing_samples = False  # OpenRLHF sets it when it loads a model by name
    ids = randint(model.config.vocab_size, (3, 12), seed=1)
    attention, actions = ragged(2, 3, 12).long(), ragged(3, 3, 6)

    def run():
        model.zero_grad()
        logprob, out = actor(
            ids, actions, attention_mask=attention, return_output=True, return_entropy=True
        )
        (logprob.sum() + 0.1 * out.entropy.sum()).backward()
        return [
            logprob.detach(),
            out.entropy.detach(),
            *(p.grad.clone() for p in model.parameters()),
        ]

    theirs = run()
    with integration.patch() as patched:
        ours = run()
    assert patched.calls == {
        f"{UTILS}.log_probs_from_logits": 1,
        f"{UTILS}.compute_entropy": 1,
    }
    for mine, original in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, original, rtol=1e-5, atol=1e-6)


# ---- advantages ----


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32, None])
@each_step_dtype
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.97, 0.8), (0.9, 0.0)])
def test_get_advantages_and_returns(openrlhf, seed, holes, mask_dtype, dtype, gamma, lam):
    """In OpenRLHF masked actions are steps with reward 0 and value 0, and get advantages."""
    mask = None if mask_dtype is None else ragged(seed, 7, 53, holes=holes).to(mask_dtype)
    values, rewards = (randn(7, 53, seed=10 * seed + i, dtype=dtype) for i in range(2))
    function = openrlhf[MAKER].RemoteExperienceMaker.get_advantages_and_returns
    if mask_dtype == torch.float32:
        mask = mask.to(dtype)

    def call(v, r):
        floats = mask is not None and mask.is_floating_point()
        return function(None, v, r, mask.to(v.dtype) if floats else mask, gamma, lam)

    def patched_call(v, r):
        maker = openrlhf[MAKER].RemoteExperienceMaker
        floats = mask is not None and mask.is_floating_point()
        masked = mask.to(v.dtype) if floats else mask
        return maker.get_advantages_and_returns(None, v, r, masked, gamma, lam)

    against(GAE, patched_call, values, rewards, original=call, truth=call)


def test_masked_actions_are_not_skipped(openrlhf):
    """The difference from verl's GAE: the value of a masked action is 0."""
    values, rewards = torch.tensor([[1.0, 2.0, 4.0]]), torch.zeros(1, 3)
    mask = torch.tensor([[True, False, True]])
    with integration.patch():
        maker = openrlhf[MAKER].RemoteExperienceMaker
        advantages, _ = maker.get_advantages_and_returns(None, values, rewards, mask, 1.0, 0.0)
    assert advantages.tolist() == [[-1.0, 4.0, -4.0]]


# ---- the patch itself ----


def test_every_reference_is_replaced_and_restored(openrlhf):
    actor, utils = openrlhf["openrlhf.models.actor"], openrlhf[UTILS]
    losses = openrlhf[LOSS]
    classes = (losses.PolicyLoss, losses.ValueLoss, losses.PairWiseLoss)

    def state():
        return [
            actor.compute_entropy,
            actor.log_probs_from_logits,
            utils.compute_entropy,
            utils.log_probs_from_logits,
            *(vars(c)["forward"] for c in classes),
            vars(openrlhf[MAKER].RemoteExperienceMaker)["get_advantages_and_returns"],
        ]

    before = state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # OpenRLHF 0.11 is in the tested range
        with integration.patch() as patched:
            assert not any(a is b for a, b in zip(state(), before, strict=True))
            assert actor.compute_entropy is utils.compute_entropy
            assert sum(" runs " in line for line in patched.report) == 6
            assert sum(" is left unchanged: " in line for line in patched.report) == 3
    assert all(a is b for a, b in zip(state(), before, strict=True))


def test_a_missing_function_is_named(openrlhf, monkeypatch):
    own = openrlhf[UTILS].compute_entropy
    monkeypatch.delattr(openrlhf[LOSS], "ValueLoss")
    with pytest.raises(
        PatchError, match=r"openrlhf 0\.11\.2 has no openrlhf.models.loss.ValueLoss"
    ):
        integration.patch()
    assert openrlhf[UTILS].compute_entropy is own
