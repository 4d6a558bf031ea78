"""Wheel and sdist: built from this tree, compared with it, installed in clean environments and run there.

No network and one compilation. The wheel is built in the checkout, over the objects that are there already. The
sdist's build takes the same objects after a test has compared its sources. Environments link this one's packages.
"""

import importlib.metadata
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
from packaging.requirements import Requirement
from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

import fastrlhf
from fastrlhf.ops import _backend, _library

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HAS_LIBRARY = not _backend._extension_error
needs_library = pytest.mark.skipif(not HAS_LIBRARY, reason="the kernel library is not built here")
pytestmark = pytest.mark.slow
# The wheel of the checkout is built with the check of the build requirements, which starts setup.py once more.
UNCHECKED = "--skip-dependency-check"

# One op on each kind of input, what the base install holds besides code, and what the doctor says of it.
USE_OPS = """
import contextlib, io, json, sys, importlib.util, torch, fastrlhf
from fastrlhf import cli
backend, *asks_doctor = sys.argv[1:]
def doctor(*options):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        cli.main(["doctor", *options])
    return said.getvalue()
logits = torch.randn(4, 7)
targets = torch.tensor([0, 6, 3, 2])
ours = fastrlhf.token_logprob(logits, targets, backend=backend)
truth = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
rewards = torch.tensor([[1.0, 2.0, 3.0]])
advantages, returns = fastrlhf.gae(rewards, 0 * rewards, gamma=1.0, lam=1.0, backend=backend)
print(json.dumps({
    "file": fastrlhf.__file__,
    "error": (ours - truth).abs().max().item(),
    "gae": returns.tolist(),
    "available": fastrlhf.backends()["token_logprob"],
    "kernel": importlib.util.find_spec("fastrlhf.kernels.token_logprob").origin,
    "numpy": importlib.util.find_spec("numpy") is not None,
    "doctor": [doctor(), doctor("--json")] if asks_doctor else None,
}))
"""
USE_PACKER = "from fastrlhf.train import packing; print(packing._C, packing.pack([5, 3, 3, 5], 8))"
USE_TRAINER = """
import json
from fastrlhf import cli
from fastrlhf.train import config, packing
status = {name: cli.main([name, "--help"]) for name in cli.COMMANDS}
print(json.dumps({
    "status": status,
    "bins": [b.tolist() for b in packing.pack([5, 3, 3, 5], 8)],
    "packer": "C++" if packing._C else "Python",
    "recipe": str(config.recipe_path("quickstart")),
}))
"""


def start(*command, cwd=None, **env):
    """Run a command outside the checkout's import path."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FASTRLHF_BUILD")}
    # This environment's ninja first: another release would compile all objects again.
    clean["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), clean.get("PATH", "")])
    return subprocess.run(
        [str(c) for c in command], cwd=cwd, env={**clean, **env}, capture_output=True, text=True
    )


def run(*command, cwd=None, **env):
    """The output of a command that must succeed."""
    result = start(*command, cwd=cwd, **env)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def build(source, kind, out, *settings, **env):
    """Build a wheel or sdist of `source` into `out`; returns its path."""
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", out]
    run(*command, *settings, source, cwd=source, **env)
    (made,) = Path(out).iterdir()
    return made


def closure(requirements, extras=()):
    """Names of the distributions that pip would install here for a list of requirements."""
    found = set()
    for text in requirements:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        if requirement.name == "fastrlhf":
            for extra in requirement.extras:
                found |= closure(PROJECT["optional-dependencies"][extra])
            continue
        key = (requirement.name, tuple(sorted(requirement.extras)))
        if key not in _closures:
            _closures[key] = {requirement.name}  # ends the recursion where packages need each other
            needed = importlib.metadata.requires(requirement.name) or []
            _closures[key] |= closure(needed, requirement.extras)
        found |= _closures[key]
    return found


_closures: dict[tuple, set[str]] = {}


def site_packages(python):
    return Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())


def environment(folder, requirements):
    """A virtual environment that holds what `requirements` install and nothing else; returns its Python."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = site_packages(python)
    for name in closure(requirements):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    return python


