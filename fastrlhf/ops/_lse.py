"""Two more numbers of each row of logits, lse and spread, and their gradients.

Shapes: n rows of a chunk, V vocabulary. z = softcap * tanh(logits / softcap) / temperature, p = softmax(z).
lse = log sum_j e^z_j, and d lse / dz_k = p_k.
spread = sum_j c_j log p_j with class weights c (1 each without), and d spread / dz_k = c_k - C p_k, C = sum_j c_j.

The row kernels give g (1[k = target] - p_k) for the gradient g of the log-prob. With u of lse and v of spread the
gradient is (g - u + v C) (1[k = target] - p_k) + (u - v C) 1[k = target] + v c_k: they run with another g, and the rest
is added here. The target's own column is computed apart, where the terms would cancel.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf.ops._rows import RowKernels, local_targets

BLOCK_BYTES = 16 << 20  # of a temporary with the width of the logits


class ClassWeights(NamedTuple):
    """c of the columns that a rank holds, and C, that of the whole vocabulary. `each` None: 1."""

    each: Tensor | None
    total: Tensor | int


class Upstream(NamedTuple):
    """Gradients [n] of a chunk's log-probs, entropies, lse and spread; None: 0."""

    logprob: Tensor | None
    entropy: Tensor | None
    lse: Tensor | None
    spread: Tensor | None


def class_weights(kernels: RowKernels, vocab: int, weights: Tensor | None) -> ClassWeights:
    """`vocab`: the number of columns here; `weights`: [V] of the whole vocabulary, in the accumulator's dtype."""
    if weights is None:
        return ClassWeights(None, vocab if kernels.columns is None else kernels.vocab)
    each = weights if kernels.columns is None else weights[kernels.columns]
    return ClassWeights(each, weights.sum())


def of_targets(weights: Tensor, targets: Tensor) -> Tensor:
    """weights[targets]; that of class 0 for a target outside of the vocabulary, whose row the kernels refuse."""
    local, _ = local_targets(targets, slice(0, len(weights)))
    return weights[local]


def lse_of(kernels: RowKernels, row_stats: Tensor, row_temperature, mask: Tensor | None) -> Tensor:
    """[n] of row_stats [3, n]."""
    lse = row_stats[0] + row_stats[1]
    if kernels.backend == "triton" and kernels.softcap:
        from fastrlhf.kernels import _softmax  # imports Triton

        constant = _softmax.constant_of_z(kernels.softcap, lse.dtype == torch.float64)
        lse += constant / (kernels.temperature if row_temperature is None else row_temperature)
    return lse if mask is None else lse.masked_fill(~mask, 0.0)


def weighted_sum(kernels: RowKernels, logits: Tensor, c: ClassWeights) -> Tensor:
    """[n]: sum_j c_j softcap * tanh(logits_j / softcap), of the columns here."""
    if c.each is None and not kernels.softcap:
        return logits.sum(1)
    out = logits.new_empty(len(logits))
    for rows in _blocks(logits):
        x = logits[rows]
        if kernels.softcap:
            x = (x / kernels.softcap).tanh_().mul_(kernels.softcap)
        out[rows] = x.sum(1) if c.each is None else (x * c.each).sum(1)
    return out


def spread_of(kernels, sums, lse, row_temperature, c: ClassWeights, mask) -> Tensor:
    """[n] from the weighted sums of the columns here; collective over the ranks of a split vocabulary."""
    temperature = kernels.temperature if row_temperature is None else row_temperature
    spread = kernels.whole_sum(sums) / temperature - c.total * lse
    return spread if mask is None else spread.masked_fill(~mask, 0.0)


class SumOfChunks:
    """`weighted_sum` of all rows, one chunk after another."""

    def __init__(self, head, kernels: RowKernels, c: ClassWeights):
        self.kernels, self.c, self.sums, self.filled = kernels, c, head.new_rows(), 0

    def __call__(self, logits: Tensor, targets: Tensor) -> None:
        start, self.filled = self.filled, self.filled + len(logits)
        self.sums[start : self.filled] = weighted_sum(self.kernels, logits, self.c)


