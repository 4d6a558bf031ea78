"""Reward model from K-wise rankings (paper 3.5, C.2).

All pairs of a prompt are one batch element: each completion is read once, its score taken at its last token (EOS), and
the loss of a prompt is the mean over its strict pairs of -log sigmoid(r_better - r_worse). After training a bias makes
the demonstrations score 0 on average; the spread of the scores is stored beside it for those who want to scale rewards.
"""

from dataclasses import dataclass

import numpy as np
import torch

from fastrlhf.errors import UserError
from fastrlhf.ops.ranking_loss import ranking_loss
from fastrlhf.train import data, sharded
from fastrlhf.train.models import (
    REWARD_BIAS,
    REWARD_STD,
    check_vocabulary,
    context_length,
    load_tokenizer,
    scorer_from_policy,
    set_dropout,
)
from fastrlhf.train.optim import OptimConfig, Optimizers, cosine
from fastrlhf.train.packing import collate
from fastrlhf.train.runtime import Runtime, RuntimeConfig
from fastrlhf.train.steps import micro_batches, require_fit, score_sequences
from fastrlhf.train.tracking import OutputConfig, Run


@dataclass
class RewardConfig(OptimConfig, RuntimeConfig, OutputConfig):
    """Settings of the reward stage; the defaults are the paper's 6B reward model."""

    model: str = ""  # folder of the model whose body the reward model starts from
    rankings: str = ""  # JSONL: prompt, completions, ranks (1 = best, ties allowed)
    valid_rankings: str = ""  # held-out rankings: pair accuracy at the end
    demonstrations: str = ""  # JSONL: prompt, completion; their mean score becomes 0
    lr: float = 9e-6
    epochs: int = 1  # more than one overfits
    batch: int = 64  # prompts a step, each with all its completions
    max_tokens: int = 16384  # of a micro-batch; a prompt's completions stay together
    warmup: int = 0  # steps
    lr_floor: float = 0.1  # of lr, where the cosine ends


@dataclass(frozen=True)
class Comparison:
    """One ranked prompt: prompt + completion + EOS for each completion."""

    sequences: list[np.ndarray]
    ranks: list[int]


