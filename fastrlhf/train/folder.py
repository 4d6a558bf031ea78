"""The output folder of a run: what it may contain beforehand, and a lock for one writer at a time."""

import fcntl
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from fastrlhf.errors import UserError
from fastrlhf.train.files import PARTIAL


class OutputFolder:
    """Checks an output folder, then creates and locks it. A context manager.

    The constructor only checks. `take` creates and locks the folder, and empties it if `overwrite` is set.

    Args:
        out: path of the folder, as the user gave it.
        mark: name of a file that every run of this kind writes. A folder without it is never emptied.
        overwrite: the user allows an earlier run in `out` to be replaced.
        resume: the user asks to continue the run in `out`.
        inputs: the run's settings; with `overwrite`, none of them may name a path inside `out`.

    Raises:
        UserError: the path is empty, a file, or a non-empty folder that may not be replaced.
    """

    def __init__(
        self,
        out: str,
        mark: str,
        *,
        overwrite: bool,
        resume: bool = False,
        inputs: Mapping[str, object] | None = None,
    ):
        if not out:
            raise UserError("out: expected a folder to write to, got nothing")
        if "\0" in out:
            raise UserError(f"out: expected a path, got {out!r}")
        self.path, self.mark, self.overwrite, self.resume = Path(out), mark, overwrite, resume
        self._handle: int | None = None
        self._check_content()
        if overwrite:
            self._check_inputs(inputs or {})

    def take(self) -> Path:
        """Create and lock the folder until `release`; with `overwrite`, empty it.

        Raises:
            UserError: another process holds the lock, or the folder has been filled since the first check.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise UserError(f"out {str(self.path)!r}: another process is writing there") from None
        self._check_content()  # again: the lock now keeps other runs out
        if self.overwrite:
            for entry in self.path.iterdir():
                is_folder = entry.is_dir() and not entry.is_symlink()
                shutil.rmtree(entry) if is_folder else entry.unlink()
        return self.path

    def __enter__(self) -> Path:
        return self.take()

    def __exit__(self, *exception) -> None:
        self.release()

    def release(self) -> None:
        """Unlock the folder. The system does the same when the process dies."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _check_content(self) -> None:
        if not self.path.exists():
            return
        out = str(self.path)
        if not self.path.is_dir():
            raise UserError(f"out {out!r} is a file; give a folder")
        names = {entry.name for entry in self.path.iterdir()}
        if not names or self.resume:
            return
        if not self.overwrite:
            raise UserError(
                f"out {out!r} holds another run; give --overwrite to replace it or --resume to continue it"
            )
        if not names & {self.mark, f"{self.mark}{PARTIAL}"}:
            raise UserError(
                f"out {out!r} holds files that are not from such a run; give an empty folder"
            )

    def _check_inputs(self, inputs: Mapping[str, object]) -> None:
        here = self.path.resolve()
        for name, value in inputs.items():
            if name == "out" or not isinstance(value, str) or not value or "\0" in value:
                continue
            given = Path(value)
            if given.exists() and here in (given.resolve(), *given.resolve().parents):
                raise UserError(
                    f"{name} {value!r} lies inside out {str(self.path)!r}, which --overwrite empties"
                )
