"""Where a stage runs: accelerate's device, precision and ranks, and the few collectives the stages need.

Multi-process runs are accelerate's (DDP, FSDP2 under torchrun or `accelerate launch`); a stage only asks which share of
the work is its own.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers.utils import logging as transformers_logging

from fastrlhf import attention
from fastrlhf.config import check_ranges
from fastrlhf.errors import UserError
from fastrlhf.ops._backend import OPS, unavailable_reason

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class RuntimeConfig:
    """Fields every stage has: where and how to run."""

    device: Literal["auto", "cpu"] = "auto"  # auto: the GPU where there is one
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # autocast over fp32 master weights
    seed: int = 0
    backend: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"  # of the fused ops
    trust_remote_code: bool = False


class Runtime:
    """One process' view of the run."""

    def __init__(self, cfg: RuntimeConfig):
        check_ranges(cfg)
        if cfg.precision not in PRECISIONS:
            raise UserError(
                f"precision: expected one of {', '.join(PRECISIONS)}, got {cfg.precision!r}"
            )
        if cfg.device not in ("auto", "cpu"):
            raise UserError(
                f"device: expected auto or cpu, got {cfg.device!r} (choose a GPU by CUDA_VISIBLE_DEVICES)"
            )
        mixed = "no" if cfg.precision == "fp32" else cfg.precision
        self.accelerator = Accelerator(mixed_precision=mixed, cpu=cfg.device == "cpu")
        self.compute_dtype = PRECISIONS[cfg.precision]
        self.trust_remote_code = cfg.trust_remote_code
        _check_backend(cfg.backend, self.accelerator.device.type)
        set_seed(cfg.seed + self.rank)
        # The stages report on their own; missing weights of a fresh reward head are no news.
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def describe(self) -> str:
        """One line for the start of a stage: device, ranks, precision, threads, attention path."""
        kernel = attention.plan(self.device, self.compute_dtype).kernel
        return (
            f"device {self.device.type} x{self.world}, {self.compute_dtype}".replace("torch.", "")
            + f", {torch.get_num_threads()} threads, attention: {kernel}"
        )

    def prepare(self, module, optimizer):
        """Hand a trainable module and its optimizers to accelerate."""
        prepared = self.accelerator.prepare(module, *optimizer.parts)
        optimizer.parts = list(prepared[1:])
        return prepared[0]

    def unwrap(self, module):
        return self.accelerator.unwrap_model(module)

    def sum(self, *numbers: float) -> list[float]:
        """Each number summed over all ranks."""
        if self.world == 1:
            return list(numbers)
        packed = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        return self.accelerator.reduce(packed, reduction="sum").tolist()

    def max(self, number: int) -> int:
        """The largest value any rank has."""
        if self.world == 1:
            return number
        return int(self.accelerator.gather(torch.tensor([number], device=self.device)).max())

    def backward(self, modules, loss, last: bool) -> None:
        """Backward of one micro-batch through `modules`; ranks exchange gradients only at the last one of a step."""
        with ExitStack() as stack:
            if not last and self.world > 1:
                for module in modules:
                    stack.enter_context(self.accelerator.no_sync(module))
            self.accelerator.backward(loss)

    def clip(self, module, limit: float | None) -> float:
        """Global gradient norm, clipped to `limit` where given."""
        norm = self.accelerator.clip_grad_norm_(
            module.parameters(), float("inf") if limit is None else limit
        )
        return float(norm)


def _check_backend(backend: str, device: str) -> None:
    # Before anything is written: the first op that cannot run would stop the run half-way.
    if backend in ("auto", "reference"):
        return
    for op in OPS:
        reason = unavailable_reason(op, backend, device)
        if reason:
            raise UserError(f"backend {backend!r} cannot run {op}: {reason}; use auto or reference")
