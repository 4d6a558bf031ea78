"""The path of a call: schema, registration, autograd, and the choice of the backend.

`register` defines the raw op `fastrlhf::<name>` from its schema, the one place for C++, CUDA, Triton and Python.
C++ and CUDA implement it in csrc (STABLE_TORCH_LIBRARY_IMPL, loaded before or after the definition). A Triton
kernel becomes a twin of the same schema, fake and autograd: my_op_fwd and my_op_triton_fwd.

Autograd is our own kernel on the dispatch key "Autograd": an autograd.Function that calls the raw op below
autograd. torch.library.register_autograd does the same but fills in schema defaults on every call, in time
quadratic in the number of arguments: 150 us for 26 arguments.
"""

import contextlib
import functools
import importlib
import operator
import re
import threading
from collections.abc import Callable, Sequence

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling
from torch.utils import _python_dispatch

from fastrlhf import _namespace
from fastrlhf.ops import _agreement, _backend, _library

_LIBRARY = torch.library.Library("fastrlhf", "FRAGMENT")
_below_autograd = torch._C._AutoDispatchBelowAutograd
_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_mode_stack = _python_dispatch._get_current_dispatch_mode_stack
_has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
_profiler_enabled = torch.autograd._profiler_enabled
_functorch = torch._C._functorch
_autocasts = torch.is_autocast_enabled


# ---- registration -------------------------------------------------------------------------------


def register(
    schema: str, fake: Callable, *, op: str = "", triton: str = "", **autograd
) -> dict[str, Callable]:
    """Defines a raw op that C++ and CUDA implement, and its Triton twin; returns {backend: how to call it}.

    Args:
        schema: "name(Tensor x, ...) -> ...", without defaults.
        fake: makes outputs of the right shapes and dtypes.
        op: the public op that needs this kernel. A backend runs `op` if it has every kernel registered for it.
            Empty: a part that only some backends have, and not Triton.
        triton: "module.function" under fastrlhf.kernels, which takes the arguments of the schema; empty: none.
        autograd: as in `differentiable`. Without `wrt` the outputs are constants.

    A call is a function of the schema's arguments with two further forms: `.below` records no gradient, `.raw`
    also omits the guard against autograd, for the body of another op, which runs below autograd already.
    """
    _library.check_schema(schema)
    cpp = _define(schema, fake, None, op, autograd, "cpu")
    calls = {"cpu": cpp, "cuda": cpp}
    if triton:
        name = _name(schema)
        twin = name.replace(op, f"{op}_triton") if op in name else f"{name}_triton"
        twin += schema[len(name) :]
        calls["triton"] = _define(twin, fake, _triton_kernel(triton), op, autograd, "triton")
    if op:
        name = f"fastrlhf::{_name(schema)}"
        has = [key.lower() for key in ("CPU", "CUDA") if _has_kernel(name, key)]
        _backend.provide(op, [*has, *calls.keys() - {"cpu", "cuda"}], gradient=bool(autograd))
    return calls


def register_python(
    schema: str, fake: Callable, body: Callable, *, op: str | Callable, **autograd
) -> Callable:
    """Defines a raw op with a body in Python; returns how to call it, as `register` does for a backend.

    `op`: the public op for messages, or a function of the arguments that returns it. In place of an unneeded tensor
    `body` and `fake` return None, which the op turns into an empty tensor.
    """
    return _define(schema, fake, body, op, autograd)


def _define(schema, fake, body, op, autograd, backend=None):
    name = _name(schema)
    with _namespace.defining():
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    if body is not None:
        guarded = without_autocast(body)
        _LIBRARY.impl(name, _tensors_only(guarded), "CompositeExplicitAutograd")
        fake = _tensors_only(fake)
    torch.library.register_fake(f"fastrlhf::{name}", fake)
    raw = getattr(torch.ops.fastrlhf, name).default
    run = raw._op
    types = [str(x.type) for x in raw._schema.arguments]
    lists = [i for i, kind in enumerate(types) if "List" in kind and "Tensor" in kind]

    def below_cpp(*arguments):
        with _below_autograd():
            return run(*arguments)

    def below_python(*arguments):
        with _below_autograd():
            # The dispatcher's path to a Python op is slow; an unobserved call can skip it.
            if not _unobserved(arguments, lists):
                return run(*arguments)
            return (guarded if _autocasts("cpu") or _autocasts("cuda") else body)(*arguments)

    def traced(*arguments):
        """For tracing and transforms, which must see the op itself."""
        if autograd:
            return raw(*arguments)
        with torch.no_grad():
            return raw(*arguments)

    if lists and "!" not in schema:
        torch.library.register_vmap(f"fastrlhf::{name}", _over_batch(raw, op))
    below = below_cpp if body is None else below_python
    below.__name__ = name  # of the node, if `op` is a function
    options = {"op": op, "backend": backend, "names": [x.name for x in raw._schema.arguments]}
    if autograd:
        kernel = differentiable(below, **options, **autograd)
        _LIBRARY.impl(name, kernel if body is None else _tensors_only(kernel), "Autograd")
    call = differentiable(below, **options, traced=traced, **autograd)
    call.below, call.raw = below, run if body is None else below
    return call


