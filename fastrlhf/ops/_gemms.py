"""The matrix products of the linear ops: sizes of chunks, memory for logits, and what differs between devices.

Shapes: N rows, n rows of a chunk, H hidden, V vocabulary. Logits, dX, dW and db are fp32 (fp64 for fp64 operands).
`Gemms` is for the CPU: it widens operands, because a 16-bit GEMM rounds its result. `CudaGemms` passes 16-bit
operands to the tensor cores. The chunk loop (_linear.py) is the same for both. benchmarks/fake_gpu.py runs it with
`CudaGemms` on CPU and meta tensors.
"""

import functools

import torch
from torch import Tensor

from fastrlhf.ops._register import value_error

_CPU = torch.device("cpu")
_MIN_ROWS = 64  # a GEMM with fewer rows is bound by reading the weight


# ---- chunks -------------------------------------------------------------------------------------


@functools.cache
def chunk_rows(logits_bytes: int, vocab: int, dtype: torch.dtype) -> int:
    """How many rows of fp32 (fp64) logits fit into `logits_bytes`, at least 64."""
    row_bytes = max(vocab, 1) * (8 if dtype == torch.float64 else 4)
    return max(_MIN_ROWS, logits_bytes // row_bytes)


def logits_rows(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for the logits of a chunk, [rows, vocab].

    On a GPU the row stride is a multiple of 16 elements: CUDA's vector loads need rows that begin on 16-byte
    boundaries, and Triton's compiler specializes on multiples of 16.
    """
    if device == _CPU:
        return torch.empty((rows, vocab), dtype=dtype, device=device)
    return torch.empty((rows, -(-vocab // 16) * 16), dtype=dtype, device=device)[:, :vocab]


@functools.lru_cache(256)
def cuts(total: int, most: int) -> tuple[slice, ...]:
    """[0, total) in slices of at most `most` and of nearly equal length.

    A GEMM of very few rows or columns is not bitwise identical to those rows or columns of a larger one.
    """
    if total <= 0:
        return ()
    if total <= most:
        return (slice(0, total),)
    size = -(-total // -(-total // max(most, 1)))
    return tuple(slice(start, min(start + size, total)) for start in range(0, total, size))


# ---- products -----------------------------------------------------------------------------------


class Gemms:
    """Products of operands in the accumulator's dtype."""

    # Bytes of fp32 (fp64) logits of a chunk. Every chunk reads the weight and reads and writes dW, so "fast" uses few
    # large chunks. "compact" stays below the size from which malloc returns memory to the system.
    logits_bytes = {"fast": 64 << 20, "compact": 24 << 20}
    chunks_a_product = {
        "fast": 1,
        "compact": 1,
    }  # chunks whose dlogits are multiplied into dX and dW at once
    skips_idle_rows = True  # rows with an upstream gradient of 0

    def __init__(self, acc: torch.dtype, operand_dtype: torch.dtype):
        self.acc = acc
        # The dtype of dL/dlogits if it has separate memory; None: it overwrites the logits.
        self.dlogits_dtype = None

    def operand(self, x: Tensor | None) -> Tensor | None:
        return x if x is None or x.dtype is self.acc else x.to(self.acc)

    def logits(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        """x @ weight.T + bias [n, V] into `out`, or into fresh memory for None."""
        if out is None:
            return torch.nn.functional.linear(x, weight, bias)
        if bias is None:
            return torch.mm(x, weight.t(), out=out)
        return torch.addmm(bias, x, weight.t(), out=out)

    def grad_hidden(self, dlogits: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
        """dlogits @ weight [n, H] into `out`, or into fresh memory for None."""
        if out is None:  # an `out` that is None costs 0.6 us
            return torch.mm(dlogits, weight)
        return torch.mm(dlogits, weight, out=out)

    def grad_weight(self, dlogits: Tensor, x: Tensor, total: Tensor | None) -> Tensor:
        """total + dlogits.T @ x [V, H], into `total`, or into fresh memory for None."""
        if total is None:
            return torch.mm(dlogits.t(), x)
        return total.addmm_(dlogits.t(), x)

    def side_stream(self, device: torch.device) -> "SideStream | None":
        """For a chunk's row kernels, while the main stream computes the next chunk's logits; None: no overlap."""
        return None

    def is_capturing(self) -> bool:
        """Whether a CUDA graph is being captured, during which the host cannot wait for results."""
        return False

    def counted_rows(self, flat: Tensor, num_rows: int | None):
        """(indices of the rows where the mask `flat` [N] is True, None for all; whether num_rows is wrong).

        The second is a 0-d tensor on the device if the host does not check it, else None.
        """
        index = flat.nonzero().squeeze(1)
        if num_rows is not None:
            check_count(index.numel(), num_rows)
        return (None if index.numel() == flat.numel() else index), None


def check_count(count: int, num_rows: int) -> None:
    if count != num_rows:
        raise value_error(f"num_rows must be {count}, the rows that count; got {num_rows}")


class SideStream:
    """A second stream of a GPU, next to the current one."""

    _streams: dict[torch.device, torch.cuda.Stream] = {}

    def __init__(self, device: torch.device):
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device, priority=-1)
        self.side, self.main = self._streams[device], torch.cuda.current_stream(device)

    def __enter__(self) -> None:
        """Kernels launched inside run on the side stream, after all earlier work of the main stream."""
        self.side.wait_stream(self.main)
        self._inside = torch.cuda.stream(self.side)
        self._inside.__enter__()

    def __exit__(self, *error) -> None:
        self._inside.__exit__(*error)

    def mark(self):
        """An event after all work launched on the side stream so far, for `main_waits`."""
        return self.side.record_event()

    def main_waits(self, mark) -> None:
        self.main.wait_event(mark)


class CudaGemms(Gemms):
    """Products on the tensor cores: 16-bit operands, sums and results in fp32."""

    # A chunk has enough rows to keep the tensor cores busy while the weight is read once. The 16-bit dlogits of several
    # chunks, 1 GiB or 128 MiB, have their own memory.
    logits_bytes = {"fast": 512 << 20, "compact": 128 << 20}
    chunks_a_product = {"fast": 4, "compact": 2}
    skips_idle_rows = False

    def __init__(self, acc: torch.dtype, operand_dtype: torch.dtype):
        super().__init__(acc, operand_dtype)
        if operand_dtype != acc:
            self.dlogits_dtype = operand_dtype
        else:  # dlogits overwrite the logits
            self.logits_bytes = {name: 2 * size for name, size in self.logits_bytes.items()}
            self.chunks_a_product = Gemms.chunks_a_product

    def operand(self, x: Tensor) -> Tensor:
        dtype = self.dlogits_dtype or self.acc
        return x if x.dtype == dtype else x.to(dtype)

    def logits(self, x, weight, bias, out):
        if self.dlogits_dtype is None:
            return super().logits(x, weight, bias, out)
        out = torch.mm(x, weight.t(), out_dtype=self.acc, out=out)
        return out if bias is None else out.add_(bias)

    def grad_hidden(self, dlogits, weight, out):
        if self.dlogits_dtype is None:
            return super().grad_hidden(dlogits, weight, out)
        return torch.mm(dlogits, weight, out_dtype=self.acc, out=out)

    def grad_weight(self, dlogits, x, total):
        if self.dlogits_dtype is None:
            return super().grad_weight(dlogits, x, total)
        a = dlogits.t()
        if total is None:
            return torch.mm(a, x, out_dtype=self.acc)
        if adds_in_place(x.device, x.dtype):
            # Needs no second [V, H] tensor and no separate pass over the sum.
            return torch.addmm(total, a, x, out_dtype=self.acc, out=total)
        return total.add_(torch.mm(a, x, out_dtype=self.acc))

    def counted_rows(self, flat, num_rows):
        if num_rows is None:
            # The host waits for the number once. During capture it cannot, and all rows are multiplied.
            if self.is_capturing():
                return None, None
            index = flat.nonzero().squeeze(1)
            return (None if index.numel() == flat.numel() else index), None
        index = torch.nonzero_static(flat, size=num_rows, fill_value=0).squeeze(1)
        return (None if num_rows == flat.numel() else index), flat.sum() != num_rows

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def side_stream(self, device):
        return None if self.dlogits_dtype is None else SideStream(device)


_adds_in_place: dict[tuple[torch.device, torch.dtype], bool] = {}


def adds_in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch can add a product of 16-bit operands to an fp32 tensor inside the GEMM; older ones raise.

    Tried once, but not while a CUDA graph is captured, during which the host cannot wait for the answer.
    """
    if (device, dtype) not in _adds_in_place:
        if torch.cuda.is_current_stream_capturing():
            return False
        a = torch.ones(8, 8, dtype=dtype, device=device)
        total = torch.ones(8, 8, device=device)
        try:
            torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
        except RuntimeError:
            total.zero_()
        _adds_in_place[device, dtype] = bool((total == 9).all())
    return _adds_in_place[device, dtype]


def gemms_for(hidden: Tensor, weight: Tensor) -> Gemms:
    return _gemms_of(hidden.dtype, weight.dtype, hidden.is_cuda)


@functools.cache
def _gemms_of(dtype: torch.dtype, weight_dtype: torch.dtype, on_cuda: bool) -> Gemms:
    wide = torch.float64 in (dtype, weight_dtype)
    acc = torch.float64 if wide else torch.float32
    return (CudaGemms if on_cuda else Gemms)(acc, dtype if dtype == weight_dtype else acc)


def acc_of(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of sums over products of the two."""
    wide = torch.float64 in (hidden.dtype, weight.dtype)
    return torch.float64 if wide else torch.float32


def as_parameters(grads: list, parameters, dtype_of) -> list[Tensor | None]:
    """The same list with each gradient shaped as its parameter, of `dtype_of(parameter)`."""
    for i, like in enumerate(parameters):
        grad = grads[i]
        if grad is not None:
            if grad.dtype is not like.dtype:
                grad = grad.to(dtype_of(like))
            if grad.shape != like.shape:
                grad = grad.reshape(like.shape)
            grads[i] = grad  # the one before is given up before the next is cast
    return grads
