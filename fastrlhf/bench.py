"""fastrlhf bench: time the ops on this machine, with the benchmarks of the checkout."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from fastrlhf.errors import UserError


@dataclass
class BenchConfig:
    """Time every op against eager PyTorch; the same as `make bench`."""

    ops: list[str] = field(default_factory=list)  # which ops; none given: all
    compile: bool = True  # also time torch.compile of the eager definition
    out: str = ""  # JSON file to write; empty: benchmarks/results/<machine>-<date>.json
    quick: bool = False  # small shapes only


def main(cfg: BenchConfig) -> int:
    """Run benchmarks/run.py of the checkout in a process of its own; its exit status."""
    script = Path(__file__).resolve().parents[1] / "benchmarks" / "run.py"
    if not script.is_file():
        raise UserError(
            "the benchmarks are not part of an installed package: clone the repository, install it "
            "with `pip install --no-build-isolation -e .` and run `fastrlhf bench` there"
        )
    command = [sys.executable, str(script), *cfg.ops]
    command += ["--no-compile"] * (not cfg.compile) + ["--quick"] * cfg.quick
    command += ["--out", cfg.out] if cfg.out else []
    return subprocess.run(command, check=False).returncode
