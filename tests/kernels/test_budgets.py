"""Budgets of the row kernels: instructions per logit, spills and resident blocks, from machine code for sm_90.

benchmarks/budgets.py has the table; this file holds the kernels to it. tests/kernels/test_sass.py tests the counter.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import budgets  # noqa: E402
import cubin  # noqa: E402

sys.path.remove(str(BENCHMARKS))

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
MARGIN = 1.02  # releases of nvcc and Triton differ slightly in instruction counts


@pytest.fixture(scope="module")
def rows():
    """The table of `make budgets`, from a process in which Triton compiles; in this one it may interpret."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "budgets.py", "--json"],
        env=env | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def over(rows):
    """Violations, one line each."""
    found = []
    for row in rows:
        name = f"{row['kernel']} {row['dtype']} V = {row['V']}"
        bound = row["budget"] if row["today"] is None else row["today"] * MARGIN
        if bound is None:
            found.append(f"{name}: has neither a budget nor an entry in TODAY")
        elif row["instructions"] > bound:
            found.append(
                f"{name}: {row['instructions']:.2f} instructions per logit, {bound:.2f} allowed"
            )
        if row["spills"]:
            found.append(f"{name}: {row['spills']} bytes of stack and local memory")
        if row["today"] is not None:
            continue
        if row["mufu_budget"] is not None:
            mufu = row["ex2"] + row["mufu"]
            if mufu > row["mufu_budget"] * MARGIN:
                found.append(f"{name}: {mufu:.2f} MUFU per logit, {row['mufu_budget']} allowed")
        # A pass over shared memory has no global loads; Triton schedules its loads itself.
        from_global = row["aligned"] and row["loads"] and not row["kernel"].startswith("triton")
        if from_global and row["loads"] < budgets.LOADS_IN_FLIGHT:
            found.append(
                f"{name}: {row['loads']} loads in flight, {budgets.LOADS_IN_FLIGHT} wanted"
            )
    return found


@needs_nvcc
@pytest.mark.slow
def test_every_kernel_keeps_its_budget(rows):
    table = budgets.cuda_kernels() + budgets.triton_kernels()
    assert len(rows) == len(table) * len(budgets.ROWS)
    assert not over(rows)


@needs_nvcc
@pytest.mark.slow
def test_a_budget_that_is_met_is_the_bound(rows):
    """TODAY bounds only kernels that are over budget or have none; other entries would loosen a bound."""
    met = [
        f"{r['kernel']} {r['dtype']} V = {r['V']}: {r['instructions']:.2f}, budget {r['budget']}"
        for r in rows
        if r["today"] is not None and r["budget"] is not None and r["instructions"] <= r["budget"]
    ]
    assert not met, "take these out of TODAY"


def test_a_figure_over_its_bound_is_found():
    row = {"kernel": "k", "dtype": "bf16", "V": 8, "instructions": 6.0, "budget": 6, "today": None}
    row |= {"ex2": 1.0, "mufu": 0.0, "mufu_budget": None, "spills": 0, "aligned": True, "loads": 4}
    assert over([row]) == []
    assert len(over([row | {"instructions": 6.1}])) == 1
    assert over([row | {"instructions": 6.1, "today": 6.0}]) == []
    assert len(over([row | {"instructions": 6.2, "today": 6.0}])) == 1
    assert len(over([row | {"budget": None}])) == 1
    assert len(over([row | {"spills": 8}])) == 1
    assert len(over([row | {"loads": 3}])) == 1
    assert over([row | {"loads": 3, "aligned": False}]) == over([row | {"loads": 0}]) == []
    assert len(over([row | {"mufu": 2.5, "mufu_budget": 3}])) == 1


# For every dtype, with and without the soft-cap: launch bounds, registers and shared memory allow as many resident
# blocks as plan_row assumes.
@needs_nvcc
@pytest.mark.slow
def test_token_loss_has_as_many_blocks_resident_as_it_plans_for(rows):
    on_chip = [r for r in rows if r["planned"]]
    assert {r["dtype"] for r in on_chip} == {"bf16", "fp16", "fp32", budgets.NARROW}
    # The soft-cap needs more registers: two resident blocks.
    for r in on_chip:
        if r["V"] == 128256:
            assert r["planned"] == (2 if "soft-cap" in r["kernel"] else 3)
    short = [
        f"{r['kernel']} {r['dtype']} V = {r['V']}: {r['resident']} of {r['planned']} ({r['registers']} registers)"
        for r in on_chip
        if r["resident"] < r["planned"]
    ]
    assert not short


def test_plan_row_is_read_from_the_source():
    """bf16 rows, 2048 logits per tile: computed by hand from the rule in token_loss.cu."""
    # 63 tiles, 16 per block: two stages of one tile for each of eight warps. 25 tiles, 13 per block.
    assert budgets.plan_row(128256, 2, 3072, 3) == budgets.Plan(4, 16 * 4096 + 16, 3, 2)
    assert budgets.plan_row(50257, 2, 3072, 3) == budgets.Plan(2, 13 * 4096 + 16, 3, 2)
    # Eight blocks of 128 KB: one per SM.
    assert budgets.plan_row(512 * 1024, 2, 3072, 3) == budgets.Plan(8, 32 * 4096 + 16, 1, 4)
    with pytest.raises(ValueError, match="does not fit"):
        budgets.plan_row(2048 * 1024, 2, 3072, 3)


def test_fp32_rows_of_common_vocabularies_stay_on_chip():
    """On H100 and H200, 1024 logits per tile. Rows of more than 256 tiles exceed kSlots and are read twice."""
    plans = {
        width: budgets.plan_row(width, 4, 3072, 3)
        for width in (32000, 50257, 128256, 151936, 256000, 262144)
    }
    assert {width: (p.blocks, p.resident) for width, p in plans.items()} == {
        32000: (2, 3),
        50257: (4, 3),
        128256: (8, 3),
        151936: (8, 2),
        256000: (8, 1),
        262144: (8, 1),
    }
    with pytest.raises(ValueError, match="does not fit"):
        budgets.plan_row(262145, 4, 3072, 3)


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [
        (32, 512, 0, 4),  # threads
        (32, 256, 0, 8),
        (32, 32, 0, 32),  # maximum blocks
        (40, 512, 0, 3),  # registers
        (41, 512, 0, 2),
        (64, 512, 0, 2),
        (64, 256, 0, 4),
        (168, 384, 0, 1),
        (128, 128, 0, 4),
        (255, 256, 0, 1),
        (32, 512, 64 * 1024, 3),  # shared memory
        (32, 512, 75 * 1024, 3),
        (32, 512, 76 * 1024, 2),
        (32, 512, 227 * 1024, 1),
    ],
)
def test_resident_blocks(registers, threads, shared, blocks):
    """Against the CUDA occupancy calculator, compute capability 9.0."""
    assert cubin.resident_blocks(registers, threads, shared) == blocks
