"""linear_logprob: token_logprob of hidden @ weight.T + bias, without holding the N x V logits.

Shapes: hidden [..., H] -> N rows, weight [V, H], bias [V], targets, mask, outputs [...].
"""

import torch
from torch import Tensor

from fastrlhf import reference
from fastrlhf.ops import _backend, _checks, _lse, token_logprob
from fastrlhf.ops._gemms import acc_of, as_parameters, gemms_for
from fastrlhf.ops._linear import Gradients, Head, add_gradients, statistics
from fastrlhf.ops._register import (
    choose,
    differentiable,
    on_all_ranks,
    register_python,
    trained,
    unkept,
    without_autocast,
)
from fastrlhf.ops._rows import RowKernels

OP = "linear_logprob"
# Up to this many bytes of logits are kept for the backward (3 GEMMs); more are computed again (4 GEMMs).
KEEP_BYTES = 24 << 20


@on_all_ranks
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    return_lse: bool = False,
    num_rows: int | None = None,
    workspace: str = "fast",
    process_group: "torch.distributed.ProcessGroup | None" = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """`token_logprob` of the logits hidden @ weight.T + bias, a chunk of rows at a time.

    Forward 2 N H V FLOP, backward 6 N H V (logits again, dX, dW): a chunk's fp32 logits are computed in
    one workspace, turned into dlogits of the operands' dtype (on CPU in place) and multiplied into dX
    and dW, which are summed in fp32 and rounded once. Small problems (24 MiB of logits or less) keep
    their logits for the backward. A weight or hidden that needs no gradient costs no GEMM. Masked rows
    enter no GEMM; on CPU neither do rows whose upstream gradient is 0.

    Args:
        hidden: [..., H], float32, bfloat16, float16, or float64 (CPU).
        weight: [V, H], the language-model head. On CPU a 16-bit weight is widened (4 V H bytes).
        targets: [...], int32 or int64, in [0, V).
        bias: [V], or None.
        temperature, softcap, mask, return_entropy: as in `token_logprob`.
        return_lse: also return ``lse = log sum_j e^z_j`` of the scaled logits z, differentiable, at no
            extra product: ``dlse/dz_j = p_j``. The logit of the target is ``logprob + lse``. NaN if a logit is +inf.
        num_rows: the number of rows that `mask` counts, if known. Without it the host waits for a GPU to
            count them, once in the forward and once in the backward. (It cannot wait while a CUDA graph
            is captured: then masked rows enter the GEMMs.) A wrong number raises on CPU; on a GPU, where
            the check would wait, log-probs, entropies and gradients become NaN.
        workspace: "fast" or "compact": bytes of logits and dlogits held at a time (GPU 1.5 GiB or 256
            MiB, CPU 64 MiB or 24 MiB). It changes results only in the rounding of dW's sum.
        process_group: the vocabulary is split over its W ranks: weight [V / W, H] and bias [V / W] are
            rows [r V / W, (r + 1) V / W) of rank r; targets are in [0, V). Every rank passes the same
            hidden, targets, mask and upstream gradients and gets the same log-probs, entropies and
            (summed) dX, and dW and db of its own rows. Not traced by torch.compile.
        backend: runs the row kernels; the GEMMs are PyTorch's. See `fastrlhf.backends`.

    Returns:
        logprob [...], or (logprob, entropy), (logprob, lse) or (logprob, entropy, lse); float32
        (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: as `token_logprob`; also for weight, bias, workspace, process_group.

    Source: the chunked head of Liger Kernel (arXiv:2410.10989), with arbitrary upstream gradients.

    >>> linear_logprob(torch.zeros(2, 8), torch.zeros(4, 8), torch.tensor([1, 3]))
    tensor([-1.3863, -1.3863])
    """
    _checks.linear_head(OP, hidden, weight, bias, workspace)
    row_temperature, temperature, softcap, mask = _checks.logit_rows(
        *(OP, hidden, targets, temperature, softcap, mask),
        vocab=weight.shape[0],
        sharded=process_group is not None,
        with_lse=return_lse,
    )
    if num_rows is not None:
        num_rows = _checks.num_rows(OP, num_rows, mask, targets)
    if type(return_entropy) is not bool:
        _checks.flag(OP, "return_entropy", return_entropy)
    if type(return_lse) is not bool:
        _checks.flag(OP, "return_lse", return_lse)
    chosen = choose(OP, backend, hidden, weight, bias)
    vocab = weight.shape[0]
    if process_group is not None:
        from fastrlhf.ops import _vocab_parallel  # imports torch.distributed

        vocab = _vocab_parallel.check_group(OP, process_group, hidden, weight)
    if chosen == "reference" or process_group is not None:
        _checks.row_values(OP, targets, vocab, mask, row_temperature)
    rows = (targets, bias, row_temperature, temperature, softcap, mask)
    options = (num_rows, workspace, chosen, process_group)
    flags = (return_entropy, return_lse)
    logprob, entropy, lse, _ = rows_of(OP, hidden, weight, *rows, *options, *flags)
    if not (return_entropy or return_lse):
        return logprob
    return logprob, *([entropy] if return_entropy else []), *([lse] if return_lse else [])


