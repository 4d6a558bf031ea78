"""Instructions per logit of the row kernels on sm_90, counted in machine code without a GPU: `make budgets`.

    python benchmarks/budgets.py [--only TEXT] [--loops] [--json]

A line of the table is a kernel, a dtype (a->b: the gradient has dtype b) and a kind of row: V = 128256 with rows at
16-byte boundaries, or V = 50257 with misaligned rows. tests/kernels/test_budgets.py checks the kernels against the
budgets in this file. The columns:

    instr             instructions that a warp issues per logit, over all loops over the row (rule: walks.py)
    ex2, MUFU, rare   of these: exponentials, other special functions, instructions in blocks that a pass can bypass
    rest              instructions per logit outside those loops
    loads             16-byte global loads in flight per thread
    regs, threads     registers per thread, threads per block
    shared            bytes of shared memory per block
    blocks/SM         resident blocks per multiprocessor, "of" the number that the kernel plans for
    spill             bytes of stack and local memory per thread
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import walks
from aot import ROOT, compiled, kernels_of, triton_kernel
from cubin import Function, functions, resident_blocks
from sass import SassError
from walks import Division, Phase

ROWS = ((128256, True), (50257, False))  # V, whether rows start at 16-byte boundaries
MISALIGNED_MORE = 3  # instructions per logit added to the budget of a misaligned row
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
CXX = {"bf16": "__nv_bfloat16", "fp16": "__half", "fp32": "float"}
NARROW = "fp32->bf16"  # the 16-bit operand of the next GEMM
SM_90 = ("cuda", 90, 32)


# Instructions per logit of an aligned row: kernel -> dtype -> budget. Kernels without a budget are bounded by TODAY.
BUDGETS = {
    "token_logprob forward": {"bf16": 6, "fp16": 6, "fp32": 6},
    "token_logprob forward + entropy": {"bf16": 8, "fp16": 8, "fp32": 8},
    "token_logprob forward, soft-cap": {"bf16": 13},
    "token_logprob backward": {"bf16": 6, "fp16": 6, NARROW: 5},
    "token_logprob backward + entropy": {"bf16": 8, "fp16": 8, NARROW: 7},
    "token_logprob backward, soft-cap": {"bf16": 13, NARROW: 13},
    "token_loss statistics": {"bf16": 6.5, "fp16": 6.5, "fp32": 8.5, NARROW: 8.5},
    "token_loss statistics + entropy": {"bf16": 9, "fp16": 9, "fp32": 11, NARROW: 11},
    "token_loss statistics, soft-cap": {"bf16": 12, "fp16": 12, "fp32": 14, NARROW: 14},
    "token_loss gradient": {"bf16": 5.5, "fp16": 5.5, "fp32": 5, NARROW: 5},
    "token_loss gradient + entropy": {"bf16": 7.5, "fp16": 7.5, "fp32": 7, NARROW: 7},
    "token_loss gradient, soft-cap": {"bf16": 13, "fp32": 13, NARROW: 13},
    "triton token_logprob forward": {"bf16": 7},
    "triton token_logprob forward + entropy": {"bf16": 10},
    "triton token_logprob backward": {NARROW: 5.5},
    "triton token_logprob backward + entropy": {NARROW: 7.5},
    "triton token_loss statistics": {"bf16": 7, NARROW: 6.5},
    "triton token_loss statistics + entropy": {NARROW: 10},
}
# Lower bound on the 16-byte loads in flight per thread, for CUDA kernels that read aligned rows from global memory.
LOADS_IN_FLIGHT = 4


@dataclass(frozen=True)
class Kernel:
    """One compiled variant of a kernel."""

    label: str
    dtype: str  # of the logits, or "a->b": logits a, gradient b
    source: str  # under csrc/cuda, or kernels/
    name: str  # template instance, or Triton function
    # (threads per row, copy stages) -> the phases that count
    phases: Callable[[int, int], dict[str, Phase]]
    constants: dict | None = None  # Triton's

    @property
    def size(self) -> int:
        return SIZES[self.dtype.split("->")[0]]

    @property
    def stored(self) -> int:
        return SIZES[self.dtype.split("->")[-1]]

    @property
    def budget(self) -> float | None:
        return BUDGETS.get(self.label, {}).get(self.dtype)

    @property
    def mufu_budget(self) -> float | None:
        """With a soft-cap: 3 per logit, and 2 per lane and tile for the tanh of its largest logit."""
        if not self.budget or "soft-cap" not in self.label:
            return None
        return 3 + 2 * self.size / (16 * source_number("row_tiles.cuh", r"kTileVectors = (\d+);"))


# ---- shared-memory plan of token_loss


@dataclass(frozen=True)
class Plan:
    """The choice of plan_row in csrc/cuda/token_loss.cu.

    blocks: per row. bytes: dynamic shared memory per block. resident: planned blocks per multiprocessor. stages: groups
    of copies for a block's share of the row.
    """

    blocks: int
    bytes: int
    resident: int
    stages: int


def source_number(file: str, pattern: str) -> int:
    text = (ROOT / "csrc" / "cuda" / file).read_text()
    found = re.findall(pattern, text)
    if len(set(found)) != 1:
        raise ValueError(f"csrc/cuda/{file}: {pattern!r} found {len(found)} times")
    return int(found[0])


def plan_row(width: int, size: int, static: int, wanted: int) -> Plan:
    """The fewest blocks per row that let `wanted` blocks reside on a multiprocessor; else try one fewer."""
    most = source_number("cluster.cuh", r"kMaxCluster = (\d+);")
    of_system = source_number("token_loss.cu", r"of_system = (\d+);")
    vectors = source_number("row_tiles.cuh", r"kTileVectors = (\d+);")
    per_sm, per_block = 228 * 1024, 227 * 1024  # sm_90
    tile_bytes = 16 * 32 * vectors
    tiles = -(-width * size // tile_bytes)
    wanted *= tiles <= source_number("softmax_row.cuh", r"kSlots = (\d+);")
    for resident in range(wanted, 0, -1):
        blocks = 1
        while blocks <= most:
            needed = -(-tiles // blocks) * tile_bytes + 16
            fits = (needed + static + of_system) * resident <= per_sm
            if needed + static <= per_block and fits:
                each, warps = -(-tiles // blocks), source_number("token_loss.cu", r"kWarps = (\d+)")
                stage = -(-each // (warps * source_number("token_loss.cu", r"kStages = (\d+);")))
                return Plan(blocks, needed, resident, -(-each // (stage * warps)))
            blocks *= 2
    raise ValueError(f"a row of {width} logits does not fit into shared memory")


# ---- the table


def statistics(division: Division, ex2: int = 1, far: bool = False) -> dict[str, Phase]:
    return {"maximum": Phase(0, division, far), "statistics": Phase(ex2, division, far)}


def gradient(division: Division, ex2: int = 1, far: bool = False) -> dict[str, Phase]:
    return {"gradient": Phase(ex2, division, far), "scaling": Phase(0, division, far)}


def cuda_kernels() -> list[Kernel]:
    # A warp reduces tiles. The outer loop, which merges the results in shared memory, runs once per 256 tiles.
    def forward(ex2):
        return lambda lanes, stages: statistics(Division(lanes, True, pieces=1), ex2, far=True)

    # One block per row.
    def backward(ex2):
        return lambda lanes, stages: gradient(Division(lanes), ex2, far=True)

    def on_chip(ex2):
        return lambda lanes, stages: (
            {"copy": Phase(0, Division(lanes, tiles=True, pieces=stages))}
            | statistics(
                Division(lanes, True, pieces=stages, last="padded" if ex2 == 1 else "guarded"),
                ex2,
                far=True,
            )
        )

    def from_chip(ex2):
        return lambda lanes, stages: gradient(Division(lanes), ex2, far=True)

    variants = (  # op, half, its flags, and whether it writes a gradient
        ("token_logprob forward", "fwd", "0, false", forward(1), False),
        ("token_logprob forward + entropy", "fwd", "0, true", forward(1), False),
        ("token_logprob forward, soft-cap", "fwd", "1, false", forward(2), False),
        ("token_logprob backward", "bwd", "0, false", backward(1), True),
        ("token_logprob backward + entropy", "bwd", "0, true", backward(1), True),
        ("token_logprob backward, soft-cap", "bwd", "1, false", backward(2), True),
        ("token_loss statistics", "fwd", "0, true, false", on_chip(1), True),
        ("token_loss gradient", "fwd", "0, true, false", from_chip(1), True),
        ("token_loss statistics + entropy", "fwd", "0, true, true", on_chip(1), True),
        ("token_loss gradient + entropy", "fwd", "0, true, true", from_chip(1), True),
        ("token_loss statistics, soft-cap", "fwd", "1, true, false", on_chip(2), True),
        ("token_loss gradient, soft-cap", "fwd", "1, true, false", from_chip(2), True),
    )
    found = []
    for dtype in (*CXX, NARROW):
        for label, half, flags, phases, has_gradient in variants:
            if dtype == NARROW and not has_gradient:
                continue
            op, of = label.split()[0], dtype.split("->")
            types = f"{CXX[of[0]]}, {CXX[of[-1]]}" if has_gradient else CXX[dtype]
            name = f"{op}_{half}_kernel<{types}, {flags}>"
            found.append(Kernel(label, dtype, f"{op}.cu", name, phases))
    return found


def triton_kernels() -> list[Kernel]:
    row = {"HAS_MASK": False, "HAS_ROW_T": False, "CAP": 0, "ACC": "fp32"}
    row |= {"enable_fp_fusion": False}
    walk = row | {"R": 8, "L": 256, "STAGES": 4, "num_warps": 1}
    plain, entropy = walk | {"HAS_ENTROPY": False}, walk | {"HAS_ENTROPY": True}
    back = row | {"HAS_G": True, "BLOCK": 4096, "num_warps": 4}
    g, h = back | {"HAS_H": False}, back | {"HAS_H": True}
    # token_loss as called by the op, and by the linear losses.
    terms = dict.fromkeys(("HAS_ADVANTAGES", "HAS_OLD", "HAS_SCALE", "WITH_GRAD_LOGPROB"), True)
    terms |= walk | {"BLOCK": 1024, "WITH_GRAD": True}
    loss = terms | {"WITH_LOSS": True, "HAS_H": False, "WITH_ENTROPY": False}
    rows = loss | {"WITH_LOSS": False}
    rows_h = rows | {"HAS_H": True, "WITH_ENTROPY": True}

    def forward(lanes, stages):
        return statistics(Division(lanes, tiles=True, unit=lanes), far=True)

    def from_row(lanes, stages):
        return gradient(Division(lanes, tiles=True, unit=lanes), far=True)

    variants = (
        ("token_logprob forward", "bf16", "fwd", plain, forward),
        ("token_logprob forward + entropy", "bf16", "fwd", entropy, forward),
        ("token_logprob backward", "bf16", "bwd", g, from_row),
        ("token_logprob backward + entropy", "bf16", "bwd", h, from_row),
        ("token_loss statistics", "bf16", "fwd", loss, forward),
        ("token_loss gradient", "bf16", "fwd", loss, from_row),
        ("token_logprob backward", NARROW, "bwd", g, from_row),
        ("token_logprob backward + entropy", NARROW, "bwd", h, from_row),
        ("token_loss statistics", NARROW, "fwd", rows, forward),
        ("token_loss gradient", NARROW, "fwd", rows, from_row),
        ("token_loss statistics + entropy", NARROW, "fwd", rows_h, forward),
        ("token_loss gradient + entropy", NARROW, "fwd", rows_h, from_row),
    )
    return [
        Kernel(
            label=f"triton {label}",
            dtype=dtype,
            source=f"{label.split()[0]}.py",
            name=f"{label.split()[0]}_{half}_kernel",
            phases=phases,
            constants=constants,
        )
        for label, dtype, half, constants, phases in variants
    ]


# Current cost of kernels that exceed their budget or have none: (label, dtype) -> (aligned, misaligned), None where the
# budget holds. Remove an entry when both hold. Without a budget, update the numbers when the kernel changes.
TODAY = {
    ("token_logprob backward, soft-cap", "bf16"): (13.1, None),
    ("token_loss gradient, soft-cap", "bf16"): (13.09, None),
    ("token_logprob forward, soft-cap", "fp16"): (10.35, 13.28),
    ("token_logprob backward, soft-cap", "fp16"): (13.1, 13.08),
    ("token_loss gradient, soft-cap", "fp16"): (13.09, 13.05),
    ("token_logprob forward, soft-cap", "fp32"): (10.79, 11.91),
    ("token_logprob backward", "fp32"): (4.21, 4.23),
    ("token_logprob backward + entropy", "fp32"): (6.08, 6.1),
    ("token_logprob backward, soft-cap", "fp32"): (12.27, 12.29),
    ("triton token_logprob backward", "bf16"): (5.95, 8.82),
    ("triton token_logprob backward + entropy", "bf16"): (8.06, 10.98),
    ("triton token_loss gradient", "bf16"): (6.07, 10.67),
    ("triton token_loss gradient", NARROW): (4.41, 11.55),
    ("triton token_loss gradient + entropy", NARROW): (6.42, 13.47),
}


# ---- compilation


def compile_cuda(source: str) -> dict[str, Function]:
    cubin = compiled(ROOT / "csrc" / "cuda" / source, "90").cubin
    return functions(cubin, "__half|bfloat16|float")


def compile_triton(kernel: Kernel, aligned: bool, folder: Path) -> Function:
    """The variant that a launch compiles: for aligned rows V and the strides are multiples of 16."""
    function = kernels_of(kernel.source.removesuffix(".py"))[kernel.name]
    names = [p.name for p in function.params]
    multiples = {n for n in names if n.endswith("_ptr") or n in ("N", "inner", "inner_out")}
    if aligned:
        multiples |= {n for n in names if n == "V" or n.startswith("stride")}
    built = triton_kernel(function, dict(kernel.constants), kernel.dtype, SM_90, multiples)
    cubin = folder / "triton.cubin"
    cubin.write_bytes(built.asm["cubin"])
    compiled = functions(cubin)[kernel.name]
    threads = 32 * built.metadata.num_warps
    return replace(compiled, threads=threads, shared=built.metadata.shared)


def measure(only: str = "") -> list[dict]:
    """The lines of the table as dictionaries; `figure` holds the loops."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder, cubins = Path(name), {}
        for kernel in cuda_kernels() + triton_kernels():
            if only not in f"{kernel.label} {kernel.dtype}":
                continue
            for width, aligned in ROWS:
                if kernel.constants is None:
                    if kernel.source not in cubins:
                        cubins[kernel.source] = compile_cuda(kernel.source)
                    function = cubins[kernel.source][kernel.name]
                else:
                    key = (kernel.name, kernel.dtype, json.dumps(kernel.constants), aligned)
                    if key not in cubins:
                        cubins[key] = compile_triton(kernel, aligned, folder)
                    function = cubins[key]
                try:
                    found.append(row_of(kernel, function, width, aligned))
                except SassError as error:
                    where = f"{kernel.label} {kernel.dtype} V = {width} ({kernel.name})"
                    raise SassError(f"{where}: {error}") from None
    return found