def listed(extra=None):
    """The requirements of the base install and of one extra."""
    return PROJECT["dependencies"] + PROJECT["optional-dependencies"].get(extra, [])


def install(wheel, folder, extra=None):
    """A clean environment that holds the wheel, its dependencies and those of one extra.

    The wheel is unpacked: one test has pip install it, which takes seconds.
    """
    python = environment(folder, listed(extra))
    *_, tags = parse_wheel_filename(wheel.name)
    assert tags & set(sys_tags()), f"pip would refuse {wheel.name} here"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site_packages(python))
    return python


def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(f"fastrlhf-{fastrlhf.__version__}.dist-info/METADATA").decode()


def use_ops(python, backend, *asks_doctor, first=""):
    """Run USE_OPS, after other code, in an installed environment, from a folder that is not the checkout.

    Returns its report, in which "first" is what the other code printed.
    """
    folder = python.parents[1]
    said = run(python, "-c", first + USE_OPS, backend, *asks_doctor, cwd=folder)
    *printed, last = said.splitlines()
    report = {**json.loads(last), "first": "\n".join(printed)}
    assert Path(report["file"]).is_relative_to(folder)
    assert Path(report["kernel"]).is_relative_to(folder)
    assert report["error"] < 1e-6
    assert report["gae"] == [[6.0, 5.0, 3.0]]
    return report


def use_trainer(python):
    """Run USE_TRAINER; returns the exit status of each command's --help, and which packer ran."""
    folder = python.parents[1]
    report = json.loads(run(python, "-c", USE_TRAINER, cwd=folder).splitlines()[-1])
    assert Path(report["recipe"]).is_relative_to(folder)
    assert report["bins"] == [[0, 1], [2, 3]]
    return report


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("packaging")


@pytest.fixture(scope="module")
def wheel(scratch):
    # A library folder of its own: setuptools would ship leftovers of an older build/lib.
    library = [
        f"-C--build-option={option}" for option in ("build", f"--build-lib={scratch / 'lib'}")
    ]
    kind = {} if HAS_LIBRARY else {"FASTRLHF_BUILD": "none"}
    return build(ROOT, "wheel", scratch / "wheel", *library, **kind)


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
    archive = build(scratch / "tree", "sdist", scratch / "sdist", UNCHECKED, FASTRLHF_BUILD="none")
    with tarfile.open(archive) as tar:
        tar.extractall(scratch / "unpacked", filter="data")
    (folder,) = (scratch / "unpacked").iterdir()
    return folder


def repackage(python, sdist, out):
    """A wheel of the checkout's compiled kernels, made from the sdist by a Python that needs no torch."""
    shutil.copytree(sdist, out / "source", ignore=shutil.ignore_patterns("build"))
    command = [python, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", out / "wheel"]
    run(*command, cwd=out / "source", FASTRLHF_LIBRARY=str(_library.PATH))
    (made,) = (out / "wheel").iterdir()
    return made


def files_under(folder, *suffixes):
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
        if not suffixes or path.suffix in suffixes
    }


def test_wheel_holds_the_tree_and_nothing_else(wheel):
    expected = files_under("fastrlhf", ".py")
    # Checkout only: it lets a tree that is not installed find ../kernels.
    expected -= {"fastrlhf/kernels/__init__.py"}
    expected |= {f"fastrlhf/{name}" for name in files_under("kernels", ".py")}
    expected |= {f"fastrlhf/{name}" for name in files_under("recipes", ".yaml")}
    expected |= files_under("fastrlhf/demo/data") | files_under("fastrlhf/demo/base")
    if HAS_LIBRARY:
        expected |= {"fastrlhf/libfastrlhf.so"}
        expected |= {"fastrlhf/_C" + sysconfig.get_config_var("EXT_SUFFIX")}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {n for n in names if ".dist-info/" not in n} == expected
    assert not any(n.startswith("kernels/") for n in names)


