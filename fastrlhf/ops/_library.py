"""libfastrlhf.so: the C++ and CUDA kernels, in a library without Python symbols.

Loading it registers the ops with torch. It is built against torch's stable ABI and uses no Python C API, so one build
serves every Python version and every torch >= 2.10.
"""

import ctypes
from pathlib import Path

import torch

PATH = Path(__file__).resolve().parents[1] / "libfastrlhf.so"

# A source checkout shadows an installed package when Python starts in its folder.
_IN_CHECKOUT = PATH.parents[1].joinpath("setup.py").is_file()


def load() -> str:
    """Load the library; return an empty string, or why the C++ ops are unavailable."""
    if not PATH.is_file():
        if _IN_CHECKOUT:
            fix = (
                "in this checkout, which Python imports here: run pip install --no-build-isolation -e . in it, "
                "or start Python in another folder to use an installed fastrlhf"
            )
        else:
            fix = "(pip install --no-build-isolation . with FASTRLHF_BUILD=cpu or cuda)"
        return f"the kernel library is not built {fix}"
    try:
        torch.ops.load_library(str(PATH))
    except OSError as error:
        # torch raises its own error from the loader's, which says what is missing.
        return f"the kernel library does not load: {error.__cause__ or error}"
    return ""


def build_info() -> dict:
    """Facts of the loaded library's build.

    Returns:
        version, torch_target_version (oldest torch it serves), compiler, cpu_isa_compiled (list), cpu_isa_running,
        cuda_archs (list, empty without CUDA).
    """
    function = ctypes.CDLL(str(PATH)).fastrlhf_build_info
    function.restype = ctypes.c_char_p
    info = dict(line.split("=", 1) for line in function().decode().splitlines())
    return info | {name: info[name].split() for name in ("cpu_isa_compiled", "cuda_archs")}


def poison_fresh_memory(on: bool) -> float:
    """For tests: while on, fresh CPU memory of the C++ ops holds NaN. Returns an element of a fresh tensor."""
    function = ctypes.CDLL(str(PATH)).fastrlhf_poison_fresh_memory
    function.argtypes, function.restype = [ctypes.c_bool], ctypes.c_float
    return function(on)
