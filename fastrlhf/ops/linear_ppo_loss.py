"""linear_ppo_loss: ppo_loss straight from hidden states, three GEMMs and never N x V logits.

Shapes: hidden [..., H] -> N rows, weight [V, H], bias [V]; every other tensor [...].
"""

import math

import torch
from torch import Tensor

from fastrlhf import reference
from fastrlhf.ops import _autograd, _backend, _checks, _chunks, _loss_head, _sequence
from fastrlhf.ops import ppo_loss as _ppo
from fastrlhf.ops._register import plain, register
from fastrlhf.ops.linear_logprob import check_linear, linear_logprob
from fastrlhf.ops.token_logprob import check, check_target_values, run
from fastrlhf.reference import PPOLossOutput

OP = "linear_ppo_loss"


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    mask: Tensor | None = None,
    clip: float = 0.2,
    dual_clip: float | None = None,
    value_clip: float | None = 0.2,
    value_coef: float = 0.5,
    entropy_coef: float = 0.0,
    scale: float | Tensor = 1.0,
    accumulate_into: Tensor | None = None,
    compact_rows: bool = False,
    workspace: str = "fast",
    process_group: "torch.distributed.ProcessGroup | None" = None,
    backend: str = "auto",
) -> PPOLossOutput:
    """`ppo_loss` of `linear_logprob`'s log-probs and entropies, with its gradients made in the forward.

    The bits of loss and metrics are those of the two ops one after the other. A chunk's log-probs
    give its dL/dlogprob, so that its logits become dlogits, dX and dW while they are there: 6 N H V
    FLOP for forward and backward instead of 8; the backward only scales. The entropy costs nothing,
    and is always among the metrics. On CPU masked rows enter no GEMM.

    Args:
        hidden, weight, targets, bias, temperature, softcap, workspace: as in `linear_logprob`.
        old_logprob, advantages, values, old_values, returns, mask, clip, dual_clip, value_clip,
            value_coef, entropy_coef: as in `ppo_loss`.
        scale, accumulate_into: as in `linear_cross_entropy`; the metrics are not scaled.
        compact_rows: rows whose gradient is exactly 0 (clipped, A = 0) enter the first GEMM alone, on
            CPU. A GPU would have to wait for their number: there this does nothing.
        process_group: as in `linear_logprob`; accumulate_into, as dW, is of this rank's rows. Every rank
            gets the same loss and metrics. Not under torch.compile.
        backend: who does the row maths and the loss; the GEMMs are the library's.

    Returns:
        PPOLossOutput(loss, metrics), as `ppo_loss`, with "entropy" among the metrics. Gradients flow to
        hidden, weight, bias and values, once.

    Raises:
        TypeError, ValueError: as `linear_logprob` and `ppo_loss`.

    Source: as `ppo_loss`; the gradients in the forward follow Liger Kernel (arXiv:2410.10989).

    >>> row = torch.zeros(1)
    >>> out = linear_ppo_loss(torch.zeros(1, 8), torch.zeros(4, 8), torch.tensor([1]), row, row + 1)
    >>> out.loss, out.metrics["entropy"]
    (tensor(-0.2500), tensor(1.3863))
    """
    check_linear(OP, hidden, weight, bias, workspace)
    row_temperature, temperature_number, cap, _ = check(
        OP, hidden, targets, temperature, softcap, None, vocab=weight.shape[0]
    )
    acc = _chunks.acc_of(hidden, weight)
    rows = {
        "old_logprob": old_logprob,
        "advantages": advantages,
        "values": values,
        "old_values": old_values,
        "returns": returns,
    }
    if old_logprob is None or advantages is None:
        _checks.tensor(OP, "old_logprob", old_logprob)
        _checks.tensor(OP, "advantages", advantages)
    _sequence.tokens_of(OP, "the log-prob", targets.shape, acc, hidden.device, **rows)
    if mask is not None:
        mask = _sequence.mask(OP, mask, targets)
    settings = _ppo.check_settings(OP, clip, dual_clip, value_clip, value_coef, entropy_coef)
    _ppo.check_value_tensors(OP, values, old_values, returns, value_clip)
    _ppo.check_constants(OP, old_logprob, advantages, old_values, returns)
    if not isinstance(compact_rows, bool):
        raise TypeError(f"{OP}: compact_rows must be a bool; got {type(compact_rows).__name__}")
    # None: 1, which costs nothing.
    one = type(scale) is float and scale == 1
    factor = None if one else _loss_head.scale_argument(OP, scale, hidden.device, acc)
    if accumulate_into is not None:
        inputs = {"hidden": hidden, "weight": weight, "targets": targets, "bias": bias, **rows}
        _loss_head.check_accumulate(OP, accumulate_into, weight, acc, inputs)
    chosen = _backend.choose(OP, backend, hidden, weight, bias)
    vocab = _loss_head.whole_vocab(OP, process_group, hidden, weight)
    if chosen == "reference" and accumulate_into is None and process_group is None:
        if hidden.device.type == "cpu" and not torch.compiler.is_compiling():
            check_target_values(OP, targets, vocab, mask)
        return _by_parts(
            linear_logprob(
                hidden,
                weight,
                targets,
                bias=bias,
                temperature=temperature,
                softcap=softcap,
                mask=mask,
                return_entropy=True,
                workspace=workspace,
                backend=chosen,
            ),
            rows,
            mask,
            settings,
            factor,
        )
    flat = (old_logprob, advantages, values, old_values, returns, mask)
    if targets.dim() != 1:
        flat = [None if x is None else x.reshape(-1) for x in flat]
    needs = _autograd.needs(hidden, weight, bias, values)
    arguments = (
        hidden,
        weight,
        targets,
        bias,
        row_temperature,
        temperature_number,
        cap,
        *flat,
        *settings,
        factor,
        compact_rows,
        workspace,
        chosen,
        *needs,
    )
    into = accumulate_into if torch.is_grad_enabled() else None
    if into is not None or process_group is not None:
        _loss_head.check_values(OP, targets, vocab, mask, row_temperature)
        found = {}

        def body():
            loss, found["metrics"], *grads = _forward(*arguments, into=into, group=process_group)
            if needs[3]:
                grads[3] = grads[3].reshape(values.shape)
            return loss, grads

        parameters = (hidden, weight, bias, values)
        loss = _loss_head.gradients_in_forward(OP, body, into is not None, *parameters)
        metrics = found["metrics"]
    else:
        loss, metrics, *_ = run(OP, _FWD, arguments)
    lazy = plain()
    return PPOLossOutput(loss, _ppo.named_metrics(metrics, values is not None, True, lazy))


