"""ranking_loss: all-pairs loss of a reward model over K ranked completions of each prompt.

Shapes: P prompts, M completions in all; scores, ranks [M], cu_groups [P+1], margin [P].
"""

import torch
from torch import Tensor

from fastrlhf import reference
from fastrlhf.ops import _checks
from fastrlhf.ops._register import choose, register, trained

OP = "ranking_loss"


def ranking_loss(
    scores: Tensor,
    ranks: Tensor,
    cu_groups: Tensor,
    *,
    margin: float | Tensor = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Mean over prompts of the mean over a prompt's strict pairs of -log sigmoid(s_w - s_l - m).

    A strict pair (w, l) has rank_w < rank_l; ties are dropped. So each prompt weighs the same
    whatever its K: the paper's 1/C(K,2) sum, whose divisor is the number of pairs that are left
    after the ties are dropped. A prompt without a strict pair adds nothing and is not counted; if
    no prompt has one, the loss is 0. For K = 2 this is the pairwise loss
    ``-logsigmoid(chosen - rejected - margin).mean()``. The forward also computes the gradient,
    ``dL/ds_w = (sigmoid(s_w - s_l - m) - 1) / (prompts * pairs)`` per pair, and its negative for s_l.

    Args:
        scores: [M], the reward model's scores, one completion after another, prompt by prompt.
            float32, bfloat16, float16, or float64; any stride. Differentiable (once).
        ranks: [M], int32 or int64, at least 1; 1 is best, equal ranks are ties. Gaps are fine.
        cu_groups: int32 [P+1], rising from 0 to M: completions cu_groups[p]:cu_groups[p+1] belong
            to prompt p.
        margin: m, by which the better score must exceed the worse one. A number for all prompts, or a
            float tensor [P] (float64 if and only if `scores` is), one for all pairs of a prompt: with
            K = 2 a margin of its own for each pair. A constant.
        backend: see `fastrlhf.backends`.

    Returns:
        The loss, 0-d, float32 (float64 for float64 scores), in nats per pair.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or value, by argument name. On a GPU the
            values of `ranks` and `cu_groups` are not read, which would cost a sync; `cu_groups` that
            do not rise from 0 to M make loss and gradients NaN under backend "cuda".

    Source: Ouyang et al. 2022 (arXiv:2203.02155), eq. 1 and C.2; the margin is that of Touvron et al. 2023
        (arXiv:2307.09288), eq. 2. TRL and OpenRLHF take it per pair of two completions.

    >>> ranking_loss(torch.tensor([1.0, 0.0]), torch.tensor([1, 2]), torch.tensor([0, 2]).int())
    tensor(0.3133)
    """
    _checks.float_tensor(OP, "scores", scores)
    if scores.dim() != 1:
        raise ValueError(f"{OP}: scores must have shape (M,); got {tuple(scores.shape)}")
    _checks.index_tensor(OP, "ranks", ranks)
    _checks.shape(OP, "ranks", ranks, scores.shape)
    _checks.same_device(OP, "ranks", ranks, scores.device)
    cu_groups = _checks.offsets(
        OP, cu_groups, scores.shape[0], scores.device, name="cu_groups", axis="P"
    )
    if _checks.readable(ranks) and ranks.numel() and int(ranks.min()) < 1:
        raise ValueError(f"{OP}: ranks must be at least 1 (1 = best); got {int(ranks.min())}")
    if isinstance(margin, Tensor):
        _checks.per_sequence(OP, "margin", margin, "scores", scores, cu_groups.shape[0] - 1)
        _checks.constants(OP, margin=margin)
    else:
        margin = _checks.number(OP, "margin", margin)
    chosen = choose(OP, backend, scores)
    if chosen == "reference":
        _checks.has_values(OP, "cu_groups", cu_groups)
        return reference.ranking_loss(scores, ranks, cu_groups, margin=margin)
    return FWD[chosen](
        scores, ranks.long(), cu_groups, _margins(margin, scores, cu_groups), trained(scores)
    )[0]


def _margins(margin: float | Tensor, scores: Tensor, cu_groups: Tensor) -> Tensor | None:
    """[P] in the accumulator's dtype; None for 0."""
    dtype = _checks.acc_dtype(scores)
    if isinstance(margin, Tensor):
        return margin.to(dtype)
    if margin == 0:
        return None
    one = torch.full((), margin, dtype=dtype, device=scores.device)
    return one.expand(cu_groups.shape[0] - 1)


def _fake(scores, ranks, cu_groups, margins, with_grad):
    dtype = _checks.acc_dtype(scores)
    shape = scores.shape if with_grad else (0,)
    return scores.new_empty((), dtype=dtype), scores.new_empty(shape, dtype=dtype)


def _setup(ctx, arguments, outputs):
    ctx.dtype = arguments[0].dtype
    ctx.save_for_backward(outputs[1])


def _backward(ctx, grad_loss):
    (grad,) = ctx.saved_tensors
    grad = grad * grad_loss
    return (grad if grad.dtype == ctx.dtype else grad.to(ctx.dtype),)


# `grad`: dL/dscores, empty unless `with_grad`.
FWD = register(
    "ranking_loss_fwd(Tensor scores, Tensor ranks, Tensor cu_groups, Tensor? margins, bool with_grad) "
    "-> (Tensor loss, Tensor grad)",
    _fake,
    op=OP,
    triton="ranking_loss.forward",
    wrt=(0,),
    setup=_setup,
    backward=_backward,
)
