"""`make gpu` without a GPU: every part has its turn, whatever became of the others, and the results say so."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    return gpu


def python(code):
    return [sys.executable, "-c", code]


def results(out):
    document = json.loads((out / "results.json").read_text())
    return document, {part["name"]: part for part in document["parts"]}


def test_goes_on_after_a_failure_and_ends_with_1(gpu, tmp_path):
    todo = [
        gpu.Part("broken", python("print('so far'); raise SystemExit(3)"), 20, group=0),
        gpu.Part("absent", [str(tmp_path / "no such program")], 20, group=1),
        gpu.Part("skipped", python("1 / 0"), 20, group=1, skip="no such tool here"),
        gpu.Part("fine", python("print('done')"), 20, group=2),
    ]
    assert gpu.run(todo, tmp_path) == 1
    document, parts = results(tmp_path)
    assert document["failed"] == ["broken", "absent"]
    assert document["skipped"] == {"skipped": "no such tool here"}
    assert parts["broken"]["reason"] == "exit status 3"
    assert "so far" in parts["broken"]["tail"]
    assert "did not start" in parts["absent"]["reason"]
    assert parts["fine"]["status"] == "passed" and "tail" not in parts["fine"]
    assert (tmp_path / "fine.log").read_text() == "done\n"


def test_all_right_is_0(gpu, tmp_path, capsys):
    assert (
        gpu.run([gpu.Part("a", python(""), 20), gpu.Part("b", [], 20, skip="why")], tmp_path) == 0
    )
    assert "0 of 2 parts failed" in capsys.readouterr().out


def test_a_part_that_hangs_is_ended_with_its_children(gpu, tmp_path):
    marker = tmp_path / "alive"
    child = f"import time; time.sleep(4); open({str(marker)!r}, 'w')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.perf_counter()
    todo = [gpu.Part("hangs", python(parent), 1.5), gpu.Part("next", python(""), 20, group=1)]
    assert gpu.run(todo, tmp_path) == 1
    _, parts = results(tmp_path)
    assert parts["hangs"]["reason"] == "still running after 2 s"
    assert parts["next"]["status"] == "passed"
    time.sleep(max(0.0, 5.0 - (time.perf_counter() - start)))
    assert not marker.exists()


def test_no_part_outlives_the_budget(gpu, tmp_path):
    todo = [gpu.Part("long", python("import time; time.sleep(60)"), 50)]
    todo.append(gpu.Part("late", python(""), 20, group=1))
    assert gpu.run(todo, tmp_path, budget=1.0) == 1
    _, parts = results(tmp_path)
    assert parts["long"]["seconds"] < 10
    assert parts["late"]["reason"] == "no time was left"


def test_parts_of_a_group_run_at_once(gpu, tmp_path):
    """Each waits for the other's file."""
    code = (
        "import sys, time, pathlib\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "(here / sys.argv[1]).touch()\n"
        "while not (here / sys.argv[2]).exists(): time.sleep(0.01)\n"
    )
    todo = [
        gpu.Part("one", [*python(code), "x", "y"], 30),
        gpu.Part("two", [*python(code), "y", "x"], 30),
    ]
    assert gpu.run(todo, tmp_path) == 0


def test_environment_of_a_part(gpu, tmp_path):
    code = "import os; print(os.environ['FASTRLHF_BUILD'], os.environ['MORE'], os.environ['PYTHONPATH'])"
    gpu.run([gpu.Part("env", python(code), 20, env={"MORE": "1"})], tmp_path)
    assert (tmp_path / "env.log").read_text().split() == ["cuda", "1", str(ROOT)]


def test_pytest_report_is_read(gpu, tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_a(): pass\n"
        "def test_b(): assert False\n"
        "def test_c(): pytest.skip('x')\n"
    )
    report = tmp_path / "r.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        f"--junitxml={report}",
        "-p",
        "no:cacheprovider",
    ]
    part = gpu.Part("tests-0", [*command, str(tmp_path)], 60, collect=gpu.junit(report))
    assert gpu.run([part], tmp_path) == 1
    found = results(tmp_path)[1]["tests-0"]["found"]
    assert found["failed"] == ["test_some::test_b"] or found["failed"][0].endswith("::test_b")
    assert (found["tests"], found["failures"], found["skipped"]) == (3, 1, 1)


