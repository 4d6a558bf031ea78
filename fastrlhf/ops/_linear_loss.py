"""The linear losses: their raw op, and what those share that cannot be one.

Shapes: N rows, of which R count; H hidden, V vocabulary. A chunk's logits become log-probs, loss terms and
dlogits in one pass over each row (_rows.py), and dlogits become dX, dW and db (_linear.py): three GEMMs. A loss
outside of the head needs the logits again, and four. The gradients are there when the forward returns; the
backward scales them.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastrlhf import reference
from fastrlhf.ops import _autograd, _checks, _chunks, token_loss
from fastrlhf.ops import ppo_loss as _ppo
from fastrlhf.ops._gemms import acc_dtype, acc_of, gemms_for
from fastrlhf.ops._linear import Gradients, Head, as_parameters, statistics
from fastrlhf.ops._register import differentiable, plain, register
from fastrlhf.ops._rows import RowKernels, TokenLoss
from fastrlhf.ops.token_logprob import check_target_values

_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph
PPO, CROSS_ENTROPY = "ppo", "cross_entropy"
NO_CLIP = 1.0, math.inf, 0.0  # clip, dual_clip, entropy_coef of a loss that has none
OF = {PPO: "linear_ppo_loss", CROSS_ENTROPY: "linear_cross_entropy"}  # the public op


class Work(NamedTuple):
    """What the loop over a head's chunks works with: the rows' kernels, and the sums of the gradients or None."""

    head: Head
    kernels: RowKernels
    grads: Gradients | None


def work_of(
    head: Head, temperature, softcap, backend, needs, *, into=None, apart=False, compact=False, group=None
) -> Work:  # fmt: skip
    """`group`: its ranks share out the vocabulary. `compact`: not every row will have a gradient."""
    sums = None
    if group is None:
        kernels = RowKernels(backend, temperature, softcap)
    else:
        from fastrlhf.ops import _vocab_parallel  # torch.distributed: only where it is asked for

        kernels = _vocab_parallel.ShardKernels(backend, temperature, softcap, group, head.vocab)
        sums = _vocab_parallel.HiddenSums(group)
    grads = None
    if True in needs[:3]:
        grads = Gradients(head, needs[:3], into=into, apart=apart, scattered=compact, sums=sums)
    return Work(head, kernels, grads)


def _forward(
    hidden, weight, bias, values, targets, mask, row_temperature, factor, per_token, settings, num_rows, compact,
    loss, workspace, backend, needs, *, into=None, group=None,
):  # fmt: skip
    gemms, ppo, parameters = gemms_for(hidden, weight), loss == PPO, (hidden, weight, bias)
    if (
        backend == "cpu"
        and mask is into is group is None
        and not compact
        and True in needs[:3]
        and gemms.fits_at_once(hidden, weight, workspace)
    ):
        logprob, entropy, scale, found = _at_once(
            gemms, parameters, targets, row_temperature, factor, per_token, settings, ppo, needs
        )
        head = wrong = None
    else:
        head = Head(gemms, *parameters, targets, row_temperature, mask, workspace, num_rows)
        wrong = head.wrong
        scale = scale_of(head, factor, mean=ppo or settings[2] != 0)
        options = {"into": into, "compact": compact, "group": group}
        work = work_of(head, settings[0], settings[1], backend, needs, **options)
        logprob, entropy = _by_chunks(work, per_token, settings, scale, ppo, compact)
        found = [None] * 3 if work.grads is None else work.grads.finish()
    if ppo:
        total, metrics, d_values = _ppo_of(
            head, backend, logprob, entropy, values, per_token, mask, settings[2:], needs[3]
        )
        if factor is not None:
            total = total * factor
            d_values = None if d_values is None else d_values * factor
    else:
        total, metrics, d_values = -(logprob.sum() * scale), logprob.new_empty(0), None
    if wrong is not None:
        total = total.masked_fill(wrong, math.nan)
        metrics = metrics.masked_fill(wrong, math.nan)
        d_values = None if d_values is None else d_values.masked_fill(wrong, math.nan)
    return total, metrics, *as_parameters(found, parameters, kept_dtype), d_values


def _by_chunks(work: Work, per_token, settings, scale, ppo: bool, compact: bool):
    """(logprob [R], entropy [R] or None), and the gradients in `work.grads`."""
    head, kernels, grads = work
    if grads is None:
        logprob, entropy, _ = statistics(head, kernels)
        return logprob, entropy
    logprob, entropy = head.new_rows(), head.new_rows() if ppo else None
    terms = TokenLoss(None, None, *NO_CLIP, scale)
    if ppo:
        old_logprob, advantages = head.numbers(per_token[0]), head.numbers(per_token[1])
        _, _, clip, dual_clip, _, _, entropy_coef = settings
        terms = TokenLoss(advantages, old_logprob, clip, dual_clip, entropy_coef, scale)
    grad_logprob = head.new_rows() if compact and terms.entropy_coef == 0 else None
    for chunk in head.chunks(grads):
        kernels.loss(chunk, terms, logprob, entropy, grad_logprob)
        if grad_logprob is not None:
            chunk.carries = grad_logprob[chunk.rows] != 0
    return logprob, entropy


def _at_once(gemms, parameters, targets, row_temperature, factor, per_token, settings, ppo, needs):
    """(logprob [N], entropy [N] or None, scale, [dX, dW, db]) on CPU, where every row counts and all are one chunk.

    The loop and what it keeps would cost a small batch as much as its kernels do: 12 us of 70.
    """
    hidden, weight, bias = map(gemms.operand, parameters)
    if hidden.dim() != 2:
        hidden = hidden.reshape(-1, hidden.shape[-1])
    if targets.dim() != 1:
        targets = targets.reshape(-1)
        row_temperature = None if row_temperature is None else row_temperature.reshape(-1)
    logits = gemms.logits(hidden, weight, bias, None)
    rows = logits.shape[0]
    logprob = logits.new_empty(rows)
    entropy, advantages, old_logprob = None, None, None
    clip, dual_clip, entropy_coef = NO_CLIP
    temperature, softcap, *rest = settings
    if ppo:
        entropy = logits.new_empty(rows)
        old_logprob, advantages = gemms.operand(per_token[0]), gemms.operand(per_token[1])
        clip, dual_clip, _, _, entropy_coef = rest
    scale = _cpu_scalar(1 / rows if ppo or rest[0] != 0 else 1.0, gemms.acc)
    if factor is not None:
        scale = scale * factor
    token_loss.ops("cpu").rows_.inside(
        logits,
        targets,
        advantages,
        old_logprob,
        clip,
        dual_clip,
        entropy_coef,
        row_temperature,
        temperature,
        softcap,
        None,
        scale,
        logits,  # where dlogits go
        logprob,
        entropy,
        None,
    )
    grads = [
        gemms.grad_hidden(logits, weight, None) if needs[0] else None,
        gemms.grad_weight(logits, hidden, None) if needs[1] else None,
        logits.sum(0) if needs[2] else None,
    ]
    return logprob, entropy, scale, grads


def scale_of(head: Head, factor: Tensor | None, *, mean: bool) -> Tensor:
    """What the loss of a row is multiplied by, 0-d: `factor` (None: 1), over the number of rows that count."""
    if mean and head.mask is not None and head.wrong is None:  # which nobody has counted
        scale = head.mask.sum(dtype=torch.float64).clamp(min=1).reciprocal().to(head.acc)
    else:
        share = 1 / head.rows if mean and head.rows else 1.0
        if head.device.type == "cpu":
            scale = _cpu_scalar(share, head.acc)
        else:
            scale = torch.scalar_tensor(share, dtype=head.acc, device=head.device)
    if factor is not None:
        scale = scale * factor
    return scale if head.wrong is None else scale.masked_fill(head.wrong, math.nan)


@functools.lru_cache(64)
def _cpu_scalar(value: float, dtype: torch.dtype) -> Tensor:
    """A constant that nobody writes to. (Made anew it is 4 % of a small call.)

    It outlives the mode and the default device that its first caller has set.
    """
    with torch.inference_mode(False), _disable_current_modes():
        return torch.scalar_tensor(value, dtype=dtype, device="cpu")


def _ppo_of(head, backend, logprob, entropy, values, per_token, mask, settings, needs_values):
    """(loss, metrics [9], dL/dvalues or None) of the whole batch."""
    old_logprob, advantages, old_values, returns = per_token
    if mask is not None:
        logprob, entropy = head.spread(logprob), head.spread(entropy)
    if backend == "reference":
        return _reference_ppo(logprob, entropy, values, per_token, mask, settings, needs_values)
    if math.isinf(settings[2]):
        old_values = None
    total, metrics, *factor, stacked = _ppo.ops(backend).inside(
        logprob,
        old_logprob,
        advantages,
        values,
        old_values,
        returns,
        entropy,
        mask,
        *settings,
        needs_values,
    )
    if not needs_values:
        return total, metrics, None
    # Triton leaves 1 / n out of its gradients.
    return total, metrics, stacked[1] * factor[0] if factor else stacked[1]


def _reference_ppo(logprob, entropy, values, per_token, mask, settings, needs_values):
    leaf = values.detach().requires_grad_(needs_values) if values is not None else None
    with torch.set_grad_enabled(needs_values):
        out = reference_loss((logprob, entropy), leaf, per_token, mask, settings)
        found = torch.autograd.grad(out.loss, leaf)[0] if needs_values else None
    zero = torch.zeros((), device=logprob.device)
    return (
        out.loss.detach(),
        torch.stack([out.metrics.get(name, zero) for name in _ppo.METRICS]),
        found,
    )


def reference_loss(head, values, per_token, mask, settings):
    """reference.ppo_loss of (logprob, entropy)."""
    old_logprob, advantages, old_values, returns = per_token
    clip, dual_clip, value_clip, value_coef, entropy_coef = settings
    return reference.ppo_loss(
        head[0],
        old_logprob,
        advantages,
        values=values,
        old_values=old_values,
        returns=returns,
        entropy=head[1],
        mask=mask,
        clip=clip,
        dual_clip=None if math.isinf(dual_clip) else dual_clip,
        value_clip=None if math.isinf(value_clip) else value_clip,
        value_coef=value_coef,
        entropy_coef=entropy_coef,
    )


def kept_dtype(like: Tensor) -> torch.dtype:
    """Of a gradient between forward and backward: that of a sum passes 65504 before it is scaled down."""
    return torch.float32 if like.dtype == torch.float16 else like.dtype


def scaled(ctx, grad_loss: Tensor, wanted) -> list[Tensor | None]:
    """The saved gradients times the upstream one, in ctx.dtypes; None where not wanted.

    In place where no later backward will want them: autograd is giving up the graph. (What traces a
    graph passes tensors of a type of its own.) Where the upstream one is 1, nothing moves: the CPU is asked
    for it, and a fused kernel on a GPU looks for itself.
    """
    keep = type(grad_loss) is not Tensor or _keeps_graph()
    one = not keep and grad_loss.is_cpu and grad_loss.item() == 1
    looks = not (keep or grad_loss.is_cpu or ctx.backend == "reference")
    out = []
    for grad, dtype, want in zip(ctx.saved_tensors, ctx.dtypes, wanted, strict=True):
        if not want:
            grad = None
        else:
            if keep:
                grad = grad * grad_loss
            elif looks and acc_dtype(grad.dtype) is grad_loss.dtype:
                token_loss.ops(ctx.backend).bwd_(grad, grad_loss.expand(grad.shape[:-1]))
            elif not one:
                grad.mul_(grad_loss)
            if grad.dtype is not dtype:
                grad = grad.to(dtype)
        out.append(grad)
    return out


def _run_body(op, body, backend, accumulated, hidden, weight, bias, values):
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        loss, grads = body()
    return loss, *grads, *(None,) * (4 - len(grads))


def _setup(ctx, arguments, outputs):
    ctx.op, _, ctx.backend, ctx.accumulated, *parameters = arguments
    ctx.spent = False
    ctx.dtypes = [None if p is None else p.dtype for p in parameters]
    ctx.save_for_backward(*outputs[1:])


def _backward(ctx, grad_loss):
    if torch.is_grad_enabled():
        _autograd.refuse(ctx.op, "; got create_graph=True")
    wanted = list(ctx.needs_input_grad[:-2])
    if ctx.accumulated:
        if ctx.spent:
            raise RuntimeError(
                f"{ctx.op}: with accumulate_into the backward runs once, for dW has been added once; "
                "got a second one (retain_graph=True)"
            )
        grad_loss = _one(ctx.op, grad_loss)
        ctx.spent, wanted[1] = True, False
    return scaled(ctx, grad_loss, wanted)


_with_gradients = differentiable(
    _run_body, op="linear", wrt=(4, 5, 6, 7), setup=_setup, backward=_backward, create_graph=True
)


def gradients_in_forward(
    op, body, backend, accumulated, hidden, weight, bias, values=None
) -> Tensor:
    """The loss that `body` returns, with its gradients [dX, dW, db, ...] of these parameters.

    Eager mode's way where an op cannot go: `body` holds Python functions, or adds to a tensor. With
    `accumulated`, dW has been added where it belongs, times an upstream gradient of 1.
    """
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"{op}: torch.func transforms (vmap, grad, ...) are not implemented for loss_fn, "
            "accumulate_into or process_group; loop over the batch, or use reduction='none' "
            "without accumulate_into"
        )
    return _with_gradients(op, body, backend, accumulated, hidden, weight, bias, values)[0]


def in_forward(op, arguments, values=None, *, into, group):
    """(loss, metrics) of the raw op's arguments where no op can go: dW is added to `into`, or ranks wait."""
    found = {}
    hidden, weight, bias, *_, backend, needs = arguments

    def body():
        loss, found["metrics"], *grads = _forward(*arguments, into=into, group=group)
        if needs[3]:
            grads[3] = grads[3].reshape(values.shape)
        return loss, grads

    accumulated = into is not None
    loss = gradients_in_forward(op, body, backend, accumulated, hidden, weight, bias, values)
    return loss, found["metrics"]


