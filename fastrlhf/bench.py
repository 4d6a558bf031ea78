"""fastrlhf bench: run the benchmarks of the checkout."""

import subprocess
import sys
from pathlib import Path

from fastrlhf import extras
from fastrlhf.errors import UserError

USAGE = """usage: fastrlhf bench [op ...] [option ...]

Time the ops against eager PyTorch, like `make bench`. The arguments go to benchmarks/run.py of the checkout;
`python benchmarks/run.py --help` lists them."""


def main(arguments: list[str]) -> int:
    """Run benchmarks/run.py in its own process; return its exit status."""
    script = Path(__file__).resolve().parents[1] / "benchmarks" / "run.py"
    if not script.is_file():
        raise UserError(
            "an installed package has no benchmarks: clone the repository, install it with "
            "`pip install --no-build-isolation -e '.[bench]'` and run `fastrlhf bench` there"
        )
    extras.require("bench")
    return subprocess.run([sys.executable, str(script), *arguments], check=False).returncode
