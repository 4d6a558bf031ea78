"""The transformers integration end to end: attention on padded and packed batches, and Trainer runs."""

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from _support import small_llama
from _support.patched import losses
from fastrlhf.integrations import transformers as integration
from fastrlhf.ops import _backend


@pytest.fixture(autouse=True)
def clean():
    yield
    integration.unpatch()


def token_ids(*shape):
    return torch.randint(
        3, len(small_llama.WORDS), shape, generator=torch.Generator().manual_seed(1)
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_varlen_attention_on_a_padded_batch(side):
    theirs = small_llama.causal_lm(attn_implementation="sdpa")
    inputs = {"input_ids": token_ids(3, 9)}
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, :4], mask[2, :2] = 0, 0
    inputs["attention_mask"] = mask if side == "left" else mask.flip(1)
    with integration.patch():
        ours = small_llama.causal_lm(attn_implementation="fastrlhf_varlen")
        assert ours.config._attn_implementation == "fastrlhf_varlen"
        kept = inputs["attention_mask"].bool()
        torch.testing.assert_close(ours(**inputs).logits[kept], theirs(**inputs).logits[kept])


@pytest.mark.parametrize("with_lengths", [False, True])
def test_varlen_attention_on_a_packed_batch(with_lengths):
    """Tokens attend within their sequence, given by cu_seq_lens or, as for sdpa, by position ids."""
    theirs = small_llama.causal_lm(attn_implementation="sdpa")
    ids = token_ids(1, 9)
    packed = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])}
    packed["use_cache"] = False
    if with_lengths:
        starts = torch.tensor([0, 4, 9], dtype=torch.int32)
        packed.update(cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=5, max_length_k=5)
    with integration.patch():
        ours = small_llama.causal_lm(attn_implementation="fastrlhf_varlen")
        logits = ours(**packed).logits
    apart = [theirs(input_ids=part).logits for part in ids.split((4, 5), dim=1)]
    torch.testing.assert_close(logits, torch.cat(apart, 1))


# ---- a whole run ----


def rows(count=80):
    words = small_llama.tokenizer()
    texts = small_llama.sentences(count, low=4, high=12)
    return Dataset.from_list([{"input_ids": words(text)["input_ids"]} for text in texts])


def trainer(out, **changes):
    settings = {
        "use_cpu": True,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_steps": 20,
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 4,
        "eval_strategy": "steps",
        "eval_steps": 10,
    }
    return Trainer(
        model=small_llama.causal_lm(num_hidden_layers=2),
        args=TrainingArguments(output_dir=str(out), **{**settings, **changes}),
        train_dataset=rows(),
        eval_dataset=rows(8),
        data_collator=DataCollatorForLanguageModeling(small_llama.tokenizer(), mlm=False),
        compute_metrics=lambda p: {
            "right": float((p.predictions.argmax(-1) == p.label_ids).mean())
        },
    )


@pytest.mark.parametrize(
    ("changes", "fused", "tolerance"),
    [
        ({}, 20, 2e-4),
        ({"gradient_accumulation_steps": 2}, 40, 2e-4),
        ({"gradient_checkpointing": True}, 20, 2e-4),
        ({"bf16": True}, 20, 1e-2),  # autocast: transformers rounds its logits to bf16
        ({"label_smoothing_factor": 0.1}, 0, 2e-4),
    ],
)
def test_trainer_keeps_its_curve(changes, fused, tolerance, tmp_path):
    plain = trainer(tmp_path / "plain", **changes)
    plain.train()
    backend = _backend.auto("linear_cross_entropy", "cpu")
    before = _backend.calls["linear_cross_entropy", backend]
    with integration.patch(self_check=False) as patched:
        ours = trainer(tmp_path / "ours", **changes)
        ours.train()
    assert _backend.calls["linear_cross_entropy", backend] - before == fused
    assert patched.fallbacks == {}
    assert losses(ours) == pytest.approx(losses(plain), abs=tolerance)
    assert max(losses(plain)) - min(losses(plain)) > 0.1
    for key in ("eval_loss", "eval_right"):
        mine, original = (
            [row[key] for row in t.state.log_history if key in row] for t in (ours, plain)
        )
        assert len(original) == 2
        assert mine == pytest.approx(original, abs=10 * tolerance)
