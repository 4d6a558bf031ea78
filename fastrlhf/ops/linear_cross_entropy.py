"""linear_cross_entropy: the language-model loss of hidden @ weight.T + bias, by chunks of rows.

Shapes: hidden [..., H] -> N rows, weight [V, H], bias [V], targets [...].
"""

import torch
from torch import Tensor

from fastrlhf.ops import _autograd, _backend, _checks, _linear_loss
from fastrlhf.ops._gemms import acc_of
from fastrlhf.ops.linear_logprob import check_linear, check_num_rows, linear_logprob
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
    scale: float | Tensor = 1.0,
    accumulate_into: Tensor | None = None,
    num_rows: int | None = None,
    workspace: str = "fast",
    process_group: "torch.distributed.ProcessGroup | None" = None,
    backend: str = "auto",
) -> Tensor:
    """-log softmax(z)[target] in nats, z as in `token_logprob`; 0 where target = ignore_index.

    "mean" and "sum" know the gradient of each logit as soon as its chunk is there: the forward
    makes dX and dW too, 6 N H V FLOP in all, and the backward only scales them. "none" is
    `linear_logprob`. Ignored rows enter no GEMM.

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
            dW, where gradients are enabled; the backward then gives the weight none, so that steps
            which add up gradients hold one dW. float32 (float64 for float64), or the weight's dtype.
            The upstream gradient of the loss must be 1: what multiplies the loss goes into `scale`.
            Another one raises on CPU; on a GPU, where looking would be a sync, dX and db are NaN. A second
            backward raises. Under non-reentrant torch.utils.checkpoint, which would add dW twice,
            accumulate_into is refused. dW is added even where the loss is dropped. None (a ``weight.grad``
            before the first backward) asks for nothing.
        num_rows: how many targets are not ignore_index; as in `linear_logprob`, for whoever would
            otherwise wait for a GPU to count them.
        workspace, backend: as in `linear_logprob`.
        process_group: as in `linear_ppo_loss`.

    Returns:
        A 0-d tensor, or [...] for "none"; float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: as `linear_logprob`; also for ignore_index, reduction, scale and
            accumulate_into, which then is what it was.

    Source: `torch.nn.functional.cross_entropy`, whose result this is; the gradients in the forward
    follow Liger Kernel (arXiv:2410.10989).

    >>> linear_cross_entropy(torch.zeros(2, 8), torch.zeros(4, 8), torch.tensor([1, -100]))
    tensor(1.3863)
    """
    check_linear(OP, hidden, weight, bias, workspace)
    check_settings(OP, ignore_index, reduction)
    _checks.index_tensor(OP, "targets", targets)
    chosen = _backend.choose(OP, backend, hidden, weight, bias)
    vocab = _linear_loss.whole_vocab(OP, process_group, hidden, weight)
    if 0 <= ignore_index < vocab:
        raise ValueError(f"{OP}: ignore_index must be outside [0, {vocab}); got {ignore_index}")
    counted = targets != ignore_index
    row_temperature, temperature_number, cap, _ = check(
        OP, hidden, targets, temperature, softcap, None, vocab=weight.shape[0]
    )
    acc = acc_of(hidden, weight)
    if num_rows is not None:
        check_num_rows(OP, num_rows, counted, targets)
    factor = _linear_loss.scale_argument(OP, scale, hidden.device, acc)
    if accumulate_into is not None:
        inputs = {"hidden": hidden, "weight": weight, "targets": targets, "bias": bias}
        inputs |= {"temperature": row_temperature, "scale": factor}
        _linear_loss.check_accumulate(OP, accumulate_into, weight, acc, inputs)
    if reduction == "none":
        if accumulate_into is not None:
            raise ValueError(f"{OP}: accumulate_into must be None with reduction='none'")
        logprob = linear_logprob(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            mask=counted,
            workspace=workspace,
            num_rows=num_rows,
            process_group=process_group,
            backend=chosen,
        )
        return -logprob if factor is None else -factor * logprob
    if chosen == "reference" and hidden.device.type == "cpu" and not torch.compiler.is_compiling():
        check_target_values(OP, targets, vocab, counted)
    needs = [*_autograd.needs(hidden, weight, bias), False]
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
        _linear_loss.CROSS_ENTROPY,
        workspace,
        chosen,
        needs,
    )
    into = accumulate_into if torch.is_grad_enabled() else None
    if into is not None or process_group is not None:
        _linear_loss.check_values(OP, targets, vocab, counted, row_temperature)
        return _linear_loss.in_forward(OP, arguments, into=into, group=process_group)[0]
    return run(OP, _linear_loss.FWD, arguments)[0]


def check_settings(op, ignore_index, reduction):
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"{op}: ignore_index must be an int; got {type(ignore_index).__name__}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: reduction must be 'mean', 'sum' or 'none'; got {reduction!r}")
