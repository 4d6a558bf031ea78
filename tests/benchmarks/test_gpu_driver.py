"""The driver of `make gpu` and `make gpu-quick` without a GPU: every part runs, whatever the others do, and the
results record it; a dry run of the quick parts on a CPU."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_parts_too(tmp_path, number):
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    code = (
        "import pathlib, sys; sys.path.insert(0, 'benchmarks'); import gpu; gpu.has_gpu = lambda: True\n"
        f"gpu.quick_parts = lambda *_: [gpu.Part('long', [sys.executable, '-c', {child!r}], 50)]\n"
        f"gpu.WORK = pathlib.Path({str(tmp_path)!r})\n"
        f"sys.argv[1:] = ['--quick', '--out', {str(tmp_path)!r}]\n"
        "gpu.main()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    log, until = tmp_path / "long.log", time.monotonic() + 60
    while not (log.exists() and log.read_text().endswith("\n")) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(30) == 128 + number
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)
    assert results(tmp_path)[1]["long"]["reason"] == "exit status -9"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_refuses_before_the_first_part(gpu, tmp_path, monkeypatch, capfd):
    command = ["benchmarks/gpu.py", "--out", str(tmp_path / "out")]
    for arguments in ([], ["--quick"], ["--quick", "--only", "bench"]):
        monkeypatch.setattr(sys, "argv", [*command, *arguments])
        assert gpu.main() == 1
    said, refused = capfd.readouterr()
    assert said == "" and not (tmp_path / "out").exists()
    first, *others = refused.splitlines()
    assert first.startswith("gpu.py: no CUDA device") and "--quick --tiny --device cpu" in first
    assert others == [first] * 2


def test_only_needs_a_name():
    command = [sys.executable, "benchmarks/gpu.py", "--plan", "--only"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "--only" in done.stderr


def test_no_part_outlives_the_budget(gpu, tmp_path):
    todo = [gpu.Part("long", python("import time; time.sleep(60)"), 50)]
    todo.append(gpu.Part("late", python(""), 20, group=1))
    assert gpu.run(todo, tmp_path, budget=1.0) == 1
    _, parts = results(tmp_path)
    assert parts["long"]["seconds"] < 10
    assert parts["late"]["reason"] == "no time left"


def test_parts_of_a_group_run_at_once(gpu, tmp_path):
    """Each part waits for a file of the other."""
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


def test_environment_of_a_part(gpu, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    code = "import os; print(os.environ['FASTRLHF_BUILD'], os.environ['MORE'], os.environ['PYTHONPATH'])"
    gpu.run([gpu.Part("env", python(code), 20, env={"MORE": "1"})], tmp_path)
    assert (tmp_path / "env.log").read_text().split() == ["cuda", "1", str(ROOT)]
    monkeypatch.setenv("PYTHONPATH", "/peers")  # third-party providers
    gpu.run([gpu.Part("env", python(code), 20, env={"MORE": "1"})], tmp_path)
    assert (tmp_path / "env.log").read_text().split()[2] == f"{ROOT}{os.pathsep}/peers"


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
    todo = gpu.parts(tmp_path, tmp_path)
    by_name = {part.name: part for part in todo}
    assert {"build", "doctor", "quickstart", "bench-quick", "bench-rest"} <= set(by_name)
    assert {"gemm-bitwise", "bench-update"} <= set(by_name)
    quick = [part.name for part in gpu.quick_parts(tmp_path)]
    assert [part.name for part in todo][: len(quick)] == quick  # they come first
    assert {
        f"sanitizer-{tool}" for tool in ("memcheck", "racecheck", "synccheck", "initcheck")
    } <= set(by_name)
    # Every test file, once.
    files = [
        arg
        for part in todo
        if re.match(r"tests-\d", part.name)
        for arg in part.command
        if arg.endswith(".py")
    ]
    assert sorted(files) == sorted(map(str, (ROOT / "tests").rglob("test_*.py")))
    # Parts that measure have the GPU to themselves, after the build.
    for name in ("bench-quick", "counters", "bench-rest", "bench-update"):
        assert [p.name for p in todo if p.group == by_name[name].group] == [name]
    beside_build = [p.name for p in todo if p.group <= by_name["build"].group]
    assert all(name == "build" or name.startswith("compile-") for name in beside_build)
    for part in todo:
        assert not part.skip or "is not on PATH" in part.skip or "not installed" in part.skip
        for arg in part.command:
            if arg.endswith(".py"):
                assert (ROOT / arg).is_file()


def longest(todo):
    groups = {part.group for part in todo}
    return sum(max(p.limit for p in todo if p.group == g) for g in groups)


def test_the_budgets_leave_time_for_every_part(gpu, tmp_path):
    """nvcc takes 20 s for one architecture. If the build takes longer, the later parts keep their reserve."""
    assert gpu.QUICK_BUDGET <= 150 and gpu.BUDGET < 600
    quick = gpu.quick_parts(tmp_path)
    limits = {part.name: part.limit for part in quick}
    assert limits["tests-quick"] <= 40
    assert longest(quick) - limits["build"] + 20 <= 1.1 * gpu.QUICK_BUDGET
    reserves = {part.group: gpu.reserved(quick, part.group) for part in quick}
    assert sum(reserves.values()) <= gpu.QUICK_BUDGET - 20
    assert all(reserves[part.group] >= 10 for part in quick if part.group > 0)
    every = gpu.parts(tmp_path, tmp_path)
    assert gpu.reserved(every, 6) >= 50  # updates of 16k and 64k tokens
    rest = [part for part in every if part.name not in limits]
    assert gpu.QUICK_BUDGET + longest(rest) <= gpu.BUDGET + 30


def test_a_part_leaves_the_later_ones_their_reserve(gpu, tmp_path):
    until = (
        "import os, time; time.sleep(0.1); print(float(os.environ['FASTRLHF_UNTIL']) - time.time())"
    )
    todo = [
        gpu.Part("first", python(until), 50),
        gpu.Part("second", python(""), 50, group=1, reserve=12),
        gpu.Part("third", python(""), 50, group=2, reserve=8),
    ]
    assert gpu.run(todo, tmp_path, budget=30) == 0
    _, parts = results(tmp_path)
    assert 9 < parts["first"]["limit_s"] <= 10 and 20 < parts["second"]["limit_s"] <= 22
    assert 0 < float((tmp_path / "first.log").read_text()) < 8.5  # when it starts nothing new


def test_every_quick_op_is_compiled_beside_the_build(gpu, monkeypatch):
    import cases

    assert {op for ops in gpu.WARM_UPS for op in ops} == {case.op for case in cases.GPU_QUICK}
    assert all(case in cases.GPU for case in cases.GPU_QUICK)


def test_results_are_written_after_each_part_and_in_one_piece(gpu, tmp_path):
    """A running part reads the results of the earlier ones."""
    peek = (
        f"import json; d = json.load(open({str(tmp_path / 'results.json')!r})); print(d['not_run'])"
    )
    todo = [
        gpu.Part("a", python("raise SystemExit(1)"), 20),
        gpu.Part("b", python(peek), 20, group=1),
        gpu.Part("c", python(""), 20, group=2),
    ]
    assert gpu.run(todo, tmp_path) == 1
    assert (tmp_path / "b.log").read_text().strip() == "['b', 'c']"
    document, parts = results(tmp_path)
    assert document["not_run"] == [] and parts["c"]["status"] == "passed"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_out_gets_the_results_alone(gpu, tmp_path):
    out, work = tmp_path / "out", tmp_path / "work"
    assert gpu.run([gpu.Part("a", python("print(1)"), 20)], out, work=work) == 0
    assert [p.name for p in out.iterdir()] == ["results.json"]
    assert (work / "a.log").read_text() == "1\n"


def test_a_part_that_is_killed_leaves_what_it_wrote(gpu, tmp_path):
    wrote = tmp_path / "rows.json"
    code = f"open({str(wrote)!r}, 'w').write('[1]'); import time; time.sleep(60)"
    part = gpu.Part("bench-quick", python(code), 2, collect=gpu.document(wrote))
    assert gpu.run([part], tmp_path) == 1
    found = results(tmp_path)[1]["bench-quick"]
    assert found["found"] == [1] and found["reason"] == "still running after 2 s"


def test_an_optional_part_that_fails_counts_as_skipped(gpu, tmp_path):
    part = gpu.Part("counters", python("raise SystemExit('no counters')"), 20, optional=True)
    assert gpu.run([part], tmp_path) == 0
    document, parts = results(tmp_path)
    assert document["skipped"] == {"counters": "exit status 1"}
    assert "no counters" in parts["counters"]["tail"]


def test_tests_that_would_start_too_late_are_skipped_so_that_the_report_is_written(
    gpu, tmp_path, monkeypatch, request
):
    """A session inside this one, with the hook of the suite's conftest.py alone."""
    suite = request.config.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    hook = SimpleNamespace(pytest_runtest_setup=suite.pytest_runtest_setup)
    (tmp_path / "test_some.py").write_text("def test_a(): pass\ndef test_b(): pass\n")
    report = tmp_path / "r.xml"
    options = ["-q", "-c", os.devnull, "--rootdir", str(tmp_path), "-p", "no:cacheprovider"]
    monkeypatch.setenv("FASTRLHF_UNTIL", "1")
    assert pytest.main([*options, f"--junitxml={report}", str(tmp_path)], plugins=[hook]) == 0
    with pytest.raises(ValueError, match="no test ran"):
        gpu.junit(report)()
    text = report.read_text().replace('tests="2"', 'tests="3"')  # as if one had run
    report.write_text(text)
    assert gpu.junit(report)()["out_of_time"] == 2


