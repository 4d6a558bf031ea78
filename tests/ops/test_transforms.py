"""Forward mode, torch.func, second derivatives and vmap: right, or a clear error; never a silent zero."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

import fastrlhf
from _support.logit_cases import DEVICE, randn
from fastrlhf.ops import _backend

TARGETS, RANKS = torch.tensor([0, 2, 1, 2]), torch.tensor([1, 2, 2, 1])
GROUPS = torch.tensor([0, 2, 4], dtype=torch.int32)
# Op -> shapes of its tensors that a tangent can come in (not the documented constants).
LIKE = {
    "token_logprob": ((4, 3),),
    "token_loss": ((4, 3),),
    "linear_logprob": ((4, 3),),
    "linear_cross_entropy": ((4, 3),),
    "linear_ppo_loss": ((4, 3),),
    "linear_token_loss": ((4, 3),),
    "kl_reward": ((2, 3), (2, 3), (2,)),
    "gae": ((2, 3), (2, 3), (2,)),
    "kl_gae": ((2, 3), (2, 3), (2,), (2, 3)),
    "masked_whiten": ((2, 3),),
    "ppo_loss": ((2, 3),) * 3,
    "ranking_loss": ((4,),),
}
CONSTANT = ("kl_reward", "gae", "kl_gae", "masked_whiten")


def call(op, backend, *x, **more):
    """One output of `op`."""
    device = DEVICE[backend]
    function, more = getattr(fastrlhf, op), {"backend": backend, **more}
    if op == "token_logprob":
        return function(*x, TARGETS.to(device), **more)
    if op == "token_loss":
        rows = torch.linspace(-1, 1, 4, device=device)
        return function(*x, TARGETS.to(device), rows, old_logprob=rows, **more)[0]
    if op == "linear_ppo_loss":
        rows = torch.linspace(-1, 1, 4, device=device)
        return function(
            *x, torch.eye(3, device=device), TARGETS.to(device), rows, rows, **more
        ).loss
    if op == "linear_token_loss":
        head = torch.eye(3, device=device)
        return function(*x, head, TARGETS.to(device), lambda logprob: -logprob, **more).loss
    if op.startswith("linear"):
        return function(*x, torch.eye(3, device=device), TARGETS.to(device), **more)
    if op == "ranking_loss":
        return function(*x, RANKS.to(device), GROUPS.to(device), **more)
    if op == "ppo_loss":
        constants = torch.linspace(-1, 1, 6).reshape(2, 3).to(x[0])
        more |= {"old_values": constants, "returns": constants, "entropy_coef": 0.1}
        return function(x[0], constants, constants, values=x[1], entropy=x[2], **more).loss
    if op == "gae":
        return function(*x[:2], bootstrap=x[2], **more)[0]
    return function(*x, **more, **({"beta": 0.1} if "kl" in op else {}))[0]


def inputs(op, backend):
    return [randn(*shape, seed=i, device=DEVICE[backend]) for i, shape in enumerate(LIKE[op])]


OPS = list(fastrlhf.backends())


def cases(ops):
    """Each of `ops` on each fused backend that can run it here."""
    found = [
        pytest.param(op, backend, id=f"{op}-{backend}")
        for op in ops
        for backend in ("cpu", "triton", "cuda")
        if not _backend.unavailable_reason(op, backend, DEVICE[backend])
    ]
    return pytest.mark.parametrize(("op", "backend"), found)


each_case = cases(OPS)
TRAINED = [op for op in OPS if op not in CONSTANT]


@each_case
def test_forward_mode_is_refused(op, backend):
    """Whichever tensor carries the tangent; without one, a dual level changes nothing."""
    x = inputs(op, backend)
    with forward_ad.dual_level():
        expected = call(op, backend, *x)
        for i, one in enumerate(x):
            duals = [*x[:i], forward_ad.make_dual(one, torch.ones_like(one)), *x[i + 1 :]]
            with pytest.raises(NotImplementedError, match=f"{op}: forward-mode AD"):
                call(op, backend, *duals)
    assert torch.equal(expected, call(op, backend, *x))
    one, *rest = x
    function = lambda one: call(op, backend, one, *rest)  # noqa: E731
    for transform in (torch.func.jacfwd, torch.func.hessian):
        with pytest.raises(NotImplementedError, match=f"{op}: forward-mode AD"):
            transform(function)(one)
    with pytest.raises(NotImplementedError, match=f"{op}: forward-mode AD"):
        torch.func.jvp(function, (one,), (one,))


@each_case
def test_reverse_mode_of_torch_func(op, backend):
    """Refused, with a way out, but for the ops whose outputs are constants: zeros."""
    one, *rest = inputs(op, backend)
    gradient = torch.func.grad(lambda one: call(op, backend, one, *rest).sum())
    if op in CONSTANT:
        assert torch.equal(gradient(one), torch.zeros_like(one))
        return
    for transformed in (gradient, torch.func.vmap(gradient)):
        with pytest.raises(NotImplementedError, match=f"{op}: a gradient by torch.func.*autograd"):
            transformed(one[None] if transformed is not gradient else one)


@pytest.mark.parametrize("op", [op for op in OPS if not op.startswith("linear")])
def test_the_reference_can(op):
    x = [t.double() for t in inputs(op, "reference")]
    tangents = [randn(*t.shape, seed=9).double() for t in x]
    _, tangent = torch.func.jvp(lambda *x: call(op, "reference", *x), tuple(x), tuple(tangents))
    step = 1e-6
    ahead, behind = (
        call(op, "reference", *(a + s * t for a, t in zip(x, tangents, strict=True)))
        for s in (step, -step)
    )
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7)


@cases(TRAINED)
def test_second_derivatives_are_refused(op, backend):
    """Also where torch.autograd.functional would take a missing graph for zeros."""
    one, *rest = inputs(op, backend)
    function = lambda one: call(op, backend, one, *rest).sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match="the gradient of the gradient"):
        torch.autograd.functional.hessian(function, one)


@cases([op for op in OPS if op != "linear_token_loss"])
def test_vmap_is_a_loop(op, backend):
    one, *rest = inputs(op, backend)
    many = torch.stack([one, -2 * one])
    out = torch.func.vmap(lambda one: call(op, backend, one, *rest))(many)
    assert torch.equal(out, torch.stack([call(op, backend, x, *rest) for x in many]))


@cases(["linear_token_loss"])
def test_vmap_of_a_python_token_loss_is_refused(op, backend):
    with pytest.raises(NotImplementedError, match="linear_token_loss: torch.func transforms"):
        torch.func.vmap(lambda x: call(op, backend, x))(
            randn(2, 4, 3, seed=0, device=DEVICE[backend])
        )


@cases([op for op in TRAINED if op != "linear_token_loss"])
def test_backward_outside_of_vmap(op, backend):
    """The tensors inside do not say that they require grad."""
    more = {"inplace_backward": True} if op in ("token_logprob", "token_loss") else {}
    one, *rest = inputs(op, backend)
    leaves = [torch.stack([one, -2 * one]).requires_grad_() for _ in range(2)]
    function = lambda one: call(op, backend, 1 * one, *rest, **more)  # noqa: E731
    out = torch.func.vmap(function)(leaves[0])
    upstream = randn(*out.shape, seed=8, device=DEVICE[backend])
    out.backward(upstream)
    torch.stack([function(x) for x in leaves[1]]).backward(upstream)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    assert leaves[0].grad.any()
