"""fastrlhf.nn: each module is its op, with the op's names, defaults and checks."""

import copy
import inspect
import subprocess
import sys

import pytest
import torch

import fastrlhf
from _support.logit_cases import compiled, randint, randn
from _support.ppo_cases import batch
from fastrlhf import nn

# Module -> its op.
OP = {
    nn.PPOLoss: fastrlhf.ppo_loss,
    nn.LinearPPOLoss: fastrlhf.linear_ppo_loss,
    nn.LinearCrossEntropy: fastrlhf.linear_cross_entropy,
    nn.RankingLoss: fastrlhf.ranking_loss,
}
each_module = pytest.mark.parametrize("module", OP, ids=lambda m: m.__name__)
# All but the taus, which only sapo takes.
POLICY = {
    "clip": (0.1, None),
    "dual_clip": 3.0,
    "value_clip": None,
    "value_coef": 0.7,
    "entropy_coef": 0.05,
    "objective": "gspo",
    "kl_coef": 0.3,
    "kl_estimator": "k1",
    "kl_clamp": False,
    "kl_gradient": "ratio",
    "rollout_level": "sequence_mean",
    "rollout_mode": "mask",
    "rollout_bounds": (0.5, 2.0),
    "aggregation": "seq-mean-token-sum-norm",
    "value_aggregation": "token-mean",
    "length": 7.0,
}
SETTINGS = {
    nn.PPOLoss: {**POLICY, "scale": 2.0, "backend": "reference"},
    nn.LinearPPOLoss: {
        "temperature": 0.7,
        "softcap": 5.0,
        **POLICY,
        "scale": 2.0,
        "compact_rows": True,
        "workspace": "compact",
        "backend": "reference",
    },
    nn.LinearCrossEntropy: {
        "ignore_index": -1,
        "reduction": "sum",
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "return_lse": True,
        "temperature": 0.7,
        "softcap": 5.0,
        "scale": 2.0,
        "workspace": "compact",
        "backend": "reference",
    },
    nn.RankingLoss: {"margin": 0.3, "backend": "reference"},
}


def near(logprob):
    """ref_logprob and rollout_logprob; one is beyond the clamp of the KL."""
    ref_logprob = logprob + 0.3 * randn(*logprob.shape, seed=6).to(logprob)
    ref_logprob[..., 0] += 4
    rollout = logprob + 0.3 * randn(*logprob.shape, seed=7).to(logprob)
    return {"ref_logprob": ref_logprob, "rollout_logprob": rollout}


def ppo_inputs():
    tensors = batch((3, 20))
    positional = [tensors.pop(name) for name in ("logprob", "old_logprob", "advantages")]
    mask = randint(2, (3, 20), seed=5).bool()
    mask[:, 0] = True
    return positional, {**tensors, "mask": mask, **near(positional[1])}


CLASS_WEIGHT = torch.linspace(0.5, 2.0, 31)


def head_inputs():
    hidden, weight = randn(7, 12, seed=1), randn(31, 12, seed=2)
    targets = randint(31, (7,), seed=3)
    targets[2] = -1
    return [hidden, weight, targets], {"bias": randn(31, seed=4), "class_weight": CLASS_WEIGHT}


def linear_ppo_inputs():
    tensors = {name: x.float() for name, x in batch((20,)).items()}
    positional = [randn(20, 12, seed=1), randn(31, 12, seed=2), randint(31, (20,), seed=3)]
    # Near the policy's own log-probs, so that not every ratio is clipped.
    own = fastrlhf.linear_logprob(*positional, temperature=1.0)
    positional += [own + tensors["logprob"] - tensors["old_logprob"], tensors["advantages"]]
    named = {name: tensors[name] for name in ("values", "old_values", "returns")}
    mask = randint(2, (20,), seed=5).bool()
    mask[0] = True
    cu_seqlens = torch.tensor([0, 7, 12, 20], dtype=torch.int32)
    return positional, {**named, "mask": mask, "cu_seqlens": cu_seqlens, **near(positional[3])}


