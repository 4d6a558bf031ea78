"""The contract that all ops share, checked for each op through its OpSpec.

test_<op>.py checks values. Here calls of an op are compared with each other: other layouts, threads and memory, and a
compiled call. The host shim (tests/kernels/test_cuda_on_host.py) runs these checks on the CUDA kernels.
"""

import importlib
import inspect
import os

import numpy as np
import pytest
import torch
from spec_errors import ERRORS
from specs import (
    BACKENDS,
    MASKED,
    PACKED,
    RAGGED,
    SMALL,
    SPECS,
    THREADS,
    backend_params,
    differentiable,
    each_backend,
    flat,
    fused,
    gradients,
    moved,
    run,
    tensors_of,
    with_leaves,
)
from torch.utils._python_dispatch import TorchDispatchMode

import fastrlhf
from _support import sequence_cases as cases
from _support.logit_cases import DEVICE, interpreted
from fastrlhf.ops import _backend, _gemms

trained = each_backend(ops=differentiable)
fused_trained = each_backend(BACKENDS[1:], differentiable)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of four rows and no kept logits: a small problem has several chunks, the last one short."""
    monkeypatch.setattr(_gemms, "chunk_rows", lambda *_: 4)
    monkeypatch.setattr(importlib.import_module("fastrlhf.ops.linear_logprob"), "KEEP_BYTES", 0)


def same(ours, theirs, what=""):
    """Bitwise equal, NaN in the same places."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape, (what, i)
        torch.testing.assert_close(
            a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m, i=i: f"{what} result {i}: {m}"
        )


# ---------------------------------------------------------------------------------------------
# errors


def refusals():
    for op, (_, cases_of_op) in ERRORS.items():
        for i, case in enumerate(cases_of_op):
            for backend in ("auto",) if "backend" in case[0] else ("reference", "auto"):
                yield pytest.param(op, *case, backend, id=f"{op}-{','.join(case[0])}{i}-{backend}")


def test_every_op_has_refusals():
    assert set(ERRORS) == set(SPECS), "spec_errors.py has one entry per op of specs.py"


@pytest.mark.parametrize(("op", "change", "kind", "words", "on"), list(refusals()))
def test_errors_name_the_argument(op, change, kind, words, on):
    arguments = {**ERRORS[op][0], "backend": on, **change}
    cases.assert_raises(lambda: getattr(fastrlhf, op)(**arguments), kind, *words)
    with pytest.raises(kind, match=f"^{op}: "):
        getattr(fastrlhf, op)(**arguments)


# Tensors that no op takes: kind -> (what to make of a tensor, which tensors, exception, what the message says).
DENSE = "must be a dense tensor (torch.strided); got "
ODD = {
    "a list": (lambda x: x.tolist(), lambda x: x.dim(), TypeError, "got list"),
    "sparse": (lambda x: x.to_sparse(), lambda x: x.dim(), TypeError, DENSE + "torch.sparse_coo"),
    "csr": (
        lambda x: x.to_sparse_csr(),
        lambda x: x.dim() == 2,
        TypeError,
        DENSE + "torch.sparse_csr",
    ),
    "mkldnn": (
        lambda x: x.to_mkldnn(),
        lambda x: x.dtype == torch.float32 and x.dim(),
        TypeError,
        DENSE + "torch._mkldnn",
    ),
    "nested": (
        lambda x: torch.nested.nested_tensor([x, x]),
        lambda x: x.dim(),
        TypeError,
        DENSE + "a nested tensor",
    ),
    "complex": (lambda x: x.to(torch.complex64), lambda x: True, TypeError, "complex64"),
    "on another device": (lambda x: x.to("meta"), lambda x: True, ValueError, "must be on"),
}


@each_backend(("reference", "cpu", "triton"))
@pytest.mark.parametrize("kind", ODD)
def test_odd_tensors_are_refused(spec, backend, kind):
    """Each tensor argument in turn. The first one of an op decides its device, so it cannot be on another."""
    change, applies, error, words = ODD[kind]
    arguments = spec.inputs(SMALL, torch.float32)
    for i, (name, x) in enumerate(tensors_of(arguments).items()):
        if not applies(x) or kind == "on another device" and i == 0:
            continue
        with pytest.raises(error) as caught:
            spec.call(backend, {**arguments, name: change(x)})
        message = str(caught.value)
        assert message.startswith(f"{spec.name}: ") and name in message and words in message, name


