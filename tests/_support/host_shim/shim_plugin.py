"""pytest plugin (-p shim_plugin): backend="cuda" runs csrc/cuda on CPU tensors, in this process.

Loads the libraries of build.py in place of libfastrlhf.so. Keeps only the tests of backend "cuda"; of those that
test_conformance.py has for every op, only those of HOST_SHIM_OPS.
"""

import ctypes
import os

import torch

LIBRARIES = os.environ["FASTRLHF_HOST_SHIM"].split(os.pathsep)
for path in LIBRARIES:
    torch.ops.load_library(path)

from fastrlhf.ops import _library  # noqa: E402

_library.load = lambda: ""  # the shim's libraries hold the ops

from fastrlhf.ops import _backend  # noqa: E402

_provide = _backend.provide


def provide(op, backends, **more):
    """The shim registers CUDA kernels for CPU tensors."""
    _provide(op, ["cuda" if name == "cpu" else name for name in backends], **more)


_backend.provide = provide  # before the first op is imported

from _support import logit_cases  # noqa: E402

_unavailable_reason = _backend.unavailable_reason


def unavailable_reason(op, backend, device="cpu"):
    return _unavailable_reason(op, backend, "cuda" if backend == "cuda" else device)


_backend.unavailable_reason = unavailable_reason
logit_cases.DEVICE["cuda"] = "cpu"


def last_launch(stem):
    """(kernel, blocks of a cluster, bytes of dynamic shared memory) of the last launch by `stem`.cu."""
    (path,) = (p for p in LIBRARIES if os.path.basename(p).startswith(f"{stem}-"))
    library = ctypes.CDLL(path)
    library.shim_last_launch.restype = ctypes.c_char_p
    kernel, blocks, shared = library.shim_last_launch().decode().split()
    return kernel, int(blocks), int(shared)


def pytest_collection_modifyitems(config, items):
    def chosen(item):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        spec = params.get("spec")
        ours = spec is None or spec.name in os.environ["HOST_SHIM_OPS"].split(",")
        # torch.compile does not change what a kernel does.
        return params.get("backend") == "cuda" and ours and "compiles" not in item.name

    config.hook.pytest_deselected(items=[item for item in items if not chosen(item)])
    items[:] = [item for item in items if chosen(item)]


def pytest_terminal_summary(terminalreporter):
    for path in LIBRARIES:
        library = ctypes.CDLL(path)
        library.shim_kernels_run.restype = ctypes.c_char_p
        for name in library.shim_kernels_run().decode().split():
            terminalreporter.write_line(f"kernel ran: {name}")
