"""Pretraining: next-token prediction on plain text, from fresh weights. Gives the base model of the other stages.

The model is a Llama of the configured size. The tokenizer is a byte-level BPE trained on the same text, unless a
folder with a tokenizer is given.

Loss: mean NLL over all tokens of the batch, in nats per token.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from fastrlhf.errors import UserError
from fastrlhf.train import data
from fastrlhf.train.models import load_tokenizer, policy_from_config
from fastrlhf.train.optim import OptimConfig, Optimizers, cosine
from fastrlhf.train.run import OutputConfig, Run
from fastrlhf.train.runtime import PRECISIONS, Runtime, RuntimeConfig
from fastrlhf.train.steps import mean_nll, nll_backward, require_batch, require_fit
from fastrlhf.train.text import TextConfig, TextEncoder
from fastrlhf.train.vocabulary import Vocabulary

EOS, PAD = "<|end|>", "<|pad|>"


@dataclass
class PretrainConfig(OptimConfig, RuntimeConfig, TextConfig, OutputConfig):
    """Settings of the pretrain stage."""

    text: str = ""  # training text: .txt(.gz), or .jsonl(.gz) with "text"
    valid_text: str = ""  # held-out text, for the loss at the end
    tokenizer: str = ""  # folder with a tokenizer; empty: train one
    vocab_size: int = 1024  # vocabulary size of a trained tokenizer
    tokenizer_text: list[str] = field(default_factory=list)  # more text to train the tokenizer on
    special_tokens: list[str] = field(
        default_factory=list
    )  # strings that are one token each, see parse_special_tokens
    hidden_size: int = 128  # hidden size
    intermediate_size: int = 384  # width of the MLP
    layers: int = 4  # transformer layers
    heads: int = 4  # attention heads
    context: int = 256  # tokens of a training sequence
    steps: int = 1000  # optimizer steps
    batch: int = 32  # sequences of `context` tokens per step
    max_tokens: int = 8192  # tokens of a micro-batch
    warmup: int = 20  # steps of linear warmup
    lr_floor: float = 0.1  # end of the cosine schedule, as a share of lr
    save_precision: Literal["fp32", "bf16"] = "fp32"  # dtype of the saved weights


def main(cfg: PretrainConfig) -> dict:
    """Train a base model and write it to `cfg.out`; return {"train/loss", "valid/loss", "tokens", ...}."""
    runtime = Runtime(cfg)
    if runtime.fsdp:
        raise UserError(
            "pretrain: expected one process or DDP, got FSDP2; its last step edits unsharded "
            "embedding rows (unset ACCELERATE_USE_FSDP)"
        )
    if not cfg.text:
        raise UserError("text: expected a file of text to train on, got nothing")
    with Run(cfg, "pretrain", runtime) as run:
        documents = data.read_text(cfg.text)
        tokenizer = (
            load_tokenizer(cfg.tokenizer) if cfg.tokenizer else _train_tokenizer(cfg, documents)
        )
        text = TextEncoder(tokenizer, cfg.parse_special_tokens)
        windows = data.text_windows(documents, text, cfg.context, f"text {cfg.text!r}")
        valid = None
        if cfg.valid_text:
            valid = data.text_windows(
                data.read_text(cfg.valid_text), text, cfg.context, f"text {cfg.valid_text!r}"
            )
        require_fit([cfg.context], cfg.max_tokens, "windows (context)")
        require_batch(cfg.batch, len(windows), "batch", "text windows")
        vocabulary = Vocabulary.of(tokenizer)
        policy = policy_from_config(
            _llama(cfg, tokenizer, vocabulary.size), runtime, cfg.backend, vocabulary
        )
        optimizer = Optimizers(policy, cfg)
        order = data.Shuffle(len(windows), cfg.seed)
        module = runtime.prepare(policy, optimizer)

        run.say(text.notes)
        module.train()
        parts = {"model": policy, "optimizer": optimizer, "order": order}
        for step in run.steps(cfg.steps, parts):
            chosen = order.take(cfg.batch)[runtime.rank :: runtime.world]
            losses = nll_backward(
                module,
                [windows[i] for i in chosen],
                runtime,
                cfg.max_tokens,
                router_coefficient=policy.router_coefficient(None),
            )
            metrics = {f"train/{name}": float(loss) for name, loss in losses.items()}
            metrics["grad_norm"] = runtime.clip(module, cfg.max_grad_norm)
            run.check(step, metrics)
            metrics["lr"] = optimizer.step(
                cosine(step - 1, cfg.steps, warmup=cfg.warmup, floor=cfg.lr_floor)
            )
            run.log(step, metrics)

        summary = {
            "train/loss": run.metrics["train/loss"],
            "tokens": cfg.steps * cfg.batch * cfg.context,
        }
        if valid:
            summary["valid/loss"] = mean_nll(module, valid, runtime, cfg.max_tokens)
        lm = runtime.unwrap(module).lm
        separate_unseen_embeddings(lm, windows, cfg.seed)
        lm.to(PRECISIONS[cfg.save_precision])
        return run.finish(lm, tokenizer, summary)


@torch.no_grad()
def separate_unseen_embeddings(lm, windows: list[data.Example], seed: int) -> None:
    """Make the embeddings of tokens that never occur in `windows` distinguishable.

    Input and output embeddings are tied. Training only pushes an unseen token's row away from the hidden states,
    always in the same direction: after the demo's pretraining the cosine between any two such rows was 0.998, and a
    model fine-tuned from them could not distinguish its special tokens.

    Each unseen row becomes common + noise: `common` is the mean direction of the unseen rows, so that the token
    stays unlikely, and `noise` is a random direction. Both get the mean norm of the trained rows.
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
        padding_side="left",  # for batched generation elsewhere; this package never pads
        clean_up_tokenization_spaces=False,
    )


def _llama(cfg: PretrainConfig, tokenizer, rows: int) -> LlamaConfig:
    if cfg.hidden_size % (2 * cfg.heads):
        raise UserError(
            f"hidden_size: expected a multiple of 2 * heads = {2 * cfg.heads} (rotary embeddings "
            f"rotate pairs), got {cfg.hidden_size}"
        )
    return LlamaConfig(
        vocab_size=rows,
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.heads,
        max_position_embeddings=cfg.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
