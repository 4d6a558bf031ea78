"""Rollouts: sample responses from a policy with a static key/value cache.

Shapes: B prompts, N packed prompt tokens, K cache slots (longest prompt + new tokens), k key heads,
D head width, V vocabulary.

The prompts run once as one packed batch (no padding, the training path) and their keys and values
are scattered into the cache; then every sequence decodes one token a step at its own position. A
finished sequence leaves the batch as soon as enough of them have finished to make compaction worth
its copy. Nothing but real tokens comes out.

Log-probs are those of the distribution that was sampled from (temperature applied); the trainer
recomputes them on its own path and reports the distance between the two.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from fastrlhf.integrations import attention
from fastrlhf.train import sharded
from fastrlhf.train.models import Policy, cached
from fastrlhf.train.packing import collate


@dataclass
class Samples:
    """One response a prompt. A finished one ends with EOS; an unfinished one was cut at `max_new_tokens`."""

    tokens: list[np.ndarray]  # int64 [length]
    logprobs: list[np.ndarray]  # fp32 [length]
    finished: list[bool]


class Sampler(Protocol):
    """What the PPO stage needs; another engine can stand in."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> Samples: ...


class KVCache:
    """Static cache [B, k, K, D] a layer, in the shape of transformers' cache protocol. Rows have their own lengths."""

    is_compileable = False

    def __init__(self, slot: torch.Tensor, rows: int, width: int):
        self.rows, self.width, self.used = rows, width, width
        self.slot = (
            slot  # prefill: [N] cache places of packed tokens; decode: [B] place of the new token
        )
        self.layers: dict[int, list[torch.Tensor]] = {}
        self.prefill = True

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *_, **__):
        """Store new keys and values; hand back what attention should see."""
        if self.prefill:  # [1, k, N, D] -> scattered; attention itself stays packed
            heads, width = key.shape[1], key.shape[3]
            both = []
            for x in (key, value):
                flat = x.new_zeros(self.rows * self.width, heads, width)
                flat[self.slot] = x[0].transpose(0, 1)
                both.append(
                    flat.view(self.rows, self.width, heads, width).transpose(1, 2).contiguous()
                )
            self.layers[layer] = both
            return key, value
        index = self.slot[:, None, None, None].expand(-1, key.shape[1], 1, key.shape[3])
        for store, new in zip(self.layers[layer], (key, value), strict=True):
            store.scatter_(2, index, new)
        return tuple(store[:, :, : self.used] for store in self.layers[layer])

    def select(self, rows: torch.Tensor) -> None:
        """Keep only these rows."""
        self.layers = {
            n: [x.index_select(0, rows) for x in both] for n, both in self.layers.items()
        }

    def get_seq_length(self, *_) -> int:
        return 0

    def get_query_offset(self, *_) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, *_) -> tuple[int, int]:
        return self.width, 0


class HFSampler:
    """Samples with the policy's own weights, on its device. `seed` decides every draw."""

    def __init__(self, policy: Policy, tokenizer, max_batch: int = 256):
        self.policy, self.eos, self.max_batch = policy, tokenizer.eos_token_id, max_batch

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> Samples:
        """One response a prompt; temperature 0 is greedy."""
        if temperature < 0:
            raise ValueError(f"temperature: expected >= 0, got {temperature}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected >= 1, got {max_new_tokens}")
        if any(len(p) == 0 for p in prompts):
            raise ValueError("prompts: expected at least one token each, got an empty prompt")
        device = next(self.policy.parameters()).device
        generator = torch.Generator(device=device).manual_seed(seed)
        training, config = self.policy.training, self.policy.config
        implementation = config._attn_implementation
        config._attn_implementation = (
            attention.NAME
        )  # decodes at per-row positions, which flash-attn's path cannot
        self.policy.eval()

        def batches() -> Samples:
            out = Samples([], [], [])
            for start in range(0, len(prompts), self.max_batch):
                part = self._batch(
                    prompts[start : start + self.max_batch], max_new_tokens, temperature, generator
                )
                out.tokens += part.tokens
                out.logprobs += part.logprobs
                out.finished += part.finished
            return out

        try:
            return sharded.with_whole_weights(self.policy, batches)
        finally:
            config._attn_implementation = implementation
            self.policy.train(training)

    def _batch(self, prompts, max_new: int, temperature: float, generator) -> Samples:
        policy, device = self.policy, generator.device
        batch = collate(prompts).to(device)
        rows = len(prompts)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        width = int(lengths.max()) + max_new
        owner = torch.repeat_interleave(torch.arange(rows, device=device), lengths)
        cache = KVCache(owner * width + batch.position_ids, rows, width)
        last = batch.cu_seqlens[1:].long() - 1
        logits = self._logits(policy.hidden(batch, cache).index_select(0, last))
        cache.prefill = False

        tokens = torch.zeros(rows, max_new, dtype=torch.int64, device=device)
        logprobs = torch.zeros(rows, max_new, device=device)
        counts = torch.full((rows,), max_new, device=device)
        finished = torch.zeros(rows, dtype=torch.bool, device=device)
        alive = torch.arange(rows, device=device)  # which prompt each live row belongs to
        places = torch.arange(width, device=device)
        position = lengths.clone()
        running = torch.ones(rows, dtype=torch.bool, device=device)
        for step in range(max_new):
            choice, logprob = _draw(logits, temperature, generator)
            tokens[alive, step] = torch.where(running, choice, tokens[alive, step])
            logprobs[alive, step] = torch.where(running, logprob, logprobs[alive, step])
            ended = running & (choice == self.eos)
            counts[alive[ended]] = step + 1
            finished[alive[ended]] = True
            running = running & ~ended
            if step + 1 == max_new:
                break
            left = int(running.sum())
            if left == 0:
                break
            if left <= 0.75 * len(alive):
                keep = running.nonzero().squeeze(1)
                cache.select(keep)
                alive, position, choice, running = (
                    x[keep] for x in (alive, position, choice, running)
                )
            cache.slot, cache.used = position, width - max_new + step + 1
            mask = (places[None, : cache.used] <= position[:, None])[:, None, None, :]
            hidden = policy.lm.base_model(
                input_ids=choice[:, None],
                position_ids=position[:, None],
                attention_mask=mask,
                **cached(policy.lm.base_model, cache),
            ).last_hidden_state[:, 0]
            logits = self._logits(hidden)
            position = position + 1
        return _collect(tokens, logprobs, counts, finished)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        head = self.policy.lm.get_output_embeddings()
        logits = head(hidden.to(head.weight.dtype)).float()
        softcap = getattr(self.policy.config, "final_logit_softcapping", None)
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _draw(logits: torch.Tensor, temperature: float, generator) -> tuple[torch.Tensor, torch.Tensor]:
    # -> token [B], its log-prob [B] under the distribution sampled from (greedy: under temperature 1)
    logprobs = torch.log_softmax(logits / temperature if temperature > 0 else logits, dim=-1)
    if temperature == 0:
        choice = logits.argmax(-1)
    else:
        choice = _invert_cdf(logprobs.exp(), generator)
    return choice, logprobs.gather(1, choice[:, None]).squeeze(1)


def _invert_cdf(probs: torch.Tensor, generator) -> torch.Tensor:
    # One uniform a row; torch.multinomial draws an exponential a token (512 x 1024, 2 cores: 14 ms against 0.4).
    cdf = probs.cumsum(-1)
    total = cdf[:, -1:]
    u = torch.rand(total.shape, device=probs.device, generator=generator)
    # Below the total, so that the first step above it is a token of probability > 0.
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
