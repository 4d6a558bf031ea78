"""The experience of one PPO iteration: split the responses into micro-batches, score them, compute advantages.

Shapes: R responses of this rank; B sequences, N packed tokens and M response tokens (M <= N) of a micro-batch.

A micro-batch passes through three stages, each a type that adds fields:
`MicroBatch` -(score)-> `ScoredMicroBatch` -(add_advantages)-> `TrainingMicroBatch`.

`score` and the PPO update run the same packed micro-batches. Reductions therefore happen in the same order, and
the probability ratio of the first minibatch is exactly 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastrlhf.ops.kl_gae import kl_gae
from fastrlhf.train.data import Example, next_token_rows
from fastrlhf.train.heads import TokenLogprobs
from fastrlhf.train.packing import PackedBatch
from fastrlhf.train.runtime import Runtime
from fastrlhf.train.sampler import Samples
from fastrlhf.train.steps import members, micro_batches


@dataclass(frozen=True)
class MicroBatch:
    """Packed prompts and responses."""

    indices: np.ndarray  # [B] numbers of the responses in the rollout
    weight: float  # 0 for a filler that equalizes the number of micro-batches over ranks, else 1
    batch: PackedBatch
    rows: torch.Tensor  # [M] positions whose hidden state predicts `targets`
    targets: torch.Tensor  # [M] response tokens
    lengths: np.ndarray  # [B] response lengths; they sum to M


@dataclass(frozen=True)
class ScoredMicroBatch(MicroBatch):
    """A micro-batch with the outputs of policy, reference, value and reward model before the update."""

    old_logprob: torch.Tensor  # [M] of the policy, nats
    ref_logprob: torch.Tensor  # [M] of the reference, nats
    entropy: torch.Tensor  # [M] of the policy, nats
    values: torch.Tensor  # [M]
    scores: torch.Tensor  # [B] of the reward model


@dataclass(frozen=True)
class TrainingMicroBatch(ScoredMicroBatch):
    """A scored micro-batch with the targets of the PPO update."""

    advantages: torch.Tensor  # [M]
    returns: torch.Tensor  # [M]


def shares(
    episodes: int, minibatches: int, seed: list[int], runtime: Runtime
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Shuffle the episodes of all ranks, split them into minibatches, and give each rank its share of every one.

    The minibatches hold the same episodes on any number of ranks.

    Args:
        episodes: number of episodes over all ranks.
        minibatches: number of minibatches, i.e. optimizer steps in one pass.
        seed: of the shuffle, the same on all ranks.

    Returns:
        (mine, parts): the R episodes of this rank, ascending, and for each minibatch the places in `mine`.
    """
    order = np.random.default_rng(seed).permutation(episodes)
    parts = [p[runtime.rank :: runtime.world] for p in np.array_split(order, minibatches)]
    mine = np.sort(np.concatenate(parts))
    return mine, [np.searchsorted(mine, part) for part in parts]


def split(
    prompts: Sequence[Sequence[int]],
    samples: Samples,
    parts: Sequence[np.ndarray],
    max_tokens: int,
    runtime: Runtime,
) -> list[list[MicroBatch]]:
    """Pack the responses of each minibatch into micro-batches.

    Args:
        prompts: token ids of the prompt of each response.
        samples: the responses.
        parts: the numbers of the responses in each minibatch, from `shares`.
        max_tokens: token budget of a micro-batch.

    Returns:
        One list of micro-batches for each minibatch.
    """
    examples = [
        Example(np.concatenate([np.asarray(p, dtype=np.int64), t]), len(p))
        for p, t in zip(prompts, samples.tokens, strict=True)
    ]
    return [
        [
            _micro_batch(examples, part[inside], weight, runtime.device)
            for inside, weight in micro_batches(
                [len(examples[i].tokens) for i in part], max_tokens, runtime
            )
        ]
        for part in parts
    ]


def _micro_batch(examples: Sequence[Example], indices, weight: float, device) -> MicroBatch:
    chosen = members(examples, indices)
    lengths = np.array([e.targets for e in chosen])
    return MicroBatch(indices, weight, *next_token_rows(chosen, device), lengths)


@torch.no_grad()
def score(
    micros: Sequence[MicroBatch], policy, reference, reward_model, value_model, temperature: float
) -> list[ScoredMicroBatch]:
    """Run the four models on each micro-batch; `temperature` applies to all log-probs and entropies."""
    scored = []
    for m in micros:
        old_logprob, entropy = policy(
            m.batch, m.rows, TokenLogprobs(m.targets, temperature, entropy=True)
        )
        scored.append(
            ScoredMicroBatch(
                **vars(m),
                old_logprob=old_logprob,
                ref_logprob=reference(m.batch, m.rows, TokenLogprobs(m.targets, temperature)),
                entropy=entropy,
                values=value_model(m.batch, m.rows),
                scores=reward_model(m.batch, m.batch.last_rows),
            )
        )
    return scored


