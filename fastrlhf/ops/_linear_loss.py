"""The linear losses: their one raw op, and the paths that an op cannot take.

Shapes: N rows, of which R count; H hidden, V vocabulary. One pass over each row turns a chunk's logits into log-probs,
loss terms and dlogits (_rows.py), and dlogits are multiplied into dX, dW and db (_linear.py): three GEMMs. (A loss
outside of the head needs the logits again: four.) The forward returns the gradients, and the backward scales them.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils._python_dispatch import _disable_current_modes

from fastrlhf.ops import _checks, _gemms, _linear_policy, ppo_loss, token_loss
from fastrlhf.ops._gemms import acc_of, as_parameters, gemms_for
from fastrlhf.ops._linear import Gradients, Head, statistics
from fastrlhf.ops._linear_policy import PLAIN_TENSORS
from fastrlhf.ops._register import (
    differentiable,
    needs,
    refuse_second_order,
    register_python,
    unkept,
)
from fastrlhf.ops._rows import NO_CLIP, RowKernels, TokenLoss

_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph
PPO, CROSS_ENTROPY = "linear_ppo_loss", "linear_cross_entropy"  # the raw op's `loss`


class Work(NamedTuple):
    """What the chunk loop needs: the head, the row kernels, and the sums of the gradients (None: forward only)."""

    head: Head
    kernels: RowKernels
    grads: Gradients | None


def work_of(
    head: Head, temperature, softcap, backend, needs, *, into=None, apart=False, compact=False, group=None
) -> Work:  # fmt: skip
    """`group`: the vocabulary is split over its ranks. `compact`: some rows have no gradient."""
    sums = None
    if group is None:
        kernels = RowKernels(backend, temperature, softcap)
    else:
        from fastrlhf.ops import _vocab_parallel  # imports torch.distributed

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
    gemms = gemms_for(hidden, weight)
    ppo, parameters = loss == PPO, (hidden, weight, bias)
    one = more = late = share = d_values = None
    # AOTInductor hands None over for an empty list.
    if per_token and len(per_token) > PLAIN_TENSORS:
        more = _linear_policy.more_of(per_token, settings)
        if more.factors is not None:  # of a row, in place of 1 / R
            share = more.factors[0] if factor is None else more.factors[0] * factor
    if backend == "cpu" and mask is into is group is None and not compact and True in needs[:3]:
        if more is None or more.late == "none":
            one = _one_chunk(
                gemms,
                parameters,
                targets,
                row_temperature,
                factor,
                per_token,
                settings,
                more,
                share,
                ppo,
                needs,
                workspace,
            )
    if one is not None:
        logprob, entropy, scale, found = one
        wrong = None
    else:
        head = Head(gemms, *parameters, targets, row_temperature, mask, workspace, num_rows)
        wrong = head.wrong
        mean = share is None and (ppo or settings[2] != 0)
        scale = scale_of(head, factor if share is None else share, mean=mean)
        options = {"into": into, "compact": compact, "group": group}
        work = work_of(head, settings[0], settings[1], backend, needs, **options)
        terms = _terms(head, per_token, settings, more, scale, ppo)
        if more is not None and more.late != "none":
            late = _linear_policy.LateTerms(head, work.kernels, more, terms.more[2])
            terms = terms._replace(more=[*terms.more[:3], late.sequences])
        logprob, entropy = _by_chunks(work, terms, ppo, compact, late)
        found = [None] * 3 if work.grads is None else work.grads.finish()
    if ppo:
        if mask is not None:
            logprob, entropy = head.scatter(logprob), head.scatter(entropy)
        factors = extra = options = None
        limits = settings[2:]
        if more is not None:
            sequences = more.sequences if late is None else late.sequences
            factors, extra, options = more.factors, [*more[:3], sequences], more.options
            per_token, limits = per_token[:4], settings[2:8]
        old_logprob, advantages, old_values, returns = per_token
        if settings[5] == _checks.UNLIMITED:
            old_values = None
        tokens = (logprob, old_logprob, advantages, values, old_values, returns, entropy, mask)
        fwd = ppo_loss.FWD[backend].raw
        total, metrics, stacked = fwd(*tokens, factors, extra, *limits, options, needs[3])
        if factor is not None:
            total = total * factor
        if needs[3]:
            d_values = stacked[1] if factor is None else stacked[1] * factor
    else:
        total, metrics = -(logprob.sum() * scale), logprob.new_empty(0)
    if wrong is not None:
        total = total.masked_fill(wrong, math.nan)
        metrics = metrics.masked_fill(wrong, math.nan)
        d_values = None if d_values is None else d_values.masked_fill(wrong, math.nan)
    return total, metrics, *as_parameters(found, parameters, kept_dtype), d_values


def _terms(head: Head, per_token, settings, more, scale: Tensor, ppo: bool) -> TokenLoss:
    """The loss of the R rows that count."""
    if not ppo:
        return TokenLoss(None, None, *NO_CLIP, scale)
    old_logprob, advantages = per_token[:2]
    low, high, dual_clip, _, _, entropy_coef = settings[2:8]
    limits = (low, high, dual_clip, entropy_coef, scale)
    if more is None:
        return TokenLoss(head.numbers(advantages), head.numbers(old_logprob), *limits)
    rows = (advantages, old_logprob, more.ref_logprob, more.rollout)
    advantages, old_logprob, *rows = (x if x is None else head.numbers(x) for x in rows)
    cu_seqlens = _linear_policy.cu_seqlens_of(head, more.cu_seqlens)
    extra = [*rows, cu_seqlens, more.sequences]
    return TokenLoss(advantages, old_logprob, *limits, extra, more.options)


def _by_chunks(work: Work, terms: TokenLoss, ppo: bool, compact: bool, late):
    """(logprob [R], entropy [R] or None), and the gradients in `work.grads`."""
    head, kernels, grads = work
    if grads is None:
        logprob, entropy, _ = statistics(head, kernels)
        if late is not None:
            late.of_all(logprob)
        return logprob, entropy
    logprob, entropy = head.new_rows(), head.new_rows() if ppo else None
    grad_logprob = head.new_rows() if compact and terms.entropy_coef == 0 else None
    ranges = None if late is None else late.ranges()
    for chunk in head.chunks(grads, ranges=ranges):
        if late is not None and late.holds_whole(chunk.rows):
            between = functools.partial(late.of_chunk, chunk.rows, logprob)
            kernels.loss_in_parts(chunk, terms, logprob, entropy, grad_logprob, between)
        else:
            kernels.loss(chunk, terms, logprob, entropy, grad_logprob)
        if grad_logprob is not None:
            chunk.carries = grad_logprob[chunk.rows] != 0
    return logprob, entropy


def _one_chunk(
    gemms, parameters, targets, row_temperature, factor, per_token, settings, more, share, ppo, needs, workspace
):  # fmt: skip
    """(logprob [N], entropy [N] or None, scale, [dX, dW, db]) on CPU, if all rows count; None if they exceed one chunk.

    For a small batch the loop would cost as much as its kernels: 12 us of 70.
    """
    logits_bytes, vocab = gemms.logits_bytes[workspace], parameters[1].shape[0]
    if not 0 < targets.numel() <= _gemms.chunk_rows(logits_bytes, vocab, gemms.acc):
        return None
    acc, (hidden, weight, bias) = gemms.acc, parameters
    if hidden.dtype is not acc or weight.dtype is not acc or bias is not None:
        hidden, weight, bias = map(gemms.operand, parameters)
    if hidden.dim() != 2:
        hidden = hidden.reshape(-1, hidden.shape[-1])
    if targets.dim() != 1:
        targets = targets.reshape(-1)
        row_temperature = None if row_temperature is None else row_temperature.reshape(-1)
    logits = gemms.logits(hidden, weight, bias, None)
    rows = logits.shape[0]
    logprob = logits.new_empty(rows)
    entropy = advantages = old_logprob = extra = options = None
    if not ppo:
        temperature, softcap, mean = settings
        low, high, dual_clip, entropy_coef = NO_CLIP
    elif more is None:
        temperature, softcap, low, high, dual_clip, _, _, entropy_coef = settings
    else:
        temperature, softcap, low, high, dual_clip, _, _, entropy_coef = settings[:8]
        ref_logprob, rollout, cu_seqlens, sequences = more[:4]
        extra = [gemms.operand(ref_logprob), gemms.operand(rollout), cu_seqlens, sequences]
        options = more.options
    if ppo:
        entropy, mean = logits.new_empty(rows), 1
        old_logprob, advantages = per_token[0], per_token[1]
        if old_logprob is not None and old_logprob.dtype is not acc:
            old_logprob = old_logprob.to(acc)
        if advantages is not None and advantages.dtype is not acc:
            advantages = advantages.to(acc)
    scale = share
    if scale is None:
        scale = _cpu_scalar(1 / rows if mean else 1.0, gemms.acc)
        if factor is not None:
            scale = scale * factor
    token_loss.ROWS_["cpu"].raw(
        logits,
        targets,
        advantages,
        old_logprob,
        extra,
        low,
        high,
        dual_clip,
        options,
        entropy_coef,
        row_temperature,
        temperature,
        softcap,
        None,
        scale,
        logits,  # dlogits overwrite them
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
    """The factor of a row's loss, 0-d: `factor` (None: 1), for a mean divided by the number of rows that count."""
    if mean and head.mask is not None and head.wrong is None:  # the rows have not been counted
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
    """A 0-d constant that is never written to; a new one would take 4 % of a small call.

    It is made outside of the modes that its first caller has entered, because it outlives them.
    """
    with torch.inference_mode(False), _disable_current_modes():
        return torch.scalar_tensor(value, dtype=dtype, device="cpu")


