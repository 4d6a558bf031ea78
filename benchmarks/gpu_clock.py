"""Time on a GPU, three ways: the device's, the host's, and a replayed graph's.

A call that moves less than the L2 cache holds is timed by a CUDA graph of many calls, each on buffers of its
own which together exceed the cache: a replay on one set of buffers measures the cache, and events around a
call measure the host where it takes longer than the device. A larger call is timed between events, with the
cache overwritten before it.
"""

import gc
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import harness
from harness import Problem, Provider

CALLS = 64  # of a graph, where the host can capture them in CAPTURE_SECONDS
MAX_CALLS = 512
CAPTURE_SECONDS = 0.5
HOST_SECONDS = 0.02
SLOW = 0.1  # seconds: a longer call is timed once, and not as a graph


def cache_bytes() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def set_bytes(args: dict) -> int:
    """Bytes of a set of arguments: its tensors."""
    return sum(x.numel() * x.element_size() for x in args.values() if isinstance(x, Tensor))


def buffer_sets(args: dict, cache: int) -> int:
    """How many copies of the arguments together hold twice the cache; 1 where one does."""
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
    """What a call keeps the CPU busy: enqueued without waiting, few enough calls for the queue."""
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
    """Why a call cannot be captured: where it makes the host wait for the device. Empty: nowhere.

    Asked before a capture, for one that fails leaves the allocator in a state that no call ends.
    """
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
    """A CUDA graph of `calls` calls, in turns on each set of arguments.

    What the calls return is kept, so that none writes where another did.
    """

    def __init__(
        self, problem: Problem, provider: Provider, direction: str, sets: list[dict], calls: int
    ):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # a backward runs on the stream of its forward
            steps = [harness.step(problem, provider, direction, args) for args in sets]
            steps[0]()
        torch.cuda.synchronize()
        self.graph, self.calls, self.steps = torch.cuda.CUDAGraph(), calls, steps
        # torch.cuda.graph collects all garbage before each capture, which takes 0.1 s. Here none is collected
        # during it, for what it freed might be another graph.
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


def measure(
    problem: Problem,
    found: dict[str, Provider],
    steps: dict[str, Callable],
    direction: str,
    seconds: float,
) -> dict[str, dict]:
    """Per provider: median_ms of the device and how it was taken, graph_ms, host_ms, peak_bytes, beyond_bytes.

    What cannot be captured has no graph_ms, and `no_graph` says why; its median_ms is then between events.
    """
    events = harness.times(steps, "cuda", seconds, slow=SLOW)
    wanted, rows = buffer_sets(problem.args, cache_bytes()), {}
    replays: dict[str, Replay] = {}
    graphs: dict[str, list[float]] = {}
    for name, provider in found.items():
        took = statistics.median(events[name])
        row = rows[name] = {"timed_by": "events", "events_ms": 1e3 * took}
        row["host_ms"] = 1e3 * host_seconds(steps[name], took)
        row |= harness.memory(steps[name], "cuda")
        if took > SLOW:
            row["no_graph"] = f"a call takes longer than {SLOW} s"
            continue
        if reason := waits(steps[name]):
            row["no_graph"] = reason
            continue
        most = min(MAX_CALLS, max(1, int(1e3 * CAPTURE_SECONDS / max(row["host_ms"], 1e-3))))
        sets = copies(problem.args, min(wanted, most))
        calls = max(len(sets), min(CALLS, most)) if wanted > 1 else 1
        try:
            replay = Replay(problem, provider, direction, sets, calls)
        except Exception as error:
            row["no_graph"] = f"{type(error).__name__}: {error}"[:300]
            continue
        row["buffer_sets"] = len(sets)
        if wanted > 1:
            replays[name] = replay
        else:  # one at a time: each holds as much memory as the call
            graphs[name] = [harness.sample(replay, "cuda", cold=True) for _ in range(3)]
            del replay
    # The overwriting of the cache before a replay keeps the device busy until the graph is there.
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
