"""`pytest benchmarks/`: groups and rows, the gate, JSON, comparison and histograms of pytest-benchmark."""

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


def test_every_case_is_a_group_with_a_row_per_provider(harness, tmp_path):
    """The cases, directions and providers are those that run.py times."""
    out = tmp_path / "out.json"
    done = run(tmp_path, "--device", "cpu", f"--benchmark-json={out}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
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


def test_compare(tmp_path):
    select = ("--device", "cpu", "-k", "masked_whiten")
    saved = run(tmp_path, *select, "--benchmark-save=before")
    assert saved.returncode == 0, saved.stdout
    done = run(tmp_path, *select, "--benchmark-compare", "--benchmark-compare-fail=median:100000%")
    assert done.returncode == 0, done.stdout
    for name in ("fastrlhf (cpu) (NOW)", "fastrlhf (cpu) (0001_before)", "eager (NOW)"):
        assert name in done.stdout
    assert "machine_info is different" not in done.stdout + done.stderr
    (path,) = (tmp_path / "storage").rglob("0001_before.json")
    document = json.loads(path.read_text())
    for row in document["benchmarks"]:
        row["stats"]["median"] /= 1000
    path.write_text(json.dumps(document))
    slower = run(tmp_path, *select, "--benchmark-compare", "--benchmark-compare-fail=median:900%")
    assert slower.returncode != 0 and "Performance has regressed" in slower.stdout + slower.stderr


def test_histogram(tmp_path):
    pytest.importorskip("pygal")
    done = run(tmp_path, "-k", "masked_whiten", f"--benchmark-histogram={tmp_path}/plots/ops")
    assert done.returncode == 0, done.stdout
    (path,) = (tmp_path / "plots").iterdir()
    assert "masked_whiten" in path.name and "fastrlhf (cpu)" in path.read_text()


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
