"""Other people's functions, imported and never retold, and how ours are compared with them.

The oracle in fp64 is the truth, the oracle in fp32 the error that ours is measured by: at most twice
that, plus two roundings. 16-bit inputs are given to the oracle as the same numbers in fp32.

tests/_support/unpacked.py says how verl's modules are loaded.
B sequences, T steps.
"""

import importlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from _support import unpacked
from _support.logit_cases import DEVICE, assert_near, generator, randn


def verl() -> SimpleNamespace:
    """verl's `core_algos` and `torch_functional`; skips where the wheel is not unpacked."""
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
    """`name` of TRL's `module`; skips where TRL is not installed."""
    pytest.importorskip("trl", reason="trl is not installed; `make test` installs it")
    return getattr(importlib.import_module(module), name)


def leaves(tensors, device=None):
    """Detached copies that want gradients; integer tensors as they are."""
    return [
        t.detach().to(device).clone().requires_grad_() if t.is_floating_point() else t.to(device)
        for t in tensors
    ]


def upcast(tensor, dtype):
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def compare(ours, oracle, inputs, backend, truth=None):
    """Outputs and gradients of `ours(*inputs)` against `oracle` in fp64, the bar by `oracle` in fp32.

    An oracle that computes in fp32 whatever it is given cannot be the truth; another is named for it.
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
        assert error <= 1e-4 * size, f"result {i}: the oracle errs by {error:.3g} and is no bar"
        assert three[0].shape == three[2].shape
        assert_near(*three, what=f"result {i}")


class Batch:
    """Random sequences of random lengths, as [B, T] and packed; `mask` layouts have holes as well."""

    def __init__(self, seed, layout, steps=41):
        draw = generator(seed)
        self.sequences, self.layout = 5, layout
        lengths = torch.randint(1, steps + 1, (self.sequences,), generator=draw)
        lengths[0] = steps
        self.keep = torch.arange(steps) < lengths[:, None]
        if layout == "mask":
            self.keep &= torch.rand(self.keep.shape, generator=draw) < 0.7
            self.keep[:, 3] = True  # the score of a sequence needs a token to stand on
        self.cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
        self.seed = 1000 * seed

    def draw(self, dtype=torch.float32, scale=1.0):
        """One more [B, T]; masked entries hold large numbers, which nothing may pick up."""
        self.seed += 1
        values = randn(*self.keep.shape, seed=self.seed, dtype=dtype, scale=scale)
        return values.masked_fill(~self.keep, 1e4)

    def floats(self, dtype):
        return self.keep.to(torch.float64 if dtype == torch.float64 else torch.float32)

    def options(self, device):
        layout = self.keep if self.layout == "mask" else self.cu_seqlens
        return {self.layout: layout.to(device)}

    def ours(self, op, backend, *tensors, **more):
        """`op` on [B, T] tensors in this batch's layout; results as the unmasked entries, in order."""
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
