"""Builds csrc/cuda/*.cu for the CPU: g++ with AddressSanitizer, threads as fibers (fibers.h).

The sources are copied with a few words rewritten, everything else is the very code that nvcc compiles:

- `__shared__` variables become fresh, poisoned, guarded memory of their block;
- a kernel's body first says its name, so that a test can demand that every kernel ran;
- `__CUDACC__` and `__CUDA_ARCH__` (here 800) select the device's branches; PTX stays out
  (csrc/cuda/device.cuh asks for nvcc), and what csrc/cuda/cluster.cuh says in PTX, the shim does;
- implementations register for CPU tensors instead of CUDA's.

Objects are kept under build/host_shim by the hash of everything that went into them.
"""

import functools
import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CACHE = ROOT / "build" / "host_shim"
CXX = os.environ.get("CXX", "g++").split()[0]
INCLUDE = Path(torch.__file__).parent / "include"
LIBRARIES = Path(torch.__file__).parent / "lib"
# UBSan's alignment: a misaligned vector access is a fault on a GPU. Automatic variables start as
# garbage, so that reading one before it is written shows.
FLAGS = [
    "-std=c++20",
    "-O1",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-fsanitize=address,alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero",
    "-fno-sanitize-recover=all",
    "-ftrivial-auto-var-init=pattern",
    "-fno-omit-frame-pointer",
    "-Wall",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    f"-isystem{INCLUDE}",
    f"-I{HERE / 'include'}",
]

SHARED = re.compile(r"(extern\s+)?\b__shared__\s+(?:(?:alignas|__align__)\s*\([^)]*\)\s*)?([^;]+);")
DECLARED = re.compile(r"(?P<type>.*?)\s*\b(?P<name>\w+)\s*(?P<size>(?:\[[^\]]*\]\s*)*)", re.DOTALL)


def _shared(match):
    """`__shared__ T a[3], b;` -> references to memory of the block, one allocation a variable."""
    kind, out = "", []
    for part in re.split(r",(?![^<]*>)", match[2]):
        declared = DECLARED.fullmatch(part.strip())
        kind, name, size = declared["type"] or kind, declared["name"], declared["size"]
        if match[1]:
            out.append(f"{kind}* {name} = static_cast<{kind}*>(::shim::dynamic_shared());")
            continue
        out.append(
            f"typedef {kind} {name}_shared_t{size}; static const char {name}_site = 0; "
            f"{name}_shared_t& {name} = *static_cast<{name}_shared_t*>"
            f"(::shim::shared(&{name}_site, sizeof({name}_shared_t)));"
        )
    return " ".join(out)


def _closing(text, start):
    """The index behind the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i + 1
    raise ValueError(f"an open {text[start]!r}")


def _uncommented(text):
    """Comments blanked, so that brackets and words in them do not count; lines stay lines."""
    return re.sub(r"//[^\n]*", "", text)


def _name_kernels(text):
    out, at = [], 0
    for found in re.finditer(r"\b__global__\b", text):
        head = re.compile(r"\b(?!__launch_bounds__|alignas)(\w+)\s*\(").search(text, found.end())
        bounds = text.find("__launch_bounds__", found.end(), head.end())
        if bounds >= 0:
            after = _closing(text, text.index("(", bounds))
            head = re.compile(r"(\w+)\s*\(").search(text, after)
        body = _closing(text, head.end() - 1)
        out.append(text[at : found.start()] + text[found.end() : body])
        at = body
        if text[body:].lstrip().startswith("{"):
            at = text.index("{", body) + 1
            out.append(text[body:at] + f'::shim::entered("{head[1]}");')
    return "".join(out) + text[at:]


def rewrite(text, path):
    """The source as g++ reads it; errors and sanitizer reports still name `path` and its lines."""
    text = _uncommented(text)
    if "<<<" in text:
        raise ValueError(
            f"{path}: start kernels through launch() in csrc/cuda/launch.cuh, not <<<>>>"
        )
    text = _name_kernels(text)
    text = SHARED.sub(_shared, text)
    text = re.sub(r"\b__CUDACC__\b", "SHIM_CUDACC", text)
    text = re.sub(r"\b__CUDA_ARCH__\b", "SHIM_CUDA_ARCH", text)
    text = re.sub(r"(STABLE_TORCH_LIBRARY_IMPL\(\w+,\s*)CUDA\b", r"\1CPU", text)
    return f'#line 1 "{path}"\n{text}'


def kernels_of(source):
    """The names of the kernels that a file defines."""
    return set(re.findall(r'::shim::entered\("(\w+)"\)', rewrite(source.read_text(), source)))


def kernels_reached(source):
    """The same of a file and of all that it includes beside it."""
    files, found = [source], set()
    for file in files:
        included = re.findall(r'#include "([\w.]+)"', file.read_text())
        beside = (file.parent / name for name in included)
        files += [path for path in beside if path.is_file() and path not in files]
        found |= kernels_of(file)
    return found


PARTS = {"sequence_sums"}  # raw ops that only other ops call


def ops_of(source):
    """The ops that a file implements, without their halves: "token_loss" of token_loss_fwd_ and token_loss_bwd_."""
    names = re.findall(r'\bm\.impl\("(\w+)"', source.read_text())
    return sorted({re.sub(r"(_fwd|_bwd|_rows)?_?$", "", name) for name in names} - PARTS)


def source_of(op):
    """The file of csrc/cuda that implements an op."""
    found = [p for p in (ROOT / "csrc" / "cuda").glob("*.cu") if op in ops_of(p)]
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise ValueError(f"{op}: expected one file of csrc/cuda that implements it; got {names}")
    return found[0]


def _run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-6000:]}")


def _once(target, make):
    """Makes `target` unless it is there; another process may do the same at the same time."""
    if not target.exists():
        temporary = target.with_name(f".{os.getpid()}-{target.name}")
        make(temporary)
        temporary.replace(target)
    return target


def _digest(*parts):
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part if isinstance(part, bytes) else str(part).encode())
        hashed.update(b"\0")
    return hashed.hexdigest()[:20]


def _tree(source):
    """A copy of csrc's headers and of `source` in its cuda folder, rewritten; and its hash."""
    paths = {p.relative_to(ROOT / "csrc"): p for p in (ROOT / "csrc").rglob("*.h")}
    paths |= {p.relative_to(ROOT / "csrc"): p for p in (ROOT / "csrc").rglob("*.cuh")}
    paths[Path("cuda") / source.name] = source
    texts = {name: rewrite(path.read_text(), path) for name, path in sorted(paths.items())}
    digest = _digest(*texts.values())
    tree = CACHE / f"src-{digest}"
    for name, text in texts.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        _once(tree / name, lambda to, text=text: to.write_text(text))
    return tree, digest


