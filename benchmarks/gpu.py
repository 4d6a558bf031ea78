"""Everything that only a CUDA machine can show, in under ten minutes and without a network: `make gpu`.

    python benchmarks/gpu.py [--out build/gpu] [--only part ...] [--plan]

Build, the whole test suite, compute-sanitizer over every CUDA op, the quickstart pipeline in bf16 on the varlen flash
path, and the benchmarks. A part that fails or runs out of time does not stop the next one; the exit status is 1 if any
did. OUT/results.json holds every part's outcome (it is rewritten after each group), OUT/<part>.log what it printed.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 590  # seconds for all groups
SHARDS = 6  # processes of the test suite
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
TAIL = 3000  # characters of a log that go into the results


@dataclass
class Part:
    """One command. Parts of a group run at once, groups one after the other."""

    name: str
    command: list[str]
    limit: float  # seconds
    group: int = 0
    env: dict[str, str] = field(default_factory=dict)
    skip: str = ""  # why it cannot run here
    # What else to keep of a part that ended; an exception fails the part.
    collect: Callable[[], dict] | None = None


def shards(files: list[Path], count: int = SHARDS) -> list[list[Path]]:
    """Test files in `count` heaps of about the same size, the largest files first."""
    heaps: list[list[Path]] = [[] for _ in range(min(count, len(files)))]
    sizes = [0] * len(heaps)
    for file in sorted(files, key=lambda f: (-f.stat().st_size, f.name)):
        least = sizes.index(min(sizes))
        heaps[least].append(file)
        sizes[least] += file.stat().st_size
    return heaps


def junit(path: Path) -> Callable[[], dict]:
    """Counts and the names of what failed, from pytest's report."""

    def collect() -> dict:
        suite = ElementTree.parse(path).getroot().find("testsuite")
        counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
        if counts["tests"] == counts["skipped"]:
            raise ValueError("no test ran")
        failed = [
            f"{case.get('classname')}::{case.get('name')}"
            for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ]
        return {**counts, "failed": failed}

    return collect


def document(path: Path) -> Callable[[], dict]:
    return lambda: json.loads(path.read_text())


def quickstart(run: Path, out: Path) -> Callable[[], dict]:
    """The demo's figures, and that it ran where and how this part says."""

    def collect() -> dict:
        report = json.loads((run / "report.json").read_text())
        shutil.copy(run / "report.html", out / "quickstart.html")
        ran = report["environment"]
        if not ran["device"].startswith("cuda") or ran["precision"] != "bf16":
            raise ValueError(f"ran on {ran['device']} in {ran['precision']}, not on cuda in bf16")
        if not any(word in ran["attention"] for word in ("varlen", "flash")):
            raise ValueError(f"attention was {ran['attention']}, not a varlen flash kernel")
        return report

    return collect