def test_the_marked_part_is_the_gpu_backends_without_what_compiles(tmp_path):
    files = [ROOT / "tests" / "ops" / f"test_{name}.py" for name in ("gae", "token_logprob")]
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu_quick"]
    done = subprocess.run([*command, *map(str, files)], capture_output=True, text=True, cwd=ROOT)
    chosen = [line for line in done.stdout.splitlines() if "::" in line]
    assert any("test_gae.py::test_error_at_most_twice_eager" in line for line in chosen)
    assert any("test_token_logprob.py::test_values_and_gradients" in line for line in chosen)
    for line in chosen:
        assert re.search(r"\b(cuda|triton)\b", line.partition("::")[2])
        assert not re.search("compiles|opcheck|gradcheck|test_any_", line)


def test_build_is_for_the_gpu_that_is_here(gpu, monkeypatch, tmp_path):
    query = lambda *args, **more: subprocess.CompletedProcess(args, 0, "9.0\n9.0\n", "")  # noqa: E731
    monkeypatch.setattr(gpu.subprocess, "run", query)
    assert gpu.present_arch() == {"TORCH_CUDA_ARCH_LIST": "9.0"}
    assert gpu.quick_parts(tmp_path)[0].env == {"TORCH_CUDA_ARCH_LIST": "9.0"}

    def missing(*args, **more):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(gpu.subprocess, "run", missing)
    assert gpu.present_arch() == {}  # builds for all architectures


