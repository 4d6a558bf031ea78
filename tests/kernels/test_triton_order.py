"""Triton's sums are bitwise identical for every layout of the arguments: checked on compiled code, without a GPU.

The interpreter cannot show it, because it sums with numpy. On a GPU the order of a sum is that of the registers, which
depends on the load width of each variant, and the compiler contracts products into FMAs. So all variants that must
agree are compiled, aligned and misaligned, and their reductions, scans and arithmetic are compared.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOKENS = {"ACC": "fp32", "BLOCK": 1024, "enable_fp_fusion": False}
SEQUENCE = TOKENS | {"num_warps": 8, "WHITEN": True}
ROW = {"HAS_ROW_T": False, "HAS_MASK": False, "CAP": 0, "ACC": "fp32", "enable_fp_fusion": False}
WALK = ROW | {"R": 8, "L": 256, "STAGES": 4, "num_warps": 1}
LOSS = WALK | {"BLOCK": 1024}
LOSS |= dict.fromkeys(
    ("HAS_ADVANTAGES", "HAS_OLD", "HAS_SCALE", "WITH_GRAD_LOGPROB", "WITH_GRAD"), True
)
PPO = TOKENS | dict.fromkeys(
    ("HAS_OLD", "HAS_ADVANTAGES", "HAS_VALUES", "HAS_ENTROPY", "WITH_GRAD", "HAS_MASK"), True
)
PPO |= {"HAS_FACTORS": False}
POLICY = PPO | dict.fromkeys(("HAS_FACTORS", "HAS_SEQUENCES", "HAS_REF", "HAS_ROLLOUT"), True)
POLICY |= {"OBJECTIVE": 2, "KL_ESTIMATOR": 2, "KL_GRADIENT": 2, "ROLLOUT": 2}
POLICY |= {"BLOCK": 512, "num_warps": 8}
LAYOUTS = ({"PACKED": True, "HAS_MASK": False}, {"PACKED": False, "HAS_MASK": False})
MASKED = {
    "PACKED": False,
    "HAS_MASK": True,
}  # one more scan, for the value of the next unmasked step

# (module, kernel[, which variants]) -> variants that must agree; each is also compiled with unit strides and with
# aligned arguments.
SAME = {
    ("gae", "gae_kernel"): [SEQUENCE | {"HAS_BOOTSTRAP": False} | x for x in (*LAYOUTS, MASKED)],
    ("kl_gae", "kl_gae_kernel"): [SEQUENCE | {"ESTIMATOR": 2} | x for x in (*LAYOUTS, MASKED)],
    ("masked_whiten", "masked_whiten_moments_kernel"): [
        TOKENS | {"FLAT": flat, "HAS_MASK": mask}
        for flat in (True, False)
        for mask in (True, False)
    ],
    ("ppo_loss", "ppo_loss_fwd_kernel"): [PPO | {"FLAT": flat} for flat in (True, False)],
    ("ppo_loss", "ppo_loss_fwd_kernel", "settings"): [
        POLICY | {"FLAT": flat} for flat in (True, False)
    ],
    ("sequence_sums", "sequence_sums_kernel"): [
        {"HAS_Y": True, "HAS_MASK": mask, "FLAT": mask, "BLOCK": 1024, "enable_fp_fusion": False}
        for mask in (True, False)
    ],
    ("token_logprob", "token_logprob_fwd_kernel"): [
        WALK | {"HAS_ENTROPY": entropy} for entropy in (False, True)
    ],
    ("token_loss", "token_loss_fwd_kernel"): [
        LOSS | {"WITH_LOSS": True, "WITH_ENTROPY": False, "HAS_H": False},
        LOSS | {"WITH_LOSS": False, "WITH_ENTROPY": True, "HAS_H": True},
    ],
    ("token_logprob", "token_logprob_bwd_kernel"): [
        ROW | {"HAS_G": True, "HAS_H": True, "BLOCK": 4096, "num_warps": 4}
    ],
}

COMPILE = """
import collections, json, re, sys, traceback
from aot import kernels_of, triton_kernel

