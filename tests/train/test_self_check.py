"""The self-check at load: models that the trainer computes wrongly are refused, and others pass."""

import re
import sys
import types

import pytest
import torch
import transformers
from torch import nn
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from _support import tiny
from fastrlhf.errors import UserError
from fastrlhf.integrations import _self_check as measure
from fastrlhf.integrations import _shrink, attention
from fastrlhf.train import config, models, self_check
from fastrlhf.train.models import Policy, RewardModel
from fastrlhf.train.runtime import PRECISIONS, Runtime, RuntimeConfig

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def llama(**changes):
    return LlamaConfig(**{**SIZES, **changes})


@pytest.fixture
def runtime(monkeypatch):
    monkeypatch.setattr(self_check, "_verdicts", {})
    return Runtime(RuntimeConfig(device="cpu"))


def load(kind, cfg, runtime):
    """A policy or reward model of a class, checked as at load."""
    torch.manual_seed(1)
    model = kind._from_config(cfg, attn_implementation=attention.NAME)
    wrap = RewardModel if hasattr(model, "score") else Policy
    return runtime.check(wrap(model), "folder")


def refusal(kind, runtime, cfg=None) -> str:
    with pytest.raises(UserError) as caught:
        load(kind, cfg or llama(), runtime)
    text = str(caught.value)
    assert text.startswith(f"'folder' ({kind.__name__}) fails the self-check")
    assert "\n" not in text and "--self_check off" in text
    return text


def amount(text: str, what: str) -> float:
    """By how much a property failed, according to a refusal."""
    found = re.search(
        re.escape(what) + r": expected at most [\d.e-]+ [\w ]+, got ([\d.e+-]+)", text
    )
    assert found, text
    return float(found[1])


# ---- models that pass ----

OPT = {"vocab_size": 97, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2,
       "num_attention_heads": 4, "max_position_embeddings": 64, "dropout": 0.1, "layerdrop": 0.1}  # fmt: skip
PASSING = {
    "llama": (LlamaForCausalLM, llama()),
    "llama reward": (LlamaForSequenceClassification, llama(num_labels=1)),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0),
    ),
    "gpt2 reward": (
        transformers.GPT2ForSequenceClassification,
        GPT2Config(
            vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, num_labels=1
        ),
    ),
    "opt": (transformers.OPTForCausalLM, transformers.OPTConfig(**OPT)),  # functional dropout
    "mixtral": (
        transformers.MixtralForCausalLM,
        transformers.MixtralConfig(**SIZES, num_local_experts=4, router_jitter_noise=0.1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PASSING)
def test_served_models_pass(name, runtime):
    kind, cfg = PASSING[name]
    random = torch.get_rng_state()
    torch.manual_seed(1)
    module = load(kind, cfg, runtime)
    torch.manual_seed(1)
    kind._from_config(cfg)
    assert runtime.checks == {kind.__name__: "passed"}
    assert f"self-check: {kind.__name__} passed" in runtime.describe()
    assert module.config._attn_implementation == attention.NAME
    assert all(p.requires_grad for p in module.parameters()) and module.training
    torch.set_rng_state(random)


def test_the_random_state_is_unchanged(runtime):
    module = load(LlamaForCausalLM, llama(), runtime)
    before = torch.get_rng_state()
    runtime.check(module, "folder")
    assert torch.equal(torch.get_rng_state(), before)


# ---- models that are wrong in one way ----


class Recurrent(LlamaForCausalLM):
    """A state runs along the row, as in Mamba: packed rows mix."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.model.norm.register_forward_hook(lambda _, args, out: out + 0.1 * out.cumsum(1))


class LookingAhead(LlamaForCausalLM):
    """Each token also reads the next one, packed or alone."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.model.embed_tokens.register_forward_hook(
            lambda _, args, out: out + 0.5 * out.roll(-1, 1)
        )


class Transformed(LlamaForCausalLM):
    """Work between body and head, as the prediction heads of BERT do."""

    def forward(self, input_ids, **kwargs):
        out = self.model(input_ids=input_ids, **kwargs)
        return transformers.modeling_outputs.CausalLMOutputWithPast(
            logits=self.lm_head(out.last_hidden_state.tanh())
        )


class TransformedReward(LlamaForSequenceClassification):
    def forward(self, input_ids, **kwargs):
        out = super().forward(input_ids, **kwargs)
        out.logits = 2 * out.logits
        return out


