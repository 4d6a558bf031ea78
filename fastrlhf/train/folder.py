"""The output folder of a run: what it may contain beforehand, and a lock for one writer at a time."""

import fcntl
import os
import shutil
from collections.abc import Mapping, Sequence
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
        inputs: paths that the run reads, by setting (`config.paths`); with `overwrite`, none may lie inside `out`.

    Raises:
        UserError: the path is empty, no UTF-8 text, a file, or a non-empty folder that may not be replaced.
    """

    def __init__(
        self,
        out: str,
        mark: str,
        *,
        overwrite: bool,
        resume: bool = False,
        inputs: Mapping[str, Sequence[str]] | None = None,
    ):
        if not out:
            raise UserError("out: expected a folder to write to, got nothing")
        if "\0" in out or not _is_utf8(out):
            # safetensors and tokenizers cannot write to a path that is no UTF-8 text.
            raise UserError(f"out: expected a path of UTF-8 text, got {out!r}")
        self.path, self.mark, self.overwrite, self.resume = Path(out), mark, overwrite, resume
        self._handle: int | None = None
        self._check_content()
        if overwrite:
            for name, paths in (inputs or {}).items():
                refuse_input_inside(self.path, name, paths)

    def take(self) -> Path:
        """Create and lock the folder until `release`; with `overwrite`, empty it.

        Raises:
            UserError: another process holds the lock, or the folder has been filled since the first check.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._check_content()  # again: the lock now keeps other runs out
            if self.overwrite:
                self._empty()
        except BlockingIOError:
            self.release()
            raise UserError(f"out {str(self.path)!r}: another process is writing there") from None
        except BaseException:
            self.release()
            raise
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

    def _empty(self) -> None:
        # The mark goes last: a folder that a killed process left half empty can be emptied again.
        for entry in sorted(self.path.iterdir(), key=lambda e: e.name in self._marks):
            is_folder = entry.is_dir() and not entry.is_symlink()
            shutil.rmtree(entry) if is_folder else entry.unlink()

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
        if not names & self._marks:
            raise UserError(
                f"out {out!r} holds files that are not from such a run; give an empty folder"
            )

    @property
    def _marks(self) -> set[str]:
        return {self.mark, f"{self.mark}{PARTIAL}"}


def refuse_input_inside(out: Path, name: str, paths: Sequence[str]) -> None:
    """Raise UserError if one of the `paths` that setting `name` gives is `out` or lies inside it, also by a link."""
    for given in map(Path, paths):
        ends = given.absolute(), given.resolve()
        if any(_same(out, part) for end in ends for part in (end, *end.parents)):
            raise UserError(
                f"{name} {str(given)!r} lies inside out {str(out)!r}, which the run replaces"
            )


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # one of them does not exist
        return False


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
