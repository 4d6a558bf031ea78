"""TRL's GRPO loss on `ppo_loss`: loss, gradients and metrics against TRL's own `_compute_loss`, in fp64."""

import itertools
import os
import tempfile

import pytest
import torch

trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402

from _support import ranks, small_llama  # noqa: E402
from _support.patched import assert_no_worse, ragged, randn  # noqa: E402
from fastrlhf.integrations import PatchError  # noqa: E402
from fastrlhf.integrations import trl as integration  # noqa: E402

LOSS = "trl.trainer.grpo_trainer.GRPOTrainer._compute_loss"
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSS_TYPES = (*CLIPPED, "cispo", "sapo")
LEVELS = ("token", "sequence")
ROLLOUT_MODES = (None, "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
B, T = 6, 9


@pytest.fixture(autouse=True)
def clean():
    yield
    integration.unpatch()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return trainer_of(tmp_path_factory.mktemp("grpo"))


def trainer_of(folder):
    """A GRPOTrainer of a small model. `configured` sets what a run's configuration would."""
    config = trl.GRPOConfig(
        use_cpu=True, bf16=False, report_to=[], output_dir=str(folder),
        per_device_train_batch_size=4, num_generations=2, max_completion_length=11,
        gradient_accumulation_steps=3, steps_per_generation=6,
    )  # fmt: skip
    return trl.GRPOTrainer(
        model=small_llama.causal_lm(),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": small_llama.sentences(8)}),
        processing_class=small_llama.tokenizer(),
    )


DEFAULTS = {
    "loss_type": "grpo",
    "importance_sampling_level": "token",
    "beta": 0.0,
    "epsilon_low": 0.2,
    "epsilon_high": 0.28,
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "use_vllm": False,
    "vllm_importance_sampling_correction": True,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "_last_world_entropy": float("inf"),
    "_entropy_window_stats": None,
    "aux_loss_enabled": False,
    "router_aux_loss_coef": 0.1,
    "current_gradient_accumulation_steps": 3,
    "max_completion_length": 11,
}
ARGUMENTS = {
    "delta": None,
    "use_bias_correction_kl": False,
    "sapo_temperature_pos": 0.75,  # numbers of fp32, in which TRL keeps them
    "sapo_temperature_neg": 1.25,
    "entropy_target": 1.0,
    "steps_per_generation": 6,
}


def configured(trainer, training=True, **settings):
    """The trainer with these settings, and no metric."""
    unknown = settings.keys() - DEFAULTS.keys() - ARGUMENTS.keys()
    assert not unknown, unknown
    if settings.get("loss_type") == "cispo":
        settings.setdefault("epsilon_high", 1.3)  # the limit of the ratio itself
    for defaults, holder in ((DEFAULTS, trainer), (ARGUMENTS, trainer.args)):
        for name, default in defaults.items():
            setattr(holder, name, settings.get(name, default))
    trainer._entropy_bonus_enabled = trainer.entropy_coef != 0.0 or trainer.use_adaptive_entropy
    trainer._metrics = {mode: trainer._metrics[mode].__class__(list) for mode in ("train", "eval")}
    trainer.model.train(training)
    return trainer


def batch(seed=0, rollout=None, old=True, tools=False, dtype=torch.float64):
    """(log-probs, entropies, inputs of `_compute_loss`): one sequence is full, one has no token that counts."""
    logprob = -randn(B, T, seed=seed, dtype=dtype).abs() - 0.1
    # Some sequences have drifted as a whole, so that ratios of sequences leave the clip range too.
    drift = torch.tensor([0.4, -0.5, 0.05, 0.6, -0.4, 0.0], dtype=dtype).unsqueeze(1)
    mask = ragged(seed, B, T, dtype=torch.int64)
    mask[-1] = 0
    ids = torch.randint(3, 20, (B, T), generator=torch.Generator().manual_seed(seed))
    prompts = torch.full((B, 3), 4)
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": torch.tensor([1.2, 0.7, -0.9, -1.1, -0.3, 0.5]),
        "num_items_in_batch": torch.tensor(61),
        "ref_per_token_logps": logprob + 0.3 * randn(B, T, seed=seed + 1, dtype=dtype),
    }
    inputs["ref_per_token_logps"][0, 0] = (
        logprob[0, 0] + 4
    )  # a KL above the op's clamp, which TRL does not have
    if old:
        noise = 0.2 * randn(B, T, seed=seed + 2, dtype=dtype)
        inputs["old_per_token_logps"] = logprob - drift - noise
    if rollout is not None:
        log_weight = 0.6 * randn(B, T, seed=seed + 3, dtype=dtype)
        level, kind = rollout.split("_")
        ratio = (log_weight.sum(1, keepdim=True) if level == "sequence" else log_weight).exp()
        outside = ratio > 1.4
        ratio = ratio.clamp(max=1.4) if kind == "truncate" else ratio.masked_fill(outside, 0.0)
        assert outside.any() and not outside.all()
        inputs["importance_sampling_ratio"] = ratio
        inputs["sampling_per_token_logps"] = logprob - log_weight
    if tools:
        inputs["tool_mask"] = (torch.arange(T) % 4 != 2).long().expand(B, T)
    entropies = randn(B, T, seed=seed + 4, dtype=dtype).abs()
    return logprob, entropies, inputs


