"""Builds the compiled parts of fastrlhf. All metadata lives in pyproject.toml.

fastrlhf/libfastrlhf.so  the C++ and CUDA kernels on torch's stable ABI, without Python symbols: one build serves every
                         Python >= 3.10 and every torch >= 2.10
fastrlhf/_C              the sequence packer as a pybind11 module, for the Python that builds it; without it packing
                         runs in Python, with the same result

FASTRLHF_BUILD = auto (default) | none | cpu | cuda
    auto  CUDA where torch is a CUDA build and a toolkit is found, else C++ for the CPU; stops when torch or a C++
          compiler is missing: pip hides warnings, and would keep the wheel without kernels for later installs
    none  pure Python: every op runs on its PyTorch reference, and on Triton when there is a GPU
    cpu   C++ kernels for the CPU
    cuda  C++ and CUDA kernels; stops and says how to fix it when something is missing

FASTRLHF_LIBRARY = a libfastrlhf.so that was built before: it is packaged as it is, and torch is not needed. `make
wheels` uses it to compile the kernels once for the wheels of all Python versions.

The choice depends on the toolkit and on torch's own build, never on a GPU of the building machine: containers are
built on machines without one.
"""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY, MODULE = "fastrlhf.libfastrlhf", "fastrlhf._C"
# The stable ABI of torch 2.10: one build serves every later torch.
TORCH_TARGET_VERSION = "0x020a000000000000"
CUDA_ARCHS = "8.0;9.0;10.0+PTX"
FIX_TORCH = (
    "install torch first, then build with `pip install --no-build-isolation .` "
    "(an isolated build cannot see your torch)"
)


def say(line):
    print(f"fastrlhf: {line}", file=sys.stderr, flush=True)


def cpp_extension():
    """torch.utils.cpp_extension, or None where torch is missing."""
    try:
        from torch.utils import cpp_extension as module
    except ImportError:
        return None
    return module


def missing_for_cpu(ext):
    """Why the CPU kernels cannot be built, as one clause; empty when they can."""
    if ext is None:
        return f"torch is not importable: {FIX_TORCH}"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None and shutil.which("g++") is None:
        return f"no C++ compiler ({compiler!r} is not on PATH): install g++ >= 11 or set CXX"
    return ""


def follow_nvcc(ext):
    """Correct CUDA_HOME where nvcc on PATH is a wrapper script; torch takes the folder above the script."""
    home = ext.CUDA_HOME
    if home is None or "CUDA_HOME" in os.environ or "CUDA_PATH" in os.environ:
        return
    if any(Path(home, lib, "libcudart.so").exists() for lib in ("lib64", "lib")):
        return
    nvcc = Path(home, "bin", "nvcc")
    dry = subprocess.run([nvcc, "--dryrun", "none.cu"], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE)
    if top:
        ext.CUDA_HOME = os.path.realpath(top.group(1).strip())


def missing_for_cuda(ext):
    """Why the CUDA kernels cannot be built, as one clause; empty when they can."""
    if missing_for_cpu(ext):
        return missing_for_cpu(ext)
    import torch

    follow_nvcc(ext)

    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is not a CUDA build: install one from "
            "https://pytorch.org/get-started/locally, or use FASTRLHF_BUILD=cpu"
        )
    if ext.CUDA_HOME is None:
        return (
            f"no CUDA toolkit found: set CUDA_HOME to a CUDA {torch.version.cuda} toolkit "
            "(the folder that holds bin/nvcc), or use FASTRLHF_BUILD=cpu"
        )
    return ""


def choose(wanted, ext):
    """The build kind, 'none', 'cpu' or 'cuda'; prints the reason in one line."""
    if wanted not in ("auto", "none", "cpu", "cuda"):
        sys.exit(f"fastrlhf: FASTRLHF_BUILD must be auto, none, cpu or cuda; got {wanted!r}")
    if wanted == "none":
        say("building no kernels (FASTRLHF_BUILD=none)")
        return "none"
    no_cpu, no_cuda = missing_for_cpu(ext), missing_for_cuda(ext)
    if no_cpu and wanted == "auto":
        sys.exit(f"fastrlhf: {no_cpu}; FASTRLHF_BUILD=none builds without the kernels")
    if wanted == "cuda" and no_cuda:
        sys.exit(f"fastrlhf: FASTRLHF_BUILD=cuda cannot work: {no_cuda}")
    if wanted == "cpu" and no_cpu:
        sys.exit(f"fastrlhf: FASTRLHF_BUILD=cpu cannot work: {no_cpu}")
    if wanted != "auto":
        say(f"building the {wanted} kernels (FASTRLHF_BUILD={wanted})")
        return wanted
    if not no_cuda:
        say(f"building the cuda kernels (auto: torch is a CUDA build, CUDA_HOME={ext.CUDA_HOME})")
        return "cuda"
    say(f"building the cpu kernels (auto: {no_cuda.split(':')[0]})")
    return "cpu"


def version():
    text = (ROOT / "fastrlhf/__init__.py").read_text()
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1]