def kept_dtype(like: Tensor) -> torch.dtype:
    """The dtype of a gradient between forward and backward. fp16 could overflow before it is scaled down; use fp32."""
    return torch.float32 if like.dtype == torch.float16 else like.dtype


def scaled(ctx, grad_loss: Tensor, wanted) -> list[Tensor | None]:
    """The saved gradients times the upstream gradient, in ctx.dtypes; None where not wanted.

    In place, unless autograd retains the graph. (A tracer passes a subclass of Tensor.) An upstream gradient of 1 costs
    nothing: on CPU it is compared here, on a GPU by the kernel that multiplies.
    """
    keep = is_compiling() or type(grad_loss) is not Tensor or _keeps_graph()
    one = not keep and grad_loss.is_cpu and grad_loss.item() == 1
    by_kernel = not (keep or grad_loss.is_cpu or ctx.backend == "reference")
    out = []
    for grad, dtype, want in zip(ctx.saved_tensors, ctx.dtypes, wanted, strict=True):
        if not want:
            grad = None
        else:
            if keep:
                grad = grad * grad_loss
            elif by_kernel and _checks.acc_dtype(grad) is grad_loss.dtype:
                token_loss.BWD_[ctx.backend](grad, grad_loss.expand(grad.shape[:-1]))
            elif not one:
                grad.mul_(grad_loss)
            if grad.dtype is not dtype:
                grad = grad.to(dtype)
        out.append(grad)
    return out