def add_advantages(
    minibatches: Sequence[Sequence[ScoredMicroBatch]], scores: torch.Tensor, runtime: Runtime, cfg
) -> tuple[list[list[TrainingMicroBatch]], dict[str, float]]:
    """Advantages and returns of a rollout: KL-penalized rewards, GAE, whitening.

        reward_t = -kl_coef * KL_t, plus the response's score at its last token

    Args:
        minibatches: the scored micro-batches.
        scores: [R] reward of each response, after scaling and the rule for a missing EOS.
        cfg: PPO's settings: kl_coef, kl_estimator, gamma, lam, whiten_advantages, backend.

    Returns:
        The micro-batches with advantages and returns, and the mean KL to the reference over all ranks, in nats:
        {"kl/reference": per response, "kl/token": per token}.
    """
    real = [m for part in minibatches for m in part if m.weight]
    lengths = np.concatenate([m.lengths for m in real])
    cu_seqlens = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=runtime.device)
    out = kl_gae(
        torch.cat([m.old_logprob for m in real]),
        torch.cat([m.ref_logprob for m in real]),
        torch.cat([scores[torch.from_numpy(m.indices)] for m in real]).to(runtime.device),
        torch.cat([m.values for m in real]),
        beta=cfg.kl_coef,
        estimator=cfg.kl_estimator,
        gamma=cfg.gamma,
        lam=cfg.lam,
        whiten=cfg.whiten_advantages and runtime.world == 1,
        cu_seqlens=cu_seqlens,
        backend=cfg.backend,
    )
    advantages = out.advantages
    if cfg.whiten_advantages and runtime.world > 1:
        advantages = _whiten_over_ranks(advantages, runtime)
    sizes = [len(m.targets) for m in real]
    split = zip(advantages.split(sizes), out.returns.split(sizes), strict=True)

    def trained(m: ScoredMicroBatch) -> TrainingMicroBatch:
        # A filler needs tensors of the right shape only.
        advantages, returns = next(split) if m.weight else (torch.zeros_like(m.values), m.values)
        return TrainingMicroBatch(**vars(m), advantages=advantages, returns=returns)

    kl, tokens, sequences = runtime.sum(
        float(out.kl.sum()), float(lengths.sum()), float(len(lengths))
    )
    metrics = {"kl/reference": kl / sequences, "kl/token": kl / tokens}
    return [[trained(m) for m in part] for part in minibatches], metrics


def metrics(
    minibatches: Sequence[Sequence[ScoredMicroBatch]],
    samples: Samples,
    runtime: Runtime,
    labels: Sequence[float] | None,
) -> dict[str, float]:
    """Means over the rollout of all ranks.

    "sampler/logprob_gap" is the mean absolute difference, in nats per token, between the sampler's log-probs and
    those of the training path. `labels` [R] are the labeler's scores, if there is one.
    """
    real = [m for part in minibatches for m in part if m.weight]
    gap = 0.0
    for m in real:
        sampled = torch.cat([torch.from_numpy(samples.logprobs[i]) for i in m.indices])
        gap += float((sampled - m.old_logprob.cpu()).abs().sum())
    sequences, tokens, reward, entropy, ended, gap, labeled = runtime.sum(
        float(len(samples.tokens)),
        float(sum(len(t) for t in samples.tokens)),
        sum(float(m.scores.sum()) for m in real),
        sum(float(m.entropy.sum()) for m in real),
        float(sum(samples.finished)),
        gap,
        float(np.sum(labels)) if labels is not None else 0.0,
    )
    means = {
        "reward/rm": reward / sequences,
        "policy/entropy": entropy / tokens,
        "length/mean": tokens / sequences,
        "eos/fraction": ended / sequences,
        "sampler/logprob_gap": gap / tokens,
    }
    return means if labels is None else {**means, "reward/labeler": labeled / sequences}


def _whiten_over_ranks(x: torch.Tensor, runtime: Runtime) -> torch.Tensor:
    # masked_whiten with sums over all ranks. Two passes, because E[x^2] - E[x]^2 cancels.
    total, count = runtime.sum(float(x.double().sum()), float(x.numel()))
    mean = total / count
    (squares,) = runtime.sum(float((x.double() - mean).square().sum()))
    return (x - mean) * (squares / (count - 1) + 1e-8) ** -0.5
