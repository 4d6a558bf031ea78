"""The benchmark cases as pytest-benchmark tests: a group per op, case and direction, a row per provider.

    pytest benchmarks/ [--size tiny|default|full] [--device cpu|cuda] [-k "gae and forward"]
    pytest benchmarks/ --benchmark-json=out.json --benchmark-histogram=plots/ops
    pytest benchmarks/ --benchmark-autosave, then pytest benchmarks/ --benchmark-compare

Before a case is timed, the gate compares its providers with the fp64 reference. A provider of ours that is wrong
fails its test, a third-party one skips it; neither is timed. On a CPU a call is timed warm, by the plugin's own
clock; on a GPU by device events, with L2 overwritten before each round (`gpu_clock.run_rounds`). docs/benchmarks.md
has the details.
"""

import gc
from typing import NamedTuple

import bench_pack
import pytest
import torch

import gpu_clock
import harness
from cases import GATE, Case, capped
from registry import Gated, gated, makers, select

TINY = {"max_time": 0.01, "min_rounds": 3}
CLOCK = gpu_clock.EventTimer()


class Row(NamedTuple):
    """What identifies a benchmark: `case` is the name and dtype of a case."""

    op: str
    case: str
    direction: str
    provider: str


def key(case: Case) -> tuple[str, str]:
    return case.op, f"{case.name} {case.dtype}"


def rows_of(case: Case, device: str, compiled: bool) -> list[Row]:
    """Every direction and provider. The variants of a GPU's cases depend on their sizes; those of a CPU do not."""
    if case.op == "pack":
        return [Row(*key(case), "forward", bench_pack.problem(capped(case, GATE))[0])]
    problem = makers()[case.op](case if device == "cuda" else capped(case, GATE), device)
    return [
        Row(*key(case), direction, name)
        for direction in harness.directions(problem)
        for name, provider in harness.providers(problem, compiled).items()
        if direction == "forward" or not provider.forward_only
    ]


def has_compile(config) -> bool:
    return not (config.getoption("no_compile") or config.getoption("size") == "tiny")


def pytest_generate_tests(metafunc):
    config = metafunc.config
    device, size = config.getoption("device"), config.getoption("size")
    options = TINY if size == "tiny" else {}
    if device == "cuda":
        options = {**options, "timer": CLOCK}
    mark = pytest.mark.benchmark(**options)
    is_pack = metafunc.function is test_pack
    found = [
        pytest.param(*row, id="-".join(row), marks=mark)
        for case in select(device, size)
        if (case.op == "pack") == is_pack
        for row in rows_of(case, device, has_compile(config))
    ]
    metafunc.parametrize(Row._fields, found)


class Gates:
    """The gate of a case runs once, for the selected providers; the problem is kept until the next case."""

    def __init__(self, session: pytest.Session):
        self.config, self.selected = session.config, {}
        for item in session.items:
            row = getattr(item, "callspec", None) and item.callspec.params
            if row and "provider" in row:
                self.selected.setdefault((row["op"], row["case"]), set()).add(row["provider"])
        device, size = self.config.getoption("device"), self.config.getoption("size")
        self.device, self.cases = device, {key(case): case for case in select(device, size)}
        self.at: tuple[str, str] | None = None
        self.held: Gated | Exception | None = None

    def of(self, op: str, case: str) -> Gated:
        if self.at != (op, case):
            self.at, self.held = (op, case), None  # frees the memory of the case before
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()
            if has_compile(self.config):
                torch._dynamo.reset()  # else the shapes of all cases add up to its recompilation limit
            try:
                self.held = gated(
                    self.cases[self.at],
                    makers()[op],
                    self.device,
                    has_compile(self.config),
                    only=self.selected[self.at],
                )
            except Exception as error:  # raised anew for each provider of the case
                self.held = error
        if isinstance(self.held, Exception):
            raise self.held
        return self.held


@pytest.fixture(scope="session")
def gates(request) -> Gates:
    return Gates(request.session)


def label(benchmark, row: Row, ours: bool) -> None:
    """Name the row after its provider: `provider` is the backend's name where it is ours."""
    benchmark.group = f"{row.op} {row.case} {row.direction}"
    benchmark.name = f"fastrlhf ({row.provider})" if ours else row.provider


def reject(benchmark, ours: bool, reason: str) -> None:
    (pytest.fail if ours else pytest.skip)(f"{benchmark.name} is not timed: {reason}")


def test_op(benchmark, gates, request, op, case, direction, provider):
    checked = gates.of(op, case)
    implementation = checked.providers[provider]
    label(benchmark, Row(op, case, direction, provider), implementation.ours)
    if provider in checked.rejected:
        reject(benchmark, implementation.ours, checked.rejected[provider])
    moved, flops = harness.directions(checked.problem)[direction]
    benchmark.extra_info |= harness.plain(
        {
            "ours": implementation.ours,
            "bytes": moved,
            "flops": flops,
            "error_share_of_bar": checked.shares[provider],
            **checked.gate.seen[provider],
        }
    )
    try:
        step = harness.step(checked.problem, implementation, direction)
        step()
    except Exception as error:  # at the timed size, e.g. out of memory
        reject(benchmark, implementation.ours, f"{type(error).__name__}: {error}")
    if gates.device == "cpu":
        benchmark(step)
        return
    seconds, least = (
        float(request.config.getoption(f"benchmark_{name}")) for name in ("max_time", "min_rounds")
    )
    if request.config.getoption("size") == "tiny":
        seconds, least = TINY["max_time"], TINY["min_rounds"]
    benchmark.extra_info |= gpu_clock.run_rounds(
        benchmark, CLOCK, checked.problem, implementation, direction, seconds, int(least)
    )


def test_pack(benchmark, gates, op, case, direction, provider):
    label(benchmark, Row(op, case, direction, provider), ours=True)
    _, call, reason = bench_pack.problem(gates.cases[op, case])
    if reason:
        reject(benchmark, True, reason)
    benchmark(call)
