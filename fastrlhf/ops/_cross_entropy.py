"""The raw op of linear_cross_entropy with class weights, label smoothing, z-loss or lse; _linear_loss.py has the plain.

Shapes: N rows, of which R count; H hidden, V vocabulary, class_weight [V]. As in _linear_loss.py the forward computes
dX, dW and db of each chunk, three GEMMs in all. A row takes two passes instead of one: its statistics, from which the
gradients of log-prob, lse and spread (_lse.py) follow, and dlogits.
"""

import math

import torch
from torch import Tensor

from fastrlhf.ops import _linear_loss, _lse
from fastrlhf.ops._gemms import acc_of, as_parameters, gemms_for
from fastrlhf.ops._linear import Head
from fastrlhf.ops._register import refuse_second_order, register_python

OP = "linear_cross_entropy"


def row_losses(logprob, lse, spread, weight, smoothing, z_loss, vocab) -> Tensor:
    """Cross entropy [...] of rows with class weights `weight` [...] (None: 1), plus the z-loss where it is not 0."""
    loss = -logprob if smoothing == 0 else (smoothing - 1) * logprob
    loss = loss if weight is None else weight * loss
    if smoothing != 0:
        loss = loss - smoothing / vocab * spread
    return loss if z_loss == 0 else loss + z_loss * lse.square()


def _forward(
    hidden, weight, bias, targets, mask, row_temperature, factor, class_weight, temperature, softcap, smoothing,
    z_loss, mean, num_rows, with_lse, workspace, backend, needs_hidden, needs_weight, needs_bias, *, into=None,
    group=None,
):  # fmt: skip
    gemms, parameters = gemms_for(hidden, weight), (hidden, weight, bias)
    needs = (needs_hidden, needs_weight, needs_bias)
    head = Head(gemms, *parameters, targets, row_temperature, mask, workspace, num_rows)
    work = _linear_loss.work_of(head, temperature, softcap, backend, needs, into=into, group=group)
    kernels, grads = work.kernels, work.grads
    c = _lse.class_weights(kernels, head.vocab, class_weight)
    vocab = head.vocab if kernels.columns is None else kernels.vocab
    z_scale = _linear_loss.scale_of(head, factor, mean=mean)
    of_row, scale = None, z_scale
    if class_weight is not None:
        of_row = _lse.of_targets(class_weight, head.of_rows[0])
        if mean:
            scale = _weighted_scale(head, of_row, factor)
    cross_entropy, lse = head.new_rows(), head.new_rows()
    for chunk in head.chunks(grads):
        rest = (chunk.row_temperature, chunk.mask)
        logprob, _, row_stats = kernels.forward(chunk.logits, chunk.targets, *rest, False)
        own_lse, spread = _lse.lse_of(kernels, row_stats, *rest), None
        own_weight = head.per_row(of_row, chunk.rows)
        if smoothing != 0:
            sums = _lse.weighted_sum(kernels, chunk.logits, c)
            spread = _lse.spread_of(kernels, sums, own_lse, chunk.row_temperature, c, chunk.mask)
        settings = (own_weight, smoothing, 0.0, vocab)
        cross_entropy[chunk.rows] = row_losses(logprob, own_lse, spread, *settings)
        lse[chunk.rows] = own_lse
        if grads is None:
            continue
        g = (scale * (smoothing - 1)).expand_as(logprob)
        upstream = _lse.Upstream(
            (g if own_weight is None else g * own_weight).contiguous(),
            None,
            2 * z_loss * z_scale * own_lse if z_loss != 0 else None,
            (scale * (-smoothing / vocab)).expand_as(logprob) if smoothing != 0 else None,
        )
        _lse.backward(kernels, upstream, chunk, row_stats, c, keep_logits=False)
    total = cross_entropy.sum() * scale
    if z_loss != 0:
        total = total + z_loss * z_scale * lse.square().sum()
    if head.wrong is not None:
        total = total.masked_fill(head.wrong, math.nan)
    found = [None] * 3 if grads is None else grads.finish()
    lse = head.scatter(lse).view(targets.shape) if with_lse else lse.new_empty(0)
    return total, lse, *as_parameters(found, parameters, _linear_loss.kept_dtype)


def _weighted_scale(head: Head, of_row: Tensor, factor: Tensor | None) -> Tensor:
    """The factor of a row's loss in a mean weighted by `of_row` [R]; 0 where the weights add up to 0."""
    if head.mask is not None:
        of_row = of_row.masked_fill(~head.mask, 0.0)
    total = of_row.sum(dtype=torch.float64)
    scale = (1 / total).masked_fill(total == 0, 0.0).to(head.acc)
    if factor is not None:
        scale = scale * factor
    return scale if head.wrong is None else scale.masked_fill(head.wrong, math.nan)


def in_forward(arguments, *, into, group) -> tuple[Tensor, Tensor]:
    """(loss, lse) where an op cannot go: dW is added to `into`, or ranks wait."""
    found = {}
    hidden, weight, bias = arguments[:3]

    def body(into):
        loss, found["lse"], *grads = _forward(*arguments, into=into, group=group)
        return loss, grads

    backend = arguments[16]
    loss = _linear_loss.gradients_in_forward(OP, body, backend, into, hidden, weight, bias)
    return loss, found["lse"]


def _fake(hidden, weight, bias, targets, *rest):
    acc = acc_of(hidden, weight)
    with_lse, *_, needs_hidden, needs_weight, needs_bias = rest[10:]
    needs = (needs_hidden, needs_weight, needs_bias)
    return (
        hidden.new_empty((), dtype=acc),
        hidden.new_empty(targets.shape if with_lse else (0,), dtype=acc),
        *(
            like.new_empty(like.shape, dtype=_linear_loss.kept_dtype(like)) if need else None
            for like, need in zip((hidden, weight, bias), needs, strict=True)
        ),
    )


def _setup(ctx, arguments, outputs):
    ctx.dtypes = [None if x is None else x.dtype for x in arguments[:3]]
    ctx.backend = arguments[16]
    kept = zip(outputs[2:], arguments[-3:], strict=True)
    ctx.save_for_backward(*(grad if need else None for grad, need in kept))


def _backward(ctx, grad_loss):
    if torch.is_grad_enabled():
        refuse_second_order(OP, "; got create_graph=True")
    return _linear_loss.scaled(ctx, grad_loss, ctx.needs_input_grad[:3])


# The loss, lse [...] (empty unless with_lse), and the gradients for an upstream gradient of 1 (empty where not needed).
FWD = register_python(
    "linear_cross_entropy_fwd(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? mask, "
    "Tensor? row_temperature, Tensor? factor, Tensor? class_weight, float temperature, float softcap, "
    "float smoothing, float z_loss, bool mean, SymInt? num_rows, bool with_lse, str workspace, str backend, "
    "bool needs_hidden, bool needs_weight, bool needs_bias) "
    "-> (Tensor loss, Tensor lse, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    _fake,
    _forward,
    op=OP,
    wrt=(0, 1, 2),
    setup=_setup,
    backward=_backward,
    create_graph=True,
)
