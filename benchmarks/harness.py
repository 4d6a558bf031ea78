"""Problems, providers, the correctness gate and timing: the parts that every op shares.

The gate runs before the clock. It compares values and gradients of each provider with the fp64 reference; the
bar is twice the error of eager PyTorch. A provider that fails gets no time.

Samples are interleaved round-robin over the providers, so a machine that slows down slows all of them. The
yardsticks of a problem (e.g. a plain read of its input) are interleaved too and have no gate. A yardstick with a
known amount of work also raises the ceilings of the roofline (`roofline.py`).
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
import torch._functorch.config
from torch import Tensor

import fastrlhf
from fastrlhf import reference
from fastrlhf.ops import _backend, _library

SHORT = 0.01  # seconds; on a CPU, WARM untimed calls precede each sample of a shorter call
WARM = 3
LONG = 1.0  # seconds; a slower round of all providers is sampled 3 times instead of 5


@dataclass
class Provider:
    """An implementation of an op, called with the keyword arguments of the op.

    Set `lay_out` if it needs another layout or overwrites its inputs: it converts the arguments once, untimed.
    Set `read` to convert the results back before the gate compares them.
    """

    call: Callable
    ours: bool = False
    forward_only: bool = False
    lay_out: Callable[[dict], dict] | None = None
    gives: tuple[int, ...] | None = None  # indices of the op's outputs that it returns; None: all
    wrt: tuple[str, ...] | None = None  # arguments that autograd differentiates; None: problem.wrt
    # [outputs, gradients] of the provider -> [outputs in `gives`, problem gradients] in the op's layout
    read: Callable[[list[Tensor]], list[Tensor]] | None = None
    within: Callable[[], AbstractContextManager] = nullcontext  # entered for forward and backward

    def arguments(self, args: dict, wrt: tuple[str, ...]) -> dict:
        """`args`, or a converted copy whose tensors named in `wrt` require grad."""
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
    """Reference work timed next to a problem. With `bytes` or `flops` it also counts as a ceiling."""

    call: Callable[[], object]
    bytes: int = 0
    flops: int = 0


@dataclass
class Problem:
    """One op at one shape: keyword arguments, and the bytes and FLOPs that any implementation needs."""

    op: str
    args: dict
    wrt: tuple[str, ...] = ()  # arguments that require grad
    # Lower bounds: each unmasked input is read once, each output is written once.
    forward_bytes: int = 0
    backward_bytes: int = 0
    forward_flops: int = 0
    backward_flops: int = 0
    roofline_note: str = ""
    seconds: float = 2.0  # time budget of a direction, shared by all providers
    compiled: bool = False  # torch.compile(fullgraph=True) takes the eager definition in seconds
    backward_alone: bool = False  # also time the backward on its own
    peers: dict[str, Provider] = field(default_factory=dict)  # third-party implementations
    # Name -> (op bound to a backend) -> another way to call it, or None on that backend.
    variants: dict[str, Callable[[Callable], Provider | None]] = field(default_factory=dict)
    yardsticks: dict[str, Yardstick] = field(default_factory=dict)
    full_yardsticks: dict[str, Yardstick] = field(default_factory=dict)  # of forward+backward
    # Direction -> limit on the peak bytes of a call on our backends, outputs included.
    peak_limits: dict[str, int] = field(default_factory=dict)
    ones: bool = False  # upstream gradients are ones (as after .sum()) instead of random
    # Row indices -> the arguments of these rows, for ops whose rows are independent.
    rows: Callable[[Tensor], dict] | None = None
    upstream: list[Tensor] = field(default_factory=list)
    # Filled by the gate. `raised`: provider -> exception. `seen`: provider -> largest errors against fp64, as
    # "error" (of the first output) and "gradient_errors" (by argument).
    raised: dict[str, str] = field(default_factory=dict)
    seen: dict[str, dict] = field(default_factory=dict)


def prepare(problem: Problem) -> Problem:
    """Set requires_grad and draw the upstream gradients that all providers share."""
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
    """The tensors of a result; metrics are dropped."""
    return [x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor)]


def gradients(
    problem: Problem,
    outputs: list[Tensor],
    args: dict,
    retain_graph: bool = False,
    at=None,
    wrt: tuple[str, ...] | None = None,
) -> list[Tensor]:
    """Gradients of the differentiable outputs in `wrt` (default: problem.wrt). `at`: rows that `args` holds."""
    outputs = [o for o in outputs if o.requires_grad]
    if problem.ones:
        upstream = [torch.ones_like(o) for o in outputs]
    else:
        own = problem.upstream if at is None else [g[at] for g in problem.upstream]
        upstream = [g.to(o.dtype) for g, o in zip(own, outputs, strict=True)]
    wanted = [args[name] for name in (problem.wrt if wrt is None else wrt)]
    return list(torch.autograd.grad(outputs, wanted, upstream, retain_graph=retain_graph))


def directions(problem: Problem) -> dict[str, tuple[int, int]]:
    """Direction -> (bytes, FLOPs) of its roofline."""
    found = {"forward": (problem.forward_bytes, problem.forward_flops)}
    if problem.backward_alone:
        found["backward"] = (problem.backward_bytes, problem.backward_flops)
    if problem.wrt:
        both_bytes = problem.forward_bytes + problem.backward_bytes
        found["forward+backward"] = (both_bytes, problem.forward_flops + problem.backward_flops)
    return found


def step(problem: Problem, provider: Provider, direction: str, args: dict | None = None):
    """A closure that runs one direction of `provider` on `args` (default: problem.args)."""
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
    """Name -> provider: eager, torch.compile(eager), peers, and our op on each available backend."""
    eager = getattr(reference, problem.op)
    found = {"eager": Provider(eager)}
    if compiled and problem.compiled:
        # Allows repeated backward calls on one graph (the direction "backward").
        torch._functorch.config.donated_buffer = False
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
    """A variant: our op with extra arguments."""
    return lambda op: Provider(functools.partial(op, **more), ours=True)


def written_over(name: str, **more) -> Callable[[Callable], Provider]:
    """A variant: our op with extra arguments; it overwrites the argument `name`."""

    def make(op):
        call = _on_a_view(functools.partial(op, **more), name)
        return Provider(call, ours=True, lay_out=copy_of(name))

    return make


def copy_of(name: str) -> Callable[[dict], dict]:
    """A `lay_out` that copies one argument, for a provider that overwrites it."""
    return lambda args: {**args, name: args[name].clone()}


def _on_a_view(call: Callable, name: str) -> Callable:
    """Autograd forbids in-place writes to a leaf that requires grad, but allows them on a view of it."""
    return lambda **args: call(**{**args, name: args[name].view_as(args[name])})


def doubled(args: dict, wrt: tuple[str, ...]) -> dict:
    """The arguments in fp64, for the reference result."""
    return {
        k: v.detach().double().requires_grad_(k in wrt)
        if isinstance(v, Tensor) and v.is_floating_point()
        else v
        for k, v in args.items()
    }


SAMPLED_ROWS = 32


def errors(problem: Problem, found: dict[str, Provider]) -> dict[str, float]:
    """Provider -> largest error against fp64 over the bar, 2 * (error of eager) + atol; above 1 it is wrong.

    `found` starts with "eager", which sets the bar. An exception, a wrong shape and a non-finite value count as
    inf. For ops with independent rows (`problem.rows`) values are compared on SAMPLED_ROWS rows; shapes and
    finiteness are checked on all.
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
    # A few fp32 roundings of the largest value.
    atols = [8 * torch.finfo(torch.float32).eps * t.abs().max().clamp(min=1).item() for t in truth]
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
            bars = {i: 2 * e + atols[i] for i, e in zip(given, measured, strict=True)}
        shares[name] = max(e / bars[i] for i, e in zip(given, measured, strict=True))
    return shares


