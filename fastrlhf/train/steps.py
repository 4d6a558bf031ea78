"""Passes over a set of sequences in micro-batches: gradients, losses, rewards and log-probs.

Shapes: n sequences, N packed tokens and M rows (positions that predict a target) of a micro-batch.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from fastrlhf.errors import UserError
from fastrlhf.train.data import Example, next_token_rows
from fastrlhf.train.heads import SummedNLL, TokenLogprobs
from fastrlhf.train.packing import collate, pack
from fastrlhf.train.runtime import Runtime

# Two tokens and no target: the id 0 may have no token, and then its log-prob is -inf.
FILLER = Example(np.zeros(2, dtype=np.int64), 2)


def micro_batches(
    lengths: Sequence[int], max_tokens: int, runtime: Runtime
) -> list[tuple[np.ndarray, float]]:
    """Split sequences of `lengths` [n] into micro-batches of at most `max_tokens` tokens.

    DDP and FSDP need the same number of forwards on every rank, so a rank with fewer micro-batches, or without
    data, takes part in the rest with weight 0. Such a micro-batch has no indices: run FILLER in it.

    Returns:
        (indices, weight) of each micro-batch.
    """
    bins = pack(np.asarray(lengths, dtype=np.int64), max_tokens)
    missing = int(runtime.max(len(bins))) - len(bins)
    return [(b, 1.0) for b in bins] + [(np.empty(0, dtype=np.int64), 0.0)] * missing


def members(examples: Sequence[Example], indices: np.ndarray) -> list[Example]:
    """The examples of a micro-batch: FILLER alone if its weight is 0."""
    return [examples[i] for i in indices] or [FILLER]


def require_batch(size: int, available: int, name: str, what: str) -> None:
    """Raise UserError if a batch would have to hold some of the `available` rows twice."""
    if size > available:
        raise UserError(f"{name}: expected at most {available}, the number of {what}, got {size}")


def steps_of(epochs: float, rows: int, batch: int, what: str) -> int:
    """Optimizer steps of `epochs` passes over `rows`; the last batch is filled up from the next pass."""
    require_batch(batch, rows, "batch", what)
    return max(1, math.ceil(epochs * rows / batch))


def require_fit(lengths: Sequence[int], max_tokens: int, what: str) -> None:
    """Raise UserError if a sequence is longer than a micro-batch may be."""
    longest = max(lengths, default=0)
    if longest > max_tokens:
        raise UserError(
            f"max_tokens: expected at least {longest}, the longest of {what}, got {max_tokens}"
        )


def nll_backward(
    module,
    examples: Sequence[Example],
    runtime: Runtime,
    max_tokens: int,
    scale: float = 1.0,
    router_coefficient: float = 0.0,
) -> dict[str, torch.Tensor]:
    """Accumulate the gradient of `scale` * (mean NLL + router_coefficient * router loss) into a policy.

        mean NLL    = sum over all ranks' targets of -logprob / number of all ranks' targets    (nats per token)
        router loss = mean over the micro-batches of their load-balancing losses, weighted by their tokens

    Returns:
        {"loss": the mean NLL} and, unless the coefficient is 0, {"router_loss": the router loss}; 0-d, detached.
    """
    micros = micro_batches([len(e.tokens) for e in examples], max_tokens, runtime)
    targets, tokens = runtime.sum(
        float(sum(e.targets for e in examples)), float(sum(len(e.tokens) for e in examples))
    )
    sums = torch.zeros(2, device=runtime.device)
    for number, (indices, weight) in enumerate(micros, 1):
        batch, rows, expected = next_token_rows(members(examples, indices), runtime.device)
        out = module(batch, rows, SummedNLL(expected), with_router_loss=router_coefficient != 0)
        nll, router = out if router_coefficient else (out, torch.zeros_like(out))
        parts = torch.stack(
            [nll * (weight / targets), router * (weight * len(batch.input_ids) / tokens)]
        )
        loss = parts[0] + router_coefficient * parts[1]
        # DDP averages gradients over ranks; times `world`, they are summed.
        runtime.backward([module], loss * (scale * runtime.world), last=number == len(micros))
        sums += parts.detach().float()
    if runtime.world > 1:
        sums = runtime.accelerator.reduce(sums, reduction="sum")
    return {"loss": sums[0]} | ({"router_loss": sums[1]} if router_coefficient else {})


@torch.no_grad()
def mean_nll(module, examples: Sequence[Example], runtime: Runtime, max_tokens: int) -> float:
    """Mean NLL of a data set over all ranks, in nats per token, in evaluation mode."""
    training = module.training
    module.eval()
    local = examples[runtime.rank :: runtime.world]
    summed = 0.0
    for indices, weight in micro_batches([len(e.tokens) for e in local], max_tokens, runtime):
        batch, rows, targets = next_token_rows(members(local, indices), runtime.device)
        summed += weight * float(module(batch, rows, SummedNLL(targets)))
    module.train(training)
    summed, tokens = runtime.sum(summed, float(sum(e.targets for e in local)))
    return summed / tokens


@torch.no_grad()
def score_sequences(module, sequences: Sequence[np.ndarray], max_tokens: int) -> np.ndarray:
    """Reward of each token sequence, fp64 [n]: a reward model's score at the last token."""
    device = next(module.parameters()).device
    scores = np.empty(len(sequences), dtype=np.float64)
    for indices in pack([len(s) for s in sequences], max_tokens):
        batch = collate([sequences[i] for i in indices]).to(device)
        scores[indices] = module(batch, batch.last_rows).double().cpu().numpy()
    return scores


@torch.no_grad()
def token_logprobs(module, examples: Sequence[Example], max_tokens: int) -> list[np.ndarray]:
    """Log-probs (nats, fp32) of the target tokens of each example, at temperature 1."""
    device = next(module.parameters()).device
    out = [np.empty(0, dtype=np.float32)] * len(examples)
    for indices in pack([len(e.tokens) for e in examples], max_tokens):
        chosen = [examples[i] for i in indices]
        batch, rows, targets = next_token_rows(chosen, device)
        flat = module(batch, rows, TokenLogprobs(targets)).float().cpu()
        for i, part in zip(indices, flat.split([e.targets for e in chosen]), strict=True):
            out[i] = part.numpy()
    return out
