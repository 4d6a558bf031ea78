"""linear_logprob: token_logprob of hidden @ weight.T + bias, without ever holding the N x V logits.

Shapes: hidden [..., H] -> N rows, weight [V, H], bias [V], targets, mask, outputs [...].
"""

import torch
from torch import Tensor

from fastrlhf.ops import _autograd, _backend, _checks, _chunks
from fastrlhf.ops._register import register
from fastrlhf.ops._rows import RowMaths
from fastrlhf.ops.token_logprob import check, check_target_values, run

OP = "linear_logprob"
# Logits of at most this many bytes stay for the backward (3 GEMMs); larger ones are made again (4).
KEEP_BYTES = 24 << 20
# From so many rows on, the forward on CPU walks the vocabulary in blocks, with all rows before each: every
# GEMM call packs its part of the weight once. MKL gives a logit the same bits whatever its block holds, and so
# the bits of the update, which must hold whole rows. (Not in fp64, which goes by rows.)
BY_BLOCK_ROWS = 64 if torch.backends.mkl.is_available() else 1 << 62


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
    workspace: str = "fast",
    process_group: "torch.distributed.ProcessGroup | None" = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`token_logprob` of the logits hidden @ weight.T + bias, made a chunk of rows at a time.

    Forward 2 N H V FLOP, backward 6 N H V (logits again, dX, dW): a chunk's logits are made in
    fp32 in one workspace, turned into dlogits in place and multiplied into dX and dW, which are
    summed in fp32 and rounded once. Small problems (24 MiB of logits or less) keep their logits for
    the backward instead of making them again. A weight or hidden that needs no gradient skips its
    GEMM. On CPU, rows that are masked, and rows whose upstream gradient is 0, enter no GEMM.

    Args:
        hidden: [..., H], float32, bfloat16, float16, or float64 (CPU).
        weight: [V, H], the language-model head. On CPU a 16-bit weight is widened (4 V H bytes).
        targets: [...], int32 or int64, in [0, V).
        bias: [V], or None.
        temperature, softcap, mask, return_entropy: as in `token_logprob`.
        workspace: "fast" or "compact": bytes of logits held at a time (GPU 1 GiB or 256 MiB, CPU
            64 MiB or 24 MiB). Results do not depend on it, beyond the rounding of dW's sum.
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
    chosen = _backend.choose(OP, backend, hidden, weight, bias)
    if process_group is not None:
        from fastrlhf.ops import _vocab_parallel  # torch.distributed: only where it is asked for

        settings = (row_temperature, temperature, softcap, mask, workspace, chosen, process_group)
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
            workspace,
            chosen,
            _autograd.trained(hidden, weight, bias),
        ),
    )
    return (logprob, entropy) if return_entropy else logprob


def check_linear(op, hidden, weight, bias, workspace):
    _checks.whole_tensor(op, "hidden", hidden)
    _checks.whole_tensor(op, "weight", weight)
    _checks.float_tensor(op, "hidden", hidden)
    _checks.float_tensor(op, "weight", weight)
    if hidden.dim() < 1 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        width = hidden.shape[-1] if hidden.dim() else "H"
        raise ValueError(
            f"{op}: weight must have shape (V, {width}) for hidden {tuple(hidden.shape)}; "
            f"got {tuple(weight.shape)}"
        )
    if hidden.shape[-1] == 0:
        raise ValueError(f"{op}: hidden must have at least 1 feature; got {tuple(hidden.shape)}")
    _checks.same_device(op, "weight", weight, hidden.device)
    if bias is not None:
        _checks.whole_tensor(op, "bias", bias)
        _checks.float_tensor(op, "bias", bias)
        _checks.shape(op, "bias", bias, weight.shape[:1])
        _checks.same_device(op, "bias", bias, hidden.device)
    _chunks.check_workspace(op, workspace)


