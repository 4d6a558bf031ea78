"""The benchmark harness: it runs, a wrong result gets no number, every op has a case."""

import importlib
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
    modules = ("bench_losses", "bench_sequence_ops", "bench_token_logprob", "cases", "harness")
    for name in (*modules, "peers", "run"):
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


def test_a_provider_that_raises_is_wrong_and_says_why(harness):
    problem = problem_of(harness)
    found = harness[0].providers(problem, compiled=False)

    def broken(**args):
        raise RuntimeError("no such kernel")

    shares = harness[0].errors(problem, {**found, "broken": broken})
    assert shares["broken"] == float("inf") and shares["eager"] <= 1
    assert problem.raised == {"broken": "RuntimeError: no such kernel"}
    with pytest.raises(RuntimeError, match="no such kernel"):  # without eager there is no bar
        harness[0].errors(problem, {"eager": broken})


def test_a_case_that_cannot_be_timed_leaves_the_others(harness, monkeypatch, tmp_path, capsys):
    module, cases, _, run = harness
    listed = [c for c in cases.CPU if c.op in ("masked_whiten", "kl_reward")]
    monkeypatch.setattr(run, "CPU", listed)

    def bench_op(case, *rest):
        if case.op == "kl_reward":
            raise MemoryError("too big")
        return [
            {"op": case.op, "case": case.name, "dtype": "float32", "direction": "forward"}
            | {"provider": "cpu", "ours": True, "error_share_of_bar": 0.5, "median_ms": 1.0}
        ]

    monkeypatch.setattr(run, "bench_op", bench_op)
    out = tmp_path / "r.json"
    monkeypatch.setattr("sys.argv", ["run.py", "--quick", "--device", "cpu", "--out", str(out)])
    assert run.main() == 1
    assert "WRONG: kl_reward" in capsys.readouterr().out
    rows = {r["op"]: r for r in json.loads(out.read_text())["rows"]}
    assert rows["kl_reward"]["raised"] == "MemoryError: too big"
    assert rows["masked_whiten"]["median_ms"] == 1.0


def run_quickly(run, monkeypatch, out, device="cpu"):
    monkeypatch.setattr("sys.argv", ["run.py", "--quick", "--device", device, "--out", str(out)])
    return run.main()


def test_an_out_that_cannot_be_written_stops_before_the_measurements(
    harness, monkeypatch, tmp_path, capsys
):
    _, _, _, run = harness
    monkeypatch.setattr(run, "measure_floor", lambda *_: pytest.fail("it measured"))
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file" / "r.json"):
        with pytest.raises(SystemExit) as stopped:
            run_quickly(run, monkeypatch, out)
        assert stopped.value.code == 2 and f"--out {out}: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_quickly(run, monkeypatch, tmp_path / "r.json", device="gpu")
    assert "--device: invalid choice: 'gpu'" in capsys.readouterr().err


