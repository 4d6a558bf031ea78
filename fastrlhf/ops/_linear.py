"""The chunk loop of all linear ops: hidden @ weight.T + bias, a chunk of rows at a time.

Shapes: N rows, of which R count; n rows of a chunk, H hidden, V vocabulary. The loop yields each chunk with its logits.
For gradients, its caller leaves dL/dlogits in the chunk, and the loop multiplies them into dX, dW and db. On a GPU it
multiplies several chunks at once, because each product into dW reads and writes all of its V x H numbers.
"""

import torch
from torch import Tensor

from fastrlhf.ops import _gemms, _lse
from fastrlhf.ops._gemms import Gemms

# From this many rows on, the forward on CPU loops over blocks of the vocabulary, each with all rows: a GEMM call packs
# its part of the weight once, however many rows it has.
BY_BLOCK_ROWS = 64


class Chunk:
    """Some rows of a head."""

    __slots__ = (
        "carries",
        "dlogits",
        "logits",
        "mask",
        "row_temperature",
        "rows",
        "targets",
        "whole",
        "x",
    )

    def __init__(
        self, head: "Head", rows: slice, x: Tensor, logits: Tensor | None, dlogits: Tensor | None
    ):
        self.rows = rows  # of the R rows
        self.x = x  # [n, H], an operand
        self.logits = logits  # [n, V]
        self.dlogits = dlogits  # [n, V], for dL/dlogits; may be the logits
        self.whole = rows.stop - rows.start == head.rows
        mine = head.of_rows
        self.targets, self.row_temperature, self.mask = mine if self.whole else self.of(*mine)
        self.carries = (
            None  # bool [n]: rows with a gradient; set by the caller if other rows have none
        )

    def of(self, *per_row: Tensor | None):
        """The chunk's rows of tensors [R]; None stays None."""
        if self.whole:
            return per_row
        return [x if x is None else x[self.rows] for x in per_row]


