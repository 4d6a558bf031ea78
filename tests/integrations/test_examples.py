"""The scripts in examples/ run unmodified on one core, and their printed figures meet a bar."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


def run(name: str, folder: Path) -> str:
    """The output of the script, run in an empty folder with only this package on PYTHONPATH."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py")],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert list(folder.iterdir()) == []
    return result.stdout + result.stderr


def figures(pattern: str, text: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, text)]


def verl_gae(text):
    (difference,) = figures(r"largest difference ([\d.e+-]+)", text)
    (speedup,) = figures(r"ms: (\d+) x", text)
    assert difference < 1e-5
    assert speedup > 2  # about 40 on an idle core; lower on a busy machine


def ppo_loop(text):
    rewards = figures(r"reward ([\d.]+) approx_kl", text)
    assert len(rewards) == 30
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 5 * 0.2
    assert all(0 <= kl < 0.5 for kl in figures(r"approx_kl (-?[\d.]+)", text))


def reward_model(text):
    right = figures(r"pairs in order ([\d.]+)", text)
    assert right[-1] > 0.9 > right[0]


def trl_grpo(text):
    ((before, after),) = re.findall(r"reward ([\d.]+) -> ([\d.]+)", text)
    assert float(after) > float(before) + 0.3
    assert "runs linear_logprob, backend " in text  # from the report of the patch
    for function in ("ChunkedLogProbFunction.apply", "GRPOTrainer._compute_loss"):
        (calls,) = figures(rf"{function}: (\d+) calls", text)
        assert calls >= 40, function


CHECKS = {f.__name__: f for f in (ppo_loop, reward_model, trl_grpo, verl_gae)}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, tmp_path):
    if name == "trl_grpo":
        pytest.importorskip("trl", reason="trl is not installed; `make test` installs it")
    CHECKS[name](run(name, tmp_path))


def test_every_example_is_checked():
    assert sorted(CHECKS) == EXAMPLES
