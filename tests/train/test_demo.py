"""The demo from end to end in a minute: every stage runs, the report is complete, and the splits are disjoint."""

import gzip
import json
from pathlib import Path

import pytest
import yaml

from fastrlhf import report
from fastrlhf.demo import evaluate, run
from fastrlhf.errors import UserError
from fastrlhf.train import data
from fastrlhf.train.config import recipe_path

SMALL = {
    "sft": {"epochs": 0.25},
    "rl_init": {"epochs": 0.25},
    "reward": {"batch": 8},
    "ppo": {"iterations": 2, "batch": 8, "minibatch": 4},
    "ppo_ptx": {"iterations": 2, "batch": 8, "minibatch": 4},
}
# Every n-th line of a file of the shipped data. test_demo_data.py reads the whole files.
EVERY = {"demonstrations_train": 30, "rankings_human": 6, "text_train": 20, "text_test": 10}


def small_data(folder: Path) -> Path:
    """A part of the shipped data, in files of the same names."""
    folder.mkdir()
    for file in run.DATA.glob("*.gz"):
        with gzip.open(file, "rt", encoding="utf-8") as whole:
            lines = whole.readlines()[:: EVERY.get(file.name.partition(".")[0], 8)]
        with gzip.open(folder / file.name, "wt", encoding="utf-8", compresslevel=1) as part:
            part.writelines(lines)
    return folder


def small_recipe(folder: Path) -> str:
    recipe = yaml.safe_load(recipe_path("quickstart").read_text())
    for section, changes in SMALL.items():
        recipe[section] |= {**changes, "log_every": 0}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


@pytest.mark.slow
def test_demo_runs_from_base_to_report(tmp_path, monkeypatch):
    out = tmp_path / "demo"
    data_folder = small_data(tmp_path / "data")
    monkeypatch.setattr(run, "DATA", data_folder)
    monkeypatch.setattr(evaluate, "DATA", data_folder)
    cfg = run.DemoConfig(
        out=str(out),
        device="cpu",
        recipe=small_recipe(tmp_path),
        comparisons=16,
        samples=2,
        limit=12,
    )
    result = run.main(cfg)
    assert report.load(out)[0]["systems"] == ["base", "sft", "rl_init", "ppo", "ppo_ptx"]
    page = (out / "report.html").read_text()
    assert "PPO-ptx" in page and "http://" not in page and "https://" not in page
    for name in ("sft", "rl_init", "reward", "ppo", "ppo_ptx"):
        assert (out / name / "summary.json").is_file() and (
            out / name / "model.safetensors"
        ).is_file()
    assert set(result["speed"]) == {"auto", "reference"}
    assert result["results"]["sft"]["sampled"]["win_rate"]["mean"] == 0.5
    assert "agreement/quality" in result["labeler"]
    ranked = data.read_rankings(str(out / "rankings.jsonl.gz"))
    assert all(4 <= len(row["completions"]) <= 9 for row in ranked)
    seen = {row["prompt"] for row in ranked} | {
        row["prompt"]
        for row in data.read_rows(str(out / "prompts.jsonl.gz"), {"prompt": str}, "prompts")
    }
    for split in ("dev", "test"):
        rows = data.read_rows(
            str(run.DATA / f"demonstrations_{split}.jsonl.gz"), {"prompt": str}, "x"
        )
        assert not seen & {row["prompt"] for row in rows}
    with pytest.raises(UserError, match="holds another run; give --overwrite"):
        run.main(cfg)
    html = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    report.main(report.ReportConfig(run=str(out)))
    assert (out / "report.html").read_bytes() == html


def test_demo_refuses_bad_settings_before_it_writes(tmp_path):
    out = tmp_path / "demo"
    with pytest.raises(UserError, match="2 <= low <= high"):
        run.main(run.DemoConfig(out=str(out), completions_low=9, completions_high=4))
    bad = tmp_path / "rankings.jsonl"
    bad.write_text(json.dumps({"prompt": "x", "completions": ["a"], "ranks": [1]}))
    with pytest.raises(UserError, match="at least 2"):
        run.main(run.DemoConfig(out=str(out), rankings=str(bad)))
    with pytest.raises(UserError, match="no shipped recipe of this name"):
        run.main(run.DemoConfig(out=str(out), recipe="quickstrat"))
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not from such a run"):
        run.main(run.DemoConfig(out=str(out), overwrite=True))
    assert (out / "mine.txt").read_text() == "keep"


def test_shipped_base_model_is_small_and_loads():
    base = run.HERE / "base"
    assert sum(f.stat().st_size for f in base.iterdir()) < 6_000_000
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    assert sum(p.numel() for p in model.parameters()) <= 3_000_000


def test_recipe_has_the_papers_settings():
    from fastrlhf.train import config
    from fastrlhf.train.stages.ppo import PPOConfig
    from fastrlhf.train.stages.sft import SFTConfig

    ptx = config.load(PPOConfig, "ppo", "instructgpt_paper", variant="ppo_ptx")
    assert (ptx.kl_coef, ptx.ptx_coef, ptx.ptx_ratio, ptx.clip) == (0.02, 27.8, 8, 0.2)
    assert (ptx.batch, ptx.minibatch, ptx.inner_epochs, ptx.ema_decay) == (512, 64, 1, 0.992)
    assert ptx.batch * ptx.iterations == 256_000
    init = config.load(SFTConfig, "sft", "instructgpt_paper", variant="rl_init")
    assert (init.pretrain_mix, init.epochs, init.batch, init.lr) == (0.1, 2, 32, 5e-6)
