"""Compile the GPU kernels without a GPU: CUDA with nvcc, Triton with triton.compile."""

import fcntl
import hashlib
import importlib
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "aot"
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"


def nvcc(source: Path, out: Path, *flags: str) -> subprocess.CompletedProcess:
    """Run nvcc on a file of csrc/cuda with the flags of the kernel library's build; `flags` select the output."""
    import torch

    include = Path(torch.__file__).parent / "include"
    command = ["nvcc", "-std=c++20", "-O3", "-DUSE_CUDA", TORCH_TARGET, *flags]
    command += [f"-I{ROOT / 'csrc'}", f"-I{include}", str(source), "-o", str(out)]
    return subprocess.run(command, capture_output=True, text=True)


class Compiled(NamedTuple):
    ptx: Path
    cubin: Path
    host: Path  # C++ of nvcc's host pass; written for HOST_ARCH alone
    report: str  # stderr of nvcc and ptxas -v


HOST_ARCH = "90"  # the host pass is the same for every architecture


def compiled(source: Path, arch: str) -> Compiled:
    """A file of csrc/cuda compiled for an architecture ("90"), cached under build/aot by a hash of its inputs.

    The cache is safe for concurrent processes. token_loss.cu takes 30 s per architecture, and three tests read it.
    RuntimeError: the compiler's message.
    """
    headers = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh"))
    version = subprocess.run(["nvcc", "--version"], capture_output=True, check=True).stdout
    parts = [path.read_bytes() for path in (*headers, source, Path(__file__))]
    digest = hashlib.sha256(b"\0".join([*parts, version])).hexdigest()[:20]
    folder = CACHE / f"{source.stem}-{arch}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    ptx, cubin, host, report = (
        folder / name for name in ("out.ptx", "out.cubin", "host.ii", "report")
    )
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not report.exists():
            out, mode = (host, "-cuda") if arch == HOST_ARCH else (cubin, "-cubin")
            target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
            with tempfile.TemporaryDirectory(dir=folder) as kept:
                keep = ("--keep", f"--keep-dir={kept}")
                done = nvcc(source, out, mode, target, "-Xptxas", "-v", *keep)
                if done.returncode != 0:
                    raise RuntimeError(f"{source.name}: nvcc failed:\n{done.stderr[-3000:]}")
                (Path(kept) / f"{source.stem}.ptx").replace(ptx)
                if mode == "-cuda":
                    (Path(kept) / f"{source.stem}.cubin").replace(cubin)
            report.write_text(done.stderr)
    return Compiled(ptx, cubin, host, report.read_text())


# Argument types of the Triton kernels. Other arguments are pointers to the accumulator type, i64 strides, or i32.
NAMED = {
    **dict.fromkeys(("cu_seqlens_ptr", "cu_groups_ptr"), "*i32"),
    **dict.fromkeys(("targets_ptr", "ranks_ptr"), "*i64"),
    "mask_ptr": "*i1",
    **dict.fromkeys(("partials_ptr", "found_ptr", "sums_ptr"), "*fp64"),
}
IN_THE_DTYPE = {
    f"{name}_ptr"
    for name in (
        "logits out rewards values bootstrap x logprob ref_logprob score old_logprob advantages"
        " old_values returns entropy scores rollout y"
    ).split()
}


def type_of(name: str, dtype: str) -> str:
    """`dtype` of the tensors, or e.g. "fp32->bf16" if the kernel writes `out` in another dtype."""
    dtype, _, of_out = dtype.partition("->")
    if name == "out_ptr" and of_out:
        return "*" + of_out
    if name in IN_THE_DTYPE:
        return "*" + dtype
    if name in NAMED:
        return NAMED[name]
    acc = "fp64" if dtype == "fp64" else "fp32"
    return f"*{acc}" if name.endswith("_ptr") else "i64" if name.startswith("stride") else "i32"


def kernels_of(module: str) -> dict:
    """The Triton kernels of kernels/<module>.py. TRITON_INTERPRET must be unset, else they cannot be compiled."""
    found = vars(importlib.import_module(f"fastrlhf.kernels.{module}"))
    return {name: kernel for name, kernel in found.items() if name.endswith("_kernel")}


def triton_kernel(kernel, constants: dict, dtype: str, target: tuple, aligned=()):
    """A compiled Triton kernel.

    `constants`: constexpr arguments (ACC by name; the others have a default), strides equal to 1, and compiler options.
    `target`: (backend, architecture, warp size). `aligned`: arguments that are multiples of 16, which the launcher
    would detect; ignored where the kernel sets do_not_specialize_on_alignment.
    """
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"fp32": tl.float32, "fp64": tl.float64}
    names = ("num_warps", "num_stages", "enable_fp_fusion")
    options = {k: v for k, v in constants.items() if k in names}
    values = {p.name: p.default for p in kernel.params if p.is_constexpr and p.has_default}
    values |= {
        k: types.get(v, v) if k == "ACC" else v for k, v in constants.items() if k not in options
    }
    signature = {
        p.name: "constexpr" if p.name in values else p.annotation_type or type_of(p.name, dtype)
        for p in kernel.params
    }
    attrs = {
        (n,): [["tt.divisibility", 16]]
        for n, p in enumerate(kernel.params)
        if p.name in aligned and p.name not in values and not p.do_not_specialize_on_alignment
    }
    source = ASTSource(kernel, signature=signature, constexprs=values, attrs=attrs)
    return triton.compile(source, target=GPUTarget(*target), options={"num_warps": 4} | options)
