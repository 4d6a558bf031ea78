"""Which implementation of an op runs: "auto" | "reference" | "cpu" | "triton" | "cuda".

"auto" takes the first backend in AUTO that can run. On a CPU AUTO lists them by a committed measurement, the fastest
first. On a GPU the order is a choice until RESULTS names a whole results file of one: on the H200 of 2026-11-27 the
Triton kernels of that commit were faster for some ops. If only the reference can run, it warns once with the reason.
Naming a backend that cannot run raises a ValueError with the reason and an alternative.
"""

import importlib
import importlib.util
import os
import threading
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch

import fastrlhf
from fastrlhf.ops import _library

# Why the C++ ops are unavailable; empty when they are registered.
_extension_error = _library.load()

BACKENDS = ("reference", "cpu", "triton", "cuda")
OPS = tuple(name for name, home in fastrlhf._HOME.items() if home == f"fastrlhf.ops.{name}")
# Filled by `provide` when an op's module is imported: public op -> the fused backends that have all of its kernels;
# the ops that have a gradient.
_provided: dict[str, frozenset[str]] = {}
differentiable: set[str] = set()


class Auto(NamedTuple):
    """`order`: backends, the first that can run is taken. `row`: the benchmark case that measures it."""

    order: tuple[str, ...]
    row: str


# Device -> the file under benchmarks/results/ with the rows of AUTO; empty: not measured yet.
# tests/ops/test_dispatch.py checks the order against the file.
RESULTS = {"cpu": "amd-epyc-2026-11-27.json", "cuda": ""}
_CPU, _CUDA = ("cpu", "reference"), ("cuda", "triton", "reference")
AUTO = {
    ("token_logprob", "cpu"): Auto(_CPU, "Llama-2 1024x32000"),
    ("token_logprob", "cuda"): Auto(_CUDA, "Llama-3 8192x128256"),
    ("token_loss", "cpu"): Auto(_CPU, "Llama-2 1024x32000"),
    ("token_loss", "cuda"): Auto(_CUDA, "Llama-3 8192x128256"),
    ("linear_logprob", "cpu"): Auto(_CPU, "small head 512x512x32000"),
    ("linear_logprob", "cuda"): Auto(_CUDA, "Llama-3-8B 8192x4096x128256"),
    ("linear_cross_entropy", "cpu"): Auto(_CPU, "small head 512x512x32000"),
    ("linear_cross_entropy", "cuda"): Auto(_CUDA, "Llama-3-8B 8192x4096x128256"),
    ("linear_ppo_loss", "cpu"): Auto(_CPU, "small head 2048x512x32000"),
    ("linear_ppo_loss", "cuda"): Auto(_CUDA, "Llama-3-8B 8192x4096x128256"),
    ("linear_token_loss", "cpu"): Auto(_CPU, "small head 512x512x32000"),
    ("linear_token_loss", "cuda"): Auto(_CUDA, "Llama-3-8B 8192x4096x128256"),
    ("kl_reward", "cpu"): Auto(_CPU, "padded 512x1024"),
    ("kl_reward", "cuda"): Auto(_CUDA, "padded 512x4096"),
    ("gae", "cpu"): Auto(_CPU, "padded 512x1024"),
    ("gae", "cuda"): Auto(_CUDA, "padded 512x4096"),
    ("kl_gae", "cpu"): Auto(_CPU, "padded 512x1024"),
    ("kl_gae", "cuda"): Auto(_CUDA, "padded 512x4096"),
    ("masked_whiten", "cpu"): Auto(_CPU, "padded 512x1024"),
    ("masked_whiten", "cuda"): Auto(_CUDA, "padded 512x4096"),
    ("ppo_loss", "cpu"): Auto(_CPU, "64k tokens"),
    ("ppo_loss", "cuda"): Auto(_CUDA, "64k tokens"),
    ("ranking_loss", "cpu"): Auto(_CPU, "512 prompts x 9"),
    ("ranking_loss", "cuda"): Auto(_CUDA, "512 prompts x 9"),
}


def provide(op: str, backends: Iterable[str], *, gradient: bool) -> None:
    """Records that `op` needs a kernel which these backends have. Several such calls are a conjunction."""
    _provided[op] = _provided.get(op, frozenset(BACKENDS)) & frozenset(backends)
    if gradient:
        differentiable.add(op)


def kernels(op: str) -> frozenset[str]:
    """The fused backends that have kernels for `op`, whether or not this machine can run them."""
    if op not in _provided:
        importlib.import_module(f"fastrlhf.ops.{op}")
    return _provided[op]


