"""Reward model from K-wise rankings (paper 3.5, C.2).

Loss of a prompt, over its pairs with rank_i < rank_j (1 is the best):

    -mean log sigmoid(r_i - r_j)

r is the score at the completion's last token (EOS). All completions of a prompt are in one micro-batch, so each is
read once for all of its pairs. After training, a bias makes the demonstrations score 0 on average, and the standard
deviation of the scores is stored beside it (PPO's `scale_reward` divides by it).
"""

from dataclasses import dataclass

import numpy as np
import torch

from fastrlhf.ops.ranking_loss import ranking_loss
from fastrlhf.train import data
from fastrlhf.train.config import require_paths
from fastrlhf.train.models import (
    REWARD_BIAS,
    REWARD_STD,
    check_vocabulary,
    context_length,
    load_tokenizer,
    reward_model_from_policy,
)
from fastrlhf.train.optim import OptimConfig, Optimizers, cosine
from fastrlhf.train.packing import collate
from fastrlhf.train.run import OutputConfig, Run
from fastrlhf.train.runtime import Runtime, RuntimeConfig
from fastrlhf.train.steps import FILLER, micro_batches, require_fit, score_sequences, steps_of
from fastrlhf.train.text import TextConfig, TextEncoder
from fastrlhf.train.vocabulary import with_pad


@dataclass
class RewardConfig(OptimConfig, RuntimeConfig, TextConfig, OutputConfig):
    """Settings of the reward stage; the defaults are those of the paper's 6B reward model."""

    model: str = ""  # folder of the language model that the reward model starts from
    rankings: str = ""  # JSONL: prompt, completions, ranks (1 = best, ties allowed)
    valid_rankings: str = ""  # held-out rankings, for the pair accuracy at the end
    demonstrations: str = ""  # JSONL: prompt, completion; their mean score becomes 0
    lr: float = 9e-6  # peak learning rate
    epochs: int = 1  # passes over the rankings; more than one overfits
    batch: int = 64  # prompts per step, each with all its completions
    max_tokens: int = 16384  # tokens of a micro-batch; a prompt's completions stay together
    warmup: int = 0  # steps of linear warmup
    lr_floor: float = 0.1  # end of the cosine schedule, as a share of lr


@dataclass(frozen=True)
class Comparison:
    """A prompt with K ranked completions."""

    sequences: list[np.ndarray]  # K token sequences: prompt + completion + EOS
    ranks: list[int]  # K; 1 is the best, ties allowed


NOTHING = Comparison([FILLER.tokens] * 2, [1, 2])  # of a rank without data