@each_backend(("reference", "cpu"))
def test_a_required_tensor_that_is_none(spec, backend):
    arguments = spec.inputs(SMALL, torch.float32)
    for name, parameter in inspect.signature(getattr(fastrlhf, spec.name)).parameters.items():
        required = (
            parameter.default is parameter.empty and parameter.annotation != torch.Tensor | None
        )
        if required and isinstance(arguments[name], torch.Tensor):
            message = f"^{spec.name}: {name} must be a torch.Tensor; got NoneType"
            with pytest.raises(TypeError, match=message):
                spec.call(backend, {**arguments, name: None})


class Sharded(torch.Tensor):
    """Looks like a DTensor, which needs a process group."""

    device_mesh, placements = "mesh", "(Shard(dim=0),)"


@each_backend(("reference", "cpu"))
def test_a_dtensor_is_refused(spec, backend):
    arguments = spec.inputs(SMALL, torch.float32)
    for name, x in tensors_of(arguments).items():
        with pytest.raises(
            TypeError, match=f"^{spec.name}: {name} must be a plain tensor; got a DT"
        ):
            spec.call(backend, {**arguments, name: x.as_subclass(Sharded)})


@each_backend(("reference", "cpu"))
def test_numpy_scalars_are_numbers(spec, backend):
    numbers = ("temperature", "softcap", "scale", "clip", "dual_clip", "value_clip", "value_coef")
    numbers += (
        "entropy_coef",
        "beta",
        "gamma",
        "lam",
        "margin",
        "z_loss",
        "label_smoothing",
        "eps",
    )
    arguments = spec.inputs(SMALL, torch.float32)
    parameters = inspect.signature(getattr(fastrlhf, spec.name)).parameters
    for name in set(numbers) & set(parameters):
        if isinstance(parameters[name].default, str):
            continue  # the scale of group_advantage is a word
        for value, same_as in ((np.float32(0.5), 0.5), (np.float64(0.5), 0.5), (np.int64(1), 1)):
            if name == "dual_clip":
                value, same_as = value + 1, same_as + 1
            same(*(run(spec, backend, {**arguments, name: x}) for x in (value, same_as)))
        if name not in ("gamma", "lam", "label_smoothing"):
            same(*(run(spec, backend, {**arguments, name: x}) for x in (2**70, 2.0**70)))
        for value in (1e300, 2**200, *([1e-300] if name in ("temperature", "softcap") else [])):
            message = f"^{spec.name}: {name} must be .* within the range of float32; got "
            with pytest.raises(ValueError, match=message):
                spec.call(backend, {**arguments, name: value})


@each_backend(("reference", "cpu"))
def test_words_and_flags_of_another_type(spec, backend):
    """An array compares with each word elementwise; a number is no flag."""
    arguments = spec.inputs(SMALL, torch.float32)
    parameters = inspect.signature(getattr(fastrlhf, spec.name)).parameters
    for name in {"backend", "workspace", "reduction", "estimator", "baseline"} & set(parameters):
        for value in (np.array(["cpu", "fast"]), None, torch.ones(2)):
            with pytest.raises(ValueError, match=f"^{spec.name}: {name} must be "):
                getattr(fastrlhf, spec.name)(**{"backend": backend, **arguments, name: value})
    for name, parameter in parameters.items():
        if isinstance(parameter.default, bool):
            for value in (None, 1, "yes", np.True_, torch.tensor(True)):
                with pytest.raises(TypeError, match=f"^{spec.name}: {name} must be a bool; got "):
                    spec.call(backend, {**arguments, name: value})


@each_backend(BACKENDS[1:])
def test_negative_views(spec, backend):
    """Their memory holds the other sign. They are not overwritten."""
    arguments = moved(spec.inputs(SMALL, torch.float32), backend)
    expected = run(spec, backend, arguments)
    floats = {n: x for n, x in tensors_of(arguments).items() if x.is_floating_point()}
    views = {name: torch._neg_view(-x) for name, x in floats.items()}
    more = {"inplace_backward": True} if spec.in_place else {}
    same(run(spec, backend, {**arguments, **views, **more}), expected)
    same([*views.values()], floats.values())


@each_backend(("cpu",), ("token_logprob", "token_loss", "linear_logprob"))
def test_an_inference_tensor_that_would_be_saved(spec, backend):
    arguments = with_leaves(spec, spec.inputs(SMALL, torch.float32))
    for name, x in tensors_of(arguments).items():
        if name in spec.differentiable or name == "scale":
            continue
        with torch.inference_mode():
            made = x.clone()
        with pytest.raises(
            ValueError, match=f"^{spec.name}: {name} must not be an inference tensor"
        ):
            spec.call(backend, {**arguments, name: made})
        with torch.no_grad():
            spec.call(backend, {**arguments, name: made})


