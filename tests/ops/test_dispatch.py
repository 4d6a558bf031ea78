"""The order of "auto" against its measurement, and proof of which kernel ran.

During each fused call every function of the reference raises, and kernels are counted where they start: C++ ops in
torch's dispatcher, Triton kernels at their launch, CUDA kernels on the device.
"""

import importlib
import inspect
import json
import re
from pathlib import Path

import pytest
import torch

import fastrlhf
from _support.host_shim import build
from _support.logit_cases import DEVICE
from _support.small_calls import small_call as call_on
from fastrlhf import reference
from fastrlhf.ops import _backend

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# The kernels of these are token_logprob's, on chunks of logits.
SERVED_BY = {
    "linear_logprob": "token_logprob",
    "linear_cross_entropy": "token_loss",
    "linear_ppo_loss": "token_loss",
    "linear_token_loss": "token_logprob",
}


def kernels_of(op, backend):
    """The names of the kernels that an op may start, as the sources have them."""
    word = SERVED_BY.get(op, op)
    if backend == "cuda":
        return build.kernels_reached(build.source_of(word))
    source = (ROOT / "kernels" / f"{word}.py").read_text()
    return set(re.findall(r"^@[^\n]+\ndef (\w+_kernel)\(", source, re.MULTILINE))


def small_call(op, backend):
    call_on(op, backend, DEVICE[backend])


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("op", fastrlhf.backends())
def test_every_op_has_kernels_to_look_for(op, backend):
    """The kernels that test_gpu expects on the device are defined and started in the sources."""
    names = kernels_of(op, backend)
    assert names
    files = (
        (ROOT / "csrc" / "cuda").glob("*.cu*")
        if backend == "cuda"
        else (ROOT / "kernels").glob("*.py")
    )
    sources = "".join(path.read_text() for path in files)
    for name in names:
        # A template is named with its arguments; another kernel is an argument of launch().
        started = rf"\b{name}<|launch\([^;]*\b{name}," if backend == "cuda" else rf"\b{name}\["
        assert re.search(started, sources), f"nothing starts {name}"


@pytest.fixture
def poisoned_reference(monkeypatch):
    """Every function of reference.py raises when it is called."""

    def poison(home, name):
        def refuse(*args, **kwargs):
            raise AssertionError(f"the reference ran: {name}")

        monkeypatch.setattr(home, name, refuse)

    for name, function in inspect.getmembers(reference, inspect.isfunction):
        if function.__module__.startswith(reference.__name__):  # not what it imports
            poison(reference, name)


@pytest.fixture
def interpreted(monkeypatch):
    """The list of (module, name) of the Triton kernels that the interpreter launches."""
    seen = []
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    launch = interpreter.GridExecutor.__call__

    def counting(self, *args, **kwargs):
        seen.append((self.fn.__module__, self.fn.__name__))
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counting)
    return seen


def profiled(call):
    """(C++ and Triton ops that torch dispatched, kernels that ran on a GPU) during `call()`."""
    with torch.profiler.profile(acc_events=True) as profile:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    events = profile.events()
    ops = {e.name.removeprefix("fastrlhf::") for e in events if e.name.startswith("fastrlhf::")}
    on_device = {e.name for e in events if e.device_type == torch.autograd.DeviceType.CUDA}
    return ops, on_device


@pytest.mark.parametrize("op", fastrlhf.backends())
class TestTheKernelThatClaimsToHaveRunDidRun:
    def test_cpu(self, op, poisoned_reference, interpreted):
        if reason := _backend.unavailable_reason(op, "cpu"):
            pytest.skip(reason)
        before = _backend.calls[op, "cpu"]
        ops, _ = profiled(lambda: small_call(op, "cpu"))
        word = SERVED_BY.get(op, op)
        assert any(name.startswith(word) for name in ops)
        assert not any("triton" in name for name in ops) and not interpreted
        assert _backend.calls[op, "cpu"] == before + 1

    @pytest.mark.parametrize("backend", ["triton", "cuda"])
    def test_gpu(self, op, backend, poisoned_reference):
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if reason := _backend.unavailable_reason(op, backend, "cuda"):
            pytest.skip(f"{backend}: {reason}")
        small_call(op, backend)  # Triton compiles
        ops, kernels = profiled(lambda: small_call(op, backend))
        word = SERVED_BY.get(op, op)
        assert any(name in seen for name in kernels_of(op, backend) for seen in kernels)
        of_op = {name for name in ops if name.startswith(word)}
        assert of_op and all(("triton" in name) == (backend == "triton") for name in of_op)

    def test_triton_interpreted(self, op, poisoned_reference, interpreted):
        if torch.cuda.is_available():
            pytest.skip("Triton compiles for the GPU of this machine: see test_gpu")
        if reason := _backend.unavailable_reason(op, "triton", "cpu"):
            pytest.skip(reason)
        before = _backend.calls[op, "triton"]
        small_call(op, "triton")
        file = f"fastrlhf.kernels.{SERVED_BY.get(op, op)}"
        assert any(module == file and name.endswith("_kernel") for module, name in interpreted)
        assert _backend.calls[op, "triton"] == before + 1

    def test_reference(self, op, interpreted):
        """It is plain PyTorch: no op of ours is dispatched."""
        ops, _ = profiled(lambda: small_call(op, "reference"))
        assert not ops and not interpreted

    def test_the_poison_kills(self, op, poisoned_reference):
        with pytest.raises(AssertionError, match="the reference ran"):
            small_call(op, "reference")


