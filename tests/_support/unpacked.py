"""Imports the unmodified modules of verl and OpenRLHF that `make test` unpacks into build/oracles.

Neither can be installed beside fastrlhf: verl pins an older transformers and needs ray; OpenRLHF pins deepspeed, ray
and vllm. Two measures load the modules under test without them. The `__init__` files of the packages, which import ray,
hydra, vllm and models, do not run. Missing modules that are imported at module level are replaced by stubs with empty
classes; the comment beside each stub says what it is used for.
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
VERL_STUBS = {
    "omegaconf": ("DictConfig",),  # an annotation
    "tensordict": ("TensorDict",),  # an annotation
    "verl.trainer.config": ("AlgoConfig",),  # an isinstance check
    "verl.workers.config": ("ActorConfig",),  # an annotation
}
VERL_MODULES = (
    "verl.utils.torch_functional",
    "verl.trainer.ppo.core_algos",
    "verl.utils.experimental.torch_functional",
    # verl imports its Triton kernels in the call, so the module loads on a CPU, but its function does not run.
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
OPENRLHF_STUBS = {
    "deepspeed": (),  # set_z3_leaf_modules, for ZeRO-3
    "ray": (),  # remote calls between workers
    "openrlhf.trainer.ray.launcher": ("RayActorGroup",),  # an annotation; imports ray and deepspeed
    # actor.py: LoRA, and ring attention (which needs flash_attn).
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


def _stub(name: str, classes: tuple[str, ...]) -> ModuleType:
    module = ModuleType(name)
    # transformers looks up the spec of deepspeed and peft, then their version, which does not exist.
    module.__spec__ = ModuleSpec(name, None)
    for each in classes:
        setattr(module, each, type(each, (), {}))
    return module


def _package(name: str) -> ModuleType:
    """A package of the wheel, without running its __init__."""
    package = ModuleType(name)
    package.__path__ = [str(FOLDER.joinpath(*name.split(".")))]
    return package


@contextlib.contextmanager
def _loading(package: str, packages, stubs):
    """Adds the packages and stubs to `sys.modules`, and removes them and the package's modules afterwards."""
    if not (FOLDER / package).is_dir():
        pytest.skip(f"{FOLDER.name}/{package} is missing; `make test` unpacks it there")
    before = dict(sys.modules)
    try:
        sys.modules.update({name: _package(name) for name in packages})
        sys.modules.update({name: _stub(name, names) for name, names in stubs.items()})
        yield
    finally:
        roots = {package, *(name.split(".")[0] for name in stubs)}
        for name in set(sys.modules) - set(before):
            if name.split(".")[0] in roots:
                del sys.modules[name]
        sys.modules.update(before)


def _loaded(package: str) -> dict[str, ModuleType]:
    return {n: m for n, m in sys.modules.items() if n == package or n.startswith(package + ".")}


@functools.cache
def verl() -> dict[str, ModuleType]:
    """verl's modules by name; skips the test if the wheel is not unpacked. `sys.modules` is unchanged."""
    with _loading("verl", VERL_PACKAGES, VERL_STUBS):
        groupwise = importlib.import_module("verl.utils.groupwise")
        for name in ("as_torch_index", "group_mean_std"):  # core_algos imports them from verl.utils
            setattr(sys.modules["verl.utils"], name, getattr(groupwise, name))
        for name in VERL_MODULES:
            importlib.import_module(name)
        return _loaded("verl")


@functools.cache
def openrlhf() -> dict[str, ModuleType]:
    """OpenRLHF's modules by name; skips the test if the wheel is not unpacked. `sys.modules` is unchanged."""
    with _loading("openrlhf", OPENRLHF_PACKAGES, OPENRLHF_STUBS):
        for name in OPENRLHF_MODULES:
            importlib.import_module(name)
        return _loaded("openrlhf")


@contextlib.contextmanager
def installed(modules: dict[str, ModuleType]):
    """Makes `import` find these modules, and importlib.metadata their version, until the block ends."""
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        patch.syspath_prepend(str(FOLDER))
        yield modules
