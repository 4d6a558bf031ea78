"""The compiled files of the package, looked at before they are loaded: a file that is cut off kills the process."""

import importlib
import importlib.util
import struct
from pathlib import Path
from types import ModuleType

PT_LOAD = 1


def cut_off(path: Path) -> str:
    """Why a 64-bit ELF file is incomplete; empty if it is complete, or for the loader to refuse.

    The loader maps a file whose end is missing, and the first access to a missing page is a SIGBUS.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(64)
        if len(header) < 64 or header[:5] != b"\x7fELF\x02":
            return ""
        order = "<" if header[5] == 1 else ">"
        segments, sections = struct.unpack_from(f"{order}QQ", header, 32)
        entry, count, section_size, section_count = struct.unpack_from(f"{order}4H", header, 54)
        file.seek(segments)
        table = file.read(entry * count)
    needed = max(segments + entry * count, sections + section_size * section_count)
    for at in range(0, len(table) - 55, max(entry, 56)):
        kind, _, offset, _, _, length = struct.unpack_from(f"{order}II4Q", table, at)
        if kind == PT_LOAD:
            needed = max(needed, offset + length)
    return f"{path.name} is cut off: {size} of {needed} bytes" if needed > size else ""


def packer() -> tuple[ModuleType | None, str]:
    """(fastrlhf._C, "") or (None, why it does not load; empty if it is not built for this Python)."""
    spec = importlib.util.find_spec("fastrlhf._C")
    if spec is None:
        return None, ""
    reason = cut_off(Path(spec.origin)) if spec.origin else ""
    try:
        if not reason:
            return importlib.import_module("fastrlhf._C"), ""
    except ImportError as error:
        reason = str(error)
    return None, f"fastrlhf._C is built, but does not load: {reason}"