class Head:
    """The operands and the tensors of one number per row. `index`: which of the N rows count, None for all."""

    # `wrong`: on a GPU, whether num_rows is wrong, as a 0-d bool tensor; else None. `counted` [N]: the rows that it
    # should have counted.
    index = wrong = mask = counted = None

    def __init__(
        self,
        gemms: Gemms,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        row_temperature: Tensor | None,
        mask: Tensor | None,
        workspace: str,
        num_rows: int | None = None,
    ):
        self.gemms, self.workspace = gemms, workspace
        self.acc = acc = gemms.acc
        self.hidden = hidden if hidden.dim() == 2 else hidden.reshape(-1, hidden.shape[-1])
        self.weight = gemms.operand(weight)
        self.bias = bias if bias is None or bias.dtype == acc else bias.to(acc)
        self.device, self.vocab = hidden.device, weight.shape[0]
        self.count = self.rows = self.hidden.shape[0]
        if mask is not None:
            mask = mask if mask.dim() == 1 else mask.reshape(-1)
            self.index, self.wrong = gemms.counted_rows(mask, num_rows)
            if self.index is not None:
                self.rows = self.index.numel()
            elif hidden.device.type != "cpu":
                self.mask = mask  # during a capture some of the rows may not count
            if self.wrong is not None:
                self.counted = mask
        rows_temperature = None if row_temperature is None else self.take(row_temperature)
        self.of_rows = self.take(targets), rows_temperature, self.mask

    def take(self, per_row: Tensor | None) -> Tensor | None:
        """[R]: the elements of [...] for the rows that count."""
        if per_row is None:
            return None
        rows = per_row if per_row.dim() == 1 else per_row.reshape(-1)
        return rows if self.index is None else rows.index_select(0, self.index)

    def numbers(self, per_row: Tensor) -> Tensor:
        """`take` in the accumulator's dtype."""
        rows = per_row if per_row.dtype is self.acc else per_row.to(self.acc)
        return rows if self.index is None and rows.dim() == 1 else self.take(rows)

    def scatter(self, per_row: Tensor) -> Tensor:
        """[..., N] from [..., R]: 0 for rows that do not count; NaN for those that do if num_rows is wrong."""
        whole = per_row
        if self.index is not None:
            whole = per_row.new_zeros((*per_row.shape[:-1], self.count))
            whole.index_copy_(-1, self.index, per_row)
        if self.wrong is not None and whole.is_floating_point():
            whole = whole.masked_fill(self.wrong & self.counted, torch.nan)
        return whole

    def per_row(self, x: Tensor | None, rows: slice) -> Tensor | None:
        return x if x is None or rows.stop - rows.start == self.rows else x[rows]

    def new_rows(self, *shape: int) -> Tensor:
        """Memory for results [..., R]."""
        return torch.empty((*shape, self.rows), dtype=self.acc, device=self.device)

    def where(self, rows: slice) -> slice | Tensor:
        """Indices among the N rows of `rows` among the R."""
        return rows if self.index is None else self.index[rows]

    def operand(self, where: slice | Tensor) -> Tensor:
        """[n, H]: rows of hidden."""
        if isinstance(where, slice):
            x = self.hidden if where.stop - where.start == self.count else self.hidden[where]
        else:
            x = self.hidden.index_select(0, where)
        if self.mask is not None and self.gemms.is_capturing():
            # Rows that do not count enter the GEMMs: their dlogits of 0 times a NaN would reach dW.
            x = x.masked_fill(~self.mask[where].unsqueeze(1), 0.0)
        return self.gemms.operand(x)

    def chunks(
        self,
        grads: "Gradients | None" = None,
        *,
        width: int | None = None,
        memory: Tensor | None = None,
        kept: Tensor | None = None,
        overlap: bool = False,
        ranges: list[slice] | None = None,
    ):
        """Yields each chunk with its logits, and then adds its dlogits to `grads`.

        Args:
            width: of the chunk's memory, if the caller fills it itself, a block of the vocabulary at a time.
            memory: [R, V] or more rows, to hold all logits.
            kept: [R, V], logits that a forward has kept.
            overlap: without `grads`, the caller's work may run while the next chunk's GEMM does.
            ranges: of the R rows, ascending; no chunk crosses the end of one. None: all rows, which are one range.
        """
        gemms = self.gemms
        step = self.rows if memory is not None else self.step(width)
        cuts, most = _cuts(self.rows, step, ranges)
        apart = grads is not None and (gemms.dlogits_dtype is not None or kept is not None)
        if memory is None and kept is None and (len(cuts) > 1 or width or gemms.dlogits_dtype):
            memory = self._logits(most, width)
            if overlap and len(cuts) > 1 and (side := gemms.side_stream(self.device)):
                yield from self._overlapped(side, cuts, (memory, self._logits(most)))
                return
        each, dlogits = 1, None
        if apart:
            each = gemms.chunks_a_product[self.workspace]
            dlogits = self._logits(min(most * each, self.rows), dtype=gemms.dlogits_dtype)
        for first in range(0, len(cuts), each):
            parts, filled = [], 0
            for rows in cuts[first : first + each]:
                size = rows.stop - rows.start
                where = self.where(rows)
                x = self.operand(where)
                if kept is not None:
                    z = self.per_row(kept, rows)
                else:
                    z = None if memory is None else memory[:size]
                    if not width:
                        z = gemms.logits(x, self.weight, self.bias, z)
                d = z if dlogits is None else dlogits[filled : filled + size]
                chunk = Chunk(self, rows, x, z, d)
                yield chunk
                if grads is None:
                    continue
                if chunk.carries is not None and not gemms.is_capturing():
                    order = pack(d, chunk.carries)
                    size = order.shape[0]
                    where = order + where.start if isinstance(where, slice) else where[order]
                    d = d[:size]
                parts.append((where, x, d))
                filled += size
            if len(parts) == 1 and filled:
                grads.add(where, x, d)
            elif filled:
                grads.add_parts(parts, dlogits[:filled])

    def _overlapped(self, side, cuts: list[slice], memories: tuple[Tensor, Tensor]):
        """The chunks, alternately in two memories; the caller's work runs on a side stream."""
        free = [None, None]
        try:
            for i, rows in enumerate(cuts):
                turn = i % 2
                if free[turn] is not None:
                    side.main_waits(free[turn])
                x = self.operand(self.where(rows))
                out = memories[turn][: rows.stop - rows.start]
                z = self.gemms.logits(x, self.weight, self.bias, out)
                with side:
                    yield Chunk(self, rows, x, z, None)
                free[turn] = side.mark()
        finally:  # an error, too, frees memory that the side stream may use
            side.main_waits(side.mark())

    def step(self, width: int | None = None) -> int:
        """The most rows of a chunk."""
        logits_bytes = self.gemms.logits_bytes[self.workspace]
        return _gemms.chunk_rows(logits_bytes, width or self.vocab, self.acc)

    def _logits(
        self, rows: int, width: int | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        return _gemms.logits_rows(rows, width or self.vocab, dtype or self.acc, self.device)


def _cuts(rows: int, step: int, ranges: list[slice] | None) -> tuple[tuple[slice, ...], int]:
    """(chunks of at most `step` rows, the rows of the largest)."""
    if ranges is None:
        cuts = _gemms.cuts(rows, step)
        return cuts, cuts[0].stop if cuts else 0
    cuts = []
    for whole in ranges:
        start = whole.start
        for cut in _gemms.cuts(whole.stop - start, step):
            cuts.append(slice(start + cut.start, start + cut.stop))
    return tuple(cuts), max((cut.stop - cut.start for cut in cuts), default=0)


class Gradients:
    """Sums of dX, dW and db over the chunks. Those that are not needed cost no GEMM and stay None.

    `into`: the tensor that dW is added to; with `apart` only in `finish`, so that an error before leaves it unchanged.
    `sums`: sums dX over the ranks of a group. `scattered`: not every row will be added.
    """

    # Allocated with the first chunk: if it holds all rows, the result of its GEMM is the gradient.
    hidden = weight = bias = None

    def __init__(
        self,
        head: Head,
        needs,
        *,
        into: Tensor | None = None,
        apart: bool = False,
        scattered: bool = False,
        sums=None,
    ):
        self.head, self.into, self.sums = head, into, sums
        self.needs_hidden, self.needs_weight, needs_bias = needs
        self.scattered = scattered or head.index is not None
        self._direct = into is not None and into.dtype == head.acc and not apart
        if self.needs_weight and self._direct:
            self.weight = into
        if needs_bias:
            self.bias = head.weight.new_zeros(head.vocab, dtype=head.acc)

    def add_parts(self, parts: list, dlogits: Tensor) -> None:
        """Adds chunks (indices of the N rows, x, dlogits) at once; `dlogits` [sum of n, V] holds those of all."""
        wheres = [where for where, _, _ in parts]
        if all(isinstance(where, slice) for where in wheres):
            where = slice(wheres[0].start, wheres[-1].stop)
        else:
            device = self.head.device
            as_index = lambda w: torch.arange(w.start, w.stop, device=device)  # noqa: E731
            where = torch.cat([as_index(w) if isinstance(w, slice) else w for w in wheres])
        self.add(where, None, dlogits)

    def add(self, where: slice | Tensor, x: Tensor | None, dlogits: Tensor) -> None:
        """Adds the rows `where` of the N; `x` [n, H]: the rows as an operand, if there is one already."""
        head, gemms = self.head, self.head.gemms
        if self.needs_hidden:
            if isinstance(where, slice):
                whole = where.stop - where.start == head.count
                if whole:
                    self.hidden = gemms.grad_hidden(dlogits, head.weight, None)
                else:
                    gemms.grad_hidden(dlogits, head.weight, self._all_hidden()[where])
                if self.sums is not None and not self.scattered:
                    self.sums.start(self.hidden[where])
            else:
                grad = gemms.grad_hidden(dlogits, head.weight, None)
                self._all_hidden().index_copy_(0, where, grad)
        if self.needs_weight:
            if x is None or x.shape[0] != dlogits.shape[0]:
                x = head.operand(where)
            self.weight = gemms.grad_weight(dlogits, x, self.weight)
        if self.bias is not None:
            self.bias.add_(dlogits.sum(0, dtype=head.acc))

    def _all_hidden(self) -> Tensor:
        if self.hidden is None:
            x = self.head.hidden
            make = x.new_zeros if self.scattered else x.new_empty
            self.hidden = make(x.shape, dtype=self.head.acc)
        return self.hidden

    def finish(self) -> list[Tensor | None]:
        """[dX, dW, db], with no reference kept here; None where not needed, or for dW where `into` got it."""
        head = self.head
        if self.needs_hidden:
            self._all_hidden()
            if self.sums is not None:
                self.sums.finish(self.hidden, self.scattered)
        if self.needs_weight and self.weight is None:
            self.weight = head.weight.new_zeros(head.weight.shape, dtype=head.acc)
        if head.wrong is not None and not head.rows:
            for grad in (self.hidden, self.weight, self.bias):
                if grad is not None:
                    grad.masked_fill_(head.wrong, torch.nan)
        if self.into is not None:
            if self.weight is not None and not self._direct:
                self.into.add_(self.weight)
            self.weight = None
        found = [self.hidden, self.weight, self.bias]
        self.hidden = self.weight = self.bias = None
        return found


def pack(rows: Tensor, carries: Tensor) -> Tensor:
    """Moves the rows of [n, V] that carry a gradient to the front; returns their former indices in the new order.

    Only rows behind the front move, into the gaps. On a GPU the host waits twice: for the number of rows, and of gaps.
    """
    count = int(carries.sum())
    order = torch.arange(len(carries), device=carries.device)
    holes = (~carries[:count]).nonzero().squeeze(1)
    movers = torch.nonzero_static(carries[count:], size=len(holes)).squeeze(1) + count
    for start in range(0, len(holes), 64):  # bounds the temporary copy
        to, of = holes[start : start + 64], movers[start : start + 64]
        rows.index_copy_(0, to, rows.index_select(0, of))
    order[holes] = movers
    return order[:count]


def statistics(
    head: Head, kernels, memory: Tensor | None = None, look=None, ranges: list[slice] | None = None
):
    """(logprob [R], entropy [R], row_stats [3, R]); `memory` [R, V]: to keep all logits in.

    `look`: called with the logits [n, V] and targets [n] of each chunk. `ranges`: only of these rows.
    """
    logprob, entropy, row_stats = head.new_rows(), head.new_rows(), head.new_rows(3)
    whole = memory is not None or look is not None or head.rows < BY_BLOCK_ROWS
    blocks = None if whole else kernels.blocks(head)
    width = blocks and max(columns.stop - columns.start for columns in blocks)
    for chunk in head.chunks(width=width, memory=memory, overlap=look is None, ranges=ranges):
        if look is not None:
            look(chunk.logits, chunk.targets)
        if blocks is None:
            given = (chunk.targets, chunk.row_temperature, chunk.mask)
            found = kernels.forward(chunk.logits, *given)
        else:
            found = kernels.forward_by_blocks(head, chunk, blocks)
        logprob[chunk.rows], entropy[chunk.rows], row_stats[:, chunk.rows] = found
    return logprob, entropy, row_stats


def add_gradients(head, kernels, grads, upstream, row_stats, class_weights, logits=None) -> None:
    """Adds the gradients that follow from `upstream`, those of logprob, entropy, lse and spread [...] (None: 0).

    row_stats [3, N]. `class_weights`: of spread. `logits` [R, V]: those that the forward has kept. If num_rows is
    wrong, the rows that take part get NaN.
    """
    upstream = [head.take(grad) for grad in upstream]
    if head.wrong is not None:
        upstream = [g if g is None else g.masked_fill(head.wrong, torch.nan) for g in upstream]
    if head.index is not None:
        row_stats = row_stats.index_select(1, head.index)
    for chunk in head.chunks(grads, kept=logits):
        own = _lse.Upstream(*(head.per_row(x, chunk.rows) for x in upstream))
        stats = row_stats[:, chunk.rows].contiguous()
        _lse.backward(kernels, own, chunk, stats, class_weights, keep_logits=logits is not None)
