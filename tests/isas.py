"""Runs the CPU tests of the ops as on lesser machines, under each instruction set below this one's: `make test-isa`.

    python tests/isas.py [pytest's arguments]

torch is held to the same instruction set, for eager's errors are what the bars are made of. One process an
instruction set, side by side.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from fastrlhf.ops import _backend, _library

# ATEN_CPU_CAPABILITY's name for each, lowest first.
TORCH_NAMES = {"baseline": "default", "avx2": "avx2", "avx512": "avx512"}
# Those of the backend `cpu`, and those that name no backend and run the CPU's.
WHICH = "cpu or to_its_last_digits or (test_any_ and not triton and not cuda and not reference)"


def files() -> list[str]:
    """The test files of the ops, and those that test all of them."""
    here = Path(__file__).parent
    ops = {f for op in _backend.OPS for f in here.rglob(f"test_{op}*.py")}
    others = {here / "ops/test_oracles.py", here / "ops/test_conformance.py"}
    others.add(here / "train/test_fp16.py")
    return sorted(str(f) for f in ops | others)


def main() -> int:
    running = _library.build_info()["cpu_isa_running"]
    names = list(TORCH_NAMES)
    further = names[: names.index(running)]
    print(f"the suite runs {running}; further here: {', '.join(further) or 'none'}", flush=True)
    threads = max(1, (os.cpu_count() or 1) // max(1, len(further)))
    command = [sys.executable, "-m", "pytest", "-q", "-k", WHICH]
    command += ["-p", "no:cacheprovider", *files(), *sys.argv[1:]]
    started, runs = time.perf_counter(), {}
    for isa in further:
        environment = {"FASTRLHF_CPU_ISA": isa, "ATEN_CPU_CAPABILITY": TORCH_NAMES[isa]}
        environment |= {"OMP_NUM_THREADS": str(threads)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        runs[isa] = subprocess.Popen(command, env={**os.environ, **environment}, **pipes)
    for isa, run in runs.items():
        said, _ = run.communicate()
        print(f"{isa}, after {time.perf_counter() - started:.0f} s:\n{said}", flush=True)
    return max((abs(run.returncode) for run in runs.values()), default=0)


if __name__ == "__main__":
    sys.exit(main())