def _one(op: str, grad_loss: Tensor) -> Tensor:
    """An upstream gradient that must be 1; on a GPU another one becomes NaN, for asking would wait."""
    if grad_loss.device.type != "cpu":
        return grad_loss.masked_fill(grad_loss != 1, torch.nan)
    if grad_loss.item() != 1:
        raise RuntimeError(
            f"{op}: with accumulate_into the upstream gradient of the loss must be 1, for dW has been "
            f"added already; got {grad_loss.item():g}. Give the factor as scale= instead"
        )
    return grad_loss


def whole_vocab(op: str, group, hidden: Tensor, weight: Tensor) -> int:
    """V, of which `weight` may be this rank's part."""
    if group is None:
        return weight.shape[0]
    if torch.compiler.is_compiling():
        raise ValueError(
            f"{op}: process_group must be None under torch.compile, which cannot trace its collectives: "
            "put the call into a function with @torch.compiler.disable"
        )
    from fastrlhf.ops import _vocab_parallel  # torch.distributed: only where it is asked for

    return _vocab_parallel.check_group(op, group, hidden, weight)


def scale_argument(op, scale: object, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """A number, or a 0-d tensor, as a 0-d tensor of `dtype` that is a constant; None for 1, which costs nothing."""
    if type(scale) is float and scale == 1:
        return None
    if not isinstance(scale, Tensor):
        return torch.full((), _checks.number(op, "scale", scale), dtype=dtype, device=device)
    _checks.float_tensor(op, "scale", scale)
    _checks.shape(op, "scale", scale, ())
    _checks.same_device(op, "scale", scale, device)
    _checks.constants(op, scale=scale)
    return scale.detach().to(dtype)


def check_accumulate(
    op: str, into: object, weight: Tensor, dtype: torch.dtype, inputs: dict[str, Tensor | None]
) -> None:
    """Refuses what `accumulate_into` could not be added to, before anything is written."""
    name = "accumulate_into"
    if torch.compiler.is_compiling():
        raise ValueError(f"{op}: {name} must be None under torch.compile, where dW is planned")
    _checks.tensor(op, name, into)
    _checks.whole_tensor(op, name, into)
    if into.dtype not in (weight.dtype, dtype):
        allowed = " or ".join(dict.fromkeys((str(dtype), str(weight.dtype))))
        raise TypeError(f"{op}: {name} must be {allowed}; got {into.dtype}")
    _checks.shape(op, name, into, weight.shape)
    _checks.same_device(op, name, into, weight.device)
    if not into.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous; got strides {into.stride()}")
    if into.requires_grad:
        raise ValueError(
            f"{op}: {name} must be a constant, as weight.grad is; got a tensor that requires grad"
        )
    if torch.is_grad_enabled() and not weight.requires_grad:
        raise ValueError(f"{op}: with {name}, weight must require grad")
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if torch.is_grad_enabled() and hooks and hooks[0].__module__ == "torch.utils.checkpoint":
        raise ValueError(
            f"{op}: {name} must be None under torch.utils.checkpoint(use_reentrant=False), whose second "
            "forward would add dW again"
        )
    first, last = _extent(into)
    for other, value in inputs.items():
        if value is None:
            continue
        low, high = _extent(value)
        if low < last and first < high:
            raise ValueError(f"{op}: {name} must not share memory with {other}; it does")


def check_values(op: str, targets: Tensor, vocab: int, mask: Tensor | None, row_t) -> None:
    """On CPU: targets and temperatures that a kernel would refuse in a later chunk, refused at once.

    Not while something traces or transforms the call, where nobody can look.
    """
    if targets.device.type != "cpu" or not plain():
        return
    check_target_values(op, targets, vocab, mask)
    if row_t is not None:
        row_t = row_t if mask is None else row_t[mask]
        if not bool((row_t > 0).all()):
            raise ValueError(f"{op}: temperature must be above 0; got {row_t.min():g}")


def _extent(x: Tensor) -> tuple[int, int]:
    """Addresses of the first byte of a tensor and of the one after its last."""
    if not x.numel():
        return 0, 0
    steps = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (steps + 1) * x.element_size()


# ---- the raw op ---------------------------------------------------------------------------------


def _prototype(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor | None,
    targets: Tensor,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    factor: Tensor | None,
    per_token: list[Tensor | None],
    settings: list[float],
    num_rows: int | None,
    compact_rows: bool,
    loss: str,
    workspace: str,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, metrics, dL/dhidden, dL/dweight, dL/dbias, dL/dvalues); the last four None where not needed.

    loss "ppo": per_token (old_logprob, advantages, old_values, returns), settings (temperature, softcap, clip,
    dual_clip, value_clip, value_coef, entropy_coef). "cross_entropy": settings (temperature, softcap, whether the
    mean is wanted).
    """


def _fake(hidden, weight, bias, values, targets, *rest):
    *_, loss, _, _, needs = rest
    acc = acc_of(hidden, weight)
    return (
        hidden.new_empty((), dtype=acc),
        hidden.new_empty(
            len(_ppo.METRICS) if loss == PPO else 0, dtype=torch.float32 if loss == PPO else acc
        ),
        *(
            like.new_empty(like.shape, dtype=kept_dtype(like)) if need else None
            for like, need in zip((hidden, weight, bias), needs[:3], strict=True)
        ),
        hidden.new_empty(targets.numel(), dtype=acc) if needs[3] else None,
    )


def _setup_op(ctx, arguments, outputs):
    ctx.loss, ctx.backend = arguments[12], arguments[14]
    ctx.dtypes, kept = [], []
    for x, grad, need in zip(arguments, outputs[2:], arguments[-1], strict=False):
        ctx.dtypes.append(None if x is None else x.dtype)
        kept.append(grad if need else None)
    ctx.save_for_backward(*kept)


def _backward_op(ctx, grad_loss):
    if torch.is_grad_enabled():
        _autograd.refuse(OF[ctx.loss], "; got create_graph=True")
    return scaled(ctx, grad_loss, ctx.needs_input_grad[:4])


FWD = register(
    "linear_loss_fwd",
    _fake,
    body=_chunks.without_autocast(_forward),
    prototype=_prototype,
    op="linear_loss",
    wrt=(0, 1, 2, 3),
    setup=_setup_op,
    backward=_backward_op,
    create_graph=True,
)


def _over_batch(info, in_dims, *arguments):
    """Under vmap: one call after the other. torch's own loop does not take lists."""
    if info.batch_size == 0:
        raise RuntimeError(
            f"{OF[arguments[12]]}: vmap over a dimension of size 0 is not implemented"
        )

    def pick(x, dim, i):
        if isinstance(dim, (list, tuple)):
            return [pick(one, d, i) for one, d in zip(x, dim, strict=True)]
        return x if dim is None else x.select(dim, i)

    each = [
        torch.ops.fastrlhf.linear_loss_fwd(
            *(pick(x, dim, i) for x, dim in zip(arguments, in_dims, strict=True))
        )
        for i in range(info.batch_size)
    ]
    outputs = tuple(torch.stack(column) for column in zip(*each, strict=True))
    return outputs, (0,) * len(outputs)


torch.library.register_vmap("fastrlhf::linear_loss_fwd", _over_batch)
