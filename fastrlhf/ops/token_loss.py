"""token_loss: the policy loss of each row and its gradient in the logits, in one pass over them.

Shapes: logits [..., V] -> N rows; targets, advantages, old_logprob, mask, outputs [...]; grad_logprob [N] =
d loss / d logprob; stats [2, N] the first two of token_logprob's.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf import reference
from fastrlhf.ops import _backend, _checks
from fastrlhf.ops import token_logprob as _logprob
from fastrlhf.ops._register import differentiable, register

OP = "token_loss"


def token_loss(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor | None = None,
    *,
    old_logprob: Tensor | None = None,
    clip: float = 0.2,
    dual_clip: float | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    scale: float | Tensor = 1.0,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Loss of each row and log softmax(z)[target], z = softcap * tanh(logits / softcap) / temperature.

    With l = log softmax(z)[target], A the advantage (1 if None) and rho = exp(clamp(l - l_old, -20,
    20)):

    - without `old_logprob`: loss = scale * (-A l): cross entropy, or the policy gradient;
    - with it: loss = scale * max(-A rho, -A clip(rho, 1 - clip, 1 + clip)); with `dual_clip`, where
      A < 0, at most scale * (-A dual_clip). The terms of `ppo_loss`, before their mean.

    d loss / d l is known as soon as l is, so the forward makes dL/dlogits_j = (d loss / d l)
    (1[j = target] - p_j) dz_j/dlogits_j while the row is still on the chip: one read and one write
    of the logits for forward and backward together. (Triton reads the row twice; so does CUDA in
    float64, with a soft-cap above 64, and where a row does not fit on the chip.) The backward
    multiplies row i by the upstream gradient of loss_i. **Where that is 1 it touches nothing**, so
    fold the mean into the loss::

        loss, logprob = token_loss(logits, targets, advantages, scale=1 / n, ...)
        loss.sum().backward()

    (the product of a loss scaler and of gradient accumulation belongs into `scale`, too). Any other
    upstream gradient is right as well, and costs one more read and write of the rows it concerns.
    Under torch.compile the gradient is made in the backward: two reads and one write in all. Every
    backward of a retained graph after the first makes it again.

    Args:
        logits: [..., V], float32, bfloat16, float16, or float64 (CPU). Any strides before a unit
            last stride are read in place when they reduce to two (``logits[:, :-1]`` does).
        targets: [...], int32 or int64, in [0, V).
        advantages: [...], float, or None. A constant to autograd.
        old_logprob: [...], float, in nats, from the policy that sampled; or None. A constant.
        clip: above 0. Only used with `old_logprob`.
        dual_clip: above 1, or None. Only used with `old_logprob`.
        temperature: above 0; a number, or a float tensor that broadcasts to ``targets``. A constant.
        softcap: above 0, or None. Applied before the temperature, as Gemma 2 does.
        mask: [...], True (or non-zero) where the row counts. Other rows are not read, nor their
            targets; loss, logprob and gradient are 0 there.
        scale: a number, or a 0-d float tensor (``1 / mask.sum()`` needs no sync). A constant.
        inplace_backward: let the **forward** write the gradient over ``logits``, when autograd asks
            for it: no second tensor of their size exists, and whoever reads ``logits`` after this
            call reads the gradient. A second backward through the graph raises. A licence, not an
            order: the reference, torch.compile and overlapping layouts do not use it.
        backend: see `fastrlhf.backends`.

    Returns:
        (loss [...], logprob [...]); float32 (float64 for float64 logits); logprob is detached. A row
        that holds a NaN gives NaN. Rows whose gradient is exactly 0 (clipped, A = 0) are zero-filled.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or value; a constant that requires grad.
            On CPU a counted target outside [0, V) raises ValueError, before the logits are touched; on
            a GPU, where that would cost a host sync, the row's loss, logprob and gradient are NaN, and
            nothing outside it is read.

    Source: Schulman et al. 2017 (arXiv:1707.06347), eq. 7; Ye et al. 2020 (arXiv:1912.09729) for the
        dual clip; Milakov and Gimelshein 2018 (arXiv:1805.02867) for the online softmax.

    >>> loss, logprob = token_loss(torch.zeros(2, 4), torch.tensor([1, 3]), scale=0.5)
    >>> loss, logprob
    (tensor([0.6931, 0.6931]), tensor([-1.3863, -1.3863]))
    """
    row_temperature, temperature, softcap, mask = _logprob.check(
        OP, logits, targets, temperature, softcap, mask
    )
    if advantages is not None:
        advantages = _row_constant("advantages", advantages, logits, targets)
    if old_logprob is not None:
        old_logprob = _row_constant("old_logprob", old_logprob, logits, targets)
    clip = _checks.number(OP, "clip", clip, low=0, strict=True)
    if dual_clip is not None:
        dual_clip = _checks.number(OP, "dual_clip", dual_clip, low=1, strict=True)
    scale_tensor, scale = _scale(scale, logits)
    chosen = _backend.choose(OP, backend, logits)
    if chosen == "reference":
        return _reference(
            logits,
            targets,
            advantages,
            old_logprob=old_logprob,
            clip=clip,
            dual_clip=dual_clip,
            row_temperature=row_temperature,
            temperature=temperature,
            softcap=softcap or None,
            mask=mask,
            scale=scale if scale_tensor is None else scale_tensor,
        )
    arguments = (
        targets,
        advantages,
        old_logprob,
        clip,
        math.inf if dual_clip is None else dual_clip,
        row_temperature,
        temperature,
        softcap,
        mask,
        scale_tensor,
        scale,
    )
    kernels = ops(chosen)
    # A compiled graph plans memory itself, and must not meet a hidden mutation.
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and logits.requires_grad):
        loss, logprob, _, _ = _logprob.run(OP, kernels.fwd, (logits, *arguments))
        return loss, logprob.detach()
    inplace = inplace_backward and _checks.overwritable(logits)
    outputs = _logprob.run(OP, _gradient_in_forward, (logits, kernels, inplace, *arguments))
    return outputs[:2]


