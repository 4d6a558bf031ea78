"""Packed batches: sequences concatenated into one row of tokens, without padding.

Shapes: n sequences in total, k micro-batches (bins), N tokens and B sequences of one micro-batch.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastrlhf import _compiled

# None without the extension: pack() then uses pack_reference, which gives the same result.
_C, _ = _compiled.packer()

# Limit of the moves between bins after first-fit; must equal the limit in csrc/packer.cpp.
_MAX_MOVES = 256


def pack(lengths, max_tokens: int, *, multiple_of: int = 1) -> list[np.ndarray]:
    """Split sequences into few, balanced micro-batches of at most `max_tokens` tokens.

    First-fit-decreasing gives the number of bins k (at most 11/9 of the optimum + 6/9), rounded up to
    `multiple_of`. Longest-processing-time greedy then balances the k bins (the heaviest holds at most
    4/3 of the best possible load). If that overflows a bin, the bins of first-fit are kept and evened
    out by moving items. The result is deterministic on every machine. O(n log k): 10^6 lengths take
    about 0.2 s in the extension; csrc/packer.cpp has the details.

    Args:
        lengths: tokens of each sequence, [n] integers, each in [1, max_tokens].
        max_tokens: the token budget of a micro-batch.
        multiple_of: k is a multiple of this, e.g. the number of data-parallel ranks. With fewer
            sequences than that, some bins stay empty.

    Returns:
        k arrays of sequence indices (int64), ascending inside a bin, heaviest bin first. Each of
        0 .. n-1 appears once. An empty `lengths` gives an empty list.

    Raises:
        TypeError: lengths are not integers.
        ValueError: lengths have more than one axis, a sequence is empty or longer than max_tokens,
            or an argument is below 1.

    Example:
        >>> [b.tolist() for b in pack([5, 3, 3, 5], max_tokens=8)]
        [[0, 1], [2, 3]]
    """
    lengths = np.asarray(lengths)
    if lengths.ndim != 1:
        raise ValueError(f"lengths: expected one axis, got shape {lengths.shape}")
    if lengths.size and not np.issubdtype(lengths.dtype, np.integer):
        raise TypeError(f"lengths: expected integers, got {lengths.dtype}")
    for name, value in (("max_tokens", max_tokens), ("multiple_of", multiple_of)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    lengths = lengths.astype(np.int64)
    bad = np.flatnonzero((lengths < 1) | (lengths > max_tokens))
    if bad.size:
        raise ValueError(
            f"lengths[{bad[0]}]: expected 1 to max_tokens = {max_tokens}, got {lengths[bad[0]]}"
        )
    if _C is None:
        return pack_reference(lengths, max_tokens, multiple_of)
    order, offsets = _C.pack(lengths, max_tokens, multiple_of)
    return np.split(order, offsets[1:-1]) if len(offsets) > 1 else []


def pack_reference(lengths: np.ndarray, max_tokens: int, multiple_of: int) -> list[np.ndarray]:
    """`pack` in Python: the fallback where the extension is missing, and the reference in its tests."""
    if lengths.size == 0:
        return []
    by_length = np.argsort(-lengths, kind="stable")
    items = lengths[by_length].tolist()
    bin_of, bins = _first_fit(items, max_tokens)
    bins = -(-bins // multiple_of) * multiple_of
    balanced = _balance(items, bins, max_tokens)
    if balanced is not None:
        bin_of = balanced
    else:
        _even_out(np.asarray(items), bin_of, bins, max_tokens)
    load = np.zeros(bins, dtype=np.int64)
    np.add.at(load, bin_of, items)
    return [np.sort(by_length[bin_of == b]) for b in np.argsort(-load, kind="stable")]


def _first_fit(items: list[int], max_tokens: int) -> tuple[np.ndarray, int]:
    """Put each item, longest first, into the first bin with room; return (bin of each item, k)."""
    room = np.full(len(items), max_tokens, dtype=np.int64)
    bin_of = np.empty(len(items), dtype=np.int64)
    bins = 0
    for i, length in enumerate(items):
        bin_of[i] = b = int(np.argmax(room[: bins + 1] >= length))
        room[b] -= length
        bins = max(bins, b + 1)
    return bin_of, bins


def _balance(items: list[int], bins: int, max_tokens: int) -> np.ndarray | None:
    """Put each item, longest first, into the lightest bin; return the bins, or None if one overflows."""
    heap = [(0, b) for b in range(bins)]
    bin_of = np.empty(len(items), dtype=np.int64)
    for i, length in enumerate(items):
        load, b = heap[0]
        if load + length > max_tokens:
            return None
        heapq.heapreplace(heap, (load + length, b))
        bin_of[i] = b
    return bin_of


def _even_out(items: np.ndarray, bin_of: np.ndarray, bins: int, max_tokens: int) -> None:
    """Move items from the heaviest bin to the lightest, in place in `bin_of`."""
    load = np.zeros(bins, dtype=np.int64)
    np.add.at(load, bin_of, items)
    first = bin_of.copy()
    gives = np.bincount(bin_of, minlength=bins) > 1
    for _ in range(_MAX_MOVES):
        if not gives.any():
            return
        source = int(np.argmax(np.where(gives, load, -1)))
        target = int(np.argmin(load))
        gap = int(load[source] - load[target])
        if gap <= max_tokens // 32:
            return
        # An item moves at most once: only items that first-fit put here may leave.
        movable = np.flatnonzero((first == source) & (bin_of == source) & (items <= gap // 2))
        if movable.size == 0:
            gives[source] = False
            continue
        item = movable[0]
        bin_of[item] = target
        load[source] -= items[item]
        load[target] += items[item]


@dataclass
class PackedBatch:
    """B concatenated sequences of N tokens; sequence b is tokens cu_seqlens[b] to cu_seqlens[b + 1] - 1."""

    input_ids: torch.Tensor  # [N] int64
    position_ids: torch.Tensor  # [N] int64; restarts at 0 in each sequence
    cu_seqlens: torch.Tensor  # [B + 1] int32
    max_seqlen: int  # length of the longest sequence

    @property
    def last_rows(self) -> torch.Tensor:
        """Position of each sequence's last token, [B] int64."""
        return self.cu_seqlens[1:].long() - 1

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The batch on `device`; the copy is asynchronous from pinned memory."""
        return PackedBatch(
            self.input_ids.to(device, non_blocking=True),
            self.position_ids.to(device, non_blocking=True),
            self.cu_seqlens.to(device, non_blocking=True),
            self.max_seqlen,
        )


def collate(sequences: Sequence) -> PackedBatch:
    """Concatenate token sequences (lists, arrays or 1-D tensors of token ids) into one batch.

    Raises:
        ValueError: there is no sequence, or one is empty or has more than one axis.

    Example:
        >>> collate([[7, 8], [9]]).cu_seqlens.tolist()
        [0, 2, 3]
    """
    rows = [torch.as_tensor(s, dtype=torch.int64) for s in sequences]
    if not rows:
        raise ValueError("sequences: expected at least one, got none")
    for i, row in enumerate(rows):
        if row.dim() != 1 or row.numel() == 0:
            raise ValueError(
                f"sequences[{i}]: expected one axis with at least one token, "
                f"got shape {tuple(row.shape)}"
            )
    lengths = torch.tensor([row.numel() for row in rows])
    cu_seqlens = torch.zeros(len(rows) + 1, dtype=torch.int32)
    cu_seqlens[1:] = lengths.cumsum(0)
    starts = torch.repeat_interleave(cu_seqlens[:-1].to(torch.int64), lengths)
    input_ids = torch.cat(rows)
    position_ids = torch.arange(input_ids.numel()) - starts
    return PackedBatch(input_ids, position_ids, cu_seqlens, int(lengths.max()))
