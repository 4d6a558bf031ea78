"""A run of one stage: where it writes, how it resumes, and what it checks before it writes."""

import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError

from fastrlhf.errors import UserError
from fastrlhf.train import checkpoint, sharded
from fastrlhf.train.config import paths, plain, read_section, save_resolved
from fastrlhf.train.files import fingerprints, interrupts_deferred, replace_text
from fastrlhf.train.folder import OutputFolder
from fastrlhf.train.metrics_log import MetricsLog
from fastrlhf.train.runtime import Runtime
from fastrlhf.train.terminal import Terminal

RESOLVED = "resolved_config.yaml"
SUMMARY = "summary.json"


@dataclass
class OutputConfig:
    """Settings of every stage: where results go and how often they are reported."""

    out: str = ""  # output folder
    overwrite: bool = False  # replace an earlier run in `out`
    resume: bool = False  # continue from the newest checkpoint in `out`, with the same settings
    save_every: int = 0  # steps between checkpoints; 0: no checkpoints
    log_every: int = 10  # steps between two lines of metrics on the terminal; 0: none
    tensorboard: bool = True  # write TensorBoard files to `out`/tb


class Run:
    """The output folder, checkpoints and logs of one stage; a context manager.

        with Run(cfg, "sft", runtime) as run:
            ...                                      # load and check the inputs; nothing is written yet
            for step in run.steps(total, {"model": model, "optimizer": optimizer, "order": order}):
                ...                                  # forward and backward
                run.check(step, metrics)             # before the optimizer step
                run.log(step, metrics)
            run.finish(model, tokenizer, summary)

    Only the main process writes.

    Args:
        cfg: the stage's settings (an OutputConfig).
        stage: the stage's name.
        headline: metrics of a line on the terminal; empty prints all.
        extendable: settings that a resumed run may change.

    Raises:
        UserError: `out` is unusable, or there is nothing to resume, or the settings have changed.
    """

    def __init__(
        self,
        cfg,
        stage: str,
        runtime: Runtime,
        headline: tuple[str, ...] = (),
        extendable: tuple[str, ...] = (),
    ):
        if cfg.overwrite and cfg.resume:
            raise UserError("expected --overwrite or --resume, got both")
        self.cfg, self.stage, self.runtime = cfg, stage, runtime
        self.folder = OutputFolder(
            cfg.out, RESOLVED, overwrite=cfg.overwrite, resume=cfg.resume, inputs=paths(cfg)
        )
        self.out = self.folder.path
        self.terminal = Terminal(stage, cfg.log_every, headline, runtime.is_main)
        self.metrics: dict[str, float] = {}  # of the newest step
        self._checkpoints = self.out / "checkpoints"
        self._metrics_log: MetricsLog | None = None
        self._started = time.perf_counter()
        self._seconds_before = 0.0  # of the interrupted run that this one continues
        self._resumed: dict | None = None
        self._inputs: dict = {}  # before the stage reads them
        if cfg.resume or (cfg.save_every and runtime.is_main):
            given = {name: found for name, found in paths(cfg).items() if name != "config"}
            self._inputs = fingerprints(given)
        if cfg.resume:
            self._resumed = self._load_checkpoint()
            self.metrics = self._resumed["metrics"]
            self._check_same_settings(extendable)
            self._check_same_inputs(self._resumed["inputs"])

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.terminal.stop()
        if self._metrics_log is not None:
            self._metrics_log.close()
        self.folder.release()

    @property
    def seconds(self) -> float:
        """Seconds since the start, including those before an interruption."""
        return self._seconds_before + time.perf_counter() - self._started

    def steps(self, total: int, parts: Mapping[str, checkpoint.Part]) -> Iterator[int]:
        """Yield the step numbers that are left, up to `total`; save a checkpoint after every `save_every`-th.

        The first `next` restores `parts` if the run resumes, then creates the output folder. The caller has
        checked its inputs by then, so bad input leaves nothing behind.
        """
        first, ranks = 0, self.runtime.world
        if self._resumed is not None:
            first, ranks = self._resumed["step"], len(self._resumed["rng"])
            if first > total:
                raise UserError(
                    f"resume: the newest checkpoint is of step {first}, but this run ends at step {total}"
                )
            self._seconds_before = self._resumed["seconds"]
            checkpoint.restore(self._resumed, parts, self.runtime)
            self._resumed = None  # frees the tensors
        self._open(first, total)
        if ranks != self.runtime.world:
            self.terminal.line(
                f"started with {ranks} processes and continues with {self.runtime.world}: "
                "its numbers will not equal an unbroken run's bitwise"
            )
        for step in range(first + 1, total + 1):
            yield step
            if self.cfg.save_every and step % self.cfg.save_every == 0:
                self._save_checkpoint(step, parts)

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raise UserError if a metric is not finite. Call it before the optimizer step, so the weights stay good."""
        for name, value in metrics.items():
            # An fp16 gradient may overflow: the loss scaler skips the step and lowers its scale.
            if self.runtime.scaler is not None and name.startswith("grad_norm"):
                continue
            if not math.isfinite(value):
                saved = checkpoint.steps(self._checkpoints)
                kept = (
                    f"the last good checkpoint is step {saved[-1]}"
                    if saved
                    else "no checkpoint had been written"
                )
                raise UserError(f"{self.stage} step {step}: {name} is {value}; stopped, {kept}")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record step `step` (from 1) in log.jsonl, in TensorBoard and, if it is due, on the terminal."""
        self.metrics = {k: float(v) for k, v in metrics.items()}
        if self._metrics_log is not None:
            self._metrics_log.write(step, self.seconds, self.metrics)
            self.terminal.step(step, self.metrics)

    def say(self, lines: Sequence[str]) -> None:
        """Print lines on the terminal, before the first step."""
        for line in lines:
            self.terminal.line(line)

    def show_samples(self, step: int, columns: tuple[str, ...], rows: list[tuple]) -> None:
        """Show prompts and responses on the terminal and in TensorBoard."""
        self.terminal.table(step, columns, rows)
        if self._metrics_log is not None:
            self._metrics_log.write_samples(step, rows)

    def save_model(self, model, tokenizer, folder: Path) -> None:
        """Write a Hugging Face model folder, each file atomically. A collective: every rank must call it."""
        state = sharded.full_state(model.state_dict(), self.runtime.is_main)
        if self.runtime.is_main:
            self._check_weights(self.terminal.total, state)
            with interrupts_deferred():
                self._write_model(model, state, tokenizer, folder)

    def _write_model(self, model, state: dict, tokenizer, folder: Path) -> None:
        scratch = self.out / ".model"
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            model.save_pretrained(scratch, state_dict=state)
        except SafetensorError as error:  # safetensors reports a full disk as this
            raise OSError(f"{scratch}: {error}") from error
        tokenizer.save_pretrained(scratch)
        folder.mkdir(exist_ok=True)
        # safetensors creates files that only their owner can read: use the mode of our other files.
        mode = (self.out / RESOLVED).stat().st_mode
        for file in scratch.iterdir():
            file.chmod(mode)
            file.replace(folder / file.name)
        scratch.rmdir()

    def finish(self, model, tokenizer, summary: dict) -> dict:
        """Write the model folder and then summary.json, which marks the stage as complete."""
        summary = {"stage": self.stage, "seconds": self.seconds, **summary}
        summary["self_check"] = self.runtime.describe_checks().removeprefix("self-check: ")
        self.save_model(model, tokenizer, self.out)
        if self.runtime.is_main:
            replace_text(self.out / SUMMARY, json.dumps(summary, indent=2) + "\n")
            self.terminal.line(f"wrote {self.out} after {self.seconds:.0f} s")
        self.runtime.accelerator.wait_for_everyone()
        return summary

    def _load_checkpoint(self) -> dict:
        state = checkpoint.load_latest(self._checkpoints)
        if state is None:
            raise UserError(
                f"resume: no complete checkpoint in {str(self._checkpoints)!r} (was save_every set?)"
            )
        if state.get("stage") != self.stage:
            raise UserError(
                f"resume: the checkpoint in {self.cfg.out!r} is from stage {state.get('stage')!r}, "
                f"not from {self.stage!r}"
            )
        return state

    def _check_same_settings(self, extendable: tuple[str, ...]) -> None:
        # A resumed run must equal the uninterrupted one bitwise, which changed settings would break.
        path = self.out / RESOLVED
        before, _, _ = read_section(str(path), self.stage)
        free = {f.name for f in fields(OutputConfig)} | set(extendable)
        for name, now in plain(asdict(self.cfg)).items():
            if name in free:
                continue
            if name not in before:
                raise UserError(
                    f"resume: {str(path)!r} lacks the setting {name}, so it is damaged or of another version"
                )
            if before[name] != now:
                raise UserError(
                    f"resume: {name} is {now!r}, but the run in {self.cfg.out!r} was started with "
                    f"{before[name]!r}; give the same value, or another out"
                )

    def _check_same_inputs(self, before: dict) -> None:
        for name, files in self._inputs.items():
            for file, now in files.items():
                then = before.get(name, {}).get(file)
                if then != now:
                    raise UserError(
                        f"resume: {name} {file!r} has changed: now {_words(now)}, "
                        f"when the run started {_words(then)}"
                    )
            if gone := sorted(before.get(name, {}).keys() - files.keys()):
                raise UserError(
                    f"resume: {name} {gone[0]!r} was there when the run started and is gone"
                )

    def _open(self, first: int, total: int) -> None:
        self.runtime.accelerator.wait_for_everyone()
        if self.runtime.is_main:
            self.folder.take()
            save_resolved(self.cfg, self.out / RESOLVED)
            self._metrics_log = MetricsLog(self.out, first, self.cfg.tensorboard)
        self.terminal.start(first, total, self.runtime.describe())

    def _save_checkpoint(self, step: int, parts: Mapping[str, checkpoint.Part]) -> None:
        state = checkpoint.capture(parts, self.runtime)
        if self.runtime.is_main:
            state |= {"stage": self.stage, "step": step, "seconds": self.seconds}
            state |= {"metrics": self.metrics, "inputs": self._inputs}
            self._check_weights(step, state)
            with interrupts_deferred():
                checkpoint.save(self._checkpoints, step, state)
        self.runtime.accelerator.wait_for_everyone()

    def _check_weights(self, step: int, state: Mapping) -> None:
        # A step can make weights infinite while its own loss is finite. Such weights must not be saved.
        for name, value in state.items():
            if isinstance(value, dict):
                self._check_weights(step, value)
            elif isinstance(value, torch.Tensor) and value.is_floating_point():
                if not torch.isfinite(value).all():
                    self.check(step, {f"weight {name}": math.nan})


def _words(found: list | None) -> str:
    """A fingerprint of `files.fingerprints` in words."""
    if found is None:
        return "no such file"
    size, lines, digest = found
    rows = "" if lines is None else f" in {lines} lines"
    return f"{size} bytes{rows} (SHA-256 {digest[:12]})"
