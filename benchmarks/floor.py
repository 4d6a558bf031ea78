"""The floor of a problem: its bytes and FLOPs at the best rates that this machine has shown in this run."""

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from harness import Yardstick, times

LOGITS = (8192, 4096, 128256)  # N, H, V of the head whose logits GEMM is a ceiling on a GPU


def measure_floor(device: str, quick: bool = False, seconds: float = 1.0) -> dict[str, float]:
    """This machine's own limits: bytes/s of a large copy and a large read, FLOP/s of large matrix products."""
    size, n, head = (2**26, 2048, None) if device == "cpu" else (2**29, 8192, LOGITS)
    if quick:
        size, n, seconds = 2**20, 256, min(seconds, 0.05)
        head = head and (64, 64, 256)

    def rate(amount: int, function: Callable, *args, **more) -> float:
        call = functools.partial(function, *args, **more)
        return amount / statistics.median(times({"it": call}, device, seconds)["it"])

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    bytes_of_one = 4 * size
    rates = {
        "copy_bytes_per_s": rate(2 * bytes_of_one, draw(size).copy_, draw(size)),
        "read_bytes_per_s": rate(bytes_of_one, draw(size).sum),
    }
    for dtype in (torch.float32, torch.bfloat16):
        if device == "cpu" and dtype != torch.float32:
            continue
        a = draw(n, n, dtype=dtype)
        rates[f"gemm_{str(dtype)[6:]}_flop_per_s"] = rate(2 * n**3, torch.mm, a, a)
    if head is not None:
        rows, hidden, vocab = head
        x, w = (draw(k, hidden, dtype=torch.bfloat16) for k in (rows, vocab))
        flops = 2 * rows * hidden * vocab
        rates["logits_gemm_bfloat16_flop_per_s"] = rate(flops, torch.mm, x, w.t())
        rates["logits_gemm_float32_out_flop_per_s"] = rate(
            flops, torch.mm, x, w.t(), out_dtype=torch.float32
        )
    return rates


@dataclass
class Ceilings:
    """The rates that a floor is computed from: the best that this machine has shown."""

    bytes_per_s: float
    flop_per_s: float

    @classmethod
    def of(cls, floor: dict[str, float], dtype: str) -> "Ceilings":
        """Of what `measure_floor` found. A product in fp16 runs as fast as one in bf16."""
        dtype = "bfloat16" if dtype == "float16" else dtype
        gemm = floor.get(f"gemm_{dtype}_flop_per_s", floor["gemm_float32_flop_per_s"])
        return cls(max(floor["copy_bytes_per_s"], floor.get("read_bytes_per_s", 0.0)), gemm)

    def raise_to(self, yardstick: Yardstick, seconds: float) -> None:
        """A yardstick that did its work faster than the large copy or product is the better ceiling."""
        self.bytes_per_s = max(self.bytes_per_s, yardstick.bytes / seconds)
        self.flop_per_s = max(self.flop_per_s, yardstick.flops / seconds)

    def floor_ms(self, moved: int, flops: int) -> float:
        return 1e3 * max(moved / self.bytes_per_s, flops / self.flop_per_s)
