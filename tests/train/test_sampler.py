"""The sampler: log-probs equal those of the training path, draws follow the distribution, no padding is returned."""

import numpy as np
import pytest
import torch

from _support import tiny
from fastrlhf import evals
from fastrlhf.errors import UserError
from fastrlhf.train import data, models
from fastrlhf.train.heads import TokenLogprobs
from fastrlhf.train.runtime import Runtime, RuntimeConfig
from fastrlhf.train.sampler import HFSampler, _invert_cdf
from fastrlhf.train.stages import ppo


@pytest.fixture(scope="module")
def policy():
    return models.load_policy(tiny.base(), Runtime(RuntimeConfig(device="cpu")), trainable=False)


@pytest.fixture(scope="module")
def tokenizer():
    return models.load_tokenizer(tiny.base())


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17]] * 5


def trainer_logprobs(policy, prompts, tokens, temperature=1.0):
    examples = [
        data.Example(np.concatenate([np.array(p), t]), len(p))
        for p, t in zip(prompts, tokens, strict=True)
    ]
    batch, rows, targets = data.next_token_rows(examples, "cpu")
    with torch.no_grad():
        flat = policy(batch, rows, TokenLogprobs(targets, temperature))
    return [x.numpy() for x in flat.split([len(t) for t in tokens])]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_the_training_paths(policy, tokenizer, temperature):
    sampler = HFSampler(policy, tokenizer)
    found = sampler.generate(PROMPTS, max_new_tokens=24, temperature=temperature, seed=3)
    truth = trainer_logprobs(policy, PROMPTS, found.tokens, temperature)
    for ours, theirs in zip(found.logprobs, truth, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_finished_rows_are_compacted_away(policy, tokenizer):
    many = PROMPTS * 10
    # With a likely token as EOS, rows end at different steps and the batch is compacted.
    frequent = HFSampler(policy, tokenizer).generate(many, max_new_tokens=24, seed=3)
    ids, counts = np.unique(np.concatenate(frequent.tokens), return_counts=True)
    sampler = HFSampler(policy, tokenizer)
    end = int(ids[counts.argmax()])
    sampler.ends = (end,)
    found = sampler.generate(many, max_new_tokens=24, seed=4)
    assert 0 < sum(found.finished) and len({len(t) for t in found.tokens}) > 3
    for tokens, logprobs, finished in zip(
        found.tokens, found.logprobs, found.finished, strict=True
    ):
        assert len(tokens) == len(logprobs)
        assert end not in tokens[:-1]
        assert (tokens[-1] == end) == finished
        assert finished or len(tokens) == 24
    truth = trainer_logprobs(policy, many, found.tokens)
    for ours, theirs in zip(found.logprobs, truth, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_greedy_is_the_argmax(policy, tokenizer):
    found = HFSampler(policy, tokenizer).generate(PROMPTS[:4], max_new_tokens=8, temperature=0)
    for prompt, tokens in zip(PROMPTS[:4], found.tokens, strict=True):
        sequence = list(prompt)
        for token in tokens:
            with torch.no_grad():
                logits = policy.lm(input_ids=torch.tensor([sequence]), use_cache=False).logits[
                    0, -1
                ]
            assert int(logits.argmax()) == token
            sequence.append(int(token))


def test_draws_follow_the_distribution(policy, tokenizer):
    found = HFSampler(policy, tokenizer, max_batch=4000).generate(
        [[5, 6, 7]] * 4000, max_new_tokens=1, seed=5
    )
    with torch.no_grad():
        truth = (
            policy.lm(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
            .logits[0, -1]
            .softmax(-1)
        )
    seen = np.bincount([int(t[0]) for t in found.tokens], minlength=320) / 4000
    std = np.sqrt(truth.numpy() * (1 - truth.numpy()) / 4000)
    assert (np.abs(seen - truth.numpy()) <= 5 * std + 1e-9).all()


def test_a_token_of_probability_zero_is_never_drawn():
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).expand(4096, 5).contiguous()
    seen = torch.bincount(_invert_cdf(probs, torch.Generator().manual_seed(0)), minlength=5)
    assert seen[[0, 2, 4]].eq(0).all()
    assert abs(int(seen[1]) - 2048) < 160  # five standard deviations


def test_same_seed_same_draws(policy, tokenizer):
    sampler = HFSampler(policy, tokenizer)
    first, second, third = (sampler.generate(PROMPTS, max_new_tokens=8, seed=s) for s in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first.tokens, second.tokens, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first.tokens, third.tokens, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected >= 1"),
        (
            {"max_new_tokens": 4, "temperature": -1},
            r"temperature: expected 0 \(greedy\) or a number from 1e-06 up, got -1",
        ),
    ],
)
def test_bad_arguments(policy, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        HFSampler(policy, tokenizer).generate(PROMPTS, **options)


@pytest.mark.parametrize("temperature", [9e-7, float("nan"), float("inf")])
def test_a_temperature_near_zero_is_refused(policy, tokenizer, temperature, tmp_path):
    message = rf"temperature: expected 0 \(greedy\) or a number from 1e-06 up, got {temperature}"
    options = {"temperature": temperature}
    with pytest.raises(ValueError, match=message):
        HFSampler(policy, tokenizer).generate(PROMPTS, max_new_tokens=1, **options)
    with pytest.raises(UserError, match=message):
        evals.main(evals.EvalConfig(model=tiny.base(), prompts="x", device="cpu", **options))
    with pytest.raises(UserError, match=message.replace(r"0 \(greedy\) or ", "")):
        ppo.main(tiny.ppo_config("x", out=str(tmp_path / "out"), **options))
    assert not (tmp_path / "out").exists()
    smallest = HFSampler(policy, tokenizer).generate(PROMPTS, max_new_tokens=4, temperature=1e-6)
    greedy = HFSampler(policy, tokenizer).generate(PROMPTS, max_new_tokens=4, temperature=0)
    assert all(np.array_equal(a, b) for a, b in zip(smallest.tokens, greedy.tokens, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_end_the_sampling(tokenizer, value):
    policy = models.load_policy(
        tiny.base(), Runtime(RuntimeConfig(device="cpu")), trainable=False, tokenizer=tokenizer
    )
    policy.lm.base_model.norm.weight[3] = value
    for temperature in (0, 1):
        with pytest.raises(
            UserError, match="^sampling: the logits of 20 responses are NaN or inf.* at token 1;"
        ):
            HFSampler(policy, tokenizer).generate(
                PROMPTS, max_new_tokens=4, temperature=temperature
            )


def test_a_diverged_ppo_run_names_its_step(monkeypatch, tmp_path):
    update = ppo.Trainer.update

    def diverge(self, *arguments):
        metrics = update(self, *arguments)
        self.policy.lm.base_model.norm.weight.data[3] = float("nan")
        return metrics

    monkeypatch.setattr(ppo.Trainer, "update", diverge)
    with pytest.raises(
        UserError,
        match="^ppo step 2: the log-prob of a sampled token is nan; stopped, no checkpoint",
    ):
        ppo.main(tiny.ppo_config("x", out=str(tmp_path / "out")))


def test_empty_prompt(policy, tokenizer):
    with pytest.raises(ValueError, match="empty prompt"):
        HFSampler(policy, tokenizer).generate([[5], []], max_new_tokens=4)
