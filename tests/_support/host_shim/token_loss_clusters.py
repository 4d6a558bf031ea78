"""token_loss by clusters of 1, 2, 4 and 8 blocks: bitwise equal to the path that reads a row twice.

Run by tests/kernels/test_cuda_on_host.py in the host shim as sm_90. HOST_SHIM_SHARED bounds the shared memory that a
block may take, and so decides how many blocks must share a row.
"""

import pytest
import torch
from shim_plugin import last_launch

from _support.logit_cases import DTYPES, generator, randint, randn
from fastrlhf import token_logprob

SIZES = (1, 2, 4, 8)
TILE_BYTES = 4096  # of csrc/cuda/row_tiles.cuh: 32 lanes, 8 vectors of 16 bytes each
EXTRA_BYTES = 16  # the vector behind a misaligned share
ROWS = 5
KERNEL = "token_loss_fwd_kernel"
CAPS = {"plain": None, "capped": 3.0}  # others do not keep a row on chip
# Rows of a few tiles, and of 20 to 25: those of 16-bit logits are twice as wide.
CASES = [
    (dtype, width, cap)
    for dtype in DTYPES
    for width, cap in [
        *((5003, cap) for cap in CAPS),
        (20011, "capped"),
        (20011 if dtype == torch.float32 else 50257, "plain"),
    ]
]


def shares(width, dtype):
    """{blocks of a cluster: bytes that each needs}, without sizes for which a smaller cluster suffices."""
    tiles = -(-width * dtype.itemsize // TILE_BYTES)
    smallest = {-(-tiles // size): size for size in reversed(SIZES)}
    return {size: each * TILE_BYTES + EXTRA_BYTES for each, size in smallest.items()}


def rows_at(offset, width, dtype):
    """[5, V] zeros that begin `offset` elements behind a 16-byte boundary; odd V moves each row on."""
    buffer = torch.zeros(offset + ROWS * width, dtype=dtype)
    assert buffer.data_ptr() % 16 == 0
    return buffer[offset:].view(ROWS, width)


def problem(width, dtype, offset):
    """Logits, and what the op takes beside them: with a masked row, one of huge z ("far"), one half -inf."""
    logits = rows_at(offset, width, dtype)
    logits.copy_(randn(ROWS, width, seed=0, dtype=dtype, scale=3))
    temperature = 0.5 + torch.rand(ROWS, generator=generator(7))
    logits[2, width - 7], temperature[2] = 6e4, 1e-4
    logits[4, : width // 2] = -torch.inf
    targets = randint(width, (ROWS,), 1)
    targets[3], targets[4] = 0, width - 1
    return logits, targets, temperature, torch.arange(ROWS) != 1


@pytest.mark.parametrize("backend", ["cuda"])
@pytest.mark.parametrize(("dtype", "width", "cap"), CASES)
@pytest.mark.parametrize("offset", [0, 1])
def test_bitwise_the_same_for_any_cluster(dtype, offset, width, cap, backend, monkeypatch):
    logits, targets, temperature, mask = problem(width, dtype, offset)
    softcap = CAPS[cap]

    def run(shared, out_offset):
        """Raw bytes of loss, logprob, grad_logprob, row_stats and the gradient; at out_offset None in place."""
        monkeypatch.setenv("HOST_SHIM_SHARED", str(shared))
        rows = rows_at(offset, width, dtype).copy_(logits)
        out = rows if out_offset is None else rows_at(out_offset, width, dtype)
        got = torch.ops.fastrlhf.token_loss_fwd_(
            *(rows, targets, randn(ROWS, seed=3), randn(ROWS, seed=2) - 9, [], 0.8, 1.2, 3.0, []),
            *(temperature, 1.0, softcap or 0.0, mask, None, 0.5, out),
        )
        return [t.contiguous().view(torch.uint8) for t in (*got, out)]

    expected = run(0, None)
    assert last_launch("token_loss") == (KERNEL, 1, 0)
    assert not torch.isnan(expected[-1].view(dtype)).any()
    logprob = token_logprob(
        logits, targets, temperature=temperature, softcap=softcap, mask=mask, backend=backend
    )
    assert torch.equal(logprob.view(torch.uint8), expected[1])
    sizes = shares(width, dtype)
    assert width == 5003 or [*sizes] == [8, 4, 2, 1]
    for blocks, shared in sizes.items():
        for out_offset in (None, offset + 1) if width > 5003 else (None, offset, offset + 1):
            got = run(shared, out_offset)
            assert last_launch("token_loss") == (KERNEL, blocks, shared)
            assert all(map(torch.equal, got, expected)), (blocks, out_offset)
