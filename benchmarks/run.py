"""Time the ops of fastrlhf against eager PyTorch on this machine, and write what was measured.

    python benchmarks/run.py [op ...] [--no-compile] [--quick] [--device cpu|cuda] [--out file.json]

Each row: median, p20 and p80 of a call, how many times as fast as each other provider, bytes and FLOPs by
the stated formula, the fraction of the floor (memory bandwidth or matrix product, as measured in this run,
whichever takes longer), peak memory and what of it is beyond the returned tensors, the largest error of the
first output and of each gradient against fp64, the largest as a share of its bar, and the backend that ran.
On a GPU median_ms is the device's time, beside host_ms and graph_ms (`gpu_clock.py`); on a CPU `cold_ms` is
that of a short call whose data are out of the caches, and the fraction of the floor is its.

Where the environment holds FASTRLHF_UNTIL (seconds since 1970) no case starts after it, and the file is written
after each case: a run that is killed leaves what it has measured.

A result that is wrong gets no number: the row says in `ungated` why, and the time of another's stands in
`ungated_ms`. The exit status is 1 where it is ours, where we hold too much memory, and where a row is faster
than its floor, for then the floor is none.
"""

import argparse
import datetime
import gc
import importlib
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

import bench_dispatch
import numpy as np
import torch
import torch._functorch.config
from rich.console import Console
from rich.table import Table

import gpu_clock
import peers
from cases import CPU, GATE, GPU, LISTS, QUICK, WARM_UP, capped
from floor import Ceilings, measure_floor
from gpu import slug
from harness import (
    cold_times,
    directions,
    errors,
    machine,
    memory,
    plain,
    prepare,
    providers,
    quantiles,
    step,
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


MEMORY = ("peak_bytes", "beyond_bytes")
NOISE = 1.1  # a share of the floor above this is a wrong floor


def bench_op(case, make, device, floor, compiled, pace=1.0, at_size=None):
    """Rows of one case: each provider, forward, backward where asked for, and both together.

    On a GPU the gate compares at the timed size (`at_size`), on a CPU at that of GATE. `pace` shortens the
    time spent.
    """
    if compiled:
        torch._dynamo.reset()
    ceilings = Ceilings.of(floor, case.dtype)
    at_size = device == "cuda" if at_size is None else at_size
    problem = prepare(make(case, device))
    gate = problem if at_size else prepare(make(capped(case, GATE), device))
    found = providers(problem, compiled)
    shares = errors(gate, found if at_size else providers(gate, compiled))
    reasons = ungated(shares, gate.raised)
    # The time of a wrong result of ours is nobody's business; another's is kept apart from the others.
    runs = {
        n: p for n, p in found.items() if n not in gate.raised and (shares[n] <= 1 or not p.ours)
    }
    rows = []
    for direction, (moved, flops) in directions(problem).items():
        timed = {n: p for n, p in runs.items() if direction == "forward" or not p.forward_only}
        yardsticks = {"forward": problem.yardsticks, "forward+backward": problem.full_yardsticks}
        yardsticks = yardsticks.get(direction, {})
        steps, stopped = started(problem, timed, direction)
        timed = {name: timed[name] for name in steps}
        measured, beside = measure_direction(
            problem, timed, steps, direction, yardsticks, device, pace * problem.seconds
        )
        for name, seconds in beside.items():
            ceilings.raise_to(yardsticks[name], seconds)
        right = {name: m["median_ms"] for name, m in measured.items() if name not in reasons}
        floor_ms = ceilings.floor_ms(moved, flops)
        for name, provider in found.items():
            if direction != "forward" and provider.forward_only:
                continue
            row = {
                "op": case.op,
                "case": case.name,
                "dtype": case.dtype,
                "direction": direction,
                "provider": name,
                "ours": provider.ours,
                "error_share_of_bar": shares[name],
                "bytes": moved,
                "flops": flops,
                "floor_ms": floor_ms,
                "floor": problem.floor_note,
                **gate.seen.get(name, {}),
            }
            if name in gate.raised or name in stopped:
                row["raised"] = gate.raised.get(name) or stopped[name]
            if name in reasons:
                row["ungated"] = reasons[name]
                if name in measured:
                    row["ungated_ms"] = measured[name]["median_ms"]
                    row |= {k: measured[name][k] for k in MEMORY if k in measured[name]}
            elif name in measured:
                row |= measured[name]
                if not row.get("in_cache"):
                    row["fraction_of_floor"] = floor_ms / row.get("cold_ms", row["median_ms"])
                row["times_as_fast_as"] = {
                    other: ms / row["median_ms"] for other, ms in right.items() if other != name
                }
                row |= {f"{yardstick}_ms": 1e3 * beside[yardstick] for yardstick in beside}
                if row["ours"] and direction in problem.peak_limits:
                    if "peak_bytes" in row:
                        row["peak_limit_bytes"] = problem.peak_limits[direction]
            rows.append(row)
    return rows


def ungated(shares, raised):
    """Provider -> why its result is not taken for right, of those whose is not."""
    found = {}
    for name, share in shares.items():
        if name in raised:
            found[name] = raised[name]
        elif not share <= 1:
            found[name] = f"its error is {share:.3g} of the bar"
    return found


def started(problem, timed, direction):
    """(Provider -> its step, run once; provider -> the error that it gave instead)."""
    steps, stopped = {}, {}
    for name, provider in timed.items():
        try:
            steps[name] = step(problem, provider, direction)
            steps[name]()
        except Exception as error:
            stopped[name] = f"{type(error).__name__}: {error}"
            steps.pop(name, None)
    return steps, stopped


def measure_direction(problem, timed, steps, direction, yardsticks, device, seconds):
    """(Provider -> what to say of its times and memory, yardstick -> seconds), in turns."""
    work = {name: y.call for name, y in yardsticks.items()}
    if device == "cuda":
        # One that is no ceiling is a small op of ours, which events do not time: it has rows of its own.
        work = {n: call for n, call in work.items() if yardsticks[n].bytes or yardsticks[n].flops}
        measured = gpu_clock.measure(problem, timed, steps, direction, seconds)
        beside = times(work, device, seconds / 4) if work else {}
        return measured, {n: statistics.median(taken) for n, taken in beside.items()}
    taken = times({**steps, **work}, device, seconds)
    cold = cold_times(steps, taken, seconds / 4)
    measured = {}
    for name, call in steps.items():
        measured[name] = quantiles(taken[name]) | memory(call, device)
        if name in cold:
            measured[name]["cold_ms"] = 1e3 * statistics.median(cold[name])
    return measured, {name: statistics.median(taken[name]) for name in work}


def stopped(case, error):
    """The row of a case that could not be timed at all."""
    row = {"op": case.op, "case": case.name, "dtype": case.dtype, "direction": "all"}
    row |= {"provider": "all", "ours": True, "error_share_of_bar": float("inf")}
    return row | {"raised": f"{type(error).__name__}: {error}"}


def bench_pack(case):
    """The sequence packer, C++ against its Python reference at a hundredth of the size."""
    from fastrlhf.train import packing

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
        "host ms",
        "x eager",
        "of floor",
        "peak MB",
        "error",
    )
    for row in rows:
        right = "median_ms" in row
        times_eager = row.get("times_as_fast_as", {}).get("eager")
        host = row.get("host_ms")
        table.add_row(
            row["op"],
            f"{row['case']} {row['dtype']}",
            row["direction"],
            row["provider"],
            f"{row['median_ms']:.3f}" if right else verdict(row),
            f"{host:.3f}" if host else "",
            f"{times_eager:.2f}" if times_eager else "",
            f"{row['fraction_of_floor']:.0%}" if "fraction_of_floor" in row else "",
            f"{row['peak_bytes'] / 1e6:.2f}" if "peak_bytes" in row else "",
            f"{row['error_share_of_bar']:.2f}",
        )
    console.print(table)


