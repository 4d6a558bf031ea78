"""All checks that need a CUDA machine, without a network: `make gpu-quick` and `make gpu`.

    python benchmarks/gpu.py [--quick] [--out build/gpu] [--only part ...] [--plan]
    python benchmarks/gpu.py --keep build/gpu/results.json     # copy the timings into benchmarks/results/
    python benchmarks/gpu.py --quick --tiny --device cpu       # dry run on a machine without a GPU

--quick, at most 150 seconds: build the extension while Triton compiles; time the ops with the GPU idle otherwise;
read hardware counters if ncu works; run the op tests marked `gpu_quick`; check whether a GEMM is bitwise identical
in chunks of other lengths. Without --quick, at most 590 seconds, these parts come first; then the whole test suite,
compute-sanitizer over every CUDA op, the quickstart pipeline in bf16 on the varlen flash path, the remaining
benchmarks, and updates of a 1B Llama (`make bench-update` runs these without a time limit).

A part that fails or runs out of time does not stop the next one; the exit status is 1 if any failed.
OUT/results.json holds the outcome and findings of every part and is rewritten atomically after each. Logs and other
files of the parts are in build/gpu-work.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "gpu-work"
RESULTS = ROOT / "benchmarks" / "results"
BUDGET, QUICK_BUDGET = 590, 150  # seconds for all groups
SLACK = 10  # factor on the time limits of a dry run, whose machine has fewer cores and other work
# Ops whose Triton kernels compile while nvcc builds, one process per group.
WARM_UPS = (
    ("token_logprob",),
    ("token_loss",),
    ("kl_reward", "gae", "kl_gae", "masked_whiten", "group_advantage"),
    ("ppo_loss", "ranking_loss", "linear_logprob"),
    ("linear_ppo_loss", "linear_cross_entropy"),
)
SHARDS = 6  # processes of the test suite
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
TAIL = 3000  # characters of a failed part's log that go into the results
_running: set[subprocess.Popen] = set()  # each leads its own session, so a signal must be forwarded


@dataclass
class Part:
    """One command. The parts of a group run concurrently, the groups in order."""

    name: str
    command: list[str]
    limit: float  # seconds
    group: int = 0
    reserve: float = 0.0  # seconds of the budget that earlier groups leave to it
    env: dict[str, str] = field(default_factory=dict)
    skip: str = ""  # why it cannot run here
    optional: bool = False  # a failure counts as skipped
    # Findings of the finished part; an exception fails the part.
    collect: Callable[[], dict] | None = None


def shards(files: list[Path], count: int = SHARDS) -> list[list[Path]]:
    """Split test files into `count` shards of about equal bytes, largest files first."""
    heaps: list[list[Path]] = [[] for _ in range(min(count, len(files)))]
    sizes = [0] * len(heaps)
    for file in sorted(files, key=lambda f: (-f.stat().st_size, f.name)):
        least = sizes.index(min(sizes))
        heaps[least].append(file)
        sizes[least] += file.stat().st_size
    return heaps


def junit(path: Path) -> Callable[[], dict]:
    """Counts and failed tests from a JUnit report."""

    def collect() -> dict:
        suite = ElementTree.parse(path).getroot().find("testsuite")
        counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
        if counts["tests"] == counts["skipped"]:
            raise ValueError("no test ran")
        cases = list(suite.iter("testcase"))
        failed = [
            f"{case.get('classname')}::{case.get('name')}"
            for case in cases
            if case.find("failure") is not None or case.find("error") is not None
        ]
        skips = [case.find("skipped") for case in cases]
        late = sum(s is not None and "no time was left" in s.get("message", "") for s in skips)
        return {**counts, "failed": failed, "out_of_time": late}

    return collect


def document(path: Path) -> Callable[[], dict]:
    return lambda: json.loads(path.read_text())


def quickstart(run: Path, out: Path) -> Callable[[], dict]:
    """The figures of the demo's report, after a check of its device, precision and attention."""

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


