"""Time of a PPO iteration of the demo, alone and beside one busy process, with and without the CLI's OpenMP setting.

    python benchmarks/waiting.py [turns] [VARIABLE=VALUE ...]

The variables are added to the runs with the setting, e.g. GOMP_SPINCOUNT=1000 to spin a little before sleeping. For a
quiet machine with two cores. Each turn runs the four cases once. A case is the median of its iterations, and the
result the median over the turns. Exit status 1 unless an iteration beside the busy process takes at most 2.5 times as
long as alone, and one alone at most 5 % longer than without the setting.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "fastrlhf" / "demo"
ITERATIONS = 5
STARTS = {
    "without": [
        "-c",
        "from fastrlhf import cli; cli.end(cli.main())",
    ],  # leaves the environment as it is
    "with": ["-m", "fastrlhf"],
}
ADDED: dict[str, str] = {}


def command(start: str, *arguments: str) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_WAIT", "GOMP_"))}
    environment |= ADDED if start == "with" else {}
    line = [sys.executable, *STARTS[start], *arguments, "--device", "cpu", "--log_every", "0"]
    subprocess.run(line, env=environment, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def seconds(start: str, folder: Path, busy: bool) -> float:
    """Median seconds of an iteration, the first left out."""
    out = folder / "ppo"
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        files = ["--prompts", str(DEMO / "data" / "demonstrations_train.jsonl.gz")]
        files += ["--model", str(DEMO / "base"), "--reward_model", str(folder / "reward")]
        files += ["--out", str(out), "--overwrite", "--iterations", str(ITERATIONS)]
        command(start, "ppo", "--config", "quickstart", *files)
    finally:
        if other is not None:
            other.kill()
            other.wait()
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    times = [row["time"] for row in rows]
    return statistics.median(b - a for a, b in zip(times, times[1:], strict=False))


def main(turns: int) -> int:
    cases = [(start, busy) for start in STARTS for busy in (False, True)]
    found: dict[tuple[str, bool], list[float]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rankings = str(DEMO / "data" / "rankings_human.jsonl.gz")
        made = [
            "--rankings",
            rankings,
            "--model",
            str(DEMO / "base"),
            "--out",
            str(folder / "reward"),
        ]
        command("with", "reward", "--config", "quickstart", *made)
        for turn in range(turns):
            for case in cases if turn % 2 == 0 else reversed(cases):
                found[case].append(seconds(case[0], folder, case[1]))
                print(turn, *case, f"{found[case][-1]:.3f} s", flush=True)
    medians = {case: statistics.median(times) for case, times in found.items()}
    slowdown = medians["with", True] / medians["with", False]
    before = medians["without", True] / medians["without", False]
    cost = medians["with", False] / medians["without", False] - 1
    print(f"beside a busy process: {slowdown:.2f} times as long ({before:.2f} without the setting)")
    print(f"alone: {100 * cost:+.1f} % against the time without the setting")
    return int(slowdown > 2.5 or cost > 0.05)


if __name__ == "__main__":
    numbers = [a for a in sys.argv[1:] if "=" not in a]
    ADDED.update(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
    sys.exit(main(int(numbers[0]) if numbers else 3))
