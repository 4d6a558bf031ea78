"""Chunked GEMMs of the linear_* ops: logits by chunks of rows, in fp32, in one workspace that is used again.

Shapes: N rows, n rows of a chunk, H hidden, V vocabulary. 16-bit operands go to the tensor cores as
they are on a GPU and are widened on CPU, where 16-bit GEMMs would round their result; logits, dW, dX
and db are summed in fp32.
"""

import functools

import torch
from torch import Tensor

WORKSPACES = ("fast", "compact")
# Bytes of logits held at a time. CPU: each chunk reads and writes dW and the weight once more, which few
# and large chunks save; "compact" stays within the size that malloc recycles.
_BUDGET = {
    ("cpu", "fast"): 64 << 20,
    ("cpu", "compact"): 24 << 20,
    ("cuda", "fast"): 1 << 30,
    ("cuda", "compact"): 256 << 20,
}
_MIN_ROWS = 64  # a GEMM with fewer rows is bound by reading the weight


def check_workspace(op: str, workspace: str) -> None:
    if workspace not in WORKSPACES:
        raise ValueError(f"{op}: workspace must be 'fast' or 'compact'; got {workspace!r}")


def chunk_rows(workspace: str, vocab: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of a chunk for a preset: as many as its bytes of fp32 (fp64) logits hold, at least 64."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    row_bytes = max(vocab, 1) * (8 if dtype == torch.float64 else 4)
    return max(_MIN_ROWS, _BUDGET[kind, workspace] // row_bytes)


def cuts(total: int, most: int) -> list[slice]:
    """[0, total) in slices of at most `most`, about equally long: a GEMM of very few rows or columns has
    other bits than the same rows or columns among many.
    """
    if total <= 0:
        return []
    size = -(-total // -(-total // max(most, 1)))
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def without_autocast(body):
    """Keeps autocast out of an op's body: it would round the GEMMs that are meant to stay fp32."""

    @functools.wraps(body)
    def wrapped(*args):
        device = next(a for a in args if isinstance(a, Tensor)).device.type
        if not torch.is_autocast_enabled(device):
            return body(*args)
        with torch.autocast(device, enabled=False):
            return body(*args)

    return wrapped


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Operands:
    """hidden and weight as GEMM operands, and the rows that take part."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor | None):
        self.acc = acc_dtype(torch.promote_types(hidden.dtype, weight.dtype))
        self.tensor_cores = hidden.is_cuda and hidden.dtype == weight.dtype != self.acc
        self.hidden = hidden.reshape(hidden.shape[:-1].numel(), hidden.shape[-1])
        self.weight = weight if self.tensor_cores else weight.to(self.acc)
        self.bias = None if bias is None else bias.to(self.acc)
        self.index = index
        self.rows = self.hidden.shape[0] if index is None else index.numel()

    def take(self, per_row: Tensor | None) -> Tensor | None:
        """The entries of a per-row tensor for the rows that take part."""
        if per_row is None:
            return None
        flat = per_row.reshape(-1)
        return flat if self.index is None else flat.index_select(0, self.index)

    def where(self, rows: slice) -> slice | Tensor:
        """Which rows of hidden a chunk of those that take part is."""
        return rows if self.index is None else self.index[rows]

    def hidden_chunk(self, start: int, stop: int) -> Tensor:
        if self.index is None:
            chunk = self.hidden[start:stop]
        else:
            chunk = self.hidden.index_select(0, self.index[start:stop])
        return chunk if self.tensor_cores else chunk.to(self.acc)

    def logits(self, x: Tensor, out: Tensor, columns: slice = slice(None)) -> Tensor:
        """x @ weight.T + bias into `out`, in the accumulator's dtype; of some columns of the vocabulary."""
        weight = self.weight[columns].t()
        bias = None if self.bias is None else self.bias[columns]
        if self.tensor_cores:
            torch.mm(x, weight, out_dtype=self.acc, out=out)
        elif bias is not None:
            return torch.addmm(bias, x, weight, out=out)
        else:
            torch.mm(x, weight, out=out)
        return out if bias is None else out.add_(bias)


class Gradients:
    """Sums of dX, dW and db over the chunks; those nobody needs cost no GEMM and stay None.

    `into`: what dW is added to instead, at once, or with `apart` only in `finish`. `scattered`: not every
    row will be added.
    """

    def __init__(
        self,
        operands: Operands,
        needs: tuple[bool, bool, bool],
        *,
        into: Tensor | None = None,
        apart: bool = False,
        scattered: bool = False,
    ):
        self.operands, self.into = operands, into
        x, w = operands.hidden, operands.weight
        options = {"dtype": operands.acc, "device": x.device}
        make = torch.zeros if scattered or operands.index is not None else torch.empty
        self.hidden = make(x.shape, **options) if needs[0] else None
        self._direct = into is not None and into.dtype == operands.acc and not apart
        # The first chunk writes dW, so that it is never cleared and read for nothing.
        self._first = not self._direct
        self.weight = torch.empty(w.shape, **options) if needs[1] and self._first else None
        if needs[1] and self._direct:
            self.weight = into
        self.bias = torch.zeros(w.shape[0], **options) if needs[2] else None

    def add(self, where: slice | Tensor, x: Tensor, dlogits: Tensor) -> None:
        """A chunk: the rows `where` of hidden, which are `x` as operands."""
        ops = self.operands
        operand = dlogits.to(x.dtype) if ops.tensor_cores else dlogits
        if self.hidden is not None:
            if isinstance(where, slice):
                _mm(operand, ops.weight, self.hidden[where])
            else:
                self.hidden.index_copy_(0, where, _mm(operand, ops.weight, dtype=ops.acc))
        if self.weight is not None:
            if self._first:
                _mm(operand.t(), x, self.weight)
            elif ops.tensor_cores:
                self.weight.add_(_mm(operand.t(), x, dtype=ops.acc))
            else:
                self.weight.addmm_(operand.t(), x)
        if self.bias is not None:
            self.bias.add_(dlogits.sum(0))
        self._first = False

    def finish(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype_of) -> list[Tensor]:
        """(dX, dW, db) shaped as the parameters, of `dtype_of(parameter)`; empty where not needed."""
        if self._first and self.weight is not None:
            self.weight.zero_()
        if self.into is not None:
            if self.weight is not None and not self._direct:
                self.into.add_(self.weight)
            self.weight = None
        out = []
        for grad, like in ((self.hidden, hidden), (self.weight, weight), (self.bias, bias)):
            if grad is None:
                out.append(hidden.new_empty(0))
            else:
                out.append(grad.to(dtype_of(like)).reshape(like.shape))
        return out


def _mm(
    a: Tensor, b: Tensor, out: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    dtype = out.dtype if out is not None else dtype
    if dtype is not None and dtype != a.dtype:
        return torch.mm(a, b, out_dtype=dtype, out=out)
    return torch.mm(a, b, out=out)


def counted_rows(mask: Tensor | None) -> Tensor | None:
    """Indices of the rows that take part, where knowing them costs no host sync (CPU) and saves work."""
    if mask is None or mask.device.type != "cpu":
        return None
    flat = mask.reshape(-1)
    index = flat.nonzero().squeeze(1)
    return None if index.numel() == flat.numel() else index
