"""Forward mode, torch.func, second derivatives and vmap: right, or a clear error; never a silent zero."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from specs import BACKENDS, PACKED, SPECS, backend_params, flat, moved, tensors_of

from _support.logit_cases import DEVICE, randn

SHAPES = {"ranking_loss": (PACKED, 2, 2)} | dict.fromkeys(("kl_reward", "gae", "kl_gae"), (2, 3))


def problem(spec, backend, dtype=torch.float32):
    """(arguments, names of the tensors that may carry a tangent)."""
    arguments = moved(spec.inputs(SHAPES.get(spec.name, (4,)), dtype), backend)
    floats = [n for n, x in tensors_of(arguments).items() if x.is_floating_point()]
    return arguments, [n for n in spec.differentiable if n in floats] or floats


def first(spec, backend, arguments, **changed):
    """The first output of the op."""
    return flat(spec.call(backend, {**arguments, **changed}))[0]


def each(ops):
    return pytest.mark.parametrize(("spec", "backend"), backend_params(BACKENDS[1:], ops))


DIFFERENTIABLE = [op for op, spec in SPECS.items() if spec.differentiable]


@each(SPECS)
def test_forward_mode_is_refused(spec, backend):
    """Whichever tensor carries the tangent; without one, a dual level changes nothing."""
    arguments, names = problem(spec, backend)
    with forward_ad.dual_level():
        expected = first(spec, backend, arguments)
        for name in names:
            dual = forward_ad.make_dual(arguments[name], torch.ones_like(arguments[name]))
            with pytest.raises(NotImplementedError, match=f"{spec.name}: forward-mode AD"):
                first(spec, backend, arguments, **{name: dual})
    assert torch.equal(expected, first(spec, backend, arguments))
    one = arguments[names[0]]
    function = lambda one: first(spec, backend, arguments, **{names[0]: one})  # noqa: E731
    for transform in (torch.func.jacfwd, torch.func.hessian):
        with pytest.raises(NotImplementedError, match=f"{spec.name}: forward-mode AD"):
            transform(function)(one)
    with pytest.raises(NotImplementedError, match=f"{spec.name}: forward-mode AD"):
        torch.func.jvp(function, (one,), (one,))


@each(SPECS)
def test_reverse_mode_of_torch_func(spec, backend):
    """Zeros where the outputs are constants; elsewhere refused, with the alternative named."""
    arguments, (name, *_) = problem(spec, backend)
    one = arguments[name]
    gradient = torch.func.grad(lambda one: first(spec, backend, arguments, **{name: one}).sum())
    if not spec.differentiable:
        assert torch.equal(gradient(one), torch.zeros_like(one))
        return
    match = f"{spec.name}: a gradient by torch.func.*autograd"
    for transformed in (gradient, torch.func.vmap(gradient)):
        with pytest.raises(NotImplementedError, match=match):
            transformed(one[None] if transformed is not gradient else one)


@pytest.mark.parametrize("op", [op for op, spec in SPECS.items() if not spec.gemm])
def test_the_reference_can(op):
    """Its tangents are those of finite differences."""
    spec = SPECS[op]
    arguments, names = problem(spec, "reference", torch.float64)
    x = tuple(arguments[name] for name in names)
    tangents = tuple(randn(*t.shape, seed=9, dtype=torch.float64) for t in x)

    def function(*x):
        return first(spec, "reference", arguments, **dict(zip(names, x, strict=True)))

    _, tangent = torch.func.jvp(function, x, tangents)
    step = 1e-6
    ahead, behind = (
        function(*(a + s * t for a, t in zip(x, tangents, strict=True))) for s in (step, -step)
    )
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7)


@each(DIFFERENTIABLE)
def test_second_derivatives_are_refused(spec, backend):
    """Also where torch.autograd.functional would take a missing graph for zeros."""
    arguments, (name, *_) = problem(spec, backend)
    function = lambda one: first(spec, backend, arguments, **{name: one}).sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match="the gradient of the gradient"):
        torch.autograd.functional.hessian(function, arguments[name])


@each([op for op in SPECS if op != "linear_token_loss"])
def test_vmap_is_a_loop(spec, backend):
    arguments, (name, *_) = problem(spec, backend)
    many = torch.stack([arguments[name], -2 * arguments[name]])
    function = lambda one: first(spec, backend, arguments, **{name: one})  # noqa: E731
    assert torch.equal(torch.func.vmap(function)(many), torch.stack([function(x) for x in many]))


@each(["linear_token_loss"])
def test_vmap_of_a_loss_in_python_is_refused(spec, backend):
    arguments, (name, *_) = problem(spec, backend)
    many = torch.stack([arguments[name]] * 2)
    with pytest.raises(NotImplementedError, match="linear_token_loss: torch.func transforms"):
        torch.func.vmap(lambda x: first(spec, backend, arguments, **{name: x}))(many)


@each([op for op in DIFFERENTIABLE if op != "linear_token_loss"])
def test_backward_outside_of_vmap(spec, backend):
    """Inside of vmap no tensor says that it requires grad."""
    arguments, (name, *_) = problem(spec, backend)
    more = {"inplace_backward": True} if spec.in_place else {}
    one = arguments[name]
    leaves = [torch.stack([one, -2 * one]).requires_grad_() for _ in range(2)]
    function = lambda one: first(spec, backend, arguments, **{name: 1 * one}, **more)  # noqa: E731
    out = torch.func.vmap(function)(leaves[0])
    upstream = randn(*out.shape, seed=8, device=DEVICE[backend])
    out.backward(upstream)
    torch.stack([function(x) for x in leaves[1]]).backward(upstream)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    assert leaves[0].grad.any()
