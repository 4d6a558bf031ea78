"""linear_cross_entropy: the language-model loss of hidden @ weight.T + bias, a chunk of rows at a time.

Shapes: hidden [..., H] -> N rows, weight [V, H], bias [V], targets [...].
"""

import torch
from torch import Tensor

from fastrlhf import reference
from fastrlhf.ops import _backend, _checks, _linear_loss, token_loss
from fastrlhf.ops._register import choose, needs, on_all_ranks
from fastrlhf.ops.linear_logprob import logprob_of

OP = "linear_cross_entropy"


@on_all_ranks
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
    scale: float | Tensor = 1.0,
    accumulate_into: Tensor | None = None,
    num_rows: int | None = None,
    workspace: str = "fast",
    process_group: "torch.distributed.ProcessGroup | None" = None,
    backend: str = "auto",
) -> Tensor:
    """-log softmax(z)[target] in nats, z as in `token_logprob`; 0 where target = ignore_index.

    For "mean" and "sum" the forward also computes dX and dW, chunk by chunk, 6 N H V FLOP in all, and
    the backward only scales them. "none" is `linear_logprob`. Ignored rows enter no GEMM.

    Args:
        hidden: [..., H], float32, bfloat16, float16, or float64 (CPU).
        weight: [V, H].
        targets: [...], int32 or int64, in [0, V) or ignore_index.
        bias: [V], or None.
        ignore_index: the target of rows that do not count; any integer outside [0, V).
        reduction: "mean" over the rows that count (0 if none do), "sum" or "none".
        temperature, softcap: as in `token_logprob`.
        scale: a factor of the loss: a number, or a 0-d float tensor. A constant.
        accumulate_into: a contiguous [V, H] tensor such as ``weight.grad``, to which the forward adds
            dW if gradients are enabled; the backward then returns none for the weight, so that gradient
            accumulation holds one dW. float32 (float64 for float64), or the weight's dtype. The upstream
            gradient of the loss must be 1; factors of the loss go into `scale`. Another one raises on
            CPU; on a GPU, where the check would be a sync, dX and db are NaN. A second backward raises.
            dW is added even if the loss is not used. Under saved-tensor hooks (non-reentrant
            torch.utils.checkpoint, offloading) it is added in the backward, and two dW are held until
            then. It is added to the tensor of the first forward: a ``weight.grad`` that is replaced or
            set to None before the backward (as FSDP may do) does not get it. Refused for a weight with a
            hook, which would get no gradient. None (a ``weight.grad`` before the first backward)
            disables it.
        num_rows: the number of targets that are not ignore_index, as in `linear_logprob`.
        workspace, backend: as in `linear_logprob`.
        process_group: as in `linear_ppo_loss`.

    Returns:
        A 0-d tensor, or [...] for "none"; float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: as `linear_logprob`; also for ignore_index, reduction, scale and
            accumulate_into, which is then unchanged.

    Source: equals `torch.nn.functional.cross_entropy`; the gradients in the forward follow Liger
        Kernel (arXiv:2410.10989).

    >>> linear_cross_entropy(torch.zeros(2, 8), torch.zeros(4, 8), torch.tensor([1, -100]))
    tensor(1.3863)
    """
    acc = _checks.linear_head(OP, hidden, weight, bias, workspace)
    ignore_index = check_settings(OP, ignore_index, reduction)
    _checks.index_tensor(OP, "targets", targets)
    held = torch.iinfo(targets.dtype)
    if not held.min <= ignore_index <= held.max:
        raise ValueError(
            f"{OP}: ignore_index must be within the range of targets ({targets.dtype}); got {ignore_index}"
        )
    chosen = choose(OP, backend, hidden, weight, bias)
    vocab = _linear_loss.whole_vocab(OP, process_group, hidden, weight)
    if 0 <= ignore_index < vocab:
        raise ValueError(f"{OP}: ignore_index must be outside [0, {vocab}); got {ignore_index}")
    counted = targets != ignore_index
    row_temperature, temperature_number, cap, _ = _checks.logit_rows(
        *(OP, hidden, targets, temperature, softcap, None),
        vocab=weight.shape[0],
        sharded=process_group is not None,
    )
    if num_rows is not None:
        num_rows = _checks.num_rows(OP, num_rows, counted, targets)
    factor = _linear_loss.scale_argument(OP, scale, hidden.device, acc)
    if accumulate_into is not None:
        if reduction == "none":
            raise ValueError(f"{OP}: accumulate_into must be None with reduction='none'")
        inputs = {"hidden": hidden, "weight": weight, "targets": targets, "bias": bias}
        inputs |= {"temperature": row_temperature, "scale": factor}
        _linear_loss.check_accumulate(OP, accumulate_into, weight, acc, inputs)
    into = accumulate_into if torch.is_grad_enabled() else None
    if chosen == "reference" or into is not None or process_group is not None:
        _checks.row_values(OP, targets, vocab, counted, row_temperature)
    if chosen == "reference":

        def loss(hidden, weight, bias, _):
            out = reference.linear_cross_entropy(
                hidden,
                weight,
                targets,
                bias=bias,
                ignore_index=ignore_index,
                reduction=reduction,
                temperature=temperature_number if row_temperature is None else row_temperature,
                softcap=cap or None,
                num_rows=num_rows,
                workspace=workspace,
            )
            return out if factor is None else factor * out

        parameters = (hidden, weight, bias, None)
        return _linear_loss.by_reference(OP, loss, parameters, into=into, group=process_group)
    if reduction == "none":
        rows = (targets, bias, row_temperature, temperature_number, cap, counted)
        options = (num_rows, workspace, chosen, process_group)
        logprob = logprob_of(OP, hidden, weight, *rows, False, *options)
        return -logprob if factor is None else -factor * logprob
    arguments = (
        hidden,
        weight,
        bias,
        None,
        targets,
        counted,
        row_temperature,
        factor,
        [],
        [temperature_number, cap, float(reduction == "mean")],
        num_rows,
        False,
        OP,
        workspace,
        chosen,
        [*needs(hidden, weight, bias), False],
    )
    if into is not None or process_group is not None:
        return _linear_loss.in_forward(arguments, None, into=into, group=process_group)[0]
    return _linear_loss.FWD(*arguments)[0]


def check_settings(op: str, ignore_index: object, reduction: object) -> int:
    """The checked ignore_index."""
    checked = _checks.whole_number(op, "ignore_index", ignore_index)
    _checks.reduction(op, reduction)
    return checked


_backend.provide(OP, _backend.kernels(token_loss.OP), gradient=True)
