"""fastrlhf doctor: what is installed, why the rest is unavailable, and status 1 only when broken."""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastrlhf
from fastrlhf import _compiled, cli, doctor, extras
from fastrlhf.integrations import _versions
from fastrlhf.ops import _backend, _library

BACKENDS = ("reference", "cpu", "triton", "cuda")


def report_of(capsys, status=0):
    assert cli.main(["doctor", "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_an_op_that_is_not_measured_yet(capsys, monkeypatch):
    monkeypatch.delitem(_backend.AUTO, ("gae", "cpu"))
    entry = report_of(capsys)["auto"]["gae"]
    assert entry == {"order": ["cpu", "reference"], "measured": "not measured yet"}


def test_json_agrees_with_the_package(capsys):
    report = report_of(capsys)
    assert report["problems"] == []
    assert report["fastrlhf"] == fastrlhf.__version__
    assert report["torch"]["version"] == torch.__version__
    assert report["versions"]["torch"] == importlib.metadata.version("torch")
    table = fastrlhf.backends()
    assert set(report["ops"]) == set(table)
    for op, row in report["ops"].items():
        assert row == table[op]
        assert set(row) == {*BACKENDS, "auto"}
        assert row[row["auto"]] == "available"
        assert all(row.values())
        order = report["auto"][op]["order"]
        assert row["auto"] == next(b for b in order if row[b] == "available")
        assert report["auto"][op]["measured"] == _backend.measured(op, report["device"])
    assert report["attention"]["path"]


def test_text_names_every_op_and_reason(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for op, row in fastrlhf.backends().items():
        assert op in text
        for backend in BACKENDS:
            assert row[backend] == "available" or row[backend] in text
        assert any(line.split()[:2] == [op, row["auto"]] for line in text.splitlines())
        assert _backend.measured(op, "cuda" if torch.cuda.is_available() else "cpu") in text


@pytest.mark.skipif(bool(_backend._extension_error), reason="the kernel library is not built")
def test_library_facts(capsys):
    kernels = report_of(capsys)["kernels"]
    assert kernels == {"present": True, **_library.build_info()}


@pytest.mark.skipif(bool(_backend._extension_error), reason="the kernel library is not built")
def test_library_of_another_version_is_a_broken_install(capsys, monkeypatch):
    monkeypatch.setattr(fastrlhf, "__version__", "99.0")
    (problem,) = report_of(capsys, status=1)["problems"]
    assert (
        problem
        == f"the kernel library is of fastrlhf {_library.build_info()['version']}: build it again"
    )


def test_missing_library_is_no_broken_install(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(_library, "PATH", tmp_path / "libfastrlhf.so")
    kernels = report_of(capsys)["kernels"]
    assert kernels["present"] is False
    assert "the reference backend serves every op" in kernels["reason"]
    assert cli.main(["doctor"]) == 0
    assert "absent: the kernel library is not built" in " ".join(capsys.readouterr().out.split())


def test_library_that_does_not_load_is_a_broken_install(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(_library, "PATH", tmp_path / "libfastrlhf.so")
    _library.PATH.write_text("no ELF file")
    (problem,) = report_of(capsys, status=1)["problems"]
    assert "the kernel library does not load" in problem
    assert "file too short" in problem or "invalid ELF header" in problem  # the loader's own words


def cut(path, source, size):
    """A copy of a compiled file whose end is missing: the loader would map it, and a first access be a SIGBUS."""
    whole = source.read_bytes()
    path.write_bytes(whole[:size])
    return f"{path.name} is cut off: {size} of "


@pytest.mark.skipif(bool(_backend._extension_error), reason="the kernel library is not built")
def test_a_library_that_is_cut_off(capsys, monkeypatch, tmp_path):
    real = _library.PATH
    monkeypatch.setattr(_library, "PATH", tmp_path / real.name)
    said = cut(_library.PATH, real, real.stat().st_size - 1)
    assert said in _compiled.cut_off(_library.PATH)
    said = cut(_library.PATH, real, 100_000)
    (problem,) = report_of(capsys, status=1)["problems"]
    assert f"the kernel library does not load: {said}" in problem
    assert f"build it again for torch {torch.__version__}: pip install" in problem
    assert _compiled.cut_off(real) == ""


def test_a_library_of_something_else(capsys, monkeypatch, tmp_path):
    _C = pytest.importorskip("fastrlhf._C")
    monkeypatch.setattr(_library, "PATH", tmp_path / "libfastrlhf.so")
    _library.PATH.write_bytes(Path(_C.__file__).read_bytes())
    (problem,) = report_of(capsys, status=1)["problems"]
    assert "libfastrlhf.so is not a library of fastrlhf; build it again" in problem


def test_a_packer_that_is_cut_off(capsys, monkeypatch, tmp_path):
    spec = importlib.util.find_spec("fastrlhf._C")
    if spec is None:
        pytest.skip("fastrlhf._C is not built")
    real = importlib.util.find_spec
    broken = importlib.util.spec_from_file_location("fastrlhf._C", tmp_path / "_C.so")
    said = cut(tmp_path / "_C.so", Path(spec.origin), 100_000)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *r: broken if n == "fastrlhf._C" else real(n, *r)
    )
    module, reason = _compiled.packer()
    assert module is None and f"fastrlhf._C is built, but does not load: {said}" in reason
    assert report_of(capsys, status=1)["packer"]["runs"] == "Python"


def test_missing_requirement_is_a_broken_install(capsys, monkeypatch):
    version = extras.version
    monkeypatch.setattr(extras, "version", lambda name: None if name == "triton" else version(name))
    assert report_of(capsys, status=1)["problems"] == ["triton is not installed"]
    assert cli.main(["doctor"]) == 1
    assert "broken install: triton is not installed" in capsys.readouterr().out


def test_missing_extra_is_no_broken_install(capsys, monkeypatch):
    packages = {"train": ["accelerate", "no-such-package"], "report": ["numpy"]}
    monkeypatch.setattr(extras, "packages", lambda extra: packages.get(extra, []))
    report = report_of(capsys)
    assert report["extras"] == {"train": ["no-such-package"], "report": []}
    assert report["versions"]["no-such-package"] is None
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    how = "in a clone of fastrlhf, pip install --no-build-isolation '.[train]'"
    assert f"[train] lacks no-such-package: {how}\n" in text
    assert "[report] installed\n" in text


def test_tree_that_is_not_installed(capsys, monkeypatch):
    monkeypatch.setattr(extras, "packages", lambda extra: [])
    assert report_of(capsys)["extras"] == {}
    assert cli.main(["doctor"]) == 0
    assert "extras        unknown" in capsys.readouterr().out


@pytest.mark.parametrize("built", [False, True])
def test_packer(capsys, monkeypatch, built):
    """Not built: the Python packer runs. Built, but not loading: a broken install."""
    real = importlib.util.find_spec
    spec = importlib.util.spec_from_loader("fastrlhf._C", loader=None) if built else None
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *r: spec if n == "fastrlhf._C" else real(n, *r)
    )
    monkeypatch.setitem(sys.modules, "fastrlhf._C", None)
    report = report_of(capsys, status=int(built))
    assert report["packer"]["runs"] == "Python"
    said = "fastrlhf._C is built, but does not load" if built else "fastrlhf._C is not built for"
    assert report["packer"]["reason"].startswith(said)
    assert len(report["problems"]) == built
    assert cli.main(["doctor"]) == built
    assert f"Python ({said}" in capsys.readouterr().out


def test_old_torch_is_a_broken_install(capsys, monkeypatch):
    monkeypatch.setattr(fastrlhf, "OLDEST_TORCH", (99, 0))
    (problem,) = report_of(capsys, status=1)["problems"]
    assert f"needs torch >= 99.0; this is torch {torch.__version__}. Upgrade it" in problem
    assert cli.main(["doctor"]) == 1


STUB = "torch = sys.modules['torch'] = types.ModuleType('torch'); torch.__version__ = "


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("sys.version_info = (3, 9, 1, 'final', 0)", "", "needs Python >= 3.10; this is 3.9.1"),
        ("", f"{STUB}'2.9.1'", "needs torch >= 2.10; this is torch 2.9.1"),
        ("", f"{STUB}'9.0.0'", "does not work with torch 9.0.0: cannot import name"),
    ],
)
def test_an_import_that_cannot_work_says_why(before, after, said):
    """An unsupported Python, and a torch exchanged below or above the tested releases."""
    code = f"import sys, types; {before}\nimport fastrlhf; {after}\nfastrlhf.gae"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: fastrlhf ") and said in last, done.stderr


def test_transformers_that_does_not_load_is_a_broken_install(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "fastrlhf.integrations.attention", raising=False)
    monkeypatch.delattr(fastrlhf.integrations, "attention", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    (problem,) = report_of(capsys, status=1)["problems"]
    assert problem.startswith("transformers does not load: ")


@pytest.mark.skipif(bool(_backend._extension_error), reason="the kernel library is not built")
@pytest.mark.parametrize("asked", ["nonsense", "AVX2", "baseline"])
def test_an_instruction_set_that_does_not_exist(capsys, monkeypatch, asked):
    monkeypatch.setenv("FASTRLHF_CPU_ISA", asked)
    assert cli.main(["doctor"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    said = f"FASTRLHF_CPU_ISA={asked} is not one of these and is ignored"
    assert (said in text) == (asked != "baseline")


def test_flash_attention_is_looked_for(capsys, monkeypatch):
    assert report_of(capsys)["attention"]["flash_attention"] == [
        label
        for module, label in doctor.FLASH_ATTENTION.items()
        if importlib.util.find_spec(module) is not None
    ]
    real = importlib.util.find_spec
    spec = importlib.util.spec_from_loader("flash_attn", loader=None)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *r: spec if n == "flash_attn" else real(n, *r)
    )
    assert "flash-attn 2" in report_of(capsys)["attention"]["flash_attention"]


def test_trainers_are_found_without_importing_them(capsys, monkeypatch):
    versions = {"trl": "1.16.4", "transformers": "4.0.0", "openrlhf": "0.11.2"}
    monkeypatch.setattr(_versions, "installed", versions.get)
    for name in ("trl", "openrlhf", "verl"):
        monkeypatch.setitem(sys.modules, name, None)  # importing one would raise
    found = report_of(capsys)["integrations"]
    assert found["trl"] == {"version": "1.16.4", "tested": "1.16", "in_tested_range": True}
    assert found["transformers"]["in_tested_range"] is False
    assert found["verl"]["version"] is None
    assert cli.main(["doctor"]) == 0  # an untested version is no broken install
    text = " ".join(capsys.readouterr().out.split())
    assert "trl 1.16.4 (in the tested range 1.16)" in text
    assert (
        f"transformers 4.0.0 (OUTSIDE the tested range {_versions.TESTED['transformers']})" in text
    )
    assert "verl not installed" in text
