"""How an op reaches PyTorch: its schema, its fake and its autograd.

A C++ op has its schema from csrc/registration.cpp; a Python op (Triton, the linear heads) has it from its
annotations. Autograd is a kernel of our own on the dispatch key "Autograd": an autograd.Function that
calls the raw op below autograd. torch.library.register_autograd does the same, but fills in the defaults
of the schema at each call, in time quadratic in the number of arguments: 150 us at 26 of them.
"""

import operator
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function

from fastrlhf.ops import _autograd

_LIBRARY = torch.library.Library("fastrlhf", "FRAGMENT")
_below_autograd = torch._C._AutoDispatchBelowAutograd
_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_profiler_enabled = torch.autograd._profiler_enabled


def register(
    name: str,
    fake: Callable,
    *,
    body: Callable | None = None,
    prototype: Callable | None = None,
    mutates: tuple[str, ...] = (),
    wrt: tuple[int, ...] = (),
    **autograd,
) -> Callable:
    """Registers `fastrlhf::<name>`; returns what calls it, in eager mode past the dispatcher's first half.

    Args:
        name: of the raw op. Its schema has no defaults.
        fake: makes outputs of the right shapes and dtypes.
        body: an op in Python, with annotated arguments; None for a C++ op. In place of a tensor that is
            not wanted it and its fake return None, which the op makes an empty one.
        prototype: a function with the annotations instead, where `body` has other arguments behind them.
        mutates: the arguments that `body` writes to.
        wrt, autograd: as in `differentiable`. Without `wrt` the outputs are constants.
    """
    if body is not None:
        schema = torch.library.infer_schema(prototype or body, mutates_args=mutates)
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, _tensors_only(body), "CompositeExplicitAutograd")
        fake = _tensors_only(fake)
    torch.library.register_fake(f"fastrlhf::{name}", fake)
    raw = getattr(torch.ops.fastrlhf, name).default
    run = raw._op
    lists = "[]" in str(raw._schema)

    def below(*arguments):
        with _below_autograd():
            # Nobody looks on: the way of a Python op through the dispatcher would only cost time.
            if body is not None and _nobody_looks(arguments, lists):
                return body(*arguments)
            return run(*arguments)

    kernel = below
    if wrt:
        kernel = differentiable(below, wrt=wrt, **autograd)
        _LIBRARY.impl(name, kernel if body is None else _tensors_only(kernel), "Autograd")

    def traced(*arguments):
        """What traces or transforms a call must meet the op itself."""
        if wrt:
            return raw(*arguments)
        with torch.no_grad():
            return raw(*arguments)

    def call(*arguments):
        return kernel(*arguments) if plain() else traced(*arguments)

    # For who has asked `plain` already; for who wants no gradient; and for the body of another op, which
    # is below autograd as it is.
    call.kernel, call.below, call.inside = kernel, below, below if body is not None else run
    return call


def plain() -> bool:
    """Whether nothing traces or transforms what is being called."""
    return not torch.compiler.is_compiling() and not _transforms_active()


def _tensors_only(body):
    def whole(*arguments):
        out = body(*arguments)
        if not isinstance(out, tuple):
            return out
        like = next(x for x in out if x is not None)
        return tuple(like.new_empty(0) if x is None else x for x in out)

    return whole


# Neither a fake nor another tensor with a dispatch of its own.
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int, float, str, list))


def _nobody_looks(arguments, lists: bool) -> bool:
    """Whether no mode, subclass or profiler wants to see an op on its way."""
    if _dispatch_modes() or _profiler_enabled():
        return False
    if lists:
        for x in arguments:
            if type(x) is list and not _PLAIN.issuperset(map(type, x)):
                return False
    return _PLAIN.issuperset(map(type, arguments))


def differentiable(
    body: Callable,
    *,
    op: str,
    wrt: tuple[int, ...],
    gives: int = 1,
    setup: Callable | None = None,
    backward: Callable | None = None,
    create_graph: bool = False,
) -> Callable:
    """`body` with a gradient. Where none is asked for, no graph is kept.

    Args:
        body: of any arguments; returns a tensor, or a tuple of more than one.
        op: the public op, for messages.
        wrt: positions of the arguments that may want a gradient: tensors or None.
        gives: how many of the first outputs are differentiable; the others are constants.
        setup: (ctx, arguments, outputs) keeps what the backward needs; None with `backward` None.
        backward: (ctx, one gradient or None for each of `gives`, not all None) -> a gradient or None for
            each of `wrt`; ctx.needs_input_grad begins with those of `wrt`. None: there is no gradient,
            and a backward says so.
        create_graph: whether the backward is made of ops that say themselves that they have no gradient;
            else create_graph=True is refused.
    """
    nothing = (None,) * (len(wrt) + 2)

    # The other arguments and the constant outputs pass beside autograd, where each costs time.
    def forward(ctx, *inputs):
        arguments, constants = inputs[-2:]
        outputs = body(*arguments)
        ctx.set_materialize_grads(False)
        if setup is not None:
            setup(ctx, arguments, outputs)
        if isinstance(outputs, Tensor):
            return outputs
        constants.extend(outputs[gives:])
        return outputs[0] if gives == 1 else outputs[:gives]

    def node_backward(ctx, *grads):
        if backward is None:
            _autograd.refuse(op)
        for grad in grads:
            if grad is not None:
                break
        else:
            return nothing
        if not create_graph and torch.is_grad_enabled():
            _autograd.refuse(op, "; got create_graph=True")
        return *backward(ctx, *grads), None, None

    methods = {"forward": staticmethod(forward), "backward": staticmethod(node_backward)}
    node = type(Function)(op, (Function,), methods)
    # Function.apply in Python sees to torch.func and setup_context, which never meet here.
    apply = super(Function, node).apply
    pick = operator.itemgetter(*wrt) if len(wrt) > 1 else lambda arguments: (arguments[wrt[0]],)

    def call(*arguments):
        if not torch.is_grad_enabled():
            return body(*arguments)
        inputs = pick(arguments)
        for x in inputs:
            if x is not None and x.requires_grad:
                break
        else:
            return body(*arguments)
        constants = []
        out = apply(*inputs, arguments, constants)
        if not constants:
            return out
        return (out, *constants) if gives == 1 else (*out, *constants)

    return call
