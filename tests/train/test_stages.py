"""The stages: invariants of the paper, bitwise repeatability, and error messages for bad input."""

import functools
import gc
import json
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from _support import ranks, tiny
from fastrlhf import cli, evals
from fastrlhf.demo import run as demo
from fastrlhf.errors import UserError
from fastrlhf.evals import EvalConfig
from fastrlhf.train import config
from fastrlhf.train.folder import OutputFolder
from fastrlhf.train.models import load_tokenizer
from fastrlhf.train.run import RESOLVED
from fastrlhf.train.runtime import RuntimeConfig
from fastrlhf.train.sampler import HFSampler, Samples
from fastrlhf.train.stages import ppo, pretrain, reward, sft


def run_ppo(name, **changes):
    cfg = tiny.ppo_config(name, **changes)
    ppo.main(cfg)
    return cfg.out


def test_sft_learns_and_repeats_bitwise():
    first = tiny.sft_config("sft_a", epochs=6.0, lr=4e-3)
    second = tiny.sft_config("sft_b", epochs=6.0, lr=4e-3)
    sft.main(first), sft.main(second)
    rows = tiny.log(first.out)
    assert rows[-1]["train/loss"] < 0.8 * rows[0]["train/loss"]
    assert tiny.same_weights(first.out, second.out)
    other = tiny.sft_config("sft_c", epochs=6.0, lr=4e-3, seed=1)
    sft.main(other)
    assert not tiny.same_weights(first.out, other.out)


def test_model_files_are_readable_by_other_users():
    cfg = tiny.sft_config("sft_modes", epochs=1.0)
    sft.main(cfg)
    modes = {f.name: f.stat().st_mode & 0o777 for f in Path(cfg.out).iterdir() if f.is_file()}
    assert "model.safetensors" in modes and len(set(modes.values())) == 1, modes


def test_demonstrations_score_zero_and_pairs_are_ordered():
    tiny.reward_model()
    summary = json.loads((Path(tiny.reward_model()) / "summary.json").read_text())
    assert abs(summary["demonstrations/mean"]) < 1e-5
    cfg = tiny.reward_config(
        "reward_long", epochs=12, valid_rankings=str(tiny.folder() / "rankings.jsonl")
    )
    assert reward.main(cfg)["valid/accuracy"] > 0.85


def test_reward_accuracy_counts_strict_pairs():
    comparison = reward.Comparison([], [1, 2, 2, 3])
    right = reward._accuracy([comparison], [np.array([3.0, 2.0, 2.5, 1.0])])
    wrong = reward._accuracy([comparison], [np.array([1.0, 2.0, 2.5, 3.0])])
    assert (right, wrong) == (1.0, 0.0)


def test_ratio_is_exactly_one_before_the_first_step():
    rows = tiny.log(
        run_ppo("ppo_ratio", minibatch=8, max_tokens=96)
    )  # one minibatch, several micro-batches
    assert all(
        r["policy/ratio_max"] == 1.0 and r["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-6)
        for r in rows
    )
    assert all(r["policy/approx_kl"] == 0.0 and r["policy/clip_fraction"] == 0.0 for r in rows)
    several = tiny.log(run_ppo("ppo_ratio_4"))
    assert all(r["policy/ratio_max_first"] == 1.0 for r in several)
    assert any(r["policy/ratio_max"] > 1.0 for r in several)


def test_ptx_coef_zero_is_plain_ppo_bitwise():
    plain = run_ppo("ppo_plain", text="")
    zero = run_ppo("ppo_zero", ptx_coef=0.0)
    ptx = run_ppo("ppo_ptx", ptx_coef=2.0)
    assert tiny.same_weights(plain, zero) and tiny.same_weights(f"{plain}/value", f"{zero}/value")
    assert not tiny.same_weights(plain, ptx)
    row = tiny.log(ptx)[-1]
    assert row["grad_norm/ppo"] > 0 and row["grad_norm/ptx"] > 0


def test_ppo_raises_the_reward():
    # The reward model prefers long responses, which a few more iterations can learn.
    out = run_ppo(
        "ppo_up", iterations=12, batch=32, minibatch=8, lr=3e-3, kl_coef=0.0, ema_decay=0.0
    )
    rewards = [r["reward/rm"] for r in tiny.log(out)]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3])