def rows_of(
    op, hidden, weight, targets, bias, row_temperature, temperature, softcap, mask, num_rows, workspace, chosen,
    group, with_entropy=False, with_lse=False, with_spread=False, class_weight=None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(logprob, entropy, lse, spread) of checked arguments, for the public op `op`, which later errors name.

    lse and spread (_lse.py) only if asked for, and the reference's entropy. class_weight [V], in the accumulator's
    dtype: for spread.
    """
    if group is not None:
        from fastrlhf.ops import _vocab_parallel  # imports torch.distributed
    if chosen == "reference":
        if group is not None:
            weight, bias = _vocab_parallel.whole_head(group, weight, bias)
        return reference.linear_rows(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature if row_temperature is None else row_temperature,
            softcap=softcap or None,
            mask=mask,
            num_rows=num_rows,
            workspace=workspace,
            with_entropy=with_entropy,
            with_lse=with_lse,
            with_spread=with_spread,
            class_weight=class_weight,
        )
    arguments = (hidden, weight, targets, bias, row_temperature, class_weight, temperature)
    arguments += (softcap, mask, num_rows, workspace, chosen, op, with_lse, with_spread)
    if group is not None:
        return _vocab_parallel.logprob(*arguments, group)
    keep = trained(hidden, weight, bias) and _keeps_logits(hidden, weight, targets, mask, num_rows)
    return FWD(*arguments, keep)[:4]


def linear_logprob_with(look, hidden, weight, targets, *, bias, temperature, softcap, backend):
    """(logprob, entropy) of `linear_logprob`, with statistics of the logits, which exist one chunk of rows at a time.

    `look(logits [n, V], targets [n])` is called for each chunk, at least once. No gradient flows through it.
    """
    _checks.linear_head(OP, hidden, weight, bias, "fast")
    _, temperature, softcap, _ = _checks.logit_rows(
        OP, hidden, targets, temperature, softcap, None, vocab=weight.shape[0]
    )
    chosen = choose(OP, backend, hidden, weight, bias)
    _checks.row_values(OP, targets, weight.shape[0], None, None)
    if chosen == "reference":
        options = {"bias": bias, "temperature": temperature, "softcap": softcap or None}
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            wide = [None if x is None else reference.upcast(x) for x in (hidden, weight, bias)]
            look(
                torch.nn.functional.linear(*wide).reshape(-1, weight.shape[0]), targets.reshape(-1)
            )
        return reference.linear_logprob(hidden, weight, targets, return_entropy=True, **options)
    if not targets.numel():
        look(hidden.new_empty(0, weight.shape[0]), targets.reshape(-1))
    settings = (None, None, temperature, softcap, None, None, "fast", chosen, OP)
    flags = (False,) * 3  # with_lse, with_spread, keep
    return _looking(hidden, weight, targets, bias, *settings, *flags, look)[:2]


# ---- registration -------------------------------------------------------------------------------


def _keeps_logits(hidden, weight, targets, mask, num_rows) -> bool:
    # In a captured CUDA graph all rows take part, otherwise those that count: a forward inside a graph would keep other
    # rows than a backward outside of it expects.
    if hidden.is_cuda and mask is not None and num_rows is None:
        return False
    size = targets.numel() * weight.shape[0] * acc_of(hidden, weight).itemsize
    if torch.compiler.is_compiling():  # a size that only the data will tell may be too large
        from torch.fx.experimental.symbolic_shapes import guard_or_false  # slow to import

        return guard_or_false(size > 0) and guard_or_false(size <= KEEP_BYTES)
    return 0 < size <= KEEP_BYTES


def _fwd(
    hidden, weight, targets, bias, row_t, class_weight, temperature, softcap, mask, num_rows, workspace, backend, op,
    with_lse, with_spread, keep, look=None,
):  # fmt: skip
    gemms = gemms_for(hidden, weight)
    head = Head(gemms, hidden, weight, bias, targets, row_t, mask, workspace, num_rows)
    kernels = RowKernels(backend, temperature, softcap)
    kept = torch.empty(0, dtype=head.acc, device=head.device)
    if keep:
        # Those of the rows that count, one after the other; the remaining memory is never read.
        kept = kept.new_empty((head.count, head.vocab))
    if with_spread:
        c = _lse.class_weights(kernels, head.vocab, class_weight)
        look = _lse.SumOfChunks(head, kernels, c)
    logprob, entropy, row_stats = statistics(head, kernels, kept if kept.numel() else None, look)
    lse = spread = None
    if with_lse or with_spread:
        lse = _lse.lse_of(kernels, row_stats, head.of_rows[1], head.mask)
    if with_spread:
        spread = _lse.spread_of(kernels, look.sums, lse, head.of_rows[1], c, head.mask)
    found = [logprob, entropy, lse if with_lse else None, spread]
    for i, x in enumerate(found):
        if x is not None:
            found[i] = head.scatter(x).view(targets.shape)
    return *found, head.scatter(row_stats), kept


def _fwd_fake(hidden, weight, targets, *rest):
    with_lse, with_spread, keep = rest[-3:]
    acc = acc_of(hidden, weight)
    out = hidden.new_empty(targets.shape, dtype=acc)
    count, vocab = targets.numel(), weight.shape[0]
    return (
        out,
        torch.empty_like(out),
        torch.empty_like(out) if with_lse else None,
        torch.empty_like(out) if with_spread else None,
        hidden.new_empty((3, count), dtype=acc),
        hidden.new_empty((count, vocab) if keep else (0,), dtype=acc),
    )


def _bwd(
    grad_logprob, grad_entropy, grad_lse, grad_spread, hidden, weight, targets, bias, row_stats, kept, row_t,
    class_weight, temperature, softcap, mask, num_rows, workspace, backend, needs_hidden, needs_weight, needs_bias,
):  # fmt: skip
    upstream = (grad_logprob, grad_entropy, grad_lse, grad_spread)
    gemms = gemms_for(hidden, weight)
    active = mask
    if gemms.skips_idle_rows:
        active, num_rows = _active_rows(upstream, mask), None
    head = Head(gemms, hidden, weight, bias, targets, row_t, active, workspace, num_rows)
    grads = Gradients(head, (needs_hidden, needs_weight, needs_bias))
    logits = None
    if kept.numel():
        # If idle rows are not skipped, the rows are those of the forward, and computing their place would wait.
        place = _kept_rows(head, mask) if gemms.skips_idle_rows else None
        logits = kept[: head.rows] if place is None else kept.index_select(0, place)
    kernels = RowKernels(backend, temperature, softcap)
    c = None
    if grad_spread is not None:
        c = _lse.class_weights(kernels, head.vocab, class_weight)
    add_gradients(head, kernels, grads, upstream, row_stats, c, logits)
    return tuple(as_parameters(grads.finish(), (hidden, weight, bias), lambda like: like.dtype))


def _active_rows(upstream, mask) -> Tensor:
    """Which rows count and carry a gradient."""
    carries = mask
    for grad in upstream:
        if grad is not None:
            own = grad != 0
            carries = own if carries is mask else carries | own
    return carries if mask is None else carries & mask


def _kept_rows(head: Head, mask: Tensor | None) -> Tensor | None:
    """Indices of the head's rows among the kept logits, those of the rows that counted; None: all, in order."""
    if head.index is None or mask is None:
        return head.index
    counted = mask.reshape(-1).nonzero().squeeze(1)
    if head.index.numel() == counted.numel():
        return None
    return torch.searchsorted(counted, head.index)


def _bwd_fake(
    grad_logprob, grad_entropy, grad_lse, grad_spread, hidden, weight, targets, bias, *rest
):
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else None
        for x, need in zip((hidden, weight, bias), rest[-3:], strict=True)
    )


