"""Settings that every test runs under. Imported by pytest before any test module."""

import atexit
import gc
import importlib.util
import math
import os
import sys
import time

import pytest
import torch

from _support import fast_scan
from _support.bench_problems import BENCHMARKS

# Collection only adds objects. The collector would walk all of them again and again: a fifth of the time.
gc.disable()

# Read by Triton when a kernel is decorated, so it must be set before fastrlhf.kernels is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        fast_scan.install()

# Processes side by side share the cores: more threads than cores would wait for each other.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(share))  # of the processes that tests start
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture
def poisoned():
    """Fill fresh memory, from Python and C++ alike, with NaN, so that reads of unwritten memory show."""
    from fastrlhf.ops import _backend, _library  # after TRITON_INTERPRET is set

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    # The C++ ops bypass torch's filling. In the host shim the sanitizer fills.
    poisons = not _backend._extension_error and "FASTRLHF_HOST_SHIM" not in os.environ
    assert not poisons or math.isnan(_library.poison_fresh_memory(True))
    yield
    if poisons:
        _library.poison_fresh_memory(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def harness(monkeypatch):
    """Of benchmarks/: (harness, cases, bench_losses, run), imported afresh."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_losses
    import run

    import cases
    import harness

    yield harness, cases, bench_losses, run
    modules = [f"bench_{m}" for m in ("losses", "sequence_ops", "token_logprob", "token_loss")]
    for name in (
        *modules,
        "bench_linear_logprob",
        "blocks",
        "cases",
        "gemm_bitwise",
        "roofline",
        "gpu_clock",
        "harness",
        "peers",
        "registry",
        "run",
    ):
        sys.modules.pop(name, None)


# Mostly compilation, or many drawn cases: not in the short run on a GPU.
COMPILED = ("compiles", "opcheck", "gradcheck", "test_any_")


# The longest files first, by their CPU time: one that starts last leaves the other processes without work.
LONG = ("aot", "cuda_on_host", "packaging", "conformance", "pytest_benchmark", "gpu_driver")
LONG += ("fsdp", "docs", "token_logprob", "triton_order", "triton_rows", "budgets")
LONG += ("ppo_loss", "benchmarks", "demo", "examples", "token_loss", "stages", "kl_gae")
LONG += ("oracles", "trl_runs")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config, items):
    """Long files first, nightly tests only where -m names them.

    Marks `gpu_quick`: every test of an op on a GPU's backend that is not COMPILED.
    """
    if "nightly" not in config.option.markexpr:
        late = [item for item in items if item.get_closest_marker("nightly")]
        config.hook.pytest_deselected(items=late)
        items[:] = [item for item in items if item not in set(late)]
    for item in items:
        backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
        if backend in ("cuda", "triton") and not any(word in item.name for word in COMPILED):
            item.add_marker("gpu_quick")
    place = {f"test_{name}": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


def pytest_collection_finish():
    """From here on the collector looks at the objects of the tests, not at those of the imports and the collection."""
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)  # nanobind counts what is left at the end of the process as leaks


def pytest_runtest_setup(item):
    """Past FASTRLHF_UNTIL (seconds since 1970) nothing starts, so that the report is still written."""
    until = os.environ.get("FASTRLHF_UNTIL")
    if until and time.time() > float(until):
        pytest.skip("no time was left")
