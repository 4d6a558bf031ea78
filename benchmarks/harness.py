"""Timing, the correctness gate and the floor: everything that is the same for every op.

A number is only given where the result is right: each provider's values and gradients are compared with
the reference in fp64, and must be within twice eager's own error. Providers take turns sample by sample,
so that a machine that slows down slows all of them. The yardsticks of a problem (a plain read of its
input, say) take turns with them, and are not compared with anything.
"""

import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import fastrlhf
from fastrlhf import reference

SHORT = 0.01  # seconds: a shorter call is warmed up by WARM calls before each sample
WARM = 3
LONG = 1.0  # seconds


@dataclass
class Problem:
    """One op at one shape: its keyword arguments, and the bytes and FLOPs its definition must move."""

    op: str
    args: dict
    wrt: tuple[str, ...] = ()  # arguments that want gradients
    forward_bytes: int = 0
    backward_bytes: int = 0
    forward_flops: int = 0
    backward_flops: int = 0
    floor_note: str = ""
    seconds: float = 2.0  # to spend on each direction, all providers together
    compiled: bool = False  # torch.compile can take the eager definition whole, in seconds
    backward_alone: bool = False  # the backward is work of its own, and timed on its own
    peers: dict[str, Callable] = field(default_factory=dict)  # other people's, called as the op is
    yardsticks: dict[str, Callable] = field(default_factory=dict)  # called with nothing
    full_yardsticks: dict[str, Callable] = field(default_factory=dict)  # beside forward+backward
    # Direction -> bytes that our backends may hold at the peak of a call, its outputs with them.
    peak_limits: dict[str, int] = field(default_factory=dict)
    ones: bool = False  # upstream gradients of ones, as of a sum; else random
    upstream: list[Tensor] = field(default_factory=list)
    raised: dict[str, str] = field(
        default_factory=dict
    )  # provider -> the error it gave at the gate

    def call(self, function: Callable, args: dict | None = None, **more) -> list[Tensor]:
        """Call an implementation and return its tensors, without the metrics."""
        out = function(**(args or self.args), **more)
        out = out if isinstance(out, tuple) else (out,)
        return [x for x in out if isinstance(x, Tensor)]

    def doubled(self) -> dict:
        """The arguments in fp64: the truth's."""
        return {
            k: v.detach().double().requires_grad_(k in self.wrt)
            if isinstance(v, Tensor) and v.is_floating_point()
            else v
            for k, v in self.args.items()
        }


def prepare(problem: Problem) -> Problem:
    """Mark what wants gradients and draw the upstream gradients, the same for every provider."""
    for name in problem.wrt:
        problem.args[name].requires_grad_()
    if problem.wrt:
        outputs = problem.call(getattr(reference, problem.op))
        generator = torch.Generator(outputs[0].device).manual_seed(1)
        problem.upstream = [
            torch.ones_like(o)
            if problem.ones
            else torch.randn(o.shape, generator=generator, device=o.device).to(o.dtype)
            for o in outputs
            if o.requires_grad
        ]
    return problem


def gradients(
    problem: Problem, outputs: list[Tensor], args: dict, retain_graph: bool = False
) -> tuple[Tensor, ...]:
    outputs = [o for o in outputs if o.requires_grad]
    upstream = [g.to(o.dtype) for g, o in zip(problem.upstream, outputs, strict=True)]
    wanted = [args[name] for name in problem.wrt]
    return torch.autograd.grad(outputs, wanted, upstream, retain_graph=retain_graph)


def providers(problem: Problem, compiled: bool) -> dict[str, Callable]:
    """Name -> function: eager, torch.compile of it, the peers, and ours on each backend here."""
    eager = getattr(reference, problem.op)
    found = {"eager": eager}
    if compiled and problem.compiled:
        found["torch.compile"] = torch.compile(eager, fullgraph=True, dynamic=False)
    found |= problem.peers
    op = getattr(fastrlhf, problem.op)
    device = next(v.device.type for v in problem.args.values() if isinstance(v, Tensor))
    for backend, state in fastrlhf.backends()[problem.op].items():
        if backend == "reference" or (backend == "cpu") != (device == "cpu"):
            continue
        if state == "available":
            found[backend] = lambda backend=backend, **args: op(**args, backend=backend)
    return found


