"""Checkpoints: complete or absent on disk, and loaded without executing pickled code.

Layout: `<folder>/step_00000012/state.pt`, a `torch.save` of

    {"stage": str, "step": int, "seconds": float, "metrics": {name: float},
     "inputs": {setting: {file: [bytes, lines, SHA-256]}},
     "parts": {name: state dict},          # models, optimizers, data orders, EMA
     "rng": [{"cpu": state, "cuda": [state]} for each rank],
     "scaler": state dict}                 # fp16 only

Tensors are stored unsharded, so a run can resume with another number of ranks.
"""

import json
import math
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from fastrlhf.errors import UserError
from fastrlhf.train import sharded
from fastrlhf.train.runtime import Runtime

FILE = "state.pt"


class Part(Protocol):
    """Anything a resumed run must restore: an nn.Module, `Optimizers`, `EMA`, `Shuffle`."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> Any: ...


def capture(parts: Mapping[str, Part], runtime: Runtime) -> dict:
    """State of all `parts`, of every rank's random generators, and of fp16's loss scaler.

    A collective: every rank must call it. Only the main process gets the tensors of sharded parts.
    """
    rng = [rng_state()]
    if runtime.world > 1:
        rng = [None] * runtime.world
        dist.all_gather_object(rng, rng_state())
    states = {name: part.state_dict() for name, part in parts.items()}
    state = {"rng": rng, "parts": sharded.full_state(states, runtime.is_main)}
    if runtime.scaler is not None:
        state["scaler"] = runtime.scaler.state_dict()
    return state


def restore(state: dict, parts: Mapping[str, Part], runtime: Runtime) -> None:
    """Load what `capture` returned into `parts`, this rank's random generators and the loss scaler.

    A rank that the interrupted run did not have keeps its generators.

    Raises:
        UserError: a part of the checkpoint is missing or does not fit.
    """
    with _fits(state, "the random generators"):
        if runtime.rank < len(state["rng"]):
            set_rng_state(state["rng"][runtime.rank])
    for name, part in parts.items():
        with _fits(state, f"part {name!r}"):
            if isinstance(part, nn.Module):
                sharded.load_state_dict(part, state["parts"][name])
            else:
                part.load_state_dict(state["parts"][name])
    if runtime.scaler is not None:
        with _fits(state, "the loss scaler"):
            runtime.scaler.load_state_dict(state["scaler"])


@contextmanager
def _fits(state: dict, what: str) -> Iterator[None]:
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"resume: {what} of the checkpoint of step {state['step']} does not fit this run ({reason})"
        ) from error


def save(folder: Path, step: int, state: dict, keep: int = 2) -> Path:
    """Write `state` (tensors, numbers, strings, lists, dicts) as checkpoint `step`; keep the newest `keep`.

    Raises:
        OSError: the disk is full or the folder is not writable.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step_{step:08d}"
    for torn in folder.glob(".writing_*"):  # of a killed run
        shutil.rmtree(torn, ignore_errors=True)
    scratch = folder / f".writing_{step:08d}"
    scratch.mkdir()
    with open(scratch / FILE, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch reports a full disk as RuntimeError
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
    """Steps of the complete checkpoints in `folder`, ascending."""
    names = (p.name[5:] for p in folder.glob("step_*") if (p / FILE).is_file())
    return sorted(int(name) for name in names if name.isdecimal())


def load_latest(folder: Path) -> dict | None:
    """State of the newest complete checkpoint, on the CPU; None if there is no checkpoint.

    `weights_only` restricts unpickling to tensors and plain containers.

    Raises:
        UserError: the file is damaged.
    """
    found = steps(folder)
    if not found:
        return None
    path = folder / f"step_{found[-1]:08d}" / FILE
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not read the checksums
            if torn := archive.testzip():
                raise ValueError(f"checksum of {torn}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        _check(state)
        return state
    except Exception as error:  # torch raises many types for a damaged archive
        older = f"to continue from step {found[-2]}" if len(found) > 1 else "and start again"
        reason = str(error).splitlines() or ["the file is empty"]  # torch's EOFError has no message
        raise UserError(
            f"checkpoint {path} is damaged ({reason[0]}); remove {str(path.parent)!r} {older}"
        ) from error


_KEYS = {"stage": str, "step": int, "seconds": float, "metrics": dict, "inputs": dict}
_KEYS |= {"parts": dict, "rng": list}


def _check(state: object) -> None:
    if not isinstance(state, dict):
        raise ValueError(f"expected a dict, got {type(state).__name__}")
    for key, kind in _KEYS.items():
        if not isinstance(state.get(key), kind) or isinstance(state[key], bool):
            got = type(state[key]).__name__ if key in state else "nothing"
            raise ValueError(f"{key}: expected {kind.__name__}, got {got}")
    if state["step"] < 1 or not math.isfinite(state["seconds"]) or not state["rng"]:
        raise ValueError(
            f"step {state['step']} after {state['seconds']} seconds on {len(state['rng'])} ranks"
        )
    if not all(isinstance(value, float) for value in state["metrics"].values()):
        raise ValueError("metrics: expected numbers")
    for files in state["inputs"].values():
        if not isinstance(files, dict) or any(len(found) != 3 for found in files.values()):
            raise ValueError("inputs: expected [bytes, lines, SHA-256] of each file")


def rng_state() -> dict:
    """State of torch's global generators, the only global randomness that the stages draw from."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict) -> None:
    """Restore what `rng_state` returned."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