def ranking_inputs():
    cu_groups = torch.tensor([0, 4, 6], dtype=torch.int32)
    return [randn(6, seed=1), 1 + randint(3, (6,), seed=2), cu_groups], {}


INPUTS = {
    nn.PPOLoss: ppo_inputs,
    nn.LinearPPOLoss: linear_ppo_inputs,
    nn.LinearCrossEntropy: head_inputs,
    nn.RankingLoss: ranking_inputs,
}


def loss_metrics_gradients(function, positional, named, **settings):
    """Every number that comes out, in a fixed order."""
    count = len(positional)
    names = [*range(count), *named]
    constants = {"old_values", "returns", "class_weight", "scale", "num_tokens", "num_sequences"}
    constants |= {"ref_logprob", "rollout_logprob", "rollout_weights"}
    if "values" in named:  # a PPO loss
        constants |= {count - 2, count - 1}  # old_logprob, advantages
    tensors = [
        t.clone().requires_grad_(t.is_floating_point() and name not in constants)
        for name, t in zip(names, (*positional, *named.values()), strict=True)
    ]
    out = function(*tensors[:count], **dict(zip(named, tensors[count:], strict=True)), **settings)
    loss, metrics = out if isinstance(out, tuple) else (out, {})
    metrics = {"lse": metrics} if isinstance(metrics, torch.Tensor) else metrics
    wanted = [t for t in tensors if t.requires_grad]
    grads = torch.autograd.grad(loss.sum(), wanted, allow_unused=True)
    return [loss, *metrics.values(), *(g for g in grads if g is not None)], list(metrics)


@each_module
@pytest.mark.parametrize("given", [False, True])
def test_equals_the_op_bitwise(module, given):
    settings = dict(SETTINGS[module]) if given else {}
    positional, named = INPUTS[module]()
    if not given and module is nn.LinearCrossEntropy:
        positional[2] = positional[2].masked_fill(positional[2] == -1, -100)
    ours, names = loss_metrics_gradients(module(**settings), positional, named)
    theirs, expected = loss_metrics_gradients(OP[module], positional, named, **settings)
    assert names == expected
    assert len(ours) == len(theirs) > 1
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


policy_modules = pytest.mark.parametrize(
    "module", [nn.PPOLoss, nn.LinearPPOLoss], ids=lambda m: m.__name__
)


@policy_modules
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_tensors_and_counts_of_a_batch_reach_the_op(module, level):
    positional, named = INPUTS[module]()
    if module is nn.PPOLoss and level == "token":  # packed
        positional = [x.flatten() for x in positional]
        named = {name: x.flatten() for name, x in named.items()}
        named["cu_seqlens"] = torch.tensor([0, 20, 40, 60], dtype=torch.int32)
    settings = {"aggregation": "seq-mean-token-mean", "value_aggregation": "token-mean"}
    counts = {"num_tokens": 50.0, "num_sequences": 5.0, "scale": 0.5}
    named |= {name: torch.tensor(count, dtype=torch.float64) for name, count in counts.items()}
    if level == "sequence":
        settings |= {"objective": "sapo", "tau_pos": 0.7, "tau_neg": 1.3}
        del named["rollout_logprob"]
        named["rollout_weights"] = torch.tensor([0.5, 1.0, 2.0]).to(positional[-1])
        positional[-1] = torch.tensor([1.0, -2.0, 0.5]).to(positional[-1])
    ours, names = loss_metrics_gradients(module(**settings), positional, named)
    theirs, expected = loss_metrics_gradients(OP[module], positional, named, **settings)
    assert names == expected
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# What must be set for a setting to matter.
KL, NORM = {"kl_coef": 0.3}, {"aggregation": "seq-mean-token-sum-norm", "length": 5.0}
WITH = {
    "tau_pos": {"objective": "sapo"},
    "tau_neg": {"objective": "sapo"},
    "kl_estimator": KL,
    "kl_clamp": KL,
    "kl_gradient": KL,
    "rollout_mode": {"rollout_bounds": (0.9, 1.1)},
    "length": NORM,
    "value_aggregation": {"aggregation": "token-sum"},
    "aggregation": {"length": 7.0, "value_aggregation": NORM["aggregation"]},
}


