"""Checkpoints are complete or absent, and a resumed run equals the uninterrupted one bitwise."""

import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from _support import tiny
from fastrlhf.errors import UserError
from fastrlhf.train import checkpoint, files
from fastrlhf.train.optim import Optimizers
from fastrlhf.train.stages import ppo, pretrain, reward, sft


def state_of(step, **changes):
    """A checkpoint without parts."""
    empty = {"metrics": {}, "inputs": {}, "parts": {}, "rng": [{"cpu": torch.get_rng_state()}]}
    return {"stage": "sft", "step": step, "seconds": 1.0, **empty, **changes}


def test_checkpoints_are_complete_or_absent(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, state_of(step) | {"w": torch.arange(3.0)})
    assert checkpoint.steps(tmp_path) == [2, 3]  # the newest two are kept

    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 4, {"step": 4})
    monkeypatch.undo()
    state = checkpoint.load_latest(tmp_path)
    assert state["step"] == 3 and torch.equal(state["w"], torch.arange(3.0))
    file = tmp_path / "step_00000003" / "state.pt"
    whole = file.read_bytes()
    place = whole.index(torch.arange(3.0).numpy().tobytes())
    file.write_bytes(whole[: place + 5] + b"\x01" + whole[place + 6 :])  # one bit of a weight
    with pytest.raises(UserError, match="is damaged .checksum of .*to continue from step 2"):
        checkpoint.load_latest(tmp_path)
    file.write_bytes(b"torn")
    with pytest.raises(
        UserError, match="step_00000003/state.pt is damaged .* to continue from step 2"
    ):
        checkpoint.load_latest(tmp_path)
    (tmp_path / "step_00000003" / "state.pt").write_bytes(b"")
    with pytest.raises(UserError, match="is damaged .File is not a zip file.; remove"):
        checkpoint.load_latest(tmp_path)


def test_checkpoints_never_unpickle_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    folder = tmp_path / "step_00000001"
    folder.mkdir()
    torch.save({"step": 1, "x": Evil()}, folder / "state.pt")
    with pytest.raises(UserError, match="is damaged .* and start again"):
        checkpoint.load_latest(tmp_path)


@pytest.mark.parametrize(
    ("damaged", "reason"),
    [
        ([1, 2], "expected a dict, got list"),
        (torch.ones(2), "expected a dict, got Tensor"),
        ({}, "stage: expected str, got nothing"),
        (state_of(0), "step 0 after 1.0 seconds"),
        (state_of(1, seconds=math.inf), "step 1 after inf seconds"),
        (state_of("1"), "step: expected int, got str"),
        (state_of(1, metrics={"loss": "x"}), "metrics: expected numbers"),
        (state_of(1, inputs={"model": 3}), "inputs: expected"),
        (state_of(1, inputs={"model": {"x": 3}}), "has no len"),
        (state_of(1, rng=[]), "step 1 after 1.0 seconds on 0 ranks"),
        (state_of(1, rng=None), "rng: expected list, got NoneType"),
    ],
)
def test_a_checkpoint_of_another_form_is_damaged(tmp_path, damaged, reason):
    checkpoint.save(tmp_path, 1, damaged)
    with pytest.raises(UserError, match=f"is damaged .*{reason}") as error:
        checkpoint.load_latest(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["parts"].pop("model"), "part 'model' .* does not fit this run .KeyError"),
        (lambda s: s["parts"].update(model={}), "part 'model' .* does not fit this run"),
        (lambda s: s["parts"].update(model=3), "part 'model' .* does not fit this run"),
        (lambda s: s["parts"].update(optimizer=[]), "part 'optimizer' .* does not fit this run"),
        (lambda s: s["parts"]["order"].update(size=59), "had 59"),
        (lambda s: s.update(rng=["x"]), "random generators .* fit this run"),
        (lambda s: s.update(rng=[{"cpu": torch.zeros(3)}]), "random generators .* fit this run"),
    ],
)
def test_a_checkpoint_whose_parts_do_not_fit_is_one_line(change, message):
    cfg = tiny.sft_config("sft_unfit", save_every=2)
    if not Path(cfg.out).exists():
        sft.main(cfg)
    file = Path(cfg.out) / "checkpoints" / "step_00000004" / "state.pt"
    whole = file.read_bytes()
    state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, file)
    try:
        with pytest.raises(UserError, match=message) as error:
            sft.main(tiny.sft_config("x", out=cfg.out, save_every=2, resume=True))
        assert "\n" not in str(error.value)
    finally:
        file.write_bytes(whole)


