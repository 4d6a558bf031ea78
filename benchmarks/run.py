"""Time the ops of fastrlhf against eager PyTorch on this machine, and write a results file.

    python benchmarks/run.py [op ...] [--no-compile] [--quick] [--device cpu|cuda] [--out file.json]

A row holds:
    median_ms, p20_ms, p80_ms     time of a call; on a GPU device time (`gpu_clock.py`), with host_ms and graph_ms
    cold_ms                       on a CPU, a short call with its data out of the caches
    times_as_fast_as              speedup over each other provider
    bytes, flops                  minimum work, by the formula in roofline_note
    roofline_ms                   max(bytes / bandwidth, flops / GEMM rate), both measured in this run
    fraction_of_roofline          roofline_ms / cold_ms if there is one, else roofline_ms / median_ms
    peak_bytes, beyond_bytes      peak memory of a call; the part that is not in the returned tensors
    error, gradient_errors        largest errors against fp64; error_share_of_bar: the largest over its bar

The gate comes first: a wrong result gets no median_ms, and `ungated` gives the reason. The time of a third-party
provider that fails the gate is kept apart as `ungated_ms`. The exit status is 1 if a result of ours is wrong, if
one of our calls exceeds its memory limit, or if a row is faster than its roofline, which is then wrong itself.

If FASTRLHF_UNTIL (seconds since the epoch) is set, no case starts after it, and the file is rewritten after each
case, so a run that is killed keeps its results.
"""

import argparse
import datetime
import gc
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

import bench_dispatch
import bench_pack
import torch
from rich.console import Console
from rich.table import Table

import gpu_clock
import peers
from cases import CPU, GPU, LISTS, QUICK, WARM_UP, capped
from gpu import slug
from harness import cold_times, directions, machine, memory, plain, quantiles, step, times
from registry import gated, makers
from roofline import Ceilings, measure_roofline

RESULTS = Path(__file__).resolve().parent / "results"
MEMORY = ("peak_bytes", "beyond_bytes")
NOISE = 1.1  # a larger fraction of the roofline means that the roofline is wrong


def bench_op(case, make, device, roofline, compiled, pace=1.0, at_size=None):
    """Rows of one case: every provider in every direction. `at_size`: see registry.gated. `pace` scales the time."""
    if compiled:
        torch._dynamo.reset()
    ceilings = Ceilings.of(roofline, case.dtype)
    checked = gated(case, make, device, compiled, at_size)
    problem, found, gate = checked.problem, checked.providers, checked.gate
    shares, reasons = checked.shares, checked.rejected
    # A wrong third-party result is still timed, as `ungated_ms`; a wrong one of ours is not.
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
        roofline_ms = ceilings.roofline_ms(moved, flops)
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
                "roofline_ms": roofline_ms,
                "roofline_note": problem.roofline_note,
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
                    row["fraction_of_roofline"] = roofline_ms / row.get("cold_ms", row["median_ms"])
                row["times_as_fast_as"] = {
                    other: ms / row["median_ms"] for other, ms in right.items() if other != name
                }
                row |= {f"{yardstick}_ms": 1e3 * beside[yardstick] for yardstick in beside}
                if row["ours"] and direction in problem.peak_limits:
                    if "peak_bytes" in row:
                        row["peak_limit_bytes"] = problem.peak_limits[direction]
            rows.append(row)
    return rows


def started(problem, timed, direction):
    """(Provider -> its step after a first run, provider -> the error of that run)."""
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
    """(Provider -> times and memory, yardstick -> seconds), sampled round-robin."""
    work = {name: y.call for name, y in yardsticks.items()}
    if device == "cuda":
        # The other yardsticks are small ops of ours, too short for events; they have rows of their own.
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
    """The row of a case that failed as a whole."""
    row = {"op": case.op, "case": case.name, "dtype": case.dtype, "direction": "all"}
    row |= {"provider": "all", "ours": True, "error_share_of_bar": float("inf")}
    return row | {"raised": f"{type(error).__name__}: {error}"}


def pack_rows(case):
    """The row of the sequence packer."""
    provider, call, reason = bench_pack.problem(case)
    row = {"op": "pack", "case": case.name, "dtype": "int64", "direction": "forward"}
    row |= {"provider": provider, "ours": True}
    row |= {"error_share_of_bar": float("inf") if reason else 0.0}
    if reason:
        return [row | {"raised": reason}]
    return [row | quantiles(times({"pack": call}, "cpu", 2.0)["pack"])]


def show(console, rows):
    table = Table(
        "op",
        "case",
        "direction",
        "provider",
        "median ms",
        "host ms",
        "speedup over eager",
        "of roofline",
        "peak MB",
        "error / bar",
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
            f"{row['fraction_of_roofline']:.0%}" if "fraction_of_roofline" in row else "",
            f"{row['peak_bytes'] / 1e6:.2f}" if "peak_bytes" in row else "",
            f"{row['error_share_of_bar']:.2f}",
        )
    console.print(table)


