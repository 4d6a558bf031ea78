"""What the fused backends cannot differentiate is an error, in every op the same one."""

import functools

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

_functorch = torch._C._functorch


def refuse_transforms(op: str, tensors: tuple, *, constant: bool, way_out: str) -> None:
    """NotImplementedError where a tangent, or a gradient by torch.func, would be lost without a word.

    The fused kernels have reverse mode alone, outside torch.func. `constant`: the outputs are constants
    to autograd, so that torch.func's reverse mode is right as it is.
    """
    forward = forward_ad._current_level >= 0
    if not forward and not torch._C._are_functorch_transforms_active():
        return
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


def needs(*tensors: Tensor | None) -> list[bool]:
    """For each, whether its gradient may be asked for, which it does not tell inside torch.func.vmap."""
    if not torch.is_grad_enabled():
        return [False] * len(tensors)
    mapped = torch._C._are_functorch_transforms_active()
    return [x is not None and (mapped or x.requires_grad) for x in tensors]


def trained(*tensors: Tensor | None) -> bool:
    """Whether a gradient may be asked for."""
    return any(needs(*tensors))


def refuse_graph(op: str) -> None:
    """NotImplementedError in a backward whose own gradient is asked for."""
    if torch.is_grad_enabled():
        raise NotImplementedError(
            f"{op}: the gradient of the gradient is not implemented; got create_graph=True"
        )


def once(op: str):
    """A backward that refuses create_graph=True: the gradient of its gradients does not exist.

    torch's once_differentiable lets a second derivative through, as zeros, where the upstream gradient is
    a constant.
    """

    def decorate(backward):
        @functools.wraps(backward)
        def wrapped(ctx, *grads):
            refuse_graph(op)
            return backward(ctx, *grads)

        return wrapped

    return decorate
