"""GPU timing without a GPU, on the fake device of _support/fake_clock.py."""

import sys
import types

import pytest
import torch

from _support import fake_clock
from _support.bench_problems import BENCHMARKS
from _support.fake_clock import CACHE, FLUSH

MODULES = ("bench_losses", "cases", "gpu_clock", "harness", "peers", "registry", "roofline", "run")


@pytest.fixture
def device(monkeypatch):
    """The fake device, and the modules of benchmarks/ that run on it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_losses
    import run

    import cases
    import gpu_clock
    import harness

    state = fake_clock.install(monkeypatch.setattr, harness)
    state.harness, state.clock, state.run = harness, gpu_clock, run
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
    """Calls rotate over buffers of twice the cache; the time is that of one call."""
    problem, seen = problem_of(device, CACHE // 4), []
    row = measure(device, problem, {"ours": provider(device, 20e-6, seen)})["ours"]
    captured = [at for capturing, at in seen if capturing]
    assert len(captured) == device.clock.CALLS and len(set(captured)) == 8
    assert 8 * device.clock.set_bytes(problem.args) == 2 * CACHE
    assert captured[:8] == captured[8:16]  # rotating
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
    # Each sample has its flush, which is not timed.
    assert device.now > FLUSH * row["samples"]


def test_a_graph_keeps_its_outputs_so_that_none_is_overwritten(device):
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
    """A failed capture would break the allocator for the rest of the process."""
    problem = problem_of(device, CACHE // 4)
    found = {"waits": provider(device, 1e-3, syncs=True), "ours": provider(device, 1e-3)}
    rows = measure(device, problem, found)
    assert rows["waits"]["no_graph"] == "called a synchronizing CUDA operation"
    assert rows["waits"]["timed_by"] == "events" and "graph_ms" not in rows["waits"]
    assert rows["ours"]["timed_by"] == "graph" and device.sync_mode == 0
    assert len(device.graphs) == 1


def test_a_failed_capture_does_not_stop_the_others(device):
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
    assert len(seen) == 3 and row["peak_bytes"] == 7  # one sample, host time, memory


def test_few_tiny_buffers_stay_in_the_cache_and_the_row_says_so(device, monkeypatch):
    monkeypatch.setattr(device.clock, "MAX_CALLS", 4)
    problem = problem_of(device, CACHE // 64)
    row = measure(device, problem, {"ours": provider(device, 1e-6)})["ours"]
    assert row["buffer_sets"] == 4 and row["in_cache"] is True


def test_rows_of_an_op_on_a_gpu(device):
    """The code path of a GPU from the case to the rows, with forward, backward and gradients."""
    case = device.cases.Case("ppo_loss", "t", "float32", {"B": 16, "T": 64})

    def make(case, on):
        assert on == "cuda"
        problem = device.losses.ppo_loss(case, "cpu")
        problem.seconds = 0.0
        return problem

    roofline = {"copy_bytes_per_s": 1e12, "gemm_float32_flop_per_s": 1e12}
    found = device.harness.providers

    def timed(call):
        def run(**args):
            device.work(50e-6)
            return call(**args)

        return run

    def with_time(problem, compiled):
        these = found(problem, compiled)
        return {n: device.harness.Provider(timed(p.call), ours=p.ours) for n, p in these.items()}

    device.harness.providers = with_time
    rows = device.run.bench_op(case, make, "cuda", roofline, compiled=False)
    assert {r["direction"] for r in rows} == {"forward", "forward+backward"}
    for row in rows:
        assert row["timed_by"] == "graph" and row["median_ms"] == pytest.approx(0.05)
        assert row["fraction_of_roofline"] == pytest.approx(row["roofline_ms"] / 0.05)
        assert row["error_share_of_bar"] <= 1 and row["host_ms"] > 0 and "cold_ms" not in row


def fixture_of(timer):
    """A real fixture of pytest-benchmark, outside a session."""
    fixture = pytest.importorskip("pytest_benchmark.fixture")
    from pytest_benchmark.utils import NameWrapper

    collected = []
    node = types.SimpleNamespace(name="n", nodeid="n")
    options = dict.fromkeys(("precision", "confidence", "warmup", "cprofile", "cprofile_loops"))
    benchmark = fixture.BenchmarkFixture(
        node,
        timer=NameWrapper(timer),
        disable_gc=False,
        min_rounds=5,
        min_time=0,
        max_time=1,
        warmup_iterations=0,
        calibration_precision=1,
        add_stats=collected.append,
        logger=None,
        warner=None,
        disabled=False,
        cprofile_dump=None,
        **options,
    )
    return benchmark, collected


def rounds_of(device, problem, provider_, **more):
    timer = device.clock.EventTimer()
    benchmark, collected = fixture_of(timer)
    found = device.clock.run_rounds(benchmark, timer, problem, provider_, "forward", **more)
    (metadata,) = collected
    return found, metadata.stats.data


def test_pytest_benchmark_times_a_small_call_by_replays(device):
    """The time is that of one call of the graph, without the flush that precedes each round."""
    problem, seen = problem_of(device, CACHE // 4), []
    found, times = rounds_of(device, problem, provider(device, 20e-6, seen), seconds=0.0)
    assert found["timed_by"] == "graph" and found["buffer_sets"] == 8 and "in_cache" not in found
    assert times == [pytest.approx(20e-6)] * 5
    (graph,) = device.graphs
    assert graph.replays == 6  # the first round is a warm-up
    assert len({at for capturing, at in seen if capturing}) == 8


def test_pytest_benchmark_times_a_large_call_between_events(device):
    problem, seen = problem_of(device, 2 * CACHE), []
    found, times = rounds_of(device, problem, provider(device, 3e-3, seen), seconds=0.03, least=2)
    assert found["timed_by"] == "events" and device.graphs == []
    assert times == [pytest.approx(3e-3)] * 10  # as many as fill the time
    assert device.now > FLUSH * len(times)  # L2 was overwritten before each


def test_pytest_benchmark_says_why_a_small_call_has_no_graph(device):
    problem = problem_of(device, CACHE // 4)
    found, times = rounds_of(device, problem, provider(device, 1e-3, syncs=True), seconds=0.0)
    assert found["no_graph"] == "called a synchronizing CUDA operation"
    assert found["timed_by"] == "events" and times == [pytest.approx(1e-3)] * 5


def test_the_timer_does_not_lose_microseconds_after_an_hour(device):
    """elapsed_time is a float32 in which 20 us vanish next to an hour, hence the restart before each round."""
    event = torch.cuda.Event
    exact = event.elapsed_time
    event.elapsed_time = lambda self, other: torch.tensor(exact(self, other)).float().item()
    device.now = 3600.0
    timer = device.clock.EventTimer()
    assert timer() == 0.0
    device.now += 3600.0
    before = timer()
    device.now += 20e-6
    assert timer() - before == 0.0  # lost
    timer.restart()
    before = timer()
    device.now += 20e-6
    assert timer() - before == pytest.approx(20e-6, rel=1e-3)
