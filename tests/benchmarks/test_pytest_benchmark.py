"""`pytest benchmarks/`: groups and rows, the gate, JSON, comparison and histograms of pytest-benchmark."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from _support.bench_problems import BENCHMARKS

pytest.importorskip("pytest_benchmark")
ROOT = BENCHMARKS.parent

# A plugin that adds wrong providers: to gae one of ours and two others, and one that raises at the timed size.
WRONG = """
import sys
sys.path.insert(0, {benchmarks!r})
import harness
right = harness.providers

def providers(problem, compiled):
    found = right(problem, compiled)
    if problem.op != "gae":
        return found
    eager = found["eager"].call
    def scaled(factor):
        return lambda **args: tuple(factor * x for x in eager(**args))
    def counted(**args):
        with open({calls!r}, "a") as file:
            file.write("x")
        return scaled(1.001)(**args)
    found["ours, wrong"] = harness.Provider(counted, ours=True)
    found["wrong"] = harness.Provider(scaled(1.001))
    found["nan"] = harness.Provider(scaled(float("nan")))
    return found

harness.providers = providers
"""


# A plugin that runs the GPU path on a fake clock: CPU tensors at tiny shapes, 50 us of device time per call.
FAKE_GPU = """
import sys
sys.path[:0] = [{benchmarks!r}, {tests!r}]
import torch
from _support import fake_clock
torch.cuda.is_available = lambda: True
import harness
import registry
from cases import QUICK, capped
device = fake_clock.install(setattr, harness)
makers, providers = registry.makers, harness.providers

def on_cpu(make):
    return lambda case, device: make(capped(case, QUICK), "cpu")

def timed(call):
    def run(**args):
        device.work(50e-6)
        return call(**args)
    return run

def with_time(problem, compiled):
    found = providers(problem, compiled)
    return {{n: harness.Provider(timed(p.call), ours=p.ours) for n, p in found.items()}}