def outcome(trainer, logprob, entropies, inputs, aux=None):
    """(loss, gradients, metrics, settings after the call) of TRL's method for these log-probs and entropies."""
    leaves = [x.detach().clone().requires_grad_() for x in (logprob, entropies)]
    leaves += [] if aux is None else [aux.detach().clone().requires_grad_()]
    given = (*leaves, None)[:3]
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: given
    try:
        loss = trainer._compute_loss(trainer.model, dict(inputs))
    finally:
        del trainer._get_per_token_logps_and_entropies
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    stats = trainer._entropy_window_stats
    metrics = {mode: dict(values) for mode, values in trainer._metrics.items()}
    after = (
        trainer.entropy_coef,
        trainer._last_world_entropy,
        None if stats is None else stats.tolist(),
    )
    return [loss.detach(), *grads], metrics, after


def compare(trainer, settings, data, reason=None, aux=None, backend="auto"):
    """Unpatched and patched; `reason`: of the fallback that is expected. Returns TRL's results."""
    with integration.patch(backend=backend) as patched:
        with patched.suspended():
            theirs = outcome(configured(trainer, **settings), *data, aux)
        ours = outcome(configured(trainer, **settings), *data, aux)
        if reason is None:
            assert patched.fallbacks == {} and patched.calls == {LOSS: 1}
        else:
            assert patched.calls == {} and list(patched.fallbacks) == [(LOSS, reason)]
    for mine, original in zip(ours[0], theirs[0], strict=True):
        assert mine.dtype == original.dtype
        torch.testing.assert_close(mine, original, rtol=1e-12, atol=1e-14)
    assert ours[1:] == theirs[1:]
    return theirs


def grid():
    """(settings, options of `batch`) of every combination that TRL's configuration allows."""
    kls = ({}, {"beta": 0.07}, {"beta": 0.07, "use_bias_correction_kl": True})
    deltas = ({}, {"delta": 1.15}, {"delta": 1.5})  # below and above 1 + epsilon_high
    gates = (
        {},
        {"off_policy_mask_threshold": 0.1},
        {"top_entropy_quantile": 0.5},
        {"off_policy_mask_threshold": 0.1, "top_entropy_quantile": 0.5, "entropy_coef": 0.03},
    )
    for kind, level, kl, delta, gate, mode, old in itertools.product(
        LOSS_TYPES, LEVELS, kls, deltas, gates, ROLLOUT_MODES, (True, False)
    ):
        if delta and kind not in CLIPPED:
            continue
        settings = {
            "loss_type": kind,
            "importance_sampling_level": level,
            "use_vllm": mode is not None,
        }
        yield {**settings, **kl, **delta, **gate}, {"rollout": mode, "old": old}


GRID = list(grid())