# ---------------------------------------------------------------------------------------------
# auto


# Newer than the file in RESULTS: `order` goes by expectation, and doctor says "not measured yet". The benchmark has
# their cases, so the next file ends this.
UNMEASURED = {"group_advantage"}


def test_table_covers_every_op_and_names_what_exists():
    measured = fastrlhf.backends().keys() - UNMEASURED
    assert set(_backend.AUTO) == {(op, d) for op in measured for d in ("cpu", "cuda")}
    for (_, device), entry in _backend.AUTO.items():
        assert set(entry.order) <= set(_backend.BACKENDS) and entry.order[-1] == "reference"
        assert ("cpu" in entry.order) == (device == "cpu")


def test_every_row_is_a_benchmark_case(monkeypatch):
    monkeypatch.syspath_prepend(str(RESULTS.parent))
    cases = importlib.import_module("cases")
    listed = {("cpu", c.op, c.name) for c in cases.CPU} | {
        ("cuda", c.op, c.name) for c in cases.GPU
    }
    for (op, device), entry in _backend.AUTO.items():
        assert (device, op, entry.row) in listed
    for device in ("cpu", "cuda"):
        assert {op for on, op, _ in listed if on == device} >= UNMEASURED


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_auto_takes_the_first_that_can_run(device, monkeypatch):
    for (op, on), entry in _backend.AUTO.items():
        if on != device:
            continue
        for first in entry.order:
            stopped = entry.order[: entry.order.index(first)]
            with monkeypatch.context() as patch:
                reason = lambda op, backend, device, no=stopped: "no" if backend in no else ""  # noqa: E731
                patch.setattr(_backend, "unavailable_reason", reason)
                assert _backend.auto(op, device) == first


def test_auto_without_a_fused_backend_warns_once_and_says_why(monkeypatch):
    gae = fastrlhf.gae  # importing its module registers its kernels
    monkeypatch.setitem(_backend._provided, "gae", frozenset())
    monkeypatch.setattr(_backend, "_extension_error", "it is not built")
    monkeypatch.setattr(_backend, "_warned", set())
    monkeypatch.setattr(_backend, "_chosen", {})
    with pytest.warns(UserWarning, match="gae: backend='auto' takes the reference.*not built") as w:
        for _ in range(2):
            gae(torch.zeros(2, 3), torch.zeros(2, 3))
    assert len(w) == 1
    assert w[0].filename == __file__


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_order_is_that_of_the_committed_measurement(device):
    """In the file that RESULTS names, each op's backends stand in AUTO's order, the fastest first."""
    documents = {p.name: json.loads(p.read_text()) for p in RESULTS.glob("*.json")}
    # One that is not whole (a short run on a GPU, or a probe) lacks rows of some ops.
    files = {
        name for name, d in documents.items() if d["device"] == device and d.get("whole", True)
    }
    file = _backend.RESULTS[device]
    if not file:
        assert not files, (
            f"RESULTS[{device!r}] in fastrlhf/ops/_backend.py must name one of {files}"
        )
        pytest.skip(f"no whole results file for {device} is committed yet")
    assert file in files
    rows = documents[file]["rows"]
    measured = {row["op"] for row in rows} & UNMEASURED
    assert not measured, f"{measured} belong in AUTO: {file} has them"
    for (op, on), entry in _backend.AUTO.items():
        if on != device:
            continue
        measured = {}
        for row in rows:
            if (row["op"], row["case"]) == (op, entry.row) and "median_ms" in row:
                backend = {"eager": "reference"}.get(row["provider"], row["provider"])
                measured.setdefault(row["direction"], {})[backend] = row["median_ms"]
        assert measured, f"{file} has no row of {op} at {entry.row}"
        # The longest direction there is: forward+backward where the op is differentiable.
        took = measured.get("forward+backward") or measured["forward"]
        order = [backend for backend in entry.order if backend in took]
        assert order == sorted(order, key=took.get), (op, took)