def test_missing_eos_score_and_reward_on_the_last_token():
    from fastrlhf.train import rollout

    cfg = tiny.ppo_config("unused", missing_eos_score=-2.0, scale_reward=True)
    runtime = ppo.Runtime(cfg)
    trainer = ppo.Trainer(cfg, runtime, None)
    prompts = trainer.prompts[:4]
    samples = trainer.sampler.generate(prompts, max_new_tokens=6, temperature=1.0, seed=0)
    samples.finished[:] = [True, False, True, False]
    _, parts = rollout.shares(4, 2, [0], runtime)
    packed = rollout.split(prompts, samples, parts, 64, runtime)
    scored = [trainer._score(micros) for micros in packed]
    rewards = trainer._rewards(scored, samples)
    assert rewards[1] == rewards[3] == -2.0
    flat = [m for micros in scored for m in micros]
    raw = {int(i): float(s) for m in flat for i, s in zip(m.indices, m.scores, strict=True)}
    assert rewards[0] == pytest.approx(raw[0] / trainer.reward_model.std, rel=1e-6)
    cfg.whiten_advantages = False
    minibatches, _ = rollout.add_advantages(scored, rewards, runtime, cfg)
    for m in (m for micros in minibatches for m in micros):
        # Policy and reference are equal, so KL is 0 and the return of the last token is the score.
        ends = np.cumsum(m.lengths) - 1
        torch.testing.assert_close(
            m.returns[ends], rewards[torch.from_numpy(m.indices)], rtol=1e-5, atol=1e-5
        )


def test_ema_follows_the_weights():
    averaged, last = run_ppo("ppo_ema", ema_decay=0.9), run_ppo("ppo_last", ema_decay=0.0)
    start, a, b = tiny.weights(tiny.base()), tiny.weights(averaged), tiny.weights(last)
    distance = lambda x: sum(float((x[k] - start[k]).norm() ** 2) for k in start) ** 0.5  # noqa: E731
    assert 0 < distance(a) < distance(b)


def same_metrics(one, two, leave_out=()):
    """All metrics of two logs are equal to fp32 rounding."""
    assert len(one) == len(two) > 0
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"time", "time/sample", "time/score", "time/update", *leave_out}:
            np.testing.assert_allclose(a[name], b[name], rtol=2e-4, atol=1e-5, err_msg=name)


def test_two_processes_equal_one(tmp_path):
    """A rank without data changes nothing: in training with a batch of 1, and in the held-out loss over 1 row."""
    demos = (tiny.folder() / "demos.jsonl").read_text().splitlines()
    (tmp_path / "one.jsonl").write_text(demos[0])
    text = str(tiny.folder() / "text.txt")
    (tmp_path / "held_out.txt").write_text(Path(text).read_text()[:400])
    # As README starts it: on a machine without a GPU, device=auto runs on its processors.
    fixed = {"device": "cpu" if torch.cuda.is_available() else "auto"}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "layers": 1, "heads": 2, "context": 64}
    valid = {"valid_demonstrations": str(tmp_path / "one.jsonl")}

    def runs(name):
        folder = tmp_path / name
        folder.mkdir()
        common = {**tiny.QUIET, **fixed, "tokenizer": tiny.base(), "text": text, "steps": 3}
        yield "sft", tiny.sft_config("", **fixed, **valid, max_tokens=128, out=str(folder / "sft"))
        yield "sft", tiny.sft_config("", **fixed, batch=1, epochs=0.1, out=str(folder / "sft1"))
        yield "reward", tiny.reward_config("", **fixed, max_tokens=256, out=str(folder / "reward"))
        yield "reward", tiny.reward_config("", **fixed, batch=1, epochs=1, out=str(folder / "rm1"))
        held_out = {"valid_text": str(tmp_path / "held_out.txt"), "out": str(folder / "pretrain")}
        yield "pretrain", pretrain.PretrainConfig(**common, **sizes, **held_out, batch=1)

    two = list(runs("two"))
    done = ranks.commands(*tiny.lines(two))
    assert done.returncode == 0, done.stderr[-3000:]
    mains = {"sft": sft, "reward": reward, "pretrain": pretrain}
    for (stage, alone), (_, together) in zip(runs("one"), two, strict=True):
        mains[stage].main(alone)
        same_metrics(tiny.log(together.out), tiny.log(alone.out))
        summaries = [
            json.loads((Path(c.out) / "summary.json").read_text()) for c in (alone, together)
        ]
        for summary in summaries:
            assert summary.pop("stage") == stage and summary.pop("seconds")
            assert "passed" in summary.pop("self_check")
        assert summaries[1] == pytest.approx(summaries[0], rel=2e-4, abs=1e-5)


