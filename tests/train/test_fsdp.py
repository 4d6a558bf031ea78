"""The stages under FSDP2 on two gloo processes: the results equal those without it, and files hold full tensors."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from transformers import LlamaConfig

from _support import ranks, tiny
from fastrlhf.errors import UserError
from fastrlhf.train import checkpoint, self_check, sharded
from fastrlhf.train import runtime as runtime_module
from fastrlhf.train.models import policy_from_config
from fastrlhf.train.optim import OptimConfig, Optimizers
from fastrlhf.train.runtime import Runtime, RuntimeConfig
from fastrlhf.train.self_check import Verdict
from fastrlhf.train.stages import pretrain, reward, sft

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
SUPPORT = Path(ranks.__file__).parent
TIMES = ("time", "time/sample", "time/score", "time/update")


def torchrun(*lines, **environment):
    """`ranks.commands` with torchrun as the launcher."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command += [
        str(SUPPORT / "stage_runs.py"),
        *(w for line in lines for w in line),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def fsdp(runs, launch=ranks.commands):
    done = launch(*tiny.lines(runs), ACCELERATE_USE_FSDP="true")
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
def finished_runs():
    """Uninterrupted FSDP2 runs: (folders of sft, ppo, bf16 sft and reward, standard output)."""
    cfgs = [
        ("sft", sft_settings("fsdp_sft", log_every=1)),
        ("ppo", ppo_settings("fsdp_ppo")),
        ("sft", sft_settings("fsdp_sft_bf16", precision="bf16", save_every=0)),
        ("reward", tiny.reward_config("fsdp_reward", max_tokens=256)),
    ]
    done = fsdp(cfgs, torchrun)
    return [cfg.out for _, cfg in cfgs], done.stdout


def unfinished(out, step):
    """A copy of a finished run, reduced to what a kill after checkpoint `step` would have left."""
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