def failures(rows, quick=False):
    """Reasons for exit status 1, a line each: a wrong result of ours, too much memory, a wrong roofline."""
    lines = []
    for row in rows:
        what = f"{row['op']} {row['case']} {row['direction']} {row['provider']}"
        if row["ours"] and "median_ms" not in row:
            error = row.get("raised", f"error is {row['error_share_of_bar']:.2f} times the bar")
            lines.append(f"WRONG: {what}: {error}")
        if row.get("peak_bytes", 0) > row.get("peak_limit_bytes", float("inf")):
            limit = row["peak_limit_bytes"]
            lines.append(f"MEMORY: {what}: {row['peak_bytes']} bytes, allowed {limit}")
        if row.get("fraction_of_roofline", 0) > NOISE and not quick:  # meaningless for tiny shapes
            share = row["fraction_of_roofline"]
            lines.append(f"ROOFLINE: {what}: {share:.0%} of the roofline, which is therefore wrong")
    return lines


def scratch(out):
    """A temporary file next to `out`, renamed to it at the end. OSError if it cannot be created."""
    if out.is_dir():
        raise IsADirectoryError(21, "expected a file, got a directory", str(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_name(f".{out.name}.{os.getpid()}")
    path.touch()
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("ops", nargs="*", help="ops to time; default: all")
    parser.add_argument(
        "--no-compile", action="store_true", help="do not time torch.compile(eager)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny shapes, to see the harness run; the numbers mean nothing",
    )
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[0])
    parser.add_argument("--list", choices=LISTS, help="list of cases; default: all of the device")
    parser.add_argument(
        "--pace", type=float, default=1.0, help="factor on the time spent on a case"
    )
    parser.add_argument(
        "--warm-up",
        action="store_true",
        help="compile: run each provider once on few rows; times nothing",
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


def warm_up(cases, device, quick):
    """Run every provider of every case once on few rows, so that Triton compiles. Times nothing."""
    made = makers()
    for case in cases:
        case = capped(case, QUICK if quick else WARM_UP)
        if case.op == "pack":
            continue
        try:
            checked = gated(case, made[case.op], device, compiled=False, at_size=True)
            print(f"{case.op} {case.name}: {len(checked.shares)} providers", checked.rejected or "")
        except Exception as error:  # the timed run reports it
            print(f"{case.op} {case.name}: {type(error).__name__}: {error}")
    return 0


def measure(arguments, cases, facts, date, unfinished, out=None):
    """Time the cases, print them, write the results to `unfinished` if given. Returns the exit status."""
    console, start = Console(width=150), time.perf_counter()
    until = float(os.environ.get("FASTRLHF_UNTIL") or "inf")
    roofline = measure_roofline(arguments.device, arguments.quick, min(1.0, arguments.pace))
    rates = ", ".join(f"{name} {rate:.3g}" for name, rate in roofline.items())
    console.print(f"{facts['name']}, {facts['threads']} threads, torch {facts['torch']}: {rates}")
    if facts["load_average"] > 0.5:
        load = facts["load_average"]
        console.print(
            f"load average {load:.1f}: other processes are running; do not commit these results"
        )
    command = " ".join(["python", "benchmarks/run.py", *sys.argv[1:]])
    document = {"date": date, "device": arguments.device, "command": command}
    document |= {"quick": arguments.quick, "list": arguments.list or arguments.device}
    document["cold"] = True  # fractions of the roofline are those of cold calls
    # tests/ops/test_dispatch.py takes the order of the backends from whole runs only.
    document["whole"] = not (arguments.ops or arguments.list or arguments.quick)
    document |= {"seconds": 0.0, "machine": facts, "peers": {}, "roofline": roofline}
    document |= {"not_run": [], "rows": []}
    rows, made = document["rows"], makers()
    if arguments.device == "cuda":
        gc.freeze()  # gc.collect() between cases skips the objects of the imports

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
            new = pack_rows(case)
        else:
            compiled = not arguments.no_compile
            options = {"at_size": True} if arguments.list else {}
            try:
                make = made[case.op]
                new = bench_op(
                    case, make, arguments.device, roofline, compiled, arguments.pace, **options
                )
            except Exception as error:  # go on with the other cases
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
        console.print(f"NOT RUN, no time left: {missing}", soft_wrap=True)
    if document["whole"]:
        document["dispatch_ratios"] = bench_dispatch.alone(console.print)
    if unfinished is not None:
        write(unfinished)
    lines = failures(rows, arguments.quick)
    for line in lines:
        console.print(line, soft_wrap=True)
    return 1 if lines else 0


def verdict(row):
    """Printed in place of a time."""
    return "WRONG" if row["ours"] else "ungated"


if __name__ == "__main__":
    sys.exit(main())
