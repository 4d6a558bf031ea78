"""GPU times without a GPU: torch.cuda's clock, streams and graphs are replaced by ones that count.

The device of these tests is a clock: a call of a provider takes as long as its name says, a flush of the
caches takes FLUSH, and only what stands between two events is timed.
"""

import contextlib
import sys
import types
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MODULES = ("bench_losses", "cases", "floor", "gpu_clock", "harness", "peers", "run")
CACHE, FLUSH = 2**20, 1.0


@pytest.fixture
def device(monkeypatch):
    """The device: its clock, what was captured, and the modules of benchmarks/ on top of it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_losses
    import run

    import cases
    import gpu_clock
    import harness

    state = types.SimpleNamespace(
        now=0.0, capturing=None, graphs=[], sync_mode=0, stream=None, syncs=0
    )

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = state.now

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return 1e3 * (other.at - self.at)

    class Graph:
        def __init__(self):
            self.seconds, self.replays = 0.0, 0
            state.graphs.append(self)

        def capture_begin(self):
            assert state.stream is not None, "a capture needs a stream of its own"
            state.capturing = self

        def capture_end(self):
            state.capturing = None

        def replay(self):
            self.replays += 1
            state.now += self.seconds

    class Stream:
        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def stream(which):
        state.stream = which
        yield
        state.stream = None

    def synchronize():
        assert state.capturing is None
        state.syncs += 1

    cuda = {
        "Event": Event,
        "CUDAGraph": Graph,
        "Stream": Stream,
        "stream": stream,
        "current_stream": Stream,
        "synchronize": synchronize,
        "current_device": lambda: 0,
        "get_device_properties": lambda index: types.SimpleNamespace(L2_cache_size=CACHE),
        "get_sync_debug_mode": lambda: state.sync_mode,
        "set_sync_debug_mode": lambda mode: setattr(state, "sync_mode", mode),
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 7,
        "reset_peak_memory_stats": lambda: None,
        "empty_cache": lambda: None,
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)

    def flush(device):
        assert device == "cuda" and state.capturing is None
        state.now += FLUSH

    def work(seconds):
        """What a kernel does: it takes time, or becomes a part of the graph that is captured."""
        if state.capturing is not None:
            state.capturing.seconds += seconds
        else:
            state.now += seconds

    monkeypatch.setattr(harness, "flush", flush)
    state.work, state.harness, state.clock, state.run = work, harness, gpu_clock, run
    state.cases, state.losses = cases, bench_losses
    yield state
    for name in MODULES:
        sys.modules.pop(name, None)


def problem_of(device, bytes_of_args):
    args = {"x": torch.zeros(bytes_of_args // 4)}
    return device.harness.Problem("kl_reward", args)


def provider(device, seconds, seen=None, syncs=False):
    def call(x):
        if syncs and device.sync_mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation\nand more")
        if seen is not None:
            seen.append((device.capturing is not None, x.data_ptr()))
        device.work(seconds)
        return x + 0

    return device.harness.Provider(call)


def measure(device, problem, found):
    steps = {n: device.harness.step(problem, p, "forward") for n, p in found.items()}
    return device.clock.measure(problem, found, steps, "forward", 0.0)


def test_a_small_call_is_timed_by_a_graph_over_more_than_the_cache(device):
    """Buffers of its own for each call until twice the cache is passed; the time is one call's."""
    problem, seen = problem_of(device, CACHE // 4), []
    row = measure(device, problem, {"ours": provider(device, 20e-6, seen)})["ours"]
    captured = [at for capturing, at in seen if capturing]
    assert len(captured) == device.clock.CALLS and len(set(captured)) == 8
    assert 8 * device.clock.set_bytes(problem.args) == 2 * CACHE
    assert captured[:8] == captured[8:16]  # in turns
    assert row["timed_by"] == "graph" and row["buffer_sets"] == 8
    for key in ("median_ms", "graph_ms", "events_ms"):
        assert row[key] == pytest.approx(0.02)
    assert "in_cache" not in row and row["peak_bytes"] == 7 and row["host_ms"] > 0
    assert all(graph.replays >= 5 for graph in device.graphs)


def test_a_large_call_is_timed_between_events_with_the_cache_overwritten(device):
    problem, seen = problem_of(device, 2 * CACHE), []
    row = measure(device, problem, {"ours": provider(device, 3e-3, seen)})["ours"]
    assert row["timed_by"] == "events" and row["median_ms"] == pytest.approx(3.0)
    assert row["buffer_sets"] == 1 and row["graph_ms"] == pytest.approx(3.0)
    assert sum(capturing for capturing, _ in seen) == 1
    # Each sample has its flush, outside of what is timed.
    assert device.now > FLUSH * row["samples"]


def test_the_outputs_of_a_graph_are_kept_so_that_none_is_written_over(device):
    problem = problem_of(device, CACHE // 4)
    sets = device.clock.copies(problem.args, 3)
    call = provider(device, 1e-6)
    replay = device.clock.Replay(problem, call, "forward", sets, calls=5)
    assert len(replay.kept) == 5 and len({out.data_ptr() for out in replay.kept}) == 5


def test_copies_keep_gradients_and_what_is_no_tensor(device):
    args = {"x": torch.ones(3, requires_grad=True), "n": torch.tensor([1]), "beta": 0.5}
    first, second = device.clock.copies(args, 2)
    assert first is args and second["beta"] == 0.5
    assert second["x"].requires_grad and second["x"].is_leaf and not second["n"].requires_grad
    assert second["x"].data_ptr() != args["x"].data_ptr() and torch.equal(second["x"], args["x"])


def test_a_call_that_waits_for_the_device_is_not_captured(device):
    """A capture that fails would leave the allocator in a state that nothing ends."""
    problem = problem_of(device, CACHE // 4)
    found = {"waits": provider(device, 1e-3, syncs=True), "ours": provider(device, 1e-3)}
    rows = measure(device, problem, found)
    assert rows["waits"]["no_graph"] == "called a synchronizing CUDA operation"
    assert rows["waits"]["timed_by"] == "events" and "graph_ms" not in rows["waits"]
    assert rows["ours"]["timed_by"] == "graph" and device.sync_mode == 0
    assert len(device.graphs) == 1


def test_a_capture_that_fails_stops_nobody_else(device):
    def call(x):
        if device.capturing is not None:
            raise RuntimeError("operation not permitted")
        device.work(1e-3)
        return x + 0

    problem = problem_of(device, CACHE // 4)
    found = {"broken": device.harness.Provider(call), "ours": provider(device, 1e-3)}
    rows = measure(device, problem, found)
    assert "not permitted" in rows["broken"]["no_graph"] and rows["broken"]["median_ms"] > 0
    assert rows["ours"]["timed_by"] == "graph" and device.capturing is None


def test_a_very_slow_call_is_timed_once(device):
    problem, seen = problem_of(device, 2 * CACHE), []
    slow = 1.5 * device.clock.SLOW
    row = measure(device, problem, {"eager": provider(device, slow, seen)})["eager"]
    assert row["samples"] == 1 and row["median_ms"] == pytest.approx(1e3 * slow)
    assert len(seen) == 3 and row["peak_bytes"] == 7  # its sample, the host's time and its memory


def test_few_tiny_buffers_stay_in_the_cache_and_the_row_says_so(device, monkeypatch):
    monkeypatch.setattr(device.clock, "MAX_CALLS", 4)
    problem = problem_of(device, CACHE // 64)
    row = measure(device, problem, {"ours": provider(device, 1e-6)})["ours"]
    assert row["buffer_sets"] == 4 and row["in_cache"] is True


def test_rows_of_an_op_on_a_gpu(device):
    """The same code path as on a GPU, from the case to the rows, with forward, backward and gradients."""
    case = device.cases.Case("ppo_loss", "t", "float32", {"B": 16, "T": 64})

    def make(case, on):
        assert on == "cuda"
        problem = device.losses.ppo_loss(case, "cpu")
        problem.seconds = 0.0
        return problem

    floor = {"copy_bytes_per_s": 1e12, "gemm_float32_flop_per_s": 1e12}
    found = device.run.providers

    def timed(call):
        def run(**args):
            device.work(50e-6)
            return call(**args)

        return run

    def with_time(problem, compiled):
        these = found(problem, compiled)
        return {n: device.harness.Provider(timed(p.call), ours=p.ours) for n, p in these.items()}

    device.run.providers = with_time
    rows = device.run.bench_op(case, make, "cuda", floor, compiled=False)
    assert {r["direction"] for r in rows} == {"forward", "forward+backward"}
    for row in rows:
        assert row["timed_by"] == "graph" and row["median_ms"] == pytest.approx(0.05)
        assert row["fraction_of_floor"] == pytest.approx(row["floor_ms"] / 0.05)
        assert row["error_share_of_bar"] <= 1 and row["host_ms"] > 0 and "cold_ms" not in row