def _keeps_logits(rows: int, vocab: int, acc: torch.dtype, trained: bool) -> bool:
    return trained and 0 < rows * vocab * acc.itemsize <= KEEP_BYTES


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
    workspace: str,
    backend: str,
    trained: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprob, entropy, stats [3, N], logits [N, V] where they are small and will be needed)."""
    index = _chunks.counted_rows(mask)
    operands = _chunks.Operands(hidden, weight, bias, index)
    maths = RowMaths(backend, temperature, softcap)
    count, vocab, acc = targets.numel(), weight.shape[0], operands.acc
    options = {"dtype": acc, "device": hidden.device}
    make = torch.empty if index is None else torch.zeros
    logprob, entropy = make(targets.shape, **options), make(targets.shape, **options)
    stats = make((3, count), **options)
    keep = _keeps_logits(count, vocab, acc, trained)
    # Kept logits of masked rows are never read: only the rows that take part are filled in.
    kept = torch.empty((count, vocab) if keep else (0,), **options)
    y, t = operands.take(targets), operands.take(row_temperature)
    m = None if index is not None else operands.take(mask)
    blocks = maths.blocks(hidden.device, vocab)
    several = len(blocks) > 1 and operands.rows >= BY_BLOCK_ROWS
    by_block = several and acc == torch.float32 and not keep
    width = blocks[0].stop if by_block else vocab
    step = operands.rows if keep else _chunks.chunk_rows(workspace, width, acc, hidden.device)
    buffer = kept if keep else _chunks.logits_rows(min(step, operands.rows), width, **options)
    for rows in _chunks.cuts(operands.rows, step):
        x = operands.hidden_chunk(rows.start, rows.stop)
        per_row = y[rows], *(None if v is None else v[rows] for v in (t, m))
        if by_block:
            parts = []
            for columns in blocks:
                logits = operands.logits(x, _block(buffer, len(x), columns), columns)
                parts.append(maths.part(logits, columns, *per_row))
            out = maths.combined(parts, blocks, per_row[0], per_row[2])
        else:
            logits = operands.logits(x, buffer[: len(x)])
            out = maths.forward(logits, *per_row)
        where = rows if index is None else index[rows]
        logprob.view(-1)[where] = out[0]
        entropy.view(-1)[where] = out[1]
        stats[:, where] = out[2]
    return logprob, entropy, stats, kept


def _block(buffer: Tensor, rows: int, columns: slice) -> Tensor:
    """[rows, columns] without gaps at the front of the buffer, which has none either (CPU)."""
    width = columns.stop - columns.start
    return buffer.view(-1)[: rows * width].view(rows, width)


def _fwd_fake(
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
    trained,
):
    acc = _chunks.acc_of(hidden, weight)
    out = hidden.new_empty(targets.shape, dtype=acc)
    count, vocab = targets.numel(), weight.shape[0]
    keep = _keeps_logits(count, vocab, acc, trained)
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
    workspace: str,
    backend: str,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dW, db); None for those not needed."""
    forward_index = _chunks.counted_rows(mask)
    index = _active_rows(grad_logprob, grad_entropy, mask)
    operands = _chunks.Operands(hidden, weight, bias, index)
    maths = RowMaths(backend, temperature, softcap)
    grads = _chunks.Gradients(operands, (needs_hidden, needs_weight, needs_bias))
    take = operands.take
    y, t, g, h = take(targets), take(row_temperature), take(grad_logprob), take(grad_entropy)
    m = None if index is not None else take(mask)
    s = stats if index is None else stats.index_select(1, index)
    vocab = weight.shape[0]
    step = _chunks.chunk_rows(workspace, vocab, operands.acc, hidden.device)
    buffer = _chunks.logits_rows(min(step, operands.rows), vocab, operands.acc, hidden.device)
    source = _kept_positions(index, forward_index) if kept.numel() else None
    for rows in _chunks.cuts(operands.rows, step):
        start, stop = rows.start, rows.stop
        x, logits = operands.hidden_chunk(start, stop), buffer[: stop - start]
        if not kept.numel():
            operands.logits(x, logits)
        elif source is None:
            logits.copy_(kept[rows])
        else:
            torch.index_select(kept, 0, source[rows], out=logits)
        maths.backward_(
            None if g is None else g[rows],
            None if h is None else h[rows],
            logits,
            y[rows],
            s[:, rows].contiguous(),
            None if t is None else t[rows],
            None if m is None else m[rows],
        )
        grads.add(operands.where(rows), x, logits)
    return tuple(grads.finish(hidden, weight, bias, lambda like: like.dtype))


def _active_rows(grad_logprob, grad_entropy, mask):
    """Rows that count and carry a gradient, where knowing them is free (CPU); None for all."""
    active = mask
    if (grad_logprob if grad_logprob is not None else grad_entropy).device.type == "cpu":
        carries = None
        for grad in (grad_logprob, grad_entropy):
            if grad is not None:
                carries = grad != 0 if carries is None else carries | (grad != 0)
        active = carries if mask is None else carries & mask
    return _chunks.counted_rows(active)


def _kept_positions(index, forward_index):
    """Where the active rows lie in the kept logits (those of the rows that counted); None: in order."""
    if forward_index is None or index is None:
        return index
    if index.numel() == forward_index.numel():
        return None
    return torch.searchsorted(forward_index, index)


def _bwd_fake(grad_logprob, grad_entropy, hidden, weight, targets, bias, *rest):
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else None
        for x, need in zip((hidden, weight, bias), rest[-3:], strict=True)
    )


def _setup(ctx, arguments, outputs):
    hidden, weight, targets, bias, row_t, ctx.temperature, ctx.softcap, mask = arguments[:8]
    ctx.workspace, ctx.backend, _ = arguments[8:]
    _, _, stats, kept = outputs
    ctx.save_for_backward(hidden, weight, targets, bias, stats, kept, row_t, mask)


def _backward(ctx, *upstream):
    hidden, weight, targets, bias, stats, kept, row_t, mask = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    settings = (row_t, ctx.temperature, ctx.softcap, mask, ctx.workspace, ctx.backend)
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
