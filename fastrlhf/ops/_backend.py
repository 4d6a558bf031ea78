"""Which implementation of an op runs: "auto" | "reference" | "cpu" | "triton" | "cuda".

auto takes the first backend of AUTO that can run, which the committed measurement beside it found the
fastest; where that is only the reference, it warns once and says why. A backend that is named but cannot
run is an error which says why and what to use.
"""

import importlib.util
import os
import threading
import warnings
from collections import Counter
from typing import NamedTuple

import torch

from fastrlhf.ops import _autograd, _library

# Why the C++ ops are unavailable; empty when they are registered.
_extension_error = _library.load()

BACKENDS = ("reference", "cpu", "triton", "cuda")

# Public op -> the C++ op whose kernel serves it.
_CPP_OPS = {
    "token_logprob": "token_logprob_fwd",
    "linear_logprob": "token_logprob_fwd",
    "linear_cross_entropy": "token_loss_rows_",
    "linear_ppo_loss": "token_loss_rows_",
    "linear_token_loss": "token_logprob_fwd",
    "kl_reward": "kl_reward_fwd",
    "gae": "gae",
    "kl_gae": "kl_gae",
    "masked_whiten": "masked_whiten_fwd",
    "ppo_loss": "ppo_loss_fwd",
    "ranking_loss": "ranking_loss_fwd",
    "token_loss": "token_loss_fwd",
}
OPS = tuple(_CPP_OPS)
# Their outputs are constants to autograd.
_CONSTANTS = frozenset({"kl_reward", "gae", "kl_gae", "masked_whiten"})
# Their reference, too, is an op with a backward of its own: elsewhere it is plain PyTorch.
_OWN_AUTOGRAD = frozenset(
    {"linear_logprob", "linear_cross_entropy", "linear_ppo_loss", "linear_token_loss"}
)
# Public op -> the file under fastrlhf/kernels that serves it.
_TRITON_KERNELS = {
    "token_logprob": "token_logprob",
    "linear_logprob": "token_logprob",
    "linear_cross_entropy": "token_loss",
    "linear_ppo_loss": "token_loss",
    "linear_token_loss": "token_logprob",
    "kl_reward": "kl_reward",
    "gae": "gae",
    "kl_gae": "kl_gae",
    "masked_whiten": "masked_whiten",
    "ppo_loss": "ppo_loss",
    "ranking_loss": "ranking_loss",
    "token_loss": "token_loss",
}


class Auto(NamedTuple):
    """`order`: backends, the fastest first. `row`: the benchmark case whose figures gave that order."""

    order: tuple[str, ...]
    row: str


# Device -> the file under benchmarks/results/ that holds the rows of AUTO; empty: not measured yet.
# tests/ops/test_dispatch.py compares the order with the file.
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


def _has_cpp_kernel(op: str, key: str) -> bool:
    name = _CPP_OPS[op]
    candidates = (name, name.removesuffix("_fwd"))
    return any(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"fastrlhf::{candidate}", key)
        for candidate in candidates
        if torch._C._dispatch_has_kernel(f"fastrlhf::{candidate}")
    )


# Fixed at import, so that torch.compile meets constants.
_CPU_OPS = frozenset(op for op in OPS if not _extension_error and _has_cpp_kernel(op, "CPU"))
_CUDA_OPS = frozenset(op for op in OPS if not _extension_error and _has_cpp_kernel(op, "CUDA"))
_TRITON_INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
_TRITON_MISSING = importlib.util.find_spec("triton") is None
_TRITON_OPS = frozenset(
    op
    for op, file in _TRITON_KERNELS.items()
    if importlib.util.find_spec(f"fastrlhf.kernels.{file}") is not None
)

# Public calls by (op, backend): the proof of what ran. Calls that torch.compile traces do not count.
calls: Counter = Counter()
_warned: set[tuple[str, str]] = set()
# (op, backend, device) -> what `choose` found the first time.
_chosen: dict[tuple[str, str, str], str] = {}
_lock = threading.Lock()


