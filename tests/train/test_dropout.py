"""Residual dropout is placed on the branches of every kind of decoder layer, and no other noise is left."""

import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig

from _support import zoo
from fastrlhf.errors import UserError
from fastrlhf.train import models
from fastrlhf.train.dropout import residual_branches

# The modules whose outputs the layers of a family add to their inputs.
BRANCHES = {
    "llama": {"self_attn", "mlp"},
    "gemma2": {"post_attention_layernorm", "post_feedforward_layernorm"},
    "olmo2": {"post_attention_layernorm", "post_feedforward_layernorm"},
    "cohere": {"self_attn", "mlp"},  # side by side
    "granite": {"self_attn", "mlp"},  # with a factor
    "gpt2": {"attn", "mlp"},
    "gpt_neox": {"post_attention_dropout", "post_mlp_dropout"},
    "deepseek_v3": {"self_attn", "mlp"},  # dense, then experts
    "opt": {"self_attn", "fc2"},
}


@pytest.mark.parametrize("name", BRANCHES)
def test_the_branches_of_a_layer_are_found(name):
    body = models.decoder(zoo.FAMILIES[name].make_model())
    names = {m: n for n, m in body.named_modules()}
    found = [names[m].rsplit(".", 1)[-1] for m in residual_branches(body)]
    assert len(found) == 2 * body.config.num_hidden_layers and set(found) == BRANCHES[name]


def test_dropout_is_on_the_branches_in_training_mode_only():
    policy = models.Policy(zoo.FAMILIES["gemma2"].make_model())
    first = residual_branches(policy.body)[1]  # the first layer's, last branch first
    ids = torch.arange(24)[None]
    with torch.no_grad():
        plain = policy.body(input_ids=ids, use_cache=False).last_hidden_state
        policy.set_residual_dropout(0.25)
        seen = []
        first.register_forward_hook(lambda m, args, y: seen.append(y))
        policy.eval()
        assert torch.equal(policy.body(input_ids=ids, use_cache=False).last_hidden_state, plain)
        policy.train()
        dropped = policy.body(input_ids=ids, use_cache=False).last_hidden_state
    assert not torch.equal(dropped, plain)
    kept = seen[1] != 0
    assert 0.6 < kept.float().mean() < 0.9
    torch.testing.assert_close(seen[1][kept], seen[0][kept] / 0.75)


def test_dropout_that_cannot_be_placed_is_refused():
    """A layer of Gemma 3n mixes four copies of the residual stream."""
    policy = models.Policy(zoo.FAMILIES["gemma3n"].make_model())
    policy.set_residual_dropout(0.0)
    with pytest.raises(
        UserError, match="dropout: .* cannot be placed in a Gemma3nTextModel.* to 0"
    ):
        policy.set_residual_dropout(0.2)


def test_a_models_own_dropout_is_off():
    """OPT's is no nn.Dropout."""
    config = OPTConfig(
        vocab_size=9, hidden_size=8, word_embed_proj_dim=8, ffn_dim=8, num_hidden_layers=1,
        num_attention_heads=2, dropout=0.5, attention_dropout=0.5,
    )  # fmt: skip
    policy = models.Policy(AutoModelForCausalLM.from_config(config)).train()
    first, second = (policy.body(input_ids=torch.tensor([[3, 4, 5]])) for _ in range(2))
    assert torch.equal(first.last_hidden_state, second.last_hidden_state)
    first.last_hidden_state.sum().backward()
    assert all(p.grad is not None for p in policy.body.decoder.layers.parameters())
