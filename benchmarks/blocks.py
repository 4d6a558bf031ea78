"""An experiment: linear_logprob's forward by blocks of rows x vocabulary whose fp32 logits stay in the L2 cache.

Plain torch around our own row kernels: each block's product, its part of the rows' statistics, and the merge.
The op itself goes by chunks of whole rows, whose logits pass through memory; this is timed beside it. A block
is a whole number of waves: so many tiles of the GEMM as the GPU has SMs, once or twice.
"""

import torch
from torch import Tensor

from fastrlhf.ops._gemms import gemms_for
from fastrlhf.ops._rows import RowKernels, local_targets, whole_rows
from harness import Provider

TILE = (128, 256)  # rows and columns of an output tile of cuBLAS's 16-bit kernels on sm_90
WAVES = (1, 2)
FILL = 0.95  # of the L2 cache may a block's logits and hidden states take; the weight passes through it
IDLE = 1.1  # times as many waves as full ones would be
CPU_LIMITS = (4, 2**20)  # a dry run's: small shapes, so that several blocks of them are walked


def device_limits(device: torch.device) -> tuple[int, int]:
    """(SMs, bytes of L2)."""
    if device.type != "cuda":
        return CPU_LIMITS
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.L2_cache_size


def shapes(sms: int, l2: int, sizes: tuple[int, int, int]) -> list[tuple[int, int]]:
    """(rows, columns) of a block for each of WAVES, at N, H, V; none where L2 holds none.

    Of all blocks that are so many waves, those whose logits stay in L2 beside their 16-bit hidden states, which
    the next columns read again, and that walk N x V in about as few waves as there can be; of these the one with
    the most rows: the weight is read once for each block of rows.
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
    """[0, total) in slices of `size` and a last one of what is left: whole waves, unlike equal parts."""
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


@torch.no_grad()
def logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, shape: tuple[int, int], backend: str
) -> Tensor:
    """log-prob [N] of targets, by blocks of `shape`."""
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
    """Ours made by blocks: forward only."""

    def make(op):
        def call(hidden, weight, targets):
            return logprob(hidden, weight, targets, shape, op.keywords["backend"])

        return Provider(call, ours=True, forward_only=True)

    return make