def failures(rows, quick=False):
    """What makes the run a failure, one line each: a wrong result of ours, too much memory, a wrong floor."""
    lines = []
    for row in rows:
        what = f"{row['op']} {row['case']} {row['direction']} {row['provider']}"
        if row["ours"] and "median_ms" not in row:
            error = row.get("raised", f"error {row['error_share_of_bar']:.2f} of the bar")
            lines.append(f"WRONG: {what}: {error}")
        if row.get("peak_bytes", 0) > row.get("peak_limit_bytes", float("inf")):
            limit = row["peak_limit_bytes"]
            lines.append(f"MEMORY: {what}: {row['peak_bytes']} bytes, allowed {limit}")
        if row.get("fraction_of_floor", 0) > NOISE and not quick:  # of tiny shapes means nothing
            share = row["fraction_of_floor"]
            lines.append(f"FLOOR: {what}: {share:.0%} of a floor that is therefore none")
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
    parser.add_argument("--list", choices=LISTS, help="which cases; default: all of the device")
    parser.add_argument("--pace", type=float, default=1.0, help="share of the usual time a case")
    parser.add_argument(
        "--warm-up", action="store_true", help="run each provider once on few rows, time nothing"
    )
    parser.add_argument(
        "--out", type=Path, help="default: benchmarks/results/<machine>-<date>.json"
    )
    arguments = parser.parse_args()

    cases = LISTS[arguments.list] if arguments.list else CPU if arguments.device == "cpu" else GPU
    known = sorted({case.op for case in cases})
    unknown = [op for op in arguments.ops if op not in known]
    if unknown:
        parser.error(f"unknown op {unknown[0]!r}; the ops are {', '.join(known)}")
    cases = [case for case in cases if not arguments.ops or case.op in arguments.ops]
    if arguments.warm_up:
        return warm_up(cases, arguments.device, arguments.quick)

    facts = machine(arguments.device)
    date = datetime.date.today().isoformat()
    out = arguments.out or RESULTS / f"{slug(facts['name'])}-{date}.json"
    if not arguments.out and (arguments.quick or arguments.ops or arguments.list):
        return measure(arguments, cases, facts, date, None)
    try:
        unfinished = scratch(out)
    except OSError as error:
        parser.error(f"--out {out}: {error.strerror}")
    try:
        status = measure(arguments, cases, facts, date, unfinished, out)
        os.replace(unfinished, out)
        print(f"wrote {out}")
        return status
    finally:
        unfinished.unlink(missing_ok=True)


