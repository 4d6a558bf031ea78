"""Time the ops of fastrlhf against eager PyTorch on this machine, and write what was measured.

    python benchmarks/run.py [op ...] [--no-compile] [--quick] [--device cpu|cuda] [--out file.json]

Each row: median, p20 and p80 of a call, how many times as fast as each other provider, bytes and FLOPs by
the stated formula, the fraction of the floor (measured copy bandwidth or measured matrix product,
whichever takes longer), peak memory, the error as a share of the bar, and the backend that ran. A result
that is wrong gets no number; the exit status is 1 where it is ours, or where we hold too much memory.
"""

import argparse
import datetime
import importlib
import json
import os
import re
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch._functorch.config
from rich.console import Console
from rich.table import Table

from cases import CPU, GATE, GPU, QUICK, capped
from fastrlhf.ops._backend import BACKENDS
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


def directions(problem):
    """Direction -> (a step for a provider's function, bytes moved, FLOPs)."""

    def forward(function):
        def step():
            with torch.no_grad():
                return problem.call(function)

        return step

    def full(function):
        return lambda: gradients(problem, problem.call(function), problem.args)

    def backward(function):
        outputs = problem.call(function)
        return lambda: gradients(problem, outputs, problem.args, retain_graph=True)

    steps = {"forward": (forward, problem.forward_bytes, problem.forward_flops)}
    if problem.backward_alone:
        steps["backward"] = (backward, problem.backward_bytes, problem.backward_flops)
    if problem.wrt:
        both_bytes = problem.forward_bytes + problem.backward_bytes
        both_flops = problem.forward_flops + problem.backward_flops
        steps["forward+backward"] = (full, both_bytes, both_flops)
    return steps


def bench_op(case, make, device, floor, compiled):
    """Rows of one case: each provider, forward, backward where asked for, and both together."""
    torch._dynamo.reset()
    gate = prepare(make(capped(case, GATE), device))
    shares = errors(gate, providers(gate, compiled))
    problem = prepare(make(case, device))
    found = providers(problem, compiled)
    right = {name: function for name, function in found.items() if shares[name] <= 1}
    rows = []
    for direction, (prepared, moved, flops) in directions(problem).items():
        calls = {name: prepared(function) for name, function in right.items()}
        yardsticks = {"forward": problem.yardsticks, "forward+backward": problem.full_yardsticks}
        measured = {**calls, **yardsticks.get(direction, {})}
        taken = times(measured, device, problem.seconds)
        milliseconds = {name: 1e3 * statistics.median(taken[name]) for name in measured}
        gemm = floor.get(f"gemm_{case.dtype}_flop_per_s", floor["gemm_float32_flop_per_s"])
        floor_ms = 1e3 * max(moved / floor["copy_bytes_per_s"], flops / gemm)
        for name in found:
            row = {
                "op": case.op,
                "case": case.name,
                "dtype": case.dtype,
                "direction": direction,
                "provider": name,
                "ours": name in BACKENDS,
                "error_share_of_bar": shares[name],
                "bytes": moved,
                "flops": flops,
                "floor_ms": floor_ms,
                "floor": problem.floor_note,
            }
            if name in gate.raised:
                row["raised"] = gate.raised[name]
            if name in calls:
                row |= quantiles(taken[name])
                row["fraction_of_floor"] = floor_ms / row["median_ms"]
                row["times_as_fast_as"] = {
                    other: milliseconds[other] / row["median_ms"]
                    for other in calls
                    if other != name
                }
                for yardstick in set(measured) - set(calls):
                    row[f"{yardstick}_ms"] = milliseconds[yardstick]
                row["peak_bytes"] = peak_bytes(calls[name], device)
                if row["ours"] and direction in problem.peak_limits:
                    row["peak_limit_bytes"] = problem.peak_limits[direction]
            rows.append(row)
    return rows


def stopped(case, error):
    """The row of a case that could not be timed at all."""
    row = {"op": case.op, "case": case.name, "dtype": case.dtype, "direction": "all"}
    row |= {"provider": "all", "ours": True, "error_share_of_bar": float("inf")}
    return row | {"raised": f"{type(error).__name__}: {error}"}