def _compile(source, stem, key, *options):
    target = CACHE / f"{stem}-{_digest(key, *options)}.o"
    command = [CXX, *FLAGS, *options, "-xc++", "-c", str(source)]
    return _once(target, lambda to: _run([*command, f"-o{to}"]))


@functools.cache
def _base():
    """What every library shares: a key, the options of a .cu, the scheduler."""
    CACHE.mkdir(parents=True, exist_ok=True)
    compiler = subprocess.run([CXX, "--version"], capture_output=True, text=True, check=True).stdout
    shim = [p.read_bytes() for p in sorted(HERE.rglob("*.h")) + [HERE / "fibers.cpp"]]
    key = _digest(*shim, *FLAGS, compiler, torch.__version__)
    # One precompiled header: PyTorch's take longer to read than our kernels.
    folder = CACHE / key
    folder.mkdir(exist_ok=True)
    header = folder / "repeat.h"
    _once(header, lambda to: to.write_text(f'#include "{HERE}/repeat.h"\n'))
    precompile = [CXX, *FLAGS, "-xc++-header", str(header)]
    _once(folder / "repeat.h.gch", lambda to: _run([*precompile, f"-o{to}"]))
    options = ["-include", str(header), "-DSHIM_CUDACC", "-DSHIM_CUDA_ARCH=800"]
    # Last options win: the scheduler switches some ten thousand times per block, and is not on trial.
    scheduler = _compile(HERE / "fibers.cpp", "fibers", key, "-O2", "-fno-sanitize=all")
    return key, options, scheduler


def _link(stem, *objects):
    library = CACHE / f"{stem}-{_digest(*objects)}.so"
    # -Bsymbolic: our stand-ins for the stream and the device guard, not libtorch's.
    link = [CXX, *FLAGS, "-shared", "-Wl,-Bsymbolic", *map(str, objects)]
    link += [f"-L{LIBRARIES}", "-ltorch_cpu", "-ltorch", "-lc10", f"-Wl,-rpath,{LIBRARIES}"]
    return _once(library, lambda to: _run([*link, f"-o{to}"]))


def build(source):
    """Compiles one .cu file and links it with the scheduler; the path of the library."""
    key, options, scheduler = _base()
    tree, digest = _tree(source)
    device = _compile(tree / "cuda" / source.name, source.stem, _digest(key, digest), *options)
    return _link(source.stem, device, scheduler)


def build_all(sources, jobs):
    """{source: its library, or the error of its build}."""

    def attempt(source):
        try:
            return build(source)
        except (RuntimeError, ValueError) as error:
            return error

    _base()
    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(sources, pool.map(attempt, sources), strict=True))


def missing():
    """Why the shim cannot be built here, or an empty string."""
    return "" if shutil.which(CXX) else f"{CXX} is not on PATH"


def environment(libraries, sm=80, ops=()):
    """The environment of a Python process that loads `libraries`, after the sanitizer.

    `sm`: the emulated device, 80 or 90 (with clusters). `ops`: those whose conformance is tested.
    """

    def runtime(name):
        return subprocess.run(
            [CXX, f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()

    options = {
        "detect_leaks": 0,
        # Fresh memory up to 64 MiB, tensors too, is NaN.
        "max_malloc_fill_size": 1 << 26,
        "malloc_fill_byte": 255,
        "allocator_may_return_null": 1,
    }
    return {
        **os.environ,
        # libstdc++ beside it: the sanitizer must find the real __cxa_throw.
        "LD_PRELOAD": f"{runtime('libasan.so')}:{runtime('libstdc++.so.6')}",
        "ASAN_OPTIONS": ":".join(f"{k}={v}" for k, v in options.items()),
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1]), str(ROOT)]),
        "HOST_SHIM_SM": str(sm),
        "HOST_SHIM_OPS": ",".join(ops),
        "FASTRLHF_HOST_SHIM": os.pathsep.join(map(str, libraries)),
    }
