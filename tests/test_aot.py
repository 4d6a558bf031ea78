"""Every GPU kernel is compiled for the GPUs we name, on machines that have none.

Triton kernels go through triton.compile for sm_80, sm_90, sm_100 and gfx942; each .cu through nvcc for sm_80, sm_90 and
sm_100 (device code alone: g++ compiles the host's side in test_cuda_on_host.py). The assembler's report is read: a
spill or a stack frame fails the test.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
CUDA_FILES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
KERNEL_FILES = sorted(p for p in (ROOT / "kernels").glob("[!_]*.py"))
NO_NVCC = "nvcc is not on PATH" if shutil.which("nvcc") is None else ""


# Kernel -> variants (constexpr arguments and the dtype of the logits) that are compiled. The flags that are off leave
# code out, so all of them on, for the widest and the narrowest dtype, covers every line.
def cases(everything, least):
    """All flags in fp32 and fp64, none of them in bf16."""
    return [
        ({**everything, "ACC": "fp32"}, "fp32"),
        ({**everything, "ACC": "fp64"}, "fp64"),
        ({**least, "ACC": "fp32"}, "bf16"),
    ]


ALL = {
    "HAS_MASK": True,
    "HAS_ROW_T": True,
    "HAS_CAP": True,
    "ACC": "fp32",
    "BLOCK": 4096,
    "num_warps": 8,
}
NONE = {**ALL, "HAS_MASK": False, "HAS_ROW_T": False, "HAS_CAP": False}
ROW = {"BLOCK": 4096, "num_warps": 8}
TERMS = dict.fromkeys(("HAS_ADVANTAGES", "HAS_OLD", "HAS_SCALE", "WITH_GRAD"), True)
# The same for the sequence ops and the losses: strided, masked and packed, or as plain as it gets.
KL = {"PACKED": False, "HAS_MASK": True, "BLOCK": 1024, "num_warps": 8}
GAE = {**KL, "WHITEN": True}
LEAST = {**GAE, "PACKED": True, "HAS_MASK": False, "WHITEN": False}
TOKENS = {"HAS_MASK": True, "FLAT": False, "BLOCK": 1024}
FLAT = {"HAS_MASK": False, "FLAT": True, "BLOCK": 1024}
PPO = {"HAS_VALUES": True, "HAS_ENTROPY": True, "WITH_GRAD": True}
PAIRS = {"WITH_GRAD": True, "BLOCK": 16, "num_warps": 1}
WHITEN = {"PROGRAMS": 1024, "SHIFT_MEAN": False, "UNBIASED": True}
VARIANTS = {
    "gae": {
        "gae_kernel": cases(
            {**GAE, "HAS_BOOTSTRAP": True},
            {**LEAST, "HAS_BOOTSTRAP": False},
        )
    },
    "kl_gae": {"kl_gae_kernel": cases({**GAE, "ESTIMATOR": 2}, {**LEAST, "ESTIMATOR": 0})},
    "kl_reward": {"kl_reward_kernel": cases({**KL, "ESTIMATOR": 2}, {**KL, "ESTIMATOR": 1})},
    "masked_whiten": {
        "masked_whiten_moments_kernel": cases(TOKENS, FLAT),
        "masked_whiten_kernel": cases(TOKENS | WHITEN, FLAT | WHITEN),
    },
    "ppo_loss": {
        "ppo_loss_fwd_kernel": cases({**TOKENS, **PPO}, {**FLAT, **dict.fromkeys(PPO, False)}),
        "ppo_loss_metrics_kernel": [({"PROGRAMS": 1024, "HAS_VALUES": True}, "fp32")],
    },
    "ranking_loss": {
        "ranking_loss_fwd_kernel": cases(PAIRS, {**PAIRS, "WITH_GRAD": False}),
        "ranking_loss_sum_kernel": [({"PROGRAMS": 1024}, "fp32")],
    },
    "token_logprob": {
        "token_logprob_fwd_kernel": [(ALL, "fp32"), (ALL, "bf16"), (NONE, "fp16")],
        "token_logprob_bwd_kernel": [
            ({**ALL, "HAS_G": True, "HAS_H": True}, "fp32"),
            ({**ALL, "HAS_G": True, "HAS_H": True}, "bf16"),
            ({**NONE, "HAS_G": True, "HAS_H": False}, "fp16"),
        ],
    },
    "token_loss": {
        "token_loss_fwd_kernel": [
            *cases({**ALL, **TERMS}, {**NONE, **TERMS}),
            ({**NONE, **dict.fromkeys(TERMS, False)}, "fp16"),
        ],
        "token_loss_bwd_kernel": cases(ROW, ROW)[1:],
    },
}
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}

# Runs in a process of its own: here the kernels may be decorated for the interpreter.
COMPILE = """
import importlib, json, re, subprocess, sys, tempfile
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

module, variants, targets = json.loads(sys.argv[1])
kernels = importlib.import_module(f"fastrlhf.kernels.{module}")
listed = {n for n, v in vars(kernels).items() if n.endswith("_kernel")}
assert listed == set(variants), f"kernels {listed}, compiled here {set(variants)}"

TYPES = {"fp32": tl.float32, "fp64": tl.float64}
NAMED = {
    **dict.fromkeys(("cu_seqlens_ptr", "cu_groups_ptr"), "*i32"),
    **dict.fromkeys(("targets_ptr", "ranks_ptr"), "*i64"),
    "mask_ptr": "*i1",
    "partials_ptr": "*fp64",
}
IN_THE_DTYPE = {
    f"{name}_ptr"
    for name in (
        "logits out rewards values bootstrap x logprob ref_logprob score old_logprob advantages"
        " old_values returns entropy scores"
    ).split()
}

