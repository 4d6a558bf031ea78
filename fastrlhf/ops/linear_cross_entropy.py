"""linear_cross_entropy: the language-model loss of hidden @ weight.T + bias, a chunk of rows at a time.

Shapes: hidden [..., H] -> N rows, weight [V, H], bias and class_weight [V], targets [...].
"""

import torch
from torch import Tensor

from fastrlhf import reference
from fastrlhf.ops import _backend, _checks, _cross_entropy, _linear_loss, _lse, token_loss
from fastrlhf.ops._register import choose, needs, on_all_ranks
from fastrlhf.ops.linear_logprob import rows_of
from fastrlhf.reference import LinearCrossEntropyOutput

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
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_lse: bool = False,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float | Tensor = 1.0,
    accumulate_into: Tensor | None = None,
    num_rows: int | None = None,
    workspace: str = "fast",
    process_group: "torch.distributed.ProcessGroup | None" = None,
    backend: str = "auto",
) -> Tensor | LinearCrossEntropyOutput:
    """-log softmax(z)[target] in nats, z as in `token_logprob`; 0 where target = ignore_index.

    With every setting, c = `class_weight` (1 each), e = `label_smoothing` and p = softmax(z), a row has
    ``-(1 - e) c[target] log p[target] - e / V sum_j c_j log p_j + z_loss lse^2``, ``lse = log sum_j e^z_j``.
    "mean" divides the sum of the first two terms by the sum of ``c[target]`` over the rows that count,
    as F.cross_entropy does, and that of the z-loss by the number of these rows: `z_loss` means the same
    with and without weights. The gradient in z_k of a row of the sum is
    ``(w + 2 z_loss lse) p_k - (1 - e) c[target] 1[k = target] - e / V c_k``,
    with ``w = (1 - e) c[target] + e / V sum_j c_j``.

    For "mean" and "sum" the forward also computes dX and dW, chunk by chunk, 6 N H V FLOP in all, and
    the backward only scales them. "none" is `linear_logprob`: 8 N H V. Ignored rows enter no GEMM. The
    settings that are not plain cost a second pass over a chunk's logits, and no GEMM.

    Args:
        hidden: [..., H], float32, bfloat16, float16, or float64 (CPU).
        weight: [V, H].
        targets: [...], int32 or int64, in [0, V) or ignore_index.
        bias: [V], or None.
        ignore_index: the target of rows that do not count; any integer that `targets` can hold, also
            inside the vocabulary (a pad id).
        reduction: "mean" over the rows that count (0 if none do), "sum" or "none".
        class_weight: [V], a factor of each class, float32, bfloat16, float16, or float64. A constant.
            Where the weights of a mean add up to 0 the cross entropy is 0.
        label_smoothing: e, in [0, 1].
        z_loss: the coefficient of lse^2, at least 0; about 1e-4 keeps the logits from drifting.
        return_lse: also return lse, a constant: `z_loss` trains on it, or `linear_logprob`.
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
        process_group: as in `linear_ppo_loss`. Every rank passes the class weights of the whole
            vocabulary.

    Returns:
        A 0-d tensor, or [...] for "none"; float32 (float64 for float64 inputs). With `return_lse` a
        named tuple (loss, lse), lse [...] and 0 for ignored rows.

    Raises:
        TypeError, ValueError: as `linear_logprob`; also for ignore_index, reduction, scale and
            accumulate_into, which is then unchanged.

    Source: equals `torch.nn.functional.cross_entropy`; the gradients in the forward follow Liger
        Kernel (arXiv:2410.10989), as does the mean of the z-loss (PaLM, arXiv:2204.02311, sec. 5).
        F.cross_entropy gives NaN for a mean over no rows, or over weights that add up to 0.

    >>> linear_cross_entropy(torch.zeros(2, 8), torch.zeros(4, 8), torch.tensor([1, -100]))
    tensor(1.3863)
    """
    acc = _checks.linear_head(OP, hidden, weight, bias, workspace)
    settings = check_settings(OP, ignore_index, reduction, label_smoothing, z_loss, return_lse)
    ignore_index, label_smoothing, z_loss = settings
    _checks.index_tensor(OP, "targets", targets)
    held = torch.iinfo(targets.dtype)
    if not held.min <= ignore_index <= held.max:
        raise ValueError(
            f"{OP}: ignore_index must be within the range of targets ({targets.dtype}); got {ignore_index}"
        )
    chosen = choose(OP, backend, hidden, weight, bias)
    vocab = _linear_loss.whole_vocab(OP, process_group, hidden, weight)
    if class_weight is not None:
        _checks.float_tensor(OP, "class_weight", class_weight)
        _checks.shape(OP, "class_weight", class_weight, (vocab,))
        _checks.same_device(OP, "class_weight", class_weight, hidden.device)
        _checks.constants(OP, class_weight=class_weight)
        class_weight = class_weight.to(acc)
    counted = targets != ignore_index
    row_temperature, temperature_number, cap, _ = _checks.logit_rows(
        *(OP, hidden, targets, temperature, softcap, counted if vocab == 1 else None),
        vocab=weight.shape[0],
        sharded=process_group is not None,
        with_lse=return_lse or z_loss != 0,
    )
    if num_rows is not None:
        num_rows = _checks.num_rows(OP, num_rows, counted, targets)
    factor = _checks.scale_argument(OP, scale, hidden.device, acc)
    if accumulate_into is not None:
        if reduction == "none":
            raise ValueError(f"{OP}: accumulate_into must be None with reduction='none'")
        inputs = {"hidden": hidden, "weight": weight, "targets": targets, "bias": bias}
        inputs |= {"temperature": row_temperature, "scale": factor, "class_weight": class_weight}
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
                class_weight=class_weight,
                label_smoothing=label_smoothing,
                z_loss=z_loss,
                return_lse=return_lse,
            )
            if factor is None:
                return out
            return out._replace(loss=factor * out.loss) if return_lse else factor * out

        parameters = (hidden, weight, bias, None)
        return _linear_loss.by_reference(OP, loss, parameters, into=into, group=process_group)
    if reduction == "none":
        rows = (targets, bias, row_temperature, temperature_number, cap, counted)
        options = (num_rows, workspace, chosen, process_group)
        logprob, _, lse, spread = rows_of(
            OP,
            hidden,
            weight,
            *rows,
            *options,
            with_lse=return_lse or z_loss != 0,
            with_spread=label_smoothing != 0,
            class_weight=class_weight,
        )
        of_row = None if class_weight is None else _lse.of_targets(class_weight, targets)
        terms = (of_row, label_smoothing, z_loss, vocab)
        loss = _cross_entropy.row_losses(logprob, lse, spread, *terms)
        loss = loss if factor is None else factor * loss
        return LinearCrossEntropyOutput(loss, lse.detach()) if return_lse else loss
    in_forward = into is not None or process_group is not None
    wanted = needs(hidden, weight, bias)
    if class_weight is not None or label_smoothing != 0 or z_loss != 0 or return_lse:
        arguments = (hidden, weight, bias, targets, counted, row_temperature, factor, class_weight)
        arguments += (temperature_number, cap, label_smoothing, z_loss, reduction == "mean")
        arguments += (num_rows, return_lse, workspace, chosen, *wanted)
        if in_forward:
            groups = {"into": into, "group": process_group}
            loss, lse = _cross_entropy.in_forward(arguments, **groups)
        else:
            loss, lse = _cross_entropy.FWD(*arguments)[:2]
        return LinearCrossEntropyOutput(loss, lse) if return_lse else loss
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
        [*wanted, False],
    )
    if in_forward:
        return _linear_loss.in_forward(arguments, None, into=into, group=process_group)[0]
    return _linear_loss.FWD(*arguments)[0]


def check_settings(
    op, ignore_index, reduction, label_smoothing, z_loss, return_lse
) -> tuple[int, float, float]:
    """(ignore_index, label_smoothing, z_loss), checked."""
    checked = _checks.whole_number(op, "ignore_index", ignore_index)
    _checks.reduction(op, reduction)
    floats = type(label_smoothing) is type(z_loss) is float
    if not (floats and label_smoothing == z_loss == 0):  # the common case
        label_smoothing = _checks.fraction(op, "label_smoothing", label_smoothing)
        z_loss = _checks.number(op, "z_loss", z_loss, low=0)
    if type(return_lse) is not bool:
        _checks.flag(op, "return_lse", return_lse)
    return checked, label_smoothing, z_loss


_backend.provide(OP, _backend.kernels(token_loss.OP), gradient=True)
