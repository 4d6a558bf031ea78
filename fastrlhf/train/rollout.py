"""One PPO iteration's experience: sample, score on the train path, turn scores into advantages.

Shapes: B sequences of a micro-batch, N packed tokens, M response tokens (M <= N).

The split into minibatches and micro-batches is drawn before the old log-probs are taken, and both
passes run the very same packed batches: the ratio of the first minibatch is 1 to the last bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastrlhf.ops.kl_gae import kl_gae
from fastrlhf.train.data import Example, next_token_rows
from fastrlhf.train.packing import PackedBatch
from fastrlhf.train.runtime import Runtime
from fastrlhf.train.sampler import Samples
from fastrlhf.train.steps import micro_batches


@dataclass
class Micro:
    """One packed micro-batch and what is known of its M response tokens."""

    indices: np.ndarray  # which responses of the rollout
    weight: float  # 0: a repeat that only keeps the ranks in step
    batch: PackedBatch
    rows: torch.Tensor  # [M] positions whose hidden state predicts `targets`
    targets: torch.Tensor  # [M] response tokens
    lengths: np.ndarray  # [B] response lengths
    old_logprob: torch.Tensor | None = None  # [M]
    ref_logprob: torch.Tensor | None = None
    values: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    scores: torch.Tensor | None = None  # [B] reward model
    advantages: torch.Tensor | None = None
    returns: torch.Tensor | None = None


def split(
    prompts: Sequence[Sequence[int]],
    samples: Samples,
    minibatches: int,
    max_tokens: int,
    runtime: Runtime,
    seed: list[int],
) -> list[list[Micro]]:
    """A random split of the responses into minibatches, each packed into micro-batches."""
    examples = [
        Example(np.concatenate([np.asarray(p, dtype=np.int64), t]), len(p))
        for p, t in zip(prompts, samples.tokens, strict=True)
    ]
    order = np.random.default_rng(seed).permutation(len(examples))
    plan = []
    for part in np.array_split(order, minibatches):
        micros = []
        for inside, weight in micro_batches(
            [len(examples[i].tokens) for i in part], max_tokens, runtime
        ):
            indices = part[inside]
            chosen = [examples[i] for i in indices]
            lengths = np.array([e.targets for e in chosen])
            micros.append(Micro(indices, weight, *next_token_rows(chosen, runtime.device), lengths))
        plan.append(micros)
    return plan


@torch.no_grad()
def score(micros: Sequence[Micro], policy, reference, reward, value, temperature: float) -> None:
    """Old and reference log-probs, values and reward scores, on the train path, micro-batch by micro-batch."""
    for m in micros:
        m.old_logprob, m.entropy = policy(
            m.batch, m.rows, m.targets, mode="entropy", temperature=temperature
        )
        m.ref_logprob = reference(
            m.batch, m.rows, m.targets, mode="logprob", temperature=temperature
        )
        m.values = value(m.batch, m.rows)
        m.scores = reward(m.batch, m.batch.cu_seqlens[1:].long() - 1)


def advantages(
    micros: Sequence[Micro], scores: torch.Tensor, runtime: Runtime, cfg
) -> dict[str, float]:
    """KL-penalised rewards, GAE and whitening over the iteration's batch; fills each micro-batch.

    `scores` [responses]: what each response earns on its last token, after scaling and end-of-text rules.
    Returns the mean KL to the reference per sequence and per token.
    """
    real = [m for m in micros if m.weight]
    lengths = np.concatenate([m.lengths for m in real])
    cu_seqlens = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=runtime.device)

    def gather(name: str) -> torch.Tensor:
        return torch.cat([getattr(m, name) for m in real])

    out = kl_gae(
        gather("old_logprob"),
        gather("ref_logprob"),
        torch.cat([scores[torch.from_numpy(m.indices)] for m in real]).to(runtime.device),
        gather("values"),
        beta=cfg.kl_coef,
        estimator=cfg.kl_estimator,
        gamma=cfg.gamma,
        lam=cfg.lam,
        whiten=cfg.whiten_advantages and runtime.world == 1,
        cu_seqlens=cu_seqlens,
        backend=cfg.backend,
    )
    advantage = out.advantages
    if cfg.whiten_advantages and runtime.world > 1:
        advantage = _whiten_over_ranks(advantage, runtime)
    sizes = [len(m.targets) for m in real]
    for m, a, r in zip(real, advantage.split(sizes), out.returns.split(sizes), strict=True):
        m.advantages, m.returns = a, r
    for m in micros:
        if not m.weight:
            m.advantages, m.returns = torch.zeros_like(m.values), m.values
    kl, tokens, sequences = runtime.sum(
        float(out.kl.sum()), float(lengths.sum()), float(len(lengths))
    )
    return {"kl/reference": kl / sequences, "kl/token": kl / tokens}


def metrics(
    micros: Sequence[Micro], samples: Samples, runtime: Runtime, labels: Sequence[float] | None
) -> dict[str, float]:
    """What the rollout looks like, over all ranks; `labels`: a labeler's score of each response."""
    real = [m for m in micros if m.weight]
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
    found = {
        "reward/rm": reward / sequences,
        "policy/entropy": entropy / tokens,
        "length/mean": tokens / sequences,
        "eos/fraction": ended / sequences,
        "sampler/logprob_gap": gap / tokens,
    }
    return found if labels is None else {**found, "reward/labeler": labeled / sequences}


def _whiten_over_ranks(x: torch.Tensor, runtime: Runtime) -> torch.Tensor:
    # masked_whiten's rule with the sums taken over all ranks, in two passes so that nothing cancels.
    total, count = runtime.sum(float(x.double().sum()), float(x.numel()))
    mean = total / count
    (squares,) = runtime.sum(float((x.double() - mean).square().sum()))
    return (x - mean) * (squares / (count - 1) + 1e-8) ** -0.5
