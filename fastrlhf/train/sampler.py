"""Sampling of responses from a policy, with a static key/value cache.

Shapes: B prompts, N packed prompt tokens, K cache slots per row (longest prompt + new tokens), k key heads,
D head width, V vocabulary size.

1. Prefill: the prompts run once as a packed batch, without padding, on the training path. Their keys and values
   are scattered into the cache.
2. Decode: each row generates one token per step at its own position. When a quarter of the rows have finished, the
   batch is compacted.

Log-probs are those of the distribution that is sampled from, with the temperature applied. The trainer recomputes
them on the training path and logs the difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn

from fastrlhf.errors import UserError
from fastrlhf.integrations import attention
from fastrlhf.train import sharded
from fastrlhf.train.models import Policy, check_positions
from fastrlhf.train.packing import collate
from fastrlhf.train.vocabulary import end_tokens

MIN_TEMPERATURE = 1e-6  # below it logits / temperature leaves the range of fp32; 0 is greedy


class NonFiniteLogits(UserError):
    """The policy's logits are NaN or infinite: its weights have diverged or are damaged."""


def check_temperature(
    value: float, name="temperature", error: type[Exception] = UserError, greedy: bool = True
):
    """Raise `error` unless `value` is finite and at least MIN_TEMPERATURE, or if `greedy` is allowed 0."""
    if not MIN_TEMPERATURE <= value < float("inf") and not (greedy and value == 0):
        zero = "0 (greedy) or " if greedy else ""
        raise error(f"{name}: expected {zero}a number from {MIN_TEMPERATURE:g} up, got {value}")


@dataclass
class Samples:
    """One response for each prompt."""

    tokens: list[np.ndarray]  # int64 [length] each; end token included, no padding
    logprobs: list[np.ndarray]  # fp32 [length] each, nats
    finished: list[bool]  # True: ends with an end token; False: cut at `max_new_tokens`


class Sampler(Protocol):
    """The interface that the PPO stage needs from an inference engine."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> Samples: ...


class KVCache:
    """Keys and values of each attention layer, [B, k, K, width]; rows differ in length.

    Layers may differ in k, and keys and values in width. Layers with a window keep all K slots.

    Args:
        slot: [N] int64, the slot (row * K + position) of each packed prompt token.
        rows: B.
        width: K.
    """

    def __init__(self, slot: torch.Tensor, rows: int, width: int):
        self.slot, self.rows, self.width = slot, rows, width
        self.layers: dict[nn.Module, tuple[torch.Tensor, ...]] = {}

    def fill(self, layer: nn.Module, *packed: torch.Tensor) -> None:
        """Store a layer's keys and values of the packed prompts, each [1, k, N, width]."""
        stored = []
        for x in packed:
            heads, width = x.shape[1], x.shape[3]
            flat = x.new_zeros(self.rows * self.width, heads, width)
            flat[self.slot] = x[0].transpose(0, 1)
            grid = flat.view(self.rows, self.width, heads, width)
            stored.append(grid.transpose(1, 2).contiguous())
        self.layers[layer] = tuple(stored)

    def append(self, layer: nn.Module, key, value, position: torch.Tensor):
        """Store one new key and value per row, [B, k, 1, width], at `position` [B]; return all of the layer."""
        for store, new in zip(self.layers[layer], (key, value), strict=True):
            index = position[:, None, None, None].expand_as(new)
            store.scatter_(2, index, new)
        return self.layers[layer]

    def select(self, rows: torch.Tensor) -> None:
        """Keep only these rows of the batch."""
        self.layers = {
            layer: tuple(x.index_select(0, rows) for x in stored)
            for layer, stored in self.layers.items()
        }


