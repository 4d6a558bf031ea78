"""token_logprob: log-probability of each row's target, and the entropy, from logits.

Shapes: logits [..., V] -> N rows; targets, mask, outputs [...]; stats [3, N] = (max m of z, log of
the sum of e^(z - m), mean of z - m under the softmax).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf import reference
from fastrlhf.ops import _backend, _checks
from fastrlhf.ops._register import register

OP = "token_logprob"


def token_logprob(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(z)[target] in nats, with z = softcap * tanh(logits / softcap) / temperature.

    The fused backends read the logits once and keep 12 bytes a row for the backward, which reads
    them once more and writes the gradient. With p = softmax(z), g = dL/dlogprob, h = dL/dentropy:
    ``dL/dz_j = g (1[j = target] - p_j) - h p_j (log p_j + entropy)``.

    Args:
        logits: [..., V], float32, bfloat16, float16, or float64 (CPU). Any strides before a unit
            last stride are read in place when they reduce to two (``logits[:, :-1]`` does).
        targets: [...], int32 or int64, in [0, V).
        temperature: above 0; a number, or a float tensor that broadcasts to ``targets``. A constant
            to autograd.
        softcap: above 0, or None. Applied before the temperature, as Gemma 2 does.
        mask: [...], True (or non-zero) where the row counts. Other rows are not read, their targets
            not looked at; they return 0 and get gradient 0.
        return_entropy: also return H = -sum_j p_j log p_j, differentiable, at no extra read.
        inplace_backward: let the backward write the gradient over ``logits``, whose contents are
            then lost; a second backward through the graph raises. A licence, not an order: the
            reference and torch.compile do not use it, nor do logits whose rows overlap or are
            copied to be read.
        backend: see `fastrlhf.backends`.

    Returns:
        logprob [...], or (logprob, entropy); float32 (float64 for float64 logits). Sums are kept in
        that dtype. Logits of -inf have probability 0; a row that holds a NaN gives NaN. Rows whose
        upstream gradients are 0 are not read by the backward of the fused backends.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or value. On CPU a counted target outside
            [0, V) raises ValueError: one compare a row, before the logits are touched. On a GPU that
            would cost a host sync, so the row's logprob and gradient are NaN instead, and nothing
            outside the row is read.

    Source: Milakov and Gimelshein 2018 (arXiv:1805.02867) for the online softmax.

    >>> token_logprob(torch.zeros(2, 4), torch.tensor([1, 3]))
    tensor([-1.3863, -1.3863])
    """
    row_temperature, temperature, softcap, mask = check(
        OP, logits, targets, temperature, softcap, mask
    )
    chosen = _backend.choose(OP, backend, logits, row_temperature)
    if chosen == "reference":
        return _reference(
            logits, targets, row_temperature, temperature, softcap, mask, return_entropy
        )
    # A compiled graph plans memory itself, and must not meet a hidden mutation.
    inplace = (
        inplace_backward and not torch.compiler.is_compiling() and _checks.overwritable(logits)
    )
    fwd = ops(chosen).fwd
    settings = (row_temperature, temperature, softcap, mask, return_entropy, inplace)
    logprob, entropy, _ = run(OP, fwd, (logits, targets, *settings))
    return (logprob, entropy) if return_entropy else logprob


def check(op, logits, targets, temperature, softcap, mask, vocab=None):
    """Checked (row_temperature | None, temperature, softcap or 0.0, bool mask | None).

    `logits` stands for any [..., X] tensor of the rows; `vocab` is V where X is not.
    """
    if vocab is None:  # else: hidden, which has been looked at
        _checks.float_tensor(op, "logits", logits)
    _checks.index_tensor(op, "targets", targets)
    if logits.dim() < 1:
        name = "logits" if vocab is None else "hidden"
        raise ValueError(f"{op}: {name} must have a last axis; got a 0-d tensor")
    rows = logits.shape[:-1]
    if targets.shape != rows:
        _checks.shape(op, "targets", targets, rows)
    _checks.same_device(op, "targets", targets, logits.device)
    if (logits.shape[-1] if vocab is None else vocab) == 0 and targets.numel() > 0:
        raise ValueError(f"{op}: the vocabulary must have at least 1 entry; got 0")
    softcap = 0.0 if softcap is None else _checks.number(op, "softcap", softcap, low=0, strict=True)
    row_temperature = None
    if isinstance(temperature, Tensor):
        row_temperature, temperature = _row_temperature(op, temperature, logits, targets), 1.0
    else:
        temperature = _checks.number(op, "temperature", temperature, low=0, strict=True)
    if mask is not None:
        mask = _checks.mask(op, mask, targets.shape, logits.device)
    return row_temperature, temperature, softcap, mask


def _row_temperature(op, temperature, logits, targets):
    _checks.float_tensor(op, "temperature", temperature)
    _checks.same_device(op, "temperature", temperature, logits.device)
    _checks.constants(op, temperature=temperature)
    try:
        rows = temperature.expand(targets.shape)
    except RuntimeError:
        raise ValueError(
            f"{op}: temperature must broadcast to {tuple(targets.shape)}; "
            f"got {tuple(temperature.shape)}"
        ) from None
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return rows.to(dtype).contiguous()


_VALUE_ERRORS = ("targets must be in", "temperature must be above 0", "num_rows must be")


def run(name, op, arguments, known_plain=False):
    """Calls what `register` returned; its complaints about values become ValueErrors of `name` in eager mode.

    `known_plain`: `plain` of _register.py has been asked.
    """
    if not known_plain and torch.compiler.is_compiling():
        return op(*arguments)
    try:
        return op(*arguments)
    except (RuntimeError, ValueError) as error:
        message = str(error)
        for start in _VALUE_ERRORS:
            if start in message:
                text = message[message.index(start) :].splitlines()[0]
                raise ValueError(f"{name}: {text}") from None
        raise


