"""Device, precision and ranks of a stage, and the collectives that the stages need.

accelerate sets up multi-process runs: DDP or FSDP2, under torchrun or `accelerate launch`. A stage only selects its
rank's share of the data.
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

from fastrlhf.errors import UserError, counted
from fastrlhf.integrations import attention
from fastrlhf.ops._backend import OPS, unavailable_reason
from fastrlhf.train import self_check, sharded
from fastrlhf.train.config import check_ranges

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class RuntimeConfig:
    """Settings of every stage: where and how to run."""

    device: Literal["auto", "cpu"] = "auto"  # auto: the GPU if there is one
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of autocast; trained weights are fp32
    seed: int = 0  # random seed
    backend: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"  # backend of the ops
    trust_remote_code: bool = False  # run Python code from a model folder
    self_check: bool = True  # measure each model against transformers before it is used


class SharedScaler:
    """fp16's loss scaler, with `update` deferred to the next loss.

    accelerate updates the scaler after each optimizer, but the gradients of all optimizers of one step share one scale.
    """

    def __init__(self, scaler):
        self._scaler, self._update_pending = scaler, False

    def __getattr__(self, name):
        return getattr(self._scaler, name)

    def update(self) -> None:
        self._update_pending = True

    def _apply_update(self) -> None:
        if self._update_pending:
            self._scaler.update()
        self._update_pending = False

    def scale(self, loss):
        self._apply_update()
        return self._scaler.scale(loss)

    def state_dict(self) -> dict:
        self._apply_update()
        return self._scaler.state_dict()


class Runtime:
    """Accelerator, device and rank of this process.

    Raises:
        UserError: device, precision, backend or the FSDP settings cannot be used here.
    """

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
        _check_environment(mixed)
        # accelerate starts a process group of CPUs only if it is told to use them.
        cpu = cfg.device == "cpu" or _is_on("ACCELERATE_USE_CPU")
        cpu = cpu or not torch.accelerator.is_available()
        if cfg.precision == "fp16" and (cpu or not torch.cuda.is_available()):
            raise UserError("precision: fp16 needs a GPU, and this run has none; use bf16 or fp32")
        self.compute_dtype = PRECISIONS[cfg.precision]
        plugin = _fsdp_plugin(self.compute_dtype)
        self.accelerator = Accelerator(mixed_precision=mixed, cpu=cpu, fsdp_plugin=plugin)
        started = os.environ.get("WORLD_SIZE", "1")
        if started.isdecimal() and int(started) > self.world:
            raise UserError(
                f"WORLD_SIZE: expected {self.world}, the processes that accelerate found, got {started}; "
                "start with torchrun or accelerate launch"
            )
        if self.world > 1:
            atexit.register(_close_groups)
        if plugin is not None and self.world > 1 and self.device.type == "cpu":
            # accelerate 1.15 enables FSDP on accelerators only and silently falls back to DDP on CPU. It reads the
            # type from both of its states.
            self.accelerator.state.fsdp_plugin = plugin
            for state in (self.accelerator.state, PartialState()):
                state.distributed_type = DistributedType.FSDP
        if self.accelerator.scaler is not None:
            self.accelerator.scaler = SharedScaler(self.accelerator.scaler)
        self.trust_remote_code = cfg.trust_remote_code
        self.checks: dict[str, str] | None = {} if cfg.self_check else None  # class -> verdict
        _check_backend(cfg.backend, self.accelerator.device.type)
        set_seed(cfg.seed + self.rank)
        # Silences warnings such as the missing weights of a fresh reward head.
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

    def require_one_process(self, command: str) -> None:
        """Raise UserError in a run of several processes, for a command that would do everything on each of them."""
        if self.world > 1:
            raise UserError(f"{command}: expected one process, got {self.world}")

    def describe(self) -> str:
        """Device, ranks, precision, threads and attention kernel, in one line."""
        kernel = attention.kernel_name(self.device, self.compute_dtype)
        dtype = str(self.compute_dtype).removeprefix("torch.")
        return (
            f"device {self.device.type} x{self.world}{' (FSDP2)' * self.fsdp}, {dtype}, "
            f"{counted(torch.get_num_threads(), 'thread')}, attention: {kernel}, {self.describe_checks()}"
        )

    def describe_checks(self) -> str:
        """The verdicts of the self-check, by class."""
        if self.checks is None:
            return "self-check off"
        return "self-check: " + "; ".join(f"{name} {text}" for name, text in self.checks.items())

    def check(self, module, path: str):
        """Return `module`, a policy or reward model with the weights of `path`, if it passes the self-check.

        Every rank must call it, before `prepare`.

        Raises:
            UserError: it computes something else than transformers does, on this or another rank.
        """
        if self.checks is None:
            return module
        verdict = self_check.examine(module, self.compute_dtype)
        name = type(self_check.transformer(module)).__name__
        if self.max(int(verdict.failure is not None)):
            reason = verdict.failure or "another rank has the reason"
            if not verdict.differs:
                raise UserError(f"{path!r} ({name}): {reason}")
            raise UserError(
                f"{path!r} ({name}) fails the self-check: {reason} (--self_check off skips the check)"
            )
        self.checks[name] = f"passed, but {verdict.unchecked}" if verdict.unchecked else "passed"
        return module

    def prepare(self, module, optimizer):
        """Wrap a trainable module and its `Optimizers` with accelerate; return the wrapped module."""
        self._set_fsdp_layers(module)
        prepared = self.accelerator.prepare(module, *optimizer.parts)
        optimizer.parts = list(prepared[1:])
        return prepared[0]

    def prepare_frozen(self, module):
        """Shard a module that is not trained, under FSDP2; elsewhere return it unchanged."""
        if self.fsdp:
            self._set_fsdp_layers(module)
            module = fsdp2_prepare_model(self.accelerator, module)
            module.set_reshard_after_forward(True)  # the root too: no backward frees its weights
        return module

    def _set_fsdp_layers(self, module) -> None:
        # accelerate keeps the layer classes of the first model, but the models of PPO may differ in architecture.
        if self.fsdp and "FSDP_TRANSFORMER_CLS_TO_WRAP" not in os.environ:
            model = next(m for m in module.modules() if isinstance(m, PreTrainedModel))
            present = {type(m).__name__ for m in module.modules()}
            self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(
                present & set(model._no_split_modules or ())
            )

    def unwrap(self, module):
        """The module that `prepare` wrapped."""
        return self.accelerator.unwrap_model(module)

    def sum(self, *numbers: float) -> list[float]:
        """Each number summed over all ranks."""
        if self.world == 1:
            return list(numbers)
        packed = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        return self.accelerator.reduce(packed, reduction="sum").tolist()

    def max(self, number: float) -> float:
        """The largest value over all ranks."""
        if self.world == 1:
            return number
        packed = torch.tensor([number], dtype=torch.float64, device=self.device)
        return self.accelerator.gather(packed).max().item()

    def backward(self, modules, loss, last: bool) -> None:
        """Backward of one micro-batch through `modules`; gradients are reduced over ranks only if it is the `last`."""
        with ExitStack() as stack:
            if not last and self.world > 1:
                for module in modules:
                    stack.enter_context(self.accelerator.no_sync(module))
            self.accelerator.backward(loss)

    @property
    def scaler(self) -> SharedScaler | None:
        """fp16's loss scaler, which skips a step whose gradients are not finite; None in other precisions."""
        return self.accelerator.scaler

    @property
    def loss_scale(self) -> float:
        """Factor of the gradients until the optimizer step."""
        return 1.0 if self.scaler is None else self.scaler.get_scale()

    def clip(self, module, limit: float | None) -> float:
        """Clip the global gradient norm to `limit` (None: no limit); return the norm before.

        Can be called several times before one optimizer step.
        """
        limit = float("inf") if limit is None else limit
        if self.scaler is None and not self.fsdp:
            return float(self.accelerator.clip_grad_norm_(module.parameters(), limit))
        # Not accelerate's method: it compares parameters with == to find their model, which fails for two models of
        # equal size, and it unscales fp16 gradients once per step, for all optimizers together.
        scale = self.loss_scale
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), limit * scale)
        return float(sharded.full_tensor(norm)) / scale