def compare_on(trainer, combinations, backend="auto"):
    """Each of the combinations: all are served."""
    with integration.patch(backend=backend):  # held, so that each comparison does not patch anew
        for place, (settings, options) in enumerate(combinations):
            # Every third with tools, every fifth in evaluation.
            data = batch(seed=place % 7, tools=place % 3 == 0, **options)
            compare(trainer, {**settings, "training": place % 5 != 0}, data, backend=backend)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", LOSS_TYPES)
def test_every_setting(built, kind):
    of_kind = [row for row in GRID if row[0]["loss_type"] == kind]
    assert len(of_kind) == 240 * (3 if kind in CLIPPED else 1)
    compare_on(built, of_kind)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_settings_of_each_kind(built, backend):
    """Every 43rd of the grid: each kind, level, KL, delta, gate and rollout mode is among them."""
    some = GRID[::43]
    values = {item for settings, options in some for item in (settings | options).items()}
    assert values == {item for settings, options in GRID for item in (settings | options).items()}
    compare_on(built, some, backend)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", LOSS_TYPES)
def test_fp32_is_as_near_to_fp64_as_trls(built, kind, level):
    settings = {
        "loss_type": kind,
        "importance_sampling_level": level,
        "beta": 0.07,
        "use_vllm": True,
    }

    def run(dtype):
        parts = []
        for seed in range(8):
            logprob, entropies, inputs = batch(seed, "token_truncate", dtype=torch.float32)
            if (
                kind in CLIPPED
            ):  # unlikely tokens, whose log-probs are large beside their differences
                logprob = logprob - 30
                for name in ("old_per_token_logps", "ref_per_token_logps"):
                    inputs[name] = inputs[name] - 30
            inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
            data = logprob.to(dtype), entropies.to(dtype), inputs
            parts.append(outcome(configured(built, **settings), *data)[0][:2])
        return [torch.stack(column) for column in zip(*parts, strict=True)]

    with integration.patch() as patched:
        with patched.suspended():
            theirs, truth = run(torch.float32), run(torch.float64)
        ours = run(torch.float32)
    assert patched.calls == {LOSS: 8}
    assert_no_worse(ours, theirs, truth)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["bnpo", "dapo"])
def test_accumulation_and_processes(built, monkeypatch, kind, training):
    """What TRL divides by, for uneven numbers of steps, processes and generations."""
    monkeypatch.setattr(type(built.accelerator), "num_processes", 3)
    settings = {
        "loss_type": kind, "training": training, "current_gradient_accumulation_steps": 5, "steps_per_generation": 8,
    }  # fmt: skip
    compare(built, settings, batch())


def test_no_token_counts(built):
    logprob, entropies, inputs = batch(rollout="sequence_mask")
    inputs["completion_mask"].zero_()
    inputs["num_items_in_batch"].zero_()
    for kind, level in itertools.product(LOSS_TYPES, LEVELS):
        settings = {"loss_type": kind, "importance_sampling_level": level, "use_vllm": True}
        settings |= {"beta": 0.1, "entropy_coef": 0.1}
        with integration.patch() as patched:
            loss, *grads = outcome(configured(built, **settings), logprob, entropies, inputs)[0]
        assert patched.fallbacks == {}
        assert loss == 0 and not any(grad.any() for grad in grads)


@pytest.mark.parametrize("kind", LOSS_TYPES)
def test_advantages_per_token(built, kind):
    """Of subclasses; TRL's own are one a sequence."""
    logprob, entropies, inputs = batch(rollout="token_mask")
    inputs["advantages"] = randn(B, T, seed=9)
    settings = {"loss_type": kind, "use_vllm": True, "off_policy_mask_threshold": 0.1}
    compare(built, settings, (logprob, entropies, inputs))
    settings["importance_sampling_level"] = "sequence"
    reason = "advantages per token with importance_sampling_level='sequence'"
    compare(built, settings, (logprob, entropies, inputs), reason)