def by_prompt(self, prompts, *, max_new_tokens, **_):
    """Responses that depend on the prompt alone. A rank's own are random, so that ranks sample different ones."""
    tokens = [
        np.random.default_rng(p).integers(5, 300, size=1 + sum(p) % max_new_tokens) for p in prompts
    ]
    logprobs = [np.zeros(len(t), dtype=np.float32) for t in tokens]
    return Samples(tokens, logprobs, [len(t) % 2 == 0 for t in tokens])


def ppo_by_prompt(path, rank=None):
    if rank is not None:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks.WORLD}
        place |= {"LOCAL_WORLD_SIZE": ranks.WORLD, "MASTER_ADDR": "localhost"}
        os.environ.update({k: str(v) for k, v in place.items()})
    with mock.patch.object(HFSampler, "generate", by_prompt):
        ppo.main(config.load(ppo.PPOConfig, "ppo", path))


def test_ppo_on_two_processes_equals_one_on_the_same_responses():
    more = {"ptx_coef": 0.5, "ptx_ratio": 0.25, "kl_coef": 0.2, "missing_eos_score": -1.0}
    more["self_check"] = False  # it would measure by_prompt in place of the sampler
    cfgs = [tiny.ppo_config(name, **more) for name in ("ppo_two", "ppo_one")]
    (_, two), (_, one) = tiny.lines([("ppo", cfg) for cfg in cfgs])
    ranks.run(functools.partial(ppo_by_prompt, two))
    ppo_by_prompt(one)
    # The explained variance is a mean over micro-batches, which differ.
    same_metrics(*(tiny.log(cfg.out) for cfg in cfgs), leave_out=["value/explained_variance"])
    for folder in ("", "/value"):
        found, expected = (tiny.weights(cfg.out + folder) for cfg in cfgs)
        for name in found:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "expected false, got 'true'; DDP and FSDP2"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "expected false"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "expected 1, got '4'; batch"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "expected no, got 'bf16'; set precision"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "expected no"),
        ("ACCELERATE_TORCH_DEVICE", "cpu", "expected no such setting, got 'cpu'; set device"),
        ("ACCELERATE_NEW_FEATURE", "1", "expected no such setting"),
        ("WORLD_SIZE", "2", "expected 1, the processes that accelerate found, got 2"),
    ],
)
def test_settings_of_accelerate_are_honoured_or_refused(monkeypatch, variable, value, message):
    launched = {"MIXED_PRECISION": "no", "DYNAMO_BACKEND": "NO", "DYNAMO_MODE": "default"}
    launched |= {"USE_CPU": "True", "GRADIENT_ACCUMULATION_STEPS": "1", "USE_DEEPSPEED": "False"}
    for name, ordinary in launched.items():  # what `accelerate launch` sets
        monkeypatch.setenv(f"ACCELERATE_{name}", ordinary)
    assert ppo.Runtime(RuntimeConfig()).device.type == "cpu"  # ACCELERATE_USE_CPU
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=f"^{variable}: {message}"):
        ppo.Runtime(RuntimeConfig(device="cpu" if variable != "WORLD_SIZE" else "auto"))


def test_an_error_on_one_rank_ends_the_others_with_its_line(tmp_path):
    """Rank 0 alone locks the output folder; the other one is in a collective when that fails."""
    cfg = tiny.sft_config("", out=str(tmp_path / "out"))
    with OutputFolder(cfg.out, RESOLVED, overwrite=False):
        done = ranks.commands(*tiny.lines([("sft", cfg)]))
    line = f"fastrlhf sft: error: out '{cfg.out}': another process is writing there"
    assert done.stderr.splitlines() == [line, f"{line} (rank 0)"]
    assert done.returncode in (2, signal.SIGTERM)  # of the launcher, which ends what is left
    cfg.demonstrations = "missing.jsonl"  # an error of both ranks
    done = ranks.commands(*tiny.lines([("sft", cfg)]))
    line = "fastrlhf sft: error: demonstrations 'missing.jsonl': no such file"
    assert set(done.stderr.splitlines()) == {line}