def _linear_loss(op, body, backend, into, late, hidden, weight, bias, values):
    total = torch.zeros_like(into) if late else into
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        loss, grads = body(total)
    if late:
        grads[1] = total
    return loss, *grads, *(None,) * (4 - len(grads))


def _setup(ctx, arguments, outputs):
    ctx.op, _, ctx.backend, ctx.into, ctx.late, *parameters = arguments
    ctx.spent = False
    ctx.dtypes = [None if p is None else p.dtype for p in parameters]
    if ctx.late:
        ctx.dtypes[1] = ctx.into.dtype
    ctx.save_for_backward(*outputs[1:])


def _backward(ctx, grad_loss):
    if torch.is_grad_enabled():
        refuse_second_order(ctx.op, "; got create_graph=True")
    wanted = list(ctx.needs_input_grad[:-2])
    if ctx.into is None:
        return scaled(ctx, grad_loss, wanted)
    if ctx.spent:
        raise RuntimeError(
            f"{ctx.op}: with accumulate_into the backward runs once, for dW has been added once; "
            "got a second one (retain_graph=True)"
        )
    ctx.spent, wanted[1] = True, ctx.late
    grads = scaled(ctx, grad_loss if ctx.late else _one(ctx.op, grad_loss), wanted)
    if ctx.late:
        ctx.into.add_(grads[1])
        grads[1] = None
    return grads