def _row_constant(name, value, logits, targets):
    """A float tensor of the rows in the accumulator's dtype, contiguous."""
    _checks.float_tensor(OP, name, value)
    _checks.shape(OP, name, value, targets.shape)
    _checks.same_device(OP, name, value, logits.device)
    if value.requires_grad:
        _checks.constants(OP, **{name: value})
    dtype = _logprob._acc_dtype(logits)
    return (value if value.dtype == dtype else value.to(dtype)).contiguous()


def _scale(scale, logits):
    """(0-d tensor | None, number)."""
    if not isinstance(scale, Tensor):
        return None, _checks.number(OP, "scale", scale)
    _checks.float_tensor(OP, "scale", scale)
    _checks.shape(OP, "scale", scale, ())
    _checks.same_device(OP, "scale", scale, logits.device)
    _checks.constants(OP, scale=scale)
    return scale.detach().to(_logprob._acc_dtype(logits)), 1.0


def _reference(logits, targets, *rest, row_temperature, temperature, mask, **options):
    targets, wrong = _logprob.reference_targets(OP, logits, targets, row_temperature, mask)
    temperature = temperature if row_temperature is None else row_temperature
    out = reference.token_loss(
        logits, targets, *rest, temperature=temperature, mask=mask, **options
    )
    return out if wrong is None else tuple(x.masked_fill(wrong, math.nan) for x in out)


# ---- the gradient made in the forward: eager mode ------------------------------------------------


def _forward(logits, ops, inplace, *arguments):
    """fwd_ writes dL/dlogits for an upstream gradient of 1."""
    out = logits if inplace else _empty(logits)
    outputs = ops.fwd_.below(logits, *arguments, out)
    if inplace:
        # The logits are gone: let autograd notice whoever has saved them.
        torch.autograd.graph.increment_version(logits)
    return *outputs, out


def _empty(logits):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_forward(ctx, all_arguments, outputs):
    logits, ctx.ops, ctx.inplace, targets, advantages, old_logprob, *rest = all_arguments
    clip, dual_clip, row_temperature, temperature, softcap, mask, scale_tensor, scale = rest
    _, _, grad_logprob, stats, out = outputs
    rows = (targets, advantages, old_logprob, row_temperature, mask, scale_tensor)
    ctx.save_for_backward(logits, grad_logprob, stats, *rows)
    ctx.numbers = clip, dual_clip, temperature, softcap, scale
    ctx.grad = None if ctx.inplace else out


def _hand_out(ctx, grad_loss):
    """The gradient that the forward has made, scaled."""
    if ctx.grad is not None and not torch.is_grad_enabled():
        grad, ctx.grad = ctx.grad, None
        ctx.ops.bwd_.below(grad, grad_loss)
        return (grad,)
    logits, grad_logprob, stats, *rows = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph: an op whose own gradient says that it has none
        if ctx.inplace:
            raise NotImplementedError(f"{OP}: create_graph must not meet inplace_backward=True")
        return (
            _from_stats(ctx.ops, grad_loss, logits, grad_logprob, stats, *_arguments(ctx, rows)),
        )
    if ctx.inplace:
        grad = logits.detach()
        # One gradient, given away once: a second backward raises at saved_tensors.
        torch.autograd.graph.increment_version(logits)
    else:  # a retained graph: the same bits once more
        grad = _empty(logits)
        ctx.ops.fwd_(logits, *_arguments(ctx, rows), grad)
    ctx.ops.bwd_.below(grad, grad_loss)
    return (grad,)


def _arguments(ctx, rows):
    """Those of fwd_ behind the logits, once more."""
    targets, advantages, old_logprob, row_temperature, mask, scale_tensor = rows
    clip, dual_clip, temperature, softcap, scale = ctx.numbers
    policy = (advantages, old_logprob, clip, dual_clip)
    return targets, *policy, row_temperature, temperature, softcap, mask, scale_tensor, scale