def _late_end(rank):
    """End as a failed rank does; rank 1 is late, and the store of torchrun's environment is rank 0's."""
    from torch.distributed import TCPStore

    stderr = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        # A second store, which both ranks may end without the group of the test.
        port = torch.tensor([0])
        store = (
            TCPStore("localhost", 0, ranks.WORLD, True, wait_for_workers=False)
            if not rank
            else None
        )
        if store is not None:
            port[0] = store.port
        torch.distributed.broadcast(port, 0)
        store = store or TCPStore(
            "localhost", int(port), ranks.WORLD, False, wait_for_workers=False
        )
        store.set(cli._SAID, "a line")
        store.add(cli._ENDING, 1)
        time.sleep(0.4 * rank)
        cli._wait(store, rank, ranks.WORLD)
        del store
        gc.collect()
        time.sleep(0.2)
        os.dup2(stderr, 2)
        said.seek(0)
        return len(said.read())


def test_the_rank_that_holds_the_store_leaves_last():
    assert ranks.run(_late_end) == [0, 0]


def test_eval_and_demo_are_for_one_process(monkeypatch, tmp_path):
    monkeypatch.setattr(ppo.Runtime, "world", 2)
    lone = EvalConfig(model=tiny.base(), text=str(tiny.folder() / "text.txt"), device="cpu")
    for command, cfg in ((evals, lone), (demo, demo.DemoConfig(out=str(tmp_path / "out")))):
        with pytest.raises(UserError, match="^(eval|demo): expected one process, got 2"):
            command.main(cfg)
    assert not (tmp_path / "out").exists()


def test_every_row_is_in_an_epoch_and_no_batch_exceeds_the_data(tmp_path):
    """23 rankings in batches of 12: two steps see all of them."""
    rows = (tiny.folder() / "rankings.jsonl").read_text().splitlines()[:23]
    path = tmp_path / "rankings.jsonl"
    path.write_text("\n".join(rows))
    cfg = tiny.reward_config("", rankings=str(path), batch=12, epochs=1, out=str(tmp_path / "out"))
    with mock.patch.object(reward, "_backward", side_effect=reward._backward) as backward:
        reward.main(cfg)
    seen = {id(c) for call in backward.call_args_list for c in call.args[1]}
    assert len(seen) == 23 and backward.call_count == 2
    out = {"out": str(tmp_path / "other")}
    message = "^batch: expected at most 23, the number of rankings that are not all ties, got 24"
    bad(tiny.reward_config("", rankings=str(path), batch=24, **out), message, reward.main)
    bad(tiny.sft_config("", batch=61, **out), "^batch: expected at most 60, the number of demonst")
    text = {"text": str(tiny.folder() / "text.txt")}
    mix = {"batch": 60, "pretrain_mix": 0.9, "pretrain_length": 64, **text, **out}
    bad(
        tiny.sft_config("", **mix),
        r"^batch \* pretrain_mix .*: expected at most [0-9]+, the number",
    )
    many = {"ptx_coef": 1.0, "ptx_ratio": 1e3, **out}
    bad(tiny.ppo_config("", **many), r"^minibatch \* ptx_ratio: expected at most", ppo.main)


def bad(config, message, main=sft.main):
    with pytest.raises(UserError, match=message):
        main(config)
    assert not (Path(config.out) / "resolved_config.yaml").exists() if config.out else True


