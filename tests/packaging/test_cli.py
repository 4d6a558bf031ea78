"""The command line: exit status, the one line of bad input, lazy imports."""

import contextlib
import dataclasses
import gc
import importlib.util
import os
import re
import resource
import subprocess
import sys
import types
from pathlib import Path

import pytest

from fastrlhf import cli, extras
from fastrlhf.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass
class StubConfig:
    """Settings of a stage that does not exist."""

    model: str = ""  # folder of the model
    steps: int = 10
    shift: float = 0.0
    overwrite: bool = False


@pytest.fixture
def stub(monkeypatch):
    """Replace the stage behind `fastrlhf sft`; returns the configs it was called with."""
    module = types.ModuleType("stub_stage")
    module.StubConfig, module.called = StubConfig, []
    module.result = {"loss": 1.0}

    def main(cfg):
        module.called.append(cfg)
        if isinstance(module.result, BaseException):
            raise module.result
        return module.result

    module.main = main
    monkeypatch.setitem(sys.modules, "stub_stage", module)
    monkeypatch.setitem(cli.COMMANDS, "sft", cli.Command("stub_stage", "StubConfig", "", "stub"))
    return module


def bad_input(capsys, *arguments):
    """Run, expect status 2, one line on stderr and nothing on stdout; return the line."""
    assert cli.main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err.rstrip("\n")


def test_options_reach_the_stage(stub, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("sft: {steps: 20, model: a}\nrl_init: {steps: 30}\n")
    assert cli.main(["sft", "--config", str(file), "--model", "b", "--shift", "-0.5"]) == 0
    assert cli.main(["sft", f"--config={file}", "--section=rl_init", "--overwrite"]) == 0
    assert cli.main(["sft", "--overwrite", "false", "--steps=3"]) == 0
    assert stub.called == [
        StubConfig("b", 20, -0.5, False),
        StubConfig("", 30, 0.0, True),
        StubConfig("", 3, 0.0, False),
    ]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["sft", "--stpes", "3"], "unknown option '--stpes'; did you mean 'steps'?"),
        (["sft", "--over-write"], "unknown option '--over-write'; did you mean 'overwrite'?"),
        (["sft", "--confg", "x"], "unknown option '--confg'; did you mean 'config'?"),
        (["sft", "--steps", "3.5"], "--steps: expected int, got '3.5'"),
        (["sft", "--steps"], "--steps: expected a value, got none"),
        (["sft", "--steps", "--overwrite"], "--steps: expected a value, got none"),
        (["sft", "steps=3"], "unexpected argument 'steps=3'; options are given as --key value"),
        (["sft", "--config", "no.yaml"], "config no.yaml: no such file"),
        (["sft", "--section", "x"], "--section x: needs --config, the file with the section"),
    ],
)
def test_bad_input_is_one_line(stub, capsys, arguments, line):
    assert bad_input(capsys, *arguments) == f"fastrlhf sft: error: {line}"
    assert stub.called == []


def test_unknown_command(capsys):
    line = bad_input(capsys, "stf")
    assert line == "fastrlhf: error: unknown command 'stf'; did you mean 'sft'?"


def test_user_error_of_a_stage(stub, capsys):
    stub.result = UserError("prompts.jsonl, line 3:\n  expected 'prompt'")
    line = bad_input(capsys, "sft")
    assert line == "fastrlhf sft: error: prompts.jsonl, line 3: expected 'prompt'"


def test_interrupt(stub, capsys):
    stub.result = KeyboardInterrupt()
    assert cli.main(["sft"]) == 130
    assert capsys.readouterr().err == "fastrlhf sft: interrupted\n"


def test_programming_error_keeps_its_traceback(stub):
    stub.result = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        cli.main(["sft"])


def test_status_of_a_command_that_returns_one(stub):
    stub.result = 1
    assert cli.main(["sft"]) == 1


def test_help_of_a_command(stub, capsys):
    assert cli.main(["sft", "--steps", "3", "--help"]) == 0
    text = capsys.readouterr().out
    assert "folder of the model" in text
    assert "--steps" in text
    assert stub.called == []


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_exists_and_prints_its_help(name, capsys):
    assert cli.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: fastrlhf {name}" in text
    assert callable(importlib.import_module(cli.COMMANDS[name].module).main)
    assert cli.main([]) == 0
    assert f"  {name} " in capsys.readouterr().out


