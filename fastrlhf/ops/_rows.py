"""The row kernels on a chunk of logits, for the ops that make the logits themselves.

Shapes: R rows that count, n rows of a chunk, V vocabulary; fp32, or fp64 for fp64 inputs.
z = softcap * tanh(logits / softcap) / temperature; stats [3, n] as in token_logprob.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf.ops import _backend, token_logprob, token_loss
from fastrlhf.ops._register import register
from fastrlhf.reference import LOG_RATIO_LIMIT

BLOCK = 4096  # columns: a multiple of kBlock in csrc/cpu/softmax_row.h
_MKL = torch.backends.mkl.is_available()


class TokenLoss(NamedTuple):
    """sum over the rows of scale * (token_loss - entropy_coef * entropy), of per-row tensors [R]."""

    advantages: Tensor | None
    old_logprob: Tensor | None
    clip: float
    dual_clip: float  # inf: none
    entropy_coef: float
    scale: Tensor  # 0-d


class RowKernels:
    """log-probs, entropies and dlogits of [n, V] logits by one fused backend, or in plain PyTorch."""

    def __init__(self, backend: str, temperature: float, softcap: float):
        self.backend, self.temperature, self.softcap = backend, temperature, softcap
        self.fused = backend != "reference"

    def forward(self, logits, targets, row_temperature, mask, with_entropy=True):
        """(logprob [n], entropy [n], stats [3, n]) of the chunk."""
        if self.fused:
            fwd = token_logprob.ops(self.backend).fwd.inside
            settings = (row_temperature, self.temperature, self.softcap, mask, with_entropy, False)
            return fwd(logits, targets, *settings)
        return self._forward(logits, targets, row_temperature, mask)

    def backward(self, grad_logprob, grad_entropy, logits, targets, stats, row_t, mask, out):
        """Writes dL/dlogits to `out`, which may be the logits."""
        if not self.fused:
            out.copy_(
                self._backward(grad_logprob, grad_entropy, logits, targets, stats, row_t, mask)
            )
            return
        settings = (row_t, self.temperature, self.softcap, mask)
        bwd = token_logprob.ops(self.backend).bwd_.inside
        bwd(grad_logprob, grad_entropy, logits, targets, stats, *settings, out)

    def loss(self, chunk, loss: TokenLoss, logprob, entropy, grad_logprob):
        """Writes dlogits, and the chunk's rows of logprob, entropy and d loss / d logprob [R] (None: not wanted)."""
        if self.fused:
            advantages, old_logprob = loss.advantages, loss.old_logprob
            if not chunk.whole:
                advantages, old_logprob = chunk.of(advantages, old_logprob)
                logprob, entropy, grad_logprob = chunk.of(logprob, entropy, grad_logprob)
            token_loss.ops(self.backend).rows_.inside(
                chunk.logits,
                chunk.targets,
                advantages,
                old_logprob,
                loss.clip,
                loss.dual_clip,
                loss.entropy_coef,
                chunk.row_temperature,
                self.temperature,
                self.softcap,
                chunk.mask,
                loss.scale,
                chunk.dlogits,
                logprob,
                entropy,
                grad_logprob,
            )
        else:
            self.loss_in_parts(chunk, loss, logprob, entropy, grad_logprob)

    def loss_in_parts(self, chunk, loss: TokenLoss, logprob, entropy, grad_logprob):
        """`loss` by a forward and a backward, with the grad_logprobs in plain PyTorch between them."""
        advantages, old_logprob = chunk.of(loss.advantages, loss.old_logprob)
        given = (chunk.logits, chunk.targets)
        rest = (chunk.row_temperature, chunk.mask)
        found, found_entropy, stats = self.forward(*given, *rest)
        g = policy_grad_logprob(found, advantages, old_logprob, loss)
        if chunk.mask is not None:
            g = g.masked_fill(~chunk.mask, 0.0)
        h = None
        if loss.entropy_coef != 0:
            h = (-loss.entropy_coef * loss.scale).expand_as(g).contiguous()
        self.backward(g, h, *given, stats, *rest, chunk.dlogits)
        for whole, part in ((logprob, found), (entropy, found_entropy), (grad_logprob, g)):
            if whole is not None:
                whole[chunk.rows] = part

    def blocks(self, head) -> list[slice] | None:
        """Columns of each block of the vocabulary, for `forward_by_blocks`; None where whole rows are taken.

        MKL gives an fp32 logit the same bits whatever its block holds, and the row kernels give a row the same
        bits however it is cut at multiples of BLOCK. So the forward has the bits of the update, which must
        hold whole rows. (Not in fp64, nor with another BLAS; not tried on GPUs.)
        """
        count = head.vocab // BLOCK
        if self.backend != "cpu" or head.acc != torch.float32 or count < 2 or not _MKL:
            return None
        ends = [*range(BLOCK, count * BLOCK, BLOCK), head.vocab]
        return [slice(i * BLOCK, end) for i, end in enumerate(ends)]

    def forward_by_blocks(self, head, chunk, blocks: list[slice]):
        """`forward` of a chunk whose logits are made here, block by block in the chunk's memory."""
        given = (chunk.row_temperature, self.temperature, self.softcap, chunk.mask)
        state = chunk.logits.new_empty((6, len(chunk.x)))
        memory, bias = chunk.logits.view(-1), head.bias
        for columns in blocks:
            width = columns.stop - columns.start
            logits = memory[: len(chunk.x) * width].view(-1, width)
            part = head.weight[columns], None if bias is None else bias[columns]
            head.gemms.logits(chunk.x, *part, logits)
            _PART(logits, chunk.targets, columns.start, *given, state)
        return _WHOLE(state, head.vocab, chunk.targets, *given)

    def _forward(self, logits, targets, row_temperature, mask):
        z = self._scaled(logits, row_temperature)
        top = z.amax(-1, keepdim=True)
        d = z - top.masked_fill(top == -torch.inf, 0.0)
        e = d.exp()
        total = e.sum(-1)
        shifted_lse = total.log()
        d = d.masked_fill(d == -torch.inf, 0.0)
        mean = (e * d).sum(-1) / total
        entropy = shifted_lse - mean
        top = top.squeeze(-1)
        index, wrong = self._index(targets, z.shape[-1], mask)
        logprob = (z.gather(-1, index.unsqueeze(-1)).squeeze(-1) - top) - shifted_lse
        logprob = logprob.masked_fill(wrong, math.nan)
        if mask is not None:
            logprob, entropy = logprob.masked_fill(~mask, 0.0), entropy.masked_fill(~mask, 0.0)
        return logprob, entropy, torch.stack((top, shifted_lse, mean))

    def _backward(self, grad_logprob, grad_entropy, logits, targets, stats, row_t, mask):
        chain = 1.0 / self.temperature
        if row_t is not None:
            chain = (1.0 / row_t).unsqueeze(-1)
        if self.softcap > 0:
            chain = chain * (1.0 - torch.tanh(logits / self.softcap).square())
        top, shifted_lse, mean = (s.unsqueeze(-1) for s in stats)
        away = self._scaled(logits, row_t) - top
        p = (away - shifted_lse).exp()
        grad = torch.zeros_like(logits)
        if grad_logprob is not None:
            index, wrong = self._index(targets, p.shape[-1], mask)
            g = grad_logprob.masked_fill(wrong, math.nan).unsqueeze(-1)
            grad.scatter_(-1, index.unsqueeze(-1), g).sub_(g * p)
        if grad_entropy is not None:
            # log p + entropy, without the rounding of shifted_lse that the whole row would share
            away = away.masked_fill(away == -torch.inf, 0.0)
            grad.sub_(grad_entropy.unsqueeze(-1) * p * (away - mean))
        grad.mul_(chain)
        return grad if mask is None else grad.masked_fill_(~mask.unsqueeze(-1), 0.0)

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