class Noisy(LlamaForCausalLM):
    """Dropout whose probability no attribute holds."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.model.norm.register_forward_hook(
            lambda norm, args, out: nn.functional.dropout(out, 0.1, norm.training)
        )


class Convolved(LlamaForCausalLM):
    """Each token also reads the one before it in its sequence, which no key or value of the sampler's cache holds."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.first = None

        def begin(_, args, kwargs):
            positions = kwargs.get("position_ids")
            ids = kwargs["input_ids"]
            positions = torch.arange(ids.shape[1])[None] if positions is None else positions
            self.first = (positions == 0)[..., None]

        def shift(_, args, out):
            return out + 0.5 * out.roll(1, 1).masked_fill(self.first, 0.0)

        self.model.register_forward_pre_hook(begin, with_kwargs=True)
        self.model.embed_tokens.register_forward_hook(shift)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (Recurrent, measure.PACKING),
        (LookingAhead, measure.FUTURE),
        (Transformed, measure.HEAD),
        (Noisy, measure.DROPOUT),
        (Convolved, measure.SAMPLER),
    ],
)
def test_a_wrong_model_is_refused(kind, what, runtime):
    text = refusal(kind, runtime)
    assert amount(text, what) > 0.01
    if (
        kind is not Recurrent
    ):  # its mixed rows also reach the tokens before a change, and the sampler
        others = {measure.PACKING, measure.FUTURE, measure.HEAD, measure.DROPOUT} - {what}
        assert not any(other in text for other in others)
    off = Runtime(RuntimeConfig(device="cpu", self_check=False))
    load(kind, llama(), off)
    assert "self-check off" in off.describe()


def test_a_wrong_reward_model_is_refused(runtime):
    text = refusal(TransformedReward, runtime, llama(num_labels=1))
    assert amount(text, measure.HEAD) > 0.01 and "of the score" in text


def test_ignored_attention_sinks_are_refused(runtime, monkeypatch):
    def without_sinks(*args, **kwargs):
        return attention.attention(*args, **{**kwargs, "s_aux": None})

    functions = transformers.AttentionInterface._global_mapping
    monkeypatch.setitem(functions, attention.NAME, without_sinks)
    full = {"layer_types": ["full_attention"] * 2, "head_dim": 8, "num_local_experts": 4}
    cfg = transformers.GptOssConfig(**{**SIZES, **full})
    text = refusal(transformers.GptOssForCausalLM, runtime, cfg)
    assert amount(text, measure.PACKING) > 0.01


def test_a_window_that_the_sampler_ignores_is_refused(runtime, monkeypatch):
    original = attention.DecodeStep.attend

    def attend(self, layer, query, key, value, scoring, pattern):
        return original(self, layer, query, key, value, scoring, attention.Pattern())

    cfg = transformers.MistralConfig(**SIZES, sliding_window=48)
    load(transformers.MistralForCausalLM, cfg, runtime)
    self_check._verdicts.clear()
    monkeypatch.setattr(attention.DecodeStep, "attend", attend)
    text = refusal(transformers.MistralForCausalLM, runtime, cfg)
    assert amount(text, measure.SAMPLER) > 0.01
    assert measure.PACKING not in text and measure.HEAD not in text


def test_a_head_of_several_layers_is_refused(runtime):
    """A class of transformers: BERT transforms its hidden states again before the logits."""
    sizes = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    cfg = transformers.BertConfig(**sizes, is_decoder=True)
    text = refusal(transformers.BertLMHeadModel, runtime, cfg)
    assert amount(text, measure.HEAD) > 0.1


def test_the_weights_are_measured_too(runtime):
    """What the copy cannot show: this model differs from its class."""
    model = LlamaForCausalLM._from_config(llama(), attn_implementation=attention.NAME)
    nn.init.normal_(model.lm_head.weight, std=0.5)
    model.lm_head.register_forward_hook(lambda _, args, out: 3 * out)
    with pytest.raises(UserError) as caught:
        runtime.check(Policy(model), "folder")
    assert amount(str(caught.value), measure.HEAD) > 0.01


def test_an_error_is_a_refusal_in_one_line(runtime, monkeypatch):
    def fail(self, *_, **__):
        raise TypeError("forward() got an unexpected\nkeyword argument 'layout'")

    monkeypatch.setattr(Policy, "hidden", fail)
    assert "unexpected keyword argument 'layout'" in refusal(LlamaForCausalLM, runtime)


