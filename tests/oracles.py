"""Other people's functions, imported and never retold, and how ours are compared with them.

The oracle in fp64 is the truth, the oracle in fp32 the error that ours is measured by: at most twice
that, plus two roundings. 16-bit inputs are given to the oracle as the same numbers in fp32.

verl pins an older transformers and needs ray, so it cannot be installed beside us. `make test` unpacks
its wheel alone into build/oracles, and two of its modules are imported from there, unchanged:
`verl.trainer.ppo.core_algos` and `verl.utils.torch_functional` (with `verl.utils.device`, `groupwise`,
`import_utils` and `verl.plugin.platform`). Not imported: the `__init__` files of verl and its
subpackages, which bring ray, hydra and model code, and what STAND_INS names.
B sequences, T steps.
"""

import functools
import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from logit_cases import DEVICE, assert_near, generator, randn

FOLDER = Path(__file__).resolve().parents[1] / "build" / "oracles"

# Module -> the names that verl's two modules import at module level. There they serve annotations and
# one isinstance check (AlgoConfig), so that an empty class does.
STAND_INS = {
    "omegaconf": ("DictConfig",),
    "tensordict": ("TensorDict",),
    "verl.trainer.config": ("AlgoConfig",),
    "verl.workers.config": ("ActorConfig",),
}
# Packages of verl whose own __init__ is not run.
PACKAGES = ("verl", "verl.trainer", "verl.trainer.ppo", "verl.utils", "verl.workers")


@functools.cache
def verl() -> SimpleNamespace:
    """verl's `core_algos` and `torch_functional`; skips where the wheel is not unpacked.

    Neither verl nor a stand-in stays in `sys.modules`: no other test can meet a false `tensordict`.
    """
    if not (FOLDER / "verl").is_dir():
        pytest.skip(f"{FOLDER.name}/verl is missing; `make test` unpacks it there")
    before = dict(sys.modules)
    try:
        for name in PACKAGES:
            package = ModuleType(name)
            package.__path__ = [str(FOLDER.joinpath(*name.split(".")))]
            sys.modules[name] = package
        for name, classes in STAND_INS.items():
            module = ModuleType(name)
            for each in classes:
                setattr(module, each, type(each, (), {}))
            sys.modules[name] = module
        groupwise = importlib.import_module("verl.utils.groupwise")
        for name in ("as_torch_index", "group_mean_std"):  # what verl.utils exports to core_algos
            setattr(sys.modules["verl.utils"], name, getattr(groupwise, name))
        return SimpleNamespace(
            torch_functional=importlib.import_module("verl.utils.torch_functional"),
            core_algos=importlib.import_module("verl.trainer.ppo.core_algos"),
        )
    finally:
        for name in set(sys.modules) - set(before):
            if name.split(".")[0] in ("verl", "omegaconf", "tensordict"):
                del sys.modules[name]
        sys.modules.update(before)


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
