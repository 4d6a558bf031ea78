"""linear_logprob: token_logprob of hidden @ weight.T + bias, without ever holding the N x V logits.

Shapes: hidden [..., H] -> N rows, weight [V, H], bias [V], targets, mask, outputs [...].
"""

import torch
from torch import Tensor

from fastrlhf.ops import _autograd, _backend, _checks, _chunks
from fastrlhf.ops._gemms import acc_of, check_count, gemms_for
from fastrlhf.ops._linear import Gradients, Head, add_gradients, as_parameters, statistics
from fastrlhf.ops._register import differentiable, plain, register
from fastrlhf.ops._rows import RowKernels
from fastrlhf.ops.token_logprob import check, check_target_values, run, token_logprob

OP = "linear_logprob"
# Logits of at most this many bytes stay for the backward (3 GEMMs); larger ones are made again (4).
KEEP_BYTES = 24 << 20


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
    num_rows: int | None = None,
    workspace: str = "fast",
    process_group: "torch.distributed.ProcessGroup | None" = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`token_logprob` of the logits hidden @ weight.T + bias, made a chunk of rows at a time.

    Forward 2 N H V FLOP, backward 6 N H V (logits again, dX, dW): a chunk's logits are made in
    fp32 in one workspace, turned into dlogits of the operands' dtype (on CPU in place) and multiplied
    into dX and dW, which are summed in fp32 and rounded once. Small problems (24 MiB of logits or less)
    keep their logits for the backward instead of making them again. A weight or hidden that needs no
    gradient skips its GEMM. Masked rows enter no GEMM; on CPU neither do rows whose upstream gradient is 0.

    Args:
        hidden: [..., H], float32, bfloat16, float16, or float64 (CPU).
        weight: [V, H], the language-model head. On CPU a 16-bit weight is widened (4 V H bytes).
        targets: [...], int32 or int64, in [0, V).
        bias: [V], or None.
        temperature, softcap, mask, return_entropy: as in `token_logprob`.
        num_rows: how many rows of `mask` count, where the caller knows it. Without it the host waits for a
            GPU to count them, once in the forward and once in the backward. (While a CUDA graph is
            captured nothing can wait: then masked rows enter the GEMMs.) A wrong one raises on CPU; on a GPU,
            where looking would be a wait, log-probs, entropies and gradients become NaN.
        workspace: "fast" or "compact": bytes of logits and dlogits held at a time (GPU 1.5 GiB or 256
            MiB, CPU 64 MiB or 24 MiB). Results do not depend on it, beyond the rounding of dW's sum.
        process_group: its W ranks share out the vocabulary: weight [V / W, H] and bias [V / W] are
            rank r's rows [r V / W, (r + 1) V / W); targets count in [0, V). Every rank passes the same
            hidden, targets, mask and upstream gradients and gets the same log-probs, entropies and
            (summed) dX, and dW and db of its own rows. Not traced by torch.compile.
        backend: who does the row maths; the GEMMs are the library's. See `fastrlhf.backends`.

    Returns:
        logprob [...], or (logprob, entropy); float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: as `token_logprob`; also for weight, bias, workspace, process_group.

    Source: the chunked head of Liger Kernel (arXiv:2410.10989), with arbitrary upstream gradients.

    >>> linear_logprob(torch.zeros(2, 8), torch.zeros(4, 8), torch.tensor([1, 3]))
    tensor([-1.3863, -1.3863])
    """
    check_linear(OP, hidden, weight, bias, workspace)
    row_temperature, temperature, softcap, mask = check(
        OP, hidden, targets, temperature, softcap, mask, vocab=weight.shape[0]
    )
    if num_rows is not None:
        check_num_rows(OP, num_rows, mask, targets)
    chosen = _backend.choose(OP, backend, hidden, weight, bias)
    if process_group is not None:
        from fastrlhf.ops import _vocab_parallel  # torch.distributed: only where it is asked for

        settings = (
            row_temperature,
            temperature,
            softcap,
            mask,
            num_rows,
            workspace,
            chosen,
            process_group,
        )
        logprob, entropy = _vocab_parallel.logprob(OP, hidden, weight, targets, bias, *settings)
        return (logprob, entropy) if return_entropy else logprob
    if chosen == "reference" and not torch.compiler.is_compiling() and hidden.device.type == "cpu":
        check_target_values(OP, targets, weight.shape[0], mask)
    logprob, entropy, _, _ = run(
        OP,
        FWD,
        (
            hidden,
            weight,
            targets,
            bias,
            row_temperature,
            temperature,
            softcap,
            mask,
            num_rows,
            workspace,
            chosen,
            _autograd.trained(hidden, weight, bias),
        ),
    )
    return (logprob, entropy) if return_entropy else logprob


def linear_logprob_with(look, hidden, weight, targets, *, bias, temperature, softcap, backend):
    """(logprob, entropy) of `linear_logprob`, which calls `look(logits [n, V], targets [n])` for each chunk of rows.

    For statistics of the logits, which exist a chunk at a time: hidden @ weight.T + bias in fp32 (fp64 for fp64
    operands), before the soft-cap and the temperature. No gradient flows through `look`.
    """
    check_linear(OP, hidden, weight, bias, "fast")
    _, temperature, cap, _ = check(
        OP, hidden, targets, temperature, softcap, None, vocab=weight.shape[0]
    )
    chosen = _backend.choose(OP, backend, hidden, weight, bias)
    if hidden.is_cpu:
        check_target_values(OP, targets, weight.shape[0], None)
    if chosen == "reference":
        return _reference_with(look, hidden, weight, targets, bias, temperature, softcap)
    settings = (None, temperature, cap, None, None, "fast", chosen, False)
    return _LOOKING(hidden, weight, targets, bias, *settings, look)[:2]


@_chunks.without_autocast
def _reference_with(look, hidden, weight, targets, bias, temperature, softcap):
    acc = acc_of(hidden, weight)
    bias = None if bias is None else bias.to(acc)
    logits = torch.nn.functional.linear(hidden.to(acc), weight.to(acc), bias)
    with torch.no_grad():
        look(logits, targets)
    options = {"temperature": temperature, "softcap": softcap, "backend": "reference"}
    return token_logprob(logits, targets, return_entropy=True, **options)


@_chunks.without_autocast
def _looking_fwd(hidden, weight, targets, bias, *settings):
    """The outputs of `_fwd`, with no logits kept for the backward."""
    _, temperature, softcap, _, _, workspace, backend, _, look = settings
    head = Head(gemms_for(hidden, weight), hidden, weight, bias, targets, None, None, workspace)
    kernels = RowKernels(backend, temperature, softcap)
    logprob, entropy, stats = head.new_rows(), head.new_rows(), head.new_rows(3)
    with torch.no_grad():
        for chunk in head.chunks():
            look(chunk.logits, chunk.targets)
            found = kernels.forward(chunk.logits, chunk.targets, None, None)
            logprob[chunk.rows], entropy[chunk.rows], stats[:, chunk.rows] = found
    return logprob, entropy, stats, logprob.new_empty(0)


def check_linear(op, hidden, weight, bias, workspace):
    _checks.whole_float_tensor(op, "hidden", hidden)
    _checks.whole_float_tensor(op, "weight", weight)
    shape, vocab_shape = hidden.shape, weight.shape
    if not shape or len(vocab_shape) != 2 or vocab_shape[1] != shape[-1]:
        width = shape[-1] if shape else "H"
        raise ValueError(
            f"{op}: weight must have shape (V, {width}) for hidden {tuple(shape)}; "
            f"got {tuple(vocab_shape)}"
        )
    if shape[-1] == 0:
        raise ValueError(f"{op}: hidden must have at least 1 feature; got {tuple(hidden.shape)}")
    _checks.same_device(op, "weight", weight, hidden.device)
    if bias is not None:
        _checks.whole_float_tensor(op, "bias", bias)
        _checks.shape(op, "bias", bias, weight.shape[:1])
        _checks.same_device(op, "bias", bias, hidden.device)
    if workspace not in _chunks.WORKSPACES:
        _chunks.check_workspace(op, workspace)


def check_num_rows(op: str, num_rows: object, mask: Tensor | None, targets: Tensor) -> None:
    if isinstance(num_rows, bool) or not isinstance(num_rows, int):
        raise TypeError(f"{op}: num_rows must be an int; got {type(num_rows).__name__}")
    if mask is None:
        raise ValueError(f"{op}: num_rows must come with mask; got mask=None")
    if not 0 <= num_rows <= targets.numel():
        raise ValueError(f"{op}: num_rows must be in [0, {targets.numel()}]; got {num_rows}")
    if mask.is_cpu and type(mask) is Tensor and plain():  # else the op tells
        check_count(int(mask.sum()), num_rows, f"{op}: ")


def _keeps_logits(hidden, weight, targets, mask, num_rows, trained: bool) -> bool:
    # Under capture of a CUDA graph every row takes part, else those that count: rows kept by a forward inside a
    # graph would not be those of a backward outside of it.
    if not trained or (hidden.is_cuda and mask is not None and num_rows is None):
        return False
    size = targets.numel() * weight.shape[0] * acc_of(hidden, weight).itemsize
    return 0 < size <= KEEP_BYTES


@_chunks.without_autocast
def _fwd(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    mask: Tensor | None,
    num_rows: int | None,
    workspace: str,
    backend: str,
    trained: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprob, entropy, stats [3, N], logits [N, V] where they are small and will be needed)."""
    gemms = gemms_for(hidden, weight)
    head = Head(gemms, hidden, weight, bias, targets, row_temperature, mask, workspace, num_rows)
    kernels = RowKernels(backend, temperature, softcap)
    memory = torch.empty(0, dtype=head.acc, device=head.device)
    if _keeps_logits(hidden, weight, targets, mask, num_rows, trained):
        # Of the rows that count, one after the other; the memory of others is never read.
        memory = memory.new_empty((head.count, head.vocab))
    logprob, entropy, stats = statistics(head, kernels, memory if memory.numel() else None)
    logprob, entropy, stats = (head.spread(x) for x in (logprob, entropy, stats))
    return logprob.view(targets.shape), entropy.view(targets.shape), stats, memory


