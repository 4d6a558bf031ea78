"""The stages under FSDP2 (accelerate's, two gloo processes): the same run as without it, and whole files on disk."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import tiny
from fastrlhf import checkpoint
from fastrlhf.config import save_resolved
from fastrlhf.stages import sft

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
TIMES = ("time", "time/sample", "time/score", "time/update")


def launch(runs, processes=2, **environment):
    """Run (stage, config) one after the other in one torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command.append(str(Path(__file__).with_name("stage_runs.py")))
    for number, (stage, cfg) in enumerate(runs):
        path = Path(f"{cfg.out}.{number}.yaml")
        save_resolved(cfg, path)
        command += [stage, str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def fsdp(runs, **environment):
    done = launch(runs, ACCELERATE_USE_FSDP="true", **environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def sft_settings(name, **changes):
    return tiny.sft_config(name, **{"max_tokens": 128, "save_every": 2, **changes})


def ppo_settings(name, **changes):
    common = {
        "save_every": 2,
        "ptx_coef": 0.5,
        "ema_decay": 0.9,
        "optimizer": "muon",
        "log_every": 1,
    }
    return tiny.ppo_config(name, **{**common, **changes})


@functools.lru_cache
def whole_runs():
    """(sft, ppo, bf16 sft) folders of unbroken FSDP2 runs, and their output."""
    cfgs = [
        ("sft", sft_settings("fsdp_sft", log_every=1)),
        ("ppo", ppo_settings("fsdp_ppo")),
        ("sft", sft_settings("fsdp_sft_bf16", precision="bf16", save_every=0)),
    ]
    done = fsdp(cfgs)
    return [cfg.out for _, cfg in cfgs], done.stdout


def unfinished(out, step):
    """A copy of a finished run as a kill after checkpoint `step` would have left it."""
    copy = f"{out}_again"
    shutil.copytree(out, copy)
    (Path(copy) / "summary.json").unlink()
    for later in checkpoint.steps(Path(copy) / "checkpoints"):
        if later > step:
            shutil.rmtree(Path(copy) / "checkpoints" / f"step_{later:08d}")
    return copy


def same_log(one, two, rtol):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - set(TIMES):
            np.testing.assert_allclose(a[name], b[name], rtol=rtol, atol=1e-6, err_msg=name)


def same_weights(one, two, **tolerance):
    one, two = tiny.weights(one), tiny.weights(two)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], two[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


def test_sft_is_the_single_process_run():
    (out, _, _), said = whole_runs()
    assert "cpu x2 (FSDP2)" in said
    alone = sft_settings("fsdp_sft_alone")
    sft.main(alone)
    same_log(tiny.log(out), tiny.log(alone.out), rtol=2e-4)
    same_weights(out, alone.out, rtol=2e-4, atol=2e-5)
    ours, theirs = (checkpoint.load_latest(Path(o) / "checkpoints") for o in (out, alone.out))
    assert ours["model"].keys() == theirs["model"].keys()
    for (_, a), (_, b) in zip(
        ours["optimizer"][0]["state"].items(), theirs["optimizer"][0]["state"].items(), strict=True
    ):
        assert a["exp_avg"].shape == b["exp_avg"].shape
        torch.testing.assert_close(a["exp_avg"], b["exp_avg"], rtol=1e-3, atol=1e-5)


def test_ppo_is_the_run_of_two_whole_replicas():
    """Ranks draw their own samples, so the yardstick is two processes that hold whole models (DDP)."""
    out = whole_runs()[0][1]
    cfg = ppo_settings("ddp_ppo")
    done = launch([("ppo", cfg)])
    assert done.returncode == 0, done.stderr[-4000:]
    assert "cpu x2, " in done.stdout
    same_log(tiny.log(out), tiny.log(cfg.out), rtol=1e-3)
    for folder in ("", "/value"):
        same_weights(out + folder, cfg.out + folder, rtol=1e-3, atol=1e-4)
    assert all(r["policy/ratio_max_first"] == 1.0 for r in tiny.log(out))


def test_resumed_runs_end_as_the_unbroken_ones():
    sft_out, ppo_out, _ = whole_runs()[0]
    sft_again, ppo_again = unfinished(sft_out, 2), unfinished(ppo_out, 2)
    without = f"{sft_again}_alone"
    shutil.copytree(sft_again, without)
    fsdp(
        [
            ("sft", sft_settings("x", out=sft_again, resume=True)),
            ("ppo", ppo_settings("y", out=ppo_again, resume=True)),
        ]
    )
    same_weights(sft_out, sft_again, rtol=0, atol=0)
    for folder in ("", "/value"):
        same_weights(ppo_out + folder, ppo_again + folder, rtol=0, atol=0)
    sft.main(sft_settings("z", out=without, resume=True))  # one process goes on from two shards
    same_weights(sft_out, without, rtol=2e-4, atol=2e-5)


def test_bf16_keeps_fp32_weights_and_log_probs():
    (exact, _, out), _ = whole_runs()
    assert {t.dtype for t in tiny.weights(out).values()} == {torch.float32}
    ours, fp32 = tiny.log(out), tiny.log(exact)
    assert ours[0]["train/loss"] != fp32[0]["train/loss"]
    np.testing.assert_allclose(
        [r["train/loss"] for r in ours], [r["train/loss"] for r in fp32], rtol=1e-2
    )


def test_the_folder_loads_as_a_hugging_face_model():
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    _, out, _ = whole_runs()[0]
    for folder, auto in (
        ("", AutoModelForCausalLM),
        ("/value", AutoModelForSequenceClassification),
    ):
        model, loaded = auto.from_pretrained(out + folder, output_loading_info=True)
        assert not loaded["missing_keys"] and not loaded["unexpected_keys"]
        architecture = json.loads(Path(out + folder, "config.json").read_text())["architectures"]
        assert architecture == [type(model).__name__]


def test_fsdp1_is_refused():
    done = launch([("sft", sft_settings("fsdp1"))], 1, ACCELERATE_USE_FSDP="true", FSDP_VERSION="1")
    assert done.returncode != 0 and "FSDP_VERSION: expected 2, got '1'" in done.stdout + done.stderr
