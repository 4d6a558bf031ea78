"""Hardware counters of the row kernels from Nsight Compute; `make gpu-quick` runs this if ncu works.

    python benchmarks/counters.py --out counters.json

Each GPU backend runs token_logprob (without and with entropy) and token_loss, forward and backward, at the first
sizes of the quick list. Per kernel launch it writes time, DRAM bytes, instructions, instructions per logit, active
warps and registers. ncu does not lock the clocks.
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
LAUNCHES = 40  # limit on profiled launches


def calls(quick: bool) -> None:
    """The profiled program. Each call runs once with the profiler off before it is profiled."""
    import torch

    import harness
    from cases import GPU_QUICK, QUICK, capped
    from registry import makers

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
            if not provider.ours or provider.lay_out is not None:  # in place runs the same kernels
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
    """N * V of the profiled cases, the same in all."""
    from cases import GPU_QUICK

    sizes = next(case.sizes for case in GPU_QUICK if case.op == "token_logprob")
    return sizes["N"] * sizes["V"]


def command(script: str = __file__) -> list[str]:
    options = ["--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
    options += ["--launch-count", str(LAUNCHES), "--kernel-name", KERNELS]
    options += ["--metrics", ",".join(METRICS)]
    return ["ncu", *options, sys.executable, script, "--calls"]


def parsed(text: str, count: int) -> list[dict]:
    """Rows of ncu's CSV output: after the program's own lines, a line of names, a line of units, the launches."""
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
        if isinstance(row.get("instructions"), float):  # counted per warp of 32 threads
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
    parser.add_argument("--calls", action="store_true", help="run the program that ncu profiles")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    arguments = parser.parse_args()
    if arguments.calls:
        calls(arguments.quick)
        return 0
    if arguments.out is None:
        parser.error("--out is required")
    if shutil.which("ncu") is None:
        sys.exit("ncu is not on PATH")
    done = subprocess.run(command(), capture_output=True, text=True, check=False)
    rows = parsed(done.stdout, logits())
    print(done.stdout[-2000:], done.stderr[-2000:])
    arguments.out.write_text(json.dumps({"logits": logits(), "launches": rows}, indent=1) + "\n")
    if not rows:
        sys.exit(f"ncu printed no rows; exit status {done.returncode}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
