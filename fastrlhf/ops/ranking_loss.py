"""ranking_loss: all-pairs loss of a reward model over K ranked completions of each prompt.

Shapes: P prompts, M completions in all; scores, ranks [M], cu_groups [P+1].
"""

import torch
from torch import Tensor

from fastrlhf import reference
from fastrlhf.ops import _autograd, _backend, _checks, _sequence

OP = "ranking_loss"


def ranking_loss(
    scores: Tensor, ranks: Tensor, cu_groups: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Mean over prompts of the mean over a prompt's strict pairs of -log sigmoid(s_w - s_l).

    A strict pair (w, l) has rank_w < rank_l; ties are dropped. So each prompt weighs the same
    whatever its K: the paper's 1/C(K,2) sum, whose divisor is the number of pairs that are left
    after the ties are dropped. A prompt without a strict pair adds nothing and is not counted; if
    no prompt has one, the loss is 0. For K = 2 this is the pairwise loss
    ``-logsigmoid(chosen - rejected).mean()``. The gradient, made in the forward, is
    ``dL/ds_w = (sigmoid(s_w - s_l) - 1) / (prompts * pairs)`` per pair, and its negative for s_l.

    Args:
        scores: [M], the reward model's scores, one completion after another, prompt by prompt.
            float32, bfloat16, float16, or float64; any stride. Differentiable (once).
        ranks: [M], int32 or int64, at least 1; 1 is best, equal ranks are ties. Gaps are fine.
        cu_groups: int32 [P+1], rising from 0 to M: completions cu_groups[p]:cu_groups[p+1] belong
            to prompt p.
        backend: see `fastrlhf.backends`.

    Returns:
        The loss, 0-d, float32 (float64 for float64 scores), in nats per pair.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or value, by argument name. On a GPU the
            values of `ranks` and `cu_groups` are not read, which would cost a sync; `cu_groups` that
            do not rise from 0 to M make loss and gradients NaN under backend "cuda".

    Source: Ouyang et al. 2022 (arXiv:2203.02155), eq. 1 and C.2.

    >>> ranking_loss(torch.tensor([1.0, 0.0]), torch.tensor([1, 2]), torch.tensor([0, 2]).int())
    tensor(0.3133)
    """
    _checks.float_tensor(OP, "scores", scores)
    if scores.dim() != 1:
        raise ValueError(f"{OP}: scores must have shape (M,); got {tuple(scores.shape)}")
    _checks.index_tensor(OP, "ranks", ranks)
    _checks.shape(OP, "ranks", ranks, scores.shape)
    _checks.same_device(OP, "ranks", ranks, scores.device)
    cu_groups = _groups(cu_groups, scores)
    if scores.device.type == "cpu" and not torch.compiler.is_compiling():
        if ranks.numel() and int(ranks.min()) < 1:
            raise ValueError(f"{OP}: ranks must be at least 1 (1 = best); got {int(ranks.min())}")
    chosen = _backend.choose(OP, backend, scores)
    if chosen == "reference":
        return reference.ranking_loss(scores, ranks, cu_groups)
    with_grad = _autograd.trained(scores)
    if chosen == "triton":
        return torch.ops.fastrlhf.ranking_loss_triton_fwd(scores, ranks, cu_groups, with_grad)[0]
    loss, _ = torch.ops.fastrlhf.ranking_loss_fwd(scores, ranks.long(), cu_groups, with_grad)
    return loss


def _groups(cu_groups, scores):
    try:
        return _checks.cu_seqlens(OP, cu_groups, scores.shape[0], scores.device)
    except (TypeError, ValueError) as error:
        message = str(error).replace("cu_seqlens", "cu_groups").replace("tokens", "completions")
        raise type(error)(message.replace("B + 1", "P + 1").replace("B >= 0", "P >= 0")) from None


def _fwd_fake(scores, ranks, cu_groups, with_grad):
    dtype = _sequence.acc_dtype(scores)
    shape = scores.shape if with_grad else (0,)
    return scores.new_empty((), dtype=dtype), scores.new_empty(shape, dtype=dtype)


def _setup_context(ctx, inputs, output):
    ctx.dtype = inputs[0].dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


@_autograd.once(OP)
def _backward(ctx, grad_loss, *_):
    # The Triton op leaves its gradient without 1 / (counted prompts), which stands before it.
    *factor, grad = ctx.saved_tensors
    scale = grad_loss * factor[0] if factor else grad_loss
    return (grad * scale).to(ctx.dtype), None, None, None


if OP in _backend._CPU_OPS | _backend._CUDA_OPS:
    torch.library.register_fake("fastrlhf::ranking_loss_fwd", _fwd_fake)
    torch.library.register_autograd(
        "fastrlhf::ranking_loss_fwd", _backward, setup_context=_setup_context
    )


@torch.library.custom_op("fastrlhf::ranking_loss_triton_fwd", mutates_args=())
def _triton_fwd(
    scores: Tensor, ranks: Tensor, cu_groups: Tensor, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from fastrlhf.kernels import ranking_loss as kernels  # imported when the op first runs

    return kernels.forward(scores, ranks, cu_groups, with_grad)


@torch.library.register_fake("fastrlhf::ranking_loss_triton_fwd")
def _triton_fwd_fake(*inputs):
    loss, grad = _fwd_fake(*inputs)
    return loss, torch.empty_like(loss), grad


torch.library.register_autograd(
    "fastrlhf::ranking_loss_triton_fwd", _backward, setup_context=_setup_context
)
