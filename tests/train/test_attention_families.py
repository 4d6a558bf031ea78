"""Packed attention and the sampler's cache against each sequence alone in transformers' eager attention, by family."""

import functools

import numpy as np
import pytest
import torch
from transformers import DataCollatorWithFlattening

from _support import families
from fastrlhf.errors import UserError
from fastrlhf.integrations import _attention_kernels as kernels
from fastrlhf.integrations import attention
from fastrlhf.train import models
from fastrlhf.train.packing import collate
from fastrlhf.train.runtime import Runtime, RuntimeConfig
from fastrlhf.train.sampler import HFSampler

LENGTHS = (5, 29, 8, 17, 1, 9)  # below, at and beyond the window
# Soft-caps, sinks, windows by mask alone, chunks, values of another width, no keyword arguments to attention layers.
KINDS = ("gemma2", "gpt_oss", "qwen2_moe", "llama4_text", "deepseek_v3", "stablelm")


class NoEnd:
    eos_token_id = families.VOCAB - 1


def sequences(lengths=LENGTHS):
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.integers(3, families.VOCAB - 4, size=n)) for n in lengths]


@functools.cache
def pair(name):
    """Two models with the same weights: under our attention, and under transformers' eager attention."""
    return families.model(name, attention.NAME), families.model(name, "eager")


def alone(eager, ids):
    assert eager.config._attn_implementation == "eager"
    return models.decoder(eager)(input_ids=ids[None], use_cache=False).last_hidden_state[0]


def logprobs(lm, hidden, ids):
    logits = lm.get_output_embeddings()(hidden).float()
    return logits.log_softmax(-1)[:-1].gather(1, ids[1:, None]).squeeze(1)


def gradients(lm, total):
    lm.zero_grad()
    total.backward()
    return {n: p.grad for n, p in lm.named_parameters() if p.grad is not None}


def assert_equal_gradients(ours, theirs):
    assert ours.keys() == theirs.keys()
    scale = max(g.norm() for g in theirs.values())
    for name, expected in theirs.items():
        error = (ours[name] - expected).norm() / (expected.norm() + 1e-3 * scale)
        assert error < 2e-5, f"{name}: {error:.1e}"


def check_packed(name):
    ours, eager = pair(name)
    assert ours.config._attn_implementation == attention.NAME
    rows = sequences()
    batch = collate(rows)
    packed = models.Policy(ours).hidden(batch).split(LENGTHS)
    mine = [logprobs(ours, h, ids) for h, ids in zip(packed, rows, strict=True)]
    theirs = [logprobs(eager, alone(eager, ids), ids) for ids in rows]
    torch.testing.assert_close(torch.cat(mine), torch.cat(theirs), rtol=1e-5, atol=1e-5)
    assert_equal_gradients(
        gradients(ours, torch.cat(mine).sum()), gradients(eager, torch.cat(theirs).sum())
    )


@pytest.mark.parametrize("name", families.SERVED)
def test_packed_rows_equal_each_row_alone(name):
    check_packed(name)


@pytest.mark.parametrize("name", families.SERVED)
def test_sampled_logprobs_equal_the_train_path(name):
    """Prompts shorter and longer than the window; every response crosses or starts beyond it."""
    ours, eager = pair(name)
    sampler = HFSampler(models.Policy(ours), NoEnd())
    prompts = sequences((5, 17, 1))
    found = sampler.generate([p.tolist() for p in prompts], max_new_tokens=12, seed=0)
    for prompt, tokens, sampled in zip(prompts, found.tokens, found.logprobs, strict=True):
        ids = torch.cat([prompt, torch.from_numpy(tokens)])
        with torch.no_grad():
            logits = sampler.policy.unembedding.logits(alone(eager, ids)).log_softmax(-1)
        expected = logits[:-1].gather(1, ids[1:, None]).squeeze(1)[len(prompt) - 1 :]
        torch.testing.assert_close(torch.from_numpy(sampled), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", families.REFUSED)
def test_models_that_would_mix_sequences_are_refused(name):
    policy = models.Policy(families.model(name, attention.NAME))
    with pytest.raises(UserError, match=families.REFUSED[name][1]) as caught, torch.no_grad():
        policy.hidden(collate(sequences((3, 4))))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["falcon", "gpt_neo"])
def test_models_with_attention_classes_of_their_own_are_refused(name, tmp_path):
    families.model(name, "eager").save_pretrained(tmp_path)
    runtime = Runtime(RuntimeConfig(device="cpu"))
    with pytest.raises(UserError, match="does not use transformers' attention functions"):
        models.load_policy(str(tmp_path), runtime, trainable=False)


# ---- other ways to run the same models ----


