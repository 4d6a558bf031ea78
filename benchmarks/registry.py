"""The one definition of a benchmark case: its shape (`cases.py`), its problem (`bench_<op>.py`), its gate.

Both entry points, `run.py` and `pytest benchmarks/` (`test_ops.py`), take their cases from here.
"""

import importlib
from collections.abc import Callable, Collection
from dataclasses import dataclass

import harness
from cases import CPU, GATE, GPU, GPU_QUICK, QUICK, Case, capped
from harness import Problem, Provider

MODULES = (
    "bench_token_logprob",
    "bench_token_loss",
    "bench_linear_logprob",
    "bench_sequence_ops",
    "bench_losses",
)
Maker = Callable[[Case, str], Problem]


def makers() -> dict[str, Maker]:
    """Op -> function (case, device) -> problem. `pack`, which takes no tensors, is in bench_pack.py."""
    found = {}
    for module in MODULES:
        found |= importlib.import_module(module).PROBLEMS
    return found


def select(device: str, size: str) -> list[Case]:
    """The cases of a device. tiny: capped shapes; default: on a GPU those of `make gpu-quick`; full: all."""
    every = CPU if device == "cpu" else GPU
    if size == "tiny":
        return [capped(case, QUICK) for case in every]
    return GPU_QUICK if size == "default" and device != "cpu" else every


@dataclass
class Gated:
    """A problem with its providers, after the gate."""

    problem: Problem
    providers: dict[str, Provider]
    shares: dict[str, float]  # provider -> error over the bar
    rejected: dict[str, str]  # provider -> reason
    gate: Problem  # the problem that the gate compared on; it holds `seen` and `raised`


def gated(
    case: Case,
    make: Maker,
    device: str,
    compiled: bool,
    at_size: bool | None = None,
    only: Collection[str] | None = None,
) -> Gated:
    """Build the problem of a case and compare its providers with the fp64 reference.

    `at_size`: compare at the timed size (default on a GPU) or at the sizes of GATE. `only`: the providers to
    compare; eager is always among them, since it sets the bar.
    """
    at_size = device == "cuda" if at_size is None else at_size
    problem = harness.prepare(make(case, device))
    gate = problem if at_size else harness.prepare(make(capped(case, GATE), device))

    def chosen(found: dict[str, Provider]) -> dict[str, Provider]:
        return {n: p for n, p in found.items() if only is None or n == "eager" or n in only}

    found = chosen(harness.providers(problem, compiled))
    compared = found if at_size else chosen(harness.providers(gate, compiled))
    shares = harness.errors(gate, compared)
    return Gated(problem, found, shares, rejected(shares, gate.raised), gate)


def rejected(shares: dict[str, float], raised: dict[str, str]) -> dict[str, str]:
    """Provider -> why the gate rejected it."""
    found = {}
    for name, share in shares.items():
        if name in raised:
            found[name] = raised[name]
        elif not share <= 1:  # NaN too
            found[name] = f"its error is {share:.3g} times the bar"
    return found