def test_wheel_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    info = f"fastrlhf-{fastrlhf.__version__}.dist-info"
    text = metadata(wheel)
    assert f"\nVersion: {fastrlhf.__version__}\n" in text
    assert "\nLicense-Expression: Apache-2.0\n" in text
    assert f"{info}/licenses/LICENSE" in archive.namelist()
    assert "fastrlhf = fastrlhf.cli:program" in archive.read(f"{info}/entry_points.txt").decode()
    required = re.findall(r"^Requires-Dist: (.*)$", text, re.MULTILINE)
    base = {Requirement(text).name for text in required if "extra ==" not in text}
    assert base == {"torch", "triton"}
    provided = set(re.findall(r"^Provides-Extra: (.*)$", text, re.MULTILINE))
    assert provided == PROJECT["optional-dependencies"].keys()


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


def test_base_install_has_the_ops(wheel, scratch):
    """torch, triton and nothing else, numpy neither."""
    python = environment(scratch / "base", listed())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", "--no-compile", wheel)
    run(*pip, "check")
    report = use_ops(python, "cpu" if HAS_LIBRARY else "reference", "doctor")
    assert not report["numpy"]
    if HAS_LIBRARY:
        assert report["available"]["cpu"] == "available"
    command = python.parent / "fastrlhf"
    assert run(command, "--version").strip() == f"fastrlhf {fastrlhf.__version__}"
    assert "usage: fastrlhf" in run(command, "--help")
    assert "usage: fastrlhf bench" in run(command, "bench", "--help")
    text, doctor = report["doctor"][0], json.loads(report["doctor"][1])
    assert doctor["problems"] == []
    assert "accelerate" in doctor["extras"]["train"]
    assert "lacks" in text
    for name, extra in (("sft", "train"), ("eval", "eval"), ("report", "report"), ("demo", "demo")):
        refused = start(command, name, "--help", cwd=scratch)
        assert refused.returncode == 2
        assert refused.stdout == "" and refused.stderr.count("\n") == 1
        how = f"in a clone of fastrlhf, pip install --no-build-isolation '.[{extra}]'"
        assert f"needs the extra [{extra}]: {how}" in refused.stderr


@pytest.mark.parametrize(
    ("extra", "refused"),
    [
        ("train", {"report", "demo"}),
        ("report", {"pretrain", "sft", "reward", "ppo", "eval", "demo"}),
        ("demo", set()),
    ],
)
def test_an_extra_has_its_commands(wheel, scratch, extra, refused):
    python = install(wheel, scratch / extra, extra)
    # The largest for all: the environments are cut from one list.
    assert closure(listed(extra)) <= closure(listed("demo"))
    if extra == "demo":
        run(sys.executable, "-m", "pip", "--python", python, "check")
    report = use_trainer(python)
    assert {name for name, status in report["status"].items() if status} == refused
    assert report["packer"] == ("C++" if HAS_LIBRARY else "Python")


@needs_library
def test_sdist_builds_with_the_kernels(sdist, wheel, scratch):
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
    kind = {"CXX": str(compiler), "FASTRLHF_BUILD": "cpu"}
    made = build(sdist, "wheel", scratch / "sdist_wheel", UNCHECKED, **kind)
    assert set(zipfile.ZipFile(made).namelist()) == set(zipfile.ZipFile(wheel).namelist())
    assert metadata(made) == metadata(wheel)  # so `pip check` finds what it found for the wheel
    use_ops(install(made, scratch / "from_sdist"), "cpu")


def test_without_kernels(sdist, wheel, scratch):
    made = build(sdist, "wheel", scratch / "pure", UNCHECKED, FASTRLHF_BUILD="none")
    assert metadata(made) == metadata(wheel)
    assert made.name.endswith("-py3-none-any.whl")
    assert not [n for n in zipfile.ZipFile(made).namelist() if n.endswith(".so")]
    python = install(made, scratch / "from_pure")
    report = use_ops(python, "reference", "doctor")
    assert "not built" in report["available"]["cpu"]
    doctor = json.loads(report["doctor"][1])
    assert doctor["kernels"]["present"] is False
    assert "reference backend serves every op" in doctor["kernels"]["reason"]
    assert {row["auto"] for row in doctor["ops"].values()} == {"reference"}
    assert doctor["problems"] == []


