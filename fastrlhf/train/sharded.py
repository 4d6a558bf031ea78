"""FSDP2: weights whose pieces lie on different ranks. Elsewhere every function here hands back what it is given.

A checkpoint holds whole tensors: one written under FSDP2 continues without it, and the other way round.
"""

import torch
from accelerate.state import AcceleratorState
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tree, keep: bool = True):
    """A state (dicts, lists, tensors) with each sharded tensor gathered; on the CPU, where it is kept.

    Every rank must call it; `keep` False: take part in the gathers and forget their results.
    """
    known: dict[tuple, torch.Tensor | None] = {}  # tied weights stay one tensor

    def visit(x):
        if isinstance(x, dict):
            return {k: visit(v) for k, v in x.items()}
        if isinstance(x, list | tuple):
            return [visit(v) for v in x]
        if not isinstance(x, DTensor):
            return x
        local = x.to_local()
        key = (local.untyped_storage()._cdata, local.storage_offset(), x.shape)
        if key not in known:
            full = x.detach().full_tensor()
            known[key] = full.cpu() if keep else None
        return known[key]

    return visit(tree)


def full(x: torch.Tensor) -> torch.Tensor:
    """A whole tensor on its own device; every rank must call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def like(x: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """This rank's piece of a whole tensor, laid out as `own` is; the ranks need not talk."""
    if not isinstance(own, DTensor):
        return x
    x = x.to(own.device)
    return distribute_tensor(x, own.device_mesh, own.placements, src_data_rank=None)


def load(module: torch.nn.Module, state: dict) -> None:
    """load_state_dict of whole tensors."""
    own = module.state_dict()
    module.load_state_dict({k: like(v, own[k]) if k in own else v for k, v in state.items()})


def with_whole_weights(module: torch.nn.Module, function):
    """function() while every weight is whole on this rank: for code that calls the parts of a module itself.

    Gathered once: the ranks may then run different numbers of forwards, as samplers do.
    """
    if not isinstance(module, FSDPModule):
        return function()
    layers = [m for m in module.modules() if isinstance(m, FSDPModule) and m is not module]

    def body():
        for layer in layers:
            layer.set_reshard_after_forward(False, recurse=False)
            layer.unshard()
        return function()

    # As a forward of the root: FSDP2 insists on meeting the root before its layers.
    module.with_whole_weights = body
    register_fsdp_forward_method(module, "with_whole_weights")
    try:
        return module.with_whole_weights()
    finally:
        del module.with_whole_weights
        configured = AcceleratorState().fsdp_plugin.reshard_after_forward
        for layer in layers:
            layer.set_reshard_after_forward(configured, recurse=False)
            layer.reshard()
        module.reshard()
