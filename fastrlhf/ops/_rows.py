"""The row kernels on a chunk of logits, for the ops that compute the logits themselves.

Shapes: R rows that count, n rows of a chunk, V vocabulary; fp32, or fp64 for fp64 inputs.
z = softcap * tanh(logits / softcap) / temperature; row_stats [3, n] as in token_logprob.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf.ops import ppo_loss, token_logprob, token_loss
from fastrlhf.ops._checks import UNLIMITED
from fastrlhf.ops._policy import Option

BLOCK = 4096  # columns: a multiple of kBlock in csrc/cpu/softmax_row.h
_MKL = torch.backends.mkl.is_available()


class TokenLoss(NamedTuple):
    """sum over the rows of scale * (token_loss - entropy_coef * entropy), of per-row tensors [R].

    `more` and `options` as in _policy.py, with cu_seqlens of the R rows.
    """

    advantages: Tensor | None
    old_logprob: Tensor | None
    low: float  # limits of the ratio
    high: float
    dual_clip: float  # UNLIMITED: none
    entropy_coef: float
    scale: Tensor  # 0-d
    more: list | None = None
    options: list[float] | None = None

    def more_of(self, chunk):
        """(more, options) of a chunk's rows."""
        if self.more is None:
            return None, None
        ref_logprob, rollout, *sequences = self.more
        options = list(self.options)
        options[Option.FIRST_ROW] = float(chunk.rows.start)
        return [*chunk.of(ref_logprob, rollout), *sequences], options


NO_CLIP = (
    -UNLIMITED,
    UNLIMITED,
    UNLIMITED,
    0.0,
)  # low, high, dual_clip, entropy_coef of a loss that has none
# `options` of -A logprob for ppo_loss_fwd, which is plain PPO without any.
_REINFORCE = [0.0] * len(Option)
_REINFORCE[Option.OBJECTIVE] = 1.0


