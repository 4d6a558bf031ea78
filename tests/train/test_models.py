"""Packed forwards equal separate ones on every attention path of a CPU; bad model folders are refused."""

import inspect
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
)
from transformers.modeling_layers import GenericForSequenceClassification

from _support import tiny, zoo
from fastrlhf.errors import UserError
from fastrlhf.integrations import attention
from fastrlhf.train import data, models
from fastrlhf.train.heads import SummedNLL
from fastrlhf.train.packing import collate
from fastrlhf.train.runtime import Runtime, RuntimeConfig
from fastrlhf.train.stages import ppo, reward, sft
from fastrlhf.train.steps import score_sequences
from fastrlhf.train.text import TextEncoder

CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,  # grouped queries
        max_position_embeddings=64,
    ),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}


@pytest.fixture
def runtime():
    return Runtime(RuntimeConfig(device="cpu"))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("implementation", [attention.NAME, "sdpa", "eager"])
def test_packed_forward_equals_separate_forwards(name, implementation, runtime):
    torch.manual_seed(0)
    policy = models.policy_from_config(CONFIGS[name], runtime).eval()
    policy.lm.set_attn_implementation(implementation)
    rng = np.random.default_rng(1)
    sequences = [rng.integers(0, 97, size=n) for n in (1, 9, 33, 2, 64, 17)]
    batch = collate(sequences)
    with torch.no_grad():
        packed = policy.hidden(batch)
        for i, sequence in enumerate(sequences):
            ids = torch.tensor(sequence)[None]
            alone = policy.lm.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
            part = packed[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]]
            torch.testing.assert_close(part, alone, rtol=1e-5, atol=1e-5)


