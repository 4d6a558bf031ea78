"""libfastrlhf.so: the C++ and CUDA kernels, in a library without Python symbols.

Loading it registers the ops with torch. It is built against torch's stable ABI and uses no Python C API, so one build
serves every Python version and every torch >= 2.10.
"""

import ctypes
import zlib
from pathlib import Path

import torch

from fastrlhf import _compiled

PATH = Path(__file__).resolve().parents[1] / "libfastrlhf.so"

# A source checkout shadows an installed package when Python starts in its folder.
_IN_CHECKOUT = PATH.parents[1].joinpath("setup.py").is_file()


# Name of a raw op -> the checksum of its schema that the loaded library was built for.
_schemas: dict[str, str] = {}


def load() -> str:
    """Load the library; return an empty string, or why the C++ ops are unavailable."""
    install = "pip install --no-build-isolation"
    if not PATH.is_file():
        if _IN_CHECKOUT:
            fix = (
                f"in this checkout, which Python imports here: run {install} -e . in it, "
                "or start Python in another folder to use an installed fastrlhf"
            )
        else:
            fix = f"({install} . with FASTRLHF_BUILD=cpu or cuda)"
        return f"the kernel library is not built {fix}"
    reason = _compiled.cut_off(PATH)
    try:
        if not reason:
            torch.ops.load_library(str(PATH))
            _schemas.update(entry.split(":") for entry in _facts()["schemas"].split())
    except OSError as error:
        # torch raises its own error from the loader's, which says what is missing.
        reason = f"{error.__cause__ or error}"
    except AttributeError:
        reason = f"{PATH.name} is not a library of fastrlhf"
    if not reason:
        return ""
    # A library with CUDA kernels does not load beside a torch without CUDA, for one.
    option = "-e" if _IN_CHECKOUT else "--force-reinstall"
    again = f"build it again for torch {torch.__version__}: {install} {option} ."
    return f"the kernel library does not load: {reason}; {again}"


def check_schema(schema: str) -> None:
    """ImportError if the loaded library was built for another schema: it would read the arguments in another order."""
    name = schema.partition("(")[0]
    if _schemas and _schemas.get(name) != f"{zlib.crc32(schema.encode()):08x}":
        raise ImportError(
            f"{PATH.name} was built for another version of fastrlhf::{name}: build it again "
            f"(pip install --no-build-isolation -e . in the checkout)"
        )


def build_info() -> dict:
    """Facts of the loaded library's build.

    Returns:
        version, torch_target_version (oldest torch it serves), compiler, cpu_isa_compiled (list), cpu_isa_running,
        cuda_archs (list, empty without CUDA).
    """
    info = _facts()
    del info["schemas"]
    return info | {name: info[name].split() for name in ("cpu_isa_compiled", "cuda_archs")}


def _facts() -> dict[str, str]:
    function = ctypes.CDLL(str(PATH)).fastrlhf_build_info
    function.restype = ctypes.c_char_p
    return {"schemas": ""} | dict(line.split("=", 1) for line in function().decode().splitlines())


def poison_fresh_memory(on: bool) -> float:
    """For tests: while on, fresh CPU memory of the C++ ops holds NaN. Returns an element of a fresh tensor."""
    function = ctypes.CDLL(str(PATH)).fastrlhf_poison_fresh_memory
    function.argtypes, function.restype = [ctypes.c_bool], ctypes.c_float
    return function(on)
