"""Optimizers, schedules and weight averaging."""

import pytest
import torch
from torch import nn

from fastrlhf.train import optim


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


def test_muon_takes_hidden_matrices_only():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens = nn.Embedding(4, 3)
            self.layer = nn.Linear(3, 3)

    parts = optim.Optimizers(
        Model(), optim.OptimConfig(optimizer="muon", lr=1e-3, muon_lr=1e-2)
    ).parts
    assert [sum(p.numel() for g in part.param_groups for p in g["params"]) for part in parts] == [
        15,
        9,
    ]
    assert [part.param_groups[0]["lr"] for part in parts] == [1e-3, 1e-2]