def policy_grad_logprob(logprob, advantages, old_logprob, loss: TokenLoss) -> Tensor:
    """d loss / d logprob [n] in plain PyTorch: the gradient of `policy_term` in csrc/common/ppo.h."""
    if old_logprob is None:
        grad_logprob = -loss.scale
        return (
            grad_logprob.expand_as(logprob).contiguous()
            if advantages is None
            else grad_logprob * advantages
        )
    a = torch.ones_like(logprob) if advantages is None else advantages
    distance = logprob - old_logprob
    log_ratio = distance.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    unclipped, clipped = -a * ratio, -a * ratio.clamp(1 - loss.clip, 1 + loss.clip)
    larger = torch.where(clipped > unclipped, clipped, unclipped)
    idle = (clipped > unclipped) | (log_ratio != distance)
    if math.isfinite(loss.dual_clip):
        idle |= (a < 0) & (-a * loss.dual_clip < larger)
    grad_logprob = unclipped.masked_fill(idle, 0.0)
    # A NaN must not hide behind a clip.
    return torch.where(larger == larger, grad_logprob, larger) * loss.scale


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

    From every [W, 4, N], a part's (max, shifted_lse, mean, logprob) of its own softmax: with
    w_r = exp(lse_r - lse), logprob = logprob_owner + log w_owner, mean = sum_r w_r (mean_r + max_r - max).
    """
    tops, shifted_lses, means, logprobs = every.unbind(1)
    top = tops.amax(0)
    # A part that is all -inf (padding) weighs nothing; one that holds a NaN, whose max may be -inf too, is NaN.
    idle = shifted_lses == -torch.inf
    log_w = (tops - top + shifted_lses).masked_fill(idle, -torch.inf)
    logprobs = logprobs.masked_fill(idle, 0.0)  # a target in there: -inf, by log_w
    shifted_lse = log_w.exp().sum(0).log()
    log_w = log_w - shifted_lse
    w = log_w.exp()
    mean = (w * (means + (tops - top))).masked_fill(w == 0, 0.0).sum(0)
    logprob = (logprobs + log_w).gather(0, owner.unsqueeze(0)).squeeze(0)
    return logprob, shifted_lse - mean, torch.stack((top, shifted_lse, mean))


def _whole_fake(state, vocab, targets, *settings):
    out = state.new_empty(targets.shape)
    return out, torch.empty_like(out), state.new_empty((3, targets.numel()))


if token_logprob.OP in _backend._CPU_OPS:
    _PART = register("token_logprob_part_", lambda *arguments: None).inside
    _WHOLE = register("token_logprob_whole", _whole_fake).inside