def bench_pack(case):
    """The sequence packer, C++ against its Python reference at a hundredth of the size."""
    from fastrlhf import packing

    lengths = np.random.default_rng(0).integers(1, 2049, case.sizes["n"])
    few, budget = lengths[: max(len(lengths) // 100, 1)], case.sizes["max_tokens"]
    expected = packing.pack_reference(few, budget, 1)
    same = [b.tolist() for b in packing.pack(few, budget)] == [b.tolist() for b in expected]
    row = {"op": "pack", "case": case.name, "dtype": "int64", "direction": "forward"}
    row |= {"provider": "cpu" if packing._C else "reference", "ours": True}
    row |= {"error_share_of_bar": 0.0 if same else float("inf")}
    if same:
        row |= quantiles(times({"pack": lambda: packing.pack(lengths, budget)}, "cpu", 2.0)["pack"])
    return [row]


def show(console, rows):
    table = Table(
        "op",
        "case",
        "direction",
        "provider",
        "median ms",
        "x eager",
        "of floor",
        "peak MB",
        "error",
    )
    for row in rows:
        right = "median_ms" in row
        times_eager = row.get("times_as_fast_as", {}).get("eager")
        table.add_row(
            row["op"],
            f"{row['case']} {row['dtype']}",
            row["direction"],
            row["provider"],
            f"{row['median_ms']:.3f}" if right else "WRONG",
            f"{times_eager:.2f}" if times_eager else "",
            f"{row['fraction_of_floor']:.0%}" if "fraction_of_floor" in row else "",
            f"{row['peak_bytes'] / 1e6:.2f}" if "peak_bytes" in row else "",
            f"{row['error_share_of_bar']:.2f}",
        )
    console.print(table)


def failures(rows):
    """What makes the run a failure, one line each: a wrong result of ours, or too much memory."""
    lines = []
    for row in rows:
        what = f"{row['op']} {row['case']} {row['direction']} {row['provider']}"
        if row["ours"] and "median_ms" not in row:
            error = row.get("raised", f"error {row['error_share_of_bar']:.2f} of the bar")
            lines.append(f"WRONG: {what}: {error}")
        if row.get("peak_bytes", 0) > row.get("peak_limit_bytes", float("inf")):
            limit = row["peak_limit_bytes"]
            lines.append(f"MEMORY: {what}: {row['peak_bytes']} bytes, allowed {limit}")
    return lines


def scratch(out):
    """A fresh file beside `out`, which takes its place in whole; OSError before anything is measured."""
    if out.is_dir():
        raise IsADirectoryError(21, "expected a file, got a directory", str(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_name(f".{out.name}.{os.getpid()}")
    path.touch()
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("ops", nargs="*", help="which ops; none given: all")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile of eager"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does the harness run")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[0])
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

    facts = machine(arguments.device)
    date = datetime.date.today().isoformat()
    slug = re.sub(r"[^a-z0-9]+", "-", facts["name"].lower()).strip("-")
    out = arguments.out or RESULTS / f"{slug}-{date}.json"
    if not arguments.out and (arguments.quick or arguments.ops):
        return measure(arguments, cases, makers, facts, date, None)
    try:
        unfinished = scratch(out)
    except OSError as error:
        parser.error(f"--out {out}: {error.strerror}")
    try:
        status = measure(arguments, cases, makers, facts, date, unfinished)
        os.replace(unfinished, out)
        print(f"wrote {out}")
        return status
    finally:
        unfinished.unlink(missing_ok=True)


def measure(arguments, cases, makers, facts, date, out):
    """Times the cases, prints them, writes the document to `out` if given; the exit status."""
    console, start = Console(width=150), time.perf_counter()
    # The backward is timed on one graph again and again, which inductor would otherwise forbid.
    torch._functorch.config.donated_buffer = False
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
            compiled = not arguments.no_compile
            try:
                made = bench_op(case, makers[case.op], arguments.device, floor, compiled)
            except Exception as error:  # the other cases are still worth their numbers
                made = [stopped(case, error)]
        for row in made:
            ms = f"{row['median_ms']:10.3f} ms" if "median_ms" in row else "WRONG"
            console.print(f"{row['op']:>20} {row['direction']:<16} {row['provider']:<14} {ms}")
        rows += made

    show(console, rows)
    command = " ".join(["python", "benchmarks/run.py", *sys.argv[1:]])
    document = {"date": date, "device": arguments.device, "command": command}
    document |= {"quick": arguments.quick, "seconds": round(time.perf_counter() - start, 1)}
    document |= {"machine": facts, "floor": floor, "rows": rows}
    if out is not None:
        out.write_text(json.dumps(document, indent=1) + "\n")
    lines = failures(rows)
    for line in lines:
        console.print(line, soft_wrap=True)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