_BWD = register_python(
    "linear_logprob_bwd(Tensor? grad_logprob, Tensor? grad_entropy, Tensor? grad_lse, Tensor? grad_spread, "
    "Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor row_stats, Tensor kept, "
    "Tensor? row_temperature, Tensor? class_weight, float temperature, float softcap, Tensor? mask, "
    "SymInt? num_rows, str workspace, str backend, bool needs_hidden, bool needs_weight, "
    "bool needs_bias) -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    _bwd_fake,
    _bwd,
    op=OP,
)


def _setup(ctx, arguments, outputs):
    hidden, weight, targets, bias, row_t, class_weight = arguments[:6]
    ctx.temperature, ctx.softcap, mask = arguments[6:9]
    ctx.num_rows, ctx.workspace, ctx.backend, ctx.op, ctx.with_lse, ctx.with_spread = arguments[
        9:15
    ]
    *_, row_stats, kept = outputs
    ctx.save_for_backward(hidden, weight, targets, bias, row_stats, kept, row_t, class_weight, mask)


def _backward(ctx, *upstream):
    hidden, weight, targets, bias, row_stats, kept, row_t, class_weight, mask = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    # A tracer gives a gradient of an output that is empty, too.
    g, h, u, v = upstream
    upstream = (g, h, u if ctx.with_lse else None, v if ctx.with_spread else None)
    settings = (row_t, class_weight, ctx.temperature, ctx.softcap, mask)
    settings += (ctx.num_rows, ctx.workspace, ctx.backend)
    grads = _BWD(*upstream, hidden, weight, targets, bias, row_stats, kept, *settings, *needs)
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


_AUTOGRAD = {
    "op": lambda arguments: arguments[12],
    "wrt": (0, 1, 3),
    "gives": 4,
    "setup": _setup,
    "backward": _backward,
}
# `op`: the public op, which errors name. `lse`, `spread`: empty if not asked for. `kept` [N, V]: the logits with
# `keep`; else empty.
FWD = register_python(
    "linear_logprob_fwd(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? row_temperature, "
    "Tensor? class_weight, float temperature, float softcap, Tensor? mask, SymInt? num_rows, str workspace, "
    "str backend, str op, bool with_lse, bool with_spread, bool keep) "
    "-> (Tensor logprob, Tensor entropy, Tensor lse, Tensor spread, Tensor row_stats, Tensor kept)",
    _fwd_fake,
    _fwd,
    **_AUTOGRAD,
)
_looking = differentiable(unkept(without_autocast(_fwd)), **_AUTOGRAD)
_backend.provide(OP, _backend.kernels(token_logprob.OP), gradient=True)
