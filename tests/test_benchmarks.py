"""The benchmark harness: it runs, a wrong result gets no number, every op has a case."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastrlhf

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_losses
    import run

    import cases
    import harness

    yield harness, cases, bench_losses, run
    for name in ("bench_losses", "cases", "harness", "run"):
        sys.modules.pop(name, None)


def problem_of(harness):
    harness, cases, bench_losses, _ = harness
    case = cases.Case("ranking_loss", "tiny", "float32", {"P": 3, "K": 4})
    return harness.prepare(bench_losses.ranking_loss(case, "cpu"))


def test_every_op_has_a_case_on_every_device(harness):
    _, cases, _, run = harness
    for listed in (cases.CPU, cases.GPU):
        assert {c.op for c in listed} - {"pack"} == set(fastrlhf.backends())


def test_right_results_pass_the_gate(harness):
    problem = problem_of(harness)
    found = harness[0].providers(problem, compiled=False)
    assert "eager" in found
    assert max(harness[0].errors(problem, found).values()) <= 1


@pytest.mark.parametrize("wrong", [lambda loss: loss * 1.001, lambda loss: loss * float("nan")])
def test_a_wrong_result_does_not(harness, wrong):
    problem = problem_of(harness)
    found = harness[0].providers(problem, compiled=False)
    right = found["eager"]
    found["broken"] = lambda **args: wrong(right(**args))
    shares = harness[0].errors(problem, found)
    assert shares["broken"] > 1
    assert shares["eager"] <= 1


def test_a_wrong_gradient_does_not(harness):
    problem = problem_of(harness)
    found = harness[0].providers(problem, compiled=False)
    right = found["eager"]

    def half_gradient(**args):
        loss = right(**args)
        return loss.detach() + 0.5 * (loss - loss.detach())

    found["broken"] = half_gradient
    assert harness[0].errors(problem, found)["broken"] > 1


def test_wrong_provider_gets_no_number(harness, monkeypatch):
    module, cases, bench_losses, run = harness
    case = cases.Case("ranking_loss", "tiny", "float32", {"P": 3, "K": 4})
    right = module.providers

    def with_broken(problem, compiled):
        found = right(problem, compiled)
        return {**found, "broken": lambda **args: 2 * found["eager"](**args)}

    monkeypatch.setattr(run, "providers", with_broken)
    floor = {"copy_bytes_per_s": 1e10, "gemm_float32_flop_per_s": 1e11}
    make = lambda *args: problem_with_little_time(bench_losses.ranking_loss(*args))  # noqa: E731
    rows = run.bench_op(case, make, "cpu", floor, compiled=False)
    timed = {row["provider"] for row in rows if "median_ms" in row}
    assert "broken" in {row["provider"] for row in rows}
    assert "broken" not in timed
    assert "eager" in timed


def problem_with_little_time(problem):
    problem.seconds = 0.01
    return problem


def test_command_writes_its_results(tmp_path):
    out = tmp_path / "results.json"
    command = [sys.executable, BENCHMARKS / "run.py", "pack", "--quick", "--device", "cpu"]
    result = subprocess.run(
        [*command, "--out", out],
        capture_output=True,
        text=True,
        cwd=BENCHMARKS.parent,
    )
    assert result.returncode == 0, result.stderr
    document = json.loads(out.read_text())
    assert document["quick"] is True
    assert document["machine"]["torch"] == torch.__version__
    (row,) = document["rows"]
    assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