def _by_parts(head, rows, mask, settings, factor):
    """The specification: the loss in plain PyTorch on the log-probs of the reference."""
    clip, dual_clip, value_clip, value_coef, entropy_coef = settings
    old_logprob, advantages, *_ = rows.values()
    out = reference.ppo_loss(
        head[0],
        old_logprob,
        advantages,
        **{name: rows[name] for name in ("values", "old_values", "returns")},
        entropy=head[1],
        mask=mask,
        clip=clip,
        dual_clip=None if math.isinf(dual_clip) else dual_clip,
        value_clip=None if math.isinf(value_clip) else value_clip,
        value_coef=value_coef,
        entropy_coef=entropy_coef,
    )
    return PPOLossOutput(_loss_head.times(out.loss, factor), out.metrics)


def _ppo_forward(backend, head, rows, mask, settings, grads):
    """(loss, metrics [9], dL/dlogprob, dL/dvalues, dL/dentropy), each gradient [N] or None."""
    old_logprob, advantages, values, old_values, returns = rows
    if backend == "reference":
        return _reference_forward(head, rows, mask, settings, grads)
    loss, metrics, *factor, stacked = _ppo.ops(backend).inside(
        head.logprob,
        old_logprob,
        advantages,
        values,
        None if math.isinf(settings[2]) else old_values,
        returns,
        head.entropy,
        mask,
        *settings,
        grads,
    )
    if not grads:
        return loss, metrics, None, None, None
    if factor:  # Triton leaves 1 / n out of its gradients
        stacked = stacked * factor[0]
    found = stacked.unbind()
    return loss, metrics, found[0], None if values is None else found[1], found[-1]


