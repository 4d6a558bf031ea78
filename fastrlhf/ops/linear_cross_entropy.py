"""linear_cross_entropy: the language-model loss of hidden @ weight.T + bias, by chunks of rows.

Shapes: hidden [..., H] -> N rows, weight [V, H], bias [V], targets [...].
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrlhf.ops import _backend, _checks, _chunks
from fastrlhf.ops._rows import RowMaths
from fastrlhf.ops.linear_logprob import check_linear, linear_logprob
from fastrlhf.ops.token_logprob import check, check_target_values, run

OP = "linear_cross_entropy"


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    workspace: str = "fast",
    backend: str = "auto",
) -> Tensor:
    """-log softmax(z)[target] in nats, z as in `token_logprob`; 0 where target = ignore_index.

    "mean" and "sum" know the gradient of each logit as soon as its chunk is there: the forward
    makes dX and dW too, 6 N H V FLOP in all, and the backward only scales them. "none" is
    `linear_logprob`. On CPU ignored rows enter no GEMM.

    Args:
        hidden: [..., H], float32, bfloat16, float16, or float64 (CPU).
        weight: [V, H].
        targets: [...], int32 or int64, in [0, V) or ignore_index.
        bias: [V], or None.
        ignore_index: the target of rows that do not count; any integer outside [0, V).
        reduction: "mean" over the rows that count (0 if none do), "sum" or "none".
        temperature, softcap: as in `token_logprob`.
        workspace, backend: as in `linear_logprob`.

    Returns:
        A 0-d tensor, or [...] for "none"; float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: as `linear_logprob`; also for ignore_index and reduction.

    Source: `torch.nn.functional.cross_entropy`, whose result this is; the gradients in the forward
    follow Liger Kernel (arXiv:2410.10989).

    >>> linear_cross_entropy(torch.zeros(2, 8), torch.zeros(4, 8), torch.tensor([1, -100]))
    tensor(1.3863)
    """
    check_linear(OP, hidden, weight, bias, workspace)
    check_settings(OP, ignore_index, reduction)
    _checks.index_tensor(OP, "targets", targets)
    vocab = weight.shape[0]
    if 0 <= ignore_index < vocab:
        raise ValueError(f"{OP}: ignore_index must be outside [0, {vocab}); got {ignore_index}")
    counted = targets != ignore_index
    row_temperature, scale, cap, _ = check(
        OP, hidden, targets, temperature, softcap, None, vocab=vocab
    )
    chosen = _backend.choose(OP, backend, hidden)
    if reduction == "none":
        return -linear_logprob(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            mask=counted,
            workspace=workspace,
            backend=chosen,
        )
    if chosen == "reference" and hidden.device.type == "cpu" and not torch.compiler.is_compiling():
        check_target_values(OP, targets, vocab, counted)
    grad = torch.is_grad_enabled()
    needs = [grad and p is not None and p.requires_grad for p in (hidden, weight, bias)]
    loss, *_ = run(
        OP,
        torch.ops.fastrlhf.linear_cross_entropy_fwd,
        (
            hidden,
            weight,
            targets,
            bias,
            row_temperature,
            scale,
            cap,
            counted,
            reduction == "mean",
            workspace,
            chosen,
            *needs,
        ),
    )
    return loss


def check_settings(op, ignore_index, reduction):
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"{op}: ignore_index must be an int; got {type(ignore_index).__name__}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: reduction must be 'mean', 'sum' or 'none'; got {reduction!r}")


@torch.library.custom_op("fastrlhf::linear_cross_entropy_fwd", mutates_args=())
@_chunks.without_autocast
def linear_cross_entropy_fwd(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    mask: Tensor,
    mean: bool,
    workspace: str,
    backend: str,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, dloss/dX, dloss/dW, dloss/db); the last three empty where not needed."""
    needs = (needs_hidden, needs_weight, needs_bias)
    index = _chunks.counted_rows(mask)
    operands = _chunks.Operands(hidden, weight, bias, index)
    maths = RowMaths(backend, temperature, softcap)
    grads = _chunks.Gradients(operands, needs)
    take, vocab, acc = operands.take, weight.shape[0], operands.acc
    y, t = take(targets), take(row_temperature)
    m = None if index is not None else take(mask)
    # The loss is the sum of row_scale * logprob; a tensor, so that a GPU need not tell the count.
    row_scale = torch.full((), -1.0, dtype=acc, device=hidden.device)
    if mean:
        row_scale = row_scale / mask.sum().clamp(min=1)
    step = _chunks.chunk_rows(workspace, vocab, acc, hidden.device)
    options = {"dtype": acc, "device": hidden.device}
    buffer = torch.empty((min(step, operands.rows), vocab), **options)
    upstream = row_scale.expand(buffer.shape[0]).contiguous()
    total = torch.zeros((), **options)
    for start in range(0, operands.rows, step):
        stop = min(start + step, operands.rows)
        rows = slice(start, stop)
        x = operands.hidden_chunk(start, stop)
        logits = operands.logits(x, buffer[: stop - start])
        row_t = None if t is None else t[rows]
        row_m = None if m is None else m[rows]
        logprob, entropy, stats = maths.forward(logits, y[rows], row_t, row_m)
        total += logprob.sum()
        if any(needs):
            g = upstream[: stop - start]
            maths.backward_(g, None, logits, y[rows], entropy, stats, row_t, row_m)
            grads.add(start, stop, x, logits)
    return (total * row_scale, *grads.finish(hidden, weight, bias, _kept_dtype))


@linear_cross_entropy_fwd.register_fake
def _(hidden, weight, targets, bias, *rest):
    needs = rest[-3:]
    acc = _chunks.acc_dtype(torch.promote_types(hidden.dtype, weight.dtype))
    grads = [
        like.new_empty(like.shape, dtype=_kept_dtype(like)) if need else hidden.new_empty(0)
        for like, need in zip((hidden, weight, bias), needs, strict=True)
    ]
    return (hidden.new_empty((), dtype=acc), *grads)


def _kept_dtype(like: Tensor) -> torch.dtype:
    # fp16 ends at 65504: the gradient of a sum passes that before the upstream factor scales it down.
    return torch.float32 if like.dtype == torch.float16 else like.dtype


def _setup_context(ctx, inputs, output):
    ctx.dtypes = [None if inputs[i] is None else inputs[i].dtype for i in (0, 1, 3)]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


@once_differentiable
def _backward(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * 14
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
    grads = [
        (saved * grad_loss).to(dtype) if need else None
        for saved, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, needs, strict=True)
    ]
    return (grads[0], grads[1], None, grads[2], *(None,) * 10)


linear_cross_entropy_fwd.register_autograd(_backward, setup_context=_setup_context)