_gradient_in_forward = differentiable(
    _forward, op=OP, wrt=(0,), setup=_setup_forward, backward=_hand_out, create_graph=True
)


def _from_stats(ops, grad_loss, logits, grad_logprob, stats, targets, *arguments):
    """dL/dlogits from the logits and the statistics of their rows."""
    *_, row_temperature, temperature, softcap, mask, _, _ = arguments
    return ops.logprob_bwd(
        grad_loss * grad_logprob,
        None,
        logits,
        targets,
        torch.cat((stats, stats.new_zeros(1, stats.shape[1]))),  # entropy has no gradient here
        row_temperature,
        temperature,
        softcap,
        mask,
    )


# ---- registration -------------------------------------------------------------------------------


def _fwd_fake(logits, targets, *rest):
    rows = logits.new_empty(targets.shape, dtype=_logprob._acc_dtype(logits))
    return rows, torch.empty_like(rows), torch.empty_like(rows), rows.new_empty(2, rows.numel())


def _in_place_fake(*arguments):
    return None


def _setup(ctx, arguments, outputs):
    logits, targets, *_, row_temperature, ctx.temperature, ctx.softcap, mask, _, _ = arguments
    _, _, grad_logprob, stats = outputs
    ctx.save_for_backward(logits, grad_logprob, stats, targets, row_temperature, mask)


class Ops(NamedTuple):
    """The ops of a backend: values, values and gradient, upstream gradient, gradient from the statistics.

    `rows_`: the row pass of the linear losses, which csrc/registration.cpp describes.
    """

    fwd: Callable
    fwd_: Callable
    bwd_: Callable
    logprob_bwd: Callable
    rows_: Callable


def _register(prefix, logprob_ops, fwd=None, fwd_=None, bwd_=None, rows_=None):
    def backward(ctx, grad_loss):
        logits, grad_logprob, stats, targets, row_temperature, mask = ctx.saved_tensors
        rest = (row_temperature, ctx.temperature, ctx.softcap, mask, None, None)
        return (
            _from_stats(made, grad_loss, logits, grad_logprob, stats, targets, *(None,) * 4, *rest),
        )

    autograd = {"op": OP, "wrt": (0,), "setup": _setup, "backward": backward}
    results = ("dlogits", "logprob", "entropy", "grad_logprob")
    made = Ops(
        register(f"{prefix}_fwd", _fwd_fake, body=fwd, **autograd, create_graph=True),
        register(f"{prefix}_fwd_", _fwd_fake, body=fwd_, mutates=("out",)),
        register(f"{prefix}_bwd_", _in_place_fake, body=bwd_, mutates=("grad",)),
        logprob_ops.bwd,
        register(f"{prefix}_rows_", _in_place_fake, body=rows_, mutates=results),
    )
    return made


_CPP = None
if OP in _backend._CPU_OPS | _backend._CUDA_OPS:
    _CPP = _register("token_loss", _logprob._CPP)


# ---- Triton: the kernels are imported when an op first runs -----------------------------------


def _triton_fwd(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor | None,
    old_logprob: Tensor | None,
    clip: float,
    dual_clip: float,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    mask: Tensor | None,
    scale_tensor: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fastrlhf.kernels import token_loss as kernels

    policy = (advantages, old_logprob, clip, dual_clip)
    rest = (row_temperature, temperature, softcap, mask, scale_tensor, scale)
    return kernels.forward(logits, targets, *policy, *rest)


def _triton_fwd_(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor | None,
    old_logprob: Tensor | None,
    clip: float,
    dual_clip: float,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    mask: Tensor | None,
    scale_tensor: Tensor | None,
    scale: float,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fastrlhf.kernels import token_loss as kernels

    policy = (advantages, old_logprob, clip, dual_clip)
    rest = (row_temperature, temperature, softcap, mask, scale_tensor, scale)
    return kernels.forward(logits, targets, *policy, *rest, out)


def _triton_bwd_(grad: Tensor, upstream: Tensor) -> None:
    from fastrlhf.kernels import token_loss as kernels

    kernels.backward(grad, upstream)


def _triton_rows_(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor | None,
    old_logprob: Tensor | None,
    clip: float,
    dual_clip: float,
    entropy_coef: float,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    mask: Tensor | None,
    scale: Tensor,
    dlogits: Tensor,
    logprob: Tensor,
    entropy: Tensor | None,
    grad_logprob: Tensor | None,
) -> None:
    from fastrlhf.kernels import token_loss as kernels

    policy = (advantages, old_logprob, clip, dual_clip)
    settings = (entropy_coef, row_temperature, temperature, softcap, mask, scale)
    kernels.rows_(logits, targets, *policy, *settings, dlogits, logprob, entropy, grad_logprob)


_TRITON = _register(
    "token_loss_triton", _logprob._TRITON, _triton_fwd, _triton_fwd_, _triton_bwd_, _triton_rows_
)


def ops(backend: str) -> Ops:
    """The raw ops of a fused backend."""
    return _TRITON if backend == "triton" else _CPP
