"""Files of a run: atomic replacement (a reader sees the old content or the new), deferred Ctrl-C, fingerprints."""

import hashlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
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
    """Write a UTF-8 text file atomically. A lone surrogate, as of a path that is not UTF-8, becomes its escape."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Delay a first Ctrl-C to the end of the block, which then raises KeyboardInterrupt; a second one is immediate.

    torch and safetensors turn an interrupt inside their writers into an error about the disk.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals in the main thread only
        return
    came = []

    def remember(*_):
        came.append(True)
        signal.signal(signal.SIGINT, before)

    before = signal.getsignal(signal.SIGINT) or signal.SIG_DFL  # None: not set by Python
    signal.signal(signal.SIGINT, remember)
    try:
        yield
    except Exception as error:
        if came:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


# What a model is loaded from, in a folder that may hold the outputs of a run as well.
_MODEL_FILES = (
    "*.safetensors",
    "*config.json",
    "*.index.json",
    "*.model",
    "*.py",
    "tokenizer*",
    "chat_template*",
)
_MODEL_FILES += ("vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
_BLOCK = 1 << 20
_WHOLE = 1 << 30  # bytes up to which a file is read as a whole
_SAMPLES = 256  # blocks that are read of a larger file


def fingerprints(inputs: Mapping[str, Sequence[str]]) -> dict[str, dict[str, list]]:
    """{setting: {file: [bytes, lines, SHA-256]}} of the files, and of the model files in the folders, that it names.

    Of a file above 1 GB, 256 blocks of 1 MB are read, evenly spaced, with the first and the last among them. `lines`
    is None for such a file, a compressed one and weights.
    """
    found: dict[str, dict[str, list]] = {}
    for name, given in inputs.items():
        files = [file for path in map(Path, given) for file in _files(path)]
        found[name] = {str(file): _fingerprint(file) for file in files}
    return found


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path] if path.is_file() else []  # reading a pipe would take its data from the stage
    return sorted(
        {file for pattern in _MODEL_FILES for file in path.glob(pattern) if file.is_file()}
    )


def _fingerprint(path: Path) -> list:
    size, digest = path.stat().st_size, hashlib.sha256()
    uncounted = size > _WHOLE or path.suffix in (".gz", ".safetensors")
    lines = None if uncounted else 0
    with open(path, "rb") as file:
        last = max(0, size - _BLOCK)
        starts = range(0, size, _BLOCK)
        if size > _WHOLE:
            starts = [last * i // (_SAMPLES - 1) for i in range(_SAMPLES)]
        for start in starts:
            file.seek(start)
            block = file.read(_BLOCK)
            digest.update(block)
            if lines is not None:
                lines += block.count(b"\n")
    return [size, lines, digest.hexdigest()]
