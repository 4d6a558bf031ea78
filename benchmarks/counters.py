"""Hardware counters of the row kernels, by Nsight Compute: `make gpu-quick` runs this where ncu starts.

    python benchmarks/counters.py --out counters.json

Each of our backends runs token_logprob (without and with entropy) and token_loss at the first sizes of the
quick list, forward and backward. Written per kernel launch: time, bytes of DRAM, instructions and their number
a logit, warps, registers. The clocks are left alone.
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

METRICS = {
    "gpu__time_duration.sum": "duration",
    "dram__bytes_read.sum": "dram_read",
    "dram__bytes_write.sum": "dram_written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "smsp__inst_executed.sum": "instructions",
    "smsp__inst_executed_pipe_xu.sum": "special_function_instructions",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps_percent",
    "launch__registers_per_thread": "registers",
}
KERNELS = "regex:token_(logprob|loss)"
LAUNCHES = 40  # at most


def calls(quick: bool) -> None:
    """What is profiled. Each call is warmed up first, with the profiler off."""
    import torch
    from run import makers

    import harness
    from cases import GPU_QUICK, QUICK, capped

    made, seen = makers(), set()
    for case in GPU_QUICK:
        kind = case.op, case.sizes.get("entropy")
        if case.op not in ("token_logprob", "token_loss") or kind in seen:
            continue
        seen.add(kind)
        case = capped(case, QUICK) if quick else case
        device = "cuda" if torch.cuda.is_available() else "cpu"
        problem = harness.prepare(made[case.op](case, device))
        for name, provider in harness.providers(problem, compiled=False).items():
            if not provider.ours or provider.lay_out is not None:  # in place: the same kernels
                continue
            step = harness.step(problem, provider, "forward+backward")
            step()
            print(f"{case.op} {case.name} {name}", flush=True)
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.cudart().cudaProfilerStart()
                step()
                torch.cuda.synchronize()
                torch.cuda.cudart().cudaProfilerStop()


def logits() -> int:
    """N * V of what is profiled: the same in each case."""
    from cases import GPU_QUICK

    sizes = next(case.sizes for case in GPU_QUICK if case.op == "token_logprob")
    return sizes["N"] * sizes["V"]


def command(script: str = __file__) -> list[str]:
    options = ["--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
    options += ["--launch-count", str(LAUNCHES), "--kernel-name", KERNELS]
    options += ["--metrics", ",".join(METRICS)]
    return ["ncu", *options, sys.executable, script, "--calls"]


def parsed(text: str, count: int) -> list[dict]:
    """Rows of ncu's CSV, which stands behind what the program printed: a line of names, one of units."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    if len(lines) < 3:
        return []
    names, units, *launches = csv.reader(lines)
    rows = []
    for launch in launches:
        cells = dict(zip(names, launch, strict=True))
        unit = dict(zip(names, units, strict=True))
        row = {"kernel": cells["Kernel Name"]}
        for metric, name in METRICS.items():
            if metric in cells:
                row[name] = number(cells[metric])
                if unit[metric] not in ("", "%"):
                    row[f"{name}_unit"] = unit[metric]
        if isinstance(row.get("instructions"), float):  # a warp's instruction is one of 32 threads
            row["instructions_a_logit"] = 32 * row["instructions"] / count
        rows.append(row)
    return rows


def number(cell: str) -> float | str:
    try:
        return float(cell.replace(",", ""))
    except ValueError:
        return cell


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--calls", action="store_true", help="be the program that ncu watches")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    arguments = parser.parse_args()
    if arguments.calls:
        calls(arguments.quick)
        return 0
    if arguments.out is None:
        parser.error("--out is missing")
    if shutil.which("ncu") is None:
        sys.exit("ncu is not on PATH")
    done = subprocess.run(command(), capture_output=True, text=True, check=False)
    rows = parsed(done.stdout, logits())
    print(done.stdout[-2000:], done.stderr[-2000:])
    arguments.out.write_text(json.dumps({"logits": logits(), "launches": rows}, indent=1) + "\n")
    if not rows:
        sys.exit(f"ncu gave no row; its exit status was {done.returncode}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