def _close_groups() -> None:
    """Destroy the process groups, and with them their threads, before the interpreter shuts down.

    A thread that frees a tensor or calls back during shutdown is killed inside C++ ("terminate called without an
    active exception"), although the run had succeeded. `Run.finish` ends in a barrier, so no other rank waits for
    this one. This happens at exit and not at the end of a run, because a process may run several stages.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


# accelerate's environment variables that the trainer honours or that have no effect on it, and the one value that
# it accepts of others. It refuses the rest: accelerate would apply them to a training loop that it does not see.
_HONOURED = ("USE_CPU", "USE_FSDP", "CPU_AFFINITY", "DEBUG_MODE", "LOG_LEVEL", "ENABLE_RICH")
_HONOURED += ("NUM_PROCESSES", "BYPASS_DEVICE_MAP", "INIT_INCLUDE_BUFFERS")
_HONOURED += tuple(f"DYNAMO_{n}" for n in ("MODE", "USE_FULLGRAPH", "USE_DYNAMIC"))
_HONOURED += ("DYNAMO_USE_REGIONAL_COMPILATION",)
_ONLY = {
    "USE_DEEPSPEED": "false",
    "USE_MEGATRON_LM": "false",
    "USE_PARALLELISM_CONFIG": "false",
    "USE_SAGEMAKER": "false",
    "GRADIENT_ACCUMULATION_STEPS": "1",
    "DYNAMO_BACKEND": "no",
}
_INSTEAD = {
    "USE_DEEPSPEED": "DDP and FSDP2 (ACCELERATE_USE_FSDP) are supported",
    "GRADIENT_ACCUMULATION_STEPS": "batch and max_tokens set the micro-batches",
    "MIXED_PRECISION": "set precision",
    "TORCH_DEVICE": "set device, or CUDA_VISIBLE_DEVICES",
    "GRADIENT_CLIPPING": "set max_grad_norm",
}


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on", "y", "t")


def _check_environment(mixed: str) -> None:
    """Raise UserError for a setting of accelerate's environment that the trainer would silently disobey."""
    for variable, value in os.environ.items():
        prefix, name = variable[:11], variable[11:]
        if prefix != "ACCELERATE_" or name in _HONOURED:
            continue
        if name == "MIXED_PRECISION":  # `accelerate launch` always sets it, by default to "no"
            accepted = value.lower() in ("no", mixed)
        else:
            accepted = value.lower() == _ONLY.get(name) or name in _ONLY and value == "0"
        if not accepted:
            only = {**_ONLY, "MIXED_PRECISION": mixed}.get(name, "no such setting")
            instead = f"; {_INSTEAD[name]}" if name in _INSTEAD else ""
            raise UserError(f"{variable}: expected {only}, got {value!r}{instead}")