@pytest.mark.parametrize("last", [float("inf"), 0.4, float("nan")])
@pytest.mark.parametrize("step_ends", [True, False])
def test_adaptive_entropy(built, monkeypatch, last, step_ends):
    """The coefficient and the window after the call are TRL's; the bonus has the coefficient from before it."""
    monkeypatch.setattr(type(built.accelerator), "sync_gradients", step_ends)
    settings = {"use_adaptive_entropy": True, "entropy_coef": 0.02, "_last_world_entropy": last}
    _, _, (coef, entropy, window) = compare(built, settings, batch())
    assert (coef != 0.02) == (window is None) == step_ends


def test_entropy_without_graph(built):
    """A bonus of 0 leaves the entropies without a gradient."""
    (_, _, grad), _, _ = compare(
        built, {"use_adaptive_entropy": True, "entropy_coef": 0.02}, batch()
    )
    assert not grad.any()
    (_, _, grad), _, _ = compare(built, {"entropy_coef": 0.02}, batch())
    assert grad.any()


def test_trls_method_makes_no_graph(built):
    seen = []
    trainer = configured(built, top_entropy_quantile=0.5, off_policy_mask_threshold=0.1)
    trainer.get_high_entropy_mask = lambda entropies, mask, _: seen.append(entropies) or mask.bool()
    trainer.get_off_policy_mask = lambda advantages, per_token_logps, **_: (
        seen.append(per_token_logps) or 1 + 0 * advantages
    )
    try:
        with integration.patch() as patched:
            outcome(trainer, *batch())
    finally:
        del trainer.get_high_entropy_mask, trainer.get_off_policy_mask
    assert patched.calls == {LOSS: 1}
    assert [x.requires_grad for x in seen] == [False, False]


@pytest.mark.parametrize("training", [True, False])
def test_loss_of_a_mixture_of_experts(built, training):
    settings = {"aux_loss_enabled": True, "training": training}
    aux = torch.tensor(0.7, dtype=torch.float64)
    (_, *_, grad), metrics, _ = compare(built, settings, batch(), aux=aux)
    assert grad == pytest.approx(0.1 / (3 if training else 1))
    assert metrics["train" if training else "eval"]["aux_loss"]


@pytest.mark.parametrize(
    ("reason", "settings"),
    [
        ("loss_type='vespo'", {"loss_type": "vespo"}),
        ("delta is not above 1 and finite", {"delta": 1.0}),
        ("epsilon_high of cispo is not above 1 and finite", {"loss_type": "cispo", "epsilon_high": 0.2}),
        ("epsilon is not above 0 and finite", {"epsilon_low": 0.0}),
    ],
)  # fmt: skip
def test_falls_back(built, reason, settings):
    compare(built, settings, batch(rollout="token_mask"), reason)


def test_an_unknown_level_is_trls_error(built):
    settings = {"importance_sampling_level": "word"}
    with integration.patch() as patched:
        with pytest.raises(ValueError, match="Unknown importance sampling level: word"):
            outcome(configured(built, **settings), *batch())
    assert list(patched.fallbacks) == [(LOSS, "importance_sampling_level='word'")]


