"""Where a stage runs: accelerate's device, precision and ranks, and the few collectives the stages need.

Multi-process runs are accelerate's (DDP, FSDP2 under torchrun or `accelerate launch`); a stage only asks which share of
the work is its own.
"""

import atexit
import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    fsdp2_prepare_model,
    set_seed,
)
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from fastrlhf.errors import UserError
from fastrlhf.integrations import attention
from fastrlhf.ops._backend import OPS, unavailable_reason
from fastrlhf.train import sharded
from fastrlhf.train.config import check_ranges

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class RuntimeConfig:
    """Fields every stage has: where and how to run."""

    device: Literal["auto", "cpu"] = "auto"  # auto: the GPU where there is one
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # autocast over fp32 master weights
    seed: int = 0
    backend: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"  # of the fused ops
    trust_remote_code: bool = False


class SharedScaler:
    """fp16's loss scaler, whose update waits for the next loss.

    accelerate updates it after each optimizer, but all optimizers of a step hold gradients of one scale.
    """

    def __init__(self, scaler):
        self._scaler, self._due = scaler, False

    def __getattr__(self, name):
        return getattr(self._scaler, name)

    def update(self) -> None:
        self._due = True

    def _settle(self) -> None:
        if self._due:
            self._scaler.update()
        self._due = False

    def scale(self, loss):
        self._settle()
        return self._scaler.scale(loss)

    def state_dict(self) -> dict:
        self._settle()
        return self._scaler.state_dict()


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
        if cfg.precision == "fp16" and (cfg.device == "cpu" or not torch.cuda.is_available()):
            raise UserError("precision: fp16 needs a GPU, and this run has none; use bf16 or fp32")
        self.compute_dtype = PRECISIONS[cfg.precision]
        plugin = _fsdp_plugin(self.compute_dtype)
        self.accelerator = Accelerator(
            mixed_precision=mixed, cpu=cfg.device == "cpu", fsdp_plugin=plugin
        )
        if self.world > 1:
            atexit.register(_close_groups)
        if plugin is not None and self.world > 1 and self.device.type == "cpu":
            # accelerate 1.15 turns FSDP on for accelerators only and would run DDP on CPU without a word.
            # It reads the type from both of its states.
            self.accelerator.state.fsdp_plugin = plugin
            for state in (self.accelerator.state, PartialState()):
                state.distributed_type = DistributedType.FSDP
        if self.accelerator.scaler is not None:
            self.accelerator.scaler = SharedScaler(self.accelerator.scaler)
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
    def fsdp(self) -> bool:
        """Whether models are sharded over the ranks (FSDP2)."""
        return self.accelerator.is_fsdp2

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def describe(self) -> str:
        """One line for the start of a stage: device, ranks, precision, threads, attention path."""
        kernel = attention.plan(self.device, self.compute_dtype).kernel
        return (
            f"device {self.device.type} x{self.world}{' (FSDP2)' * self.fsdp}, {self.compute_dtype}".replace(
                "torch.", ""
            )
            + f", {torch.get_num_threads()} threads, attention: {kernel}"
        )

    def prepare(self, module, optimizer):
        """Hand a trainable module and its optimizers to accelerate."""
        self._name_layers(module)
        prepared = self.accelerator.prepare(module, *optimizer.parts)
        optimizer.parts = list(prepared[1:])
        return prepared[0]

    def share_frozen(self, module):
        """A module that is not trained: sharded as the trained ones are under FSDP2, elsewhere whole on each rank."""
        if self.fsdp:
            self._name_layers(module)
            module = fsdp2_prepare_model(self.accelerator, module)
            module.set_reshard_after_forward(True)  # the root's too: no backward will free it
        return module

    def _name_layers(self, module) -> None:
        # accelerate remembers the layer classes of the first model, but the models of PPO may differ in theirs.
        if self.fsdp and "FSDP_TRANSFORMER_CLS_TO_WRAP" not in os.environ:
            names = next(m for m in module.modules() if isinstance(m, PreTrainedModel))
            present = {type(m).__name__ for m in module.modules()}
            self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(
                present & set(names._no_split_modules or ())
            )

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

    @property
    def scaler(self) -> SharedScaler | None:
        """fp16's loss scaler, which skips the step of gradients that are not finite; None elsewhere."""
        return self.accelerator.scaler

    @property
    def loss_scale(self) -> float:
        """What the gradients are multiplied by until the optimizer steps."""
        return 1.0 if self.scaler is None else self.scaler.get_scale()

    def clip(self, module, limit: float | None) -> float:
        """Global gradient norm, clipped to `limit` where given; any number of times a step."""
        limit = float("inf") if limit is None else limit
        if self.scaler is None and not self.fsdp:
            return float(self.accelerator.clip_grad_norm_(module.parameters(), limit))
        # accelerate compares the parameters with those of each model by ==, which fails with two models of one size,
        # and takes fp16's scale out of the gradients, of all optimizers at once and only once a step.
        scale = self.loss_scale
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), limit * scale)
        return float(sharded.full(norm)) / scale


def _close_groups() -> None:
    """Ends the threads of the process groups while Python still runs.

    One that drops a tensor, or calls back, when the interpreter has begun to close is ended by force, and inside C++
    that is `terminate called without an active exception`, after a run that had gone well. Runs' ends are barriers
    (`Run.finish`), so that nobody waits for this rank. Not at the end of a run: a process may have several.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def _fsdp_plugin(compute: torch.dtype) -> FullyShardedDataParallelPlugin | None:
    """What accelerate's environment (ACCELERATE_USE_FSDP=true, FSDP_*) asks for, with FSDP2's defaults set straight."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() not in ("true", "1"):
        return None
    if os.environ.get("FSDP_VERSION", "2") != "2":
        raise UserError(f"FSDP_VERSION: expected 2, got {os.environ['FSDP_VERSION']!r}")
    os.environ["ACCELERATE_USE_FSDP"] = "true"  # the only spelling that all of accelerate reads
    os.environ.setdefault("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    low = compute != torch.float32
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        # accelerate's own would sum gradients and hand back log-probs in 16 bit.
        mixed_precision_policy=MixedPrecisionPolicy(
            param_dtype=compute if low else None, reduce_dtype=torch.float32 if low else None
        ),
        # Every rank reads the folder: frozen models would stay empty on the others.
        cpu_ram_efficient_loading=False,
    )


def _check_backend(backend: str, device: str) -> None:
    # Before anything is written: the first op that cannot run would stop the run half-way.
    if backend in ("auto", "reference"):
        return
    for op in OPS:
        reason = unavailable_reason(op, backend, device)
        if reason:
            raise UserError(f"backend {backend!r} cannot run {op}: {reason}; use auto or reference")