def main(cfg: RewardConfig) -> dict:
    """Train a reward model and write it to `cfg.out`.

    Returns:
        {"train/loss", "train/accuracy", "valid/accuracy", "bias", "std", "demonstrations/mean", ...}.
    """
    runtime = Runtime(cfg)
    require_paths(cfg, "model", "rankings")
    with Run(cfg, "reward", runtime) as run:
        tokenizer = load_tokenizer(cfg.model, cfg.trust_remote_code)
        reward_model = reward_model_from_policy(cfg.model, runtime, cfg.seed)
        check_vocabulary(tokenizer, reward_model.model, cfg.model)
        tokenizer = with_pad(tokenizer, reward_model.model)
        text = TextEncoder(tokenizer, cfg.parse_special_tokens)
        context = context_length(reward_model.config)
        train = _comparisons(cfg.rankings, text, context)
        valid = _comparisons(cfg.valid_rankings, text, context) if cfg.valid_rankings else None
        demos = []
        if cfg.demonstrations:
            rows = data.read_rows(
                cfg.demonstrations, {"prompt": str, "completion": str}, "demonstrations"
            )
            what = f"demonstrations {cfg.demonstrations!r}"
            demos = [e.tokens for e in data.encode_examples(rows, text, context, what)]
        usable = [c for c in train if len(set(c.ranks)) > 1]
        sizes = [sum(map(len, c.sequences)) for c in (*usable, *(valid or ()))]
        require_fit(sizes, cfg.max_tokens, "the prompts' completions together")
        require_fit([len(x) for x in demos], cfg.max_tokens, "demonstrations")
        steps = steps_of(cfg.epochs, len(usable), cfg.batch, "rankings that are not all ties")
        optimizer = Optimizers(reward_model, cfg)
        order = data.Shuffle(len(usable), cfg.seed)
        module = runtime.prepare(reward_model, optimizer)

        run.say(text.notes)
        module.train()
        parts = {"model": reward_model, "optimizer": optimizer, "order": order}
        for step in run.steps(steps, parts):
            chosen = order.take(cfg.batch)[runtime.rank :: runtime.world]
            loss, accuracy = _backward(module, [usable[i] for i in chosen], runtime, cfg)
            metrics = {"train/loss": loss, "train/accuracy": accuracy}
            metrics["grad_norm"] = runtime.clip(module, cfg.max_grad_norm)
            run.check(step, metrics)
            metrics["lr"] = optimizer.step(
                cosine(step - 1, steps, warmup=cfg.warmup, floor=cfg.lr_floor)
            )
            run.log(step, metrics)

        module.eval()
        summary = {
            "train/loss": run.metrics["train/loss"],
            "train/accuracy": run.metrics["train/accuracy"],
            "prompts": len(usable),
            "all_ties": len(train) - len(usable),
        }
        sample = usable[: max(256, cfg.batch)]
        std = float(np.concatenate(_score(module, sample, cfg.max_tokens)).std())
        bias = -float(np.mean(score_sequences(module, demos, cfg.max_tokens))) if demos else 0.0
        setattr(reward_model.config, REWARD_BIAS, bias)
        setattr(reward_model.config, REWARD_STD, std)
        summary |= {"bias": bias, "std": std}
        if demos:
            summary["demonstrations/mean"] = float(
                np.mean(score_sequences(module, demos, cfg.max_tokens))
            )
        if valid:
            summary["valid/accuracy"] = _accuracy(valid, _score(module, valid, cfg.max_tokens))
        return run.finish(runtime.unwrap(module).model, tokenizer, summary)


def _backward(
    module, comparisons: list[Comparison], runtime: Runtime, cfg: RewardConfig
) -> tuple[float, float]:
    """Accumulate the gradient of the mean loss over all ranks' prompts; return (loss, pair accuracy)."""
    sizes = [sum(len(s) for s in c.sequences) for c in comparisons]
    micros = micro_batches(sizes, cfg.max_tokens, runtime)
    (total,) = runtime.sum(float(len(comparisons)))
    summed, correct = torch.zeros((), device=runtime.device), 0.0
    for number, (indices, weight) in enumerate(micros, 1):
        part = [comparisons[i] for i in indices] or [NOTHING]
        batch = collate([s for c in part for s in c.sequences]).to(runtime.device)
        ranks = torch.tensor([r for c in part for r in c.ranks], device=runtime.device)
        groups = torch.tensor(
            np.cumsum([0, *(len(c.ranks) for c in part)]), dtype=torch.int32, device=runtime.device
        )
        scores = module(batch, batch.last_rows)
        share = weight * len(part) / total
        loss = ranking_loss(scores, ranks, groups, backend=cfg.backend)
        # DDP averages gradients over ranks; times `world`, they are summed.
        runtime.backward([module], loss * (share * runtime.world), last=number == len(micros))
        summed += share * loss.detach()
        split = np.split(scores.detach().float().cpu().numpy(), groups[1:-1].tolist())
        correct += weight * _accuracy(part, split) * len(part)
    loss, correct = runtime.sum(float(summed), correct)
    return loss, correct / total


def _accuracy(comparisons: list[Comparison], scores: list[np.ndarray]) -> float:
    """Share of strictly ranked pairs with the better completion scored higher; mean over prompts."""
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


def _comparisons(path: str, text: TextEncoder, context: int) -> list[Comparison]:
    rows = data.read_rankings(path)
    flat = [{"prompt": r["prompt"], "completion": c} for r in rows for c in r["completions"]]
    tokens = iter(data.encode_examples(flat, text, context, f"rankings {path!r}, completion"))
    return [
        Comparison([next(tokens).tokens for _ in row["completions"]], row["ranks"]) for row in rows
    ]
