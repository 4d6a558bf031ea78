"""Optimizers and schedules: AdamW as in the paper, or Muon on the hidden matrices with AdamW on the rest."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from fastrlhf.errors import UserError
from fastrlhf.train import sharded


@dataclass
class OptimConfig:
    """Fields of every training stage. Betas and epsilon are the paper's (Adam, C); decay is 0 there."""

    lr: float = 1e-5
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: on hidden matrices, AdamW on the rest
    muon_lr: float | None = None  # learning rate of the hidden matrices under muon; default: lr
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.0  # decoupled
    max_grad_norm: float | None = 1.0  # global norm; not in the paper; null: no clipping


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by five Newton-Schulz steps, for hidden matrices (Jordan et al. 2024).

    The update has the size AdamW's would have (0.2 * sqrt(max(rows, columns))), so learning rates carry over.
    torch.optim.Muon orthogonalises in bf16, which a CPU without bf16 units emulates: for the demo's 28 matrices it took
    0.77 s of processor time a step where fp32 takes 0.04 s, twice the model's own forward and backward.
    """

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)
    # Elements of equal matrices orthogonalised at once: a step of 28 small ones takes 31 ms so, 48 ms one
    # by one (2 cores); the bound keeps the stacked copies of a large model's matrices to 64 MiB each.
    STACKED = 1 << 24

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            alike: dict[tuple, list[tuple[torch.Tensor, torch.Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                # Sharded matrices are made whole: every rank orthogonalises all of them and takes its part.
                update = sharded.full(parameter.grad.lerp(state["momentum"], group["momentum"]))
                # As wide matrices (views): the transpose's update is the update's transpose.
                tall = update.shape[0] > update.shape[1]
                pair = (parameter.t(), update.t()) if tall else (parameter, update)
                alike.setdefault((*pair[1].shape, update.device), []).append(pair)
            for pairs in alike.values():
                count = max(1, self.STACKED // pairs[0][1].numel())
                for part in (pairs[i : i + count] for i in range(0, len(pairs), count)):
                    updates = self._orthogonal(torch.stack([update for _, update in part]))
                    for (parameter, _), update in zip(part, updates, strict=True):
                        parameter.mul_(1 - group["lr"] * group["weight_decay"])
                        scale = 0.2 * max(parameter.shape) ** 0.5
                        update = sharded.like(update.to(parameter.dtype), parameter)
                        parameter.add_(update, alpha=-scale * group["lr"])

    @classmethod
    def _orthogonal(cls, matrices: torch.Tensor) -> torch.Tensor:
        a, b, c = cls.COEFFICIENTS
        x = matrices.float()
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x


class Optimizers:
    """One or two torch optimizers that step together under one schedule factor."""

    def __init__(self, module: nn.Module, cfg: OptimConfig):
        if cfg.optimizer not in ("adamw", "muon"):
            raise UserError(f"optimizer: expected adamw or muon, got {cfg.optimizer!r}")
        hidden, rest = [], []
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            matrix = (
                parameter.ndim == 2
                and "embed" not in name
                and "lm_head" not in name
                and "score" not in name
            )
            (hidden if matrix and cfg.optimizer == "muon" else rest).append(parameter)
        betas = (cfg.beta1, cfg.beta2)
        self.parts = [
            torch.optim.AdamW(
                rest, lr=cfg.lr, betas=betas, eps=cfg.adam_eps, weight_decay=cfg.weight_decay
            )
        ]
        if hidden:
            self.parts.append(Muon(hidden, lr=cfg.muon_lr or cfg.lr, weight_decay=cfg.weight_decay))
        self.peaks = [part.param_groups[0]["lr"] for part in self.parts]

    def step(self, factor: float) -> float:
        """One update at `factor` times the peak rates; clears the gradients; returns AdamW's rate."""
        for part, peak in zip(self.parts, self.peaks, strict=True):
            for group in part.param_groups:
                group["lr"] = peak * factor
            part.step()
            part.zero_grad(set_to_none=True)
        return self.peaks[0] * factor

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, state: list[dict]) -> None:
        for part, saved in zip(self.parts, state, strict=True):
            owners = [p for group in part.param_groups for p in group["params"]]
            slots = {
                i: {k: sharded.like(v, owners[i]) if k != "step" else v for k, v in found.items()}
                for i, found in saved["state"].items()
            }
            part.load_state_dict({**saved, "state": slots})


def cosine(step: int, total: int, *, warmup: int = 0, floor: float = 0.1) -> float:
    """Factor at `step` (from 0): linear warmup, then a cosine from 1 to `floor` (paper: no warmup, 10 %)."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def warm_constant(step: int, *, warmup: int, start: float = 0.1) -> float:
    """Factor at `step` (from 0): linear from `start` to 1 over `warmup` steps, then constant (paper C.4)."""
    return 1.0 if step >= warmup else start + (1 - start) * step / warmup


class EMA:
    """Exponential moving average of a module's parameters: ema = d*ema + (1-d)*w after each optimizer step."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.shadow = [p.detach().clone() for p in module.parameters()]

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        torch._foreach_lerp_(self.shadow, [p.detach() for p in module.parameters()], 1 - self.decay)

    def load(self, shadow: list[torch.Tensor]) -> None:
        """Continue from a checkpoint's whole tensors."""
        pairs = zip(shadow, self.shadow, strict=True)
        self.shadow = [sharded.like(t.to(own.device), own) for t, own in pairs]

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the module's parameters with the average."""
        for parameter, shadow in zip(module.parameters(), self.shadow, strict=True):
            parameter.copy_(shadow)