@each_module
def test_settings_change_the_result(module):
    """Each setting reaches the op: without this, a module that dropped one would pass above."""
    positional, named = INPUTS[module]()
    values = {
        n: v
        for n, v in SETTINGS[module].items()
        if n not in ("backend", "workspace", "compact_rows", "return_lse")
    }
    extra = {}
    if module is nn.LinearCrossEntropy:
        positional[2] = positional[2].clamp(min=0)
        extra["ignore_index"] = -5
        positional[2][0] = -5
        with pytest.raises(ValueError, match="targets must be in"):
            module()(*positional, **named)
        del values["ignore_index"]
    if "objective" in values:
        values |= {"tau_pos": 0.7, "tau_neg": 1.3, "dual_clip": 1.01, "rollout_bounds": (0.9, 1.1)}
    for name, value in values.items():
        given = {**extra, **WITH.get(name, {})}
        plain, _ = loss_metrics_gradients(module(**given), positional, named)
        found, _ = loss_metrics_gradients(module(**{**given, name: value}), positional, named)
        assert not torch.equal(found[0], plain[0]), name


@each_module
def test_names_and_defaults_are_the_ops(module):
    op = inspect.signature(OP[module]).parameters
    settings = inspect.signature(module.__init__).parameters
    tensors = inspect.signature(module.forward).parameters
    settings = {n: p for n, p in settings.items() if n != "self"}
    tensors = {n: p for n, p in tensors.items() if n != "self"}
    # A temperature may be either: a number of the module's, or a tensor of the call's.
    both = {
        nn.PPOLoss: {"scale"},
        nn.LinearCrossEntropy: {"temperature", "scale"},
        nn.LinearPPOLoss: {"temperature", "scale"},
        nn.RankingLoss: {"margin"},
    }.get(module, set())
    assert settings.keys() & tensors.keys() == both
    assert settings.keys() | tensors.keys() == op.keys()
    for name, parameter in settings.items():
        assert parameter.kind is parameter.KEYWORD_ONLY
        assert parameter.default == op[name].default, name
        assert type(parameter.default) is type(op[name].default), name
    for name in tensors.keys() - both:
        assert tensors[name].default == op[name].default, name
        assert tensors[name].kind == op[name].kind, name
    order = [name for name in op if name in tensors]
    assert list(tensors) == order


@each_module
def test_repr_shows_what_is_not_the_default(module):
    shown = repr(module(**SETTINGS[module]))
    expected = ", ".join(f"{n}={v!r}" for n, v in SETTINGS[module].items())
    assert shown == f"{module.__name__}({expected})"
    assert repr(module()) == f"{module.__name__}()"


def test_repr_compares_types_first():
    """An array has no truth, and 1 is not True."""
    loss = nn.PPOLoss()
    loss.scale, loss.kl_clamp = torch.ones(2), 1
    assert repr(loss) == "PPOLoss(kl_clamp=1, scale=tensor([1., 1.]))"


def test_a_subclass_keeps_the_settings():
    class Halved(nn.PPOLoss):
        def __init__(self, clip):
            super().__init__(clip=clip / 2)

    assert repr(Halved(0.2)) == "Halved(clip=0.1)"


@each_module
def test_no_state(module):
    loss = module(**SETTINGS[module])
    assert loss.state_dict() == {}
    assert list(loss.parameters()) == list(loss.buffers()) == []
    loss.load_state_dict({})
    assert repr(copy.deepcopy(loss)) == repr(loss)
    positional, named = INPUTS[module]()
    loss, twin = module(), torch.nn.Sequential(module()).eval()[0]
    if module is nn.LinearCrossEntropy:
        positional[2] = positional[2].clamp(min=0)
    first, second = (loss_metrics_gradients(m, positional, named)[0][0] for m in (loss, twin))
    assert torch.equal(first, second)