def _over_batch(raw, op):
    """vmap of a raw op as a loop of calls: torch's own rule does not support lists of tensors."""

    def pick(x, dim, i):
        if isinstance(dim, (list, tuple)):
            return [pick(one, d, i) for one, d in zip(x, dim, strict=True)]
        return x if dim is None else x.select(dim, i)

    def rule(info, in_dims, *arguments):
        if info.batch_size == 0:
            name = op if isinstance(op, str) else op(arguments)
            raise RuntimeError(f"{name}: vmap over a dimension of size 0 is not implemented")
        each = [
            raw(*(pick(x, dim, i) for x, dim in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        outputs = tuple(torch.stack(column) for column in zip(*each, strict=True))
        return outputs, (0,) * len(outputs)

    return rule


def _name(schema):
    return schema[: schema.index("(")]


# Triton's modules import each other in circles: two threads that import them at once see them half done.
_importing = threading.RLock()


def _triton_kernel(where):
    """Calls "module.function"; the module, and Triton with it, is imported when the op first runs."""
    home, function = where.split(".")
    module = None

    def body(*arguments):
        nonlocal module
        if module is None:
            with _importing:
                module = importlib.import_module(f"fastrlhf.kernels.{home}")
        return getattr(module, function)(*map(_in_memory, arguments))

    return body


def _in_memory(x):
    """The kernels read memory, in which the sign of a negative view is not."""
    if isinstance(x, list):
        return [_in_memory(y) for y in x]
    return x.resolve_neg() if isinstance(x, Tensor) else x


def _tensors_only(body):
    def whole(*arguments):
        out = body(*arguments)
        if not isinstance(out, tuple):
            return out
        like = next(x for x in out if x is not None)
        return tuple(like.new_empty(0) if x is None else x for x in out)

    return whole


# Types whose values no tracer, tensor subclass or transform can see.
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int, float, str, list))


def _unobserved(arguments, lists) -> bool:
    """Whether no mode, subclass or profiler can see an op that is called with these arguments.

    lists: the places of the lists of tensors.
    """
    if _dispatch_modes() or _profiler_enabled():
        return False
    for i in lists:
        if arguments[i] and not _PLAIN.issuperset(map(type, arguments[i])):
            return False
    if not _PLAIN.issuperset(map(type, arguments)):
        return False
    for x in arguments:
        if x is not None:
            return x.device.type != "meta"  # there only the fake can run
    return True


def without_autocast(body: Callable) -> Callable:
    """`body` with autocast disabled, which would round GEMMs that must stay fp32."""

    @functools.wraps(body)
    def wrapped(*arguments):
        first = next(x for x in arguments if isinstance(x, Tensor))
        device = "cpu" if first.is_cpu else first.device.type
        if not _autocasts(device):
            return body(*arguments)
        with torch.autocast(device, enabled=False):
            return body(*arguments)

    return wrapped


# Selective activation checkpointing and torch.autograd.graph.allow_mutation_on_saved_tensors, by name: the classes are
# private in torch.
_KEEPING_MODES = {
    "_CachingTorchDispatchMode",
    "_CachedTorchDispatchMode",
    "_CloneArgBeforeMutateMode",
}


def kept() -> bool:
    """Whether a mode keeps what a call outside of a registered op computes or overwrites."""
    if not _dispatch_modes():
        return False
    return any(type(mode).__name__ in _KEEPING_MODES for mode in _mode_stack())


def unkept(body: Callable) -> Callable:
    """`body`, which is not a registered op, hidden from the modes that keep its intermediate results.

    A selective checkpoint would keep the result of a GEMM, which `body` overwrites, and its second forward would skip a
    kernel that writes to an argument. They do not see the inside of a registered op either.
    """

    @functools.wraps(body)
    def wrapped(*arguments):
        if not kept():
            return body(*arguments)
        with _without_keeping_modes():
            return body(*arguments)

    return wrapped


@contextlib.contextmanager
def _without_keeping_modes():
    others = [mode for mode in _mode_stack() if type(mode).__name__ not in _KEEPING_MODES]
    with _python_dispatch._disable_current_modes():
        for mode in others:
            _python_dispatch._push_mode(mode)
        try:
            yield
        finally:
            for mode in reversed(others):
                _python_dispatch._pop_mode(getattr(mode, "_mode_key", None))


# ---- autograd -----------------------------------------------------------------------------------


def on_all_ranks(op: Callable) -> Callable:
    """Decorator of an op with a keyword `process_group`: an error that one rank raises is raised on all."""

    @functools.wraps(op)
    def call(*arguments, **options):
        group = options.get("process_group")
        if group is None or is_compiling():
            return op(*arguments, **options)
        return _agreement.agreed(op, group, arguments, options)

    return call


def differentiable(
    body: Callable,
    *,
    op: str | Callable,
    wrt: tuple[int, ...] = (),
    gives: int = 1,
    setup: Callable | None = None,
    backward: Callable | None = None,
    create_graph: bool = False,
    backend: str | None = None,
    names: Sequence[str] = (),
    traced: Callable | None = None,
) -> Callable:
    """`body` with a gradient. A call keeps a graph only if an argument requires grad.

    Args:
        body: takes any arguments and returns a tensor, or a tuple of several.
        op: the public op, or a function of the arguments that returns it; for messages.
        wrt: positions of the arguments that may require grad, which are tensors or None. Empty: no gradient.
        gives: the first `gives` outputs are differentiable, the others are constants.
        setup: (ctx, arguments, outputs) saves what the backward needs, and ctx.op if `op` is a function; None with
            `backward` None.
        backward: (ctx, a gradient or None for each of `gives`, not all None) -> a gradient or None for
            each of `wrt`; ctx.needs_input_grad begins with those of `wrt`. None: a backward raises.
        create_graph: True if the backward is made of registered ops, which raise on a second derivative themselves.
            Otherwise create_graph=True raises.
        backend: for `backward`, as ctx.backend.
        names: of the arguments, for messages.
        traced: runs instead of all this while something traces or transforms the call.
    """
    apply = pick = None
    if wrt:
        apply = _node(body, op, wrt, gives, setup, backward, create_graph, backend).apply
        # By a slice if there is one: itemgetter of one index returns no tuple.
        one = slice(wrt[0], wrt[0] + 1)
        pick = operator.itemgetter(*wrt) if len(wrt) > 1 else operator.itemgetter(one)

    def call(*arguments):
        if traced is not None and is_compiling():
            return traced(*arguments)
        try:
            if traced is not None and _transforms_active():
                return traced(*arguments)
            if apply is None or not torch.is_grad_enabled():
                return body(*arguments)
            inputs = pick(arguments)
            for x in inputs:
                if x is not None and x.requires_grad:
                    break
            else:
                return body(*arguments)
            constants = []
            out = apply(*inputs, arguments, constants)
        except RuntimeError as error:
            found = _as_user_error(error, op, names, arguments)
            if found is None:
                raise
            raise found from None
        if not constants:
            return out
        return (out, *constants) if gives == 1 else (*out, *constants)

    return call


def _node(body, op, wrt, gives, setup, backward, create_graph, backend):
    nothing, named = (None,) * (len(wrt) + 2), isinstance(op, str)

    # Other arguments and constant outputs bypass autograd, which spends time on each.
    def forward(ctx, *inputs):
        arguments, constants = inputs[-2:]
        outputs = body(*arguments)
        ctx.set_materialize_grads(False)
        ctx.backend = backend
        if setup is not None:
            setup(ctx, arguments, outputs)
        if isinstance(outputs, Tensor):
            return outputs
        constants.extend(outputs[gives:])
        return outputs[0] if gives == 1 else outputs[:gives]

    def node_backward(ctx, *grads):
        if backward is None:
            refuse_second_order(op if named else ctx.op)
        for grad in grads:
            if grad is not None:
                break
        else:
            return nothing
        if not create_graph and torch.is_grad_enabled():
            refuse_second_order(op if named else ctx.op, "; got create_graph=True")
        return *backward(ctx, *grads), None, None

    methods = {"forward": staticmethod(forward), "backward": staticmethod(node_backward)}
    name = op if named else body.__name__
    node = type(Function)(name, (Function,), methods)
    # Function.apply in Python handles torch.func and setup_context, which do not occur here.
    node.apply = super(Function, node).apply
    return node


def refuse_second_order(op: str, got: str = "") -> None:
    """NotImplementedError: the gradient of a kernel has no gradient.

    torch's once_differentiable does not raise where the upstream gradient is a constant; it returns zeros.
    """
    raise NotImplementedError(f"{op}: the gradient of the gradient is not implemented{got}")


def needs(*tensors: Tensor | None) -> list[bool]:
    """For each, whether its gradient may be needed. (Inside torch.func.vmap, requires_grad is not reliable.)"""
    if not torch.is_grad_enabled():
        return [False] * len(tensors)
    mapped = _transforms_active()
    found = []
    for x in tensors:
        found.append(x is not None and (mapped or x.requires_grad))
    return found


def trained(*tensors: Tensor | None) -> bool:
    """Whether the gradient of any may be needed."""
    if not torch.is_grad_enabled():
        return False
    for x in tensors:
        if x is not None and x.requires_grad:
            return True
    return _transforms_active()


# ---- errors -------------------------------------------------------------------------------------

# torch's own message, where a tensor made under torch.inference_mode would be saved for the backward.
_INFERENCE = "Inference tensors cannot be saved for backward"
# csrc/common/tensor.h starts a user error's message with this: the stable ABI throws one type of exception.
_USER_ERROR = re.compile(r"fastrlhf (ValueError|TypeError): ([^\n]*)")
_ERRORS = {"ValueError": ValueError, "TypeError": TypeError}


def value_error(message: str) -> RuntimeError:
    """The error to raise in an op's body for a bad value; the caller gets ValueError("<public op>: <message>")."""
    return RuntimeError(f"fastrlhf ValueError: {message}")


def _as_user_error(error, op, names, arguments):
    """The Python error for a message that a user can act on, naming the public op; None for another message."""
    text = str(error)
    op = op if isinstance(op, str) else op(arguments)
    if found := _USER_ERROR.search(text):
        return _ERRORS[found[1]](f"{op}: {found[2]}")
    if _INFERENCE in text:
        for name, x in zip(names, arguments, strict=False):
            if isinstance(x, Tensor) and x.is_inference():
                return _inference_error(op, name.removeprefix("row_"))
    return None


def refuse_inference(op: str, **tensors: Tensor | None) -> None:
    """For tensors in a list, whose names `differentiable` does not know."""
    for name, x in tensors.items():
        if x is not None and x.is_inference():
            raise _inference_error(op, name)


def _inference_error(op, name):
    return ValueError(
        f"{op}: {name} must not be an inference tensor where a gradient is recorded "
        "(clone it outside of torch.inference_mode); got one"
    )


# ---- choice -------------------------------------------------------------------------------------


def choose(op: str, backend: str, tensor: Tensor, *others: Tensor | None) -> str:
    """The backend that runs `op` on `tensor`; ValueError for one that cannot run here.

    `others`: the op's other differentiable tensors, checked for tangents that a fused backend would lose.
    """
    device = "cpu" if tensor.is_cpu else tensor.device.type
    compiling = is_compiling()
    chosen = None
    if not compiling and type(backend) is str:
        chosen = _backend._chosen.get((op, backend, device))
    if chosen is None:
        chosen = _backend.resolve(op, backend, device, compiling)
    if chosen != "reference" and (forward_ad._current_level >= 0 or _transforms_active()):
        _refuse_transforms(op, (tensor, *others))
    if not compiling:
        with _backend._lock:
            _backend.calls[op, chosen] += 1
    return chosen


def _refuse_transforms(op, tensors):
    """NotImplementedError where a tangent, or a gradient by torch.func, would be lost silently.

    The fused kernels implement reverse mode only, outside torch.func. An op of constants loses no reverse-mode
    gradient.
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
        elif tracked and op in _backend.differentiable:
            what = "a gradient by torch.func (grad, vjp, jacrev)"
        else:
            continue
        raise NotImplementedError(
            f"{op}: {what} is not implemented; use torch.autograd.grad, or backend='reference'"
        )
