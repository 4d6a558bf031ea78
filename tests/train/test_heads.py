"""The fused heads: no stage holds [N, V] logits, and heads that are more than a linear layer are refused."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from _support import tiny
from fastrlhf.errors import UserError
from fastrlhf.ops import _gemms
from fastrlhf.train import models
from fastrlhf.train.heads import unembedding_parameters
from fastrlhf.train.stages import ppo, reward, sft

ROWS = 5  # rows of a chunk


def widths(main, cfg, monkeypatch):
    """Run a stage in chunks of ROWS; return {rows: op names} of all operands [rows, V] but the head's weight."""
    monkeypatch.setattr(_gemms, "chunk_rows", lambda *_: ROWS)
    config = models.AutoConfig.from_pretrained(tiny.base())
    vocab, width = config.vocab_size, config.hidden_size
    with torch.profiler.profile(record_shapes=True) as profile:
        main(cfg)
    found = {}
    for event in profile.events():
        for shape in event.input_shapes or ():
            if len(shape) >= 2 and shape[-1] == vocab:
                rows = torch.Size(shape[:-1]).numel()
                if rows != width:  # weight.T
                    found.setdefault(rows, set()).add(event.name)
    return found


def test_sft_and_ppo_ptx_hold_a_chunk_at_a_time(monkeypatch):
    tiny.reward_model()
    found = widths(sft.main, tiny.sft_config("lean-sft", epochs=0.5), monkeypatch)
    assert ROWS in found and max(found) == ROWS, found
    # The sampler computes one row of logits for each response, so there are at most ROWS responses.
    cfg = tiny.ppo_config("lean-ppo", iterations=1, ptx_coef=1.0, batch=4, minibatch=4)
    found = widths(ppo.main, cfg, monkeypatch)
    assert "fastrlhf::linear_loss_fwd" not in found.get(ROWS, ())  # its operands are no logits
    assert ROWS in found and max(found) == ROWS, found


def test_the_reward_model_has_no_vocabulary(monkeypatch):
    assert not widths(reward.main, tiny.reward_config("lean-reward", epochs=1), monkeypatch)


class Adapter(nn.Linear):
    """A layer as peft wraps it: the base layer and two low-rank matrices."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features, bias=False)
        self.base_layer = base
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()


@pytest.mark.parametrize("kind", ["lora", "parametrized", "no weight"])
def test_a_head_that_is_not_a_plain_linear_layer_is_refused(kind):
    lm = nn.Module()
    head = nn.Linear(4, 7)
    lm.get_output_embeddings = lambda: head
    assert unembedding_parameters(lm) == (head.weight, head.bias)
    if kind == "lora":
        head = Adapter(nn.Linear(4, 7))
    elif kind == "parametrized":
        nn.utils.parametrize.register_parametrization(head, "weight", nn.Identity())
    else:
        head = nn.Identity()
    match = (
        "base_layer, lora_A, lora_B"
        if kind == "lora"
        else {"parametrized": "parametrizations"}.get(kind, kind)
    )
    with pytest.raises(UserError, match=f"output head .* must be a plain linear layer.*{match}"):
        unembedding_parameters(lm)


@pytest.mark.parametrize(
    ("kind", "name", "factor"),
    [
        ("Granite", "logits_scaling", 8.0),
        ("Cohere", "logit_scale", 0.0625),
        ("FalconH1", "lm_head_multiplier", 2.0),
        ("Granite", "logits_scaling", 1.0),
    ],
)
def test_a_scale_of_the_logits_is_refused(kind, name, factor):
    """The fused head would silently drop it."""
    config = getattr(transformers, f"{kind}Config")(**{name: factor})
    lm = SimpleNamespace(config=config, get_output_embeddings=lambda: torch.nn.Linear(3, 5))
    if factor == 1:
        assert unembedding_parameters(lm)[0].shape == (5, 3)
    else:
        with pytest.raises(UserError, match=f"scales its logits .{name} = {factor:g} in config"):
            unembedding_parameters(lm)