_TRITON_INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
_TRITON_MISSING = importlib.util.find_spec("triton") is None

# Number of public calls by (op, backend), to prove what ran. Calls traced by torch.compile do not count.
calls: Counter = Counter()
_warned: set[tuple[str, str]] = set()
# (op, backend, device) -> the result of `resolve`.
_chosen: dict[tuple[str, str, str], str] = {}
_lock = threading.Lock()


def unavailable_reason(op: str, backend: str, device: str = "cpu") -> str:
    """Why `backend` cannot run `op` on tensors of `device` ("cpu" or "cuda"); empty when it can."""
    if backend == "reference":
        return ""
    if backend == "cpu":
        if device != "cpu":
            return f"it needs CPU tensors; got {device}"
        if "cpu" in kernels(op):
            return ""
        return _extension_error or "the op has no C++ kernel"
    if backend == "triton":
        if "triton" not in kernels(op):
            return "the op has no Triton kernel"
        if _TRITON_MISSING:
            return "triton is not installed"
        if device != "cuda" and not _TRITON_INTERPRET:
            return f"it needs CUDA tensors; got {device}"
        return ""
    if "cuda" in kernels(op):
        return "" if device == "cuda" else f"it needs CUDA tensors; got {device}"
    if "cpu" in kernels(op):
        return (
            "the kernel library was built without CUDA, which needs a CUDA build of torch and nvcc"
        )
    return _extension_error or "the op has no CUDA kernel"


def auto(op: str, device: str) -> str:
    """The backend that "auto" takes for `op` on tensors of `device`."""
    if device == "meta":  # shapes alone, which are those of every fused backend
        return "cpu"
    for backend in order(op, device):
        if unavailable_reason(op, backend, device) == "":
            return backend
    return "reference"


def order(op: str, device: str) -> tuple[str, ...]:
    """Backends, the fastest first; for an op that is not in AUTO yet, by expectation."""
    if (op, device) in AUTO:
        return AUTO[op, device].order
    return {"cpu": _CPU, "cuda": _CUDA}.get(device, ())


def measured(op: str, device: str) -> str:
    """The committed measurement behind the order of "auto", or "not measured yet"."""
    file = RESULTS.get(device, "")
    return (
        f"{file}: {AUTO[op, device].row}" if file and (op, device) in AUTO else "not measured yet"
    )


def _warn_of_reference(op: str, device: str) -> None:
    """Warns once per op and device that "auto" runs the slow reference."""
    with _lock:
        if (op, device) in _warned:
            return
        _warned.add((op, device))
    if fused := [b for b in order(op, device) if b != "reference"]:
        why = "; ".join(f"{b} cannot run: {unavailable_reason(op, b, device)}" for b in fused)
    else:
        why = f"no fused backend takes {device} tensors"
    warnings.warn(
        f"{op}: backend='auto' takes the reference, the slow one. {why}", UserWarning, stacklevel=5
    )


def check_name(op: str, backend: str) -> None:
    """ValueError unless `backend` is a name; whether it can run is only known with the tensors."""
    if not isinstance(backend, str) or backend not in ("auto", *BACKENDS):
        raise ValueError(f"{op}: backend must be one of {('auto', *BACKENDS)}; got {backend!r}")


def resolve(op: str, backend: str, device: str, compiling: bool) -> str:
    """The backend to run for the name `backend`; kept in `_chosen` for the next eager call."""
    check_name(op, backend)
    if backend == "auto":
        chosen = auto(op, device)
        if chosen == "reference" and not compiling:
            _warn_of_reference(op, device)
    elif reason := unavailable_reason(op, backend, device):
        raise ValueError(
            f"{op}: backend={backend!r} cannot run: {reason}. "
            f"Use backend='auto' (here: {auto(op, device)!r}) or backend='reference'."
        )
    else:
        chosen = backend
    if not compiling:
        _chosen[op, backend, device] = chosen
    return chosen


def backends() -> dict[str, dict[str, str]]:
    """{op: {backend: "available", or why it cannot run on this machine}}.

    A fifth key, "auto", holds the backend that "auto" takes for tensors on this machine's GPU, or on its CPU if torch
    finds no GPU.
    """
    here = "cuda" if torch.cuda.is_available() else "cpu"
    table: dict[str, dict[str, str]] = {}
    for op in OPS:
        table[op] = {}
        for backend in BACKENDS:
            device = here if backend in ("triton", "cuda") else "cpu"
            table[op][backend] = unavailable_reason(op, backend, device) or "available"
        table[op]["auto"] = auto(op, here)
    return table