def test_packing_order_does_not_change_a_sequence(runtime):
    policy = models.policy_from_config(CONFIGS["llama"], runtime).eval()
    rng = np.random.default_rng(2)
    sequences = [rng.integers(0, 97, size=n) for n in (12, 40, 7)]
    with torch.no_grad():
        forward = policy.hidden(collate(sequences)).split([12, 40, 7])
        backward = policy.hidden(collate(sequences[::-1])).split([7, 40, 12])
    for a, b in zip(forward, backward[::-1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_packed_gradients_equal_separate_gradients(runtime):
    policy = models.policy_from_config(CONFIGS["llama"], runtime)
    rng = np.random.default_rng(3)
    examples = [data.Example(rng.integers(0, 97, size=n), 1) for n in (5, 21, 64)]
    batch, rows, targets = data.next_token_rows(examples, "cpu")
    policy(batch, rows, SummedNLL(targets)).backward()
    packed = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    for example in examples:
        ids = torch.tensor(example.tokens)[None]
        policy.lm.set_attn_implementation("eager")
        policy.lm(input_ids=ids, labels=ids, use_cache=False).loss.mul(example.targets).backward()
    for ours, theirs in zip(packed, policy.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-4, atol=1e-4)


def test_saved_model_loads_in_plain_transformers():
    lm = AutoModelForCausalLM.from_pretrained(tiny.base())
    assert lm.config._attn_implementation != attention.NAME
    assert lm(input_ids=torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, 320)


def changed_config(tmp_path, source: str, **changes) -> str:
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return str(folder)


def test_reward_head_of_the_wrong_width(tmp_path, runtime):
    labels = {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    folder = changed_config(tmp_path, tiny.reward_model(), **labels)
    with pytest.raises(UserError, match=r"expected width 1 \(num_labels\), got 2"):
        models.load_reward_model(folder, runtime, trainable=False)


def test_language_model_given_as_reward_model(runtime):
    with pytest.raises(UserError, match="is not a reward model"):
        models.load_reward_model(tiny.base(), runtime, trainable=False)


def saved(model, tmp_path, name: str = "model") -> str:
    """A folder with `model` and tiny.base()'s tokenizer."""
    model.save_pretrained(tmp_path / name)
    models.load_tokenizer(tiny.base()).save_pretrained(tmp_path / name)
    return str(tmp_path / name)


def tiny_lm(kind: str, **settings):
    size = {"vocab_size": 321, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 1}
    config = getattr(transformers, f"{kind}Config")(**size, **heads, **settings)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", ["Granite", "Cohere", "Cohere2", "Ernie4_5", "Apertus"])
def test_reward_model_of_an_architecture_without_a_classifier(kind, tmp_path, runtime):
    """Ours reads the folder again, and so does plain transformers with a class of two lines."""
    folder = saved(tiny_lm(kind), tmp_path)
    fresh = models.reward_model_from_policy(folder, runtime, seed=3)
    fresh.model.score.weight.data.mul_(30)
    again = saved(fresh.model, tmp_path, "reward")
    names = json.loads((Path(again) / "config.json").read_text())["architectures"]
    assert names == [f"{kind}ForSequenceClassification"]
    batch = collate([[5, 6, 7, 8], [9, 10]])
    loaded = models.load_reward_model(again, runtime, trainable=False)
    with torch.no_grad():
        scores = fresh(batch, batch.last_rows)
        torch.testing.assert_close(loaded(batch, batch.last_rows), scores, rtol=1e-5, atol=1e-5)

    module = inspect.getmodule(type(tiny_lm(kind)))
    base = getattr(module, f"{kind}PreTrainedModel")
    plain = type(names[0], (GenericForSequenceClassification, base), {}).from_pretrained(again)
    with torch.no_grad():
        theirs = plain(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0]
    torch.testing.assert_close(theirs, scores[:1], rtol=1e-4, atol=1e-5)
    assert scores.abs().min() > 0.01


def test_bias_of_a_score_head_counts():
    config = tiny_lm("Llama").config
    config.num_labels = 1
    model = transformers.LlamaForSequenceClassification(config)
    model.score = torch.nn.Linear(16, 1)
    model.score.bias.data.fill_(5.0)
    ours = models.RewardModel(model)
    batch = collate([[5, 6, 7]])
    score = float(ours(batch, batch.last_rows).detach())
    assert score == pytest.approx(float(model(torch.tensor([[5, 6, 7]])).logits.detach()), abs=1e-5)
    ours.rescale(0.5)
    assert float(ours(batch, batch.last_rows).detach()) == pytest.approx(0.5 * score, abs=1e-5)


def bert(kind: str):
    config = transformers.BertConfig(
        vocab_size=321, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_labels=1
    )  # fmt: skip
    return getattr(transformers, f"Bert{kind}")(config)


def test_models_that_are_no_decoder_are_refused(tmp_path, runtime):
    folder = saved(bert("ForSequenceClassification"), tmp_path, "encoder")
    with pytest.raises(UserError, match="BertForSequenceClassification has none"):
        models.load_reward_model(folder, runtime, trainable=False)
    folder = saved(bert("ForMaskedLM"), tmp_path, "masked")
    with pytest.raises(UserError, match="is a BertForMaskedLM: expected a causal language model"):
        models.load_policy(folder, runtime, trainable=True)
    config = transformers.T5Config(
        vocab_size=9, d_model=8, d_kv=8, d_ff=8, num_layers=1, num_heads=1
    )
    folder = saved(transformers.T5ForConditionalGeneration(config), tmp_path, "t5")
    with pytest.raises(
        UserError, match="^model of .* cannot be loaded: Unrecognized config.*T5Config.*$"
    ):
        models.load_policy(folder, runtime, trainable=True)
    folder = saved(bert("Model"), tmp_path, "bert")
    with pytest.raises(UserError, match="a linear head `score`"):
        models.reward_model_from_policy(folder, runtime)


def test_adapters_and_unknown_classes_are_refused(tmp_path, runtime):
    folder = saved(tiny_lm("Llama"), tmp_path, "adapted")
    (Path(folder) / "adapter_config.json").write_text("{}")
    loaders = (models.load_policy, models.load_reward_model)
    for load in loaders:
        with pytest.raises(
            UserError, match="holds an adapter .adapter_config.json.*merge_and_unload"
        ):
            load(folder, runtime, trainable=True)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_text('{"model_type": "no_such_model"}')
    for load in loaders:
        with pytest.raises(UserError, match="config of .* cannot be read: .*no_such_model"):
            load(str(tmp_path / "new"), runtime, trainable=True)
    folder = saved(zoo.FAMILIES["falcon"].make_model(), tmp_path, "falcon")
    with pytest.raises(UserError, match="its class does not use transformers"):
        models.load_policy(folder, runtime, trainable=True)


def test_missing_folder(runtime):
    with pytest.raises(UserError, match="no config.json"):
        models.load_policy("/no/such/folder", runtime, trainable=False)


def test_pad_equal_to_eos(tmp_path):
    """It was refused, because a trainer that pads ignores PAD and with it EOS. Ours packs, and EOS is a target.

    transformers reads a score at the last token that is not PAD: with PAD = EOS, the token before the one that we
    read. So a reward model and a value model are saved with another PAD.
    """
    base = tmp_path / "base"
    shutil.copytree(tiny.base(), base)
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        content = (base / name).read_text()
        (base / name).write_text(
            content.replace("<|pad|>", "<|end|>").replace('"pad_token_id": 1', '"pad_token_id": 0')
        )
    tokenizer = models.load_tokenizer(str(base))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    # A tokenizer without any PAD and without a row to spare.
    content = json.loads((base / "tokenizer.json").read_text().replace("<|pad|>", "<other>"))
    (base / "tokenizer.json").write_text(json.dumps(content))

    rows = data.read_rows(str(tiny.folder() / "demos.jsonl"), {"prompt": str}, "x")[:5]
    texts = [row["prompt"] + row["completion"] for row in rows]
    reward.main(tiny.reward_config("x", model=str(base), epochs=1, out=str(tmp_path / "reward")))
    cfg = tiny.ppo_config("x", model=str(base), reward_model=str(tmp_path / "reward"), iterations=1)
    cfg.out = str(tmp_path / "ppo")
    ppo.main(cfg)
    for folder in (tmp_path / "reward", tmp_path / "ppo" / "value"):
        plain = AutoModelForSequenceClassification.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert plain.config.pad_token_id == tokenizer.pad_token_id == 320
        ours = models.load_reward_model(str(folder), Runtime(cfg), trainable=False)
        encoder = TextEncoder(tokenizer, parse_special_tokens=True)
        sequences = [e.tokens for e in data.encode_examples(rows, encoder, 64, "x")]
        for side in ("left", "right"):
            batch = tokenizer(
                [text + "<|end|>" for text in texts],
                padding=True,
                padding_side=side,
                return_tensors="pt",
            )
            assert (batch["input_ids"] == 320).any()
            with torch.no_grad():
                scores = plain(**batch).logits[:, 0] + ours.bias
            np.testing.assert_allclose(scores, score_sequences(ours, sequences, 500), atol=1e-5)


def test_eos_as_pad_still_trains_its_embedding(runtime):
    config = LlamaConfig(**{**CONFIGS["llama"].to_dict(), "pad_token_id": 5, "eos_token_id": 5})
    policy = models.policy_from_config(config, runtime)
    batch, rows, targets = data.next_token_rows([data.Example(np.array([5, 6, 7]), 1)], "cpu")
    policy(batch, rows, SummedNLL(targets)).backward()
    assert policy.lm.get_input_embeddings().weight.grad[5].any()


def test_vocabularies_that_differ():
    tokenizer = models.load_tokenizer(tiny.base())
    other = models.load_tokenizer(tiny.base())
    other.add_tokens(["extra"])
    with pytest.raises(UserError, match="vocabularies differ"):
        models.check_same_vocabulary(tokenizer, other, "model and reward_model")


def test_tokenizer_larger_than_the_embedding(runtime):
    tokenizer = models.load_tokenizer(tiny.base())
    tokenizer.add_tokens(["extra"])
    policy = models.load_policy(tiny.base(), runtime, trainable=False)
    with pytest.raises(UserError, match="has 321 tokens, the model has 320"):
        models.check_vocabulary(tokenizer, policy.lm, "x")


def test_damaged_models_are_named(tmp_path):
    for name, damage, message in (
        ("cut", lambda f: (f / "model.safetensors").write_bytes(b"x" * 9), "cannot be loaded"),
        (
            "config",
            lambda f: (f / "config.json").write_text("[]"),
            "(tokenizer|config) of .* cannot be",
        ),
        ("layers", _changed(num_hidden_layers=3), r"lacks .* tensors \(model\.layers"),
        ("huge", _changed(num_hidden_layers=10**9), "num_hidden_layers: expected at most 10000"),
        ("names", _changed(architectures=[1]), "architectures: expected names"),
        ("tokenizer", _without_tokenizer, "tokenizer of .*: no tokenizer.json or .* there; save"),
        (
            "code",
            _changed(
                auto_map={"AutoModelForCausalLM": "m.M", "AutoConfig": "m.C"}, model_type="mine"
            ),
            "config of .* cannot be read: .*give --trust_remote_code true",
        ),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for file in Path(tiny.base()).iterdir():
            if file.is_file():
                (folder / file.name).write_bytes(file.read_bytes())
        damage(folder)
        with pytest.raises(UserError, match=message):
            sft.main(tiny.sft_config("x", model=str(folder), out=str(tmp_path / "out")))
        assert not (tmp_path / "out").exists()


def _without_tokenizer(folder):
    for file in folder.glob("*token*"):
        file.unlink()


def _changed(**settings):
    def apply(folder):
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | settings))

    return apply
