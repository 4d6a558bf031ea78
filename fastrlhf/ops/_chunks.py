"""Sizes of the chunks of rows that the linear ops take one after the other, and memory for their logits.

Shapes: N rows, n rows of a chunk, V vocabulary.
"""

import functools

import torch
from torch import Tensor

WORKSPACES = ("fast", "compact")
_CPU = torch.device("cpu")
_MIN_ROWS = 64  # a GEMM with fewer rows is bound by reading the weight


def check_workspace(op: str, workspace: str) -> None:
    if workspace not in WORKSPACES:
        raise ValueError(f"{op}: workspace must be 'fast' or 'compact'; got {workspace!r}")


@functools.cache
def chunk_rows(logits_bytes: int, vocab: int, dtype: torch.dtype) -> int:
    """As many rows as so many bytes of fp32 (fp64) logits hold, at least 64."""
    row_bytes = max(vocab, 1) * (8 if dtype == torch.float64 else 4)
    return max(_MIN_ROWS, logits_bytes // row_bytes)


def logits_rows(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a chunk's logits, [rows, vocab]. On a GPU the row stride is a multiple of 16 elements: CUDA's
    fast loops want rows that begin on 16-byte boundaries, and Triton's compiler looks for a factor of 16.
    """
    if device == _CPU:
        return torch.empty((rows, vocab), dtype=dtype, device=device)
    return torch.empty((rows, -(-vocab // 16) * 16), dtype=dtype, device=device)[:, :vocab]


@functools.lru_cache(256)
def cuts(total: int, most: int) -> tuple[slice, ...]:
    """[0, total) in slices of at most `most`, about equally long: a GEMM of very few rows or columns has
    other bits than the same rows or columns among many.
    """
    if total <= 0:
        return ()
    if total <= most:
        return (slice(0, total),)
    size = -(-total // -(-total // max(most, 1)))
    return tuple(slice(start, min(start + size, total)) for start in range(0, total, size))


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
