"""The patched causal-LM loss is transformers' own, to twice its rounding, and leaves no trace."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.loss import loss_utils

from fastrlhf.integrations.transformers import patch, unpatch
from fastrlhf.ops._backend import calls


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=101, num_attention_heads=2, **sizes))


def loss_and_gradient(model, ids, labels, **options):
    model.zero_grad()
    loss = model(input_ids=ids, labels=labels, **options).loss
    loss.backward()
    return loss.detach(), model.lm_head.weight.grad.clone()


@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": torch.tensor(40)}])
def test_same_loss_and_gradient(model, options):
    ids = torch.randint(0, 101, (3, 17))
    labels = ids.clone()
    labels[:, :5] = -100
    theirs = loss_and_gradient(model, ids, labels, **options)
    before = sum(n for (op, _), n in calls.items() if op == "token_logprob")
    with patch():
        ours = loss_and_gradient(model, ids, labels, **options)
    assert sum(n for (op, _), n in calls.items() if op == "token_logprob") == before + 1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_patching_twice_and_undoing_it():
    original = loss_utils.LOSS_MAPPING["ForCausalLM"]
    patch()
    patched = loss_utils.LOSS_MAPPING["ForCausalLM"]
    with patch():
        assert loss_utils.LOSS_MAPPING["ForCausalLM"] is patched
    assert loss_utils.LOSS_MAPPING["ForCausalLM"] is patched is not original
    unpatch()
    unpatch()
    assert loss_utils.LOSS_MAPPING["ForCausalLM"] is original


def test_a_moved_function_is_named(monkeypatch):
    monkeypatch.delitem(loss_utils.LOSS_MAPPING, "ForCausalLM")
    with pytest.raises(RuntimeError, match="has no 'ForCausalLM'"):
        patch()