def bench_document(rows, **more):
    document = {"date": "2026-01-02", "device": "cuda", "quick": False, "rows": rows}
    document |= {"machine": {"name": "NVIDIA H200"}, "not_run": [], "whole": False}
    return document | more


def test_timings_are_kept_as_a_results_file_with_their_commit(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "commit", lambda: "abc123+")
    path = tmp_path / "results.json"
    quick = {"name": "bench-quick", "found": bench_document([{"op": "gae"}])}
    rest = {"name": "bench-rest", "found": bench_document([{"op": "kl_gae"}])}
    path.write_text(json.dumps({"parts": [{"name": "build"}, quick]}))
    kept = json.loads(gpu.keep(path, tmp_path).read_text())
    assert (kept["commit"], kept["whole"], len(kept["rows"])) == ("abc123+", False, 1)
    updates = {"name": "bench-update", "found": {"largest": {}}}
    path.write_text(json.dumps({"parts": [quick, rest, updates]}))
    target = gpu.keep(path, tmp_path)
    kept = json.loads(target.read_text())
    assert target.name == "nvidia-h200-2026-01-02.json"
    assert kept["updates"] == {"largest": {}} and "gemm_bitwise" not in kept
    assert kept["whole"] and [r["op"] for r in kept["rows"]] == ["gae", "kl_gae"]
    path.write_text(json.dumps({"parts": [{"name": "build"}]}))
    with pytest.raises(ValueError, match="no timings"):
        gpu.keep(path, tmp_path)


NCU = """==PROF== Connected to process 12
token_logprob Llama-3 cuda
"ID","Kernel Name","smsp__inst_executed.sum","gpu__time_duration.sum","launch__registers_per_thread"
"","","inst","us","register/thread"
"0","void rl::token_logprob_fwd_kernel<bf16>(long)","1,000","512.5","40"
"1","token_loss_fwd_kernel","2,000","n/a","32"
"""