@pytest.mark.parametrize("name", KINDS)
def test_flattened_batches_of_transformers(name):
    """A batch of DataCollatorWithFlattening through the model's own forward, as transformers' Trainer runs it."""
    ours, eager = pair(name)
    rows = sequences()
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    inputs = collator([{"input_ids": ids.tolist()} for ids in rows])
    inputs.pop("labels")
    with torch.no_grad():
        packed = ours(**inputs, use_cache=False).logits[0].split(LENGTHS)
        for ids, logits in zip(rows, packed, strict=True):
            expected = eager(input_ids=ids[None], use_cache=False).logits[0]
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_padded_batches_of_transformers(name):
    ours, eager = pair(name)
    ids, mask = torch.zeros(2, 21, dtype=torch.long), torch.ones(2, 21, dtype=torch.long)
    ids[0], ids[1, :11] = sequences((21,))[0], sequences((11,))[0]
    mask[1, 11:] = 0
    with torch.no_grad():
        found, expected = (
            lm(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
            for lm in (ours, eager)
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mistral", *KINDS])
def test_generation_by_transformers(name):
    prompt = torch.stack(sequences((5,)) * 2)
    found, expected = (
        lm.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=NoEnd.eos_token_id)
        for lm in pair(name)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["stablelm", "gpt_oss"])
def test_gradient_checkpointing(name):
    """The recomputation runs outside of the forward, after the packed batch's context has ended."""
    lm, plain = families.model(name, attention.NAME), pair(name)[0]
    lm.activation_checkpointing_enable()
    batch = collate(sequences())
    found, expected = (
        gradients(m, models.Policy(m.train()).hidden(batch).square().sum()) for m in (lm, plain)
    )
    plain.eval()
    assert_equal_gradients(found, expected)


def test_large_batches_are_split(monkeypatch):
    monkeypatch.setattr(kernels, "_SCORES", 2 * 4 * 29 * 29)  # two sequences at a time
    check_packed("gpt_oss")


# ---- flash kernels, replaced by plain functions with their signatures ----


def slow_varlen(q, k, v, starts, *, scale, window, softcap=None):
    """[N, h, D] -> [N, h, D]; `window` counts tokens to the left and right beside the token itself."""
    assert q.shape[2] == k.shape[2] == v.shape[2] and q.shape[2] % 8 == 0
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    left, right = window
    parts = []
    for a, b in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[a:b]) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        ahead = torch.arange(b - a) - torch.arange(b - a)[:, None]
        hidden = (ahead > right) if right >= 0 else torch.zeros_like(ahead, dtype=torch.bool)
        if left >= 0:
            hidden = hidden | (ahead < -left)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, v[a:b]))
    return torch.cat(parts)


def flash_attn_2(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
):
    assert causal and dropout_p == 0
    window = (window_size[0], 0)
    return slow_varlen(q, k, v, cu_seqlens_q, scale=softmax_scale, window=window, softcap=softcap)


def torch_varlen(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    scale=None,
    window_size=(-1, -1),
):
    assert query.shape[1] == key.shape[1]
    return slow_varlen(query, key, value, cu_seq_q, scale=scale, window=window_size)


def torch_2_10_varlen(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, scale=None):
    assert is_causal
    return slow_varlen(q, k, v, cu_seq_q, scale=scale, window=(-1, 0))


