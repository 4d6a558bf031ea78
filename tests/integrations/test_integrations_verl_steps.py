"""verl's GAE, whitening and policy loss, patched and not, on verl's own modules: values and gradients.

tests/_support/unpacked.py says how they are loaded. B sequences, T steps.
"""

import pytest
import torch

from _support import unpacked
from _support.oracles import VerlActorConfig
from _support.patched import compare, each, ragged, randn
from fastrlhf.integrations import verl as integration

STEP_DTYPES = (torch.float32, torch.float64)
FUNCTIONAL = "verl.utils.torch_functional"
ALGOS = "verl.trainer.ppo.core_algos"
POLICY = f"{ALGOS}.POLICY_LOSS_REGISTRY[fastrlhf]"
each_seed = pytest.mark.parametrize("seed", range(3))


@pytest.fixture(autouse=True)
def verl():
    with unpacked.installed(unpacked.verl()) as modules:
        yield modules
        integration.unpatch()


def against(name, call, *inputs, **options):
    compare(integration.patch, name, call, *inputs, **options)


# ---- advantages ----

MASKS = {
    "ragged": {},
    "holes": {"holes": True},
    "missing first": {"lead": True},
    "both": {"holes": True, "lead": True},
}


@each_seed
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.float32])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.97, 0.8), (0.9, 0.0)])
def test_gae(verl, seed, mask, mask_dtype, gamma, lam):
    """Masked steps too: verl writes there what it carries past them, and so does the patch."""
    keep = ragged(seed, 7, 53, **MASKS[mask], dtype=mask_dtype)
    rewards, values = (randn(7, 53, seed=10 * seed + i) for i in range(2))

    def call(r, v):
        return verl[ALGOS].compute_gae_advantage_return(r, v, keep, gamma, lam)

    against(f"{ALGOS}.compute_gae_advantage_return", call, rewards, values)


def test_gae_by_its_registry(verl):
    """The copy that verl registered at import is patched as well."""
    rewards, values, mask = randn(4, 9, seed=1), randn(4, 9, seed=2), ragged(3, 4, 9).long()
    estimators = verl[ALGOS].ADV_ESTIMATOR_REGISTRY
    before = dict(estimators)
    with integration.patch() as patched:
        estimators["gae"](
            token_level_rewards=rewards, values=values, response_mask=mask, gamma=1.0, lam=0.9
        )
    assert patched.calls == {f"{ALGOS}.compute_gae_advantage_return": 1}
    assert estimators == before


@each_seed
@pytest.mark.parametrize("mask", [*MASKS, "none"])
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("offset", [0.0, 20.0])
def test_masked_whiten(verl, seed, mask, shift_mean, offset):
    keep = torch.ones(7, 53).bool() if mask == "none" else ragged(seed, 7, 53, **MASKS[mask])
    values = randn(7, 53, seed=seed, scale=3.0) + offset
    values[~keep] *= 100.0

    def call(x):
        return verl[FUNCTIONAL].masked_whiten(x, keep, shift_mean)

    against(f"{FUNCTIONAL}.masked_whiten", call, values)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"count": 0}, "fewer than two"),
        ({"count": 1}, "fewer than two"),
        ({"dtype": torch.bfloat16}, "bfloat16"),
        ({"dtype": torch.float64}, "float64"),
        ({"weights": True}, "other numbers than 0 and 1"),
    ],
)
@pytest.mark.parametrize("function", ["gae", "whiten"])
def test_steps_that_no_op_serves(verl, change, reason, function):
    mask = ragged(1, 5, 20).long()
    if "count" in change:
        mask = torch.zeros(5, 20, dtype=torch.int64)
        mask.view(-1)[: change["count"]] = 1
    if "weights" in change:
        mask = mask * 0.5
    values = randn(5, 20, seed=2, dtype=change.get("dtype", torch.float32))

    def call():
        if function == "whiten":
            return verl[FUNCTIONAL].masked_whiten(values, mask)
        return verl[ALGOS].compute_gae_advantage_return(values, values, mask, 1.0, 0.95)[0]

    def outcome():
        try:
            return call()
        except ValueError as error:
            return str(error)

    theirs = outcome()
    with integration.patch() as patched:
        ours = outcome()
    assert ours == theirs if isinstance(ours, str) else torch.equal(ours, theirs)
    assert patched.calls == {}
    assert all(reason in said for _, said in patched.fallbacks)
    assert patched.fallbacks


# ---- policy loss ----


class Config(VerlActorConfig):
    def __init__(self, clip=0.2, dual_clip=3.0, **batch):
        super().__init__(clip, dual_clip)
        self.global_batch_info = batch


