"""Oracles: functions of other packages, imported rather than copied, and the comparison of ours with them.

The oracle in fp64 is the truth. The error of the oracle in fp32 is the bar: ours may have twice that, plus two
roundings. 16-bit inputs are converted to fp32 for the oracle.

tests/_support/unpacked.py loads verl's modules.
B sequences, T steps.
"""

import importlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from _support import unpacked
from _support.logit_cases import DEVICE, generator, randn
from _support.tolerance import assert_near


def verl() -> SimpleNamespace:
    """verl's `core_algos` and `torch_functional`; skips the test if the wheel is not unpacked."""
    modules = unpacked.verl()
    return SimpleNamespace(
        torch_functional=modules["verl.utils.torch_functional"],
        core_algos=modules["verl.trainer.ppo.core_algos"],
    )


class VerlActorConfig:
    """The fields of verl's ActorConfig that `compute_policy_loss_vanilla` reads."""

    global_batch_info: dict = {}

    def __init__(self, clip, dual_clip):
        self.clip_ratio, self.clip_ratio_low, self.clip_ratio_high = clip, None, None
        self.clip_ratio_c = dual_clip

    def get(self, name, default):
        return getattr(self, name, default)


def trl_function(name, module="trl.trainer.utils"):
    """`name` of TRL's `module`; skips the test if TRL is not installed."""
    pytest.importorskip("trl", reason="trl is not installed; `make test` installs it")
    return getattr(importlib.import_module(module), name)


def leaves(tensors, device=None):
    """Detached copies on `device`; those of float tensors require grad."""
    return [
        t.detach().to(device).clone().requires_grad_() if t.is_floating_point() else t.to(device)
        for t in tensors
    ]


def upcast(tensor, dtype):
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def compare(ours, oracle, inputs, backend, truth=None):
    """Compares outputs and gradients of `ours(*inputs)` with `oracle` in fp64; `oracle` in fp32 sets the bar.

    `truth` replaces an oracle that computes in fp32 for fp64 inputs too.
    """

    def run(function, tensors):
        outputs = function(*tensors)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        draws = [randn(*p.shape, seed=99 + i, dtype=torch.float64) for i, p in enumerate(outputs)]
        upstream = [
            d.to(device=p.device, dtype=p.dtype) for d, p in zip(draws, outputs, strict=True)
        ]
        wanted = [t for t in tensors if t.requires_grad]
        differentiable = any(p.requires_grad for p in outputs)
        grads = torch.autograd.grad(outputs, wanted, upstream) if differentiable else ()
        return [*outputs, *grads]

    found = run(ours, leaves(inputs, device=DEVICE[backend]))
    theirs = run(oracle, leaves([upcast(t, torch.float32) for t in inputs]))
    exact = run(truth or oracle, leaves([upcast(t, torch.float64) for t in inputs]))
    assert len(found) == len(theirs) == len(exact)
    for i, three in enumerate(zip(found, theirs, exact, strict=True)):
        error, size = (three[1].double() - three[2]).abs().max(), three[2].abs().max()
        assert error <= 1e-4 * size, (
            f"result {i}: the oracle's error {error:.3g} is too large for a bar"
        )
        assert three[0].shape == three[2].shape
        assert_near(*three, what=f"result {i}")


class Batch:
    """Sequences of random lengths, as [B, T] or packed; the `mask` layout also has holes."""

    def __init__(self, seed, layout, steps=41):
        draw = generator(seed)
        self.sequences, self.layout = 5, layout
        lengths = torch.randint(1, steps + 1, (self.sequences,), generator=draw)
        lengths[0] = steps
        self.keep = torch.arange(steps) < lengths[:, None]
        if layout == "mask":
            self.keep &= torch.rand(self.keep.shape, generator=draw) < 0.7
            self.keep[:, 3] = True  # every sequence needs a token that carries its score
        self.cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
        self.seed = 1000 * seed

    def draw(self, dtype=torch.float32, scale=1.0):
        """A new [B, T]. Masked entries are large, so that reading one changes the result."""
        self.seed += 1
        values = randn(*self.keep.shape, seed=self.seed, dtype=dtype, scale=scale)
        return values.masked_fill(~self.keep, 1e4)

    def floats(self, dtype):
        return self.keep.to(torch.float64 if dtype == torch.float64 else torch.float32)

    def options(self, device):
        layout = self.keep if self.layout == "mask" else self.cu_seqlens
        return {self.layout: layout.to(device)}

    def ours(self, op, backend, *tensors, **more):
        """`op` on [B, T] tensors in this batch's layout; returns the unmasked entries in order."""
        device = DEVICE[backend]
        tensors = [self.into_layout(t) if t.dim() == 2 else t for t in tensors]
        out = op(*tensors, backend=backend, **self.options(device), **more)
        out = out if isinstance(out, tuple) else (out,)
        return tuple(o[self.keep.to(device)] if self.layout == "mask" else o for o in out)

    def into_layout(self, tensor):
        return tensor if self.layout == "mask" else tensor[self.keep.to(tensor.device)]

    def scores_at_last_token(self, score):
        """verl's token_level_scores: [B, T], the score on the last unmasked token."""
        last = self.keep & (self.keep.flip(1).cumsum(1).flip(1) == 1)
        return torch.where(last, score[:, None], 0.0)
