"""Every GPU kernel compiles for every supported GPU, on machines without one.

Triton kernels are compiled by triton.compile for sm_80, sm_90, sm_100 and gfx942, each .cu by nvcc for sm_80, sm_90 and
sm_100 (device code only; test_cuda_on_host.py compiles the host side). A spill or a stack frame in the assembler's
report fails the test.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CUDA_FILES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
KERNEL_FILES = sorted(p for p in (ROOT / "kernels").glob("[!_]*.py"))
BENCHMARKS = ROOT / "benchmarks"
NO_NVCC = "nvcc is not on PATH" if shutil.which("nvcc") is None else ""


# Kernel -> compiled variants: constexpr arguments and the dtype of the logits. A flag that is off removes code, so all
# flags on, for the widest and the narrowest dtype, cover every line.
def cases(everything, least):
    """All flags in fp32 and fp64, none of them in bf16."""
    return [
        ({**everything, "ACC": "fp32"}, "fp32"),
        ({**everything, "ACC": "fp64"}, "fp64"),
        ({**least, "ACC": "fp32"}, "bf16"),
    ]


FLAGS = dict.fromkeys(("HAS_MASK", "HAS_ROW_T"), True)
PLAIN = dict.fromkeys(FLAGS, False) | {"CAP": 0}
# As row_tile of kernels/_launch.py.
TILE = {"R": 8, "L": 256, "STAGES": 4, "num_warps": 1, "enable_fp_fusion": False}
SMALL = TILE | {"R": 2}  # EXACT_CAP, and fp64
ROW = {"BLOCK": 4096, "num_warps": 4, "enable_fp_fusion": False}
SMALL_ROW = ROW | {"BLOCK": 2048}  # with a soft-cap
# token_loss: the row pass of the linear losses, without and with the entropy, and the op's forward.
TERMS = dict.fromkeys(("HAS_ADVANTAGES", "HAS_OLD", "HAS_SCALE", "WITH_GRAD"), True)
TERMS |= {"BLOCK": 1024}
PASS = (
    TERMS
    | dict.fromkeys(("HAS_H", "WITH_ENTROPY", "WITH_LOSS"), False)
    | {"WITH_GRAD_LOGPROB": True}
)
ENTROPY = PASS | {"HAS_H": True, "WITH_ENTROPY": True}
LOSS = PASS | {"WITH_LOSS": True}
EVERY = ENTROPY | {"WITH_LOSS": True}
LEAST_LOSS = {
    **dict.fromkeys(LOSS, False),
    "OBJECTIVE": 1,
    "WITH_LOSS": True,
    "WITH_GRAD_LOGPROB": True,
    "BLOCK": 1024,
}
TO_BF16 = "fp32->bf16"  # fp32 logits, 16-bit gradient
# The sequence ops and the losses: strided, masked and packed, or with all flags off.
KL = {"PACKED": False, "HAS_MASK": True, "BLOCK": 1024, "num_warps": 8}
KL |= {"enable_fp_fusion": False}
GAE = {**KL, "WHITEN": True}
LEAST = {**GAE, "PACKED": True, "HAS_MASK": False, "WHITEN": False}
TOKENS = {"HAS_MASK": True, "FLAT": False, "BLOCK": 1024, "enable_fp_fusion": False}
FLAT = TOKENS | {"HAS_MASK": False, "FLAT": True}
PPO = {"HAS_VALUES": True, "HAS_ENTROPY": True, "WITH_GRAD": True}
PLAIN_PPO = {"HAS_OLD": True, "HAS_ADVANTAGES": True, "HAS_FACTORS": False}
# With settings, and in fp64: SMALL_BLOCK of kernels/ppo_loss.py.
EVERY_PPO = TOKENS | PPO | PLAIN_PPO | {"HAS_FACTORS": True, "BLOCK": 512, "num_warps": 8}
# Settings of the policy loss that between them take every branch of kernels/_policy.py: cispo with k3 of the ratio, and
# sapo with an unclamped k3 and the gradient of k2. token_loss has the other estimators.
POLICY = {"HAS_SEQUENCES": True, "HAS_REF": True, "KL_ESTIMATOR": 2}
CISPO = {"OBJECTIVE": 2, "KL_CLAMP": True, "KL_GRADIENT": 2, "ROLLOUT": 2, "HAS_ROLLOUT": True}
SAPO = {"OBJECTIVE": 3, "KL_CLAMP": False, "KL_GRADIENT": 1, "ROLLOUT": 3, "HAS_ROLLOUT": False}
CISPO, SAPO = POLICY | CISPO, POLICY | SAPO | {"SEQUENCE_RATIO": True}
PAIRS = {"HAS_MARGINS": True, "WITH_GRAD": True, "BLOCK": 16, "num_warps": 1}
GROUPS = {"BLOCK": 64, "BATCH_BLOCK": 1024, "num_warps": 2, "enable_fp_fusion": False}
WHITEN = {"PROGRAMS": 1024, "SHIFT_MEAN": False, "UNBIASED": True}
VARIANTS = {
    "gae": {
        "gae_kernel": cases(
            {**GAE, "HAS_BOOTSTRAP": True},
            {**LEAST, "HAS_BOOTSTRAP": False},
        )
    },
    "group_advantage": {
        "group_advantage_kernel": [
            (GROUPS | {"BASELINE": 1, "SCALE": 0}, "fp64"),
            (GROUPS | {"BASELINE": 0, "SCALE": 1}, "fp32"),
            (GROUPS | {"BASELINE": 2, "SCALE": 2}, "bf16"),
            (GROUPS | {"BASELINE": 0, "SCALE": 3}, "fp16"),
        ]
    },
    "kl_gae": {"kl_gae_kernel": cases({**GAE, "ESTIMATOR": 2}, {**LEAST, "ESTIMATOR": 0})},
    "kl_reward": {"kl_reward_kernel": cases({**KL, "ESTIMATOR": 2}, {**KL, "ESTIMATOR": 1})},
    "masked_whiten": {
        "masked_whiten_moments_kernel": cases(TOKENS, FLAT),
        "masked_whiten_kernel": cases(TOKENS | WHITEN, FLAT | WHITEN),
    },
    "ppo_loss": {
        "ppo_loss_fwd_kernel": [
            (TOKENS | PPO | PLAIN_PPO | {"ACC": "fp32"}, "fp32"),
            (EVERY_PPO | CISPO | {"ACC": "fp32"}, "bf16"),
            (EVERY_PPO | SAPO | {"ACC": "fp64"}, "fp64"),
            (FLAT | dict.fromkeys(PPO, False) | PLAIN_PPO | {"ACC": "fp32"}, "bf16"),
        ],
        "ppo_loss_metrics_kernel": [
            ({"PROGRAMS": 1024, "HAS_VALUES": True, "HAS_FACTORS": True}, "fp32")
        ],
    },
    "ranking_loss": {
        "ranking_loss_fwd_kernel": cases(
            PAIRS, {**PAIRS, "HAS_MARGINS": False, "WITH_GRAD": False}
        ),
        "ranking_loss_sum_kernel": [({"PROGRAMS": 1024}, "fp32")],
    },
    "sequence_sums": {
        "sequence_sums_kernel": [
            ({"HAS_Y": True, "HAS_MASK": True, "FLAT": False, "BLOCK": 1024}, "bf16")
        ]
    },
    "token_logprob": {
        "token_logprob_fwd_kernel": [
            ({**FLAGS, **SMALL, "L": 128, "CAP": 2, "HAS_ENTROPY": True, "ACC": "fp64"}, "fp64"),
            ({**FLAGS, **SMALL, "CAP": 2, "HAS_ENTROPY": True, "ACC": "fp32"}, "fp32"),
            ({**FLAGS, **TILE, "CAP": 1, "HAS_ENTROPY": True, "ACC": "fp32"}, "bf16"),
            ({**PLAIN, **TILE, "HAS_ENTROPY": True, "ACC": "fp32"}, "fp32"),
            ({**PLAIN, **TILE, "HAS_ENTROPY": False, "ACC": "fp32"}, "fp16"),
        ],
        "token_logprob_bwd_kernel": [
            (
                {**FLAGS, **SMALL_ROW, "CAP": 2, "HAS_G": True, "HAS_H": True, "BLOCK": 1024}
                | {"ACC": "fp64"},
                "fp64",
            ),
            ({**FLAGS, **SMALL_ROW, "CAP": 2, "HAS_G": True, "HAS_H": True, "ACC": "fp32"}, "fp32"),
            ({**FLAGS, **SMALL_ROW, "CAP": 1, "HAS_G": True, "HAS_H": True, "ACC": "fp32"}, "bf16"),
            ({**PLAIN, **ROW, "HAS_G": False, "HAS_H": True, "ACC": "fp32"}, "fp32"),
            ({**PLAIN, **ROW, "HAS_G": True, "HAS_H": False, "ACC": "fp32"}, "fp16"),
            ({**PLAIN, **ROW, "HAS_G": True, "HAS_H": False, "ACC": "fp32"}, TO_BF16),
            (
                {**FLAGS, **SMALL_ROW, "CAP": 1, "HAS_G": True, "HAS_H": True, "ACC": "fp32"},
                TO_BF16,
            ),
        ],
    },
    "token_loss": {
        "token_loss_fwd_kernel": [
            (
                {**FLAGS, **SMALL, **EVERY, "L": 128, "CAP": 2, "BLOCK": 256, "ACC": "fp64"}
                | SAPO
                | {"KL_ESTIMATOR": 3, "KL_GRADIENT": 0},
                "fp64",
            ),
            (
                {**FLAGS, **SMALL, **EVERY, "CAP": 2, "BLOCK": 512, "ACC": "fp32"}
                | CISPO
                | {"KL_ESTIMATOR": 0, "ROLLOUT": 1},
                TO_BF16,
            ),
            ({**FLAGS, **TILE, **ENTROPY, "CAP": 1, "BLOCK": 512, "ACC": "fp32"}, TO_BF16),
            ({**PLAIN, **TILE, **ENTROPY, "ACC": "fp32"}, TO_BF16),
            ({**PLAIN, **TILE, **PASS, "ACC": "fp32"}, TO_BF16),
            ({**FLAGS, **TILE, **LOSS, "CAP": 1, "BLOCK": 512, "ACC": "fp32"}, "bf16"),
            ({**PLAIN, **TILE, **LOSS, "ACC": "fp32"}, "fp32"),
            ({**PLAIN, **TILE, **LEAST_LOSS, "ACC": "fp32"}, "fp16"),
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

# Runs in a separate process: in this one the kernels may be decorated for the interpreter. One process for all modules,
# as importing Triton and torch takes longer than to compile a small module.
COMPILE = """
import json, re, subprocess, sys, tempfile, traceback
import triton
from aot import kernels_of, triton_kernel