def errors(problem: Problem, found: dict[str, Callable]) -> dict[str, float]:
    """Per provider, the largest error against fp64, as a share of what is allowed (1 = the bar)."""
    doubled = problem.doubled()
    eager = getattr(reference, problem.op)
    truth = problem.call(eager, doubled)
    if problem.wrt:
        truth += gradients(problem, truth, doubled)
    measured = {}
    for name, function in found.items():
        try:
            outputs = problem.call(function)
            if problem.wrt:
                outputs += gradients(problem, outputs, problem.args)
        except Exception as error:
            if name == "eager":
                raise
            problem.raised[name] = f"{type(error).__name__}: {error}"
            outputs = [torch.full_like(t, math.nan) for t in truth]
        measured[name] = [
            (o.double() - t).abs().max().item() for o, t in zip(outputs, truth, strict=True)
        ]
    # The floor of the bar is a few roundings of the largest value, in the type it is returned in.
    floors = [8 * torch.finfo(torch.float32).eps * t.abs().max().clamp(min=1).item() for t in truth]
    bars = [2 * e + f for e, f in zip(measured["eager"], floors, strict=True)]
    return {
        name: max(e / bar if e == e else float("inf") for e, bar in zip(errs, bars, strict=True))
        for name, errs in measured.items()
    }


def sample(function: Callable, device: str) -> float:
    """Seconds of one call; on a GPU between events, after the L2 cache has been overwritten."""
    if device == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    torch.empty(2**28, dtype=torch.int8, device=device).zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def times(functions: dict[str, Callable], device: str, seconds: float) -> dict[str, list[float]]:
    """Samples per provider, in turns, until `seconds` are spent; at least 5 each (3 where a turn takes
    longer than LONG), at most 500.

    On the CPU a short call is made a few times more, untimed, before it is timed: what the provider before
    it left in the caches and in the allocator is not its cost. (On a GPU the L2 cache is emptied instead.)
    """
    again, turn_seconds = set(), 0.0
    for name, function in functions.items():
        took = sample(function, device)
        if took < LONG:
            took = sample(function, device)
        if took < SHORT and device == "cpu":
            again.add(name)
        turn_seconds += took
    least = 3 if turn_seconds > LONG else 5
    taken: dict[str, list[float]] = {name: [] for name in functions}
    start = time.perf_counter()
    for turn in range(500):
        if turn >= least and time.perf_counter() - start > seconds:
            break
        for name, function in functions.items():
            for _ in range(WARM if name in again else 0):
                function()
            taken[name].append(sample(function, device))
    return taken


def peak_bytes(function: Callable, device: str) -> int:
    """Bytes that torch's allocator handed out and had not got back, at the peak of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()  # negative where memory is given back
            peak = max(peak, held)
    return peak


def quantiles(samples: list[float]) -> dict[str, float]:
    """Median, 20 % and 80 % of samples, in milliseconds."""
    ordered = sorted(samples)
    pick = lambda q: ordered[round(q * (len(ordered) - 1))] * 1e3  # noqa: E731
    median = statistics.median(ordered) * 1e3
    return {"median_ms": median, "p20_ms": pick(0.2), "p80_ms": pick(0.8), "samples": len(ordered)}


def measure_floor(device: str, quick: bool = False) -> dict[str, float]:
    """This machine's own limits: bytes/s of a large copy, FLOP/s of a large matrix product."""
    size, n = (2**26, 2048) if device == "cpu" else (2**29, 8192)
    seconds = 1.0
    if quick:
        size, n, seconds = 2**20, 256, 0.05
    source = torch.empty(size, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    copy = statistics.median(times({"copy": lambda: target.copy_(source)}, device, seconds)["copy"])
    rates = {"copy_bytes_per_s": 2 * 4 * size / copy}
    for dtype in (torch.float32, torch.bfloat16):
        if device == "cpu" and dtype != torch.float32:
            continue
        a = torch.randn(n, n, device=device).to(dtype)
        gemm = statistics.median(times({"mm": lambda a=a: a @ a}, device, seconds)["mm"])
        rates[f"gemm_{str(dtype)[6:]}_flop_per_s"] = 2 * n**3 / gemm
    return rates


def machine(device: str) -> dict:
    """What a reader needs to know of the machine and the software."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text().splitlines()
        cpu = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), cpu)
    try:
        from fastrlhf import _C

        extension = _C.build_info()
    except ImportError:
        extension = None
    return {
        "name": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "fastrlhf": fastrlhf.__version__,
        "extension": extension,
    }
