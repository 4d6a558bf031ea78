"""token_logprob: log-probability of each row's target, and the entropy, from logits.

Shapes: logits [..., V] -> N rows; targets, mask, outputs [...]; row_stats [3, N] = (row_max, shifted_lse,
shifted_mean): the maximum of z, the log of the sum of e^(z - row_max), the mean of z - row_max under the softmax.
"""

import torch
from torch import Tensor

from fastrlhf import reference
from fastrlhf.ops import _checks
from fastrlhf.ops._register import choose, register

OP = "token_logprob"


def token_logprob(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(z)[target] in nats, with z = softcap * tanh(logits / softcap) / temperature.

    The fused backends read the logits once and keep 12 bytes per row for the backward, which reads
    the logits again and writes the gradient. With p = softmax(z), g = dL/dlogprob, h = dL/dentropy:
    ``dL/dz_j = g (1[j = target] - p_j) - h p_j (log p_j + entropy)``.

    Args:
        logits: [..., V], float32, bfloat16, float16, or float64 (CPU). Any strides before a unit
            last stride are read in place when they reduce to two (``logits[:, :-1]`` does).
        targets: [...], int32 or int64, in [0, V).
        temperature: above 0; a number, or a float tensor that broadcasts to ``targets``. A constant
            to autograd.
        softcap: above 0, or None. Applied before the temperature, as Gemma 2 does.
        mask: [...], True (or non-zero) where the row counts. Other rows and their targets are not
            read; they return 0 and get gradient 0.
        return_entropy: also return H = -sum_j p_j log p_j, differentiable, at no extra read.
        inplace_backward: allow the backward to overwrite ``logits`` with the gradient; a second
            backward through the graph then raises. The reference and torch.compile ignore it, as do
            logits whose rows overlap or must be copied to be read.
        backend: see `fastrlhf.backends`.

    Returns:
        logprob [...], or (logprob, entropy); float32 (float64 for float64 logits). Sums are kept in
        that dtype. Logits of -inf have probability 0; a row that holds a NaN gives NaN. Rows whose
        upstream gradients are 0 are not read by the backward of the fused backends.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or value. On CPU a counted target outside
            [0, V) raises ValueError: one compare per row, before the logits are touched. On a GPU that
            would cost a host sync, so the row's logprob and gradient are NaN instead, and nothing
            outside the row is read.

    Source: Milakov and Gimelshein 2018 (arXiv:1805.02867) for the online softmax.

    >>> token_logprob(torch.zeros(2, 4), torch.tensor([1, 3]))
    tensor([-1.3863, -1.3863])
    """
    row_temperature, temperature, softcap, mask = _checks.logit_rows(
        OP, logits, targets, temperature, softcap, mask
    )
    if type(return_entropy) is not bool:
        _checks.flag(OP, "return_entropy", return_entropy)
    if type(inplace_backward) is not bool:
        _checks.flag(OP, "inplace_backward", inplace_backward)
    chosen = choose(OP, backend, logits, row_temperature)
    if chosen == "reference":
        _checks.row_values(OP, targets, logits.shape[-1], mask, row_temperature)
        return reference.token_logprob(
            logits,
            targets,
            temperature=temperature if row_temperature is None else row_temperature,
            softcap=softcap or None,
            mask=mask,
            return_entropy=return_entropy,
        )
    # A compiled graph plans memory itself, and must not meet a hidden mutation.
    inplace = (
        inplace_backward and not torch.compiler.is_compiling() and _checks.overwritable(logits)
    )
    settings = (row_temperature, temperature, softcap, mask, return_entropy, inplace)
    logprob, entropy, _ = FWD[chosen](logits, targets, *settings)
    return (logprob, entropy) if return_entropy else logprob


# ---- registration -------------------------------------------------------------------------------


def _fwd_fake(logits, targets, *settings):
    dtype = _checks.acc_dtype(logits)
    out = logits.new_empty(targets.shape, dtype=dtype)
    return out, torch.empty_like(out), logits.new_empty((3, targets.numel()), dtype=dtype)


def _bwd_fake(grad_logprob, grad_entropy, logits, *rest):
    return logits.new_empty(logits.shape)


# dL/dlogits, as a new tensor or into `out`, which may be the logits, or 16-bit where they are fp32 (the linear ops).
BWD = register(
    "token_logprob_bwd(Tensor? grad_logprob, Tensor? grad_entropy, Tensor logits, Tensor targets, "
    "Tensor row_stats, Tensor? row_temperature, float temperature, float softcap, Tensor? mask) -> Tensor",
    _bwd_fake,
    op=OP,
    triton="token_logprob.gradient",
    wrt=(0, 1, 2),
)
BWD_ = register(
    "token_logprob_bwd_(Tensor? grad_logprob, Tensor? grad_entropy, Tensor logits, Tensor targets, "
    "Tensor row_stats, Tensor? row_temperature, float temperature, float softcap, Tensor? mask, "
    "Tensor(a!) out) -> ()",
    lambda *arguments: None,
    op=OP,
    triton="token_logprob.backward",
)


def _setup(ctx, arguments, outputs):
    logits, targets, row_temperature, ctx.temperature, ctx.softcap, mask, _, ctx.inplace = arguments
    ctx.save_for_backward(logits, targets, outputs[2], row_temperature, mask)


def _backward(ctx, grad_logprob, grad_entropy):
    logits, targets, row_stats, row_temperature, mask = ctx.saved_tensors
    settings = (row_temperature, ctx.temperature, ctx.softcap, mask)
    arguments = (grad_logprob, grad_entropy, logits, targets, row_stats, *settings)
    if not ctx.inplace:
        return (BWD[ctx.backend](*arguments),)
    BWD_[ctx.backend].below(*arguments, logits)
    # The saved logits are gone: let autograd detect any second use.
    torch.autograd.graph.increment_version(logits)
    return (logits.detach(),)


# `inplace_backward` is for the backward alone. The entropy and shifted_mean are computed only `with_entropy`: a GPU's
# kernel is bound by its instructions.
FWD = register(
    "token_logprob_fwd(Tensor logits, Tensor targets, Tensor? row_temperature, float temperature, float softcap, "
    "Tensor? mask, bool with_entropy, bool inplace_backward) -> (Tensor logprob, Tensor entropy, Tensor row_stats)",
    _fwd_fake,
    op=OP,
    triton="token_logprob.forward",
    wrt=(0,),
    gives=2,
    setup=_setup,
    backward=_backward,
    create_graph=True,
)


# ---- the forward in parts, on CPU ---------------------------------------------------------------

# Adds the columns [first, first + w) of logits [n, w] to `state` [6, n]: the running row_max, the sums of
# exp(z - row_max) and (z - row_max) exp(z - row_max), the rounding errors of both, and the target's logit. first = 0
# starts it. Parts come in ascending order and begin at multiples of 2048 columns.
PART_ = register(
    "token_logprob_part_(Tensor logits, Tensor targets, int first, Tensor? row_temperature, float temperature, "
    "float softcap, Tensor? mask, Tensor(a!) state) -> ()",
    lambda *arguments: None,
)


def _whole_fake(state, vocab, targets, *settings):
    out = state.new_empty(targets.shape)
    return out, torch.empty_like(out), state.new_empty((3, targets.numel()))


# Turns the state of all `vocab` columns into the results of token_logprob_fwd (bitwise), or raises the same errors.
WHOLE = register(
    "token_logprob_whole(Tensor state, int vocab, Tensor targets, Tensor? row_temperature, float temperature, "
    "float softcap, Tensor? mask) -> (Tensor logprob, Tensor entropy, Tensor row_stats)",
    _whole_fake,
)