@trained
def test_a_constant_that_requires_grad_is_refused(spec, backend):
    """Its gradient would be lost silently. Without a gradient to lose, it is taken."""
    arguments = with_leaves(spec, moved(spec.inputs(SMALL, torch.float32), backend))
    per_token = arguments.get("per_token", {})
    for name in (*spec.constant, *per_token):
        value = per_token.get(name, arguments.get(name))
        value = torch.ones((), device=DEVICE[backend]) if value is None else value.detach().clone()
        given = {**arguments, name: value.requires_grad_()}
        if name in per_token:
            given = {**arguments, "per_token": {**per_token, name: value}}
        message = (
            rf"^{spec.name}: .*{name}.* must be a constant, .* \(detach it\); got a tensor that"
        )
        with pytest.raises(ValueError, match=message):
            spec.call(backend, given)
        with torch.no_grad():
            spec.call(backend, given)
        if not interpreted(backend):
            value.requires_grad_(False)
            spec.call(backend, given)


@each_backend(ops=[op for op in SPECS if op not in differentiable])
def test_outputs_are_constants(spec, backend):
    """Of the sequence ops: no gradient flows through them."""
    arguments = moved(spec.inputs(SMALL, torch.float32), backend)
    for name, x in tensors_of(arguments).items():
        if x.is_floating_point():
            arguments[name] = x.requires_grad_() * 1
    assert not any(out.requires_grad for out in flat(spec.call(backend, arguments)))


@trained
def test_only_what_was_asked_for_gets_a_gradient(spec, backend):
    arguments = moved(spec.inputs(SMALL, torch.float32), backend)
    leaves = with_leaves(spec, arguments)
    outputs = [o for o in flat(spec.call(backend, leaves)) if o.requires_grad]
    sum(o.sum() for o in outputs).backward()
    tensors = tensors_of(leaves)
    assert {n for n, x in tensors.items() if x.grad is not None} == {
        n for n in spec.differentiable if n in tensors
    }
    with torch.no_grad():
        assert not any(o.requires_grad for o in flat(spec.call(backend, leaves)))
    assert not any(o.requires_grad for o in flat(spec.call(backend, arguments)))


# ---------------------------------------------------------------------------------------------
# PyTorch: opcheck, gradcheck, torch.compile


