"""No stage of training holds N x V logits: seen from the shapes of every op that ran."""

import pytest
import torch
from torch import nn

from _support import tiny
from fastrlhf.errors import UserError
from fastrlhf.ops import _chunks
from fastrlhf.train import models
from fastrlhf.train.stages import ppo, reward, sft

ROWS = 5  # of a chunk


def widths(main, cfg, monkeypatch):
    """{rows: ops} of the operands [rows, V] of a run, chunk by chunk and beside the head's weight."""
    monkeypatch.setattr(_chunks, "chunk_rows", lambda *_: ROWS)
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
    # The sampler has one row of logits for each response that it generates.
    cfg = tiny.ppo_config("lean-ppo", iterations=1, ptx_coef=1.0, batch=4, minibatch=4)
    found = widths(ppo.main, cfg, monkeypatch)
    assert "fastrlhf::linear_loss_fwd" not in found.get(ROWS, ())  # it sees no logits at all
    assert ROWS in found and max(found) == ROWS, found


def test_the_reward_model_has_no_vocabulary(monkeypatch):
    assert not widths(reward.main, tiny.reward_config("lean-reward", epochs=1), monkeypatch)


class Adapter(nn.Linear):
    """As peft wraps a layer: the base inside, and two small matrices beside it."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features, bias=False)
        self.base_layer = base
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()


@pytest.mark.parametrize("kind", ["lora", "parametrized", "no weight"])
def test_a_head_that_is_more_than_its_weight_is_refused(kind):
    lm = nn.Module()
    head = nn.Linear(4, 7)
    lm.get_output_embeddings = lambda: head
    assert models.head_parameters(lm) == (head.weight, head.bias)
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
        models.head_parameters(lm)