@each_module
def test_torch_compile(module):
    positional, named = INPUTS[module]()
    if module is nn.LinearCrossEntropy:
        positional[2] = positional[2].clamp(min=0)
    loss = module()
    eager, _ = loss_metrics_gradients(loss, positional, named)
    traced, _ = loss_metrics_gradients(compiled(loss), positional, named)
    for one, other in zip(traced, eager, strict=True):
        assert torch.equal(one, other)


def test_a_changed_setting_counts():
    """Schedules of clip ranges write to the module."""
    positional, named = ppo_inputs()
    loss = nn.PPOLoss()
    loss.clip = 0.05
    expected = nn.PPOLoss(clip=0.05)
    assert repr(loss) == repr(expected)
    assert torch.equal(loss(*positional, **named).loss, expected(*positional, **named).loss)
    loss.clip = -1.0
    with pytest.raises(ValueError, match="ppo_loss: clip must be a finite number above 0; got -1"):
        loss(*positional, **named)


def test_row_temperature_goes_to_forward():
    (hidden, weight, targets), named = head_inputs()
    rows = torch.linspace(0.5, 2.0, 7)
    loss = nn.LinearCrossEntropy(ignore_index=-1, temperature=3.0)
    expected = fastrlhf.linear_cross_entropy(
        hidden, weight, targets, ignore_index=-1, temperature=rows, **named
    )
    assert torch.equal(loss(hidden, weight, targets, temperature=rows, **named), expected)
    assert loss.temperature == 3.0


def test_margins_of_prompts_go_to_forward():
    (scores, ranks, cu_groups), _ = ranking_inputs()
    margins, loss = torch.tensor([0.5, -1.0]), nn.RankingLoss(margin=3.0)
    expected = fastrlhf.ranking_loss(scores, ranks, cu_groups, margin=margins)
    assert torch.equal(loss(scores, ranks, cu_groups, margin=margins), expected)
    assert loss.margin == 3.0