registry.makers = lambda: {{op: on_cpu(make) for op, make in makers().items()}}
harness.providers = with_time
"""


def run(tmp_path, *arguments, **environment):
    """`pytest benchmarks/ --size tiny` in a process of its own, as a user starts it."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks/",
        "--size",
        "tiny",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_INTERPRET"))}
    paths = [str(ROOT), str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    env |= {"PYTHONPATH": os.pathsep.join(paths), **environment}
    command += [f"--benchmark-storage=file://{tmp_path}/storage", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)


def benchmarks_of(path):
    return json.loads(path.read_text(), parse_constant=pytest.fail)["benchmarks"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of every case, saved as "before": (its folder, its JSON file)."""
    folder = tmp_path_factory.mktemp("whole")
    out = folder / "out.json"
    done = run(folder, "--device", "cpu", "--benchmark-save=before", f"--benchmark-json={out}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    return folder, out


def test_every_case_is_a_group_with_a_row_per_provider(harness, whole):
    """The cases, directions and providers are those that run.py times."""
    _, out = whole
    import registry

    module, groups, every = harness[0], {}, {}
    for row in benchmarks_of(out):
        groups.setdefault(row["group"], set()).add(row["name"])
        every[row["group"], row["name"]] = row
    expected = set()
    for case in registry.select("cpu", "tiny"):
        if case.op == "pack":
            expected.add("pack capped 1M lengths int64 forward")
            continue
        problem = registry.makers()[case.op](case, "cpu")
        for direction in module.directions(problem):
            group = f"{case.op} {case.name} {case.dtype} {direction}"
            expected.add(group)
            names = {
                f"fastrlhf ({name})" if provider.ours else name
                for name, provider in module.providers(problem, compiled=False).items()
            }
            # Third-party heads that multiply in bf16 fail the gate.
            assert {"eager"} <= groups[group] <= names
            assert {n for n in names if n.startswith("fastrlhf")} <= groups[group]
    assert set(groups) == expected
    row = every["gae capped padded 512x1024 float32 forward", "fastrlhf (cpu)"]
    assert row["extra_info"]["bytes"] > 0 and row["extra_info"]["error_share_of_bar"] <= 1
    assert row["stats"]["rounds"] >= 3 and row["stats"]["min"] > 0
    document = json.loads(out.read_text())
    assert document["machine_info"]["fastrlhf"]["torch"] == module.machine("cpu")["torch"]


def test_a_wrong_provider_is_rejected_with_the_reason_and_not_timed(tmp_path):
    calls, out = tmp_path / "calls", tmp_path / "out.json"
    (tmp_path / "wrong_providers.py").write_text(
        WRONG.format(benchmarks=str(BENCHMARKS), calls=str(calls))
    )
    select = ("-p", "wrong_providers", "-k", "gae and padded and not kl_gae and not whitened")
    done = run(tmp_path, "--device", "cpu", *select, "-v", f"--benchmark-json={out}")
    assert done.returncode == 1, done.stdout
    assert "fastrlhf (ours, wrong) is not timed: its error is" in done.stdout
    assert "SKIPPED" in done.stdout and "wrong is not timed: its error is" in done.stdout
    assert "nan is not timed: ValueError: some values are not finite" in done.stdout
    assert {row["name"] for row in benchmarks_of(out)} >= {"eager", "fastrlhf (cpu)"}
    assert not any("wrong" in r["name"] or r["name"] == "nan" for r in benchmarks_of(out))
    assert calls.read_text() == "x"  # the call of the gate alone


def test_on_a_gpu_rows_are_timed_by_replays_on_the_device_clock(tmp_path):
    """Device time of one call, whatever the host takes; the flush of L2 is not in it."""
    out = tmp_path / "out.json"
    (tmp_path / "fake_gpu_clock.py").write_text(
        FAKE_GPU.format(benchmarks=str(BENCHMARKS), tests=str(ROOT / "tests"))
    )
    select = ("-p", "fake_gpu_clock", "-k", "masked_whiten or ranking_loss")
    done = run(tmp_path, "--device", "cuda", *select, f"--benchmark-json={out}")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = benchmarks_of(out)
    groups = {row["group"].split()[0] + " " + row["group"].split()[-1] for row in rows}
    assert groups == {
        "masked_whiten forward",
        "ranking_loss forward",
        "ranking_loss forward+backward",
    }
    assert {row["name"] for row in rows} >= {"eager", "fastrlhf (cpu)"}
    for row in rows:
        assert row["extra_info"]["timed_by"] == "graph" and row["extra_info"]["host_ms"] > 0
        assert row["stats"]["min"] == pytest.approx(50e-6, rel=1e-4)
        assert row["stats"]["max"] == pytest.approx(50e-6, rel=1e-4)
        assert row["options"]["timer"] == "device_events" and row["stats"]["rounds"] >= 3


def test_compare_and_histogram(whole):
    folder, _ = whole
    select = ["--device", "cpu", "-k", "masked_whiten", "--no-compile"]
    has_pygal = importlib.util.find_spec("pygal") is not None
    plots = [f"--benchmark-histogram={folder}/plots/ops"] * has_pygal
    # As if everything had been 1000 times as fast before.
    (path,) = (folder / "storage").rglob("0001_before.json")
    document = json.loads(path.read_text())
    for row in document["benchmarks"]:
        row["stats"]["median"] /= 1000
    path.write_text(json.dumps(document))
    fail = "--benchmark-compare-fail=median:900%"
    done = run(folder, *select, *plots, "--benchmark-compare", fail)
    printed = done.stdout + done.stderr
    assert done.returncode != 0 and "Performance has regressed" in printed
    for name in ("fastrlhf (cpu) (NOW)", "fastrlhf (cpu) (0001_before)", "eager (NOW)"):
        assert name in printed
    assert "machine_info is different" not in printed
    if has_pygal:
        (plot,) = (folder / "plots").iterdir()
        assert "masked_whiten" in plot.name and "fastrlhf (cpu)" in plot.read_text()
    else:
        pytest.skip("compared; no histogram without pygal, of pytest-benchmark[histogram]")


def test_xdist_is_refused_in_one_line(tmp_path):
    pytest.importorskip("xdist")
    done = run(tmp_path, "-n", "2")
    assert done.returncode == 4
    (line,) = [x for x in (done.stdout + done.stderr).splitlines() if x.strip()]
    assert "pass -n 0" in line


def test_a_missing_plugin_is_named_in_one_line(tmp_path):
    command = [sys.executable, "-m", "pytest", "benchmarks/", "-p", "no:benchmark"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 4 and "needs pytest-benchmark" in done.stderr