class RowKernels:
    """Log-probs, entropies and dlogits of [n, V] logits by one fused backend."""

    columns: slice | None = None  # those of a split vocabulary that lie here; None: all

    def __init__(self, backend: str, temperature: float, softcap: float):
        self.backend, self.temperature, self.softcap = backend, temperature, softcap

    def whole_sum(self, sums: Tensor) -> Tensor:
        """[n] over the whole vocabulary, from the sums of the columns here."""
        return sums

    def forward(self, logits, targets, row_temperature, mask, with_entropy=True):
        """(logprob [n], entropy [n], row_stats [3, n]) of the chunk."""
        settings = (row_temperature, self.temperature, self.softcap, mask, with_entropy, False)
        return token_logprob.FWD[self.backend].raw(logits, targets, *settings)

    def backward(self, grad_logprob, grad_entropy, logits, targets, row_stats, row_t, mask, out):
        """Writes dL/dlogits to `out`, which may be the logits."""
        settings = (row_t, self.temperature, self.softcap, mask)
        bwd_ = token_logprob.BWD_[self.backend].raw
        bwd_(grad_logprob, grad_entropy, logits, targets, row_stats, *settings, out)

    def loss(self, chunk, loss: TokenLoss, logprob, entropy, grad_logprob):
        """Writes dlogits and the chunk's rows of logprob, entropy and grad_logprob [R] (None: not wanted)."""
        advantages, old_logprob, more, options = (
            loss.advantages,
            loss.old_logprob,
            loss.more,
            loss.options,
        )
        if not chunk.whole:
            advantages, old_logprob = chunk.of(advantages, old_logprob)
            more, options = loss.more_of(chunk)
            logprob, entropy, grad_logprob = chunk.of(logprob, entropy, grad_logprob)
        token_loss.ROWS_[self.backend].raw(
            chunk.logits,
            chunk.targets,
            advantages,
            old_logprob,
            more,
            loss.low,
            loss.high,
            loss.dual_clip,
            options,
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

    def loss_in_parts(self, chunk, loss: TokenLoss, logprob, entropy, grad_logprob, between=None):
        """`loss` in three steps, where something has to happen between a row's log-prob and its loss: `between()`."""
        given = (chunk.logits, chunk.targets)
        rest = (chunk.row_temperature, chunk.mask)
        found, found_entropy, row_stats = self.forward(*given, *rest)
        logprob[chunk.rows] = found
        if entropy is not None:
            entropy[chunk.rows] = found_entropy
        if between is not None:
            between()
        g, h = self._policy_gradient(chunk, loss, found, found_entropy)
        if grad_logprob is not None:
            grad_logprob[chunk.rows] = g
        self.backward(g, h, *given, row_stats, *rest, chunk.dlogits)

    def _policy_gradient(self, chunk, loss: TokenLoss, logprob, entropy):
        """(d loss / d logprob [n], d loss / d entropy [n] or None) of a chunk's rows."""
        advantages, old_logprob = chunk.of(loss.advantages, loss.old_logprob)
        more, options = loss.more_of(chunk)
        if old_logprob is None and options is None:
            options = _REINFORCE
        entropy = entropy if loss.entropy_coef != 0 else None
        tokens = (logprob, old_logprob, advantages, None, None, None, entropy, chunk.mask)
        limits = (loss.low, loss.high, loss.dual_clip, UNLIMITED, 0.0, loss.entropy_coef)
        factors = loss.scale.repeat(2)
        fwd = ppo_loss.FWD[self.backend].raw
        _, _, grads = fwd(*tokens, factors, more, *limits, options, True)
        return grads[0], None if entropy is None else grads[1]

    def blocks(self, head) -> list[slice] | None:
        """Columns of each block of the vocabulary, for `forward_by_blocks`; None to take whole rows.

        The result is bitwise identical to that of whole rows, which the update needs: MKL computes an fp32 logit
        independently of its block, and the row kernels a row independently of how it is cut at multiples of BLOCK.
        (Not in fp64, nor with another BLAS; not tried on GPUs.)
        """
        count = head.vocab // BLOCK
        if self.backend != "cpu" or head.acc != torch.float32 or count < 2 or not _MKL:
            return None
        ends = [*range(BLOCK, count * BLOCK, BLOCK), head.vocab]
        return [slice(i * BLOCK, end) for i, end in enumerate(ends)]

    def forward_by_blocks(self, head, chunk, blocks: list[slice]):
        """`forward` of a chunk whose logits are computed here, block by block in the chunk's memory."""
        given = (chunk.row_temperature, self.temperature, self.softcap, chunk.mask)
        state = chunk.logits.new_empty((6, len(chunk.x)))
        memory, bias = chunk.logits.view(-1), head.bias
        part = token_logprob.PART_["cpu"].raw
        for columns in blocks:
            width = columns.stop - columns.start
            logits = memory[: len(chunk.x) * width].view(-1, width)
            block = head.weight[columns], None if bias is None else bias[columns]
            head.gemms.logits(chunk.x, *block, logits)
            part(logits, chunk.targets, columns.start, *given, state)
        return token_logprob.WHOLE["cpu"].raw(state, head.vocab, chunk.targets, *given)


def local_targets(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Each target's index within some columns of the vocabulary, and whether it lies there; if not, the index is 0."""
    local = targets - columns.start
    mine = (local >= 0) & (local < columns.stop - columns.start)
    return local.masked_fill_(~mine, 0), mine


def whole_rows(every: Tensor, targets: Tensor, width: int, mask: Tensor | None):
    """(logprob [n], entropy [n], row_stats [3, n]) by `combine`, from parts [W, 4, n] of `width` columns each."""
    owner = targets.long().div(width, rounding_mode="floor").clamp(0, len(every) - 1)
    # fp64 is cheap for a few numbers per row, and each result is rounded once.
    logprob, entropy, row_stats = (x.to(every.dtype) for x in combine(every.double(), owner))
    if mask is not None:
        logprob, entropy = logprob.masked_fill(~mask, 0.0), entropy.masked_fill(~mask, 0.0)
    return logprob, entropy, row_stats


def combine(every: Tensor, owner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob [N], entropy [N], row_stats [3, N]) of rows whose vocabulary is split into W parts.

    every [W, 4, N]: (row_max, shifted_lse, shifted_mean, logprob) of each part's own softmax; owner [N]: the part that
    holds the target. With w_r = exp(lse_r - lse), logprob = logprob_owner + log w_owner and
    shifted_mean = sum_r w_r (shifted_mean_r + row_max_r - row_max).
    """
    tops, shifted_lses, means, logprobs = every.unbind(1)
    top = tops.amax(0)
    # A part that is all -inf (padding) has weight 0. One that holds a NaN is NaN, though its maximum may be -inf.
    idle = shifted_lses == -torch.inf
    log_w = (tops - top + shifted_lses).masked_fill(idle, -torch.inf)
    logprobs = logprobs.masked_fill(idle, 0.0)  # log_w makes a target in there -inf
    shifted_lse = log_w.exp().sum(0).log()
    log_w = log_w - shifted_lse
    w = log_w.exp()
    mean = (w * (means + (tops - top))).masked_fill(w == 0, 0.0).sum(0)
    logprob = (logprobs + log_w).gather(0, owner.unsqueeze(0)).squeeze(0)
    return logprob, shifted_lse - mean, torch.stack((top, shifted_lse, mean))
