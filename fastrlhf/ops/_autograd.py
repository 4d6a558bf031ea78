"""What the fused backends cannot differentiate is an error, in every op the same one."""

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

_functorch = torch._C._functorch
_transforms_active = torch._C._are_functorch_transforms_active


def refuse_transforms(op: str, tensors: tuple, *, constant: bool, way_out: str) -> None:
    """NotImplementedError where a tangent, or a gradient by torch.func, would be lost without a word.

    The fused kernels have reverse mode alone, outside torch.func. `constant`: the outputs are constants
    to autograd, so that torch.func's reverse mode is right as it is.
    """
    forward = forward_ad._current_level >= 0
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            continue
        tracked = False
        while _functorch.is_functorch_wrapped_tensor(tensor):
            tracked |= _functorch.is_gradtrackingtensor(tensor)
            tensor = _functorch.get_unwrapped(tensor)
        if forward and (tracked or forward_ad.unpack_dual(tensor).tangent is not None):
            what = "forward-mode AD (torch.func.jvp, jacfwd, hessian; dual tensors)"
        elif tracked and not constant:
            what = "a gradient by torch.func (grad, vjp, jacrev)"
        else:
            continue
        raise NotImplementedError(f"{op}: {what} is not implemented; use {way_out}")


def transforming() -> bool:
    """Whether a tensor may carry a tangent or belong to a transform of torch.func."""
    return forward_ad._current_level >= 0 or _transforms_active()


def needs(*tensors: Tensor | None) -> list[bool]:
    """For each, whether its gradient may be asked for, which it does not tell inside torch.func.vmap."""
    if not torch.is_grad_enabled():
        return [False] * len(tensors)
    mapped = _transforms_active()
    found = []
    for x in tensors:
        found.append(x is not None and (mapped or x.requires_grad))
    return found


def trained(*tensors: Tensor | None) -> bool:
    """Whether a gradient may be asked for."""
    if not torch.is_grad_enabled():
        return False
    for x in tensors:
        if x is not None and x.requires_grad:
            return True
    return _transforms_active()


def refuse(op: str, got: str = "") -> None:
    """NotImplementedError: a kernel's gradient has no gradient.

    torch's once_differentiable lets a second derivative through, as zeros, where the upstream gradient is
    a constant.
    """
    raise NotImplementedError(f"{op}: the gradient of the gradient is not implemented{got}")