def backward(kernels, upstream: Upstream, chunk, row_stats, c: ClassWeights | None, *, keep_logits):
    """Writes dL/dlogits of a chunk to chunk.dlogits. `keep_logits`: the logits are not a workspace."""
    g, h, u, v = upstream
    given = (chunk.targets, row_stats, chunk.row_temperature, chunk.mask)
    if u is None and v is None:
        return kernels.backward(g, h, chunk.logits, *given, chunk.dlogits)
    if chunk.mask is not None:
        u, v = (x if x is None else x.masked_fill(~chunk.mask, 0.0) for x in (u, v))
    if v is not None:
        u = -v * c.total if u is None else u - v * c.total
    columns = kernels.columns or slice(0, chunk.logits.shape[1])
    local, mine = (x.unsqueeze(1) for x in local_targets(chunk.targets.long(), columns))
    own = chunk.logits.gather(1, local)
    column = _target_column(kernels, g, h, u, own, *given[1:])
    g = -u if g is None else g - u
    out = chunk.dlogits
    if v is None:
        kernels.backward(g, h, chunk.logits, *given, out)
    else:
        per_z = v / (kernels.temperature if given[2] is None else given[2])
        slope = _slope(kernels, own.squeeze(1))
        more = per_z if slope is None else per_z * slope
        column += more if c.each is None else more * c.each[local.squeeze(1)]
        # Added before the one rounding to 16 bits.
        whole = out
        if out.dtype != chunk.logits.dtype:
            whole = torch.empty_like(chunk.logits) if keep_logits else chunk.logits
        for rows in _blocks(whole) if kernels.softcap else (slice(0, len(whole)),):
            slope, to = _slope(kernels, chunk.logits[rows]), whole[rows]
            mine_of = [x if x is None else x[..., rows].contiguous() for x in (g, h, *given)]
            kernels.backward(*mine_of[:2], chunk.logits[rows], *mine_of[2:], to)
            _add(to, per_z[rows], slope, c.each)
        if whole is not out:
            out.copy_(whole)
    column = column.unsqueeze(1).to(out.dtype)
    out.scatter_(1, local, torch.where(mine, column, out.gather(1, local)))


def _target_column(kernels, g, h, u, own, row_stats, row_temperature, mask) -> Tensor:
    """[n]: the gradient of the target's logit `own` [n, 1] without spread's c: g (1 - p), that of the entropy, u p."""

    def beside_a_copy(g, h):
        # As a row kernel gives it: of the logit as another column, and as the target.
        pair, second = own.repeat(1, 2), torch.ones(len(own), dtype=torch.int64, device=own.device)
        RowKernels.backward(kernels, g, h, pair, second, row_stats, row_temperature, mask, pair)
        return pair

    column = -beside_a_copy(u, None)[:, 0]
    return column if g is None and h is None else column + beside_a_copy(g, h)[:, 1]


def _slope(kernels, logits: Tensor) -> Tensor | None:
    """d (softcap * tanh(logits / softcap)) / d logits; None: 1."""
    if not kernels.softcap:
        return None
    return (logits / kernels.softcap).tanh_().square_().neg_().add_(1)


def _add(out: Tensor, per_row: Tensor, slope: Tensor | None, per_column: Tensor | None) -> None:
    """out[i, k] += per_row[i] * slope[i, k] * per_column[k]."""
    if slope is None and per_column is None:
        out.add_(per_row.unsqueeze(1))
    elif slope is None:
        out.addr_(per_row, per_column)
    else:
        slope = slope if per_column is None else slope.mul_(per_column)
        out.addcmul_(slope, per_row.unsqueeze(1))


def _blocks(x: Tensor) -> list[slice]:
    """The rows of [n, V], at most BLOCK_BYTES at a time."""
    step = max(1, BLOCK_BYTES // max(1, x.shape[1] * x.element_size()))
    return [slice(i, min(i + step, len(x))) for i in range(0, len(x), step)]