def test_an_interrupted_run_leaves_the_old_results(harness, monkeypatch, tmp_path):
    _, _, _, run = harness
    out = tmp_path / "r.json"
    out.write_text("old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "show", interrupt)
    monkeypatch.setattr(run, "CPU", [])
    with pytest.raises(KeyboardInterrupt):
        run_quickly(run, monkeypatch, out)
    assert out.read_text() == "old" and list(tmp_path.iterdir()) == [out]


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


def test_only_our_own_wrong_result_fails_the_run(harness):
    run = harness[3]
    row = {"op": "gae", "case": "c", "direction": "forward", "provider": "p"}
    wrong = {**row, "error_share_of_bar": 3.0}
    assert run.failures([{**wrong, "ours": False}]) == []
    (line,) = run.failures([{**wrong, "ours": True}])
    assert line.startswith("WRONG: gae c forward p")


def test_memory_above_its_limit_fails_the_run(harness):
    run = harness[3]
    row = {"op": "gae", "case": "c", "direction": "forward", "provider": "cpu", "ours": True}
    row |= {"median_ms": 1.0, "peak_bytes": 100, "peak_limit_bytes": 100}
    assert run.failures([row]) == []
    (line,) = run.failures([{**row, "peak_bytes": 101}])
    assert line.startswith("MEMORY: gae c forward cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's allocator is asked instead")
def test_peak_bytes_counts_what_is_held_at_once(harness):
    def call():
        first = torch.empty(1000, dtype=torch.uint8)
        del first
        return torch.empty(400, dtype=torch.uint8), torch.empty(300, dtype=torch.uint8)

    assert harness[0].peak_bytes(call, "cpu") == 1000


def token_problem(harness, **sizes):
    case = harness[1].Case(
        "token_logprob", "t", "float32", {"N": 8, "V": 8192, "entropy": 0, **sizes}
    )
    return case, importlib.import_module("bench_token_logprob").token_logprob


def test_our_token_logprob_holds_o_of_n_and_eager_does_not(harness):
    """The limit is one that eager breaks, so that it can be broken."""
    case, make = token_problem(harness)
    problem = harness[0].prepare(make(case, "cpu"))
    found = harness[0].providers(problem, compiled=False)
    peaks = {}
    for direction, (prepared, _, _) in harness[3].directions(problem).items():
        peaks[direction] = {n: harness[0].peak_bytes(prepared(f), "cpu") for n, f in found.items()}
    for direction, peak in peaks.items():
        limit = problem.peak_limits[direction]
        assert peak["eager"] > limit
        assert all(peak[name] <= limit for name in peak if name in fastrlhf.ops._backend.BACKENDS)


def test_rows_of_a_case(harness):
    """Every direction, the yardstick, ratios to every other provider."""
    case, make = token_problem(harness)
    floor = {"copy_bytes_per_s": 1e10, "gemm_float32_flop_per_s": 1e11}
    quick = lambda *args: problem_with_little_time(make(*args))  # noqa: E731
    rows = harness[3].bench_op(case, quick, "cpu", floor, compiled=False)
    assert {r["direction"] for r in rows} == {"forward", "backward", "forward+backward"}
    names = {r["provider"] for r in rows}
    assert {"eager", "F.cross_entropy"} <= names
    for row in rows:
        assert ("read_floor_ms" in row) == (row["direction"] == "forward")
        assert set(row["times_as_fast_as"]) == names - {row["provider"]}
        assert row["peak_bytes"] > 0
    assert harness[3].failures(rows) == []


@pytest.mark.parametrize("op", ["gae", "kl_gae"])
def test_python_loop_gives_the_ops_result(harness, op):
    case = harness[1].Case(op, "t", "float32", {"B": 7, "T": 13, "packed": 0, "whiten": 1})
    make = importlib.import_module("bench_sequence_ops").PROBLEMS[op]
    problem = harness[0].prepare(make(case, "cpu"))
    found = harness[0].providers(problem, compiled=False)
    assert "python loop" in found
    assert max(harness[0].errors(problem, found).values()) <= 1


@pytest.mark.parametrize(("seconds", "warm", "turns"), [(0.5, 2, 5), (2.0, 1, 3)])
def test_providers_take_turns_and_short_calls_warm_up(harness, monkeypatch, seconds, warm, turns):
    """A turn of over a second is taken three times, and its long calls are not warmed up twice."""
    order = []
    took = {"short": 0.001, "long": seconds}

    def sample(function, device):
        function()
        order.append("timed")
        return took[order[-2]]

    monkeypatch.setattr(harness[0], "sample", sample)
    functions = {name: lambda name=name: order.append(name) for name in took}
    taken = harness[0].times(functions, "cpu", 0.0)
    assert {name: len(samples) for name, samples in taken.items()} == dict.fromkeys(took, turns)
    first = ["short", "timed"] * 2 + ["long", "timed"] * warm
    turn = ["short"] * harness[0].WARM + ["short", "timed", "long", "timed"]
    assert order == first + turn * turns


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
    assert document["device"] == "cpu"
    assert document["machine"]["torch"] == torch.__version__
    (row,) = document["rows"]
    assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