def unavailable_reason(op: str, backend: str, device: str = "cpu") -> str:
    """Why `backend` cannot run `op` on tensors of `device` ("cpu" or "cuda"); empty when it can."""
    if backend == "reference":
        return ""
    if backend == "cpu":
        if device != "cpu":
            return f"it needs CPU tensors; got {device}"
        if op in _CPU_OPS:
            return ""
        return _extension_error or "the op has no C++ kernel"
    if backend == "triton":
        if op not in _TRITON_OPS:
            return "the op has no Triton kernel"
        if _TRITON_MISSING:
            return "triton is not installed"
        if device != "cuda" and not _TRITON_INTERPRET:
            return f"it needs CUDA tensors; got {device}"
        return ""
    if op in _CUDA_OPS:
        return "" if device == "cuda" else f"it needs CUDA tensors; got {device}"
    if not _extension_error and op in _CPU_OPS:
        return "the extension was built without CUDA (FASTRLHF_BUILD=cuda)"
    return _extension_error or "the op has no CUDA kernel"


def auto(op: str, device: str) -> str:
    """The backend that "auto" takes for `op` on tensors of `device`."""
    if (op, device) in AUTO:
        for backend in AUTO[op, device].order:
            if unavailable_reason(op, backend, device) == "":
                return backend
    return "reference"


def measured(op: str, device: str) -> str:
    """The committed measurement behind the order of "auto", or "not measured yet"."""
    file = RESULTS.get(device, "")
    return f"{file}: {AUTO[op, device].row}" if file else "not measured yet"


def _warn_of_reference(op: str, device: str) -> None:
    """Once an op and device: the user did not ask for the reference, and should know."""
    with _lock:
        if (op, device) in _warned:
            return
        _warned.add((op, device))
    if (op, device) in AUTO:
        fused = [b for b in AUTO[op, device].order if b != "reference"]
        why = "; ".join(f"{b} cannot run: {unavailable_reason(op, b, device)}" for b in fused)
    else:
        why = f"no fused backend takes {device} tensors"
    warnings.warn(
        f"{op}: backend='auto' takes the reference, the slow one. {why}", UserWarning, stacklevel=5
    )


def check_name(op: str, backend: str) -> None:
    """ValueError unless `backend` is a name; whether it can run is only known with the tensors."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"{op}: backend must be one of {('auto', *BACKENDS)}; got {backend!r}")


def choose(
    op: str, backend: str, tensor: torch.Tensor, *others: torch.Tensor | None, compiling=None
) -> str:
    """The backend that will run `op` on `tensor`; ValueError for a name that cannot run here.

    `others`: the op's other tensors that are no constants to autograd: no tangent may be lost. `compiling`: what
    torch.compiler says, where the caller has asked.
    """
    device = "cpu" if tensor.is_cpu else tensor.device.type
    if compiling is None:
        compiling = torch.compiler.is_compiling()
    chosen = None
    if not compiling and type(backend) is str:
        chosen = _chosen.get((op, backend, device))
    if chosen is None:
        chosen = _choose(op, backend, device, compiling)
    if _autograd.transforming() and (chosen != "reference" or op in _OWN_AUTOGRAD):
        way_out = "torch.autograd.grad" + (", or backend='reference'" * (op not in _OWN_AUTOGRAD))
        tensors = (tensor, *others)
        _autograd.refuse_transforms(op, tensors, constant=op in _CONSTANTS, way_out=way_out)
    if not compiling:
        with _lock:
            calls[op, chosen] += 1
    return chosen


def _choose(op, backend, device, compiling):
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
    """For each op and backend, "available" or the reason why it cannot run on this machine.

    Beside the four backends stands "auto": the one it takes for tensors on this machine's GPU, or on
    its CPU where torch finds no GPU.
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
