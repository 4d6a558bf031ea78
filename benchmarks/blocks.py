"""Experiment: linear_logprob's forward in row x vocabulary blocks whose fp32 logits stay in L2.

The op itself uses chunks of whole rows, whose logits go through memory; this variant is timed next to it. Plain torch
around our row kernels: the product of a block, the partial row statistics of its columns, and their merge. A block
is one or two full waves: as many GEMM tiles as the GPU has SMs, or twice as many.
"""

import torch
from torch import Tensor

from fastrlhf.ops._gemms import gemms_for
from fastrlhf.ops._rows import RowKernels, local_targets, whole_rows
from harness import Provider

TILE = (128, 256)  # rows, columns of the output tile of cuBLAS's 16-bit kernels on sm_90
WAVES = (1, 2)
FILL = 0.95  # share of L2 for the logits and hidden states of a block; the weight streams through
IDLE = 1.1  # limit on the waves of a walk over N x V, relative to the fewest possible
CPU_LIMITS = (4, 2**20)  # of a dry run, small enough that tiny shapes need several blocks


def device_limits(device: torch.device) -> tuple[int, int]:
    """(SMs, bytes of L2)."""
    if device.type != "cuda":
        return CPU_LIMITS
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.L2_cache_size


def shapes(sms: int, l2: int, sizes: tuple[int, int, int]) -> list[tuple[int, int]]:
    """(rows, columns) of a block for each of WAVES; fewer if no block fits into L2. `sizes`: N, H, V.

    A candidate fits its logits into L2 together with its 16-bit hidden states, which the next columns read again,
    and covers N x V in about the fewest waves. Of these take the one with the most rows, since every block of rows
    reads the weight once.
    """
    n, h, v = sizes
    least = -(-n // TILE[0]) * -(-v // TILE[1]) / sms

    def waves_of(shape: tuple[int, int]) -> int:
        tiles = [
            [-(-(s.stop - s.start) // t) for s in cuts(size, most)]
            for size, most, t in zip((n, v), shape, TILE, strict=True)
        ]
        return sum(-(-r * c // sms) for r in tiles[0] for c in tiles[1])

    found = []
    for waves in WAVES:
        tiles = sms * waves
        whole = [(a * TILE[0], tiles // a * TILE[1]) for a in range(1, tiles + 1) if tiles % a == 0]
        held = [
            (r, c)
            for r, c in whole
            if 4 * r * c + 2 * r * h <= FILL * l2 and waves_of((r, c)) <= IDLE * least + waves
        ]
        found += [max(held)] if held else []
    return found


def cuts(total: int, size: int) -> list[slice]:
    """[0, total) in slices of `size`, the last one shorter. Equal parts would not be full waves."""
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


@torch.no_grad()
def logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, shape: tuple[int, int], backend: str
) -> Tensor:
    """log-prob [N] of targets, in blocks of `shape` = (rows, columns)."""
    gemms, kernels = gemms_for(hidden, weight), RowKernels(backend, 1.0, 0.0)
    weight, columns = gemms.operand(weight), cuts(len(weight), shape[1])
    size = min(shape[0], len(hidden)) * min(shape[1], len(weight))
    buffer = torch.empty(size, dtype=gemms.acc, device=hidden.device)
    out = []
    for rows in cuts(len(hidden), shape[0]):
        x, y, parts = gemms.operand(hidden[rows]), targets[rows], []
        for part in columns:
            width = part.stop - part.start
            logits = buffer[: len(y) * width].view(len(y), width)
            gemms.logits(x, weight[part], None, logits)
            found, _, stats = kernels.forward(logits, local_targets(y, part)[0], None, None)
            parts.append(torch.cat((stats, found.unsqueeze(0))))
        out.append(whole_rows(torch.stack(parts), y, columns[0].stop, None)[0])
    return torch.cat(out)


def variant(shape: tuple[int, int]):
    """A forward-only variant of linear_logprob that uses blocks of `shape`."""

    def make(op):
        def call(hidden, weight, targets):
            return logprob(hidden, weight, targets, shape, op.keywords["backend"])

        return Provider(call, ours=True, forward_only=True)

    return make
