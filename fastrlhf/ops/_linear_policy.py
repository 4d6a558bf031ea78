"""linear_ppo_loss beyond plain PPO: what its raw op takes, and terms of whole sequences inside the chunk loop.

Shapes: N rows, of which R count, in S sequences; n rows of a chunk; sequences [5, S] as in _policy.py.

All terms are known before the loop, except a ratio or rollout weight of a sequence that depends on the new log-probs:
a late row of `sequences`. A chunk then holds whole sequences: its log-probs come first, then the row of these
sequences, then dlogits. That takes three GEMMs. A sequence longer than a chunk has its log-probs computed before the
loop, which takes four.
"""

import bisect
from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf.ops import _policy
from fastrlhf.ops._linear import Head, statistics
from fastrlhf.ops._rows import RowKernels

PLAIN_TENSORS, PLAIN_NUMBERS = 4, 8  # of plain PPO in the raw op's per_token and settings


# Which row of `sequences` the new log-probs determine: the log-ratio, or the rollout weight as exp of a sum or mean.
LATE = ("none", "log_ratio", "rollout_sum", "rollout_mean")


class More(NamedTuple):
    """The raw op's tensors and numbers after those of plain PPO."""

    ref_logprob: Tensor | None  # [N]
    rollout: Tensor | None  # [N]
    cu_seqlens: Tensor | None  # of the N rows
    sequences: Tensor | None  # without the late row
    factors: Tensor | None  # [2]
    subtracted: Tensor | None  # [N], from the new log-probs, for the late row
    options: list[float]
    late: str


def more_of(per_token: list, settings: list) -> More:
    """What `arguments` has made, from the arguments of the raw op."""
    *options, late = settings[PLAIN_NUMBERS:]
    return More(*per_token[PLAIN_TENSORS:], options, LATE[int(late)])


def arguments(
    policy: _policy.Policy, old_logprob: Tensor | None, mask: Tensor | None, targets: Tensor, acc, backend: str
) -> tuple[list[Tensor | None], list[float]]:  # fmt: skip
    """The tensors and the numbers of `More`; none for plain PPO. old_logprob, mask, targets: [N]."""
    if policy.plain:
        if _policy.factors(policy, old_logprob, mask) is None:
            return [], []
        policy = policy._replace(
            plain=False
        )  # for another weight than 1 / R, which is in the longer list
    late, subtracted = "none", None
    if old_logprob is None:
        if _policy.sequence_rollout(policy):
            mean = policy.options["rollout_level"] == "sequence_mean"
            late, subtracted = "rollout_mean" if mean else "rollout_sum", policy.rollout.reshape(-1)
        # Its shape matters, but no value.
        old_logprob = torch.zeros(targets.shape, dtype=acc, device=targets.device)
    elif policy.sequence_ratio:
        late, subtracted = "log_ratio", old_logprob
    sequences = _policy.sequence_rows(policy, old_logprob, old_logprob, mask, backend)
    ref_logprob, rollout, cu_seqlens, _ = _policy.more(policy, sequences)
    rows = [x if x is None else x.reshape(-1) for x in (ref_logprob, rollout)]
    factors = _policy.factors(policy, old_logprob, mask)
    tensors = [*rows, cu_seqlens, sequences, factors, subtracted]
    return tensors, [*_policy.options(policy), float(LATE.index(late))]


def cu_seqlens_of(head: Head, cu_seqlens: Tensor | None) -> Tensor | None:
    """cu_seqlens [S + 1] of the R rows that count."""
    if cu_seqlens is None or head.index is None:
        return cu_seqlens
    return torch.searchsorted(head.index, cu_seqlens.to(head.index.dtype), out_int32=True)


class LateTerms:
    """The late row of `sequences`, which it owns, and the rows of the chunks that hold whole sequences."""

    def __init__(self, head: Head, kernels: RowKernels, more: More, cu_seqlens: Tensor):
        self.head, self.kernels, self.late = head, kernels, more.late
        self.cu_seqlens = cu_seqlens  # of the R rows
        self.sequences = more.sequences.clone()
        self.subtracted = head.numbers(more.subtracted)

    def ranges(self) -> list[slice]:
        """Rows that no chunk may leave. Fills the late row of sequences that are longer than a chunk."""
        head = self.head
        most = head.step()
        # Sequences that begin at a row: of these rows a chunk holds all.
        self._whole: dict[int, slice] = {}
        longer: list[tuple[slice, slice]] = []
        found = whole_sequences(head, self.cu_seqlens, most)
        for rows, sequences in found:
            if rows.stop - rows.start <= most:
                self._whole[rows.start] = sequences
            else:
                longer.append((rows, sequences))
        if longer:
            logprob, _, _ = statistics(head, self.kernels, ranges=[rows for rows, _ in longer])
            for rows, sequences in longer:
                self.fill(rows, sequences, logprob)
        return [rows for rows, _ in found]

    def holds_whole(self, rows: slice) -> bool:
        """Whether a chunk of these rows has to be filled by `of_chunk`."""
        return rows.start in self._whole

    def of_chunk(self, rows: slice, logprob: Tensor) -> None:
        """Fills the late row of a chunk's sequences; `logprob` [R]: its rows are known."""
        self.fill(rows, self._whole[rows.start], logprob)

    def of_all(self, logprob: Tensor) -> None:
        self.fill(slice(0, self.head.rows), slice(0, self.sequences.shape[1]), logprob)

    def fill(self, rows: slice, sequences: slice, logprob: Tensor) -> None:
        """Fills the late row of some sequences from the log-probs of their rows."""
        ends, head = self.cu_seqlens, self.head
        if sequences.stop - sequences.start < self.sequences.shape[1]:
            ends = ends[sequences.start : sequences.stop + 1] - ends[sequences.start]
        x, y, mask = (head.per_row(t, rows) for t in (logprob, self.subtracted, head.mask))
        given = (x, y, mask, ends, self.kernels.backend)
        if self.late == "log_ratio":
            row, found = _policy.Sequence.LOG_RATIO, _policy.log_ratio_row(*given)
        else:
            mean = self.late == "rollout_mean"
            row, found = _policy.Sequence.ROLLOUT, _policy.rollout_row(*given, mean=mean)
        self.sequences[row, sequences] = found


def whole_sequences(head: Head, cu_seqlens: Tensor, most: int) -> list[tuple[slice, slice]]:
    """(rows, sequences) of ranges of at most `most` rows; a longer sequence is a range of its own.

    On a GPU the host waits for the lengths. While a graph is captured it cannot, and all rows are one range.
    """
    count = cu_seqlens.shape[0] - 1
    if head.rows <= most or head.gemms.is_capturing():
        return [(slice(0, head.rows), slice(0, count))] if head.rows else []
    ends, found, first = cu_seqlens.tolist(), [], 0
    while first < count:
        last = bisect.bisect_right(ends, ends[first] + most, first + 1) - 1
        last = max(last, first + 1)
        if ends[last] > ends[first]:
            found.append((slice(ends[first], ends[last]), slice(first, last)))
        first = last
    return found