def policy_inputs(dtype=torch.float32, stack=6, spread=0.4):
    shape = (stack, 8, 40)
    old = randn(*shape, seed=1, dtype=dtype)
    new = (old + randn(*shape, seed=2, dtype=dtype, scale=spread)).requires_grad_()
    return old, new, randn(*shape, seed=3, dtype=dtype), [ragged(i, 8, 40) for i in range(stack)]


def policy_call(algos, name, mode, config, weights=None):
    def one(old, new, advantages, mask):
        function = algos.get_policy_loss_fn(name)
        loss, metrics = function(
            old_log_prob=old,
            log_prob=new,
            advantages=advantages,
            response_mask=mask,
            loss_agg_mode=mode,
            config=config,
            rollout_is_weights=weights,
        )
        loss -= 0.0 * loss.detach()  # verl's ppo_loss works on it in place
        return loss, *(torch.tensor(x, dtype=torch.float32) for x in metrics.values())

    return one


@pytest.mark.parametrize("clip", [0.1, 0.3])
@pytest.mark.parametrize("dual_clip", [1.2, 3.0])
@pytest.mark.parametrize(
    ("mode", "batch"),
    [
        ("token-mean", {}),
        ("token-mean", {"dp_size": 2, "batch_num_tokens": 500}),
        ("token-sum", {"dp_size": 4}),
    ],
)
@pytest.mark.parametrize("dtype", STEP_DTYPES)
def test_policy_loss(verl, clip, dual_clip, mode, batch, dtype):
    """The registered loss against verl's vanilla: loss, its gradient, and every metric."""
    *tensors, masks = policy_inputs(dtype)
    algos, config = verl[ALGOS], Config(clip, dual_clip, **batch)

    def vanilla(*inputs):
        return each(policy_call(algos, "vanilla", mode, config), *inputs, masks)

    def ours(*inputs):
        return each(policy_call(algos, "fastrlhf", mode, config), *inputs, masks)

    against(POLICY, ours, *tensors, host=vanilla, truth=vanilla)


def test_policy_loss_of_no_token(verl):
    tensors = (*(x[0] for x in policy_inputs()[:3]), torch.zeros(8, 40))
    theirs = policy_call(verl[ALGOS], "vanilla", "token-mean", Config())(*tensors)
    with integration.patch():
        ours = policy_call(verl[ALGOS], "fastrlhf", "token-mean", Config())(*tensors)
    for mine, host in zip(ours, theirs, strict=True):
        assert torch.equal(mine, host) or (mine.isnan() and host.isnan())


@pytest.mark.parametrize(
    ("reason", "mode", "change"),
    [
        ("seq-mean-token-mean", "seq-mean-token-mean", {}),
        ("seq-mean-token-sum-norm", "seq-mean-token-sum-norm", {}),
        ("clip ranges that differ", "token-mean", {"clip_ratio_high": 0.28}),
        ("rollout weights", "token-mean", {"weights": True}),
    ],
)
def test_policy_loss_hands_over_to_vanilla(verl, reason, mode, change):
    *tensors, masks = policy_inputs(stack=1)
    weights = torch.rand(8, 40) if change.pop("weights", False) else None
    config = Config()
    for name, value in change.items():
        setattr(config, name, value)
    inputs = [x[0].detach().requires_grad_(x.requires_grad) for x in tensors]

    def vanilla(*inputs):
        return policy_call(verl[ALGOS], "vanilla", mode, config, weights)(*inputs, masks[0])

    def ours(*inputs):
        return policy_call(verl[ALGOS], "fastrlhf", mode, config, weights)(*inputs, masks[0])

    compare(integration.patch, POLICY, ours, *inputs, host=vanilla, truth=vanilla, served=False)
    with integration.patch() as patched:
        ours(*inputs)
    ((_, said),) = patched.fallbacks
    assert reason in said


def test_policy_loss_is_there_only_while_patched(verl):
    registry = verl[ALGOS].POLICY_LOSS_REGISTRY
    before = dict(registry)
    with integration.patch():
        assert set(registry) - set(before) == {"fastrlhf"}
        kept = verl[ALGOS].get_policy_loss_fn("fastrlhf")
    assert registry == before
    with pytest.raises(ValueError, match="Unsupported loss mode: fastrlhf"):
        verl[ALGOS].get_policy_loss_fn("fastrlhf")
    # Whoever kept it has verl's own from now on.
    old, new, advantages, masks = policy_inputs(stack=1)
    arguments = (old[0], new[0], advantages[0], masks[0], "token-mean", Config())
    vanilla = verl[ALGOS].compute_policy_loss_vanilla(*arguments)
    assert torch.equal(kept(*arguments)[0], vanilla[0])
    assert kept(*arguments)[1] == vanilla[1]