def _fwd_fake(
    hidden,
    weight,
    targets,
    bias,
    row_temperature,
    temperature,
    softcap,
    mask,
    num_rows,
    workspace,
    backend,
    trained,
):
    acc = acc_of(hidden, weight)
    out = hidden.new_empty(targets.shape, dtype=acc)
    count, vocab = targets.numel(), weight.shape[0]
    keep = _keeps_logits(hidden, weight, targets, mask, num_rows, trained)
    return (
        out,
        torch.empty_like(out),
        hidden.new_empty((3, count), dtype=acc),
        hidden.new_empty((count, vocab) if keep else (0,), dtype=acc),
    )


@_chunks.without_autocast
def _bwd(
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    stats: Tensor,
    kept: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    mask: Tensor | None,
    num_rows: int | None,
    workspace: str,
    backend: str,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dW, db); None for those not needed."""
    gemms = gemms_for(hidden, weight)
    active = mask
    if gemms.skips_idle_rows:
        active, num_rows = _active_rows(grad_logprob, grad_entropy, mask), None
    head = Head(gemms, hidden, weight, bias, targets, row_temperature, active, workspace, num_rows)
    grads = Gradients(head, (needs_hidden, needs_weight, needs_bias))
    logits = None
    if kept.numel():
        # Where idle rows are not skipped, the rows are those of the forward, and asking would be a wait.
        place = _kept_rows(head, mask) if gemms.skips_idle_rows else None
        logits = kept[: head.rows] if place is None else kept.index_select(0, place)
    kernels = RowKernels(backend, temperature, softcap)
    add_gradients(head, kernels, grads, (grad_logprob, grad_entropy), stats, logits)
    return tuple(as_parameters(grads.finish(), (hidden, weight, bias), lambda like: like.dtype))


def _active_rows(grad_logprob, grad_entropy, mask) -> Tensor:
    """Which rows count and carry a gradient."""
    carries = mask
    for grad in (grad_logprob, grad_entropy):
        if grad is not None:
            own = grad != 0
            carries = own if carries is mask else carries | own
    return carries if mask is None else carries & mask


def _kept_rows(head: Head, mask: Tensor | None) -> Tensor | None:
    """Where the head's rows lie among the kept logits, those of the rows that counted; None: in order."""
    if head.index is None or mask is None:
        return head.index
    counted = mask.reshape(-1).nonzero().squeeze(1)
    if head.index.numel() == counted.numel():
        return None
    return torch.searchsorted(counted, head.index)