def test_bad_input_is_refused_before_anything_is_written(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 3, "completion": "b"}\n')
    out = {"out": str(tmp_path / "out")}
    bad(
        tiny.sft_config("x", demonstrations=str(path), **out),
        "line 2: field 'prompt': expected str, got int",
    )
    path.write_text('{"prompt": "a", "completion": "b"}\n{oops\n')
    bad(tiny.sft_config("x", demonstrations=str(path), **out), "line 2: not JSON")
    path.write_text("\n")
    bad(tiny.sft_config("x", demonstrations=str(path), **out), "has no rows")
    bad(tiny.sft_config("x", demonstrations="/no/file", **out), "no such file")
    path.write_text(json.dumps({"prompt": "the cat " * 80, "completion": "b"}))
    bad(
        tiny.sft_config("x", demonstrations=str(path), **out),
        "row 1: [0-9]+ tokens, but the model's context holds 64",
    )
    bad(tiny.ppo_config("x", prompts=str(path), **out), "do not fit the context of 64", ppo.main)
    bad(tiny.sft_config("x", pretrain_mix=0.1, **out), "needs text")
    bad(tiny.sft_config("x", out=""), "out: expected a folder")
    bad(tiny.ppo_config("x", reward_model=tiny.base(), **out), "is not a reward model", ppo.main)
    short = shutil.copytree(tiny.reward_model(), tmp_path / "short")
    settings = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 8}
    (short / "config.json").write_text(json.dumps(settings))
    message = "^reward_model '.*short': its context holds 8 tokens, prompts . max_new_tokens reach"
    bad(tiny.ppo_config("x", reward_model=str(short), **out), message, ppo.main)
    for backend in ("cuda", "bogus"):
        bad(tiny.sft_config("x", backend=backend, **out), f"backend '{backend}'")
    for name, value in {
        "seed": -1,
        "beta1": 1.5,
        "adam_eps": -1.0,
        "weight_decay": -1.0,
        "dropout": 2.0,
        "warmup": -3,
        "max_grad_norm": -1.0,
        "save_every": -1,
        "lr_floor": -5.0,
        "muon_lr": -1.0,
        "batch": 0,
        "epochs": 0.0,
    }.items():
        bad(tiny.sft_config("x", **{name: value}, **out), f"^{name}: expected a number")
    for name in ("lam", "clip", "inner_epochs", "max_new_tokens", "value_lr", "ema_decay"):
        bad(tiny.ppo_config("x", **{name: -1}, **out), f"^{name}: expected a number", ppo.main)
    for cfg, main in (
        (tiny.sft_config("x", max_tokens=5, **out), sft.main),
        (tiny.ppo_config("x", max_tokens=5, **out), ppo.main),
        (tiny.reward_config("x", max_tokens=10, **out), reward.main),
    ):
        bad(cfg, "max_tokens: expected at least [0-9]+, the longest of", main)
    bad(
        tiny.ppo_config("x", ptx_coef=1.0, ptx_length=999, **out),
        "ptx_length: expected 0, or 2 to the context's 64 tokens, got 999",
        ppo.main,
    )
    judge = tiny.ppo_config("x").reward_model
    bad(tiny.sft_config("x", model=judge, **out), "is a reward model")
    bad(
        tiny.ppo_config("x", batch=8, minibatch=3, **out),
        "must be a multiple of minibatch",
        ppo.main,
    )
    path.write_text(json.dumps({"prompt": "a", "completions": ["b", "c"], "ranks": [1]}))
    bad(
        tiny.reward_config("x", rankings=str(path), **out),
        "got 2 completions and 1 ranks",
        reward.main,
    )
    path.write_text(json.dumps({"prompt": "a", "completions": ["b", "c"], "ranks": [1, 1]}))
    bad(tiny.reward_config("x", rankings=str(path), **out), "different ranks", reward.main)
    bad(tiny.reward_config("x", valid_rankings=str(path), **out), "different ranks", reward.main)


def test_pretrain_tokenizer_keeps_special_tokens_whole():
    tokenizer = load_tokenizer(tiny.base())
    assert len(tokenizer("<say>", add_special_tokens=False)["input_ids"]) == 1
    text = "Zürich: 5 < 7\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_pretrain_checks_sizes(tmp_path):
    base = {
        **tiny.QUIET,
        "out": str(tmp_path / "out"),
        "text": str(tiny.folder() / "text.txt"),
        "steps": 1,
        "batch": 2,
    }
    bad(
        pretrain.PretrainConfig(**base, vocab_size=100),
        "vocab_size: expected at least",
        pretrain.main,
    )
    bad(
        pretrain.PretrainConfig(**base, heads=5),
        r"expected a multiple of 2 \* heads = 10",
        pretrain.main,
    )
    bad(pretrain.PretrainConfig(**base, context=10**6), "fewer than one window", pretrain.main)
