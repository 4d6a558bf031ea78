"""The row maths of token_logprob on a chunk of logits, for the ops that make the logits themselves.

Shapes: n rows of a chunk, V vocabulary; fp32, or fp64 for fp64 inputs. `forward` and `backward_` are
one fused pass each on the kernel backends.
"""

import math

import torch
from torch import Tensor

from fastrlhf.ops import _chunks
from fastrlhf.ops.token_logprob import check_target_values, ops

# On CPU the statistics of a row are those of blocks of about so many columns, combined: whoever makes the
# logits block by block (linear_logprob) has the bits of whoever makes them row by row (the update).
BLOCK = 4096


class RowMaths:
    """log-probability, entropy and dlogits of [n, V] logits on one backend."""

    def __init__(self, backend: str, temperature: float, softcap: float):
        self.backend, self.temperature, self.softcap = backend, temperature, softcap
        self._ops = None if backend == "reference" else ops(backend)

    def forward(self, logits, targets, row_temperature, mask):
        """(logprob [n], entropy [n], stats [3, n]) of the chunk."""
        if logits.shape[-1] <= BLOCK or not logits.is_cpu:
            return self._forward(logits, targets, row_temperature, mask)
        blocks = self.blocks(logits.device, logits.shape[-1])
        parts = (self.part(logits[:, c], c, targets, row_temperature, mask) for c in blocks)
        return self.combined(list(parts), blocks, targets, mask)

    @staticmethod
    def blocks(device: torch.device, vocab: int) -> list[slice]:
        """The columns of each block that a row's statistics are made of."""
        return _chunks.cuts(vocab, BLOCK if device.type == "cpu" else vocab)

    def part(self, logits, columns, targets, row_temperature, mask) -> Tensor:
        """[4, n]: what `combine` wants of a block of columns."""
        local, _ = local_targets(targets, columns)
        logprob, _, stats = self._forward(logits, local, row_temperature, mask)
        return torch.cat((stats, logprob.unsqueeze(0)))

    @staticmethod
    def combined(parts, blocks, targets, mask):
        """`forward` from the parts of all blocks."""
        check_target_values("linear_logprob", targets, blocks[-1].stop, mask)
        return whole_rows(torch.stack(parts), targets, blocks[0].stop, mask)

    def _forward(self, logits, targets, row_temperature, mask):
        if self.backend != "reference":
            return self._ops.fwd.inside(
                logits, targets, row_temperature, self.temperature, self.softcap, mask, True, False
            )
        z = self._scaled(logits, row_temperature)
        top = z.amax(-1, keepdim=True)
        d = z - top.masked_fill(top == -torch.inf, 0.0)
        e = d.exp()
        total = e.sum(-1)
        log_sum = total.log()
        d = d.masked_fill(d == -torch.inf, 0.0)
        mean = (e * d).sum(-1) / total
        entropy = log_sum - mean
        top = top.squeeze(-1)
        index, wrong = self._index(targets, z.shape[-1], mask)
        logprob = (z.gather(-1, index.unsqueeze(-1)).squeeze(-1) - top) - log_sum
        logprob = logprob.masked_fill(wrong, math.nan)
        if mask is not None:
            logprob, entropy = logprob.masked_fill(~mask, 0.0), entropy.masked_fill(~mask, 0.0)
        return logprob, entropy, torch.stack((top, log_sum, mean))

    def backward_(self, grad_logprob, grad_entropy, logits, targets, stats, row_t, mask):
        """Overwrites the chunk's logits with dL/dlogits."""
        if self.backend != "reference":
            self._ops.bwd_.inside(
                grad_logprob,
                grad_entropy,
                logits,
                targets,
                stats,
                row_t,
                self.temperature,
                self.softcap,
                mask,
            )
            return
        chain = 1.0 / self.temperature
        if row_t is not None:
            chain = (1.0 / row_t).unsqueeze(-1)
        if self.softcap > 0:
            chain = chain * (1.0 - torch.tanh(logits / self.softcap).square())
        top, log_sum, mean = (s.unsqueeze(-1) for s in stats)
        away = self._scaled(logits, row_t) - top
        p = (away - log_sum).exp()
        grad = torch.zeros_like(logits)
        if grad_logprob is not None:
            index, wrong = self._index(targets, p.shape[-1], mask)
            g = grad_logprob.masked_fill(wrong, math.nan).unsqueeze(-1)
            grad.scatter_(-1, index.unsqueeze(-1), g).sub_(g * p)
        if grad_entropy is not None:
            # log p + entropy, without the rounding of log_sum that the whole row would share
            away = away.masked_fill(away == -torch.inf, 0.0)
            grad.sub_(grad_entropy.unsqueeze(-1) * p * (away - mean))
        grad.mul_(chain)
        logits.copy_(grad if mask is None else grad.masked_fill_(~mask.unsqueeze(-1), 0.0))

    @staticmethod
    def _index(targets, vocab, mask):
        """Targets that are safe to gather, and which were outside the vocabulary: those become NaN."""
        index = targets.long() if mask is None else targets.long().masked_fill(~mask, 0)
        wrong = (index < 0) | (index >= vocab)
        return index.masked_fill(wrong, 0), wrong

    def _scaled(self, logits: Tensor, row_temperature: Tensor | None) -> Tensor:
        z = logits
        if self.softcap > 0:
            z = self.softcap * torch.tanh(z / self.softcap)
        if row_temperature is not None:
            return z / row_temperature.unsqueeze(-1)
        return z / self.temperature if self.temperature != 1.0 else z


def local_targets(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Each target's place in a part of the vocabulary, and whether it lies there.

    If not, it is 0: a column that exists; what is made of it is not used.
    """
    local = targets - columns.start
    mine = (local >= 0) & (local < columns.stop - columns.start)
    return local.masked_fill_(~mine, 0), mine


def whole_rows(every: Tensor, targets: Tensor, width: int, mask: Tensor | None):
    """(logprob [n], entropy [n], stats [3, n]) by `combine`, from parts [W, 4, n] of `width` columns each."""
    owner = targets.long().div(width, rounding_mode="floor").clamp(0, len(every) - 1)
    # A few numbers a row: fp64 costs nothing here, and each is rounded once.
    logprob, entropy, stats = (x.to(every.dtype) for x in combine(every.double(), owner))
    if mask is not None:
        logprob, entropy = logprob.masked_fill(~mask, 0.0), entropy.masked_fill(~mask, 0.0)
    return logprob, entropy, stats


def combine(every: Tensor, owner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob [N], entropy [N], stats [3, N]) of rows whose vocabulary lies in W parts.

    From every [W, 4, N], a part's (max, log_sum, mean, logprob) of its own softmax: with
    w_r = exp(lse_r - lse), logprob = logprob_owner + log w_owner, mean = sum_r w_r (mean_r + max_r - max).
    """
    tops, log_sums, means, logprobs = every.unbind(1)
    top = tops.amax(0)
    # A part that is all -inf (padding) weighs nothing; one that holds a NaN, whose max may be -inf too, is NaN.
    idle = log_sums == -torch.inf
    log_w = (tops - top + log_sums).masked_fill(idle, -torch.inf)
    logprobs = logprobs.masked_fill(idle, 0.0)  # a target in there: -inf, by log_w
    log_sum = log_w.exp().sum(0).log()
    log_w = log_w - log_sum
    w = log_w.exp()
    mean = (w * (means + (tops - top))).masked_fill(w == 0, 0.0).sum(0)
    logprob = (logprobs + log_w).gather(0, owner.unsqueeze(0)).squeeze(0)
    return logprob, log_sum - mean, torch.stack((top, log_sum, mean))