_with_gradients = differentiable(
    unkept(_linear_loss),
    op=lambda arguments: arguments[0],
    wrt=(5, 6, 7, 8),
    setup=_setup,
    backward=_backward,
    create_graph=True,
)


def gradients_in_forward(op, body, backend, into, hidden, weight, bias, values=None) -> Tensor:
    """The loss of `body(into) -> (loss, [dX, dW, db, ...])`, with these gradients of the parameters.

    Eager mode only, for a `body` that calls a Python function, adds to a tensor or waits for other ranks. With `into`
    it adds dW to this tensor, for an upstream gradient of 1. Under saved-tensor hooks dW is saved like the other
    gradients, and added in the backward: a checkpoint, which works by such hooks, runs the forward again, but the
    backward once. (The hook on top may be another's and hide the checkpoint.)
    """
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"{op}: torch.func transforms (vmap, grad, ...) are not implemented for loss_fn, "
            "accumulate_into or process_group; loop over the batch, or use reduction='none' "
            "without accumulate_into"
        )
    if _checks.valueless(hidden):
        raise NotImplementedError(
            f"{op}: meta and fake tensors are not implemented for accumulate_into or process_group"
        )
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    late = into is not None and hooks is not None
    return _with_gradients(op, body, backend, into, late, hidden, weight, bias, values)[0]


def in_forward(arguments, values, *, into, group):
    """(loss, metrics) of the raw op's arguments where an op cannot go: dW is added to `into`, or ranks wait."""
    found = {}
    hidden, weight, bias, *_, loss, _, backend, needs = arguments

    def body(into):
        total, found["metrics"], *grads = _forward(*arguments, into=into, group=group)
        if needs[3]:
            grads[3] = grads[3].reshape(values.shape)
        return total, grads

    total = gradients_in_forward(loss, body, backend, into, hidden, weight, bias, values)
    return total, found["metrics"]


def by_reference(op: str, function: Callable, parameters, *, into, group):
    """`function(hidden, weight, bias, values)` in plain PyTorch: a loss, or a tuple with a field `loss`.

    Over a group, it gets the whole head. With `into`, dW is added to it in the forward, as the fused backends do.
    """

    def whole(hidden, weight, bias, values):
        if group is not None:
            from fastrlhf.ops import _vocab_parallel  # imports torch.distributed

            weight, bias = _vocab_parallel.whole_head(group, weight, bias)
        return function(hidden, weight, bias, values)

    if into is None or not torch.is_grad_enabled():
        return whole(*parameters)
    wanted, found = needs(*parameters), {}

    def body(into):
        leaves = [x if x is None else x.detach() for x in parameters]
        wrt = [x.requires_grad_() for x, want in zip(leaves, wanted, strict=True) if want]
        with torch.enable_grad():
            found["out"] = out = whole(*leaves)
        loss = out if isinstance(out, Tensor) else out.loss
        made = iter(torch.autograd.grad(loss, wrt))
        grads = [next(made) if want else None for want in wanted]
        into.add_(grads[1])
        grads[1] = None
        return loss.detach(), grads

    loss = gradients_in_forward(op, body, "reference", into, *parameters)
    return loss if isinstance(found["out"], Tensor) else found["out"]._replace(loss=loss)


def _one(op: str, grad_loss: Tensor) -> Tensor:
    """Checks that the upstream gradient is 1. On a GPU, where reading it would wait, another one becomes NaN."""
    if grad_loss.device.type != "cpu":
        return grad_loss.masked_fill(grad_loss != 1, torch.nan)
    if grad_loss.item() != 1:
        raise RuntimeError(
            f"{op}: with accumulate_into the upstream gradient of the loss must be 1, for dW has been "
            f"added already; got {grad_loss.item():g}. Give the factor as scale= instead"
        )
    return grad_loss


def whole_vocab(op: str, group, hidden: Tensor, weight: Tensor) -> int:
    """V. With a group, `weight` holds this rank's rows of it."""
    if group is None:
        return weight.shape[0]
    if is_compiling():
        raise ValueError(
            f"{op}: process_group must be None under torch.compile, which cannot trace its collectives: "
            "put the call into a function with @torch.compiler.disable"
        )
    from fastrlhf.ops import _vocab_parallel  # imports torch.distributed

    return _vocab_parallel.check_group(op, group, hidden, weight)