def test_counters_are_read_from_what_ncu_prints(gpu):
    import counters

    first, second = counters.parsed(NCU, count=3200)
    assert first["kernel"].startswith("void rl::token_logprob_fwd_kernel")
    assert (first["instructions"], first["instructions_a_logit"]) == (1000.0, 10.0)
    assert (first["duration"], first["duration_unit"], first["registers"]) == (512.5, "us", 40.0)
    assert second["duration"] == "n/a" and second["instructions_a_logit"] == 20.0
    assert counters.parsed("ncu: no permission\n", 1) == []
    assert set(counters.METRICS) <= set(",".join(counters.command()).split(","))


def the_ways_to_call_the_heads(rows):
    """Every row that the targets of the linear ops refer to exists, passed the gate, and has memory and error."""
    named = {
        (row["op"], row["provider"], "masked" in row["case"])
        for row in rows
        if row["ours"] and "median_ms" in row and row["beyond_bytes"] <= row["peak_bytes"]
    }
    update = "linear_ppo_loss"
    assert {
        (update, "cpu, compact", False),
        (update, "cpu, dW added to fp32", False),
        (update, "cpu", True),
        (update, "cpu, rows selected by the caller", True),
        (update, "cpu, num_rows", True),
        ("linear_logprob", "cpu, compact", False),
    } <= named
    blocks = [n for op, n, _ in named if op == "linear_logprob" and n.startswith("cpu, blocks of ")]
    assert blocks
    for head in ("bf16 head", "fp32 head"):
        beside = [row for row in rows if row["provider"] == head]
        assert {row["op"] for row in beside} == {"linear_logprob", update}
        assert all("error" in row and "peak_bytes" in row for row in beside)
    for row in rows:
        if row["op"] == update and row["direction"] != "forward" and "median_ms" in row:
            assert row["three_gemms_ms"] > 0 and row["gradient_errors"].keys() == {
                "hidden",
                "weight",
            }


def test_the_dry_run_covers_the_quick_parts_on_the_cpu(gpu, tmp_path):
    """Every case of the GPU list, at tiny shapes, through gate, clock and results files."""
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--quick", "--tiny"]
    command += ["--device", "cpu", "--out", str(out), "--only", "bench", "build", "gemm"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    document, parts = results(out)
    assert done.returncode == 0, (done.stdout, parts)
    assert set(document["skipped"]) == {"build"} and not document["failed"]
    found = parts["bench-quick"]["found"]
    assert found["not_run"] == [] and found["quick"] and not found["whole"]
    json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)
    import cases

    ran = {(row["op"], row["case"].removeprefix("capped ")) for row in found["rows"]}
    assert ran == {(case.op, case.name) for case in cases.GPU_QUICK}
    assert not [row for row in found["rows"] if row["direction"] == "all"], "a case failed"
    the_ways_to_call_the_heads(found["rows"])
    bits = parts["gemm-bitwise"]["found"]
    assert bits["rows"][0] == {**bits["rows"][0], "what": "the same product again", "equal": True}
    assert {row["what"] for row in bits["rows"][1:]} == {"chunk", "one product", "block"}
    assert {row.get("preset") for row in bits["rows"]} == {None, "fast", "compact"}
    calls = [sys.executable, str(ROOT / "benchmarks" / "counters.py"), "--calls", "--quick"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(calls, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0 and done.stdout.count("token_loss") >= 1


def test_compute_sanitizer_that_is_missing_is_skipped_with_a_reason(gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    tools = [p for p in gpu.parts(tmp_path, tmp_path) if p.name.startswith("sanitizer")]
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
    assert plan.returncode == 0 and re.findall(r"^\d (\S+)", plan.stdout, re.M)[:2] == [
        "tests-quick",
        "tests-0",
    ]
    assert not (tmp_path / "out").exists()
    wrong = subprocess.run([*command, "--only", "nothing"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "no part is called nothing" in wrong.stderr
    absent = [*command, "--keep", str(tmp_path / "absent")]
    refused = subprocess.run(absent, capture_output=True, text=True)
    assert refused.returncode == 1 and "must be a results.json" in refused.stderr


def test_the_program_for_the_sanitizer_calls_every_op():
    """On the CPU kernels, to check the program itself."""
    import fastrlhf
    from fastrlhf.ops import _backend

    if reason := _backend.unavailable_reason("gae", "cpu"):
        pytest.skip(reason)
    command = [sys.executable, str(ROOT / "tests" / "sanitize.py"), "--backend", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    called = dict(re.findall(r"^(\w+): (\d+) calls$", done.stdout, re.M))
    assert set(called) == set(fastrlhf.backends()) and all(int(n) > 0 for n in called.values())
