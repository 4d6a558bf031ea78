"""The sampler: log-probs equal those of the training path, draws follow the distribution, no padding is returned."""

import numpy as np
import pytest
import torch

from _support import tiny
from fastrlhf.train import data, models
from fastrlhf.train.heads import TokenLogprobs
from fastrlhf.train.runtime import Runtime, RuntimeConfig
from fastrlhf.train.sampler import HFSampler, _invert_cdf


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
    sampler.eos = int(ids[counts.argmax()])
    found = sampler.generate(many, max_new_tokens=24, seed=4)
    assert 0 < sum(found.finished) and len({len(t) for t in found.tokens}) > 3
    for tokens, logprobs, finished in zip(
        found.tokens, found.logprobs, found.finished, strict=True
    ):
        assert len(tokens) == len(logprobs)
        assert sampler.eos not in tokens[:-1]
        assert (tokens[-1] == sampler.eos) == finished
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
        ({"max_new_tokens": 4, "temperature": -1}, "temperature: expected >= 0"),
    ],
)
def test_bad_arguments(policy, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        HFSampler(policy, tokenizer).generate(PROMPTS, **options)


def test_empty_prompt(policy, tokenizer):
    with pytest.raises(ValueError, match="empty prompt"):
        HFSampler(policy, tokenizer).generate([[5], []], max_new_tokens=4)