def orders(ttgir):
    # [kind, combining operation, layout] of each operand of each reduction and scan
    named = dict(re.findall(r"^(#\\w+) = (.*)$", ttgir, re.M))
    def in_full(text):
        while any(n in named for n in re.findall(r"#\\w+", text)):
            text = re.sub(r"#\\w+", lambda m: named.get(m[0], m[0]), text)
        return text
    found, kind, steps = [], None, []
    for line in ttgir.splitlines():
        if m := re.search(r'"tt\\.(reduce|scan)"', line):
            kind, steps = m[1], []
        elif kind and (m := re.match(r"\\s*\\}\\) : \\((.*?)\\) -> ", line)):
            layouts = re.findall(r"tensor<[^#]*(#[^>]*?(?:<\\{.*?\\}>)?)>", in_full(m[1]))
            found += [[kind, " ".join(steps), x] for x in layouts]
            kind = None
        elif kind and (m := re.search(r"= (arith\\.\\w+)", line)):
            steps.append(m[1])
    return sorted(found)

def compiled(module, name, variants, dtype):
    kernel = kernels_of(module)[name]
    arguments = [p.name for p in kernel.params]
    ones = {n: 1 for n in arguments if n.startswith("stride") and n.endswith("_col")}
    found = []
    for constants in variants:
        of_variant = []
        for strides, aligned in (({}, ()), (ones, ()), (ones, arguments)):
            built = triton_kernel(kernel, constants | strides, dtype, ("cuda", 90, 32), aligned)
            ptx = re.findall(r"\\b(fma|mul|add|sub)(?:\\.rn)?(?:\\.ftz)?\\.(f32|f64)\\b", built.asm["ptx"])
            counts = collections.Counter(".".join(x) for x in ptx)
            of_variant.append([orders(built.asm["ttgir"]), counts])
        found.append([constants, of_variant])
    return found

done = []
for job in json.load(sys.stdin):
    try:
        done.append(compiled(*job))
    except Exception:
        done.append(traceback.format_exc())
print(json.dumps(done))
"""
# Dtypes of the rows of logits: in the ops, and in the linear losses.
ROW_DTYPES = ("bf16", "fp32->bf16")
CASES = [(k, dtype) for k in SAME for dtype in (ROW_DTYPES if "token" in k[0] else ("fp32",))]


@pytest.fixture(scope="module")
def compiled():
    """{case: [(constants, [(operands, {instruction: count}) of each alignment])], or the text of its error}.

    From one process for all cases: importing Triton and torch takes longer than to compile a kernel.
    """
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    env |= {"PYTHONPATH": paths, "TRITON_CACHE_DIR": str(ROOT / "build" / "aot" / "triton")}
    jobs = [[*k[:2], SAME[k], dtype] for k, dtype in CASES]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        input=json.dumps(jobs),
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(CASES, json.loads(done.stdout), strict=True))


def variants_of(compiled, same, dtype):
    found = compiled[same, dtype]
    assert not isinstance(found, str), found[-3000:]
    assert len(found) == len(SAME[same]) and all(len(x) == 3 for _, x in found)
    return found


def those(tokens):
    """Parametrises `same` and `dtype`: the kernels of tokens, or those of rows of logits."""
    cases = [(k, dtype) for k, dtype in CASES if ("token" in k[0]) != tokens]
    ids = ["-".join((*k, dtype)) for k, dtype in cases]
    return pytest.mark.parametrize(("same", "dtype"), cases, ids=ids)


@those(tokens=True)
def test_sums_over_tokens(same, dtype, compiled):
    """All reductions and scans have one layout, the arithmetic is the same, and there is no FMA."""
    module, kernel, *_ = same
    per_variant = variants_of(compiled, same, dtype)
    plain = per_variant[0][1][0]
    assert plain[0] and len({layout for _, _, layout in plain[0]}) == 1
    for constants, found in per_variant:
        more = constants["HAS_MASK"] and module in ("gae", "kl_gae")
        for order, counts in found:
            assert not {"fma.f32", "fma.f64"} & set(counts)
            assert counts["add.f64" if kernel == "sequence_sums_kernel" else "mul.f32"] > 0
            assert {x[2] for x in order} == {plain[0][0][2]}
            if more:
                assert all(x in order for x in plain[0])
                assert counts["mul.f32"] == plain[1]["mul.f32"]
            else:
                assert order == plain[0] and counts == plain[1]


@those(tokens=False)
def test_sums_over_rows_of_logits(same, dtype, compiled):
    """Only the maximum is reduced in layout order; every variant has the same number of explicit FMAs."""
    for _, found in variants_of(compiled, same, dtype):
        for order, counts in found:
            assert {x[1] for x in order} <= {"arith.maxnumf", "arith.maximumf"}
            assert bool(order) == same[1].endswith("fwd_kernel")  # a gradient reduces nothing
            assert counts["fma.f32"] == found[0][1]["fma.f32"] > 0
