"""A pipeline small enough for tests: text, demonstrations, rankings and a 2-layer model, created once per session."""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from fastrlhf.train.config import save_resolved
from fastrlhf.train.run import Run
from fastrlhf.train.stages import pretrain, reward, sft

WORDS = (
    "the cat sat on a red mat and saw two small dogs near one old tree by the blue river".split()
)
QUIET = {"device": "cpu", "log_every": 0, "tensorboard": False}
MARKED = {"parse_special_tokens": True}  # <say> in the prompts is a token


@functools.lru_cache
def folder() -> Path:
    """Temporary folder with text.txt, demos.jsonl, rankings.jsonl and prompts.jsonl; removed at exit."""
    path = Path(tempfile.mkdtemp(prefix="fastrlhf-tiny-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    rng = np.random.default_rng(0)

    def sentence(low=3, high=12):
        return " ".join(rng.choice(WORDS, size=rng.integers(low, high)))

    (path / "text.txt").write_text("\n".join(sentence() + "." for _ in range(300)))
    demos = [{"prompt": f"<say>{rng.choice(WORDS)}:", "completion": sentence()} for _ in range(60)]
    rows = {
        "demos": demos,
        "prompts": [{"prompt": d["prompt"]} for d in demos[:20]],
        "rankings": [],
    }
    for demo in demos[:24]:
        texts = [sentence() for _ in range(rng.integers(2, 5))]
        ranks = [1 + sum(len(o) > len(t) for o in texts) for t in texts]  # longer is better
        rows["rankings"].append({"prompt": demo["prompt"], "completions": texts, "ranks": ranks})
    for name, found in rows.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
    return path


@functools.lru_cache
def base() -> str:
    """Folder of a base model pretrained for a few steps."""
    out = folder() / "base"
    pretrain.main(
        pretrain.PretrainConfig(
            **QUIET,
            out=str(out),
            text=str(folder() / "text.txt"),
            special_tokens=["<say>"],
            vocab_size=320,
            hidden_size=32,
            intermediate_size=64,
            layers=2,
            heads=2,
            context=64,
            steps=20,
            batch=4,
            lr=3e-3,
        )
    )
    return str(out)


def sft_config(name: str, **changes) -> sft.SFTConfig:
    """A quick SFT run into folder()/name."""
    demos = str(folder() / "demos.jsonl")
    quick = {"epochs": 1.0, "batch": 16, "lr": 1e-3, "dropout": 0.0}
    fixed = {
        **QUIET,
        **MARKED,
        "model": base(),
        "demonstrations": demos,
        "out": str(folder() / name),
    }
    return sft.SFTConfig(**{**fixed, **quick, **changes})


def reward_config(name: str, **changes) -> reward.RewardConfig:
    """A quick reward-model run into folder()/name."""
    files = {
        "rankings": str(folder() / "rankings.jsonl"),
        "demonstrations": str(folder() / "demos.jsonl"),
    }
    quick = {"batch": 8, "lr": 1e-3, "epochs": 2}
    fixed = {**QUIET, **MARKED, "model": base(), "out": str(folder() / name), **files}
    return reward.RewardConfig(**{**fixed, **quick, **changes})


@functools.lru_cache
def reward_model() -> str:
    """Folder of a trained reward model."""
    cfg = reward_config("reward")
    reward.main(cfg)
    return cfg.out


def ppo_config(name: str, **changes):
    """A quick PPO run into folder()/name."""
    from fastrlhf.train.stages import ppo

    quick = {
        "iterations": 3,
        "batch": 8,
        "minibatch": 4,
        "max_new_tokens": 12,
        "lr": 1e-3,
        "value_lr": 1e-3,
    }
    small = {"warmup_iterations": 1, "ptx_ratio": 0.5, "ptx_length": 32, "max_tokens": 96}
    fixed = {
        **QUIET,
        **MARKED,
        "model": base(),
        "reward_model": reward_model(),
        "prompts": str(folder() / "prompts.jsonl"),
        "text": str(folder() / "text.txt"),
        "out": str(folder() / name),
    }
    return ppo.PPOConfig(**{**fixed, **quick, **small, **changes})


def lines(runs) -> list[tuple[str, str]]:
    """Save the config of each run (stage, config) to a file; return (stage, file) for the command line."""
    found = []
    for number, (stage, cfg) in enumerate(runs):
        path = Path(f"{cfg.out}.{number}.yaml")
        save_resolved(cfg, path)
        found.append((stage, str(path)))
    return found


def weights(run: str) -> dict:
    """Tensors of a model folder."""
    from safetensors.torch import load_file

    return load_file(Path(run) / "model.safetensors")


def same_weights(first: str, second: str) -> bool:
    """Whether two model folders hold bitwise identical tensors."""
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def stop_after(monkeypatch, step: int) -> None:
    """Interrupt the next run after it has logged `step` and before it saves that step's checkpoint."""
    original = Run.log

    def log(self, number, metrics):
        original(self, number, metrics)
        if number == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "log", log)


def log(run: str) -> list[dict]:
    """Rows of a run's log."""
    return [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
