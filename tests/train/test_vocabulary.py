"""Rows of a model without a token have probability 0 everywhere; all end tokens end a response."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from _support import tiny
from fastrlhf.errors import UserError
from fastrlhf.train import data, models
from fastrlhf.train.heads import SummedNLL, TokenLogprobs
from fastrlhf.train.runtime import Runtime, RuntimeConfig
from fastrlhf.train.sampler import HFSampler
from fastrlhf.train.stages import ppo, sft
from fastrlhf.train.vocabulary import Vocabulary, with_pad

ROWS = 384  # embedding rows of the padded model; the tokenizer has 320 tokens
LIKELY = 350  # a padded row with a large weight


@pytest.fixture(scope="module")
def padded(tmp_path_factory) -> str:
    """The tiny base model with rows that have no token, one of them likely, and a second end token."""
    folder = str(tmp_path_factory.mktemp("vocabulary") / "padded")
    shutil.copytree(tiny.base(), folder)
    lm = AutoModelForCausalLM.from_pretrained(folder)
    lm.resize_token_embeddings(ROWS)
    with torch.no_grad():
        weight = lm.get_input_embeddings().weight
        assert weight is lm.get_output_embeddings().weight  # tied
        weight[LIKELY] = 20 * weight[:320].mean(0)
    lm.generation_config.eos_token_id = [7, 9]
    lm.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runtime():
    return Runtime(RuntimeConfig(device="cpu"))


def plain_logprobs(lm, tokens, keep) -> torch.Tensor:
    """log-probs [L - 1, V] of plain transformers, over the ids `keep` alone."""
    logits = lm(input_ids=torch.as_tensor(tokens)[None], use_cache=False).logits[0, :-1]
    gone = torch.ones(logits.shape[-1], dtype=torch.bool)
    gone[keep] = False
    return logits.masked_fill(gone, -torch.inf).log_softmax(-1)


@pytest.mark.parametrize("holes", [(), (3, 200)])
def test_logprobs_and_gradients_are_those_over_the_real_tokens(padded, runtime, holes):
    tokenizer = models.load_tokenizer(padded)
    policy = models.load_policy(padded, runtime, trainable=True, tokenizer=tokenizer)
    assert policy.vocabulary == Vocabulary(320, ())
    policy.vocabulary = Vocabulary(320, holes)
    plain = AutoModelForCausalLM.from_pretrained(padded)
    keep = [i for i in range(320) if i not in holes]
    tokens = np.array([5, 6, 7, 319, 8, 0])
    batch, rows, targets = data.next_token_rows([data.Example(tokens, 1)], "cpu")
    truth = plain_logprobs(plain, tokens, keep)
    nll = policy(batch, rows, SummedNLL(targets))
    ours, entropy = policy(batch, rows, TokenLogprobs(targets, entropy=True))
    torch.testing.assert_close(ours, truth.gather(1, targets[:, None])[:, 0], rtol=0, atol=1e-5)
    kept = truth[:, keep]
    torch.testing.assert_close(entropy, -(kept.exp() * kept).sum(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(nll, -ours.sum())
    nll.backward()
    (-truth.gather(1, targets[:, None]).sum()).backward()
    for a, b in zip(policy.lm.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    assert not policy.lm.get_output_embeddings().weight.grad[320:].any()


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_the_sampler_draws_real_tokens_alone(padded, runtime, temperature):
    tokenizer = models.load_tokenizer(padded)
    policy = models.load_policy(padded, runtime, trainable=False, tokenizer=tokenizer)
    policy.vocabulary = Vocabulary(320, (3, 200))
    prompts = [[5, 6], [7]] * 40
    found = HFSampler(policy, tokenizer).generate(
        prompts, max_new_tokens=6, temperature=temperature, seed=1
    )
    seen = np.unique(np.concatenate(found.tokens))
    assert seen.max() < 320 and not {3, 200} & set(seen.tolist())
    keep = [i for i in range(320) if i not in (3, 200)]
    for prompt, tokens, logprobs in list(zip(prompts, found.tokens, found.logprobs, strict=True))[
        :4
    ]:
        whole = [*prompt, *tokens]
        with torch.no_grad():
            truth = plain_logprobs(policy.lm, whole, keep)[len(prompt) - 1 :]
        truth = truth.gather(1, torch.as_tensor(tokens)[:, None])[:, 0]
        np.testing.assert_allclose(logprobs, truth, atol=2e-5)
    if (
        temperature
    ):  # the sampler finds the likely row without a token when it is not told of the tokenizer
        free = models.load_policy(padded, runtime, trainable=False)
        drawn = HFSampler(free, tokenizer).generate(prompts, max_new_tokens=6, seed=1).tokens
        assert np.concatenate(drawn).max() >= 320


def test_every_stage_leaves_out_the_padding(padded, runtime, tmp_path):
    cfg = tiny.sft_config("x", model=padded, out=str(tmp_path / "sft"), epochs=0.3)
    first = sft.main(cfg)["train/loss"]
    assert first == pytest.approx(tiny_sft_loss(tmp_path), abs=1e-5)
    start, end = tiny.weights(padded), tiny.weights(cfg.out)
    (name,) = (n for n in start if "embed" in n)
    assert torch.equal(start[name][320:], end[name][320:])  # gradient 0
    cfg = tiny.ppo_config("x", model=padded, out=str(tmp_path / "ppo"), iterations=2, ptx_coef=1.0)
    ppo.main(cfg)
    for row in tiny.log(cfg.out):
        assert row["sampler/logprob_gap"] < 1e-5
        assert row["policy/entropy"] <= np.log(320)


def tiny_sft_loss(tmp_path) -> float:
    """Loss of the same run from the model without padding."""
    return sft.main(tiny.sft_config("x", out=str(tmp_path / "plain"), epochs=0.3))["train/loss"]


def test_every_end_token_ends_a_response(padded, runtime):
    tokenizer = models.load_tokenizer(padded)
    policy = models.load_policy(padded, runtime, trainable=False, tokenizer=tokenizer)
    sampler = HFSampler(policy, tokenizer)
    assert sampler.ends == (tokenizer.eos_token_id, 7, 9)
    assert policy.lm.generation_config.eos_token_id == [0, 7, 9]  # saved with the model
    found = sampler.generate([[5, 6]] * 400, max_new_tokens=24, seed=2)
    last = {int(t[-1]) for t, done in zip(found.tokens, found.finished, strict=True) if done}
    assert last == {0, 7, 9}
    assert not any(np.isin(t[:-1], sampler.ends).any() for t in found.tokens)


def test_a_tokenizer_that_skips_ids(runtime):
    ids = {"a": 0, "b": 2, "c": 5}
    tokenizer = SimpleNamespace(get_vocab=lambda: ids)
    assert Vocabulary.of(tokenizer) == Vocabulary(6, (1, 3, 4))
    lm = models.policy_from_config(models.AutoConfig.from_pretrained(tiny.base()), runtime).lm
    lm.config.final_logit_softcapping = 30.0  # a cap makes -inf finite
    with pytest.raises(UserError, match=r"skips 3 ids \(first 1\) and the model soft-caps"):
        models.check_vocabulary(tokenizer, lm, "x")
    ids["d"] = 320  # fewer tokens than rows, and still an id without a row
    with pytest.raises(UserError, match="has 321 tokens, the model has 320"):
        models.check_vocabulary(tokenizer, lm, "x")


@pytest.mark.parametrize("rows", [2, 8])
def test_a_new_pad_takes_a_spare_row_or_one_more(rows):
    tokenizer = words({"a": 0, "<eos>": 1})
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_labels=1,
        pad_token_id=1,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    padded = with_pad(tokenizer, model)
    assert tokenizer.pad_token is None and padded.pad_token_id == model.config.pad_token_id == 2
    assert len(model.get_input_embeddings().weight) == model.config.vocab_size == max(rows, 3)
    models.check_same_vocabulary(tokenizer, padded, "policy and reward model")
    assert with_pad(padded, model) is padded
    with pytest.raises(UserError, match="vocabularies differ"):
        models.check_same_vocabulary(words({"a": 0, "<eos>": 1, "b": 2}), padded, "x")
    with pytest.raises(UserError, match="got id 4, which has a token"):
        with_pad(words({"a": 0, "<eos>": 1, "b": 3, "c": 4}), model)


def words(ids: dict[str, int]) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(ids)), eos_token="<eos>")