def check_target_values(op, targets, vocab, mask):
    """The same check for backends without one in their kernel; on CPU, in eager mode."""
    counted = targets if mask is None else targets[mask]
    if counted.numel() and (int(counted.min()) < 0 or int(counted.max()) >= vocab):
        bad = ((targets < 0) | (targets >= vocab)) & (True if mask is None else mask)
        row = int(bad.reshape(-1).nonzero()[0])
        value = int(targets.reshape(-1)[row])
        raise ValueError(f"{op}: targets must be in [0, {vocab}); got {value} at row {row}")


def reference_targets(op, logits, targets, row_temperature, mask):
    """(targets that the reference may gather, rows whose target was wrong); None: it has raised."""
    vocab = logits.shape[-1]
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        check_target_values(op, targets, vocab, mask)
        if row_temperature is not None:
            counted = row_temperature if mask is None else row_temperature[mask]
            if not bool((counted > 0).all()):
                raise ValueError(f"{op}: temperature must be above 0; got {counted.min():g}")
        return targets, None
    # A gather outside the vocabulary would bring the device down: read class 0, report NaN.
    wrong = (targets < 0) | (targets >= vocab)
    wrong = wrong if mask is None else wrong & mask
    return targets.masked_fill(wrong, 0), wrong


def _reference(logits, targets, row_temperature, temperature, softcap, mask, return_entropy):
    targets, wrong = reference_targets(OP, logits, targets, row_temperature, mask)
    out = reference.token_logprob(
        logits,
        targets,
        temperature=temperature if row_temperature is None else row_temperature,
        softcap=softcap or None,
        mask=mask,
        return_entropy=return_entropy,
    )
    if wrong is None:
        return out
    if return_entropy:
        return out[0].masked_fill(wrong, math.nan), out[1]
    return out.masked_fill(wrong, math.nan)


# ---- registration -------------------------------------------------------------------------------


def _acc_dtype(logits):
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _fwd_fake(logits, targets, *settings):
    dtype = _acc_dtype(logits)
    out = logits.new_empty(targets.shape, dtype=dtype)
    return out, torch.empty_like(out), logits.new_empty((3, targets.numel()), dtype=dtype)


def _bwd_fake(grad_logprob, grad_entropy, logits, *rest):
    return logits.new_empty(logits.shape)


def _bwd_inplace_fake(*args):
    return None


def _setup(ctx, arguments, outputs):
    logits, targets, row_temperature, ctx.temperature, ctx.softcap, mask, _, ctx.inplace = arguments
    ctx.save_for_backward(logits, targets, outputs[2], row_temperature, mask)


class Ops(NamedTuple):
    """The ops of a backend; `bwd_` writes to its last argument, which may be the logits."""

    fwd: Callable
    bwd: Callable
    bwd_: Callable


def _register(prefix, fwd=None, bwd=None, bwd_=None):
    bwd = register(f"{prefix}_bwd", _bwd_fake, body=bwd, op=OP, wrt=(0, 1, 2))
    bwd_ = register(f"{prefix}_bwd_", _bwd_inplace_fake, body=bwd_, mutates=("out",))

    def backward(ctx, grad_logprob, grad_entropy):
        logits, targets, stats, row_temperature, mask = ctx.saved_tensors
        settings = (row_temperature, ctx.temperature, ctx.softcap, mask)
        arguments = (grad_logprob, grad_entropy, logits, targets, stats, *settings)
        if not ctx.inplace:
            grad = bwd(*arguments)
        else:
            bwd_.below(*arguments, logits)
            # The saved logits are gone: let autograd notice any second use.
            torch.autograd.graph.increment_version(logits)
            grad = logits.detach()
        return (grad,)

    fwd = register(
        f"{prefix}_fwd",
        _fwd_fake,
        body=fwd,
        op=OP,
        wrt=(0,),
        gives=2,
        setup=_setup,
        backward=backward,
        create_graph=True,
    )
    return Ops(fwd, bwd, bwd_)


_CPP = _register("token_logprob") if OP in _backend._CPU_OPS | _backend._CUDA_OPS else None


# ---- Triton: the kernels are imported when an op first runs -----------------------------------


def _triton_fwd(
    logits: Tensor,
    targets: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    mask: Tensor | None,
    with_entropy: bool,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from fastrlhf.kernels import token_logprob as kernels

    settings = (row_temperature, temperature, softcap, mask, with_entropy)
    return kernels.forward(logits, targets, *settings)


def _triton_bwd(
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    stats: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    mask: Tensor | None,
) -> Tensor:
    from fastrlhf.kernels import token_logprob as kernels

    out = logits.new_empty(logits.shape)
    rest = (stats, row_temperature, temperature, softcap, mask)
    kernels.backward(grad_logprob, grad_entropy, logits, targets, *rest, out)
    return out


def _triton_bwd_(
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    stats: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    mask: Tensor | None,
    out: Tensor,
) -> None:
    from fastrlhf.kernels import token_logprob as kernels

    rest = (stats, row_temperature, temperature, softcap, mask)
    kernels.backward(grad_logprob, grad_entropy, logits, targets, *rest, out)


_TRITON = _register("token_logprob_triton", _triton_fwd, _triton_bwd, _triton_bwd_)


def ops(backend: str) -> Ops:
    """The raw ops of a fused backend."""
    return _TRITON if backend == "triton" else _CPP