def test_a_class_without_a_copy_is_measured_on_its_weights(runtime, monkeypatch):
    def fail(*_):
        raise _shrink.CannotShrink("widths are fixed")

    monkeypatch.setattr(_shrink, "shrunken", fail)
    load(LlamaForCausalLM, llama(), runtime)
    said = runtime.describe()
    assert "passed, but no small copy of it could be run (widths are fixed)" in said
    assert "the future, dropout and sampler are unchecked" in said
    assert amount(refusal(Transformed, runtime), measure.HEAD) > 0


# ---- when it runs ----


@pytest.fixture
def measured(monkeypatch):
    """The classes whose copies were measured."""
    found = []
    original = self_check._examine_copy

    def examine(module):
        found.append(type(self_check.transformer(module)).__name__)
        return original(module)

    monkeypatch.setattr(self_check, "_examine_copy", examine)
    return found


def test_a_copy_is_measured_once_per_class_and_config(runtime, measured):
    for cfg in (llama(), llama(), llama(rope_theta=5e5)):
        load(LlamaForCausalLM, cfg, runtime)
    assert measured == ["LlamaForCausalLM"] * 2
    load(LlamaForSequenceClassification, llama(num_labels=1), runtime)
    assert measured[2:] == ["LlamaForSequenceClassification"]


def test_code_of_a_model_folder_is_measured_each_time(runtime, measured, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers_modules.x", types.ModuleType("x"))
    remote = type("Remote", (LlamaForCausalLM,), {"__module__": "transformers_modules.x"})
    for _ in range(2):
        load(remote, llama(), runtime)
    assert measured == ["Remote"] * 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("trainable", [False, True])
def test_every_loader_checks(precision, trainable, measured, monkeypatch):
    base, reward_model = tiny.base(), tiny.reward_model()
    measured.clear()
    monkeypatch.setattr(self_check, "_verdicts", {})
    runtime = Runtime(RuntimeConfig(device="cpu"))
    runtime.compute_dtype = PRECISIONS[precision]
    models.load_policy(base, runtime, trainable=trainable)
    models.load_reward_model(reward_model, runtime, trainable=trainable)
    assert measured == ["LlamaForCausalLM", "LlamaForSequenceClassification"]
    monkeypatch.setattr(self_check, "_verdicts", {})
    models.policy_from_config(llama(), runtime)
    models.reward_model_from_policy(base, runtime)
    assert measured[2:] == ["LlamaForCausalLM", "LlamaForSequenceClassification"]


@pytest.mark.parametrize("given", ["off", "false", False])
def test_off_in_a_file_and_on_the_command_line(given):
    assert config.load(RuntimeConfig, "x", None, {"self_check": given}).self_check is False


# ---- small copies ----

PATTERNS = {
    # Config of a full-size model -> (changes of it, layers of its copy, kinds of layer).
    "Gemma3TextConfig": ({}, 2, 2),  # windows and full attention, one in six
    "Gemma3nTextConfig": ({}, 6, 6),  # and keys of earlier layers, and sparse activations
    "Gemma4TextConfig": ({"num_kv_shared_layers": 10}, 6, 6),  # and wider heads in some layers
    "DeepseekV3Config": ({}, 2, 2),  # three dense layers, then experts
    "GptOssConfig": ({}, 2, 2),
    "Qwen2MoeConfig": ({"decoder_sparse_step": 2}, 2, 2),
    "Qwen3NextConfig": ({}, 2, 2),  # linear and full attention
    "JambaConfig": ({}, 5, 3),  # Mamba, attention and experts at three periods
    "Llama4TextConfig": ({}, 4, 2),  # chunks and no positions in one layer of four
    "Lfm2Config": ({"layer_types": ["conv", "full_attention"] * 16}, 2, 2),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_copies_have_every_kind_of_layer(name):
    changes, *expected = PATTERNS[name]
    cfg = getattr(transformers, name)(**changes)
    with torch.device("meta"):
        big = transformers.AutoModelForCausalLM.from_config(cfg)
    small = _shrink.shrunken(big, "eager")
    assert type(small) is type(big)
    layers = _shrink.decoder_layers(small)
    kinds = {_shrink._kind(layer) for layer in layers}
    assert kinds == {_shrink._kind(layer) for layer in _shrink.decoder_layers(big)}
    assert [len(layers), len(kinds)] == expected
    assert sum(p.numel() for p in small.parameters()) < 1_000_000
    assert getattr(small.config, "sliding_window", None) in (None, 0, _shrink.WINDOW)
    again = _shrink.shrunken(big, "eager")
    assert all(
        torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters(), strict=True)
    )