def type_of(name, dtype):
    if name in IN_THE_DTYPE:
        return "*" + dtype
    if name in NAMED:
        return NAMED[name]
    acc = "fp64" if dtype == "fp64" else "fp32"
    return f"*{acc}" if name.endswith("_ptr") else "i64" if name.startswith("stride") else "i32"

for name, cases in variants.items():
    kernel = getattr(kernels, name)
    for constants, dtype in cases:
        warps = constants.pop("num_warps", 4)
        values = {k: TYPES.get(v, v) if k == "ACC" else v for k, v in constants.items()}
        signature = {
            p.name: "constexpr" if p.name in values else p.annotation_type or type_of(p.name, dtype)
            for p in kernel.params
        }
        for target in targets:
            source = ASTSource(kernel, signature=signature, constexprs=values)
            built = triton.compile(source, target=GPUTarget(*target), options={"num_warps": warps})
            if target[0] == "cuda":
                with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                    file.write(built.asm["cubin"]); file.flush()
                    tool = triton.knobs.nvidia.cuobjdump.path
                    report = subprocess.run(
                        [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
                    ).stdout
                stack, local = (int(re.search(key + r":(\\d+)", report)[1]) for key in ("STACK", "LOCAL"))
            else:
                text = built.asm["amdgcn"]
                stack = int(re.search(r"\\.private_segment_fixed_size: (\\d+)", text)[1])
                local = int(re.search(r"\\.vgpr_spill_count: +(\\d+)", text)[1])
            print(json.dumps([name, dtype, str(target[1]), stack, local]))
"""


def test_every_kernel_file_is_compiled_here():
    assert {p.stem for p in KERNEL_FILES} == set(VARIANTS)


@pytest.mark.parametrize("module", VARIANTS)
def test_triton_kernels(module, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    job = json.dumps([module, VARIANTS[module], list(TARGETS.values())])
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, job], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(TARGETS) * sum(len(v) for v in VARIANTS[module].values())
    for name, dtype, target, stack, local in rows:
        assert stack == 0 and local == 0, f"{name} {dtype} {target}: stack {stack}, local {local}"


def spills(report):
    """(kernel, line) of every kernel in an assembler report that uses its stack or spills."""
    found, kernel = [], "?"
    for line in report.splitlines():
        named = re.search(r"Function properties for (\S+)|Compiling entry function '(\S+?)'", line)
        if named:
            kernel = named[1] or named[2]
        if re.search(r"\b[1-9]\d* bytes (stack frame|spill stores|spill loads)", line):
            found.append((kernel, line.strip()))
    return found


def test_the_report_is_read():
    """The reader finds what it looks for, so that its silence means something."""
    clean = "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    assert spills(clean) == []
    for bad in (
        clean.replace("0 bytes stack", "40 bytes stack"),
        clean.replace("0 bytes spill l", "8 bytes spill l"),
    ):
        assert spills(f"ptxas info    : Function properties for f\n{bad}") == [("f", bad.strip())]


@pytest.mark.skipif(bool(NO_NVCC), reason=NO_NVCC)
@pytest.mark.parametrize("source", CUDA_FILES, ids=[p.name for p in CUDA_FILES])
def test_cuda_kernels(source, tmp_path):
    include = Path(torch.__file__).parent / "include"
    command = ["nvcc", "-std=c++20", "-O3", "-DUSE_CUDA", "-fatbin", str(source), "-Xptxas", "-v"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT / 'csrc'}", f"-I{include}"]
    for arch in ("80", "90", "100"):
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    command += ["--threads", "2", "-o", str(tmp_path / "device.fatbin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("Compiling entry function") >= 3
    assert not spills(done.stderr)
    assert "warning" not in done.stderr


# Instructions without which a kernel is right and slow: (source, architecture) -> what its PTX must hold.
# token_loss keeps a row on chip: asynchronous copies into shared memory, and on sm_90 and later a
# cluster of blocks that write into each other's.
ON_CHIP = ("cp.async.cg.shared.global",)
CLUSTER = ("barrier.cluster.arrive.release", "barrier.cluster.wait.acquire", "mapa.shared::cluster")
NEEDED = {
    ("token_loss", "80"): ON_CHIP,
    ("token_loss", "90"): (*ON_CHIP, *CLUSTER, "st.shared::cluster", "%cluster_nctarank"),
    ("token_loss", "100"): (*ON_CHIP, *CLUSTER, "st.shared::cluster", "%cluster_nctarank"),
}


@pytest.mark.skipif(bool(NO_NVCC), reason=NO_NVCC)
@pytest.mark.parametrize(("kernel", "arch"), NEEDED)
def test_the_fast_path_is_compiled(kernel, arch, tmp_path):
    include, out = Path(torch.__file__).parent / "include", tmp_path / "out.ptx"
    command = ["nvcc", "-std=c++20", "-O3", "-DUSE_CUDA", "-ptx", f"-arch=compute_{arch}"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT / 'csrc'}", f"-I{include}"]
    source = ROOT / "csrc" / "cuda" / f"{kernel}.cu"
    done = subprocess.run([*command, source, "-o", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    text = out.read_text()
    missing = [instruction for instruction in NEEDED[kernel, arch] if instruction not in text]
    assert not missing
    if arch == "80":  # the test reads what it should: no clusters there
        assert not [instruction for instruction in CLUSTER if instruction in text]
