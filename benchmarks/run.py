"""Time the ops of fastrlhf against eager PyTorch on this machine, and write what was measured.

    python benchmarks/run.py [op ...] [--compile] [--quick] [--device cpu|cuda] [--out file.json]

Each row: median, p20 and p80 of a call, bytes and FLOPs by the stated formula, the fraction of the floor
(measured copy bandwidth or measured matrix product, whichever takes longer), the error as a share of the
bar, and the backend that ran. An op whose result is wrong gets no number, and the exit status is 1.
"""

import argparse
import datetime
import importlib
import json
import re
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from cases import CPU, GATE, GPU, QUICK, capped
from harness import (
    errors,
    gradients,
    machine,
    measure_floor,
    peak_bytes,
    prepare,
    providers,
    quantiles,
    times,
)

MODULES = (
    "bench_token_logprob",
    "bench_token_loss",
    "bench_linear_logprob",
    "bench_sequence_ops",
    "bench_losses",
)
RESULTS = Path(__file__).resolve().parent / "results"


def bench_op(case, make, device, floor, compiled):
    """Rows of one case: each provider, forward and, where there are gradients, forward+backward."""
    gate = prepare(make(capped(case, GATE), device))
    shares = errors(gate, providers(gate, compiled))
    problem = prepare(make(case, device))
    found = providers(problem, compiled)
    right = {name: function for name, function in found.items() if shares[name] <= 1}

    def forward(function):
        with torch.no_grad():
            return problem.call(function)

    def full(function):
        return gradients(problem, problem.call(function), problem.args)

    directions = {"forward": (forward, problem.forward_bytes, problem.forward_flops)}
    if problem.wrt:
        both_bytes = problem.forward_bytes + problem.backward_bytes
        both_flops = problem.forward_flops + problem.backward_flops
        directions["forward+backward"] = (full, both_bytes, both_flops)
    rows = []
    for direction, (step, moved, flops) in directions.items():
        calls = {name: lambda f=f, step=step: step(f) for name, f in right.items()}
        taken = times(calls, device, problem.seconds)
        gemm = floor.get(f"gemm_{case.dtype}_flop_per_s", floor["gemm_float32_flop_per_s"])
        floor_ms = 1e3 * max(moved / floor["copy_bytes_per_s"], flops / gemm)
        for name in found:
            row = {
                "op": case.op,
                "case": case.name,
                "dtype": case.dtype,
                "direction": direction,
                "provider": name,
                "error_share_of_bar": shares[name],
                "bytes": moved,
                "flops": flops,
                "floor_ms": floor_ms,
                "floor": problem.floor_note,
            }
            if name in taken:
                row |= quantiles(taken[name])
                row["fraction_of_floor"] = floor_ms / row["median_ms"]
                row["times_eager"] = statistics.median(taken["eager"]) * 1e3 / row["median_ms"]
                row["peak_bytes"] = peak_bytes(calls[name], device)
            rows.append(row)
    return rows


def bench_pack(case):
    """The sequence packer, C++ against its Python reference at a hundredth of the size."""
    from fastrlhf import packing

    lengths = np.random.default_rng(0).integers(1, 2049, case.sizes["n"])
    few, budget = lengths[: max(len(lengths) // 100, 1)], case.sizes["max_tokens"]
    expected = packing.pack_reference(few, budget, 1)
    same = [b.tolist() for b in packing.pack(few, budget)] == [b.tolist() for b in expected]
    row = {"op": "pack", "case": case.name, "dtype": "int64", "direction": "forward"}
    row |= {"provider": "cpu" if packing._C else "reference"}
    row |= {"error_share_of_bar": 0.0 if same else float("inf")}
    if same:
        row |= quantiles(times({"pack": lambda: packing.pack(lengths, budget)}, "cpu", 2.0)["pack"])
    return [row]


def show(console, rows):
    table = Table(
        "op", "case", "direction", "provider", "median ms", "x eager", "of floor", "error"
    )
    for row in rows:
        right = "median_ms" in row
        table.add_row(
            row["op"],
            f"{row['case']} {row['dtype']}",
            row["direction"],
            row["provider"],
            f"{row['median_ms']:.3f}" if right else "WRONG",
            f"{row['times_eager']:.2f}" if "times_eager" in row else "",
            f"{row['fraction_of_floor']:.0%}" if "fraction_of_floor" in row else "",
            f"{row['error_share_of_bar']:.2f}",
        )
    console.print(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("ops", nargs="*", help="which ops; none given: all")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of eager")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does the harness run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--out", type=Path, help="default: benchmarks/results/<machine>-<date>.json"
    )
    arguments = parser.parse_args()

    makers = {}
    for module in MODULES:
        makers |= importlib.import_module(module).PROBLEMS
    cases = CPU if arguments.device == "cpu" else GPU
    known = sorted({case.op for case in cases})
    unknown = [op for op in arguments.ops if op not in known]
    if unknown:
        parser.error(f"unknown op {unknown[0]!r}; the ops are {', '.join(known)}")

    console = Console(width=140)
    facts = machine(arguments.device)
    floor = measure_floor(arguments.device, arguments.quick)
    rates = ", ".join(f"{name} {rate:.3g}" for name, rate in floor.items())
    console.print(f"{facts['name']}, {facts['threads']} threads, torch {facts['torch']}: {rates}")
    if facts["load_average"] > 0.5:
        load = facts["load_average"]
        console.print(
            f"load average {load:.1f}: other work is running, do not trust or commit this"
        )
    rows = []
    for case in cases:
        if arguments.ops and case.op not in arguments.ops:
            continue
        case = capped(case, QUICK) if arguments.quick else case
        if case.op == "pack":
            made = bench_pack(case)
        else:
            made = bench_op(case, makers[case.op], arguments.device, floor, arguments.compile)
        for row in made:
            ms = f"{row['median_ms']:10.3f} ms" if "median_ms" in row else "WRONG"
            console.print(f"{row['op']:>20} {row['direction']:<16} {row['provider']:<14} {ms}")
        rows += made

    show(console, rows)
    date = datetime.date.today().isoformat()
    slug = re.sub(r"[^a-z0-9]+", "-", facts["name"].lower()).strip("-")
    out = arguments.out or RESULTS / f"{slug}-{date}.json"
    command = " ".join(["python", "benchmarks/run.py", *sys.argv[1:]])
    document = {"date": date, "command": command, "quick": arguments.quick}
    document |= {"machine": facts, "floor": floor, "rows": rows}
    if arguments.out or not (arguments.quick or arguments.ops):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=1) + "\n")
        console.print(f"wrote {out}")
    wrong = [row for row in rows if "median_ms" not in row]
    for row in wrong:
        share = row["error_share_of_bar"]
        console.print(f"WRONG: {row['op']} {row['provider']}: error {share:.2f} of the bar")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
