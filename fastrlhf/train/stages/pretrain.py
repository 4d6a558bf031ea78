"""Pre-training: next-token prediction on plain text, from fresh weights: the base model of the rest.

Tokenizer: a byte-level BPE trained on the same text, unless a folder with one is given. Model: a
Llama of the size asked for.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from fastrlhf.errors import UserError
from fastrlhf.train import data
from fastrlhf.train.models import check_vocabulary, load_tokenizer, policy_from_config
from fastrlhf.train.optim import OptimConfig, Optimizers, cosine
from fastrlhf.train.runtime import PRECISIONS, Runtime, RuntimeConfig
from fastrlhf.train.steps import mean_nll, nll_backward, require_fit
from fastrlhf.train.tracking import OutputConfig, Run

EOS, PAD = "<|end|>", "<|pad|>"


@dataclass
class PretrainConfig(OptimConfig, RuntimeConfig, OutputConfig):
    """Settings of the pretrain stage."""

    text: str = ""  # .txt(.gz) or .jsonl(.gz) with "text"
    valid_text: str = ""  # held-out text; its loss is reported at the end
    tokenizer: str = ""  # folder with a tokenizer; empty: train one
    vocab_size: int = 1024
    tokenizer_text: list[str] = field(
        default_factory=list
    )  # more files (text, or JSONL with "completion") to train it on
    special_tokens: list[str] = field(default_factory=list)  # one token each, never split
    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 4
    heads: int = 4
    context: int = 256
    steps: int = 1000
    batch: int = 32  # windows of `context` tokens a step
    max_tokens: int = 8192  # of a micro-batch
    warmup: int = 20  # steps
    lr_floor: float = 0.1  # of lr, where the cosine ends
    save_precision: Literal["fp32", "bf16"] = "fp32"  # of the final weights; bf16 halves the file


def main(cfg: PretrainConfig) -> dict:
    """Train a base model; returns {"train/loss", "valid/loss", ...}."""
    runtime = Runtime(cfg)
    if runtime.fsdp:
        raise UserError(
            "pretrain: expected one process or data-parallel ones, got FSDP2; its last step edits whole "
            "embedding rows (unset ACCELERATE_USE_FSDP)"
        )
    if not cfg.text:
        raise UserError("text: expected a file of text to train on, got nothing")
    with Run(cfg, "pretrain", runtime) as run:
        documents = data.read_text(cfg.text)
        tokenizer = (
            load_tokenizer(cfg.tokenizer) if cfg.tokenizer else _train_tokenizer(cfg, documents)
        )
        windows = data.text_windows(documents, tokenizer, cfg.context, f"text {cfg.text!r}")
        valid = None
        if cfg.valid_text:
            valid = data.text_windows(
                data.read_text(cfg.valid_text), tokenizer, cfg.context, f"text {cfg.valid_text!r}"
            )
        require_fit([cfg.context], cfg.max_tokens, "windows (context)")
        policy = policy_from_config(_llama(cfg, tokenizer), runtime, cfg.backend)
        check_vocabulary(tokenizer, policy.lm, "pretrain")
        optimizer = Optimizers(policy, cfg)
        order = data.Shuffle(len(windows), cfg.seed)
        module = runtime.prepare(policy, optimizer)
        if run.state:
            policy.load_state_dict(run.state["model"])
            optimizer.load_state_dict(run.state["optimizer"])
            order.cursor = run.state["cursor"]

        module.train()
        for step in range(run.begin(cfg.steps) + 1, cfg.steps + 1):
            chosen = order.take(cfg.batch)[runtime.rank :: runtime.world]
            loss = nll_backward(module, [windows[i] for i in chosen], runtime, cfg.max_tokens)
            norm = runtime.clip(module, cfg.max_grad_norm)
            metrics = {"train/loss": float(loss), "grad_norm": norm}
            run.check(step, metrics)
            metrics["lr"] = optimizer.step(
                cosine(step - 1, cfg.steps, warmup=cfg.warmup, floor=cfg.lr_floor)
            )
            run.log(step, metrics)
            run.checkpoint(
                step,
                lambda: {
                    "model": policy.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "cursor": order.cursor,
                },
            )

        summary = {
            "train/loss": run.last["train/loss"],
            "tokens": cfg.steps * cfg.batch * cfg.context,
        }
        if valid:
            summary["valid/loss"] = mean_nll(module, valid, runtime, cfg.max_tokens)
        lm = runtime.unwrap(module).lm
        spread_unseen(lm, windows, cfg.seed)
        lm.to(PRECISIONS[cfg.save_precision])
        return run.finish(lm, tokenizer, summary)


@torch.no_grad()
def spread_unseen(lm, windows: list[data.Example], seed: int) -> None:
    """Give tokens that the text never shows embeddings that differ from each other.

    Such rows have only ever been pushed away as wrong answers, all in one direction: after the demo's
    pretraining the cosine between any two of them was 0.998, and a model fine-tuned from there could
    not tell one special token from another. Each becomes that direction plus noise, both as long as a
    trained row: still an unlikely answer, but a word of its own.
    """
    rows = lm.get_input_embeddings().weight
    seen = torch.zeros(len(rows), dtype=torch.bool)
    seen[np.unique(np.concatenate([w.tokens for w in windows]))] = True
    if seen.all():
        return
    trained = rows[seen].norm(dim=1).mean()
    common = torch.nn.functional.normalize(rows[~seen].mean(0), dim=0)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(int((~seen).sum()), rows.shape[1], generator=generator).to(rows)
    rows[~seen] = trained * (common + torch.nn.functional.normalize(noise, dim=1))


def _train_tokenizer(cfg: PretrainConfig, documents: list[str]) -> PreTrainedTokenizerFast:
    corpus = list(documents)
    for path in cfg.tokenizer_text:
        if path.removesuffix(".gz").endswith(".jsonl"):
            corpus += [
                row["completion"]
                for row in data.read_rows(path, {"completion": str}, "tokenizer_text")
            ]
        else:
            corpus += data.read_text(path)
    special = [EOS, PAD, *cfg.special_tokens]
    if cfg.vocab_size < 256 + len(special):
        raise UserError(
            f"vocab_size: expected at least {256 + len(special)} (bytes + special tokens), got {cfg.vocab_size}"
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=cfg.vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = (line for document in corpus for line in document.splitlines(keepends=True))
    bpe.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=cfg.special_tokens,
        model_max_length=cfg.context,
        padding_side="left",  # for other people's batched generate; nothing here pads
        clean_up_tokenization_spaces=False,
    )


def _llama(cfg: PretrainConfig, tokenizer) -> LlamaConfig:
    if cfg.hidden_size % (2 * cfg.heads):
        raise UserError(
            f"hidden_size: expected a multiple of 2 * heads = {2 * cfg.heads} (rotary embeddings "
            f"turn pairs), got {cfg.hidden_size}"
        )
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.heads,
        max_position_embeddings=cfg.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