def parts(out: Path) -> list[Part]:
    """What `make gpu` runs."""
    python = sys.executable
    sanitizer = shutil.which("compute-sanitizer")
    run = ROOT / "build" / "gpu-quickstart"
    found = [
        Part("build", [python, "setup.py", "--quiet", "build_ext", "--inplace"], 150),
        Part(
            "doctor",
            [python, "-m", "fastrlhf", "doctor", "--json"],
            30,
            group=1,
            collect=document(out / "doctor.log"),
        ),
    ]
    for i, heap in enumerate(shards(sorted((ROOT / "tests").glob("test_*.py")))):
        report = out / f"tests-{i}.xml"
        command = [python, "-m", "pytest", "-q", f"--junitxml={report}", *map(str, heap)]
        found.append(Part(f"tests-{i}", command, 230, group=2, collect=junit(report)))
    for tool in TOOLS:
        command = [sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
        if (
            tool == "initcheck"
        ):  # torch's own kernels read what nobody wrote; ours, in namespace rl, must not
            command += ["--kernel-name", "kernel_substring=_ZN2rl"]
        found.append(
            Part(
                f"sanitizer-{tool}",
                [*command, python, "tests/sanitize.py", "--backend", "cuda"],
                230,
                group=2,
                env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                skip="" if sanitizer else "compute-sanitizer is not on PATH",
            )
        )
    demo = [
        python,
        "-m",
        "fastrlhf",
        "demo",
        "--overwrite",
        "--precision",
        "bf16",
        "--out",
        str(run),
    ]
    found += [
        Part("quickstart", demo, 230, group=2, collect=quickstart(run, out)),
        Part(  # alone: nothing else may use the GPU
            "bench",
            [python, "benchmarks/run.py", "--device", "cuda", "--out", str(out / "bench.json")],
            180,
            group=3,
            collect=document(out / "bench.json"),
        ),
    ]
    return found


def run_part(part: Part, out: Path, left: float) -> dict:
    """Runs one part to its end or its limit, and says how it went."""
    outcome = {"name": part.name, "command": part.command, "limit_s": min(part.limit, left)}
    if part.skip:
        return {**outcome, "status": "skipped", "reason": part.skip, "seconds": 0.0}
    if left <= 0:
        return {**outcome, "status": "failed", "reason": "no time was left", "seconds": 0.0}
    log, start = out / f"{part.name}.log", time.perf_counter()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "FASTRLHF_BUILD": "cuda", **part.env}
    status, reason = "failed", ""
    try:
        with log.open("w") as stream, (out / f"{part.name}.err").open("w") as errors:
            # A session of its own, so that its children end with it.
            process = subprocess.Popen(
                part.command,
                cwd=ROOT,
                env=env,
                stdout=stream,
                stderr=errors,
                start_new_session=True,
            )
            try:
                code = process.wait(outcome["limit_s"])
                status, reason = ("passed", "") if code == 0 else ("failed", f"exit status {code}")
            except subprocess.TimeoutExpired:
                status, reason = "failed", f"still running after {outcome['limit_s']:.0f} s"
            finally:
                _end(process)
    except OSError as error:
        reason = f"did not start: {error}"
    outcome["seconds"] = round(time.perf_counter() - start, 1)
    if part.collect is not None:
        try:
            outcome["found"] = part.collect()
        except Exception as error:
            status = "failed"
            reason = "; ".join(filter(None, (reason, f"{type(error).__name__}: {error}")))
    outcome |= {"status": status, "reason": reason}
    if status == "failed":
        texts = [
            path.read_text(errors="replace")
            for path in (log, log.with_suffix(".err"))
            if path.exists()
        ]
        outcome["tail"] = "\n".join(text[-TAIL:] for text in texts)
    return outcome


def _end(process: subprocess.Popen) -> None:
    """Ends what is left of the process and its children."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run(todo: list[Part], out: Path, budget: float = BUDGET) -> int:
    """Runs every part, group by group, and writes OUT/results.json; 1 if a part failed."""
    out.mkdir(parents=True, exist_ok=True)
    start, outcomes = time.perf_counter(), []
    for group in sorted({part.group for part in todo}):
        together = [part for part in todo if part.group == group]
        left = budget - (time.perf_counter() - start)
        with ThreadPoolExecutor(len(together)) as pool:
            for outcome in pool.map(lambda part, left=left: run_part(part, out, left), together):
                outcomes.append(outcome)
                reason = f": {outcome['reason']}" if outcome["reason"] else ""
                print(
                    f"{outcome['name']:<20} {outcome['status']:<8} {outcome['seconds']:6.1f} s{reason}"
                )
        failed = [o["name"] for o in outcomes if o["status"] == "failed"]
        text = {
            "date": time.strftime("%Y-%m-%d"),
            "seconds": round(time.perf_counter() - start, 1),
            "failed": failed,
            "skipped": {o["name"]: o["reason"] for o in outcomes if o["status"] == "skipped"},
            "parts": outcomes,
        }
        (out / "results.json").write_text(json.dumps(text, indent=1) + "\n")
    print(f"{len(failed)} of {len(outcomes)} parts failed; {out / 'results.json'}")
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument(
        "--only", nargs="*", help="parts by name, or by its first word (tests, bench)"
    )
    parser.add_argument("--plan", action="store_true", help="print the parts and run nothing")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    todo = parts(out)
    if arguments.only:
        names = set(arguments.only)
        todo = [part for part in todo if names & {part.name, part.name.partition("-")[0]}]
        if not todo:
            parser.error(f"no part is called {' or '.join(sorted(names))}")
    if arguments.plan:
        for part in todo:
            note = f" (skipped: {part.skip})" if part.skip else ""
            print(
                f"{part.group} {part.name:<20} <= {part.limit:.0f} s  {' '.join(part.command)}{note}"
            )
        return 0
    return run(todo, out)


if __name__ == "__main__":
    sys.exit(main())
