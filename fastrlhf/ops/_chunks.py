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
_CPU = torch.device("cpu")
_MIN_ROWS = 64  # a GEMM with fewer rows is bound by reading the weight


def check_workspace(op: str, workspace: str) -> None:
    if workspace not in WORKSPACES:
        raise ValueError(f"{op}: workspace must be 'fast' or 'compact'; got {workspace!r}")


def chunk_rows(workspace: str, vocab: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of a chunk for a preset: as many as its bytes of fp32 (fp64) logits hold, at least 64."""
    kind = "cpu" if device == _CPU or device.type != "cuda" else "cuda"
    row_bytes = max(vocab, 1) * (8 if dtype == torch.float64 else 4)
    return max(_MIN_ROWS, _BUDGET[kind, workspace] // row_bytes)


def logits_rows(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a chunk's logits, [rows, vocab]. On a GPU each row begins on a 16-byte boundary, as the fast
    loops of the row kernels want it.
    """
    step = 16 // dtype.itemsize if device.type == "cuda" else 1
    return torch.empty((rows, -(-vocab // step) * step), dtype=dtype, device=device)[:, :vocab]


def cuts(total: int, most: int) -> list[slice]:
    """[0, total) in slices of at most `most`, about equally long: a GEMM of very few rows or columns has
    other bits than the same rows or columns among many.
    """
    if total <= 0:
        return []
    if total <= most:
        return [slice(0, total)]
    size = -(-total // -(-total // max(most, 1)))
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _is_tensor(x) -> bool:
    return isinstance(x, Tensor)


def without_autocast(body):
    """Keeps autocast out of an op's body: it would round the GEMMs that are meant to stay fp32."""

    @functools.wraps(body)
    def wrapped(*args):
        first = args[0] if isinstance(args[0], Tensor) else next(filter(_is_tensor, args))
        device = "cpu" if first.is_cpu else first.device.type
        if not torch.is_autocast_enabled(device):
            return body(*args)
        with torch.autocast(device, enabled=False):
            return body(*args)

    return wrapped


def rows_of(x: Tensor | None, rows: slice | Tensor) -> Tensor | None:
    """x[rows] of a tensor with rows first; the tensor itself where that is all of them."""
    return x if x is None or _is_all(x, rows) else x[rows]


def _is_all(x: Tensor, rows: slice | Tensor) -> bool:
    return isinstance(rows, slice) and rows.stop - rows.start == x.shape[0]


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def acc_of(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the sums over products of the two."""
    if hidden.dtype == weight.dtype:
        return acc_dtype(hidden.dtype)
    return acc_dtype(torch.promote_types(hidden.dtype, weight.dtype))


class Operands:
    """hidden and weight as GEMM operands, and the rows that take part."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor | None):
        self.acc = acc_of(hidden, weight)
        width = hidden.shape[-1]
        self.tensor_cores = hidden.is_cuda and hidden.dtype == weight.dtype != self.acc
        self.hidden = hidden if hidden.dim() == 2 else hidden.reshape(-1, width)
        plain = self.tensor_cores or weight.dtype == self.acc
        self.weight = weight if plain else weight.to(self.acc)
        self.bias = None if bias is None else bias.to(self.acc)
        self.index = index
        self.rows = self.hidden.shape[0] if index is None else index.numel()

    def take(self, per_row: Tensor | None) -> Tensor | None:
        """The entries of a per-row tensor for the rows that take part."""
        if per_row is None:
            return None
        rows = per_row if per_row.dim() == 1 else per_row.reshape(-1)
        return rows if self.index is None else rows.index_select(0, self.index)

    def where(self, rows: slice) -> slice | Tensor:
        """Which rows of hidden a chunk of those that take part is."""
        return rows if self.index is None else self.index[rows]

    def hidden_chunk(self, start: int, stop: int) -> Tensor:
        if self.index is None:
            chunk = rows_of(self.hidden, slice(start, stop))
        else:
            chunk = self.hidden.index_select(0, self.index[start:stop])
        return chunk if self.tensor_cores or chunk.dtype == self.acc else chunk.to(self.acc)

    def logits(self, x: Tensor, out: Tensor | None, columns: slice | None = None) -> Tensor:
        """x @ weight.T + bias into `out`, in the accumulator's dtype; of some columns of the vocabulary.

        None: into fresh memory.
        """
        weight, bias = self.weight, self.bias
        if out is None and not self.tensor_cores:
            return torch.nn.functional.linear(x, weight, bias)
        if columns is not None:
            weight, bias = weight[columns], None if bias is None else bias[columns]
        weight = weight.t()
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
        self.needs_hidden, self.needs_weight, needs_bias = needs
        self._scattered = scattered or operands.index is not None
        # Made where the first chunk is added: that of all rows is a GEMM's result as it is.
        self.hidden = self.weight = None
        self._direct = into is not None and into.dtype == operands.acc and not apart
        # The first chunk writes dW, so that it is never cleared and read for nothing.
        self._first = not self._direct
        if self.needs_weight and self._direct:
            self.weight = into
        self.bias = None
        if needs_bias:
            weight = operands.weight
            self.bias = weight.new_zeros(weight.shape[0], dtype=operands.acc)

    def add(self, where: slice | Tensor, x: Tensor, dlogits: Tensor) -> None:
        """A chunk: the rows `where` of hidden, which are `x` as operands."""
        ops = self.operands
        operand = dlogits.to(x.dtype) if ops.tensor_cores else dlogits
        if self.needs_hidden:
            if _is_all(ops.hidden, where):
                self.hidden = _mm(operand, ops.weight, dtype=ops.acc)
            elif isinstance(where, slice):
                _mm(operand, ops.weight, self._all_hidden()[where])
            else:
                grad = _mm(operand, ops.weight, dtype=ops.acc)
                self._all_hidden().index_copy_(0, where, grad)
        if self.needs_weight:
            if self._first:
                self.weight = _mm(operand.t(), x, dtype=ops.acc)
            elif ops.tensor_cores:
                self.weight.add_(_mm(operand.t(), x, dtype=ops.acc))
            else:
                self.weight.addmm_(operand.t(), x)
        if self.bias is not None:
            self.bias.add_(dlogits.sum(0))
        self._first = False

    def _all_hidden(self) -> Tensor:
        if self.hidden is None:
            x = self.operands.hidden
            make = x.new_zeros if self._scattered else x.new_empty
            self.hidden = make(x.shape, dtype=self.operands.acc)
        return self.hidden

    def finish(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype_of) -> list:
        """(dX, dW, db) shaped as the parameters, of `dtype_of(parameter)`; None where not needed."""
        if self.needs_hidden:
            self._all_hidden()
        if self._first and self.needs_weight:
            self.weight = torch.zeros_like(self.operands.weight, dtype=self.operands.acc)
        if self.into is not None:
            if self.weight is not None and not self._direct:
                self.into.add_(self.weight)
            self.weight = None
        out = []
        for grad, like in ((self.hidden, hidden), (self.weight, weight), (self.bias, bias)):
            if grad is not None:
                grad = grad if grad.dtype == dtype_of(like) else grad.to(dtype_of(like))
                grad = grad if grad.shape == like.shape else grad.reshape(like.shape)
            out.append(grad)
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
