"""Optimizers (AdamW, or Muon for the hidden matrices and AdamW for the rest), schedules and weight averaging.

"The paper" is Ouyang et al. 2022, "Training language models to follow instructions with human feedback".
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastrlhf.errors import UserError
from fastrlhf.train import sharded
from fastrlhf.train.routers import routers


@dataclass
class OptimConfig:
    """Optimizer settings of every training stage. Betas and epsilon are the paper's (appendix C)."""

    lr: float = 1e-5  # peak learning rate
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for hidden matrices; AdamW for the rest
    muon_lr: float | None = None  # peak learning rate of the hidden matrices under muon; null: lr
    beta1: float = 0.9  # Adam's decay of the first moment
    beta2: float = 0.95  # Adam's decay of the second moment
    adam_eps: float = 1e-8  # Adam's epsilon
    weight_decay: float = 0.0  # decoupled weight decay; 0 in the paper
    max_grad_norm: float | None = 1.0  # limit of the gradient norm; not in the paper; null: off


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum, orthogonalized by five Newton-Schulz steps. For hidden matrices only.

        m <- lerp(m, g, 1 - momentum)
        w <- (1 - lr * weight_decay) * w - lr * 0.2 * sqrt(max(rows, columns)) * orthogonalize(lerp(g, m, momentum))

    The factor gives the update about the RMS of an AdamW update, so that AdamW's learning rates carry over.

    torch.optim.Muon orthogonalizes in bf16, which a CPU without bf16 units emulates: for the demo's 28 matrices
    it took 0.77 s of processor time per step. In fp32, as here, it takes 0.04 s.
    """

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)
    # Matrices of one shape are orthogonalized in stacks of at most this many elements (64 MiB in fp32). For 28
    # small matrices per step then takes 31 ms instead of 48 ms on 2 cores.
    STACKED = 1 << 24

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[tuple, list[tuple[torch.Tensor, torch.Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                # A sharded matrix is gathered: every rank orthogonalizes it and keeps its shard of the result.
                update = sharded.full_tensor(
                    parameter.grad.lerp(state["momentum"], group["momentum"])
                )
                # Orthogonalization commutes with transposition, so tall matrices are handled as wide views.
                tall = update.shape[0] > update.shape[1]
                pair = (parameter.t(), update.t()) if tall else (parameter, update)
                by_shape.setdefault((*pair[1].shape, update.device), []).append(pair)
            for pairs in by_shape.values():
                count = max(1, self.STACKED // pairs[0][1].numel())
                for part in (pairs[i : i + count] for i in range(0, len(pairs), count)):
                    updates = self._orthogonalize(torch.stack([update for _, update in part]))
                    for (parameter, _), update in zip(part, updates, strict=True):
                        parameter.mul_(1 - group["lr"] * group["weight_decay"])
                        scale = 0.2 * max(parameter.shape) ** 0.5
                        update = sharded.shard_like(update.to(parameter.dtype), parameter)
                        parameter.add_(update, alpha=-scale * group["lr"])

    @classmethod
    def _orthogonalize(cls, matrices: torch.Tensor) -> torch.Tensor:
        a, b, c = cls.COEFFICIENTS
        x = matrices.float()
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x


def hidden_matrices(module: nn.Module) -> set[nn.Parameter]:
    """The weights for Muon: those of linear layers with more than one input and output.

    Heads and routers are none of them: a row of their weight belongs to one token or expert. The model names its head
    (`get_output_embeddings`) and its routers; a reward head has one output.
    """
    found = {
        m.weight
        for m in module.modules()
        if isinstance(m, nn.Linear | Conv1D) and m.weight.ndim == 2 and min(m.weight.shape) > 1
    }
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            found -= set(part.parameters())
        elif isinstance(part, PreTrainedModel) and part.get_output_embeddings() is not None:
            found -= set(part.get_output_embeddings().parameters())
    for router in routers(module):
        found -= set(router.parameters())
    return found


class Optimizers:
    """AdamW, or Muon and AdamW, over the trainable parameters of `module`, under one learning-rate schedule.

    Muon gets the matrices inside the transformer (`hidden_matrices`); AdamW gets the rest.
    """

    def __init__(self, module: nn.Module, cfg: OptimConfig):
        if cfg.optimizer not in ("adamw", "muon"):
            raise UserError(f"optimizer: expected adamw or muon, got {cfg.optimizer!r}")
        trained = [p for p in module.parameters() if p.requires_grad]
        if not trained:
            raise UserError("nothing to train: every parameter of the model is frozen")
        matrices = hidden_matrices(module) if cfg.optimizer == "muon" else set()
        hidden = [p for p in trained if p in matrices]
        rest = [p for p in trained if p not in matrices]
        betas = (cfg.beta1, cfg.beta2)
        self.parts = []
        if rest:
            self.parts.append(
                torch.optim.AdamW(
                    rest, lr=cfg.lr, betas=betas, eps=cfg.adam_eps, weight_decay=cfg.weight_decay
                )
            )
        if hidden:
            self.parts.append(Muon(hidden, lr=cfg.muon_lr or cfg.lr, weight_decay=cfg.weight_decay))
        self.peaks = [part.param_groups[0]["lr"] for part in self.parts]

    def step(self, factor: float) -> float:
        """Step at `factor` times the peak learning rates and clear the gradients; return the first part's rate."""
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
            parameters = [p for group in part.param_groups for p in group["params"]]
            slots = {
                i: {
                    k: v if k == "step" else sharded.shard_like(v, parameters[i])
                    for k, v in found.items()
                }
                for i, found in saved["state"].items()
            }
            part.load_state_dict({**saved, "state": slots})


def cosine(step: int, total: int, *, warmup: int = 0, floor: float = 0.1) -> float:
    """Learning-rate factor at `step` (from 0): linear warmup, then half a cosine from 1 to `floor`.

    The paper uses no warmup and a floor of 0.1 for SFT and reward model (C.1, C.2).
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def warm_constant(step: int, *, warmup: int, start: float = 0.1) -> float:
    """Learning-rate factor at `step` (from 0): linear from `start` to 1 over `warmup` steps, then 1 (paper C.4)."""
    return 1.0 if step >= warmup else start + (1 - start) * step / warmup


class EMA:
    """Exponential moving average of a module's parameters: ema <- decay * ema + (1 - decay) * w at each `update`."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.shadow = [p.detach().clone() for p in module.parameters()]

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        torch._foreach_lerp_(self.shadow, [p.detach() for p in module.parameters()], 1 - self.decay)

    def state_dict(self) -> dict:
        return {"shadow": self.shadow}

    def load_state_dict(self, state: dict) -> None:
        """Restore the average from a checkpoint's full tensors."""
        pairs = zip(state["shadow"], self.shadow, strict=True)
        self.shadow = [sharded.shard_like(t.to(own.device), own) for t, own in pairs]

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the module's parameters with the average."""
        for parameter, shadow in zip(module.parameters(), self.shadow, strict=True):
            parameter.copy_(shadow)
