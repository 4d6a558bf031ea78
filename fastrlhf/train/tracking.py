"""A stage's output folder: who may write there, its log, TensorBoard, progress on the terminal, and the final model."""

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from safetensors import SafetensorError

from fastrlhf.errors import UserError
from fastrlhf.train import checkpoint, sharded
from fastrlhf.train.config import plain, read_section, save_resolved
from fastrlhf.train.folder import OutputFolder
from fastrlhf.train.runtime import Runtime

RESOLVED = "resolved_config.yaml"
LOG = "log.jsonl"
SUMMARY = "summary.json"


@dataclass
class OutputConfig:
    """Fields every stage has: where results go and how much is said."""

    out: str = ""
    overwrite: bool = False  # replace another run in `out`
    resume: bool = False  # continue from the newest checkpoint in `out`, with the same settings
    save_every: int = 0  # steps between checkpoints; 0: none
    log_every: int = 10  # steps between lines on the terminal; 0: none
    tensorboard: bool = True


class Run:
    """Use as a context manager. Only the main process writes; `state` is the checkpoint to continue from, or None."""

    def __init__(
        self,
        cfg,
        stage: str,
        runtime: Runtime,
        headline: tuple[str, ...] = (),
        extendable: tuple[str, ...] = (),
    ):
        if cfg.overwrite and cfg.resume:
            raise UserError("overwrite and resume exclude each other; give one")
        self.cfg, self.stage, self.runtime = cfg, stage, runtime
        self.headline = headline  # metrics of the terminal's line; empty: all
        self.extendable = extendable  # settings that a resumed run may change
        self.folder = OutputFolder(
            cfg.out, RESOLVED, overwrite=cfg.overwrite, resume=cfg.resume, inputs=asdict(cfg)
        )
        self.out = self.folder.path
        self.checkpoints = self.out / "checkpoints"
        self.state: dict | None = None
        self.last: dict[str, float] = {}  # metrics of the newest step, of a resumed run too
        self.started = time.perf_counter()
        self.spent = 0.0  # seconds of the run that is being continued
        self.console = Console()
        if cfg.resume:
            self.state = checkpoint.load_latest(self.checkpoints)
            if self.state is None:
                raise UserError(
                    f"resume: no whole checkpoint in {str(self.checkpoints)!r} (was save_every set?)"
                )
            if self.state.get("stage") != self.stage:
                raise UserError(
                    f"resume: the checkpoint in {cfg.out!r} is one of {self.state.get('stage')!r}, "
                    f"not of {self.stage!r}"
                )
            self.last = self.state["metrics"]
            self._same_settings()

    def _same_settings(self) -> None:
        # A resumed run is the unbroken run: other settings would make it neither of the two.
        path = self.out / RESOLVED
        if not path.is_file():
            return
        before, _, _ = read_section(str(path), self.stage)
        free = {f.name for f in fields(OutputConfig)} | set(self.extendable)
        for name, now in plain(asdict(self.cfg)).items():
            if name not in free and name in before and before[name] != now:
                raise UserError(
                    f"resume: {name} is {now!r}, but the run in {self.cfg.out!r} was started with "
                    f"{before[name]!r}; give the same, or another out"
                )

    def begin(self, total: int) -> int:
        """Create the folder (the stage's inputs have been checked by now) and return the step to start from."""
        first = int(self.state["step"]) if self.state else 0
        self.total = total
        self.runtime.accelerator.wait_for_everyone()
        self.writer = None
        if self.runtime.is_main:
            self.folder.take()
            save_resolved(self.cfg, self.out / RESOLVED)
            self._trim_log(first)
            self.log_file = open(self.out / LOG, "a")
            if self.cfg.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(self.out / "tb"), purge_step=first)
            start = f"from step {first} of {total}" if self.state else f"{total} steps"
            self.console.print(
                f"[bold]{self.stage}[/]: {start}, {self.runtime.describe()}",
                highlight=False,
                soft_wrap=True,
            )
        if self.state:
            self.spent = float(self.state["seconds"])
            checkpoint.set_rng_state(self.state["rng"][self.runtime.rank])
            if self.runtime.scaler is not None:
                self.runtime.scaler.load_state_dict(self.state["scaler"])
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.runtime.is_main,
            transient=True,
        )
        self.task = self.progress.add_task(self.stage, total=total, completed=first)
        self.progress.start()
        return first

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if hasattr(self, "progress"):
            self.progress.stop()
        if hasattr(self, "log_file"):
            self.log_file.close()
        if getattr(self, "writer", None):
            self.writer.close()
        self.folder.release()

    def _trim_log(self, first: int) -> None:
        # A killed run may have logged steps after its last checkpoint: they will be run, and logged, again.
        path = self.out / LOG
        if path.exists():
            rows = [line for line in path.read_text().splitlines() if _step_of(line) <= first]
            checkpoint.replace_file(path, "".join(row + "\n" for row in rows))

    @property
    def seconds(self) -> float:
        return self.spent + time.perf_counter() - self.started

    def check(self, step: int, metrics: dict[str, float]) -> None:
        """Stop the run on a number that is not finite; called before the optimizer, so the weights stay good."""
        for name, value in metrics.items():
            # A gradient too large for fp16 is no news: the scaler skips its step and comes down.
            if self.runtime.scaler is not None and name.startswith("grad_norm"):
                continue
            if not math.isfinite(value):
                newest = checkpoint.steps(self.checkpoints)
                kept = (
                    f"the last good checkpoint is step {newest[-1]}"
                    if newest
                    else "no checkpoint had been written"
                )
                raise UserError(f"{self.stage} step {step}: {name} is {value}; stopped, {kept}")

    def _check_weights(self, step: int, state) -> None:
        # A step can break the weights without a sign in its own loss; they must not replace good ones.
        for name, value in state.items():
            if isinstance(value, dict):
                self._check_weights(step, value)
            elif isinstance(value, torch.Tensor) and value.is_floating_point():
                if not torch.isfinite(value).all():
                    self.check(step, {f"weight {name}": math.nan})

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record step `step` (from 1) in log.jsonl, TensorBoard and, at the configured cadence, on the terminal."""
        self.last = {k: float(v) for k, v in metrics.items()}
        if not self.runtime.is_main:
            return
        row = {
            "step": step,
            "time": round(self.seconds, 3),
            **self.last,
        }
        self.log_file.write(json.dumps(row) + "\n")
        self.log_file.flush()
        if self.writer:
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, step)
        self.progress.update(self.task, completed=step)
        if self.speaks(step):
            shown = self.headline or tuple(metrics)
            numbers = "  ".join(f"{n} {metrics[n]:.4g}" for n in shown if n in metrics)
            self.progress.console.print(
                f"{self.stage} {step:>5}/{self.total}  {numbers}", highlight=False, soft_wrap=True
            )

    def speaks(self, step: int) -> bool:
        """Whether step `step` gets a line on the terminal."""
        every = self.cfg.log_every
        return self.runtime.is_main and every > 0 and (step % every == 0 or step == self.total)

    def samples(self, step: int, columns: tuple[str, ...], rows: list[tuple]) -> None:
        """A small table of prompts and responses under the step's line, and in TensorBoard."""
        table = Table(*columns, title=f"{self.stage} {step}", title_justify="left", box=None)
        for row in rows:
            table.add_row(*(f"{x:.3g}" if isinstance(x, float) else escape(str(x)) for x in row))
        self.progress.console.print(table)
        if self.writer:
            text = "\n\n".join(" | ".join(str(x) for x in row) for row in rows)
            self.writer.add_text("samples", text, step)

    def checkpoint(self, step: int, state) -> None:
        """Save `state()` at the configured cadence. Every rank's random state goes in."""
        if not self.cfg.save_every or step % self.cfg.save_every:
            return
        rngs = [checkpoint.rng_state()]
        if self.runtime.world > 1:
            from torch.distributed import all_gather_object

            rngs = [None] * self.runtime.world
            all_gather_object(rngs, checkpoint.rng_state())
        held = sharded.whole(state(), self.runtime.is_main)
        if self.runtime.is_main:
            whole = {"stage": self.stage, "step": step, "seconds": self.seconds, "rng": rngs}
            whole |= {"metrics": self.last, **held}
            if self.runtime.scaler is not None:
                whole["scaler"] = self.runtime.scaler.state_dict()
            self._check_weights(step, whole)
            checkpoint.save(self.checkpoints, step, whole)
        self.runtime.accelerator.wait_for_everyone()

    def save_model(self, model, tokenizer, folder: Path) -> None:
        """Write a model in Hugging Face's layout into `folder`, file by file in whole. Every rank must call it."""
        state = sharded.whole(model.state_dict(), self.runtime.is_main)
        if not self.runtime.is_main:
            return
        self._check_weights(self.total, state)
        scratch = self.out / ".model"
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            model.save_pretrained(scratch, state_dict=state)
        except SafetensorError as error:  # a full disk comes as this
            raise OSError(f"{scratch}: {error}") from error
        tokenizer.save_pretrained(scratch)
        folder.mkdir(exist_ok=True)
        # safetensors writes files that only their owner can read.
        mode = (self.out / RESOLVED).stat().st_mode
        for file in scratch.iterdir():
            file.chmod(mode)
            file.replace(folder / file.name)
        scratch.rmdir()

    def finish(self, model, tokenizer, summary: dict) -> dict:
        """Write the model folder (Hugging Face layout) and, last, summary.json: the stage is done."""
        summary = {"stage": self.stage, "seconds": self.seconds, **summary}
        self.save_model(model, tokenizer, self.out)
        if self.runtime.is_main:
            checkpoint.replace_file(self.out / SUMMARY, json.dumps(summary, indent=2) + "\n")
            if self.cfg.log_every:
                self.progress.console.print(
                    f"{self.stage}: wrote {self.out} after {self.seconds:.0f} s",
                    highlight=False,
                    markup=False,
                    soft_wrap=True,
                )
        self.runtime.accelerator.wait_for_everyone()
        return summary


def _step_of(line: str) -> float:
    # A line that a full disk or a kill cut short counts as one of the future.
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
