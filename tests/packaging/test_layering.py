"""Rules of the source tree: which room imports which, third-party packages, file sizes, cited files."""

import ast
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("csrc", "kernels", "fastrlhf", "tests", "benchmarks", "recipes", "examples", "docs")
SOURCES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh", ".yaml"}
)
MAX_LINES = 800

# Room -> the rooms that it may import. A module in no room fails the test.
MAY_IMPORT = {
    # The kernel package: torch and triton alone.
    "__init__": {"ops", "nn", "_namespace"},
    "_namespace": set(),
    "_compiled": {"_C"},
    "errors": set(),
    "extras": {"errors"},
    "kernels": {"kernels"},
    "reference": {"reference_sequences"},
    "reference_sequences": set(),
    "ops": {"ops", "reference", "kernels", "_compiled", "_namespace"},
    "nn": {"ops"},
    "integrations": {"integrations", "ops", "reference", "errors"},
    "doctor": {"integrations", "ops", "errors", "extras", "_compiled"},
    "bench": {"errors", "extras"},
    "cli": {"train", "errors", "extras"},
    "__main__": {"cli"},
    # The trainer, extra [train]: a stage imports no other stage.
    "train": {"train", "integrations", "ops", "reference", "errors", "_compiled"},
    "train.stages": {"train", "ops", "reference", "errors"},
    # An extra each: [eval], [report], [demo].
    "evals": {"evals", "train", "integrations", "ops", "reference", "errors"},
    "report": {"report", "errors"},
    "demo": {
        "demo",
        "train",
        "train.stages",
        "evals",
        "report",
        "integrations",
        "ops",
        "reference",
        "errors",
    },
}
# Modules that torch itself needs: they are there wherever it is. `Unpack` is in typing from Python 3.11 on.
OF_TORCH = {"typing_extensions"}
# Room -> the extras whose packages it may import beside torch and triton; other rooms have none.
EXTRAS_OF = {
    "integrations": ("train", "flash", "trl", "verl", "openrlhf", "peft"),
    "train": ("train",),
    "train.stages": ("train",),
    "evals": ("eval",),
    "report": ("report",),
    "demo": ("demo",),
}
MODULE_OF = {"pyyaml": "yaml", "flash-attn": "flash_attn"}  # where its name differs
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def room_of(module: str) -> str:
    """The room of a module of ours: 'fastrlhf.ops.gae' -> 'ops', 'fastrlhf.train.stages.ppo' -> 'train.stages'."""
    parts = module.split(".")
    if parts[0] == "kernels":
        return "kernels"
    if len(parts) == 1:
        return "__init__"
    if parts[1:3] == ["train", "stages"]:
        return "train.stages"
    return parts[1]


def third_party(requirements: list[str]) -> set[str]:
    """The top-level modules that a list of requirements installs, extras of ours resolved."""
    found = set()
    for requirement in requirements:
        name, extras = re.match(r"([\w.-]+)(?:\[([^\]]*)\])?", requirement).groups()
        if name == PROJECT["name"]:
            for extra in extras.split(","):
                found |= third_party(PROJECT["optional-dependencies"][extra])
        else:
            found.add(MODULE_OF.get(name, name))
    return found


def installed_for(room: str) -> set[str]:
    """The third-party modules that an install has which is just large enough for `room`."""
    lists = [PROJECT["dependencies"]]
    lists += [PROJECT["optional-dependencies"][extra] for extra in EXTRAS_OF.get(room, ())]
    return OF_TORCH.union(*map(third_party, lists))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def exists(module: str) -> bool:
    path = ROOT / module.replace(".", "/")
    return path.with_suffix(".py").is_file() or path.is_dir()