def test_a_resumed_run_knows_its_inputs(tmp_path, monkeypatch):
    """Each file and model folder, the settings file, and the number of steps; other files beside a model may change."""
    for name in ("demos.jsonl", "base"):
        source = tiny.folder() / name if name != "base" else Path(tiny.base())
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    fixed = {"model": str(tmp_path / "base"), "demonstrations": str(tmp_path / "demos.jsonl")}
    cfg = tiny.sft_config("x", out=str(tmp_path / "out"), save_every=2, **fixed)
    tiny.stop_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        sft.main(cfg)
    monkeypatch.undo()
    cfg.resume = True
    refused = {
        "demos.jsonl": "demonstrations .*demos.jsonl' has changed: now .* 60 lines .* 60 lines",
        "base/model.safetensors": "model .*model.safetensors' has changed",
        "base/config.json": "model .*config.json' has changed",
        "out/resolved_config.yaml": "resolved_config.yaml' lacks the setting [a-z_]+, so",
    }
    for name, message in refused.items():
        file = tmp_path / name
        whole = file.read_bytes()
        file.write_bytes(b"" if name.startswith("out") else whole.replace(b"a", b"e"))
        with pytest.raises(UserError, match=message):
            sft.main(cfg)
        file.write_bytes(whole)
    (tmp_path / "out" / "resolved_config.yaml").rename(tmp_path / "away")
    with pytest.raises(UserError, match="resolved_config.yaml: no such file"):
        sft.main(cfg)
    (tmp_path / "away").rename(tmp_path / "out" / "resolved_config.yaml")
    (tmp_path / "base" / "eval.json").write_text("{}")
    sft.main(cfg)


def test_a_resumed_run_says_that_the_number_of_processes_changed(capsys):
    cfg = tiny.sft_config("sft_fewer", save_every=2, log_every=1)
    sft.main(cfg)
    file = Path(cfg.out) / "checkpoints" / "step_00000004" / "state.pt"
    state = torch.load(file, weights_only=True)
    torch.save({**state, "rng": state["rng"] * 2}, file)
    cfg.resume = True
    capsys.readouterr()
    sft.main(cfg)
    assert "sft: started with 2 processes and continues with 1: " in capsys.readouterr().out


def test_a_resumed_run_does_not_start_beyond_its_end():
    cfg = tiny.ppo_config("ppo_beyond", iterations=2, save_every=2, minibatch=8)
    ppo.main(cfg)
    cfg.resume, cfg.iterations = True, 1
    with pytest.raises(UserError, match="checkpoint is of step 2, but this run ends at step 1"):
        ppo.main(cfg)


def test_fingerprints_of_large_files_read_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_BLOCK", 16)
    monkeypatch.setattr(files, "_WHOLE", 4096)
    path = tmp_path / "large"
    content = bytearray(range(256)) * 32
    seen = set()
    for place in (None, 0, 4096, 4104, 8191):  # 4096 lies between two blocks
        changed = content[:]
        if place is not None:
            changed[place] ^= 255
        path.write_bytes(changed)
        seen.add(str(files.fingerprints({"text": [str(path)]})))
    assert len(seen) == 4
    os.mkfifo(tmp_path / "pipe")  # a reader would block, and take the data from the stage
    assert files.fingerprints({"text": [str(tmp_path / "pipe")]}) == {"text": {}}