class HFSampler:
    """Samples with the policy's own weights, on its device.

    Args:
        policy: the policy; under FSDP2 its weights are gathered while it samples.
        tokenizer: a response ends at its EOS, or at an end token of the policy's generation_config.
        max_batch: prompts that are decoded at once.

    Attributes:
        ends: ids that end a response.
    """

    def __init__(self, policy: Policy, tokenizer, max_batch: int = 256):
        self.policy, self.max_batch = policy, max_batch
        self.ends = end_tokens(tokenizer, policy.lm)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> Samples:
        """Sample one response for each prompt; temperature 0 is greedy. The result depends on `seed` alone.

        Raises:
            ValueError: a prompt is empty, `temperature` is neither 0 nor at least MIN_TEMPERATURE, or
                `max_new_tokens` is below 1.
            NonFiniteLogits: the logits are NaN or infinite.
        """
        check_temperature(temperature, error=ValueError)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected >= 1, got {max_new_tokens}")
        if any(len(p) == 0 for p in prompts):
            raise ValueError("prompts: expected at least one token each, got an empty prompt")
        device = next(self.policy.parameters()).device
        generator = torch.Generator(device=device).manual_seed(seed)
        training, config = self.policy.training, self.policy.config
        implementation = config._attn_implementation
        # Decoding at a different position in each row needs our attention.
        config._attn_implementation = attention.NAME
        self.policy.eval()

        def batches() -> Samples:
            out = Samples([], [], [])
            for start in range(0, len(prompts), self.max_batch):
                with self.policy.autocast():
                    part = self._batch(
                        prompts[start : start + self.max_batch],
                        max_new_tokens,
                        temperature,
                        generator,
                    )
                out.tokens += part.tokens
                out.logprobs += part.logprobs
                out.finished += part.finished
            return out

        try:
            return sharded.with_full_weights(self.policy, batches)
        finally:
            config._attn_implementation = implementation
            self.policy.train(training)

    def _batch(self, prompts, max_new: int, temperature: float, generator) -> Samples:
        policy, device = self.policy, generator.device
        batch = collate(prompts).to(device)
        rows = len(prompts)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        width = int(lengths.max()) + max_new
        check_positions(policy.config, width, width)
        owner = torch.repeat_interleave(torch.arange(rows, device=device), lengths)
        cache = KVCache(owner * width + batch.position_ids, rows, width)
        last = batch.cu_seqlens[1:].long() - 1
        unembedding = policy.unembedding
        logits = unembedding.logits(policy.hidden(batch, cache).index_select(0, last))

        tokens = torch.zeros(rows, max_new, dtype=torch.int64, device=device)
        logprobs = torch.zeros(rows, max_new, device=device)
        counts = torch.full((rows,), max_new, device=device)
        finished = torch.zeros(rows, dtype=torch.bool, device=device)
        alive = torch.arange(rows, device=device)  # prompt of each row that is still in the batch
        position = lengths.clone()
        running = torch.ones(rows, dtype=torch.bool, device=device)
        ends = torch.tensor(self.ends, device=device)
        for step in range(max_new):
            choice, logprob = _draw(logits, temperature, generator)
            tokens[alive, step] = torch.where(running, choice, tokens[alive, step])
            logprobs[alive, step] = torch.where(running, logprob, logprobs[alive, step])
            broken = (running & ~logprob.isfinite()).sum()
            ended = running & torch.isin(choice, ends)
            counts[alive[ended]] = step + 1
            finished[alive[ended]] = True
            running = running & ~ended
            left, broken = torch.stack([running.sum(), broken]).tolist()
            if broken:
                raise NonFiniteLogits(
                    f"sampling: the logits of {broken} responses are NaN or infinite at token {step + 1}; the "
                    "weights have diverged or are damaged"
                )
            if step + 1 == max_new or left == 0:
                break
            if left <= 0.75 * len(alive):
                keep = running.nonzero().squeeze(1)
                cache.select(keep)
                alive, position, choice, running = (
                    x[keep] for x in (alive, position, choice, running)
                )
            used = width - max_new + step + 1
            with attention.running(attention.DecodeStep(position, used, cache)):
                hidden = policy.body(
                    input_ids=choice[:, None], position_ids=position[:, None], use_cache=False
                ).last_hidden_state[:, 0]
            logits = unembedding.logits(hidden)
            position = position + 1
        return _collect(tokens, logprobs, counts, finished)


def _draw(logits: torch.Tensor, temperature: float, generator) -> tuple[torch.Tensor, torch.Tensor]:
    # Returns tokens [B] and their log-probs [B]: at `temperature`, or at 1 if greedy.
    logprobs = torch.log_softmax(logits / temperature if temperature > 0 else logits, dim=-1)
    if temperature == 0:
        choice = logits.argmax(-1)
    else:
        # With NaN logits the result may be V, and `generate` reports the NaN log-prob.
        choice = _invert_cdf(logprobs.exp(), generator).clamp(max=logits.shape[-1] - 1)
    return choice, logprobs.gather(1, choice[:, None]).squeeze(1)


def _invert_cdf(probs: torch.Tensor, generator) -> torch.Tensor:
    # One uniform number per row. torch.multinomial draws an exponential for each of the V tokens: for 512 rows and
    # V = 1024 it takes 14 ms on 2 cores, this 0.4 ms.
    cdf = probs.cumsum(-1)
    total = cdf[:, -1:]
    u = torch.rand(total.shape, device=probs.device, generator=generator)
    # u * total may round up to total. Stay below it, so that only tokens of probability > 0 are chosen.
    level = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, level, right=True).squeeze(1)


def _collect(tokens, logprobs, counts, finished) -> Samples:
    counts = counts.tolist()
    tokens, logprobs = tokens.cpu().numpy(), logprobs.cpu().numpy()
    return Samples(
        [tokens[i, :n].copy() for i, n in enumerate(counts)],
        [logprobs[i, :n].copy() for i, n in enumerate(counts)],
        finished.tolist(),
    )
