"""Which implementation of an op runs: "auto" | "reference" | "cpu" | "triton" | "cuda".

auto: CPU tensors take "cpu" (C++), CUDA tensors "cuda" and then "triton"; what is not built falls to
"reference". A backend that is named but cannot run is an error which says why and what to use.
"""

import importlib.util
import os
import threading
from collections import Counter

import torch

try:
    from fastrlhf import _C  # noqa: F401  (loading it registers the C++ ops)

    _extension_error = ""
except ImportError as error:
    _extension_error = (
        "the C++ extension is not built (pip install --no-build-isolation ."
        f" with FASTRLHF_BUILD=cpu or cuda): {error}"
    )

BACKENDS = ("reference", "cpu", "triton", "cuda")

# Public op -> the C++ op whose kernel serves it.
_CPP_OPS = {
    "token_logprob": "token_logprob_fwd",
    "linear_logprob": "token_logprob_fwd",
    "linear_cross_entropy": "token_logprob_fwd",
    "kl_reward": "kl_reward_fwd",
    "gae": "gae",
    "kl_gae": "kl_gae",
    "masked_whiten": "masked_whiten_fwd",
    "ppo_loss": "ppo_loss_fwd",
    "ranking_loss": "ranking_loss_fwd",
}
OPS = tuple(_CPP_OPS)
# Public op -> the file under fastrlhf/kernels that serves it.
_TRITON_KERNELS = {
    "token_logprob": "token_logprob",
    "linear_logprob": "token_logprob",
    "linear_cross_entropy": "token_logprob",
    "kl_reward": "kl_reward",
    "gae": "gae",
    "kl_gae": "kl_gae",
    "masked_whiten": "masked_whiten",
    "ppo_loss": "ppo_loss",
    "ranking_loss": "ranking_loss",
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


def _auto(op: str, device: str) -> str:
    for backend in ("cpu",) if device == "cpu" else ("cuda", "triton"):
        if unavailable_reason(op, backend, device) == "":
            return backend
    return "reference"


def choose(op: str, backend: str, tensor: torch.Tensor) -> str:
    """The backend that will run `op` on `tensor`; ValueError for a name that cannot run here."""
    device = tensor.device.type
    if backend == "auto":
        chosen = _auto(op, device)
    elif backend in BACKENDS:
        reason = unavailable_reason(op, backend, device)
        if reason:
            raise ValueError(
                f"{op}: backend={backend!r} cannot run: {reason}. "
                f"Use backend='auto' (here: {_auto(op, device)!r}) or backend='reference'."
            )
        chosen = backend
    else:
        raise ValueError(f"{op}: backend must be one of {('auto', *BACKENDS)}; got {backend!r}")
    if not torch.compiler.is_compiling():
        with _lock:
            calls[op, chosen] += 1
    return chosen


def backends() -> dict[str, dict[str, str]]:
    """For each op and backend, "available" or the reason why it cannot run on this machine."""
    cuda = torch.cuda.is_available()
    table: dict[str, dict[str, str]] = {}
    for op in OPS:
        table[op] = {}
        for backend in BACKENDS:
            device = "cuda" if cuda and backend in ("triton", "cuda") else "cpu"
            table[op][backend] = unavailable_reason(op, backend, device) or "available"
    return table