@pytest.fixture
def interruptible():
    """A process that a shell started in the background inherits SIG_IGN."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_inside_a_save_is_an_interruption(tmp_path, monkeypatch):
    """The checkpoint is completed first; a second interrupt ends the run at once."""
    save = torch.save

    def interrupted(times):
        def inside(state, file):
            save(state, file)
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

        return inside

    for times in (1, 2):
        cfg = tiny.sft_config("x", out=str(tmp_path / str(times)), save_every=2)
        monkeypatch.setattr(checkpoint.torch, "save", interrupted(times))
        with pytest.raises(KeyboardInterrupt):
            sft.main(cfg)
        monkeypatch.undo()
        saved = checkpoint.steps(Path(cfg.out) / "checkpoints")
        assert saved == ([2] if times == 1 else [])

    # torch reports an interrupt that comes inside its writer as a RuntimeError, which is not a full disk.
    def fails(*_):
        signal.raise_signal(signal.SIGINT)
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(checkpoint.torch, "save", fails)
    with pytest.raises(KeyboardInterrupt):
        sft.main(tiny.sft_config("x", out=str(tmp_path / "3"), save_every=2))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_sft_resumes_bitwise(optimizer, monkeypatch):
    text = {"pretrain_mix": 0.2, "text": str(tiny.folder() / "text.txt"), "dropout": 0.1}
    uninterrupted = tiny.sft_config(
        f"sft_whole_{optimizer}", epochs=3.0, optimizer=optimizer, **text
    )
    sft.main(uninterrupted)
    cut = tiny.sft_config(
        f"sft_cut_{optimizer}", epochs=3.0, optimizer=optimizer, save_every=3, **text
    )
    tiny.stop_after(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        sft.main(cut)
    monkeypatch.undo()
    cut.resume = True
    sft.main(cut)
    assert tiny.same_weights(uninterrupted.out, cut.out)
    assert [r["step"] for r in tiny.log(cut.out)] == [
        r["step"] for r in tiny.log(uninterrupted.out)
    ]


def test_ppo_resumes_bitwise(monkeypatch):
    options = {"ptx_coef": 1.0, "iterations": 4}
    uninterrupted = tiny.ppo_config("ppo_whole", **options)
    ppo.main(uninterrupted)
    cut = tiny.ppo_config("ppo_cut", save_every=2, **options)
    tiny.stop_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        ppo.main(cut)
    monkeypatch.undo()
    cut.resume = True
    ppo.main(cut)
    assert tiny.same_weights(uninterrupted.out, cut.out)
    assert tiny.same_weights(f"{uninterrupted.out}/value", f"{cut.out}/value")


def test_a_resumed_run_keeps_its_settings(monkeypatch, capsys):
    cfg = tiny.sft_config("sft_settings", epochs=3.0, save_every=3, log_every=100)
    tiny.stop_after(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        sft.main(cfg)
    monkeypatch.undo()
    cfg.resume, before = True, cfg.lr
    cfg.lr = 2 * before
    with pytest.raises(UserError, match=f"resume: lr is {cfg.lr}, .* started with {before}"):
        sft.main(cfg)
    cfg.lr, cfg.save_every = before, 2  # save_every may change
    capsys.readouterr()
    sft.main(cfg)
    said = capsys.readouterr().out
    steps = tiny.log(cfg.out)[-1]["step"]
    assert f"from step 3 of {steps}" in said
    assert f"sft {steps:>5}/{steps}  train/loss" in said and f"wrote {cfg.out}" in said


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_run_killed_after_its_last_checkpoint_can_finish(stage, monkeypatch):
    make, main = {
        "sft": (tiny.sft_config, sft.main),
        "reward": (tiny.reward_config, reward.main),
    }[stage]
    cfg = make(f"{stage}_last", save_every=1)
    monkeypatch.setattr("fastrlhf.train.run.Run.finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(cfg)
    monkeypatch.undo()
    cfg.resume = True
    with open(Path(cfg.out) / "log.jsonl", "a") as file:
        file.write('{"step": 99, "ti')  # a line truncated by the kill
    summary = main(cfg)
    uninterrupted = main(make(f"{stage}_unbroken"))
    assert summary["train/loss"] == uninterrupted["train/loss"]
    first, second = (
        tiny.weights(cfg.out),
        tiny.weights(str(Path(cfg.out).parent / f"{stage}_unbroken")),
    )
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_pretrain_can_finish_after_its_last_checkpoint(monkeypatch, tmp_path):
    cfg = pretrain.PretrainConfig(
        **tiny.QUIET, text=str(tiny.folder() / "text.txt"), tokenizer=tiny.base(), out=str(tmp_path / "o"),
        hidden_size=16, intermediate_size=16, layers=1, heads=2, context=32, steps=2, batch=2, save_every=1,
    )  # fmt: skip
    monkeypatch.setattr("fastrlhf.train.run.Run.finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pretrain.main(cfg)
    monkeypatch.undo()
    cfg.resume = True
    assert pretrain.main(cfg)["train/loss"] > 0


def test_a_checkpoint_of_another_stage_is_refused():
    cfg = tiny.sft_config("kinds", save_every=2)
    sft.main(cfg)
    other = tiny.reward_config("x", out=cfg.out, resume=True)
    with pytest.raises(
        UserError, match="the checkpoint in .* is from stage 'sft', not from 'reward'"
    ):
        reward.main(other)


def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    cfg = tiny.sft_config("x", out=str(tmp_path / "out"), save_every=1, epochs=2.0)
    calls = {"n": 0}
    original = sft.nll_backward

    def poisoned(*arguments, **options):
        calls["n"] += 1
        losses = original(*arguments, **options)
        return {"loss": losses["loss"] * float("nan")} if calls["n"] == 4 else losses

    monkeypatch.setattr(sft, "nll_backward", poisoned)
    with pytest.raises(
        UserError, match="step 4: train/loss is nan; stopped, the last good checkpoint is step 3"
    ):
        sft.main(cfg)
    monkeypatch.undo()
    cfg.resume = True
    sft.main(cfg)
    clean = tiny.sft_config("x", out=str(tmp_path / "clean"), epochs=2.0)
    sft.main(clean)
    assert tiny.same_weights(cfg.out, clean.out)


def test_weights_broken_by_a_step_are_not_written(tmp_path, monkeypatch):
    """A step's loss cannot show that its own update broke the weights, so weights are checked before they are saved."""
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