def shards(rank):
    """On each rank: how models are sharded, and what the functions of `sharded` return for them."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks.WORLD}
    place |= {"LOCAL_WORLD_SIZE": ranks.WORLD, "MASTER_ADDR": "localhost"}
    os.environ.update({k: str(v) for k, v in place.items()}, ACCELERATE_USE_FSDP="true")
    runtime = Runtime(RuntimeConfig(device="cpu"))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    found, models = {}, []
    for tied in (False, False, True):
        config = LlamaConfig(**sizes, **heads, tie_word_embeddings=tied)
        policy = policy_from_config(config, runtime)
        for p in policy.parameters():
            dist.broadcast(p.data, 0)
        plain = {k: v.clone() for k, v in policy.state_dict().items()}
        module = runtime.prepare(policy, Optimizers(policy, OptimConfig()))
        models.append(module)
        key = "tied" if tied else "untied"
        parts = [m for m in module.modules() if isinstance(m, FSDPModule)]
        found[f"{key} units"] = [type(m).__name__ for m in parts]
        found[f"{key} local"] = sum(p.to_local().numel() for p in module.parameters())
        found[f"{key} full"] = sum(p.numel() for p in module.parameters())
        state = sharded.full_state(module.state_dict())
        found[f"{key} equal"] = all(torch.equal(state[k], plain[k]) for k in plain)
        embed, head = (state[f"lm.{n}.weight"] for n in ("model.embed_tokens", "lm_head"))
        found[f"{key} shared"] = embed is head
        found[f"{key} dropped"] = set(sharded.full_state(module.state_dict(), False).values()) == {
            None
        }
        sharded.load_state_dict(module, {k: v + 1 for k, v in plain.items()})
        moved = sharded.full_state(module.state_dict())
        found[f"{key} loaded"] = all(torch.equal(moved[k], plain[k] + 1) for k in plain)

        def inside(module=module, layer=parts[-1]):
            for _ in range(rank + 1):  # ranks may run different numbers of forwards
                layer(torch.zeros(1, 1, 16), position_embeddings=(torch.ones(1, 1, 8),) * 2)
            return [type(p).__name__ for p in module.parameters()]

        with torch.no_grad():
            found[f"{key} inside"] = sorted(set(sharded.with_full_weights(module, inside)))
        found[f"{key} after"] = sorted({type(p.data).__name__ for p in module.parameters()})
    found["checks"] = runtime.checks
    with mock.patch.object(self_check, "examine", lambda *_: Verdict("x" if rank else None)):
        try:
            policy_from_config(config, runtime)
        except UserError as error:
            found["refusal"] = str(error)
    # Two models of equal size: each is clipped by its own norm.
    for factor, module in enumerate(models[:2], 1):
        for p in module.parameters():
            p.grad = torch.full_like(p, factor)
    found["norms"] = [runtime.clip(m, None) for m in models[:2]]
    return found


@functools.lru_cache
def shards_of_both():
    return ranks.run(shards)


def test_models_are_sharded_over_both_ranks():
    for found in shards_of_both():
        for key in ("tied", "untied"):
            units = ["FSDPPolicy", "FSDPLlamaDecoderLayer", "FSDPLlamaDecoderLayer"]
            assert found[f"{key} units"] == units
            assert 2 * found[f"{key} local"] == found[f"{key} full"]
            for what in ("equal", "loaded", "dropped"):
                assert found[f"{key} {what}"], f"{key} {what}"
            assert found[f"{key} shared"] == (key == "tied")
            assert found[f"{key} inside"] == ["Parameter"]
            assert found[f"{key} after"] == ["DTensor"]
        one, two = found["norms"]
        assert one == pytest.approx(found["untied full"] ** 0.5) and two == pytest.approx(2 * one)


def test_every_rank_refuses_what_one_rank_refuses():
    first, second = shards_of_both()
    assert first["checks"] == second["checks"] == {"LlamaForCausalLM": "passed"}
    assert "fails the self-check: x (" in second["refusal"]
    assert "another rank has the reason" in first["refusal"]


def test_a_finished_run_exits_cleanly():
    """Two runs of `python tests/_support/exit_runs.py` (its default is 50): no rank crashes at exit."""
    script = SUPPORT / "exit_runs.py"
    done = subprocess.run([sys.executable, script, "2"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "{0: 4}\n", done.stdout + done.stderr[-4000:]


def test_sft_equals_the_single_process_run():
    (out, *_), said = finished_runs()
    assert "cpu x2 (FSDP2)" in said and "self-check: LlamaForCausalLM passed" in said
    alone = sft_settings("fsdp_sft_alone")
    sft.main(alone)
    same_log(tiny.log(out), tiny.log(alone.out), rtol=2e-4)
    same_weights(out, alone.out, rtol=2e-4, atol=2e-5)
    ours, theirs = (
        checkpoint.load_latest(Path(o) / "checkpoints")["parts"] for o in (out, alone.out)
    )
    assert ours["model"].keys() == theirs["model"].keys()
    for (_, a), (_, b) in zip(
        ours["optimizer"][0]["state"].items(), theirs["optimizer"][0]["state"].items(), strict=True
    ):
        assert a["exp_avg"].shape == b["exp_avg"].shape
        torch.testing.assert_close(a["exp_avg"], b["exp_avg"], rtol=1e-3, atol=1e-5)


def test_reward_equals_the_single_process_run():
    out = finished_runs()[0][3]
    alone = tiny.reward_config("fsdp_reward_alone", max_tokens=256)
    reward.main(alone)
    same_log(tiny.log(out), tiny.log(alone.out), rtol=2e-4)
    same_weights(out, alone.out, rtol=2e-4, atol=2e-5)


def test_ppo_equals_ddp():
    """Each rank samples its own responses, so the comparison is with two DDP processes, not with one."""
    out = finished_runs()[0][1]
    cfg = ppo_settings("ddp_ppo")
    done = ranks.commands(*tiny.lines([("ppo", cfg)]))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "cpu x2, " in done.stdout
    same_log(tiny.log(out), tiny.log(cfg.out), rtol=1e-3)
    for folder in ("", "/value"):
        same_weights(out + folder, cfg.out + folder, rtol=1e-3, atol=1e-4)
    assert all(r["policy/ratio_max_first"] == 1.0 for r in tiny.log(out))


def test_resumed_runs_equal_uninterrupted_ones():
    sft_out, ppo_out, *_ = finished_runs()[0]
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
    sft.main(sft_settings("z", out=without, resume=True))  # one process resumes a run of two
    same_weights(sft_out, without, rtol=2e-4, atol=2e-5)


def test_bf16_keeps_fp32_weights_and_log_probs():
    with mock.patch.dict(os.environ, ACCELERATE_USE_FSDP="true"):
        policy = runtime_module._fsdp_plugin(torch.bfloat16).mixed_precision_policy
    assert policy.param_dtype == torch.bfloat16 and policy.reduce_dtype == torch.float32
    assert policy.output_dtype is None
    (exact, _, out, _), _ = finished_runs()
    assert {t.dtype for t in tiny.weights(out).values()} == {torch.float32}
    ours, fp32 = tiny.log(out), tiny.log(exact)
    assert ours[0]["train/loss"] != fp32[0]["train/loss"]
    np.testing.assert_allclose(
        [r["train/loss"] for r in ours], [r["train/loss"] for r in fp32], rtol=1e-2
    )


def test_the_folder_loads_as_a_hugging_face_model():
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    _, out, *_ = finished_runs()[0]
    for folder, auto in (
        ("", AutoModelForCausalLM),
        ("/value", AutoModelForSequenceClassification),
    ):
        model, loaded = auto.from_pretrained(out + folder, output_loading_info=True)
        assert not loaded["missing_keys"] and not loaded["unexpected_keys"]
        architecture = json.loads(Path(out + folder, "config.json").read_text())["architectures"]
        assert architecture == [type(model).__name__]


def test_unsupported_settings_are_refused():
    fsdp1 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}
    done = ranks.commands(*tiny.lines([("sft", sft_settings("fsdp1"))]), ranks=1, **fsdp1)
    assert done.returncode and "FSDP_VERSION: expected 2, got '1'" in done.stderr
    cfg = pretrain.PretrainConfig(**tiny.QUIET, out=str(tiny.folder() / "no"), text="x")
    done = ranks.commands(*tiny.lines([("pretrain", cfg)]), ACCELERATE_USE_FSDP="true")
    assert done.returncode and "pretrain: expected one process or DDP, got FSDP2" in done.stderr
