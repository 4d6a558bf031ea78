"""Builds `fastrlhf._C`, the C++/CUDA extension. All metadata lives in pyproject.toml.

FASTRLHF_BUILD = auto (default) | none | cpu | cuda
    auto  CUDA where torch is a CUDA build and a toolkit is found, else C++ for the CPU, else none;
          stops where torch is missing, for pip hides what a build says and the reference is slow
    none  pure Python: every op runs on its PyTorch reference (and on Triton where there is a GPU)
    cpu   C++ kernels for the CPU
    cuda  C++ and CUDA kernels; stops with the fix when something is missing

The choice looks at the toolkit and at torch's own build, never at the GPU of the building machine:
containers are built on machines without one.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
# LibTorch Stable ABI of torch 2.10: one build serves every later torch.
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
    """What stops a C++ build, as one clause; empty when nothing does."""
    if ext is None:
        return f"torch is not importable: {FIX_TORCH}"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed: pip install pybind11 ninja"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None and shutil.which("g++") is None:
        return f"no C++ compiler ({compiler!r} is not on PATH): install g++ >= 11 or set CXX"
    return ""


def follow_nvcc(ext):
    """Corrects CUDA_HOME where nvcc on PATH is a script: torch takes the folder above that."""
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
    """What stops a CUDA build, as one clause; empty when nothing does."""
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
    """The build kind ('none', 'cpu' or 'cuda'); one printed line says why."""
    if wanted not in ("auto", "none", "cpu", "cuda"):
        sys.exit(f"fastrlhf: FASTRLHF_BUILD must be auto, none, cpu or cuda; got {wanted!r}")
    if wanted == "none":
        say("FASTRLHF_BUILD=none, building no extension")
        return "none"
    no_cpu, no_cuda = missing_for_cpu(ext), missing_for_cuda(ext)
    if ext is None and wanted == "auto":
        sys.exit(f"fastrlhf: {no_cpu}; FASTRLHF_BUILD=none builds without the kernels")
    if wanted == "cuda" and no_cuda:
        sys.exit(f"fastrlhf: FASTRLHF_BUILD=cuda cannot work: {no_cuda}")
    if wanted == "cpu" and no_cpu:
        sys.exit(f"fastrlhf: FASTRLHF_BUILD=cpu cannot work: {no_cpu}")
    if wanted != "auto":
        say(f"building the {wanted} extension (FASTRLHF_BUILD={wanted})")
        return wanted
    if not no_cuda:
        say(f"building the cuda extension (auto: torch is a CUDA build, CUDA_HOME={ext.CUDA_HOME})")
        return "cuda"
    if not no_cpu:
        say(f"building the cpu extension (auto: {no_cuda.split(':')[0]})")
        return "cpu"
    say(f"building no extension (auto: {no_cpu})")
    return "none"


def extension(kind, ext):
    import pybind11

    # Before torch's bundled copy, which refuses the stable ABI's TORCH_TARGET_VERSION in torch 2.11.
    includes = [str(ROOT / "csrc"), pybind11.get_include()]
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
        *defines,
        *prefix_maps,
    ]
    sources = ["csrc/registration.cpp", "csrc/packer.cpp"]
    sources += sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").glob("*.cpp"))
    if kind == "cpu":
        return ext.CppExtension(
            "fastrlhf._C", sources, include_dirs=includes, extra_compile_args={"cxx": cxx}
        )
    sources += sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cuda").glob("*.cu"))
    archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)
    cuda_defines = ["-DFASTRLHF_CUDA", f'-DFASTRLHF_CUDA_ARCHS="{archs.replace(";", " ")}"']
    nvcc = ["-std=c++20", "-O3", "-DUSE_CUDA", *defines]
    nvcc += [f"-Xcompiler={flag}" for flag in ("-fvisibility=hidden", *prefix_maps)]
    return ext.CUDAExtension(
        "fastrlhf._C",
        sources,
        include_dirs=includes,
        extra_compile_args={"cxx": cxx + cuda_defines + ["-DUSE_CUDA"], "nvcc": nvcc},
    )


def main():
    ext = cpp_extension()
    kind = choose(os.environ.get("FASTRLHF_BUILD", "auto"), ext)
    if kind == "none":
        setup()
        return
    # no_python_abi_suffix=False keeps the interpreter's tag: pybind11 is not abi3.
    setup(
        ext_modules=[extension(kind, ext)],
        cmdclass={"build_ext": ext.BuildExtension.with_options(no_python_abi_suffix=False)},
    )


if __name__ == "__main__":
    main()