def row_of(kernel: Kernel, function: Function, width: int, aligned: bool) -> dict:
    plan = Plan(1, 0, 0, 1)
    if kernel.source == "token_loss.cu":
        # kResident of token_loss.cu
        plan = plan_row(width, kernel.size, function.shared, 2 if "soft-cap" in kernel.label else 3)
    lanes = function.threads * plan.blocks
    phases = kernel.phases(lanes, plan.stages)
    figure = walks.count_row(function.code, width, kernel.size, phases, aligned, kernel.stored)
    straight = any(p.division.straight for p in phases.values())
    rest = 0.0 if straight else walks.count_rest(function.code, figure, phases, lanes, width)
    shared = function.shared + plan.bytes
    return {
        "kernel": kernel.label,
        "dtype": kernel.dtype,
        "V": width,
        "aligned": aligned,
        "instructions": figure.instructions,
        "ex2": figure.ex2,
        "mufu": figure.mufu,
        "uniform": figure.uniform,
        "rare": figure.rare,
        "loads": figure.in_flight,
        "rest": rest,
        "budget": kernel.budget and kernel.budget + MISALIGNED_MORE * (not aligned),
        "today": TODAY.get((kernel.label, kernel.dtype), (None, None))[not aligned],
        "mufu_budget": kernel.mufu_budget,
        "registers": function.registers,
        "threads": function.threads,
        "shared": shared,
        "resident": resident_blocks(function.registers, function.threads, shared),
        "planned": plan.resident,
        "spills": function.spills,
        "figure": figure,
    }