def _reference_forward(head, rows, mask, settings, grads):
    named = dict(
        zip(("old_logprob", "advantages", "values", "old_values", "returns"), rows, strict=True)
    )
    with torch.enable_grad():
        leaves = [head.logprob, head.entropy, named["values"]]
        leaves = [None if x is None else x.detach().clone().requires_grad_() for x in leaves]
        named["values"] = leaves[2]
        loss, metrics = _by_parts(leaves[:2], named, mask, settings, None)
        wanted = [x for x in leaves if x is not None]
        found = torch.autograd.grad(loss, wanted) if grads else [None] * len(wanted)
    zero = torch.zeros((), device=loss.device)
    metrics = torch.stack([metrics.get(name, zero) for name in _ppo.METRICS])
    return loss.detach(), metrics, found[0], found[2] if len(found) == 3 else None, found[1]


def _forward(
    hidden, weight, targets, bias, row_temperature, temperature, softcap,
    old_logprob, advantages, values, old_values, returns, mask,
    clip, dual_clip, value_clip, value_coef, entropy_coef,
    factor, compact, workspace, backend, *needs, into=None, group=None,
):  # fmt: skip
    settings = (clip, dual_clip, value_clip, value_coef, entropy_coef)
    rows = (old_logprob, advantages, values, old_values, returns)
    head = _loss_head.LossHead(
        hidden,
        weight,
        targets,
        bias,
        row_temperature,
        temperature,
        softcap,
        mask,
        workspace,
        backend,
        needs[:3],
        into=into,
        compact=compact,
        group=group,
    )
    last = None

    def slopes(where, logprob, entropy):
        # Over all N each time: the mean's denominator is right, and so are loss and metrics after the
        # last chunk. The rows that have no log-prob yet stand at 0, and nobody looks at their gradient.
        nonlocal last
        if not head.trains:
            return None, None
        last = _ppo_forward(backend, head, rows, mask, settings, True)
        g, h = last[2], last[4] if entropy_coef != 0 else None
        g, h = _chunks.rows_of(g, where), _chunks.rows_of(h, where)
        times = _loss_head.times
        return times(g, factor), None if h is None else times(h, factor)

    head.run(slopes)
    if last is None:
        last = _ppo_forward(backend, head, rows, mask, settings, needs[3])
    loss, metrics, _, d_values, _ = last
    grads = head.gradients(_loss_head.kept_dtype)
    grads.append(_loss_head.times(d_values, factor) if needs[3] else None)
    return _loss_head.times(loss, factor), metrics, *grads


@_chunks.without_autocast
def _fwd(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    old_logprob: Tensor,
    advantages: Tensor,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    mask: Tensor | None,
    clip: float,
    dual_clip: float,
    value_clip: float,
    value_coef: float,
    entropy_coef: float,
    factor: Tensor | None,
    compact_rows: bool,
    workspace: str,
    backend: str,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    needs_values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, metrics, dL/dX, dL/dW, dL/db, dL/dvalues); the last four None where not needed."""
    loss_arguments = (old_logprob, advantages, values, old_values, returns, mask)
    settings = (clip, dual_clip, value_clip, value_coef, entropy_coef)
    return _forward(
        *(hidden, weight, targets, bias, row_temperature, temperature, softcap),
        *(*loss_arguments, *settings, factor, compact_rows, workspace, backend),
        *(needs_hidden, needs_weight, needs_bias, needs_values),
    )


def _fake(hidden, weight, targets, bias, row_temperature, temperature, softcap, *rest):
    acc = _chunks.acc_of(hidden, weight)
    grads = _loss_head.fake_gradients((hidden, weight, bias), rest[-4:-1])
    return (
        hidden.new_empty((), dtype=acc),
        hidden.new_empty(len(_ppo.METRICS), dtype=torch.float32),
        *grads,
        hidden.new_empty(targets.numel(), dtype=acc) if rest[-1] else None,
    )


_WRT = (0, 1, 3, 9)  # hidden, weight, bias and values
_FWD = register(
    "linear_ppo_loss_fwd", _fake, body=_fwd, op=OP, wrt=_WRT, **_loss_head.scaling(_WRT, 2)
)