def makers():
    """Op -> what makes its problems."""
    found = {}
    for module in MODULES:
        found |= importlib.import_module(module).PROBLEMS
    return found


def warm_up(cases, device, quick):
    """Runs every provider of every case once on few rows: Triton compiles, nothing is timed."""
    made = makers()
    for case in cases:
        case = capped(case, QUICK if quick else WARM_UP)
        if case.op == "pack":
            continue
        try:
            problem = prepare(made[case.op](case, device))
            shares = errors(problem, providers(problem, compiled=False))
            reasons = ungated(shares, problem.raised)
            print(f"{case.op} {case.name}: {len(shares)} providers", reasons or "")
        except Exception as error:  # the run that follows will say so of the whole case
            print(f"{case.op} {case.name}: {type(error).__name__}: {error}")
    return 0


def measure(arguments, cases, facts, date, unfinished, out=None):
    """Times the cases, prints them, writes the document to `unfinished` if given; the exit status."""
    console, start = Console(width=150), time.perf_counter()
    # The backward is timed on one graph again and again, which inductor would otherwise forbid.
    torch._functorch.config.donated_buffer = False
    until = float(os.environ.get("FASTRLHF_UNTIL") or "inf")
    floor = measure_floor(arguments.device, arguments.quick, min(1.0, arguments.pace))
    rates = ", ".join(f"{name} {rate:.3g}" for name, rate in floor.items())
    console.print(f"{facts['name']}, {facts['threads']} threads, torch {facts['torch']}: {rates}")
    if facts["load_average"] > 0.5:
        load = facts["load_average"]
        console.print(
            f"load average {load:.1f}: other work is running, do not trust or commit this"
        )
    command = " ".join(["python", "benchmarks/run.py", *sys.argv[1:]])
    document = {"date": date, "device": arguments.device, "command": command}
    document |= {"quick": arguments.quick, "list": arguments.list or arguments.device}
    # Only a whole list of cases can say which backend is the fastest: tests/ops/test_dispatch.py.
    document["cold"] = True  # short calls have cold_ms, and their share of the floor is its
    document["whole"] = not (arguments.ops or arguments.list or arguments.quick)
    document |= {"seconds": 0.0, "machine": facts, "peers": {}, "floor": floor}
    document |= {"not_run": [], "rows": []}
    rows, made = document["rows"], makers()
    if arguments.device == "cuda":
        gc.freeze()  # what the imports made is not looked through again between cases

    def write(path):
        document["seconds"] = round(time.perf_counter() - start, 1)
        document["peers"] = peers.available()
        path.write_text(json.dumps(plain(document), indent=1, allow_nan=False) + "\n")

    for case in cases:
        if time.time() > until:
            document["not_run"].append(f"{case.op} {case.name} {case.dtype}")
            continue
        case = capped(case, QUICK) if arguments.quick else case
        if case.op == "pack":
            new = bench_pack(case)
        else:
            compiled = not arguments.no_compile
            options = {"at_size": True} if arguments.list else {}
            try:
                make = made[case.op]
                new = bench_op(
                    case, make, arguments.device, floor, compiled, arguments.pace, **options
                )
            except Exception as error:  # the other cases are still worth their numbers
                new = [stopped(case, error)]
        if arguments.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        for row in new:
            ms = f"{row['median_ms']:10.3f} ms" if "median_ms" in row else verdict(row)
            console.print(f"{row['op']:>20} {row['direction']:<16} {row['provider']:<14} {ms}")
        rows += new
        if unfinished is not None and until < float("inf"):
            write(unfinished)
            shutil.copyfile(unfinished, partial := out.with_name(f"{unfinished.name}.partial"))
            os.replace(partial, out)

    show(console, rows)
    for missing in document["not_run"]:
        console.print(f"NOT RUN, no time was left: {missing}", soft_wrap=True)
    if document["whole"]:
        document["host_ratios"] = bench_dispatch.alone(console.print)
    if unfinished is not None:
        write(unfinished)
    lines = failures(rows, arguments.quick)
    for line in lines:
        console.print(line, soft_wrap=True)
    return 1 if lines else 0


def verdict(row):
    """What stands in the place of a time."""
    return "WRONG" if row["ours"] else "ungated"


if __name__ == "__main__":
    sys.exit(main())