@pytest.mark.parametrize("kernel", [flash_attn_2, torch_varlen, torch_2_10_varlen])
@pytest.mark.parametrize("name", ["mistral", *KINDS])
def test_flash_kernels(name, kernel, monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(name)
        return kernel(*args, **kwargs)

    functools.update_wrapper(counted, kernel)  # and its signature
    monkeypatch.setattr(kernels, "flash_kernel", lambda query: counted)
    check_packed(name)
    served = {
        "mistral": 0 if kernel is torch_2_10_varlen else 2,
        "gemma2": 2 if kernel is flash_attn_2 else 0,
        "gpt_oss": 0,  # sinks in both layers
        "qwen2_moe": 1 if kernel is torch_2_10_varlen else 2,
        "llama4_text": 1,  # not the chunked layer
    }
    assert len(calls) == served.get(name, 2)


def test_flash_kernels_get_16_bits_under_autocast(monkeypatch):
    """Normalized queries and keys are fp32 under autocast, which the kernels do not take."""
    seen = []

    def kernel(q, k, v, starts, _, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        seen.extend(x.dtype for x in (q, k, v))
        return slow_varlen(q, k, v, starts, scale=scale, window=window_size)

    monkeypatch.setattr(kernels, "flash_kernel", lambda query: kernel)
    with torch.no_grad():
        models.Policy(pair("qwen3")[0], dtype=torch.bfloat16).hidden(collate(sequences((5, 9))))
    assert set(seen) == {torch.bfloat16} and len(seen) == 6


def test_kernel_names():
    assert attention.kernel_name(torch.device("cpu"), torch.float32) == "SDPA, causal (cpu)"
    assert attention.kernel_name(torch.device("cuda"), torch.float32) == "SDPA, causal (cuda)"
    on_gpu = attention.kernel_name(torch.device("cuda"), torch.bfloat16)
    assert "(flash kernel)" in on_gpu and "varlen" in on_gpu


# ---- arguments and masks that are refused ----


def tensors():
    return (torch.zeros(1, 2, 8, 4) for _ in range(3))


def test_windows_without_a_mask():
    """As transformers' flash attention does, for callers that pass no mask."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 8, 4) for _ in range(3))
    found, _ = attention.attention(None, query, key, value, None, sliding_window=3)
    starts = torch.tensor([0, 8], dtype=torch.int32)
    packed, _ = attention.attention(
        None, query, key, value, None, 0.5, 0.0, starts, 8, sliding_window=3
    )
    distance = torch.arange(8)[:, None] - torch.arange(8)
    scores = (query @ key.mT / 2).masked_fill((distance < 0) | (distance > 2), -torch.inf)
    expected = (scores.softmax(-1) @ value).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(packed, expected)


@pytest.mark.parametrize("name", ["position_bias", "indices", "sinks"])
def test_arguments_that_are_not_served(name):
    with pytest.raises(UserError, match=f"uses {name}, which is not supported"):
        attention.attention(torch.nn.Identity(), *tensors(), None, **{name: torch.zeros(1)})


def test_packed_rows_without_causality():
    """As a vision tower calls it: no mask, and `is_causal=False`."""
    starts = torch.tensor([0, 3, 8], dtype=torch.int32)
    packed = {"cu_seq_lens_q": starts, "max_length_q": 5, "is_causal": False}
    with pytest.raises(UserError, match="bidirectional attention"):
        attention.attention(torch.nn.Identity(), *tensors(), None, **packed)


def test_attention_without_the_mask_of_transformers():
    row = attention.PackedRow(torch.tensor([0, 8], dtype=torch.int32), 8, 8)
    with attention.running(row), pytest.raises(UserError, match="does not receive the mask"):
        attention.attention(torch.nn.Identity(), *tensors(), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_causal": False}, "bidirectional attention"),
        ({"sliding_window": 5, "attention_chunk_size": 5}, "as a window or in chunks"),
    ],
)
def test_masks_that_are_not_served(changes, message):
    lm = families.model("mistral", attention.NAME)
    for name, value in changes.items():
        setattr(lm.config, name, value)
    with pytest.raises(UserError, match=message):
        models.Policy(lm).hidden(collate(sequences((3, 9))))


def test_padding_in_a_packed_batch():
    ours, _ = pair("mistral")
    ids, starts = torch.stack(sequences((9,))), torch.tensor([0, 4, 9], dtype=torch.int32)
    packed = {
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": 5,
        "max_length_k": 5,
    }
    packed["position_ids"] = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    mask = torch.ones(1, 9, dtype=torch.long)
    with torch.no_grad():
        expected = ours(input_ids=ids, **packed).logits
        torch.testing.assert_close(ours(ids, mask, **packed).logits, expected)
        mask[0, 8] = 0
        with pytest.raises(UserError, match="attention_mask hides tokens of a packed batch"):
            ours(ids, mask, **packed)


def test_lengths_at_which_rope_depends_on_the_batch():
    """Beyond the original length, longrope rotates short rows by other angles when a long one is beside them."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    settings = {"original_max_position_embeddings": 16, "sliding_window": None}
    rope["original_max_position_embeddings"] = 16
    policy = models.Policy(families.model("phi3", attention.NAME, rope_parameters=rope, **settings))
    assert models.context_length(policy.config) == 16
    assert policy.hidden(collate(sequences((3, 16)))).shape == (19, 32)
    with pytest.raises(UserError, match="17 tokens: expected at most 16.*longrope"):
        policy.hidden(collate(sequences((3, 17))))
    with pytest.raises(UserError, match="20 tokens: expected at most 16.*longrope"):
        HFSampler(policy, NoEnd()).generate([[5] * 10], max_new_tokens=10)


def test_lengths_at_which_queries_are_scaled_by_the_place_in_the_row():
    lm = families.model("llama4_text", attention.NAME, attn_temperature_tuning=True, floor_scale=20)
    policy = models.Policy(lm)
    assert policy.hidden(collate(sequences((10, 9)))).shape == (19, 32)
    with pytest.raises(UserError, match="packed row of 20 tokens: expected fewer than 20"):
        policy.hidden(collate(sequences((10, 10))))
