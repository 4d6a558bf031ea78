"""The output folder of a run: what it may contain, and one writer at a time."""

import subprocess
import sys

import pytest

from _support import tiny
from fastrlhf.errors import UserError
from fastrlhf.train.folder import OutputFolder
from fastrlhf.train.stages import sft


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