def schemas():
    """ "name:crc32" of every schema that fastrlhf/ops registers for C++ and CUDA.

    The library carries them, and the package refuses a library that was built for other schemas: its kernels would
    read the arguments in another order.
    """
    found = []
    for path in sorted(ROOT.glob("fastrlhf/ops/*.py")):
        tree = ast.parse(path.read_text())
        named = {
            node.targets[0].id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "register":
                expression = ast.fix_missing_locations(ast.Expression(node.args[0]))
                schema = eval(compile(expression, path.name, "eval"), {}, named)
                found.append(f"{schema.partition('(')[0]}:{zlib.crc32(schema.encode()):08x}")
    return " ".join(found)


def sources(pattern):
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def kernel_library(kind, ext):
    """The setuptools extension of libfastrlhf.so; `kind` is 'cpu' or 'cuda'."""
    torch_include = str(Path(ext.__file__).resolve().parent.parent / "include")
    # Source paths of the building machine stay out of error messages.
    prefix_maps = [f"-fmacro-prefix-map={ROOT}/=", f"-fmacro-prefix-map={torch_include}/="]
    defines = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    cxx = [
        "-std=c++20",
        "-O3",
        "-g0",
        "-fvisibility=hidden",
        # omp simd loops without an OpenMP runtime; fused multiply-add where the target has it.
        "-fopenmp-simd",
        "-ffp-contract=fast",
        "-fno-math-errno",
        "-fno-trapping-math",
        f'-DFASTRLHF_VERSION="{version()}"',
        f'-DFASTRLHF_SCHEMAS="{schemas()}"',
        *defines,
        *prefix_maps,
    ]
    files = ["csrc/build_info.cpp", *sources("csrc/cpu/*.cpp")]
    # py_limited_api leaves out libtorch_python.
    options = {"include_dirs": [str(ROOT / "csrc")], "py_limited_api": True}
    if kind == "cpu":
        return ext.CppExtension(LIBRARY, files, extra_compile_args={"cxx": cxx}, **options)
    archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)
    cxx += ["-DFASTRLHF_CUDA", f'-DFASTRLHF_CUDA_ARCHS="{archs.replace(";", " ")}"', "-DUSE_CUDA"]
    nvcc = ["-std=c++20", "-O3", "-DUSE_CUDA", *defines]
    nvcc += [f"-Xcompiler={flag}" for flag in ("-fvisibility=hidden", *prefix_maps)]
    files += sources("csrc/cuda/*.cu")
    flags = {"cxx": cxx, "nvcc": nvcc}
    return ext.CUDAExtension(LIBRARY, files, extra_compile_args=flags, **options)


def packer_module():
    """fastrlhf._C as a list of one extension; empty, with a printed line, where pybind11 is missing."""
    if importlib.util.find_spec("pybind11") is None:
        say("pybind11 is not installed, building no fastrlhf._C: packing runs in Python")
        return []
    import pybind11

    flags = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden"]
    files = ["csrc/python.cpp", "csrc/packer.cpp"]
    folders = [str(ROOT / "csrc"), pybind11.get_include()]
    # language: setuptools then links with the C++ compiler.
    return [
        Extension(MODULE, files, include_dirs=folders, extra_compile_args=flags, language="c++")
    ]


def commands(base, prebuilt):
    """setuptools' commands on top of `base`, a build_ext; a `prebuilt` kernel library is copied, not compiled."""

    class Build(base):
        def get_ext_filename(self, name):
            if name in (LIBRARY, LIBRARY.rpartition(".")[2]):
                return name.replace(".", os.sep) + ".so"
            return super().get_ext_filename(name)

        def build_extension(self, extension):
            if extension.name == LIBRARY and prebuilt:
                self.copy_file(prebuilt, self.get_ext_fullpath(extension.name))
            else:
                super().build_extension(extension)

    class Wheel(bdist_wheel):
        def get_tag(self):
            python, abi, platform = super().get_tag()
            modules = self.distribution.ext_modules or []
            if any(extension.name == MODULE for extension in modules):
                return python, abi, platform
            return "py3", "none", platform

    return {"build_ext": Build, "bdist_wheel": Wheel}


def main():
    prebuilt = os.environ.get("FASTRLHF_LIBRARY")
    if prebuilt:
        say(f"packaging {prebuilt} (FASTRLHF_LIBRARY)")
        modules = [Extension(LIBRARY, []), *packer_module()]
        setup(ext_modules=modules, cmdclass=commands(build_ext, os.path.abspath(prebuilt)))
        return
    wanted = os.environ.get("FASTRLHF_BUILD", "auto")
    ext = None if wanted == "none" else cpp_extension()  # importing torch takes seconds
    kind = choose(wanted, ext)
    if kind == "none":
        setup()
        return
    modules = [kernel_library(kind, ext), *packer_module()]
    # no_python_abi_suffix=False keeps the interpreter's tag on _C: pybind11 is not abi3.
    base = ext.BuildExtension.with_options(no_python_abi_suffix=False)
    setup(ext_modules=modules, cmdclass=commands(base, None))


if __name__ == "__main__":
    main()