def report(built, target):
    if target[0] == "cuda":
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(built.asm["cubin"]); file.flush()
            tool = triton.knobs.nvidia.cuobjdump.path
            text = subprocess.run(
                [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        return [int(re.search(key + r":(\\d+)", text)[1]) for key in ("STACK", "LOCAL")]
    text = built.asm["amdgcn"]
    stack = re.search(r"\\.private_segment_fixed_size: (\\d+)", text)[1]
    return [int(stack), int(re.search(r"\\.vgpr_spill_count: +(\\d+)", text)[1])]

def compiled(module, variants, targets):
    kernels = kernels_of(module)
    assert set(kernels) == set(variants), f"kernels {set(kernels)}, compiled here {set(variants)}"
    return [
        [name, dtype, target, *report(triton_kernel(kernels[name], constants, dtype, of), of)]
        for name, cases in variants.items()
        for constants, dtype in cases
        for target, of in targets.items()
    ]

variants, targets = json.load(sys.stdin)
found = {}
for module, of_module in variants.items():
    try:
        found[module] = compiled(module, of_module, targets)
    except Exception:
        found[module] = traceback.format_exc()
print(json.dumps(found))
"""


def test_every_kernel_file_is_compiled_here():
    assert {p.stem for p in KERNEL_FILES} == set(VARIANTS)


@pytest.fixture(scope="module")
def triton_reports():
    """{module: its rows (kernel, dtype, target, stack, local), or the text of its error}."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(ROOT), str(BENCHMARKS)])
    # Triton keys its cache by the source, the compiler and the target.
    env |= {"PYTHONPATH": paths, "TRITON_CACHE_DIR": str(ROOT / "build" / "aot" / "triton")}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        input=json.dumps([VARIANTS, TARGETS]),
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("module", VARIANTS)
def test_triton_kernels(module, triton_reports):
    rows = triton_reports[module]
    assert not isinstance(rows, str), rows[-3000:]
    assert len(rows) == len(TARGETS) * sum(len(v) for v in VARIANTS[module].values())
    for name, dtype, target, stack, local in rows:
        assert stack == 0 and local == 0, f"{name} {dtype} {target}: stack {stack}, local {local}"


def spills(report):
    """(kernel, line) for every kernel in an assembler report with a stack frame or spills."""
    found, kernel = [], "?"
    for line in report.splitlines():
        named = re.search(r"Function properties for (\S+)|Compiling entry function '(\S+?)'", line)
        if named:
            kernel = named[1] or named[2]
        if re.search(r"\b[1-9]\d* bytes (stack frame|spill stores|spill loads)", line):
            found.append((kernel, line.strip()))
    return found


def test_the_report_is_read():
    """spills() finds a stack frame and a spill, so that an empty result is meaningful."""
    clean = "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    assert spills(clean) == []
    for bad in (
        clean.replace("0 bytes stack", "40 bytes stack"),
        clean.replace("0 bytes spill l", "8 bytes spill l"),
    ):
        assert spills(f"ptxas info    : Function properties for f\n{bad}") == [("f", bad.strip())]


@pytest.fixture
def compilers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import aot

    return aot


@pytest.mark.skipif(bool(NO_NVCC), reason=NO_NVCC)
@pytest.mark.parametrize("source", CUDA_FILES, ids=[p.name for p in CUDA_FILES])
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_cuda_kernels(compilers, source, arch):
    report = compilers.compiled(source, arch).report
    assert "Compiling entry function" in report
    assert not spills(report)
    assert "warning" not in report


@pytest.mark.skipif(bool(NO_NVCC), reason=NO_NVCC)
@pytest.mark.parametrize("source", CUDA_FILES, ids=[p.name for p in CUDA_FILES])
def test_the_host_pass(compilers, source):
    """g++ compiles the output of nvcc's host pass, which fails for e.g. a range-for over a braced list."""
    host = compilers.compiled(source, compilers.HOST_ARCH).host
    command = ["g++", "-std=c++20", "-fsyntax-only", "-w", host]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


# (source, architecture) -> instructions that its PTX must contain: without them a kernel is correct but slow.
# token_loss holds a row in shared memory: asynchronous copies, and on sm_90 and later a cluster of blocks that write to
# each other's shared memory.
ON_CHIP = ("cp.async.cg.shared.global",)
CLUSTER = ("barrier.cluster.arrive.release", "barrier.cluster.wait.acquire", "mapa.shared::cluster")
# The sequence ops and whitening access tokens as 16-byte vectors.
VECTORS = ("ld.global.v4.u32", "st.global.v4.f32")
# File -> how many of its kernels do both: all that write fp32 tokens. Those of gae, kl_gae and kl_reward have two
# variants each (any layout, and flat); whitening has one.
SEQUENCES = {"sequence": 7, "masked_whiten": 1}
NEEDED = {
    **dict.fromkeys(((name, "90") for name in SEQUENCES), VECTORS),
    ("token_loss", "80"): ON_CHIP,
    ("token_loss", "90"): (*ON_CHIP, *CLUSTER, "st.shared::cluster", "%cluster_nctarank"),
    ("token_loss", "100"): (*ON_CHIP, *CLUSTER, "st.shared::cluster", "%cluster_nctarank"),
}


@pytest.mark.skipif(bool(NO_NVCC), reason=NO_NVCC)
@pytest.mark.parametrize(("kernel", "arch"), NEEDED)
def test_the_fast_path_is_compiled(compilers, kernel, arch):
    text = compilers.compiled(ROOT / "csrc" / "cuda" / f"{kernel}.cu", arch).ptx.read_text()
    missing = [instruction for instruction in NEEDED[kernel, arch] if instruction not in text]
    assert not missing
    if kernel in SEQUENCES:
        entries = re.split(r"\.entry ", text)[1:]
        fast = [entry for entry in entries if all(needed in entry for needed in VECTORS)]
        assert len(fast) == SEQUENCES[kernel]
        # Only mean and scale of the whitening divide, in fp32 and fp64; merging sums does not.
        assert text.count("div.rn.f64") <= 6
    if arch == "80":  # sm_80 has no clusters: the search can fail
        assert not [instruction for instruction in CLUSTER if instruction in text]
