"""Problems, their providers, the correctness gate and timing: what is the same for every op.

A number is only given where the result is right: each provider's values and gradients are compared with
the reference in fp64, and must be within twice eager's own error. Providers take turns sample by sample,
so that a machine that slows down slows all of them. The yardsticks of a problem (a plain read of its
input, say) take turns with them, and are not compared with anything; those that do known work are
ceilings of the floor (`floor.py`), as the machine's own copy and matrix product are.
"""

import functools
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import fastrlhf
from fastrlhf import reference
from fastrlhf.ops import _backend, _library

SHORT = 0.01  # seconds: a shorter call is warmed up by WARM calls before each sample
WARM = 3
LONG = 1.0  # seconds


@dataclass
class Provider:
    """An implementation of an op, called with the op's arguments by name.

    One that needs another layout, or that writes over its inputs, has arguments of its own: `lay_out`
    makes them from the op's, once and untimed. What it gives is compared after `read`.
    """

    call: Callable
    ours: bool = False
    forward_only: bool = False  # it has no backward
    lay_out: Callable[[dict], dict] | None = None
    gives: tuple[int, ...] | None = None  # which of the op's outputs; None: all
    wrt: tuple[str, ...] | None = None  # whose gradients autograd gives; None: the problem's
    # (its outputs and gradients) -> those that `gives` and the problem's gradients, in the op's layout
    read: Callable[[list[Tensor]], list[Tensor]] | None = None
    within: Callable[[], AbstractContextManager] = nullcontext  # around forward and backward

    def arguments(self, args: dict, wrt: tuple[str, ...]) -> dict:
        """`args`, or the provider's own made from them, with gradients for those named in `wrt`."""
        if self.lay_out is None:
            return args
        plain = {k: v.detach() if isinstance(v, Tensor) else v for k, v in args.items()}
        own = self.lay_out(plain)
        for name in wrt:
            if not self.forward_only:
                own[name] = own[name].detach().requires_grad_()
        return own


@dataclass
class Yardstick:
    """Work that is timed beside a problem. With `bytes` or `flops` it is a ceiling of the machine."""

    call: Callable[[], object]
    bytes: int = 0
    flops: int = 0


@dataclass
class Problem:
    """One op at one shape: its keyword arguments, and the bytes and FLOPs its definition must move."""

    op: str
    args: dict
    wrt: tuple[str, ...] = ()  # arguments that want gradients
    # What no implementation can go below: each input that counts read once, each output written once.
    forward_bytes: int = 0
    backward_bytes: int = 0
    forward_flops: int = 0
    backward_flops: int = 0
    floor_note: str = ""
    seconds: float = 2.0  # to spend on each direction, all providers together
    compiled: bool = False  # torch.compile can take the eager definition whole, in seconds
    backward_alone: bool = False  # the backward is work of its own, and timed on its own
    peers: dict[str, Provider] = field(default_factory=dict)  # other people's
    # Name -> another way to call ours, made from the op on one backend; None: not on that one.
    variants: dict[str, Callable[[Callable], Provider | None]] = field(default_factory=dict)
    yardsticks: dict[str, Yardstick] = field(default_factory=dict)
    full_yardsticks: dict[str, Yardstick] = field(default_factory=dict)  # beside forward+backward
    # Direction -> bytes that our backends may hold at the peak of a call, its outputs with them.
    peak_limits: dict[str, int] = field(default_factory=dict)
    ones: bool = False  # upstream gradients of ones, as of a sum; else random
    # Rows of the op -> its arguments for these alone, where each row depends on nothing else.
    rows: Callable[[Tensor], dict] | None = None
    upstream: list[Tensor] = field(default_factory=list)
    raised: dict[str, str] = field(default_factory=dict)  # provider -> what stopped it at the gate
    # Provider -> the largest errors against fp64 that the gate saw: "error" of the first output,
    # "gradient_errors" by argument.
    seen: dict[str, dict] = field(default_factory=dict)


