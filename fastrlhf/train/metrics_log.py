"""The metrics of a run on disk: log.jsonl and TensorBoard."""

import json
import math
from pathlib import Path

from fastrlhf.train.files import replace_text

LOG = "log.jsonl"


class MetricsLog:
    """Appends one row {"step", "time", metric: value, ...} per step to `folder`/log.jsonl, and to TensorBoard.

    Args:
        folder: the run's output folder; TensorBoard's files go to `folder`/tb.
        first: last step of the checkpoint that the run resumes from, else 0. Later rows are removed: a killed
            run may have logged steps after its last checkpoint, and they will run again.
        tensorboard: whether to write TensorBoard files.
    """

    def __init__(self, folder: Path, first: int, tensorboard: bool):
        path = folder / LOG
        if path.exists():
            text = path.read_text(encoding="utf-8", errors="replace")  # a damaged line is dropped
            rows = [line for line in text.splitlines() if _step_of(line) <= first]
            replace_text(path, "".join(row + "\n" for row in rows))
        self._file = open(path, "a")
        self._tensorboard = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tb"), purge_step=first)

    def write(self, step: int, seconds: float, metrics: dict[str, float]) -> None:
        """Record step `step` (from 1), `seconds` after the start of the run."""
        row = {"step": step, "time": round(seconds, 3), **metrics}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._tensorboard:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)

    def write_samples(self, step: int, rows: list[tuple]) -> None:
        """Add sampled texts to TensorBoard."""
        if self._tensorboard:
            text = "\n\n".join(" | ".join(str(x) for x in row) for row in rows)
            self._tensorboard.add_text("samples", text, step)

    def close(self) -> None:
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()


def _step_of(line: str) -> float:
    # A line that a full disk or a kill truncated counts as later than every checkpoint.
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if isinstance(step, int | float) else math.inf