def op_tests() -> list[Path]:
    """Test files that are parametrized over backends."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [file for file in files if "each_backend(" in file.read_text()]


def present_arch() -> dict[str, str]:
    """Environment that builds for this machine's GPU only; empty if nvidia-smi does not report one."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        printed = subprocess.run(
            query, capture_output=True, text=True, check=True, timeout=20
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    archs = sorted(set(re.findall(r"^\d+\.\d+$", printed, re.MULTILINE)))
    return {"TORCH_CUDA_ARCH_LIST": ";".join(archs)} if archs else {}


def has_gpu() -> bool:
    import torch  # seconds, which --plan and --keep do not need

    return torch.cuda.is_available()


def quick_parts(work: Path, device: str = "cuda", tiny: bool = False) -> list[Part]:
    """The parts of `make gpu-quick`."""
    python, on_gpu = sys.executable, device == "cuda"
    slack = SLACK if tiny else 1
    bench = [python, "benchmarks/run.py", "--device", device, "--list", "gpu-quick"]
    bench += ["--quick"] * tiny
    build = [python, "setup.py", "--quiet", "build_ext", "--inplace"]
    no_build = "" if on_gpu else "a dry run uses the existing extension"
    found = [Part("build", build, 60, env=present_arch() if on_gpu else {}, skip=no_build)]
    for i, ops in enumerate(WARM_UPS):
        found.append(Part(f"compile-{i}", [*bench, "--warm-up", *ops], 60 * slack))
    times, counters = work / "bench-quick.json", work / "counters.json"
    clock = ["--no-compile", "--pace", "0.01" if tiny else "0.1"]
    found.append(  # in a group of its own, with the GPU to itself
        Part(
            "bench-quick",
            [*bench, *clock, "--out", str(times)],
            80 * slack,
            group=1,
            reserve=70,
            collect=document(times),
        )
    )
    missing = "" if shutil.which("ncu") else "ncu is not on PATH"
    found.append(
        Part(
            "counters",
            [python, "benchmarks/counters.py", "--out", str(counters)],
            20,
            group=2,
            reserve=12,
            skip=missing if on_gpu else "a dry run has no GPU",
            optional=True,
            collect=document(counters),
        )
    )
    bits = work / "gemm_bitwise.json"
    ask = [python, "benchmarks/gemm_bitwise.py", "--device", device, "--out", str(bits)]
    ask += ["--tiny"] * tiny
    # Not timed, so it may run beside the tests.
    found.append(Part("gemm-bitwise", ask, 40 * slack, group=3, collect=document(bits)))
    report = work / "tests-quick.xml"
    select = [python, "-m", "pytest", "-q", "-m", "gpu_quick", *map(str, op_tests())]
    select.append("--continue-on-collection-errors")  # a file that needs an absent package
    if importlib.util.find_spec("xdist") and not tiny:
        select += ["-n", "12", "--dist", "worksteal"]
    if tiny:
        found.append(Part("tests-quick", [*select, "--collect-only"], 60 * slack, group=3))
    else:
        select.append(f"--junitxml={report}")
        found.append(Part("tests-quick", select, 40, group=3, reserve=33, collect=junit(report)))
    return found