def test_a_suite_that_only_skips_is_a_failure(gpu, tmp_path):
    report = tmp_path / "r.xml"
    report.write_text(
        '<testsuites><testsuite tests="2" failures="0" errors="0" skipped="2"/></testsuites>'
    )
    part = gpu.Part("tests-0", python(""), 20, collect=gpu.junit(report))
    assert gpu.run([part], tmp_path) == 1
    assert "no test ran" in results(tmp_path)[1]["tests-0"]["reason"]


FLASH = {"device": "cuda:0", "precision": "bf16", "attention": "torch varlen_attn (flash kernel)"}


@pytest.mark.parametrize(
    "ran, complaint",
    [
        (FLASH, ""),
        ({**FLASH, "device": "cpu"}, "not on cuda"),
        ({**FLASH, "precision": "fp32"}, "not on cuda in bf16"),
        ({**FLASH, "attention": "SDPA over right-padded sequences"}, "not a varlen flash kernel"),
    ],
)
def test_quickstart_must_have_run_where_it_says(gpu, tmp_path, ran, complaint):
    (tmp_path / "report.json").write_text(json.dumps({"environment": ran}))
    (tmp_path / "report.html").write_text("x")
    out = tmp_path / "out"
    part = gpu.Part("quickstart", python(""), 20, collect=gpu.quickstart(tmp_path, out))
    assert gpu.run([part], out) == int(bool(complaint))
    assert complaint in results(out)[1]["quickstart"]["reason"]


def test_the_plan_holds_what_it_must(gpu, tmp_path):
    todo = gpu.parts(tmp_path)
    by_name = {part.name: part for part in todo}
    assert {"build", "doctor", "quickstart", "bench"} <= set(by_name)
    assert {
        f"sanitizer-{tool}" for tool in ("memcheck", "racecheck", "synccheck", "initcheck")
    } <= set(by_name)
    # Every test file, once.
    files = [
        arg
        for part in todo
        if part.name.startswith("tests-")
        for arg in part.command
        if arg.endswith(".py")
    ]
    assert sorted(files) == sorted(map(str, (ROOT / "tests").glob("test_*.py")))
    # The benchmarks have the GPU to themselves, after the build.
    assert [p.name for p in todo if p.group == by_name["bench"].group] == ["bench"]
    assert by_name["build"].group < min(p.group for p in todo if p.name != "build")
    groups = {part.group for part in todo}
    assert sum(max(p.limit for p in todo if p.group == g) for g in groups) <= gpu.BUDGET < 600
    for part in todo:
        assert not part.skip or "compute-sanitizer" in part.skip
        for arg in part.command:
            if arg.endswith(".py"):
                assert (ROOT / arg).is_file()


def test_compute_sanitizer_that_is_missing_is_skipped_with_a_reason(gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    tools = [p for p in gpu.parts(tmp_path) if p.name.startswith("sanitizer")]
    assert len(tools) == 4 and all(p.skip == "compute-sanitizer is not on PATH" for p in tools)


def test_shards_are_of_about_the_same_size(gpu, tmp_path):
    for i in range(9):
        (tmp_path / f"test_{i}.py").write_text("x" * (100 * (i + 1)))
    heaps = gpu.shards(sorted(tmp_path.iterdir()), 3)
    sizes = [sum(f.stat().st_size for f in heap) for heap in heaps]
    assert len(heaps) == 3 and sum(sizes) == 4500 and max(sizes) - min(sizes) <= 300


def test_plan_and_only_from_the_command_line(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--out", str(tmp_path / "out")]
    plan = subprocess.run([*command, "--plan", "--only", "tests"], capture_output=True, text=True)
    assert plan.returncode == 0 and re.findall(r"^\d (\S+)", plan.stdout, re.M)[0] == "tests-0"
    assert not (tmp_path / "out").exists()
    wrong = subprocess.run([*command, "--only", "nothing"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "no part is called nothing" in wrong.stderr


def test_the_sanitizers_program_calls_every_op():
    """On the CPU kernels: the program itself is in order."""
    import fastrlhf
    from fastrlhf.ops import _backend

    if reason := _backend.unavailable_reason("gae", "cpu"):
        pytest.skip(reason)
    command = [sys.executable, str(ROOT / "tests" / "sanitize.py"), "--backend", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    called = dict(re.findall(r"^(\w+): (\d+) calls$", done.stdout, re.M))
    assert set(called) == set(fastrlhf.backends()) and all(int(n) > 0 for n in called.values())