def test_missing_extra_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(extras, "missing", {"train": ["accelerate", "rich"], "bench": ["rich"]}.get)
    line = bad_input(capsys, "sft", "--help")
    needs = (
        "needs the extra [train]: in a clone of fastrlhf, pip install --no-build-isolation '.[train]' "
        "(missing: accelerate, rich)"
    )
    assert line == f"fastrlhf sft: error: {needs}"
    needs = (
        "needs the extra [bench]: in a clone of fastrlhf, pip install --no-build-isolation '.[bench]' "
        "(missing: rich)"
    )
    assert bad_input(capsys, "bench", "gae") == f"fastrlhf bench: error: {needs}"


def test_bench_gives_its_arguments_to_the_script(monkeypatch):
    ran = []

    def start(command, **options):
        ran.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", start)
    assert cli.main(["bench", "gae", "--quick", "--out", "x.json"]) == 3
    script = ROOT / "benchmarks" / "run.py"
    assert ran == [[sys.executable, str(script), "gae", "--quick", "--out", "x.json"]]


def test_bench_of_an_installed_package(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("fastrlhf.bench.__file__", str(tmp_path / "fastrlhf" / "bench.py"))
    assert "clone the repository" in bad_input(capsys, "bench", "gae")


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout


def test_help_is_quick_and_imports_no_torch():
    def cpu_seconds():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    start = cpu_seconds()
    out = run_python(
        "import sys; from fastrlhf.cli import main; main(['--help']);"
        "print({'torch', 'numpy', 'transformers', 'triton', 'yaml'} & set(sys.modules))"
    )
    assert cpu_seconds() - start < 1.0
    assert "usage: fastrlhf" in out
    assert out.splitlines()[-1] == "set()"


@pytest.mark.parametrize("source", ["", "raise ImportError"])
@pytest.mark.parametrize("collects", [True, False])
def test_imports_of_a_command_run_without_the_collector(monkeypatch, tmp_path, source, collects):
    monkeypatch.syspath_prepend(tmp_path)
    name = f"imported_{collects}_{len(source)}"
    (tmp_path / f"{name}.py").write_text(f"import gc\nassert not gc.isenabled()\n{source}\n")
    before = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        with contextlib.suppress(ImportError):
            cli.load(name)
        assert gc.isenabled() == collects
    finally:
        (gc.enable if before else gc.disable)()


def test_python_dash_m():
    command = [sys.executable, "-m", "fastrlhf", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.startswith("fastrlhf 0.")


def test_reader_that_leaves_is_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "fastrlhf", "--help"]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, "")


def test_a_rank_ends_without_the_shutdown_of_the_interpreter():
    """Threads of a process group may not outlive the interpreter; status and output are kept."""
    code = """
import atexit, sys
import torch.distributed as dist
from fastrlhf import cli
atexit.register(print, "shutdown")
if sys.argv[1] == "rank":
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
sys.stdout.write("done")
cli.end(3)
"""
    for kind, printed in (("rank", "done"), ("alone", "doneshutdown\n")):
        done = subprocess.run([sys.executable, "-c", code, kind], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (3, printed), done.stderr


def test_threads_of_a_command_spin_briefly_before_they_sleep():
    """OpenMP's runtime, loaded after `program` starts as torch's is, reads the setting; the user's own is kept."""
    library = Path(importlib.util.find_spec("torch").origin).parent / "lib" / "libgomp.so.1"
    if not library.exists():
        pytest.skip("this torch brings no libgomp")
    code = f"""
import ctypes
from fastrlhf import cli
cli.main = lambda: bool(ctypes.CDLL({str(library)!r})) - 1
cli.program()
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    environment["OMP_DISPLAY_ENV"] = "verbose"
    for given, spins in (
        ({}, "'1000'"),
        ({"GOMP_SPINCOUNT": "7"}, "'7'"),
        ({"OMP_WAIT_POLICY": "active"}, "'[1-9][0-9]{4,}'"),
    ):
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, env=environment | given, capture_output=True, text=True, cwd=ROOT, check=True
        )
        assert re.search(f"GOMP_SPINCOUNT = {spins}", done.stderr), done.stderr


def test_text_that_stdout_cannot_encode_is_escaped():
    code = (
        "from fastrlhf import cli; cli.main = lambda: print('caf\\xe9 \\udcff') or 0; cli.program()"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "caf\\xe9 \\udcff\n"), done.stderr


def test_an_error_line_has_no_terminal_escapes(stub, capsys):
    stub.result = UserError("model 'a\x1b[31m\u202e\udcff'")
    assert bad_input(capsys, "sft") == "fastrlhf sft: error: model 'a\\x1b[31m\\u202e\\udcff'"