def main(cfg: RewardConfig) -> dict:
    """Train a reward model; returns {"train/loss", "train/accuracy", "valid/accuracy", "bias", "std", ...}."""
    runtime = Runtime(cfg)
    for name in ("model", "rankings"):
        if not getattr(cfg, name):
            raise UserError(f"{name}: expected a path, got nothing")
    with Run(cfg, "reward", runtime) as run:
        tokenizer = load_tokenizer(cfg.model, cfg.trust_remote_code)
        scorer = scorer_from_policy(cfg.model, runtime, cfg.seed)
        check_vocabulary(tokenizer, scorer.model, cfg.model)
        set_dropout(scorer, 0.0)
        context = context_length(scorer.config)
        train = _comparisons(cfg.rankings, tokenizer, context)
        valid = _comparisons(cfg.valid_rankings, tokenizer, context) if cfg.valid_rankings else None
        demos = []
        if cfg.demonstrations:
            rows = data.read_rows(
                cfg.demonstrations, {"prompt": str, "completion": str}, "demonstrations"
            )
            what = f"demonstrations {cfg.demonstrations!r}"
            demos = [e.tokens for e in data.encode_examples(rows, tokenizer, context, what)]
        usable = [c for c in train if len(set(c.ranks)) > 1]
        if not usable:
            raise UserError(
                f"rankings {cfg.rankings!r}: every prompt is all ties; there is nothing to learn from"
            )
        together = [sum(map(len, c.sequences)) for c in (*usable, *(valid or ()))]
        require_fit(together, cfg.max_tokens, "the prompts' completions together")
        require_fit([len(x) for x in demos], cfg.max_tokens, "demonstrations")
        steps = max(1, cfg.epochs * len(usable) // cfg.batch)
        optimizer = Optimizers(scorer, cfg)
        order = data.Shuffle(len(usable), cfg.seed)
        module = runtime.prepare(scorer, optimizer)
        if run.state:
            sharded.load(scorer, run.state["model"])
            optimizer.load_state_dict(run.state["optimizer"])
            order.cursor = run.state["cursor"]

        module.train()
        for step in range(run.begin(steps) + 1, steps + 1):
            chosen = order.take(cfg.batch)[runtime.rank :: runtime.world]
            loss, accuracy = _step(module, [usable[i] for i in chosen], runtime, cfg)
            metrics = {"train/loss": loss, "train/accuracy": accuracy}
            metrics["grad_norm"] = runtime.clip(module, cfg.max_grad_norm)
            run.check(step, metrics)
            metrics["lr"] = optimizer.step(
                cosine(step - 1, steps, warmup=cfg.warmup, floor=cfg.lr_floor)
            )
            run.log(step, metrics)
            run.checkpoint(
                step,
                lambda: {
                    "model": scorer.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "cursor": order.cursor,
                },
            )

        module.eval()
        summary = {
            "train/loss": run.last["train/loss"],
            "train/accuracy": run.last["train/accuracy"],
            "prompts": len(usable),
            "all_ties": len(train) - len(usable),
        }
        sample = usable[: max(256, cfg.batch)]
        spread = np.concatenate(_score(module, sample, cfg.max_tokens)).std()
        bias = -float(np.mean(score_sequences(module, demos, cfg.max_tokens))) if demos else 0.0
        setattr(scorer.config, REWARD_BIAS, bias)
        setattr(scorer.config, REWARD_STD, float(spread))
        summary |= {"bias": bias, "std": float(spread)}
        if demos:
            summary["demonstrations/mean"] = float(
                np.mean(score_sequences(module, demos, cfg.max_tokens))
            )
        if valid:
            summary["valid/accuracy"] = _accuracy(valid, _score(module, valid, cfg.max_tokens))
        return run.finish(runtime.unwrap(module).model, tokenizer, summary)


def _step(
    module, comparisons: list[Comparison], runtime: Runtime, cfg: RewardConfig
) -> tuple[float, float]:
    # Gradient of the mean over all ranks' prompts; a prompt's completions are never split over micro-batches.
    sizes = [sum(len(s) for s in c.sequences) for c in comparisons]
    micros = micro_batches(sizes, cfg.max_tokens, runtime)
    (total,) = runtime.sum(float(len(comparisons)))
    summed, right = torch.zeros((), device=runtime.device), 0.0
    for number, (indices, weight) in enumerate(micros, 1):
        part = [comparisons[i] for i in indices]
        batch = collate([s for c in part for s in c.sequences]).to(runtime.device)
        ranks = torch.tensor([r for c in part for r in c.ranks], device=runtime.device)
        groups = torch.tensor(
            np.cumsum([0, *(len(c.ranks) for c in part)]), dtype=torch.int32, device=runtime.device
        )
        scores = module(batch, batch.cu_seqlens[1:].long() - 1)
        share = weight * len(part) / total
        loss = ranking_loss(scores, ranks, groups, backend=cfg.backend)
        runtime.backward([module], loss * (share * runtime.world), last=number == len(micros))
        summed += share * loss.detach()
        split = np.split(scores.detach().float().cpu().numpy(), groups[1:-1].tolist())
        right += weight * _accuracy(part, split) * len(part)
    loss, right = runtime.sum(float(summed), right)
    return loss, right / total


def _accuracy(comparisons: list[Comparison], scores: list[np.ndarray]) -> float:
    """Mean over prompts of the share of strict pairs that the scores order as the ranks do."""
    shares = []
    for comparison, score in zip(comparisons, scores, strict=True):
        ranks = np.asarray(comparison.ranks)
        better = ranks[:, None] < ranks[None, :]
        if better.any():
            shares.append(float((score[:, None] > score[None, :])[better].mean()))
    return float(np.mean(shares)) if shares else float("nan")


def _score(module, comparisons: list[Comparison], max_tokens: int) -> list[np.ndarray]:
    flat = score_sequences(module, [s for c in comparisons for s in c.sequences], max_tokens)
    return np.split(flat, np.cumsum([len(c.ranks) for c in comparisons])[:-1])


def _comparisons(path: str, tokenizer, context: int) -> list[Comparison]:
    rows = data.read_rankings(path)
    flat = [{"prompt": r["prompt"], "completion": text} for r in rows for text in r["completions"]]
    tokens = iter(data.encode_examples(flat, tokenizer, context, f"rankings {path!r}, completion"))
    return [
        Comparison([next(tokens).tokens for _ in row["completions"]], row["ranks"]) for row in rows
    ]