def _named(problem: Problem, measured: dict[int, float], outputs: int) -> dict:
    """Errors by index (outputs, then gradients) -> the entry of `Problem.seen`."""
    seen = {"error": measured[0]} if 0 in measured else {}
    grads = {problem.wrt[i - outputs]: e for i, e in measured.items() if i >= outputs}
    return seen | ({"gradient_errors": grads} if grads else {})


def _results(problem: Problem, provider: Provider) -> list[Tensor]:
    """[outputs, gradients] of one call in the op's layout."""
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
    """Largest absolute error of each result. ValueError: wrong shape, or a value that is not finite.

    With `at`, `truth` holds only these rows of the `rows` that a result must have.
    """
    shapes = [tuple(r.shape) for r in results]
    expected = [tuple(t.shape) if at is None else (rows, *t.shape[1:]) for t in truth]
    if shapes != expected:
        raise ValueError(f"got the shapes {shapes}; expected {expected}")
    sampled = results if at is None else [r[at] for r in results]
    for result in results:
        if not torch.isfinite(result).all():
            raise ValueError("some values are not finite")
    return [(r.double() - t).abs().max().item() for r, t in zip(sampled, truth, strict=True)]


_flush: dict[str, Tensor] = {}  # device -> a buffer larger than its caches


def flush(device: str) -> None:
    """Evict the caches: on a GPU by writing the buffer, on a CPU by reading it (which leaves no dirty lines)."""
    if device not in _flush:
        size = 2**28 if device == "cuda" else max(2 * cache_bytes(), 2**26)
        _flush[device] = torch.zeros(size // 4, dtype=torch.float32, device=device)
    if device == "cuda":
        _flush[device].zero_()
    else:
        _flush[device].sum()


def cache_bytes() -> int:
    """Size of the CPU's last-level cache; 0 if the system does not report it."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        scale = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * scale)
    return max(sizes)


def sample(function: Callable, device: str, cold: bool = False) -> float:
    """Seconds of one call, on a GPU between two events. `cold`: evict the caches first."""
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
    """Samples per function, interleaved, until `seconds` are spent: at least 5 (3 if a round takes longer than
    LONG), at most 500. A function whose first call takes longer than `slow` is sampled once.

    `cold`: evict the caches before each sample (default: on a GPU only). On a CPU, a short call runs WARM times
    untimed before each sample, so that it does not pay for the cache and allocator state of the previous function.
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
    """Peak bytes that a call allocates through torch's allocator."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else each profile prints two lines
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()  # negative for a free
            peak = max(peak, held)
    return peak


def returned_bytes(result) -> int:
    """Bytes of the tensors that a step returned; a shared storage counts once."""
    storages = {}
    for x in result if isinstance(result, tuple) else (result,):
        for tensor in x if isinstance(x, (list, tuple)) else (x,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def memory(function: Callable, device: str) -> dict[str, int]:
    """`peak_bytes` of a step, and `beyond_bytes`: the part that is not in the returned tensors."""
    kept = []
    peak = peak_bytes(lambda: kept.append(function()), device)
    return {"peak_bytes": peak, "beyond_bytes": max(0, peak - returned_bytes(kept.pop()))}


def quantiles(samples: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile of the samples, in milliseconds."""
    ordered = sorted(samples)
    pick = lambda q: ordered[round(q * (len(ordered) - 1))] * 1e3  # noqa: E731
    median = statistics.median(ordered) * 1e3
    return {"median_ms": median, "p20_ms": pick(0.2), "p80_ms": pick(0.8), "samples": len(ordered)}


def cold_times(
    functions: dict[str, Callable], taken: dict[str, list[float]], seconds: float
) -> dict[str, list[float]]:
    """Cold-cache samples, on a CPU, of the calls that `taken` shows to be SHORT.

    The data of a short call may fit into the last-level cache, where memory bandwidth does not bound it. Its
    fraction of the roofline is therefore computed from the cold call.
    """
    short = {n: f for n, f in functions.items() if statistics.median(taken[n]) < SHORT}
    return times(short, "cpu", seconds, cold=True)


def plain(value):
    """`value` with NaN and infinity as None, which JSON can hold."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def machine(device: str) -> dict:
    """Hardware and software versions, for the header of a results file."""
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
