"""The wheel and the sdist: built from this tree, compared with it, installed and run elsewhere.

No network and one compilation: the wheel is built in the checkout, over the objects that lie there
already, and the sdist's build takes the same objects once its sources are seen to be identical.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

import fastrlhf
from fastrlhf.ops import _backend

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
HAS_EXTENSION = not _backend._extension_error
needs_extension = pytest.mark.skipif(not HAS_EXTENSION, reason="the extension is not built here")
pytestmark = pytest.mark.slow

# Packed sequences through one op of each kind, and what an install must hold besides code.
USE = """
import json, sys, importlib.util, torch, fastrlhf
from fastrlhf.train import config, packing
backend = sys.argv[1]
logits = torch.randn(4, 7)
targets = torch.tensor([0, 6, 3, 2])
ours = fastrlhf.token_logprob(logits, targets, backend=backend)
truth = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
print(json.dumps({
    "file": fastrlhf.__file__,
    "error": (ours - truth).abs().max().item(),
    "auto": fastrlhf.backends()["token_logprob"],
    "bins": [b.tolist() for b in packing.pack([5, 3, 3, 5], 8)],
    "recipe": str(config.recipe_path("quickstart")),
    "kernel": importlib.util.find_spec("fastrlhf.kernels.token_logprob").origin,
}))
"""


def run(*command, cwd=None, **env):
    """Run a command outside the checkout's import path; its output must say what went wrong."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FASTRLHF_BUILD")}
    # This environment's ninja first: the objects of another release would be compiled again.
    clean["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), clean.get("PATH", "")])
    result = subprocess.run(
        [str(c) for c in command], cwd=cwd, env={**clean, **env}, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def build(source, kind, out, *options, **env):
    """Build a wheel or sdist of `source` into `out`; returns its path."""
    settings = [f"-C--build-option={option}" for option in options]
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", out]
    run(*command, *settings, source, cwd=source, **env)
    (made,) = Path(out).iterdir()
    return made


def install(wheel, folder):
    """A clean environment that holds the wheel and sees only this one's third-party packages."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # A plain path line: .pth files over there, such as an editable fastrlhf's, are not followed.
    (site / "third_party.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    run(*pip, "--no-index", "--no-deps", "--disable-pip-version-check", wheel)
    return python


def use(python, backend):
    """Run USE in an installed environment, from a folder that is not the checkout."""
    folder = python.parents[1]
    report = json.loads(run(python, "-c", USE, backend, cwd=folder).splitlines()[-1])
    assert Path(report["file"]).is_relative_to(folder)
    assert Path(report["recipe"]).is_relative_to(folder)
    assert Path(report["kernel"]).is_relative_to(folder)
    assert report["error"] < 1e-6
    assert report["bins"] == [[0, 1], [2, 3]]
    return report


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("packaging")


@pytest.fixture(scope="module")
def wheel(scratch):
    # A library folder of its own: setuptools would ship leftovers of an older build/lib.
    library = f"--build-lib={scratch / 'lib'}"
    kind = {} if HAS_EXTENSION else {"FASTRLHF_BUILD": "none"}
    return build(ROOT, "wheel", scratch / "wheel", "build", library, **kind)


@pytest.fixture(scope="module")
def sdist(scratch):
    """The sdist, unpacked. Built from a copy: setuptools would add files that an old egg-info lists."""
    leave = (
        ".git",
        ".venv*",
        "build",
        "dist",
        "runs",
        "*.egg-info",
        "*.so",
        "__pycache__",
        ".*_cache",
    )
    shutil.copytree(ROOT, scratch / "tree", ignore=shutil.ignore_patterns(*leave))
    archive = build(scratch / "tree", "sdist", scratch / "sdist", FASTRLHF_BUILD="none")
    with tarfile.open(archive) as tar:
        tar.extractall(scratch / "unpacked", filter="data")
    (folder,) = (scratch / "unpacked").iterdir()
    return folder


def files_under(folder, *suffixes):
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
        if not suffixes or path.suffix in suffixes
    }


def test_wheel_holds_the_tree_and_nothing_else(wheel):
    expected = files_under("fastrlhf", ".py")
    # Checkout only: the three lines that let an uninstalled tree find ../kernels.
    expected -= {"fastrlhf/kernels/__init__.py"}
    expected |= {f"fastrlhf/{name}" for name in files_under("kernels", ".py")}
    expected |= {f"fastrlhf/{name}" for name in files_under("recipes", ".yaml")}
    expected |= files_under("fastrlhf/demo/data") | files_under("fastrlhf/demo/base")
    if HAS_EXTENSION:
        expected |= {"fastrlhf/libfastrlhf.so"}
        expected |= {"fastrlhf/_C" + sysconfig.get_config_var("EXT_SUFFIX")}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {n for n in names if ".dist-info/" not in n} == expected
    assert not any(n.startswith("kernels/") for n in names)


def test_wheel_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    info = f"fastrlhf-{fastrlhf.__version__}.dist-info"
    metadata = archive.read(f"{info}/METADATA").decode()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == fastrlhf.__version__
    assert f"\nVersion: {fastrlhf.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert f"{info}/licenses/LICENSE" in archive.namelist()
    assert "fastrlhf = fastrlhf.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    required = set(re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.MULTILINE))
    assert {"torch", "transformers", "accelerate", "jsonargparse"} <= required
    assert not required & {"trl", "verl", "lm-eval", "pytest"}, "extras are optional"


def test_sdist_holds_what_it_needs(sdist):
    shipped = {str(p.relative_to(sdist)) for p in sdist.rglob("*") if p.is_file()}
    for folder in ("csrc", "kernels", "recipes"):
        assert files_under(folder) <= shipped
    assert files_under("fastrlhf", ".py") <= shipped
    for name in ("setup.py", "pyproject.toml", "LICENSE", "Makefile", "README.md"):
        assert name in shipped
    assert not [n for n in shipped if n.endswith((".so", ".o", ".pyc")) or n.startswith("build/")]
    for name in files_under("csrc"):
        assert (sdist / name).read_bytes() == (ROOT / name).read_bytes()


def test_wheel_installs_and_runs(wheel, scratch):
    python = install(wheel, scratch / "from_wheel")
    report = use(python, "cpu" if HAS_EXTENSION else "reference")
    if HAS_EXTENSION:
        assert report["auto"]["cpu"] == "available"
    command = python.parent / "fastrlhf"
    assert run(command, "--version").strip() == f"fastrlhf {fastrlhf.__version__}"
    data = run(python, "-c", "import fastrlhf.demo as d, os; print(os.listdir(d.__path__[0]))")
    assert "data" in data


@needs_extension
def test_sdist_builds_with_the_extension(sdist, wheel, scratch):
    compiler = scratch / "c++"
    # Same sources (tested above), same flags: hand out the checkout's object instead of compiling.
    compiler.write_text(
        "#!/bin/sh\n"
        'for a in "$@"; do\n'
        '  case "$last" in -o) object=$a;; -MF) depfile=$a;; esac; last=$a\n'
        "done\n"
        f'have="{ROOT}/build/${{object#*/build/}}"\n'
        'case "$object" in *.o) [ -f "$have" ] && cp "$have" "$object" &&\n'
        '  echo "$object:" > "$depfile" && exit 0;; esac\n'
        f'exec {shutil.which("g++") or "c++"} "$@"\n'
    )
    compiler.chmod(0o755)
    made = build(sdist, "wheel", scratch / "sdist_wheel", CXX=str(compiler), FASTRLHF_BUILD="cpu")
    assert set(zipfile.ZipFile(made).namelist()) == set(zipfile.ZipFile(wheel).namelist())
    use(install(made, scratch / "from_sdist"), "cpu")


def test_without_the_extension(sdist, scratch):
    made = build(sdist, "wheel", scratch / "pure", FASTRLHF_BUILD="none")
    assert not [n for n in zipfile.ZipFile(made).namelist() if n.endswith(".so")]
    python = install(made, scratch / "from_pure")
    report = use(python, "reference")
    assert report["auto"]["reference"] == "available"
    assert "not built" in report["auto"]["cpu"]
    doctor = json.loads(run(python.parent / "fastrlhf", "doctor", "--json", cwd=scratch))
    assert doctor["extension"]["present"] is False
    assert "reference backend serves every op" in doctor["extension"]["reason"]
    assert {row["auto"] for row in doctor["ops"].values()} == {"reference"}
    assert doctor["problems"] == []


@pytest.mark.skipif(os.name != "posix", reason="the stand-in for nvcc is a shell script")
def test_toolkit_behind_an_nvcc_that_is_a_script(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("fastrlhf_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    toolkit, path = tmp_path / "cuda-13.0", tmp_path / "bin"
    for folder in (toolkit / "bin", toolkit / "lib64", path):
        folder.mkdir(parents=True)
    (path / "nvcc").write_text(f"#!/bin/sh\necho '#$ TOP={toolkit}/bin/..' >&2\n")
    (path / "nvcc").chmod(0o755)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    ext = SimpleNamespace(CUDA_HOME=str(tmp_path))
    setup.follow_nvcc(ext)
    assert ext.CUDA_HOME == str(toolkit)
    (toolkit / "lib64" / "libcudart.so").touch()
    (path / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    setup.follow_nvcc(ext)  # a toolkit that holds its runtime is not asked
    assert ext.CUDA_HOME == str(toolkit)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    ext.CUDA_HOME = str(tmp_path)
    setup.follow_nvcc(ext)  # what the user says counts
    assert ext.CUDA_HOME == str(tmp_path)


def test_a_build_that_sees_no_torch_stops():
    """An isolated build would else end in a package without kernels, and pip hides what it says."""
    spec = importlib.util.spec_from_file_location("fastrlhf_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    with pytest.raises(SystemExit, match="--no-build-isolation.*FASTRLHF_BUILD=none"):
        setup.choose("auto", None)
    assert setup.choose("none", None) == "none"
