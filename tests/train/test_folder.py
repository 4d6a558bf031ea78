"""The output folder of a run: what it may contain, and one writer at a time."""

import os
import shutil
import subprocess
import sys

import pytest

from _support import tiny
from fastrlhf import cli
from fastrlhf.errors import UserError
from fastrlhf.train import config
from fastrlhf.train.folder import OutputFolder
from fastrlhf.train.stages import pretrain, sft


def test_one_writer_at_a_time(tmp_path):
    out = str(tmp_path / "out")
    with OutputFolder(out, "mark", overwrite=False), pytest.raises(UserError, match="another pro"):
        OutputFolder(out, "mark", overwrite=False).take()
    with OutputFolder(out, "mark", overwrite=False) as path:
        (path / "mark").touch()
    code = f"""
import time
from fastrlhf.train.folder import OutputFolder
OutputFolder({out!r}, "mark", overwrite=True).take()
print("holds", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"holds\n"
        with pytest.raises(UserError, match="another process is writing there"):
            OutputFolder(out, "mark", overwrite=True).take()
        other.kill()
    OutputFolder(
        out, "mark", overwrite=True
    ).take()  # the system releases the lock of a dead process


def test_a_folder_filled_after_the_first_check_is_refused(tmp_path):
    out = OutputFolder(str(tmp_path / "out"), "mark", overwrite=False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "log.jsonl").touch()
    with pytest.raises(UserError, match="holds another run"):
        out.take()
    assert (tmp_path / "out" / "log.jsonl").exists()


def test_overwrite_empties_only_our_folders_and_never_an_input(tmp_path):
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
        OutputFolder(str(link), "mark", overwrite=True, inputs={"demonstrations": [str(demos)]})
    with OutputFolder(str(link), "mark", overwrite=True, inputs={}) as path:
        assert list(path.iterdir()) == []
    assert (tmp_path / "kept").exists()
    with pytest.raises(UserError, match="is a file"):
        OutputFolder(str(tmp_path / "kept"), "mark", overwrite=True)
    with pytest.raises(UserError, match="expected a path"):
        OutputFolder("a\0b", "mark", overwrite=True)


def test_overwrite_spares_the_inputs_of_every_option(tmp_path, monkeypatch):
    """In a list, in the file of --config, behind a link that lies in the folder, and given as a relative path."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir(), elsewhere.mkdir()
    for path in (out / "resolved_config.yaml", out / "text.txt", elsewhere / "text.txt"):
        path.write_text("the cat sat on the mat\n")
    (out / "link").symlink_to(elsewhere)
    (out / "mine.yaml").write_text(f"{{text: {elsewhere}/text.txt, out: {out}, overwrite: true}}")
    monkeypatch.chdir(out)
    given = {
        "tokenizer_text": {"tokenizer_text": [str(elsewhere / "text.txt"), "text.txt"]},
        "text": {"text": str(out / "link" / "text.txt")},
        "config": {},
    }
    for name, options in given.items():
        file = str(out / "mine.yaml") if name == "config" else None
        fixed = {"overwrite": True, "device": "cpu", "text": str(elsewhere / "text.txt")}
        overrides = {**fixed, "out": str(out), **options} if file is None else options
        cfg = config.load(pretrain.PretrainConfig, "pretrain", file, overrides)
        with pytest.raises(
            UserError, match=f"^{name} .* lies inside out .*, which the run replaces"
        ):
            pretrain.main(cfg)
    assert len(list(out.iterdir())) == 4


def test_a_folder_whose_emptying_was_killed_can_be_emptied_again(tmp_path, monkeypatch):
    for kept in (3, 2, 1):

        def dies(entry, remove=shutil.rmtree, kept=kept):
            if len(list(tmp_path.iterdir())) == kept:
                raise KeyboardInterrupt
            remove(entry)

        for name in ("a", "mark", "z"):  # the mark is neither the first nor the last by name
            (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.setattr("fastrlhf.train.folder.shutil.rmtree", dies)
        with pytest.raises(KeyboardInterrupt):
            OutputFolder(str(tmp_path), "mark", overwrite=True).take()
        monkeypatch.undo()
        assert (tmp_path / "mark").exists()
        with OutputFolder(str(tmp_path), "mark", overwrite=True):
            assert list(tmp_path.iterdir()) == []


def test_output_folder_of_another_run(tmp_path):
    cfg = tiny.sft_config("x", out=str(tmp_path / "out"))
    sft.main(cfg)
    with pytest.raises(UserError, match="holds another run; give --overwrite"):
        sft.main(cfg)
    cfg.overwrite = True
    sft.main(cfg)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    cfg.out = str(tmp_path / "mine")
    with pytest.raises(UserError, match="not from such a run"):
        sft.main(cfg)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    cfg.overwrite, cfg.resume = False, True
    with pytest.raises(UserError, match="no complete checkpoint"):
        sft.main(cfg)


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


def test_paths_that_are_not_utf8(tmp_path, capsys):
    """Data may lie under such a path, also on --resume; a model cannot be read or written there."""
    data = os.fsdecode(bytes(tmp_path) + b"/d\xff.jsonl")
    shutil.copy(tiny.folder() / "demos.jsonl", data)
    command = ["sft", "--model", tiny.base(), "--demonstrations", data, "--device", "cpu"]
    command += ["--epochs", "0.5", "--batch", "15", "--save_every", "1"]
    refused = os.fsdecode(bytes(tmp_path) + b"/o\xff")
    assert cli.main([*command, "--out", refused]) == 2
    assert "out: expected a path of UTF-8 text" in capsys.readouterr().err
    assert not os.path.exists(refused)
    out = ["--out", str(tmp_path / "out")]
    assert cli.main([*command, *out]) == 0
    assert cli.main([*command, *out, "--resume"]) == 0
    shutil.copytree(tiny.base(), refused)
    capsys.readouterr()
    command[2] = refused
    assert cli.main([*command, "--out", str(tmp_path / "other")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "o\\udcff" in said
    assert not (tmp_path / "other").exists()
