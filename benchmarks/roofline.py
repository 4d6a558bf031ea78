"""The roofline of a problem: minimum bytes and FLOPs at the highest rates measured in this run."""

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from harness import Yardstick, times

LOGITS = (8192, 4096, 128256)  # N, H, V of the logits GEMM that is also timed on a GPU


def measure_roofline(device: str, quick: bool = False, seconds: float = 1.0) -> dict[str, float]:
    """Ceilings of this machine: bytes/s of a large copy and a large read, FLOP/s of large matrix products."""
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
    """The rates of a roofline: the highest that this machine reached."""

    bytes_per_s: float
    flop_per_s: float

    @classmethod
    def of(cls, roofline: dict[str, float], dtype: str) -> "Ceilings":
        """From the result of `measure_roofline`. fp16 uses the GEMM rate of bf16."""
        dtype = "bfloat16" if dtype == "float16" else dtype
        gemm = roofline.get(f"gemm_{dtype}_flop_per_s", roofline["gemm_float32_flop_per_s"])
        return cls(max(roofline["copy_bytes_per_s"], roofline.get("read_bytes_per_s", 0.0)), gemm)

    def raise_to(self, yardstick: Yardstick, seconds: float) -> None:
        """Raise the ceilings to the rates of a yardstick where these are higher."""
        self.bytes_per_s = max(self.bytes_per_s, yardstick.bytes / seconds)
        self.flop_per_s = max(self.flop_per_s, yardstick.flops / seconds)

    def roofline_ms(self, moved: int, flops: int) -> float:
        """max(bytes / bandwidth, FLOPs / rate), in milliseconds."""
        return 1e3 * max(moved / self.bytes_per_s, flops / self.flop_per_s)
