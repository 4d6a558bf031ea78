"""linear_ppo_loss: ppo_loss straight from hidden states, three GEMMs and never N x V logits.

Shapes: hidden [..., H] -> N rows, weight [V, H], bias [V]; every other tensor [...].
"""

import torch
from torch import Tensor

from fastrlhf.ops import _autograd, _backend, _checks, _linear_loss, _sequence
from fastrlhf.ops import ppo_loss as _ppo
from fastrlhf.ops._gemms import acc_of
from fastrlhf.ops._register import plain
from fastrlhf.ops.linear_logprob import check_linear, check_num_rows, linear_logprob
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
    num_rows: int | None = None,
    workspace: str = "fast",
    process_group: "torch.distributed.ProcessGroup | None" = None,
    backend: str = "auto",
) -> PPOLossOutput:
    """`ppo_loss` of `linear_logprob`'s log-probs and entropies, with its gradients made in the forward.

    The bits of loss and metrics are those of the two ops one after the other. A chunk's log-probs
    give its dL/dlogprob, so that its logits become dlogits, dX and dW while they are there: 6 N H V
    FLOP for forward and backward instead of 8; the backward only scales. The entropy costs nothing,
    and is always among the metrics. Masked rows enter no GEMM.

    Args:
        hidden, weight, targets, bias, temperature, softcap, workspace: as in `linear_logprob`.
        old_logprob, advantages, values, old_values, returns, mask, clip, dual_clip, value_clip,
            value_coef, entropy_coef: as in `ppo_loss`.
        scale, accumulate_into: as in `linear_cross_entropy`; the metrics are not scaled.
        compact_rows: rows whose gradient is exactly 0 (clipped, A = 0) enter only the first GEMM. On a
            GPU the host waits twice a chunk; while a CUDA graph is captured this does nothing.
        num_rows: as in `linear_logprob`. Without it the host waits for a GPU once, in the forward. A wrong
            one makes loss, metrics and gradients NaN there.
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
    acc = acc_of(hidden, weight)
    if old_logprob is None or advantages is None:
        _checks.tensor(OP, "old_logprob", old_logprob)
        _checks.tensor(OP, "advantages", advantages)
    _sequence.tokens_of(
        OP,
        "the log-prob",
        targets.shape,
        acc,
        hidden.device,
        old_logprob=old_logprob,
        advantages=advantages,
        values=values,
        old_values=old_values,
        returns=returns,
    )
    if mask is not None:
        mask = _sequence.mask(OP, mask, targets)
    settings = _ppo.check_settings(OP, clip, dual_clip, value_clip, value_coef, entropy_coef)
    if values is not None or old_values is not None or returns is not None:
        _ppo.check_value_tensors(OP, values, old_values, returns, value_clip)
    _ppo.check_constants(OP, old_logprob, advantages, old_values, returns)
    if not isinstance(compact_rows, bool):
        raise TypeError(f"{OP}: compact_rows must be a bool; got {type(compact_rows).__name__}")
    if num_rows is not None:
        check_num_rows(OP, num_rows, mask, targets)
    factor = _linear_loss.scale_argument(OP, scale, hidden.device, acc)
    if accumulate_into is not None:
        inputs = {"hidden": hidden, "weight": weight, "targets": targets, "bias": bias}
        inputs |= {"old_logprob": old_logprob, "advantages": advantages, "values": values}
        inputs |= {"old_values": old_values, "returns": returns}
        inputs |= {"temperature": row_temperature, "scale": factor}
        _linear_loss.check_accumulate(OP, accumulate_into, weight, acc, inputs)
    lazy = plain()
    compiling = None if not lazy else False
    chosen = _backend.choose(OP, backend, hidden, weight, bias, compiling=compiling)
    vocab = weight.shape[0]
    if process_group is not None:
        vocab = _linear_loss.whole_vocab(OP, process_group, hidden, weight)
    per_token = [old_logprob, advantages, old_values, returns]
    if chosen == "reference" and accumulate_into is None and process_group is None:
        if hidden.device.type == "cpu" and not torch.compiler.is_compiling():
            check_target_values(OP, targets, vocab, mask)
        head = linear_logprob(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            mask=mask,
            return_entropy=True,
            workspace=workspace,
            num_rows=num_rows,
            backend=chosen,
        )
        out = _linear_loss.reference_loss(head, values, per_token, mask, settings)
        return out if factor is None else PPOLossOutput(out.loss * factor, out.metrics)
    flat_values, flat_mask = values, mask
    if targets.dim() != 1:
        flat = lambda x: None if x is None else x.reshape(-1)  # noqa: E731
        per_token, flat_values, flat_mask = [flat(x) for x in per_token], flat(values), flat(mask)
    needs = _autograd.needs(hidden, weight, bias, values)
    arguments = (
        hidden,
        weight,
        bias,
        flat_values,
        targets,
        flat_mask,
        row_temperature,
        factor,
        per_token,
        [temperature_number, cap, *settings],
        num_rows,
        compact_rows,
        _linear_loss.PPO,
        workspace,
        chosen,
        needs,
    )
    into = accumulate_into if torch.is_grad_enabled() else None
    if into is not None or process_group is not None:
        _linear_loss.check_values(OP, targets, vocab, mask, row_temperature)
        options = {"into": into, "group": process_group}
        loss, metrics = _linear_loss.in_forward(OP, arguments, values, **options)
    else:
        fwd = _linear_loss.FWD
        out = run(OP, fwd.kernel if lazy else fwd, arguments, lazy)
        loss, metrics = out[0], out[1]
    return PPOLossOutput(loss, _ppo.named_metrics(metrics, values is not None, True, lazy))