def prepare(problem: Problem) -> Problem:
    """Mark what wants gradients and draw the upstream gradients, the same for every provider."""
    for name in problem.wrt:
        problem.args[name].requires_grad_()
    if problem.wrt and not problem.ones:
        outputs = tensors(getattr(reference, problem.op)(**problem.args))
        generator = torch.Generator(outputs[0].device).manual_seed(1)
        problem.upstream = [
            torch.randn(o.shape, generator=generator, device=o.device).to(o.dtype)
            for o in outputs
            if o.requires_grad
        ]
    return problem


def tensors(out) -> list[Tensor]:
    """The tensors that a call returned, without the metrics."""
    return [x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor)]


def gradients(
    problem: Problem,
    outputs: list[Tensor],
    args: dict,
    retain_graph: bool = False,
    at=None,
    wrt: tuple[str, ...] | None = None,
) -> list[Tensor]:
    """Of the outputs that have any, in `wrt` (the problem's); `at`: the rows that `args` is about."""
    outputs = [o for o in outputs if o.requires_grad]
    if problem.ones:
        upstream = [torch.ones_like(o) for o in outputs]
    else:
        own = problem.upstream if at is None else [g[at] for g in problem.upstream]
        upstream = [g.to(o.dtype) for g, o in zip(own, outputs, strict=True)]
    wanted = [args[name] for name in (problem.wrt if wrt is None else wrt)]
    return list(torch.autograd.grad(outputs, wanted, upstream, retain_graph=retain_graph))


def directions(problem: Problem) -> dict[str, tuple[int, int]]:
    """Direction -> the bytes and FLOPs of its floor."""
    found = {"forward": (problem.forward_bytes, problem.forward_flops)}
    if problem.backward_alone:
        found["backward"] = (problem.backward_bytes, problem.backward_flops)
    if problem.wrt:
        both_bytes = problem.forward_bytes + problem.backward_bytes
        found["forward+backward"] = (both_bytes, problem.forward_flops + problem.backward_flops)
    return found


def step(problem: Problem, provider: Provider, direction: str, args: dict | None = None):
    """A function without arguments that runs one direction of `provider` on `args` (the problem's)."""
    args = provider.arguments(problem.args if args is None else args, problem.wrt)
    if direction == "forward":

        def run():
            with torch.no_grad(), provider.within():
                return provider.call(**args)

    elif direction == "backward":
        with provider.within():
            outputs = tensors(provider.call(**args))

        def run():
            with provider.within():
                return gradients(problem, outputs, args, True, wrt=provider.wrt)

    else:

        def run():
            with provider.within():
                outputs = tensors(provider.call(**args))
                return outputs, gradients(problem, outputs, args, wrt=provider.wrt)

    return run


def providers(problem: Problem, compiled: bool) -> dict[str, Provider]:
    """Name -> provider: eager, torch.compile of it, the peers, and ours on each backend here."""
    eager = getattr(reference, problem.op)
    found = {"eager": Provider(eager)}
    if compiled and problem.compiled:
        found["torch.compile"] = Provider(torch.compile(eager, fullgraph=True, dynamic=False))
    found |= problem.peers
    op = getattr(fastrlhf, problem.op)
    device = next(v.device.type for v in problem.args.values() if isinstance(v, Tensor))
    for backend, state in fastrlhf.backends()[problem.op].items():
        if backend == "reference" or (backend == "cpu") != (device == "cpu"):
            continue
        if state != "available":
            continue
        bound = functools.partial(op, backend=backend)
        found[backend] = Provider(bound, ours=True)
        for name, make in problem.variants.items():
            if (provider := make(bound)) is not None:
                found[f"{backend}, {name}"] = provider
    return found


def with_options(**more) -> Callable[[Callable], Provider]:
    """A variant: ours with more arguments."""
    return lambda op: Provider(functools.partial(op, **more), ours=True)


def written_over(name: str, **more) -> Callable[[Callable], Provider]:
    """A variant: ours with more arguments, which writes over the argument `name`."""

    def make(op):
        call = _on_a_view(functools.partial(op, **more), name)
        return Provider(call, ours=True, lay_out=copy_of(name))

    return make


def copy_of(name: str) -> Callable[[dict], dict]:
    """A layout with its own copy of one argument, for a provider that writes over it."""
    return lambda args: {**args, name: args[name].clone()}