@needs_library
def test_one_wheel_for_every_python(sdist, wheel, scratch):
    """Built without pybind11 the wheel has the kernels, no _C, and a tag that names no Python version."""
    builder = environment(scratch / "builder", ["setuptools"])
    made = repackage(builder, sdist, scratch / "universal")
    assert re.search(r"-py3-none-linux_\w+\.whl$", made.name)
    assert metadata(made) == metadata(wheel)
    archive = zipfile.ZipFile(made)
    compiled = {n for n in archive.namelist() if n.endswith(".so")}
    assert compiled == {"fastrlhf/libfastrlhf.so"}
    python = install(made, scratch / "from_universal", "train")
    said = use_ops(python, "cpu", first=USE_PACKER)["first"]
    assert said.startswith("None [array([0, 1]), array([2, 3])]")


def other_python():
    """A Python >= 3.10 of another version that runs and has headers; or (None, why there is none)."""
    probe = "import sys, sysconfig; print(sys.version_info[:2] >= (3, 10), sysconfig.get_path('include'))"
    reasons = []
    for minor in range(10, 20):
        name = f"python3.{minor}"
        if minor == sys.version_info.minor or not shutil.which(name):
            continue
        answer = start(name, "-c", probe)
        if answer.returncode:
            reasons.append(f"{name} does not run")
        elif not Path(answer.stdout.split(maxsplit=1)[1].strip(), "Python.h").is_file():
            reasons.append(f"{name} has no Python.h")
        else:
            return name, ""
    return None, "; ".join(reasons) or "PATH has no other python3.x"


@needs_library
def test_a_second_python_uses_the_same_kernels(sdist, scratch):
    name, reason = other_python()
    if name is None:
        pytest.skip(f"no second Python: {reason}")
    # setuptools and pybind11 are pure Python, so the second Python can use this one's.
    builder = scratch / "second"
    python = environment(scratch / "tools", ["setuptools", "pybind11"])
    tools = site_packages(python)
    wrapper = scratch / "python"
    wrapper.write_text(f'#!/bin/sh\nPYTHONPATH={tools} exec {shutil.which(name)} "$@"\n')
    wrapper.chmod(0o755)
    made = repackage(wrapper, sdist, builder)
    tag = name.replace("python3.", "cp3")
    assert f"-{tag}-{tag}-linux_" in made.name
    unpacked = builder / "unpacked"
    zipfile.ZipFile(made).extractall(unpacked)
    library = unpacked / "fastrlhf" / "libfastrlhf.so"
    assert library.read_bytes() == _library.PATH.read_bytes()
    # torch's C++ libraries serve every Python too: load the kernels beside them, and _C.
    torch_library = (
        Path(importlib.util.find_spec("torch").origin).parent / "lib" / "libtorch_cpu.so"
    )
    code = (
        "import ctypes, fastrlhf._C\n"
        f"ctypes.CDLL({str(torch_library)!r}, ctypes.RTLD_GLOBAL)\n"
        f"info = ctypes.CDLL({str(library)!r}).fastrlhf_build_info\n"
        "info.restype = ctypes.c_char_p\n"
        "print(info().decode(), callable(fastrlhf._C.pack))"
    )
    said = run(name, "-c", code, cwd=unpacked)
    assert f"version={fastrlhf.__version__}" in said and said.strip().endswith("True")


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


def test_a_build_without_torch_or_a_compiler_stops(monkeypatch):
    """Else the package would have no kernels: pip hides what a build says, and keeps the wheel for later."""
    spec = importlib.util.spec_from_file_location("fastrlhf_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    with pytest.raises(SystemExit, match="--no-build-isolation.*FASTRLHF_BUILD=none"):
        setup.choose("auto", None)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match="install g\\+\\+ >= 11 or set CXX; FASTRLHF_BUILD=none"):
        setup.choose("auto", setup.cpp_extension())
    for ext in (None, setup.cpp_extension()):
        assert setup.choose("none", ext) == "none"
