"""Sharded weights (FSDP2): gathering and distributing them. On unsharded tensors every function is the identity.

Checkpoints hold full tensors, so a run can stop under FSDP2 and resume without it, and the other way round.
"""

from collections.abc import Callable

import torch
from accelerate.state import AcceleratorState
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor


def full_state(tree, keep: bool = True):
    """A nested state (dicts, lists, tensors) with each sharded tensor gathered to the CPU.

    A collective: every rank must call it. A rank with `keep` False takes part in the gathers and gets None for
    each sharded tensor, so that one rank alone pays for the memory.
    """
    gathered: dict[tuple, torch.Tensor | None] = {}  # by storage: tied weights stay one tensor

    def visit(x):
        if isinstance(x, dict):
            return {k: visit(v) for k, v in x.items()}
        if isinstance(x, list | tuple):
            return [visit(v) for v in x]
        if not isinstance(x, DTensor):
            return x
        local = x.to_local()
        key = (local.untyped_storage()._cdata, local.storage_offset(), x.shape)
        if key not in gathered:
            full = x.detach().full_tensor()
            gathered[key] = full.cpu() if keep else None
        return gathered[key]

    return visit(tree)


def full_tensor(x: torch.Tensor) -> torch.Tensor:
    """The full tensor of a sharded one, on its own device. A collective: every rank must call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def shard_like(x: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a full tensor `x`, laid out as `reference` is. Needs no communication."""
    if not isinstance(reference, DTensor):
        return x
    x = x.to(reference.device)
    return distribute_tensor(x, reference.device_mesh, reference.placements, src_data_rank=None)


def load_state_dict(module: torch.nn.Module, state: dict) -> None:
    """`module.load_state_dict` for a state dict of full tensors."""
    own = module.state_dict()
    state = {k: shard_like(v, own[k]) if k in own else v for k, v in state.items()}
    module.load_state_dict(state)


def with_full_weights(module: torch.nn.Module, function: Callable):
    """Call `function()` while this rank holds every weight of `module` unsharded.

    For code that calls submodules directly, such as a sampler. The weights are gathered once, so ranks may run
    different numbers of forwards inside.
    """
    if not isinstance(module, FSDPModule):
        return function()
    layers = [m for m in module.modules() if isinstance(m, FSDPModule) and m is not module]

    def body():
        for layer in layers:
            layer.set_reshard_after_forward(False, recurse=False)
            layer.unshard()
        return function()

    # FSDP2 requires a forward of the root before one of its layers, so `body` runs as a forward of the root.
    module.with_full_weights = body
    register_fsdp_forward_method(module, "with_full_weights")
    try:
        return module.with_full_weights()
    finally:
        del module.with_full_weights
        configured = AcceleratorState().fsdp_plugin.reshard_after_forward
        for layer in layers:
            layer.set_reshard_after_forward(configured, recurse=False)
            layer.reshard()
        module.reshard()
