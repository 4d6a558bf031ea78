"""Dropout and other noise of a transformer: its own is off, and residual dropout is placed by measurement.

Shapes: N tokens, H hidden size.

A decoder layer adds branches (attention, MLP) to its input x:

    y = x + k1 * b1 + k2 * b2 + ...

Residual dropout drops elements of b1, b2, ... before they are added. The modules that produce them have other names in
every architecture, and a norm may follow an attention or precede it under one name. So each child of a layer is
measured: with the later branches set to zero, adding d to the child's output must change y by k * d. If y equals x with
all branches set to zero, no branch was missed.
"""

from collections.abc import Iterable
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from fastrlhf.errors import UserError

_TOLERANCE = 1e-3  # of the norm; a wrong place differs by its whole size


def silence(model: nn.Module) -> None:
    """Turn off everything random in a model: dropout, layer drop, router jitter. Gradients are unaffected.

    Classes of transformers do the same computation in both modes but for that noise, so they stay in evaluation mode.
    Code from a model folder may not (DeepSeek-V2's computes its experts without gradients there): it keeps its mode,
    and its dropout probabilities are set to 0.
    """
    if type(model).__module__.startswith("transformers."):
        model.eval()
        return
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0


def add_residual_dropout(owner: nn.Module, model, probability: float) -> None:
    """Drop elements of every residual branch of `model` with `probability` while `owner` is in training mode.

    Args:
        owner: the module whose mode decides.
        model: a transformers model on its final device, with unsharded weights.
        probability: in [0, 1); 0 does nothing.

    Raises:
        UserError: the layers of the model are not sums of their input and the outputs of their children.
    """
    if probability == 0:
        return

    def drop(module, args, output):
        if not owner.training:
            return None
        return _with_first(output, nn.functional.dropout(_first(output), probability))

    for branch in residual_branches(model):
        branch.register_forward_hook(drop)


@torch.no_grad()
def residual_branches(model) -> list[nn.Module]:
    """The modules whose outputs the layers of a decoder add to their inputs.

    Raises:
        UserError: as in `add_residual_dropout`.
    """
    names = set(model._no_split_modules or ())
    layers = [m for m in model.modules() if type(m).__name__ in names]
    calls = _calls(model, layers)
    found: dict[tuple, list[str]] = {}  # layers of one kind are measured once
    branches = []
    for layer in calls:  # a layer that text does not reach is of a vision tower
        kind = (type(layer), *((n, type(m)) for n, m in layer.named_children()))
        if kind not in found:
            found[kind] = _measure(layer, *calls[layer])
        branches += [layer.get_submodule(name) for name in found[kind]]
    if not branches or [] in found.values():
        raise UserError(
            f"dropout: residual dropout cannot be placed in a {type(model).__name__}, whose layers are not sums "
            "of their input and branches; set dropout to 0"
        )
    return branches


def _measure(layer: nn.Module, args: tuple, kwargs: dict, order: list[str]) -> list[str]:
    """Names of the children of `layer` that are branches; [] if it is no sum of its input and branches.

    Args:
        args, kwargs: of a call.
        order: the names of the children in the order of their calls.
    """
    x = _first(args) if args else kwargs["hidden_states"]
    children = dict(layer.named_children())
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(x.shape, generator=generator).to(x) * x.std()
    branches: list[str] = []

    def run(changed: str | None = None) -> torch.Tensor:
        with ExitStack() as stack:
            for name in branches:
                stack.enter_context(_output(children[name], lambda y: torch.zeros_like(y)))
            if changed is not None:
                stack.enter_context(_output(children[changed], lambda y: y + delta.view(y.shape)))
            return _first(layer(*args, **kwargs))

    for name in reversed(order):
        try:
            change = run(name) - run()
        except RuntimeError:  # an output of another shape is no branch
            continue
        factor = (change * delta).sum() / delta.square().sum()
        error = (change - factor * delta).norm()
        if factor.abs() > 1e-6 and error <= _TOLERANCE * (factor * delta).norm():
            branches.append(name)
    return branches if (run() - x).norm() <= _TOLERANCE * x.norm() else []


def _calls(model, layers: Iterable[nn.Module]) -> dict[nn.Module, tuple]:
    """(args, kwargs, names of the children in the order of their calls) of each layer, for a few tokens."""
    calls: dict[nn.Module, tuple] = {}
    with ExitStack() as stack:
        for layer in layers:

            def begin(module, args, kwargs):
                calls[module] = (args, kwargs, [])

            handle = layer.register_forward_pre_hook(begin, with_kwargs=True)
            stack.callback(handle.remove)
            for name, child in layer.named_children():

                def note(module, args, kwargs, layer=layer, name=name):
                    if layer in calls and name not in calls[layer][2]:
                        calls[layer][2].append(name)

                handle = child.register_forward_pre_hook(note, with_kwargs=True)
                stack.callback(handle.remove)
        device = next(model.parameters()).device
        model(input_ids=torch.arange(8, device=device)[None], use_cache=False)
    return calls


@contextmanager
def _output(module: nn.Module, change):
    """Replace the (first) output of `module` by `change` of it."""
    handle = module.register_forward_hook(
        lambda module, args, output: _with_first(output, change(_first(output)))
    )
    try:
        yield
    finally:
        handle.remove()


def _first(output):
    return output[0] if isinstance(output, tuple | list) else output


def _with_first(output, first):
    return (first, *output[1:]) if isinstance(output, tuple | list) else first
