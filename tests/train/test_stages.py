"""The stages: invariants of the paper, bitwise repeatability, and error messages for bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from _support import ranks, tiny
from fastrlhf.errors import UserError
from fastrlhf.train.models import load_tokenizer
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
    packed = rollout.split(prompts, samples, 2, 64, runtime, [0])
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


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_two_processes_equal_one(stage):
    pytest.importorskip("torch.distributed")
    tiny.reward_model()
    config = {"sft": tiny.sft_config, "reward": tiny.reward_config}.get(stage, tiny.ppo_config)
    cfg = config(f"{stage}_ranks", max_tokens=128)
    done = ranks.commands(*tiny.lines([(stage, cfg)]))
    assert done.returncode == 0, done.stderr[-3000:]
    cfg.out = str(tiny.folder() / f"{stage}_alone")
    {"sft": sft, "reward": reward, "ppo": ppo}[stage].main(cfg)
    two, one = tiny.log(str(tiny.folder() / f"{stage}_ranks")), tiny.log(cfg.out)
    key = {"sft": "train/loss", "reward": "train/loss"}.get(stage, "length/mean")
    assert len(two) == len(one)
    if stage == "ppo":  # each rank samples its own responses, so the numbers differ
        assert all(r["policy/ratio_max_first"] == 1.0 for r in two)
    else:
        np.testing.assert_allclose([r[key] for r in two], [r[key] for r in one], rtol=2e-4)


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
    for config, main in (
        (tiny.sft_config("x", max_tokens=5, **out), sft.main),
        (tiny.ppo_config("x", max_tokens=5, **out), ppo.main),
        (tiny.reward_config("x", max_tokens=10, **out), reward.main),
    ):
        bad(config, "max_tokens: expected at least [0-9]+, the longest of", main)
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
    bad(tiny.reward_config("x", rankings=str(path), **out), "all ties", reward.main)


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