@pytest.mark.parametrize(
    ("module", "settings", "error", "message"),
    [
        (nn.PPOLoss, {"clip": 0}, ValueError, "PPOLoss: clip must be a finite number above 0; got 0"),
        (nn.PPOLoss, {"clip": "0.2"}, TypeError, "PPOLoss: clip must be a number; got str"),
        (nn.PPOLoss, {"dual_clip": 1}, ValueError, "PPOLoss: dual_clip must be .* above 1; got 1"),
        (nn.PPOLoss, {"value_clip": -1}, ValueError, "PPOLoss: value_clip must be"),
        (nn.PPOLoss, {"value_coef": float("nan")}, ValueError, "PPOLoss: value_coef must be"),
        (nn.PPOLoss, {"entropy_coef": True}, TypeError, "PPOLoss: entropy_coef must be a number"),
        (nn.PPOLoss, {"objective": "gsop"}, ValueError, "PPOLoss: objective must be .* mean 'gspo'"),
        (nn.PPOLoss, {"clip": (0.2, -1)}, ValueError, r"PPOLoss: clip \(high\) must be"),
        (nn.PPOLoss, {"objective": "reinforce", "clip": 0.1}, ValueError, "PPOLoss: clip must not be given"),
        (nn.PPOLoss, {"tau_pos": 2.0}, ValueError, "PPOLoss: tau_pos must not be given with objective='ppo'"),
        (nn.PPOLoss, {"kl_estimator": "k4"}, ValueError, "PPOLoss: kl_estimator must be one of"),
        (nn.PPOLoss, {"kl_clamp": 1}, TypeError, "PPOLoss: kl_clamp must be a bool"),
        (nn.PPOLoss, {"kl_gradient": "k3"}, ValueError, "PPOLoss: kl_gradient must be one of"),
        (nn.PPOLoss, {"rollout_level": "batch"}, ValueError, "PPOLoss: rollout_level must be one of"),
        (nn.PPOLoss, {"rollout_mode": "clip"}, ValueError, "PPOLoss: rollout_mode must be one of"),
        (nn.PPOLoss, {"rollout_bounds": (2, 1)}, ValueError, "PPOLoss: rollout_bounds must rise"),
        (nn.PPOLoss, {"aggregation": "mean"}, ValueError, "PPOLoss: aggregation must be .* mean 'token-mean'"),
        (nn.PPOLoss, {"value_aggregation": 3}, ValueError, "PPOLoss: value_aggregation must be one of"),
        (nn.PPOLoss, {"length": 8}, ValueError, "PPOLoss: length must come with aggregation="),
        (nn.PPOLoss, {"scale": torch.ones(())}, TypeError, "PPOLoss: scale must be a number; got Tensor"),
        (nn.LinearPPOLoss, {"aggregation": "seq-mean-token-sum-norm"}, ValueError, "LinearPPOLoss: length must be"),
        (nn.LinearPPOLoss, {"kl_coef": "1"}, TypeError, "LinearPPOLoss: kl_coef must be a number"),
        (nn.LinearPPOLoss, {"temperature": 0}, ValueError, "LinearPPOLoss: temperature must be"),
        (nn.LinearPPOLoss, {"compact_rows": 1}, TypeError, "LinearPPOLoss: compact_rows must be a bool"),
        (nn.PPOLoss, {"backend": "gpu"}, ValueError, "PPOLoss: backend must be one of"),
        (nn.LinearCrossEntropy, {"ignore_index": 1.0}, TypeError, "ignore_index must be an int; got float"),
        (nn.LinearCrossEntropy, {"reduction": "avg"}, ValueError, "reduction must be 'mean', .*; got 'avg'"),
        (nn.LinearCrossEntropy, {"temperature": 0}, ValueError, "temperature must be"),
        (nn.LinearCrossEntropy, {"temperature": torch.ones(3)}, TypeError, "temperature must be a number"),
        (nn.LinearCrossEntropy, {"softcap": 0.0}, ValueError, "softcap must be"),
        (nn.LinearCrossEntropy, {"workspace": "big"}, ValueError, "workspace must be 'fast'"),
        (nn.LinearCrossEntropy, {"backend": None}, ValueError, "LinearCrossEntropy: backend must be"),
        (nn.LinearCrossEntropy, {"label_smoothing": 1.1}, ValueError, "label_smoothing must be in"),
        (nn.LinearCrossEntropy, {"z_loss": -1}, ValueError, "z_loss must be"),
        (nn.LinearCrossEntropy, {"return_lse": 1}, TypeError, "return_lse must be a bool"),
        (nn.RankingLoss, {"margin": "big"}, TypeError, "RankingLoss: margin must be a number"),
        (nn.RankingLoss, {"backend": "none"}, ValueError, "RankingLoss: backend must be one of"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_refused_when_the_module_is_made(module, settings, error, message):
    with pytest.raises(error, match=message):
        module(**settings)


def test_a_wrong_tensor_is_refused_by_the_op():
    positional, named = ppo_inputs()
    with pytest.raises(ValueError, match="ppo_loss: advantages must have shape"):
        nn.PPOLoss()(positional[0], positional[1], positional[2][:1], **named)
    with pytest.raises(ValueError, match="ppo_loss: returns must be given with values"):
        nn.PPOLoss()(*positional, values=positional[0])


def test_every_module_is_tested():
    assert {m.__name__ for m in OP} == set(nn.__all__)


def test_reached_by_attribute_on_first_use():
    code = (
        "import sys, fastrlhf; before = 'torch' in sys.modules;"
        "print(before, fastrlhf.nn.PPOLoss.__module__, 'nn' in dir(fastrlhf))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == ["False", "fastrlhf.nn", "True"], result.stderr