def parts(out: Path, work: Path) -> list[Part]:
    """The parts of `make gpu`: the quick ones first."""
    python = sys.executable
    sanitizer = shutil.which("compute-sanitizer")
    run = ROOT / "build" / "gpu-quickstart"
    doctor = [python, "-m", "fastrlhf", "doctor", "--json"]
    found = quick_parts(work)
    found.append(Part("doctor", doctor, 30, group=3, collect=document(work / "doctor.log")))
    for i, heap in enumerate(shards(sorted((ROOT / "tests").rglob("test_*.py")))):
        report = work / f"tests-{i}.xml"
        command = [python, "-m", "pytest", "-q", f"--junitxml={report}", *map(str, heap)]
        found.append(Part(f"tests-{i}", command, 230, group=4, collect=junit(report)))
    for tool in TOOLS:
        command = [sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
        if tool == "initcheck":
            # torch's own kernels read uninitialized memory; check ours, in namespace rl, only.
            command += ["--kernel-name", "kernel_substring=_ZN2rl"]
        found.append(
            Part(
                f"sanitizer-{tool}",
                [*command, python, "tests/sanitize.py", "--backend", "cuda"],
                230,
                group=4,
                env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                skip="" if sanitizer else "compute-sanitizer is not on PATH",
            )
        )
    demo = [python, "-m", "fastrlhf", "demo", "--overwrite", "--precision", "bf16"]
    demo += ["--out", str(run)]
    found.append(Part("quickstart", demo, 230, group=4, collect=quickstart(run, out)))
    times = work / "bench-rest.json"
    bench = [python, "benchmarks/run.py", "--device", "cuda", "--list", "gpu-rest"]
    bench += ["--out", str(times)]
    found.append(Part("bench-rest", bench, 150, group=5, collect=document(times)))
    updates = work / "update.json"
    whole = [python, "benchmarks/update.py", "--device", "cuda", "--out", str(updates)]
    absent = "" if importlib.util.find_spec("transformers") else "transformers is not installed"
    found.append(
        Part("bench-update", whole, 60, 6, reserve=50, skip=absent, collect=document(updates))
    )
    return found


def run_part(part: Part, work: Path, left: float) -> dict:
    """Run a part until it ends or reaches its limit; return its outcome. Its files are in `work`."""
    outcome = {"name": part.name, "command": part.command, "limit_s": min(part.limit, left)}
    if part.skip:
        return {**outcome, "status": "skipped", "reason": part.skip, "seconds": 0.0}
    if left <= 0:
        return {**outcome, "status": "failed", "reason": "no time left", "seconds": 0.0}
    log, start = work / f"{part.name}.log", time.perf_counter()
    env = {**os.environ, "FASTRLHF_BUILD": "cuda", **part.env}
    # Third-party providers may be on the caller's path.
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    # After this, tests and benchmarks start nothing new, so that they still write their reports.
    env["FASTRLHF_UNTIL"] = str(time.time() + 0.85 * outcome["limit_s"])
    status, reason = "failed", ""
    try:
        with log.open("w") as stream, (work / f"{part.name}.err").open("w") as errors:
            # A new session, so that its children can be killed with it.
            process = subprocess.Popen(
                part.command,
                cwd=ROOT,
                env=env,
                stdout=stream,
                stderr=errors,
                start_new_session=True,
            )
            _running.add(process)
            try:
                code = process.wait(outcome["limit_s"])
                status, reason = ("passed", "") if code == 0 else ("failed", f"exit status {code}")
            except subprocess.TimeoutExpired:
                status, reason = "failed", f"still running after {outcome['limit_s']:.0f} s"
            finally:
                _end(process)
                _running.discard(process)
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
    if status == "failed" and part.optional:
        outcome["status"] = "skipped"
    if status == "failed":
        texts = [
            path.read_text(errors="replace")
            for path in (log, log.with_suffix(".err"))
            if path.exists()
        ]
        outcome["tail"] = "\n".join(text[-TAIL:] for text in texts)
    return outcome


def _end(process: subprocess.Popen) -> None:
    """Kill the process and its children."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _stop(number: int, frame) -> None:
    """Signal handler: kill every part, so that none outlives this process."""
    for process in tuple(_running):
        os.killpg(process.pid, signal.SIGKILL)  # the waiting thread records the outcome
    raise SystemExit(128 + number)


def run(todo: list[Part], out: Path, budget: float = BUDGET, work: Path | None = None) -> int:
    """Run the parts group by group and write OUT/results.json after each. Returns 1 if one failed."""
    work = out if work is None else work
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    start, outcomes, lock = time.perf_counter(), {}, threading.Lock()
    failed: list[str] = []

    def run_and_record(part: Part, left: float) -> None:
        outcome = run_part(part, work, left)
        with lock:
            outcomes[part.name] = outcome
            failed[:] = [p.name for p in todo if outcomes.get(p.name, {}).get("status") == "failed"]
            reason = f": {outcome['reason']}" if outcome["reason"] else ""
            print(
                f"{part.name:<20} {outcome['status']:<8} {outcome['seconds']:6.1f} s{reason}",
                flush=True,
            )
            done = [outcomes[p.name] for p in todo if p.name in outcomes]
            text = {
                "date": time.strftime("%Y-%m-%d"),
                "seconds": round(time.perf_counter() - start, 1),
                "failed": failed,
                "skipped": {o["name"]: o["reason"] for o in done if o["status"] == "skipped"},
                "not_run": [p.name for p in todo if p.name not in outcomes],
                "parts": done,
            }
            unfinished = out / ".results.json"
            unfinished.write_text(json.dumps(text, indent=1) + "\n")
            os.replace(unfinished, out / "results.json")

    groups = sorted({part.group for part in todo})
    for group in groups:
        together = [part for part in todo if part.group == group]
        later = sum(reserved(todo, later) for later in groups if later > group)
        left = budget - later - (time.perf_counter() - start)
        with ThreadPoolExecutor(len(together)) as pool:
            list(pool.map(lambda part, left=left: run_and_record(part, left), together))
    print(f"{len(failed)} of {len(outcomes)} parts failed; {out / 'results.json'}")
    return 1 if failed else 0


def reserved(todo: list[Part], group: int) -> float:
    """Seconds that earlier groups leave to `group`."""
    return max(part.reserve for part in todo if part.group == group)


def keep(path: Path, folder: Path = RESULTS) -> Path:
    """Write the timings of a results.json to benchmarks/results/, with the measured commit."""
    try:
        parts = json.loads(path.read_text())["parts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must be a results.json of make gpu or make gpu-quick; got {type(error).__name__}: {error}"
        ) from None
    found = {part["name"]: part.get("found") for part in parts}
    documents = [found[name] for name in ("bench-quick", "bench-rest") if found.get(name)]
    if not documents:
        raise ValueError(f"{path} holds no timings")
    kept = {**documents[0], "commit": commit()}
    for more in documents[1:]:
        kept["rows"] = kept["rows"] + more["rows"]
        kept["not_run"] = kept["not_run"] + more["not_run"]
    kept["whole"] = len(documents) == 2 and not kept["not_run"]
    for name, key in (("gemm-bitwise", "gemm_bitwise"), ("bench-update", "updates")):
        if found.get(name):
            kept[key] = found[name]
    name = f"{slug(kept['machine']['name'])}-{kept['date']}"
    target, number = folder / f"{name}.json", 1
    while target.exists() and json.loads(target.read_text()).get("commit") != kept["commit"]:
        number += 1  # keep the results of other commits
        target = folder / f"{name}-{number}.json"
    target.write_text(json.dumps(kept, indent=1) + "\n")
    return target


def slug(name: str) -> str:
    """A machine's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """The commit of the checkout, with a plus if it has changes."""
    git = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--quick", action="store_true", help="only the parts of make gpu-quick")
    parser.add_argument(
        "--only", nargs="+", help="parts by name or by its first word (tests, bench)"
    )
    parser.add_argument("--plan", action="store_true", help="print the parts and run nothing")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for a dry run")
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="RESULTS",
        help="copy its timings to benchmarks/results/; run nothing",
    )
    arguments = parser.parse_args()
    if arguments.keep:
        try:
            print(f"wrote {keep(arguments.keep)}; now run: make bench-docs")
        except ValueError as error:
            print(f"gpu.py --keep: {error}", file=sys.stderr)
            return 1
        return 0
    out = arguments.out.resolve()
    if arguments.quick:
        todo = quick_parts(WORK, arguments.device, arguments.tiny)
    elif arguments.tiny or arguments.device != "cuda":
        parser.error("--tiny and --device cpu go with --quick")
    else:
        todo = parts(out, WORK)
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
    if arguments.device == "cuda" and not has_gpu():
        print(
            "gpu.py: no CUDA device that torch can use; a dry run takes --quick --tiny --device cpu",
            file=sys.stderr,
        )
        return 1
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    budget = QUICK_BUDGET if arguments.quick else BUDGET
    return run(todo, out, budget * (SLACK if arguments.tiny else 1), WORK)


if __name__ == "__main__":
    sys.exit(main())
