"""Random calls of the ops and random command lines, with fixed and with fresh seeds: `make fuzz`.

    python tests/fuzz.py [--quick]

`--quick` is the part that CI runs, with fixed seeds alone. fuzz_ops.py and fuzz_commands.py hold the oracles.
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
JOBS = (
    "fuzz_commands.py --commands 250 --seed 0",
    "fuzz_commands.py --commands 250 --seed -1",
    "fuzz_ops.py --calls 25000 --seed 0",
    "fuzz_ops.py --calls 25000 --seed -1",
    "fuzz_ops.py --calls 500 --seed -1 --backend triton",
)
QUICK = (
    "fuzz_commands.py --commands 200 --seed 0",
    "fuzz_ops.py --calls 4000 --seed 0",
    "fuzz_ops.py --calls 100 --seed 0 --backend triton",
)


def run(job: str) -> int:
    started = time.perf_counter()
    # One thread: small tensors, and the jobs share the cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, *job.split()],
        cwd=HERE,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="backslashreplace",
    )
    # A process that dies (a crash in C++) has printed no summary.
    tail = done.stdout.strip().splitlines()[-40:]
    seconds = time.perf_counter() - started
    print(f"{job}: status {done.returncode} after {seconds:.0f} s", *tail, sep="\n", flush=True)
    return done.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the part that CI runs")
    jobs = QUICK if parser.parse_args().quick else JOBS
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return max(map(abs, pool.map(run, jobs)))


if __name__ == "__main__":
    sys.exit(main())