class Recorded(TorchDispatchMode):
    """The raw ops of this package that are called inside, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastrlhf":
            self.calls.setdefault(
                (function, len(self.calls) if "bwd_" in str(function) else 0), args
            )
        return function(*args, **(kwargs or {}))


def raw_calls(spec, backend, arguments):
    """[(raw op, its arguments)] of a forward and a backward, tensors with the gradients that they want."""
    arguments = with_leaves(spec, moved(arguments, backend))
    with Recorded() as seen:
        gradients(flat(spec.call(backend, arguments)), arguments)
        with torch.no_grad():
            spec.call(backend, arguments)
        if spec.in_place:
            again = {n: x * 1 if n in spec.differentiable else x for n, x in arguments.items()}
            out = flat(spec.call(backend, {**again, "inplace_backward": True}))
            sum(o.sum() for o in out if o.requires_grad).backward()
    detached = lambda x: x.detach() if isinstance(x, torch.Tensor) else x  # noqa: E731
    return [
        # A backward's arguments are constants: it has no gradient itself.
        (function, [detached(x) for x in args] if "_bwd" in function._opname else args)
        for (function, _), args in seen.calls.items()
    ]


@each_backend()
def test_opcheck(spec, backend):
    """Schema, fake, autograd registration and dynamic shapes of every raw op that a call passes through."""
    inputs = spec.small()[:1] if interpreted(backend) else spec.situations((SMALL, PACKED)).values()
    found = [call for arguments in inputs for call in raw_calls(spec, backend, arguments)]
    if backend == "reference" and not found:
        return  # plain PyTorch
    names = {function._opname.replace("_triton", "") for function, _ in found}
    for ending in spec.raw:
        assert any(name.endswith(ending) for name in names), (ending, names)
    utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
    # The linear ops take minutes under the interpreter. In the host shim, "cuda" is the raw op of "cpu" with another
    # kernel, which tracing does not see.
    if not (spec.gemm and interpreted(backend)) and "FASTRLHF_HOST_SHIM" not in os.environ:
        utils.append("test_aot_dispatch_dynamic")
    for function, arguments in found:
        torch.library.opcheck(function, arguments, test_utils=utils)


@trained
def test_gradcheck(spec, backend):
    """In float64, every setting in use, and the variants without some."""
    given = spec.small(torch.float64)
    if interpreted(backend):  # minutes: the linear ops' chunks are the same code on every backend
        given = given[: 1 if spec.gemm else 2]
    for one in given:
        arguments = with_leaves(spec, moved(one, backend))
        names = [n for n in spec.differentiable if arguments.get(n) is not None]

        def function(*leaves, arguments=arguments, names=names):
            out = flat(spec.call(backend, arguments | dict(zip(names, leaves, strict=True))))
            return tuple(o for o in out if o.requires_grad)

        leaves = [arguments[name] for name in names]
        fast = interpreted(backend) and spec.name not in ("token_logprob", "token_loss")
        assert torch.autograd.gradcheck(function, leaves, fast_mode=fast)


# The reference of a sequence op loops over its data: torch.compile cannot trace it whole.
traceable = [op for op in SPECS if op.startswith(("token", "linear"))]


@pytest.mark.parametrize(
    ("spec", "backend"),
    [*backend_params(BACKENDS[1:]), *backend_params(("reference",), traceable)],
)
def test_compiles_without_a_graph_break(spec, backend):
    """fullgraph: outputs and gradients of the eager call. With dynamic shapes, but for GEMMs and the reference."""
    situation = PACKED if spec.inputs(PACKED, torch.float32) else SMALL
    arguments = with_leaves(spec, moved(spec.inputs(situation, torch.float32), backend))
    names = list(tensors_of(arguments))

    def function(*tensors, **more):
        return flat(
            spec.call(backend, {**arguments, **dict(zip(names, tensors, strict=True)), **more})
        )

    plain = spec.gemm or backend == "reference"
    # A compiled call does not use the licence to overwrite the logits.
    in_place = {"inplace_backward": True} if spec.in_place else {}
    torch._dynamo.reset()
    compiled = torch.compile(
        function, fullgraph=True, dynamic=not plain or None, backend="aot_eager"
    )
    tensors = [arguments[name] for name in names]
    before = [x.detach().clone() for x in tensors]
    eager, traced = function(*tensors), compiled(*tensors, **in_place)
    pairs = [(traced, eager), (gradients(traced, arguments), gradients(eager, arguments))]
    for ours, theirs in pairs:
        if plain or not spec.rounds_once:
            torch.testing.assert_close(ours, theirs)
        else:
            same(ours, theirs)
    same([x.detach() for x in tensors], before)


@fused_trained
def test_the_gradient_of_the_gradient_is_refused(spec, backend):
    """Already under a constant upstream gradient (power 1), where it would be lost later."""
    arguments = with_leaves(spec, moved(spec.inputs(SMALL, torch.float32), backend))
    leaf = arguments[spec.differentiable[0]]
    for power in (1, 2):
        out = next(o for o in flat(spec.call(backend, arguments)) if o.requires_grad)
        with pytest.raises(
            NotImplementedError, match=f"^{spec.name}: the gradient of the gradient"
        ):
            (grad,) = torch.autograd.grad((out**power).sum(), leaf, create_graph=True)
            grad.sum().backward()


@fused_trained
def test_a_retained_graph_gives_its_gradient_again(spec, backend):
    arguments = with_leaves(spec, moved(spec.inputs(SMALL, torch.float32), backend))
    outputs = [o for o in flat(spec.call(backend, arguments)) if o.requires_grad]
    wanted = [x for x in tensors_of(arguments).values() if x.requires_grad]
    upstream = [torch.full_like(o, 0.7) for o in outputs]
    once = torch.autograd.grad(outputs, wanted, upstream, retain_graph=True)
    kept = [g.clone() for g in once]
    same(torch.autograd.grad(outputs, wanted, upstream), kept)
    same(once, kept)


@each_backend()
def test_autocast_changes_nothing(spec, backend):
    arguments = moved(spec.inputs(SMALL, torch.float32), backend)
    plain = run(spec, backend, arguments)
    with torch.autocast(DEVICE[backend], torch.bfloat16):
        same(run(spec, backend, arguments), plain)


# ---------------------------------------------------------------------------------------------
# inputs and memory


@each_backend()
def test_empty_and_tiny(spec, backend, poisoned):
    """Shapes and numbers of the reference; sums over no token and their gradients are 0."""
    for shape in spec.shapes:
        arguments = spec.inputs(shape, torch.float32)
        expected = run(spec, "reference", arguments)
        found = run(spec, backend, arguments)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, msg=lambda m, s=shape: f"{s}: {m}")
        first = next(iter(arguments.values()))
        if not first.numel():
            assert all((x == 0).all() for x in found)
            # Empty tensors count as contiguous whatever their strides.
            for name, x in tensors_of(arguments).items():
                if not x.numel():
                    arguments[name] = x.new_zeros(*x.shape, 2)[..., 1]
            same(run(spec, backend, arguments), found, shape)
        if spec.in_place:
            copy = {**arguments, "logits": first.clone(), "inplace_backward": True}
            same(run(spec, backend, copy), found, shape)


@each_backend(ops=[op for op, spec in SPECS.items() if spec.masked])
def test_nothing_behind_the_mask_is_used(spec, backend, poisoned):
    """NaN, infinities and impossible targets there change no bit, and give 0. Masks of 0 and 1 are masks."""
    whole = spec.inputs(MASKED, torch.float32)
    keep = whole["mask"]
    for change in ({}, *spec.variants):
        arguments = whole | change
        clean = run(spec, backend, arguments)
        for fill, dtype in FILLS:
            dirty = {**arguments, "mask": keep.to(dtype)}
            for name in spec.masked:
                if (x := arguments.get(name)) is None:
                    continue
                hidden = ~keep.view(*keep.shape, *(1,) * (x.dim() - keep.dim()))
                dirty[name] = x.masked_fill(hidden, fill if x.is_floating_point() else -100)
            same(run(spec, backend, dirty), clean, f"{change}, {fill}")
        for out in clean:
            if out.shape[: keep.dim()] == keep.shape:
                rows = out.cpu().reshape(*keep.shape, -1)
                assert (rows[~keep] == 0).all() and rows[keep].any()
                if spec.name.endswith("logprob"):
                    assert rows[keep].any(-1).all()
        nothing = {**arguments, "mask": torch.zeros_like(keep)}
        assert all((out == 0).all() for out in run(spec, backend, nothing))
        if interpreted(backend):
            break


@each_backend(ops=[op for op, spec in SPECS.items() if spec.masked])
def test_a_mask_byte_that_is_not_0_counts(spec, backend):
    """A bool view of a numpy array may hold any byte."""
    arguments = spec.inputs(MASKED, torch.float32)
    mask = arguments["mask"]
    values = torch.tensor([1, 2, 128, 255, 254, 4, 3], dtype=torch.uint8)
    odd = values[torch.arange(mask.numel()) % len(values)].view(mask.shape) * mask
    same(
        run(spec, backend, {**arguments, "mask": odd.view(torch.bool)}),
        run(spec, backend, arguments),
    )


FILLS = (
    (torch.nan, torch.int32),
    (torch.inf, torch.float32),
    (-torch.inf, torch.uint8),
    (torch.nan, torch.int64),
)


@each_backend(ops=("token_logprob", "token_loss"))
def test_masked_rows_are_as_if_they_were_not_there(spec, backend):
    arguments = spec.inputs(MASKED, torch.float32)
    keep = arguments.pop("mask")
    few = {n: x[keep] if n in spec.masked else x for n, x in arguments.items()}
    whole = run(spec, backend, {**arguments, "mask": keep})
    # The same upstream gradient for each row: what is drawn depends on the shape.
    for ours, theirs in zip(whole[:2], run(spec, backend, few)[:2], strict=True):
        assert torch.equal(ours[keep.to(ours.device)], theirs)


@each_backend()
def test_results_are_written_whole_and_repeat(spec, backend, poisoned):
    """Where fresh memory holds NaN."""
    names = (SMALL, MASKED) if interpreted(backend) else (SMALL, MASKED, PACKED, RAGGED)
    for situation, arguments in spec.situations(names).items():
        found = run(spec, backend, arguments)
        assert not any(x.isnan().any() for x in found), situation
        same(run(spec, backend, arguments), found, situation)


@each_backend(("cpu",), [op for op, spec in SPECS.items() if not spec.gemm])
def test_the_number_of_threads_changes_nothing(spec, backend):
    arguments = spec.inputs(THREADS, torch.float32)
    for given in (arguments, {n: x for n, x in arguments.items() if n != "mask"}):
        cases.assert_same_for_any_threads(lambda a=given: run(spec, backend, a))


def hidden_around(x, shape, strides, offset):
    """The values of x in a view of a larger buffer, and the buffer. What lies between is NaN, or far off."""
    fill = torch.nan if x.is_floating_point() else 1 if x.dtype == torch.bool else 10**6
    room = offset + 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if n) + 8
    buffer = torch.full((room,), fill, dtype=x.dtype, device=x.device)
    view = buffer.as_strided(shape, strides, offset)
    view.copy_(x)
    return view, buffer


def layouts(x):
    """{name: (view with the values of x, its buffer)}."""
    shape, found = x.shape, {}
    contiguous = torch.empty(shape, device="meta").stride()
    found["offset"] = hidden_around(x, shape, contiguous, 1)
    if x.dim() == 1:
        found["strided"] = hidden_around(x, shape, (3,), 2)
    if x.dim() >= 2:
        wider = (*(s // shape[-1] * (shape[-1] + 5) for s in contiguous[:-1]), 1)
        found["wider rows"] = hidden_around(x, shape, wider, 3)
        order = [*range(x.dim() - 2), x.dim() - 1, x.dim() - 2]
        across = torch.empty([shape[i] for i in order], device="meta").stride()
        found["column-major"] = hidden_around(x, shape, [across[i] for i in order], 0)
        found["strided"] = hidden_around(x, shape, [2 * s for s in contiguous], 1)
    if x.dim() >= 3:
        first = torch.empty((shape[1], shape[0], *shape[2:]), device="meta").stride()
        found["rows swapped"] = hidden_around(x, shape, (first[1], first[0], *first[2:]), 0)
    return found


@fused
def test_views_are_read_in_place(spec, backend):
    """Views: bitwise what contiguous tensors give. Nothing beside them is read, and no input is written."""
    situations = spec.situations((SMALL, MASKED, PACKED))
    if interpreted(backend):
        situations = {
            s: situations[s] for s in (SMALL, MASKED)[: 1 if spec.gemm else 2] if s in situations
        }
    for situation, arguments in situations.items():
        arguments = moved(arguments, backend)
        expected = run(spec, backend, arguments)
        views = {n: layouts(x) for n, x in tensors_of(arguments).items() if x.dim() and x.numel()}
        for kind in ("offset", "wider rows", "column-major", "strided", "rows swapped"):
            chosen = {name: found[kind] for name, found in views.items() if kind in found}
            if not chosen:
                continue
            before = {name: buffer.clone() for name, (_, buffer) in chosen.items()}
            found = run(spec, backend, arguments | {n: view for n, (view, _) in chosen.items()})
            if spec.gemm:
                torch.testing.assert_close(found, expected)
            else:
                same(found, expected, f"{situation}, {kind}")
            same([buffer for _, buffer in chosen.values()], before.values(), "input")


@each_backend(BACKENDS[1:], [op for op, s in SPECS.items() if s.rounds_once and not s.gemm])
def test_16_bit_inputs_are_the_fp32_numbers_they_stand_for(spec, backend):
    """A cast is exact: outputs are bitwise the same, a gradient is rounded once to the dtype of its tensor."""
    for dtype in (torch.bfloat16, torch.float16):
        narrow = spec.inputs(SMALL, torch.float32)
        for name, x in narrow.items():
            if isinstance(x, torch.Tensor) and x.dtype == torch.float32 and name in spec.masked:
                narrow[name] = x.to(dtype) if name != "temperature" else x
        wide = {
            n: x.float() if isinstance(x, torch.Tensor) and x.dtype == dtype else x
            for n, x in narrow.items()
        }
        for a, b in zip(run(spec, backend, narrow), run(spec, backend, wide), strict=True):
            assert torch.equal(a, b.to(a.dtype))


# ---------------------------------------------------------------------------------------------
# dispatch


@each_backend()
def test_says_which_backend_ran(spec, backend):
    arguments = moved(spec.inputs(SMALL, torch.float32), backend)
    before = _backend.calls[spec.name, backend]
    spec.call(backend, arguments)
    assert _backend.calls[spec.name, backend] == before + 1
    device = DEVICE[backend]
    if _backend.auto(spec.name, device) == backend:
        spec.call("auto", arguments)
        assert _backend.calls[spec.name, backend] == before + 2
