"""GPU clocks: device time between events, device time of a replayed CUDA graph, host time.

A call whose arguments fit into the L2 cache is captured many times into one CUDA graph. Successive calls of the
graph rotate over copies of the arguments that together exceed the cache; replaying a single set of buffers would
measure the cache, and events around a call of microseconds would measure its launch. A larger call is timed between
two events, with the cache overwritten before it.
"""

import gc
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import harness
from harness import Problem, Provider

CALLS = 64  # per graph, if the host captures them within CAPTURE_SECONDS
MAX_CALLS = 512
CAPTURE_SECONDS = 0.5
HOST_SECONDS = 0.02
SLOW = 0.1  # seconds; a longer call is timed once and not captured


def cache_bytes() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def set_bytes(args: dict) -> int:
    """Bytes of the tensors in a set of arguments."""
    return sum(x.numel() * x.element_size() for x in args.values() if isinstance(x, Tensor))


def buffer_sets(args: dict, cache: int) -> int:
    """Number of copies of the arguments that together hold twice the cache; 1 if one set does."""
    return -(-2 * cache // max(set_bytes(args), 1))


def copies(args: dict, count: int) -> list[dict]:
    """`count` sets of the arguments; the first is `args` itself."""
    found = [args]
    while len(found) < count:
        own = {}
        for name, x in args.items():
            if isinstance(x, Tensor):
                x = x.detach().clone().requires_grad_(x.requires_grad)
            own[name] = x
        found.append(own)
    return found


def host_seconds(step: Callable, device_seconds: float) -> float:
    """Host time of a call: enqueue calls without waiting, few enough not to fill the launch queue."""
    count = min(50, max(1, int(HOST_SECONDS / max(device_seconds, 1e-6))))
    taken = []
    for _ in range(1 if device_seconds > SLOW else 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            step()
        taken.append((time.perf_counter() - start) / count)
    torch.cuda.synchronize()
    return statistics.median(taken)


def waits(step: Callable) -> str:
    """The host sync that prevents a capture, or "". Checked first: a failed capture breaks torch's allocator."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return ""


class Replay:
    """A CUDA graph of `calls` calls that rotate over `sets` of arguments.

    The graph keeps every result, so that no call overwrites the output of another.
    """

    def __init__(
        self, problem: Problem, provider: Provider, direction: str, sets: list[dict], calls: int
    ):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # autograd runs a backward on the stream of its forward
            steps = [harness.step(problem, provider, direction, args) for args in sets]
            steps[0]()
        torch.cuda.synchronize()
        self.graph, self.calls, self.steps = torch.cuda.CUDAGraph(), calls, steps
        # Unlike torch.cuda.graph, do not collect garbage before a capture (0.1 s each). Nor during it: that could
        # free another graph.
        gc.disable()
        try:
            with torch.cuda.stream(stream):
                self.graph.capture_begin()
                try:
                    self.kept = [steps[i % len(steps)]() for i in range(calls)]
                finally:
                    self.graph.capture_end()
        finally:
            gc.enable()
        torch.cuda.synchronize()

    def __call__(self) -> None:
        self.graph.replay()


def capture(
    problem: Problem,
    provider: Provider,
    direction: str,
    step: Callable,
    seconds: float,
    host: float,
) -> Replay | str:
    """The call as a graph, or the reason why it has none. `seconds`, `host`: its device and host time."""
    if seconds > SLOW:
        return f"a call takes longer than {SLOW} s"
    if reason := waits(step):
        return reason
    wanted = buffer_sets(problem.args, cache_bytes())
    most = min(MAX_CALLS, max(1, int(CAPTURE_SECONDS / max(host, 1e-6))))
    sets = copies(problem.args, min(wanted, most))
    calls = max(len(sets), min(CALLS, most)) if wanted > 1 else 1
    try:
        return Replay(problem, provider, direction, sets, calls)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]


def measure(
    problem: Problem,
    found: dict[str, Provider],
    steps: dict[str, Callable],
    direction: str,
    seconds: float,
) -> dict[str, dict]:
    """Provider -> median_ms (device time), timed_by, events_ms, graph_ms, host_ms, peak_bytes, beyond_bytes.

    A call that cannot be captured has `no_graph`, the reason, instead of graph_ms; its median_ms is between events.
    """
    events = harness.times(steps, "cuda", seconds, slow=SLOW)
    small, rows = buffer_sets(problem.args, cache_bytes()) > 1, {}
    replays: dict[str, Replay] = {}
    graphs: dict[str, list[float]] = {}
    for name, provider in found.items():
        took = statistics.median(events[name])
        host = host_seconds(steps[name], took)
        row = rows[name] = {"timed_by": "events", "events_ms": 1e3 * took, "host_ms": 1e3 * host}
        row |= harness.memory(steps[name], "cuda")
        replay = capture(problem, provider, direction, steps[name], took, host)
        if isinstance(replay, str):
            row["no_graph"] = replay
            continue
        row["buffer_sets"] = len(replay.steps)
        if small:
            replays[name] = replay
        else:  # one graph at a time: each holds as much memory as the call
            graphs[name] = [harness.sample(replay, "cuda", cold=True) for _ in range(3)]
        del replay
    # The flush before a replay also keeps the device busy until the host has launched the graph.
    graphs |= harness.times(replays, "cuda", seconds)
    for name, row in rows.items():
        samples = events[name]
        if name in graphs:
            calls = replays[name].calls if name in replays else 1
            graph = [s / calls for s in graphs[name]]
            row["graph_ms"] = 1e3 * statistics.median(graph)
            if name in replays:
                samples, row["timed_by"] = graph, "graph"
                if row["buffer_sets"] * set_bytes(problem.args) < cache_bytes():
                    row["in_cache"] = True
        row |= harness.quantiles(samples)
    return rows


# ---- pytest-benchmark


class EventTimer:
    """A timer for pytest-benchmark that reads the device clock, in seconds per call.

    The first reading after `restart` is 0 and does not wait for the device, so the target is enqueued behind the
    flush. Later readings are relative to it: elapsed_time is a float32 in milliseconds, which resolves a
    microsecond only within seconds of its start event. Restart it before each round.
    """

    __name__ = "device_events"  # in pytest-benchmark's JSON

    def __init__(self):
        self.restart()

    def restart(self, calls: int = 1) -> None:
        """`calls`: calls per round, by which readings are divided."""
        self._calls, self._start = calls, None

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        if self._start is None:
            self._start = event
            return 0.0
        event.synchronize()
        return self._start.elapsed_time(event) / 1e3 / self._calls


def run_rounds(
    benchmark,
    timer: EventTimer,
    problem: Problem,
    provider: Provider,
    direction: str,
    seconds: float,
    least: int = 5,
) -> dict:
    """Run the rounds of a pytest-benchmark fixture whose timer is `timer`: at least `least`, for about `seconds`.

    Returns timed_by ("graph" or "events"), host_ms, and per case buffer_sets or no_graph.
    """
    step = harness.step(problem, provider, direction)
    step()
    took = harness.sample(step, "cuda", cold=True)
    host = host_seconds(step, took)
    target, calls, found = step, 1, {"timed_by": "events", "host_ms": 1e3 * host}
    if buffer_sets(problem.args, cache_bytes()) > 1:
        replay = capture(problem, provider, direction, step, took, host)
        if isinstance(replay, str):
            found["no_graph"] = replay
        else:
            target, calls = replay, replay.calls
            found |= {"timed_by": "graph", "buffer_sets": len(replay.steps)}
            if len(replay.steps) * set_bytes(problem.args) < cache_bytes():
                found["in_cache"] = True

    def setup() -> None:
        harness.flush("cuda")
        timer.restart(calls)

    rounds = max(least, min(500, int(seconds / max(took * calls, 1e-3))))
    benchmark.pedantic(target, setup=setup, rounds=rounds, iterations=1, warmup_rounds=1)
    return found