def _on_a_view(call: Callable, name: str) -> Callable:
    """Autograd lets nobody write over a leaf; a view of it may be."""
    return lambda **args: call(**{**args, name: args[name].view_as(args[name])})


def doubled(args: dict, wrt: tuple[str, ...]) -> dict:
    """The arguments in fp64: the truth's."""
    return {
        k: v.detach().double().requires_grad_(k in wrt)
        if isinstance(v, Tensor) and v.is_floating_point()
        else v
        for k, v in args.items()
    }


SAMPLED_ROWS = 32


def errors(problem: Problem, found: dict[str, Provider]) -> dict[str, float]:
    """Per provider, eager first, the largest error against fp64, as a share of what is allowed (1 = the bar).

    A call that raises, a result of another shape and one that is not finite are infinitely wrong. Where
    rows are independent (`problem.rows`) the truth is that of SAMPLED_ROWS rows.
    """
    eager, at, args = getattr(reference, problem.op), None, problem.args
    rows = len(next(iter(args.values())))
    if problem.rows is not None:
        device = next(iter(args.values())).device
        at = torch.linspace(0, rows - 1, min(rows, SAMPLED_ROWS), device=device).long()
        args = problem.rows(at)
    args = doubled(args, problem.wrt)
    truth = tensors(eager(**args))
    outputs = len(truth)
    if problem.wrt:
        truth += gradients(problem, truth, args, at=at)
    truth = [t.detach() for t in truth]
    # The floor of the bar is a few roundings of the largest value, in the type it is returned in.
    floors = [8 * torch.finfo(torch.float32).eps * t.abs().max().clamp(min=1).item() for t in truth]
    bars, shares = {}, {}
    for name, provider in found.items():
        given = list(range(outputs) if provider.gives is None else provider.gives)
        given += [] if provider.forward_only else range(outputs, len(truth))
        try:
            results = _results(problem, provider)
            measured = _distances(results, [truth[i] for i in given], at, rows)
            problem.seen[name] = _named(problem, dict(zip(given, measured, strict=True)), outputs)
        except Exception as error:
            if name == "eager":
                raise
            problem.raised[name] = f"{type(error).__name__}: {error}"
            shares[name] = math.inf
            continue
        if name == "eager":
            bars = {i: 2 * e + floors[i] for i, e in zip(given, measured, strict=True)}
        shares[name] = max(e / bars[i] for i, e in zip(given, measured, strict=True))
    return shares


def _named(problem: Problem, measured: dict[int, float], outputs: int) -> dict:
    """What a row says of the errors: place among outputs and gradients -> error, as `Problem.seen` has them."""
    seen = {"error": measured[0]} if 0 in measured else {}
    grads = {problem.wrt[i - outputs]: e for i, e in measured.items() if i >= outputs}
    return seen | ({"gradient_errors": grads} if grads else {})


def _results(problem: Problem, provider: Provider) -> list[Tensor]:
    """Outputs and gradients of one call, in the op's layout."""
    args = provider.arguments(problem.args, problem.wrt)
    with provider.within():
        results = tensors(provider.call(**args))
        if problem.wrt and not provider.forward_only:
            results += gradients(problem, results, args, wrt=provider.wrt)
    results = [r.detach() for r in results]
    return results if provider.read is None else provider.read(results)


def _distances(
    results: list[Tensor], truth: list[Tensor], at: Tensor | None, rows: int
) -> list[float]:
    """Largest distance of each result from its truth; ValueError where a shape or a value forbids one.

    With `at` the truth is that of these rows, of `rows` that a result has.
    """
    shapes = [tuple(r.shape) for r in results]
    expected = [tuple(t.shape) if at is None else (rows, *t.shape[1:]) for t in truth]
    if shapes != expected:
        raise ValueError(f"it gives the shapes {shapes}; expected {expected}")
    sampled = results if at is None else [r[at] for r in results]
    for result in results:
        if not torch.isfinite(result).all():
            raise ValueError("it gives values that are not finite")
    return [(r.double() - t).abs().max().item() for r, t in zip(sampled, truth, strict=True)]