def check_accumulate(
    op: str, into: object, weight: Tensor, dtype: torch.dtype, inputs: dict[str, Tensor | None]
) -> None:
    """Checks that dW can be added to `accumulate_into`, before anything is written."""
    name = "accumulate_into"
    if is_compiling():
        raise ValueError(f"{op}: {name} must be None under torch.compile, where dW is planned")
    _checks.tensor(op, name, into)
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
    if torch.is_grad_enabled():
        if not weight.requires_grad:
            raise ValueError(f"{op}: with {name}, weight must require grad")
        if weight._backward_hooks or weight._post_accumulate_grad_hooks:
            raise ValueError(
                f"{op}: {name} must be None for a weight with a hook (register_hook, "
                "register_post_accumulate_grad_hook), which would get no gradient"
            )
    first, last = _extent(into)
    for other, value in inputs.items():
        if value is None:
            continue
        low, high = _extent(value)
        if low < last and first < high:
            raise ValueError(f"{op}: {name} must not share memory with {other}; it does")


def _extent(x: Tensor) -> tuple[int, int]:
    """Addresses of the first byte of a tensor and of the one after its last."""
    if not x.numel():
        return 0, 0
    steps = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (steps + 1) * x.element_size()


# ---- the raw op ---------------------------------------------------------------------------------


def _fake(hidden, weight, bias, values, targets, mask, row_temperature, factor, *rest):
    *_, loss, _, _, needs = rest
    acc = acc_of(hidden, weight)
    # The second of two stacked gradients, unless it is multiplied by a factor.
    rows = (2,) if factor is None else ()
    d_values = hidden.new_empty((*rows, targets.numel()), dtype=acc) if needs[3] else None
    return (
        hidden.new_empty((), dtype=acc),
        hidden.new_empty(
            len(ppo_loss.METRICS) if loss == PPO else 0, dtype=torch.float32 if loss == PPO else acc
        ),
        *(
            like.new_empty(like.shape, dtype=kept_dtype(like)) if need else None
            for like, need in zip((hidden, weight, bias), needs[:3], strict=True)
        ),
        d_values[1] if needs[3] and rows else d_values,
    )


def _setup_op(ctx, arguments, outputs):
    ctx.op, ctx.backend = arguments[12], arguments[14]
    ctx.dtypes, kept = [], []
    for x, grad, need in zip(arguments, outputs[2:], arguments[-1], strict=False):
        ctx.dtypes.append(None if x is None else x.dtype)
        kept.append(grad if need else None)
    ctx.save_for_backward(*kept)


def _backward_op(ctx, grad_loss):
    if torch.is_grad_enabled():
        refuse_second_order(ctx.op, "; got create_graph=True")
    return scaled(ctx, grad_loss, ctx.needs_input_grad[:4])


# Returns the loss, its metrics and its gradients for an upstream gradient of 1 (empty where not needed).
# loss "linear_ppo_loss": per_token (old_logprob, advantages, old_values, returns), settings (temperature, softcap, low,
# high, dual_clip, value_clip, value_coef, entropy_coef); beyond plain PPO those of More (_linear_policy.py) follow in
# both. "linear_cross_entropy": per_token empty, settings (temperature, softcap, whether the loss is a mean). The four
# differentiable tensors stay outside the list: autograd silently drops the gradient of a tensor in a list with a None.
FWD = register_python(
    "linear_loss_fwd(Tensor hidden, Tensor weight, Tensor? bias, Tensor? values, Tensor targets, Tensor? mask, "
    "Tensor? row_temperature, Tensor? factor, Tensor?[] per_token, float[] settings, SymInt? num_rows, "
    "bool compact_rows, str loss, str workspace, str backend, bool[] needs) -> (Tensor loss, Tensor metrics, "
    "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias, Tensor grad_values)",
    _fake,
    _forward,
    op=lambda arguments: arguments[12],
    wrt=(0, 1, 2, 3),
    setup=_setup_op,
    backward=_backward_op,
    create_graph=True,
)
