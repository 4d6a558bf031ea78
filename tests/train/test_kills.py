"""A run that is killed at any point of its work on files, and then continued, equals the unbroken run bitwise.

A point is an event on a file of the output folder (open, rename, remove, ...) or the logging of a step. The child
process counts them with an audit hook and sends itself the signal. `make nightly` kills each stage at nine points with
either signal, `make test` at three points of two stages.
"""

import functools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from _support import tiny
from fastrlhf import cli
from fastrlhf.train import checkpoint
from fastrlhf.train.config import save_resolved
from fastrlhf.train.run import Run
from fastrlhf.train.stages.pretrain import PretrainConfig

# The children are forks, whose autograd engine works only if the parent's has started no threads.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="forks after CUDA has started")
POINTS = 9
EVENTS = (
    "open",
    "os.chmod",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.scandir",
    "step",
)
QUICK = [("sft", signal.SIGKILL, 3), ("sft", signal.SIGKILL, 8), ("sft", signal.SIGINT, 5)]
QUICK += [("ppo", signal.SIGKILL, 4), ("ppo", signal.SIGKILL, 9), ("ppo", signal.SIGINT, 6)]


def settings(stage: str):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "layers": 1, "heads": 2, "context": 32}
    files = {"tokenizer": tiny.base(), "text": str(tiny.folder() / "text.txt")}
    saved = {"save_every": 1}
    if stage == "pretrain":
        return PretrainConfig(**tiny.QUIET, **sizes, **files, **saved, steps=3, batch=2)
    if stage == "ppo":
        return tiny.ppo_config("", **saved, minibatch=8, max_new_tokens=4, ptx_coef=0.5)
    make = tiny.sft_config if stage == "sft" else tiny.reward_config
    return make("", **saved, epochs=1, batch=20 if stage == "sft" else 8)


def fork(command: list[str], out: Path, kill_at: int, number: int) -> tuple[int, int]:
    """Run a command line in a child that sends itself signal `number` at event `kill_at`; (wait status, events)."""
    counted = out.with_suffix(".events")
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        sys.stdout = sys.stderr = open(out.with_suffix(".said"), "a", buffering=1)
        events = 0

        def hook(event, arguments):
            nonlocal events
            if event in EVENTS and inside(arguments):
                events += 1
                if events == kill_at:
                    os.kill(os.getpid(), number)

        def inside(arguments):
            return any(f"{a}/".startswith(f"{out}/") for a in arguments[:2])

        log = Run.log

        def logged(self, *arguments):
            sys.audit("step", str(out))
            log(self, *arguments)
            sys.audit("step", str(out))

        Run.log = logged
        sys.addaudithook(hook)
        status = cli.main(command)
        counted.write_text(str(events))
        os._exit(status)
    status = os.waitpid(child, 0)[1]
    return status, int(counted.read_text()) if counted.exists() else 0


@functools.lru_cache
def unbroken(stage: str) -> tuple[str, Path, int]:
    """(settings file, output folder, number of events) of a run that nothing disturbs."""
    out = tiny.folder() / f"unbroken_{stage}"
    file = f"{out}.yaml"
    cfg = settings(stage)
    cfg.out = str(out)
    save_resolved(cfg, file)
    status, events = fork([stage, "--config", file], out, 0, 0)
    assert status == 0, out.with_suffix(".said").read_text()
    assert events > 3 * POINTS
    return file, out, events


def rows(out: Path) -> list[dict]:
    times = ("time", "time/sample", "time/score", "time/update")
    return [{k: v for k, v in row.items() if k not in times} for row in tiny.log(str(out))]


def cases():
    for stage in ("pretrain", "sft", "reward", "ppo"):
        for number in (signal.SIGKILL, signal.SIGINT):
            for point in range(1, POINTS + 1):
                marks = [] if (stage, number, point) in QUICK else [pytest.mark.nightly]
                yield pytest.param(stage, number, point, marks=marks)


@pytest.mark.parametrize(("stage", "number", "point"), list(cases()))
def test_a_killed_run_continues_to_the_same_result(stage, number, point, tmp_path):
    file, whole, events = unbroken(stage)
    out = tmp_path / "out"
    command = [stage, "--config", file, "--out", str(out)]
    status, _ = fork(command, out, 1 + (events - 1) * point // POINTS, number)
    said = out.with_suffix(".said").read_text()
    if number == signal.SIGKILL:
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == number, said
    else:
        assert os.WEXITSTATUS(status) == 130 and said.endswith("interrupted\n"), said
    if checkpoint.steps(out / "checkpoints"):
        command.append("--resume")
    elif out.exists() and any(out.iterdir()):
        command.append("--overwrite")
    assert cli.main(command) == 0
    assert tiny.same_weights(str(out), str(whole))
    if stage == "ppo":
        assert tiny.same_weights(str(out / "value"), str(whole / "value"))
    assert rows(out) == rows(whole)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (out, whole)]
    assert all(summary.pop("seconds") for summary in summaries)
    assert summaries[0] == summaries[1]
    shutil.rmtree(out)
