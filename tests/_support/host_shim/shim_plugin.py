"""pytest plugin (-p shim_plugin): backend="cuda" runs csrc/cuda on CPU tensors, in this process.

Loads the libraries of build.py in place of libfastrlhf.so. Keeps only the tests of backend "cuda"; of those that
test_conformance.py has for every op, only those of HOST_SHIM_OPS. Runs them by the source of their op, and prints the
kernels that each source's tests ran.
"""

import ctypes
import os

import pytest
import torch

from _support.host_shim import build

LIBRARIES = os.environ["FASTRLHF_HOST_SHIM"].split(os.pathsep)
SOURCE_OF = {op: build.source_of(op).stem for op in os.environ["HOST_SHIM_OPS"].split(",")}
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


def library_of(path):
    library = ctypes.CDLL(path)
    library.shim_last_launch.restype = library.shim_kernels_run.restype = ctypes.c_char_p
    return library


def last_launch(stem):
    """(kernel, blocks of a cluster, bytes of dynamic shared memory) of the last launch by `stem`.cu."""
    (path,) = (p for p in LIBRARIES if os.path.basename(p).startswith(f"{stem}-"))
    kernel, blocks, shared = library_of(path).shim_last_launch().decode().split()
    return kernel, int(blocks), int(shared)


def op_of(item):
    """The op of HOST_SHIM_OPS that a test is for, by its spec, its `op` or the name of its file; or None."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if "spec" in params:
        return params["spec"].name if params["spec"].name in SOURCE_OF else None
    if "op" in params:
        return params["op"] if params["op"] in SOURCE_OF else None
    stem = item.path.stem.removeprefix("test_").replace("policy_parts", "ppo_loss")
    return next((op for op in SOURCE_OF if stem == op or stem.startswith(f"{op}_")), None)


def pytest_collection_modifyitems(config, items):
    def chosen(item):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        # torch.compile does not change what a kernel does.
        return params.get("backend") == "cuda" and op_of(item) and "compiles" not in item.name

    config.hook.pytest_deselected(items=[item for item in items if not chosen(item)])
    items[:] = [item for item in items if chosen(item)]
    for item in items:
        item.source = SOURCE_OF[op_of(item)]
    items.sort(key=lambda item: item.source)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    outcome = yield
    if nextitem is None or nextitem.source != item.source:
        terminal = item.config.pluginmanager.get_plugin("terminalreporter")
        terminal.write("\n")  # write_line alone would continue the line of dots
        for path in LIBRARIES:
            for name in library_of(path).shim_kernels_run().decode().split():
                terminal.write_line(f"tests of {item.source}: kernel ran: {name}")
    return outcome
