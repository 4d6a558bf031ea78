"""Checkpoints that are whole or absent: written beside, fsynced, renamed. Loading never unpickles code."""

import json
import os
import shutil
from pathlib import Path

import torch

from fastrlhf.errors import UserError

FILE = "state.pt"


def save(folder: Path, step: int, state: dict, keep: int = 2) -> Path:
    """Write `state` (tensors, numbers, lists, dicts) as checkpoint `step`; the newest `keep` stay."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step_{step:08d}"
    scratch = folder / f".writing_{step:08d}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    with open(scratch / FILE, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # a full disk comes as this
            raise OSError(f"{scratch / FILE}: {error}".splitlines()[0]) from error
        _sync(file)
    with open(scratch / "meta.json", "w") as file:
        json.dump({"step": step, "torch": torch.__version__}, file)
        _sync(file)
    if final.exists():
        shutil.rmtree(final)
    os.replace(scratch, final)
    _sync_folder(folder)
    for old in steps(folder)[:-keep]:
        shutil.rmtree(folder / f"step_{old:08d}")
    return final


def steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in a folder, ascending."""
    names = (p.name[5:] for p in folder.glob("step_*") if (p / FILE).is_file())
    return sorted(int(name) for name in names if name.isdecimal())


def load_latest(folder: Path) -> dict | None:
    """State of the newest whole checkpoint, or None. Only tensors and plain containers are read (weights_only)."""
    found = steps(folder)
    if not found:
        return None
    path = folder / f"step_{found[-1]:08d}" / FILE
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # torch raises many types for a damaged archive; the user needs the path
        older = f"to continue from step {found[-2]}" if len(found) > 1 else "and start again"
        raise UserError(
            f"checkpoint {path} is damaged ({str(error).splitlines()[0]}); "
            f"remove {str(path.parent)!r} {older}"
        ) from error


def rng_state() -> dict:
    """Every global random state the stages draw from."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def replace_file(path: Path, text: str) -> None:
    """Write a small text file so that a reader sees the old content or the new, never half."""
    scratch = path.with_name(f".{path.name}.writing")
    with open(scratch, "w") as file:
        file.write(text)
        _sync(file)
    os.replace(scratch, path)


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