def test_a_subclass_that_calls_the_method(built, monkeypatch):
    class Scaled(trl.GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return 2 * super()._compute_loss(model, inputs)

    theirs = outcome(configured(built), *batch())
    monkeypatch.setattr(built, "__class__", Scaled)
    with integration.patch() as patched:
        ours = outcome(configured(built), *batch())
    assert patched.calls == {LOSS: 1}
    assert ours[1:] == theirs[1:]
    torch.testing.assert_close(ours[0], [2 * x for x in theirs[0]], rtol=1e-12, atol=1e-14)


def test_other_parameters_are_refused(monkeypatch):
    monkeypatch.setattr(trl.GRPOTrainer, "_compute_loss", lambda self, model, batch: None)
    before = trl.trainer.utils.entropy_from_logits
    with pytest.raises(PatchError, match="GRPOTrainer._compute_loss takes"):
        integration.patch()
    assert trl.trainer.utils.entropy_from_logits is before


@pytest.mark.parametrize("kind", LOSS_TYPES)
def test_model(built, kind):
    """The gradient of each parameter of a Llama, whose log-probs and entropies TRL's method computes itself."""
    level = "token" if kind in ("bnpo", "dr_grpo", "cispo") else "sequence"
    settings = {
        "loss_type": kind,
        "importance_sampling_level": level,
        "beta": 0.05,
        "entropy_coef": 0.01,
    }
    settings |= {"use_vllm": True, "top_entropy_quantile": 0.6, "off_policy_mask_threshold": 0.3}
    _, _, inputs = batch(rollout="sequence_truncate", tools=True, dtype=torch.float32)
    noise = 0.3 * randn(B, T, seed=5)
    for name in ("ref_per_token_logps", "old_per_token_logps", "sampling_per_token_logps"):
        inputs[name] = (
            noise - 3.1
        )  # log-probs of the untrained model are about -log of its vocabulary

    def run():
        trainer = configured(built, **settings)
        trainer.model.zero_grad()
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        gradients = [p.grad.clone() for p in trainer.model.parameters()]
        return [loss.detach(), *gradients], trainer._metrics["train"]

    with integration.patch() as patched:
        with patched.suspended():
            theirs, their_metrics = run()
        ours, metrics = run()
    assert patched.fallbacks == {} and patched.calls[LOSS] == 1
    assert all(grad.any() for grad in theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert metrics.keys() == their_metrics.keys()
    for name, values in metrics.items():
        assert values == pytest.approx(their_metrics[name], rel=1e-5), name


def kept_for_the_backward(trainer, settings):
    """Bytes a token of the saved [B, T] tensors that are no inputs."""
    logprob, entropies, inputs = batch(dtype=torch.float32)
    given = {x.untyped_storage().data_ptr() for x in inputs.values()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        outcome(configured(trainer, **settings), logprob, entropies, inputs)
    sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
    return sum(n for at, n in sizes.items() if n >= B * T and at not in given) // (B * T)


@pytest.mark.parametrize(
    ("level", "beta", "corrected", "theirs", "ours"),
    [
        ("token", 0.0, False, 12, 4),
        ("token", 0.07, False, 16, 4),
        ("token", 0.07, True, 20, 4),
        ("sequence", 0.07, False, 4, 4),
        ("sequence", 0.07, True, 8, 18),
    ],
)
def test_bytes_that_docs_integrations_states(built, level, beta, corrected, theirs, ours):
    settings = {"importance_sampling_level": level, "beta": beta}
    settings["use_bias_correction_kl"] = corrected
    with integration.patch() as patched:
        with patched.suspended():
            assert kept_for_the_backward(built, settings) == theirs
        assert kept_for_the_backward(built, settings) == ours


# ---- two processes ----

SETTINGS_OF_RANKS = (
    {"loss_type": "dapo", "beta": 0.05},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "off_policy_mask_threshold": 0.1},
    {"loss_type": "cispo", "top_entropy_quantile": 0.5},
    {"loss_type": "dr_grpo", "use_adaptive_entropy": True, "entropy_coef": 0.02, "_last_world_entropy": 0.5},
)  # fmt: skip


def loss_and_entropy(rank):
    """[settings, 2]: this process's loss, and the entropy that TRL logs; ours are compared with them here."""
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": ranks.WORLD,
        "MASTER_ADDR": "localhost",
    }
    os.environ.update({name: str(value) for name, value in place.items()})
    found = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(folder)
        for settings in SETTINGS_OF_RANKS:
            data = batch(seed=rank, rollout="token_truncate")
            (loss, *_), metrics, _ = compare(trainer, {**settings, "use_vllm": True}, data)
            found.append(torch.stack([loss, loss.new_tensor(metrics["train"]["entropy"][0])]))
    return torch.stack(found)


@pytest.mark.nightly
def test_two_processes():
    first, second = ranks.run(loss_and_entropy)
    assert (first[:, 0] != second[:, 0]).all()  # each process has its own loss
    assert first[:, 1].equal(second[:, 1])  # and the metrics of both