def _fsdp_plugin(compute: torch.dtype) -> FullyShardedDataParallelPlugin | None:
    """FSDP2 as accelerate's environment variables (ACCELERATE_USE_FSDP, FSDP_*) ask for, or None."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() not in ("true", "1"):
        return None
    if os.environ.get("FSDP_VERSION", "2") != "2":
        raise UserError(f"FSDP_VERSION: expected 2, got {os.environ['FSDP_VERSION']!r}")
    os.environ["ACCELERATE_USE_FSDP"] = "true"  # the one spelling that all of accelerate accepts
    os.environ.setdefault("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    low = compute != torch.float32
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        # accelerate's default would reduce gradients, and cast outputs such as log-probs, in 16 bits.
        mixed_precision_policy=MixedPrecisionPolicy(
            param_dtype=compute if low else None, reduce_dtype=torch.float32 if low else None
        ),
        # Every rank loads the weights itself; otherwise frozen models would stay empty on all ranks but one.
        cpu_ram_efficient_loading=False,
    )


def _check_backend(backend: str, device: str) -> None:
    # Fail before anything is written, not at the first op that cannot run.
    if backend in ("auto", "reference"):
        return
    for op in OPS:
        reason = unavailable_reason(op, backend, device)
        if reason:
            raise UserError(f"backend {backend!r} cannot run {op}: {reason}; use auto or reference")
