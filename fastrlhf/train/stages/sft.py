"""Supervised fine-tuning on demonstrations (paper C.1).

Loss: mean NLL over the batch's targets, in nats per token. The targets are the response and its EOS, or with
`loss_on="full"` the prompt as well.

With `pretrain_mix` > 0 every batch also holds pretraining text, which gives the paper's RL initialization (C.3).
"""

from dataclasses import dataclass
from typing import Literal

from fastrlhf.errors import UserError
from fastrlhf.train import data
from fastrlhf.train.config import require_paths
from fastrlhf.train.models import (
    context_length,
    load_policy,
    load_tokenizer,
)
from fastrlhf.train.optim import OptimConfig, Optimizers, cosine
from fastrlhf.train.run import OutputConfig, Run
from fastrlhf.train.runtime import Runtime, RuntimeConfig
from fastrlhf.train.steps import mean_nll, nll_backward, require_batch, require_fit, steps_of
from fastrlhf.train.text import TextConfig, TextEncoder


@dataclass
class SFTConfig(OptimConfig, RuntimeConfig, TextConfig, OutputConfig):
    """Settings of the sft stage; the defaults are those of the paper's 1.3B SFT model."""

    model: str = ""  # folder of the base model
    demonstrations: str = ""  # JSONL: prompt, completion
    valid_demonstrations: str = ""  # held-out demonstrations, for the loss at the end
    text: str = ""  # pretraining text, needed if pretrain_mix > 0
    pretrain_mix: float = 0.0  # share of pretraining sequences in a batch; 0.1 for the RL init
    pretrain_length: int = 0  # tokens of a pretraining sequence; 0: the model's context
    lr: float = 9.65e-6  # peak learning rate
    epochs: float = 16.0  # passes over the demonstrations
    batch: int = 32  # demonstrations per step
    max_tokens: int = 8192  # tokens of a micro-batch
    warmup: int = 0  # steps of linear warmup
    lr_floor: float = 0.1  # end of the cosine schedule, as a share of lr
    dropout: float = 0.2  # residual dropout
    router_coef: float | None = None  # weight of a router loss (experts); null: the model's own
    loss_on: Literal["response", "full"] = "response"  # full: on the prompt too; not in the paper


def main(cfg: SFTConfig) -> dict:
    """Fine-tune a model and write it to `cfg.out`; return {"train/loss", "valid/loss", "steps", ...}."""
    runtime = Runtime(cfg)
    _check(cfg)
    with Run(cfg, "sft", runtime) as run:
        tokenizer = load_tokenizer(cfg.model, cfg.trust_remote_code)
        policy = load_policy(
            cfg.model, runtime, trainable=True, tokenizer=tokenizer, backend=cfg.backend
        )
        text = TextEncoder(tokenizer, cfg.parse_special_tokens)
        policy.set_residual_dropout(cfg.dropout)
        router_coefficient = policy.router_coefficient(cfg.router_coef)
        context = context_length(policy.config)
        examples = _examples(cfg, cfg.demonstrations, text, context)
        valid = (
            _examples(cfg, cfg.valid_demonstrations, text, context)
            if cfg.valid_demonstrations
            else None
        )
        windows = []
        if cfg.pretrain_mix > 0:
            length = data.window_length(cfg.pretrain_length, context, "pretrain_length")
            windows = data.text_windows(
                data.read_text(cfg.text), text, length, f"text {cfg.text!r}"
            )
        for part, what in (
            (examples, "demonstrations"),
            (valid, "valid_demonstrations"),
            (windows, "text"),
        ):
            require_fit([len(e.tokens) for e in part or []], cfg.max_tokens, what)
        mixed = round(cfg.batch * cfg.pretrain_mix / (1 - cfg.pretrain_mix))
        if windows:
            require_batch(
                mixed, len(windows), "batch * pretrain_mix / (1 - pretrain_mix)", "text windows"
            )
        steps = steps_of(cfg.epochs, len(examples), cfg.batch, "demonstrations")
        optimizer = Optimizers(policy, cfg)
        order = data.Shuffle(len(examples), cfg.seed)
        text_order = data.Shuffle(max(1, len(windows)), cfg.seed + 1)
        module = runtime.prepare(policy, optimizer)

        run.say(text.notes)
        module.train()
        parts = {
            "model": policy,
            "optimizer": optimizer,
            "order": order,
            "text_order": text_order,
        }
        for step in run.steps(steps, parts):
            batch = [examples[i] for i in order.take(cfg.batch)]
            if windows:
                batch += [windows[i] for i in text_order.take(mixed)]
            losses = nll_backward(
                module,
                batch[runtime.rank :: runtime.world],
                runtime,
                cfg.max_tokens,
                router_coefficient=router_coefficient,
            )
            metrics = {f"train/{name}": float(loss) for name, loss in losses.items()}
            metrics["grad_norm"] = runtime.clip(module, cfg.max_grad_norm)
            run.check(step, metrics)
            metrics["lr"] = optimizer.step(
                cosine(step - 1, steps, warmup=cfg.warmup, floor=cfg.lr_floor)
            )
            run.log(step, metrics)

        summary = {
            "train/loss": run.metrics["train/loss"],
            "steps": steps,
            "demonstrations": len(examples),
        }
        if valid:
            summary["valid/loss"] = mean_nll(module, valid, runtime, cfg.max_tokens)
        return run.finish(runtime.unwrap(module).lm, tokenizer, summary)


def _check(cfg: SFTConfig) -> None:
    require_paths(cfg, "model", "demonstrations")
    if cfg.loss_on not in ("response", "full"):
        raise UserError(f"loss_on: expected response or full, got {cfg.loss_on!r}")
    if not 0 <= cfg.pretrain_mix < 1:
        raise UserError(f"pretrain_mix: expected a share in [0, 1), got {cfg.pretrain_mix}")
    if cfg.pretrain_mix > 0 and not cfg.text:
        raise UserError(
            "pretrain_mix > 0 needs text: expected a file of pretraining text, got nothing"
        )


def _examples(cfg: SFTConfig, path: str, text: TextEncoder, context: int) -> list[data.Example]:
    rows = data.read_rows(path, {"prompt": str, "completion": str}, "demonstrations")
    what = f"demonstrations {path!r}"
    return data.encode_examples(rows, text, context, what, full_loss=cfg.loss_on == "full")
