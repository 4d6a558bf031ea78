"""A run's folder: what may stand there, one process at a time, and what a broken one leaves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from _support import tiny
from fastrlhf.errors import UserError
from fastrlhf.train.folder import OutputFolder
from fastrlhf.train.optim import Optimizers
from fastrlhf.train.stages import pretrain, reward, sft


def test_one_process_at_a_time(tmp_path):
    out = str(tmp_path / "out")
    with OutputFolder(out, "mark", overwrite=False), pytest.raises(UserError, match="another pro"):
        OutputFolder(out, "mark", overwrite=False).take()
    with OutputFolder(out, "mark", overwrite=False) as path:
        (path / "mark").touch()
    code = f"""
import time
from fastrlhf.train.folder import OutputFolder
from fastrlhf.train.optim import Optimizers
OutputFolder({out!r}, "mark", overwrite=True).take()
print("holds", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"holds\n"
        with pytest.raises(UserError, match="another process is writing there"):
            OutputFolder(out, "mark", overwrite=True).take()
        other.kill()
    OutputFolder(out, "mark", overwrite=True).take()  # the system let go of the dead one's


def test_a_folder_that_filled_up_in_the_meantime_is_refused(tmp_path):
    out = OutputFolder(str(tmp_path / "out"), "mark", overwrite=False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "log.jsonl").touch()
    with pytest.raises(UserError, match="holds another run"):
        out.take()
    assert (tmp_path / "out" / "log.jsonl").exists()


def test_overwrite_empties_what_is_ours_and_never_an_input(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    (real / "checkpoints").mkdir()
    (real / "mark.partial").touch()
    (tmp_path / "kept").touch()
    (real / "shortcut").symlink_to(tmp_path / "kept")
    link.symlink_to(real)
    demos = real / "demos.jsonl"
    demos.touch()
    with pytest.raises(UserError, match="demonstrations .* lies inside out"):
        OutputFolder(
            str(link), "mark", overwrite=True, inputs={"demonstrations": str(demos), "lr": 1.0}
        )
    with OutputFolder(str(link), "mark", overwrite=True, inputs={"out": str(link)}) as path:
        assert list(path.iterdir()) == []
    assert (tmp_path / "kept").exists()
    with pytest.raises(UserError, match="is a file"):
        OutputFolder(str(tmp_path / "kept"), "mark", overwrite=True)
    with pytest.raises(UserError, match="expected a path"):
        OutputFolder("a\0b", "mark", overwrite=True)


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_run_killed_after_its_last_checkpoint_can_be_finished(stage, monkeypatch):
    make, main = {
        "sft": (tiny.sft_config, sft.main),
        "reward": (tiny.reward_config, reward.main),
    }[stage]
    cfg = make(f"{stage}_last", save_every=1)
    monkeypatch.setattr("fastrlhf.train.tracking.Run.finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(cfg)
    monkeypatch.undo()
    cfg.resume = True
    with open(Path(cfg.out) / "log.jsonl", "a") as file:
        file.write('{"step": 99, "ti')  # what a kill may leave
    summary = main(cfg)
    whole = main(make(f"{stage}_unbroken"))
    assert summary["train/loss"] == whole["train/loss"]
    first, second = (
        tiny.weights(cfg.out),
        tiny.weights(str(Path(cfg.out).parent / f"{stage}_unbroken")),
    )
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_a_run_of_another_kind_is_not_continued():
    cfg = tiny.sft_config("kinds", save_every=2)
    sft.main(cfg)
    other = tiny.reward_config("x", out=cfg.out, resume=True)
    with pytest.raises(UserError, match="the checkpoint in .* is one of 'sft', not of 'reward'"):
        reward.main(other)


def test_weights_broken_by_a_step_are_not_written(tmp_path, monkeypatch):
    """The loss of a step shows what the step before it did: the last one, or a saved one, is looked at itself."""
    original = Optimizers.step

    def break_weights(self, factor):
        self.parts[0].param_groups[0]["params"][0].data.view(-1)[3] = torch.inf
        return original(self, factor)

    monkeypatch.setattr(Optimizers, "step", break_weights)
    cfg = tiny.sft_config("x", out=str(tmp_path / "out"), epochs=0.01)
    with pytest.raises(UserError, match="step 1: weight .* is nan; stopped"):
        sft.main(cfg)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    cfg = tiny.sft_config("x", out=str(tmp_path / "saved"), save_every=1)
    with pytest.raises(UserError, match="no checkpoint had been written"):
        sft.main(cfg)
    assert not list((tmp_path / "saved").glob("checkpoints/step_*"))


def test_a_full_disk_is_one_line(tmp_path):
    code = f"""
import resource, sys
from fastrlhf import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.exit(cli.main({["sft", "--model", tiny.base(), "--demonstrations", str(tiny.folder() / "demos.jsonl")]!r}
                  + ["--epochs", "0.01", "--out", {str(tmp_path / "out")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "File too large" in done.stderr


def test_damaged_models_are_named(tmp_path):
    for name, damage, message in (
        ("cut", lambda f: (f / "model.safetensors").write_bytes(b"x" * 9), "cannot be loaded"),
        (
            "config",
            lambda f: (f / "config.json").write_text("[]"),
            "(tokenizer|config) of .* cannot be",
        ),
        ("layers", _one_layer_more, r"lacks .* tensors \(model\.layers"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for file in Path(tiny.base()).iterdir():
            if file.is_file():
                (folder / file.name).write_bytes(file.read_bytes())
        damage(folder)
        with pytest.raises(UserError, match=message):
            sft.main(tiny.sft_config("x", model=str(folder), out=str(tmp_path / "out")))
        assert not (tmp_path / "out").exists()


def _one_layer_more(folder):
    content = json.loads((folder / "config.json").read_text())
    content["num_hidden_layers"] += 1
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "line", ['{"prompt": "\\ud800"}', "[" * 100_000, '{"prompt": 1' + "0" * 5000]
)
def test_lines_that_are_no_data_are_named(line, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + line + "\n")
    with pytest.raises(UserError, match="line 2: not JSON"):
        sft.main(tiny.sft_config("x", demonstrations=str(path), out=str(tmp_path / "out")))


def test_an_empty_row_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "", "completion": ""}\n')
    with pytest.raises(UserError, match="row 2: prompt and completion are empty"):
        sft.main(tiny.sft_config("x", demonstrations=str(path), out=str(tmp_path / "out")))


def test_pretrain_finishes_what_a_kill_left(monkeypatch, tmp_path):
    cfg = pretrain.PretrainConfig(
        **tiny.QUIET, text=str(tiny.folder() / "text.txt"), tokenizer=tiny.base(), out=str(tmp_path / "o"),
        hidden_size=16, intermediate_size=16, layers=1, heads=2, context=32, steps=2, batch=2, save_every=1,
    )  # fmt: skip
    monkeypatch.setattr("fastrlhf.train.tracking.Run.finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pretrain.main(cfg)
    monkeypatch.undo()
    cfg.resume = True
    assert pretrain.main(cfg)["train/loss"] > 0
