"""Optimizers, schedules and weight averaging."""

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from _support import tiny
from fastrlhf.errors import UserError
from fastrlhf.train import models, optim
from fastrlhf.train.stages import ppo


def test_schedules():
    assert optim.cosine(0, 100) == 1.0
    assert optim.cosine(100, 100) == pytest.approx(0.1)
    assert optim.cosine(50, 100) == pytest.approx(0.55)
    assert optim.cosine(0, 100, warmup=9) == pytest.approx(0.1)
    assert [optim.warm_constant(i, warmup=10) for i in (0, 5, 10, 400)] == pytest.approx(
        [0.1, 0.55, 1.0, 1.0]
    )
    assert optim.warm_constant(0, warmup=0) == 1.0


def test_ema_is_the_weighted_mean():
    layer = nn.Linear(2, 2, bias=False)
    start = layer.weight.detach().clone()
    ema = optim.EMA(layer, 0.9)
    with torch.no_grad():
        layer.weight.add_(1.0)
    ema.update(layer)
    ema.copy_to(layer)
    torch.testing.assert_close(layer.weight.detach(), start + 0.1)


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48)])
def test_muon_updates_are_near_orthogonal_and_of_adamw_size(shape):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape)
    optim.Muon([weight], lr=1.0).step()
    singular = torch.linalg.svdvals(weight.detach()) / (0.2 * max(shape) ** 0.5)
    assert singular.min() > 0.6 and singular.max() < 1.25
    assert torch.sum(weight.detach() * weight.grad) < 0


def test_muon_matches_torch_optim_muon():
    torch.manual_seed(0)
    target, ours, theirs = (torch.randn(12, 8) for _ in range(3))
    theirs = ours.clone()
    ours, theirs = nn.Parameter(ours), nn.Parameter(theirs)
    a = optim.Muon([ours], lr=0.02)
    b = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for weight, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            (weight - target).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)  # torch orthogonalizes in bf16


@pytest.mark.parametrize("stacked", [1, 300, 1 << 24])
def test_muon_stacked_updates_equal_separate_ones(monkeypatch, stacked):
    torch.manual_seed(0)
    monkeypatch.setattr(optim.Muon, "STACKED", stacked)
    shapes = [(12, 8), (8, 12), (12, 12), (12, 8), (8, 12)]
    together = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    optimizers = [optim.Muon(together, lr=0.02, weight_decay=0.1)]
    optimizers += [optim.Muon([p], lr=0.02, weight_decay=0.1) for p in alone]
    for _ in range(3):
        for p, q in zip(together, alone, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def named_matrices(module) -> set[str]:
    matrices = optim.hidden_matrices(module)
    return {name for name, p in module.named_parameters() if p in matrices}


def test_muon_takes_hidden_matrices_only():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(4, 3)
            self.layer = nn.Linear(3, 3)

    parts = optim.Optimizers(
        Model(), optim.OptimConfig(optimizer="muon", lr=1e-3, muon_lr=1e-2)
    ).parts
    assert [sum(p.numel() for g in part.param_groups for p in g["params"]) for part in parts] == [
        15,
        9,
    ]
    assert [part.param_groups[0]["lr"] for part in parts] == [1e-3, 1e-2]


def test_muon_leaves_embeddings_and_heads_whatever_their_names():
    """GPT-2 calls its embeddings wte and wpe, GPT-NeoX its head embed_out; tied and resized ones are no exception."""
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    gpt2.resize_token_embeddings(12)
    layer = "transformer.h.0"
    own = {
        f"{layer}.attn.c_attn",
        f"{layer}.attn.c_proj",
        f"{layer}.mlp.c_fc",
        f"{layer}.mlp.c_proj",
    }
    assert named_matrices(gpt2) == {f"{name}.weight" for name in own}
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_attention_heads=2))
    neox.resize_token_embeddings(12)
    assert neox.get_output_embeddings().weight not in optim.hidden_matrices(neox)
    assert len(named_matrices(neox)) == 4
    reward = LlamaForSequenceClassification(
        LlamaConfig(**sizes, num_attention_heads=2, num_labels=1)
    )
    assert len(named_matrices(reward)) == 7 and "score.weight" not in named_matrices(reward)


@pytest.mark.parametrize("kind", ["Qwen2Moe", "Afmoe"])  # Afmoe's router has a linear layer
def test_muon_leaves_routers(kind):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=9,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_dense_layers=0,
        num_attention_heads=2,
        num_key_value_heads=2,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        num_experts=4,
    )
    lm = transformers.AutoModelForCausalLM.from_config(config)
    linear = {n.rsplit(".", 2)[1] for n in named_matrices(lm)}
    attention, shared_expert = "q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj"
    assert {*attention.split(), *shared_expert.split()} == linear
    assert not any("router" in n or "shared_expert_gate" in n for n in named_matrices(lm))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_frozen_parameters(optimizer):
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3, bias=False))
    cfg = optim.OptimConfig(optimizer=optimizer, lr=0.1)
    model[0].requires_grad_(False)
    before = [p.clone() for p in model.parameters()]
    found = optim.Optimizers(model, cfg)
    model(torch.tensor([1])).sum().backward()
    assert found.step(1.0) == 0.1
    same = [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert same == [True, False]
    with pytest.raises(UserError, match="nothing to train"):
        optim.Optimizers(model.requires_grad_(False), cfg)


def test_ppo_ptx_with_frozen_layers(monkeypatch):
    def load_policy(*args, **options):
        policy = models.load_policy(*args, **options)
        policy.lm.model.layers[0].requires_grad_(False)
        return policy

    monkeypatch.setattr(ppo, "load_policy", load_policy)
    cfg = tiny.ppo_config("frozen", iterations=1, ptx_coef=1.0, batch=4, minibatch=4)
    assert ppo.main(cfg)["ptx/loss"] > 0
    (row,) = tiny.log(cfg.out)
    assert row["grad_norm/ptx"] > 0
    before, after = tiny.weights(tiny.base()), tiny.weights(cfg.out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any("layers.0." in name for name in changed)
