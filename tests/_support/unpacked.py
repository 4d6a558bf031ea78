"""verl and OpenRLHF as `make test` unpacks them into build/oracles: their own modules, imported unchanged.

Neither can be installed beside us (verl pins an older transformers and needs ray; OpenRLHF pins deepspeed,
ray and vllm). So the `__init__` files of their packages are not run, which would bring ray, hydra, vllm and
model code; and the few modules that the wanted ones import at module level, but that are not here, get a
stand-in of empty classes under the very name. What each of these is for stands beside it.
"""

import contextlib
import functools
import importlib
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "build" / "oracles"

VERL_PACKAGES = (
    "verl",
    "verl.trainer",
    "verl.trainer.ppo",
    "verl.utils",
    "verl.utils.experimental",
    "verl.utils.kernel",
    "verl.workers",
)
VERL_STAND_INS = {
    "omegaconf": ("DictConfig",),  # an annotation
    "tensordict": ("TensorDict",),  # an annotation
    "verl.trainer.config": ("AlgoConfig",),  # an isinstance check
    "verl.workers.config": ("ActorConfig",),  # an annotation
}
VERL_MODULES = (
    "verl.utils.torch_functional",
    "verl.trainer.ppo.core_algos",
    "verl.utils.experimental.torch_functional",
    # Its kernels are Triton for a GPU and are imported by the call: on a CPU verl's own cannot run.
    "verl.utils.kernel.linear_cross_entropy",
)

OPENRLHF_PACKAGES = (
    "openrlhf",
    "openrlhf.models",
    "openrlhf.trainer",
    "openrlhf.trainer.ppo_utils",
    "openrlhf.trainer.ray",
    "openrlhf.utils",
)
OPENRLHF_STAND_INS = {
    "deepspeed": (),  # set_z3_leaf_modules, for ZeRO-3
    "ray": (),  # remote calls between workers
    "openrlhf.trainer.ray.launcher": ("RayActorGroup",),  # an annotation; brings ray and deepspeed
    # actor.py: LoRA, and packing over a ring of GPUs (its module needs flash_attn).
    "peft": ("LoraConfig", "TaskType", "get_peft_model"),
    "peft.tuners": (),
    "peft.tuners.lora": ("LoraLayer",),
    "openrlhf.models.ring_attn_utils": ("gather_and_pad_tensor", "unpad_and_slice_tensor"),
}
OPENRLHF_MODULES = (
    "openrlhf.models.utils",
    "openrlhf.models.loss",
    "openrlhf.models.actor",
    "openrlhf.trainer.ppo_utils.experience_maker",
)


def _stand_in(name: str, classes: tuple[str, ...]) -> ModuleType:
    module = ModuleType(name)
    # transformers looks for deepspeed and peft by their spec, and then for their version: not there.
    module.__spec__ = ModuleSpec(name, None)
    for each in classes:
        setattr(module, each, type(each, (), {}))
    return module


def _package(name: str) -> ModuleType:
    """A package of the wheel whose own __init__ is not run."""
    package = ModuleType(name)
    package.__path__ = [str(FOLDER.joinpath(*name.split(".")))]
    return package


@contextlib.contextmanager
def _loading(host: str, packages, stand_ins):
    """`sys.modules` with the packages and stand-ins; as it was at the end, but for what others imported."""
    if not (FOLDER / host).is_dir():
        pytest.skip(f"{FOLDER.name}/{host} is missing; `make test` unpacks it there")
    before = dict(sys.modules)
    try:
        sys.modules.update({name: _package(name) for name in packages})
        sys.modules.update({name: _stand_in(name, names) for name, names in stand_ins.items()})
        yield
    finally:
        roots = {host, *(name.split(".")[0] for name in stand_ins)}
        for name in set(sys.modules) - set(before):
            if name.split(".")[0] in roots:
                del sys.modules[name]
        sys.modules.update(before)


def _loaded(host: str) -> dict[str, ModuleType]:
    return {n: m for n, m in sys.modules.items() if n == host or n.startswith(host + ".")}


@functools.cache
def verl() -> dict[str, ModuleType]:
    """verl's modules by name; skips where the wheel is not unpacked. None stays in `sys.modules`."""
    with _loading("verl", VERL_PACKAGES, VERL_STAND_INS):
        groupwise = importlib.import_module("verl.utils.groupwise")
        for name in ("as_torch_index", "group_mean_std"):  # what verl.utils exports to core_algos
            setattr(sys.modules["verl.utils"], name, getattr(groupwise, name))
        for name in VERL_MODULES:
            importlib.import_module(name)
        return _loaded("verl")


@functools.cache
def openrlhf() -> dict[str, ModuleType]:
    """OpenRLHF's modules by name; skips where the wheel is not unpacked. None stays in `sys.modules`."""
    with _loading("openrlhf", OPENRLHF_PACKAGES, OPENRLHF_STAND_INS):
        for name in OPENRLHF_MODULES:
            importlib.import_module(name)
        return _loaded("openrlhf")


@contextlib.contextmanager
def installed(modules: dict[str, ModuleType]):
    """`import host` finds these modules, and importlib.metadata the host's version."""
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        patch.syspath_prepend(str(FOLDER))
        yield modules
