"""Atomic file replacement: a reader sees the old content or the new, never a part of either."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"  # suffix of a file that is still being written


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield `path` + ".partial" to write to; after the block it is fsynced and renamed to `path`.

    If the block raises, `path` keeps its old content.
    """
    partial = path.with_name(path.name + PARTIAL)
    yield partial
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def replace_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