_flush: dict[str, Tensor] = {}  # device -> more bytes than its caches hold


def flush(device: str) -> None:
    """Puts other data into the caches: on a GPU by writing, on a CPU by reading (no line is left dirty)."""
    if device not in _flush:
        size = 2**28 if device == "cuda" else max(2 * cache_bytes(), 2**26)
        _flush[device] = torch.zeros(size // 4, dtype=torch.float32, device=device)
    if device == "cuda":
        _flush[device].zero_()
    else:
        _flush[device].sum()


def cache_bytes() -> int:
    """The CPU's last cache, as the system knows it; 0 where it does not."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        scale = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * scale)
    return max(sizes)


def sample(function: Callable, device: str, cold: bool = False) -> float:
    """Seconds of one call; on a GPU between events. `cold`: nothing of it is in the caches."""
    if cold:
        flush(device)
    if device == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def times(
    functions: dict[str, Callable],
    device: str,
    seconds: float,
    cold: bool | None = None,
    slow: float = math.inf,
) -> dict[str, list[float]]:
    """Samples per provider, in turns, until `seconds` are spent; at least 5 each (3 where a turn takes
    longer than LONG), at most 500. A provider whose first call takes longer than `slow` keeps that sample.

    `cold`: whether the caches are emptied before each sample; by default on a GPU. On a CPU a short call is
    made a few times more, untimed, before it is timed: what the provider before it left in the caches and in
    the allocator is not its cost.
    """
    cold = device != "cpu" if cold is None else cold
    again, turn_seconds = set(), 0.0
    taken: dict[str, list[float]] = {name: [] for name in functions}
    functions = dict(functions)
    for name, function in list(functions.items()):
        took = sample(function, device, cold)
        if took > slow:
            taken[name].append(took)
            del functions[name]
            continue
        if took < LONG:
            took = sample(function, device, cold)
        if took < SHORT and device == "cpu":
            again.add(name)
        turn_seconds += took
    least = 3 if turn_seconds > LONG else 5
    start = time.perf_counter()
    for turn in range(500):
        if turn >= least and time.perf_counter() - start > seconds:
            break
        for name, function in functions.items():
            for _ in range(WARM if name in again else 0):
                function()
            taken[name].append(sample(function, device, cold))
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


def returned_bytes(result) -> int:
    """Bytes of the tensors that a step returned, each memory once."""
    storages = {}
    for x in result if isinstance(result, tuple) else (result,):
        for tensor in x if isinstance(x, (list, tuple)) else (x,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def memory(function: Callable, device: str) -> dict[str, int]:
    """`peak_bytes` of a step, and `beyond_bytes`: what of it is not in the tensors that it returns."""
    kept = []
    peak = peak_bytes(lambda: kept.append(function()), device)
    return {"peak_bytes": peak, "beyond_bytes": max(0, peak - returned_bytes(kept.pop()))}


def quantiles(samples: list[float]) -> dict[str, float]:
    """Median, 20 % and 80 % of samples, in milliseconds."""
    ordered = sorted(samples)
    pick = lambda q: ordered[round(q * (len(ordered) - 1))] * 1e3  # noqa: E731
    median = statistics.median(ordered) * 1e3
    return {"median_ms": median, "p20_ms": pick(0.2), "p80_ms": pick(0.8), "samples": len(ordered)}


def cold_times(
    functions: dict[str, Callable], taken: dict[str, list[float]], seconds: float
) -> dict[str, list[float]]:
    """On a CPU, samples of the calls that `taken` found SHORT, with their data out of the caches.

    What a short call moves may fit into the last cache, where it is not bound by memory: its share of
    a floor made of memory bandwidth is that of the cold call.
    """
    short = {n: f for n, f in functions.items() if statistics.median(taken[n]) < SHORT}
    return times(short, "cpu", seconds, cold=True)


def plain(value):
    """`value` as JSON can hold it: NaN and infinity are null."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def machine(device: str) -> dict:
    """What a reader needs to know of the machine and the software."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text().splitlines()
        cpu = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), cpu)
    extension = None if _backend._extension_error else _library.build_info()
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