def imports_of(path: Path, source: str | None = None) -> list[tuple[int, str]]:
    """(line, module) of every import, also inside functions; relative ones made absolute."""
    tree = ast.parse(path.read_text() if source is None else source)
    module = module_of(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                kept = parts[: len(parts) - node.level + 1]
                base = ".".join([*kept, base]).strip(".")
            # `from fastrlhf import x` names a module where there is one, else a public op.
            names = [alias for alias in node.names if alias.name != "__version__"]
            for alias in names:
                full = f"{base}.{alias.name}"
                ours = base.partition(".")[0] == "fastrlhf"
                module_like = ours and (exists(full) or alias.name == "_C")
                found.append((node.lineno, full if module_like else base))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            if node.args and isinstance(node.args[0], ast.Constant):
                found.append((node.lineno, node.args[0].value))
    return found


def violations(path: Path, source: str | None = None) -> list[str]:
    module = module_of(path)
    room = room_of(module)
    found = []
    for line, imported in imports_of(path, source):
        top = imported.partition(".")[0]
        where = f"{path.relative_to(ROOT)}:{line}: {room} imports {imported}"
        if top not in ("fastrlhf", "kernels"):
            if top not in sys.stdlib_module_names and top not in installed_for(room):
                found.append(where)
            continue
        if imported == module:
            continue
        target = room_of(imported)
        # `from fastrlhf import gae` goes through the public names, which are ops.
        target = "ops" if target == "__init__" else target
        if target not in MAY_IMPORT[room]:
            found.append(where)
    return found


PYTHON = [
    path
    for path in SOURCES
    if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in ("fastrlhf", "kernels")
]


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    assert violations(path) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("fastrlhf/train/stages/ppo.py", "from fastrlhf.train.stages import sft"),
        ("fastrlhf/train/stages/ppo.py", "from .sft import main"),
        ("fastrlhf/train/stages/ppo.py", "def f():\n    import fastrlhf.train.stages.sft"),
        ("fastrlhf/train/stages/ppo.py", "importlib.import_module('fastrlhf.train.stages.sft')"),
        ("fastrlhf/ops/gae.py", "from fastrlhf.train import packing"),
        ("fastrlhf/nn.py", "from fastrlhf.train import packing"),
        ("fastrlhf/ops/gae.py", "from ..train import packing"),
        ("fastrlhf/ops/_backend.py", "from fastrlhf import _C"),
        ("fastrlhf/train/packing.py", "from fastrlhf import _C"),
        ("fastrlhf/reference.py", "from fastrlhf import gae"),
        ("fastrlhf/train/packing.py", "from fastrlhf.cli import main"),
        ("fastrlhf/evals/__init__.py", "from fastrlhf.train.stages.ppo import main"),
        ("kernels/gae.py", "from fastrlhf.ops import gae"),
        ("kernels/gae.py", "import numpy"),
        ("fastrlhf/ops/gae.py", "import numpy"),
        ("fastrlhf/doctor.py", "from rich.console import Console"),
        ("fastrlhf/cli.py", "import yaml"),
        ("fastrlhf/report/page.py", "import transformers"),
        ("fastrlhf/train/data.py", "import matplotlib"),
        ("fastrlhf/integrations/trl.py", "import accelerate_of_nobody"),
        ("fastrlhf/bench.py", "import benchmarks.run"),
        ("fastrlhf/ops/gae.py", "import conftest"),
        ("fastrlhf/integrations/trl.py", "from fastrlhf.train import models"),
        ("fastrlhf/report/page.py", "from fastrlhf.train.data import read_rows"),
    ],
)  # fmt: skip
def test_the_rule_catches(file, source):
    """The reader sees each of these forbidden imports."""
    assert len(violations(ROOT / file, source)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        (
            "fastrlhf/train/stages/ppo.py",
            "from fastrlhf import gae\nfrom fastrlhf.train import packing",
        ),
        ("fastrlhf/ops/gae.py", "from fastrlhf import reference\nfrom . import _checks"),
        ("fastrlhf/_compiled.py", "from fastrlhf import _C"),
        ("fastrlhf/train/packing.py", "from fastrlhf import _compiled"),
        ("kernels/gae.py", "import os, torch, triton\nfrom . import _launch"),
        ("fastrlhf/ops/gae.py", "from typing_extensions import Unpack"),
        ("fastrlhf/train/config.py", "import jsonargparse, yaml"),
        ("fastrlhf/report/plots.py", "import matplotlib, numpy"),
        ("fastrlhf/demo/run.py", "import matplotlib, transformers"),
        ("fastrlhf/integrations/trl.py", "import trl"),
    ],
)
def test_the_rule_allows(file, source):
    assert violations(ROOT / file, source) == []


def test_torch_needs_what_is_taken_from_it():
    required = {re.match(r"[\w.-]+", line)[0] for line in requires("torch")}
    assert {name.replace("-", "_") for name in required} >= OF_TORCH


def test_kernels_is_no_top_level_package():
    """A top-level `kernels` package would shadow Hugging Face's."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "recipes" / "__init__.py").exists()


def test_importing_the_package_is_lean():
    code = (
        "import os, sys, torch; before = dict(os.environ); import fastrlhf, fastrlhf.ops._backend;"
        "[getattr(fastrlhf, name) for name in fastrlhf.__all__];"
        "heavy = {'triton', 'transformers', 'accelerate', 'matplotlib', 'rich'} & set(sys.modules);"
        "print(sorted(heavy), torch.cuda.is_initialized(), dict(os.environ) == before)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "[] False True", result.stderr


# What csrc/ may include besides the standard library and its own headers, by folder.
STABLE = r"torch/(csrc/stable|headeronly)/|torch/csrc/inductor/aoti_torch/c/shim\.h"
CUDA = r"cuda\w*\.h|cooperative_groups|cub/|mma\.h"
INCLUDES = {
    "csrc": STABLE,  # pybind11 in csrc/python.cpp alone
    "csrc/common": STABLE,
    "csrc/cpu": rf"{STABLE}|\w*mmintrin\.h|\w+intrin\.h|sys/mman\.h",
    "csrc/cuda": rf"{STABLE}|{CUDA}",
}


@pytest.mark.parametrize(
    "path",
    [p for p in SOURCES if p.is_relative_to(ROOT / "csrc")],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_csrc_is_a_leaf_on_the_stable_abi(path):
    folder = str(path.parent.relative_to(ROOT))
    for name in re.findall(r"^\s*#\s*include\s*<([^>]+)>", path.read_text(), re.MULTILINE):
        standard = re.fullmatch(r"c?[a-z_0-9]+", name) is not None
        binding = path.name == "python.cpp" and name.startswith("pybind11/")
        allowed = standard or binding or re.match(INCLUDES[folder], name)
        assert allowed, f"{path.name} includes <{name}>"
    for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(), re.MULTILINE):
        assert (path.parent / name).is_file() or (ROOT / "csrc" / name).is_file(), name


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_short_and_cite_what_exists(path):
    text = path.read_text()
    assert text.count("\n") <= MAX_LINES
    if path == Path(__file__):
        return
    for cited in re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./*-]*\.\w+", text):
        cited = cited.rstrip(".")
        assert any(ROOT.glob(cited)), f"{path.relative_to(ROOT)} cites {cited}, which is not there"