def _bwd_fake(grad_logprob, grad_entropy, hidden, weight, targets, bias, *rest):
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else None
        for x, need in zip((hidden, weight, bias), rest[-3:], strict=True)
    )


def _setup(ctx, arguments, outputs):
    hidden, weight, targets, bias, row_t, ctx.temperature, ctx.softcap, mask = arguments[:8]
    ctx.num_rows, ctx.workspace, ctx.backend, _ = arguments[8:]
    _, _, stats, kept = outputs
    ctx.save_for_backward(hidden, weight, targets, bias, stats, kept, row_t, mask)


def _backward(ctx, *upstream):
    hidden, weight, targets, bias, stats, kept, row_t, mask = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    settings = (row_t, ctx.temperature, ctx.softcap, mask)
    settings += (ctx.num_rows, ctx.workspace, ctx.backend)
    grads = _BWD(*upstream, hidden, weight, targets, bias, stats, kept, *settings, *needs)
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


_BWD = register("linear_logprob_bwd", _bwd_fake, body=_bwd)
FWD = register(
    "linear_logprob_fwd",
    _fwd_fake,
    body=_fwd,
    op=OP,
    wrt=(0, 1, 3),
    gives=2,
    setup=_setup,
    backward=_backward,
)
_LOOKING = differentiable(
    _looking_fwd,
    op=OP,
    wrt=(0, 1, 3),
    gives=2,
    setup=lambda ctx, arguments, outputs: _setup(ctx, arguments[:-1], outputs),
    backward=_backward,
)