# ---- output


def table(rows: list[dict]) -> list[str]:
    head = (
        f"{'kernel':40} {'dtype':10} {'V':>7} {'instr':>6} {'budget':>6} {'ex2':>5} {'MUFU':>5}"
        f" {'rare':>6} {'rest':>6} {'loads':>5} {'regs':>4} {'threads':>7} {'shared':>7} {'blocks/SM':>9} {'spill':>5}"
    )
    lines = [head]
    for r in rows:
        budget = "" if r["budget"] is None else f"{r['budget']:g}"
        blocks = f"{r['resident']}" + (f" of {r['planned']}" if r["planned"] else "")
        lines.append(
            f"{r['kernel']:40} {r['dtype']:10} {r['V']:7} {r['instructions']:6.2f} {budget:>6} {r['ex2']:5.2f}"
            f" {r['mufu']:5.2f} {r['rare']:6.2f} {r['rest']:6.2f} {r['loads']:5} {r['registers']:4} {r['threads']:7}"
            f" {r['shared']:7} {blocks:>9} {r['spills']:5}"
        )
    return lines


def loops(figure: walks.Figure) -> list[str]:
    """One line per walker: address, share of the row, logits and cost of a pass."""
    merged: dict = {}
    for phase, logits, w in figure.parts:
        key = (phase, w.address)
        merged[key] = (merged.get(key, (0, None))[0] + logits, w)
    used = [walker_line(phase, f"{logits} logits", w) for (phase, _), (logits, w) in merged.items()]
    return used + [walker_line(w.phase, "not used by this row", w) for w in figure.unused]


def walker_line(phase: str, share: str, w: walks.Walker) -> str:
    return (
        f"    {phase} at {w.address:#x}: {share}; {w.take} per thread and pass, {w.way.count} instructions"
        f" ({w.way.count / w.take:.2f} per logit; {w.rare} in rare blocks, {w.uniform} uniform),"
        f" ex2 {w.ex2}, MUFU {w.mufu}"
        + ", conditional" * w.partial
        + ", misaligned rows" * (w.misaligned or w.singles)
        + ", single elements" * w.narrow
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only", default="", help="only lines whose kernel and dtype contain this text"
    )
    parser.add_argument("--loops", action="store_true", help="list every loop that counts")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of the table")
    args = parser.parse_args()
    rows = measure(args.only)
    if args.json:
        print(json.dumps([{k: v for k, v in r.items() if k != "figure"} for r in rows]))
        return 0
    lines = table(rows)
    print("sm_90. V = 128256: rows at 16-byte boundaries; V = 50257: misaligned rows.")
    print(__doc__.partition("The columns:\n\n")[2])
    print(lines[0])
    for r, line in zip(rows, lines[1:], strict=True):
        print(line)
        if args.loops:
            print("\n".join(loops(r["figure"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
