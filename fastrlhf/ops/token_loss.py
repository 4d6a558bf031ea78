"""token_loss: the policy loss of each row and its gradient in the logits, in one pass over them.

Shapes: logits [..., V] -> N rows; targets, advantages, old_logprob, mask, outputs [...]; grad_logprob [N] =
d loss / d logprob; row_stats [2, N] = (row_max, shifted_lse) as in token_logprob.
"""

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastrlhf import reference
from fastrlhf.ops import _checks, _policy, _settings, token_logprob
from fastrlhf.ops._register import choose, differentiable, kept, refuse_inference, register
from fastrlhf.ops._settings import Settings

OP = "token_loss"
_DEFAULTS = {n: x for n, x in _settings.DEFAULTS.items() if n != "value_aggregation"} | {
    "objective": None,
    "aggregation": None,
}
_DEFAULT_LIMITS = _checks.ratio_limits(OP, 0.2, None)


@_settings.shown(_DEFAULTS)
def token_loss(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor | None = None,
    *,
    old_logprob: Tensor | None = None,
    clip: float | tuple[float | None, float | None] = 0.2,
    dual_clip: float | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    inplace_backward: bool = False,
    scale: float | Tensor = 1.0,
    backend: str = "auto",
    **settings: Unpack[Settings],
) -> tuple[Tensor, Tensor]:
    """Loss of each row and log softmax(z)[target], z = softcap * tanh(logits / softcap) / temperature.

    With l = log softmax(z)[target] and A the advantage (1 if None), loss = scale * a * (w f + kl_coef *
    KL), where f is the policy term of `objective` and w the rollout weight as in `ppo_loss`, before its
    aggregate; a is 1, or with `aggregation` the token's weight, so that the sum of the losses is the
    aggregate. Without `objective`:

    - without `old_logprob` "reinforce", f = -A l: cross entropy, or the policy gradient;
    - with it "ppo", f = max(-A rho, -A clip(rho, 1 - low, 1 + high)) with rho = exp(clamp(l - old_logprob,
      -20, 20)); with `dual_clip`, where A < 0, at most -A dual_clip.

    l determines d loss / d l, so the forward computes dL/dlogits_j = (d loss / d l)
    (1[j = target] - p_j) dz_j/dlogits_j while the row is on the chip: one read and one write of the
    logits for forward and backward together. (Triton reads the row twice; so does CUDA in float64,
    with a soft-cap above 64, and if a row does not fit on the chip.) "gspo" with `old_logprob`, and a
    rollout weight of sequences without it, need the log-probs of a sequence first: one more read, by
    `token_logprob`. The backward multiplies row i by
    the upstream gradient of loss_i. **If that is 1, it reads and writes nothing**, so include the mean
    in the loss::

        loss, logprob = token_loss(logits, targets, advantages, scale=1 / n, ...)
        loss.sum().backward()

    (and the factors of a loss scaler and of gradient accumulation in `scale`). Another upstream
    gradient costs one more read and write of its rows. Under torch.compile the backward computes the
    gradient: two reads and one write in all. Each further backward of a retained graph computes it
    again.

    Args:
        logits: [..., V], float32, bfloat16, float16, or float64 (CPU). Any strides before a unit
            last stride are read in place when they reduce to two (``logits[:, :-1]`` does).
        targets: [...], int32 or int64, in [0, V).
        advantages: [...], or one a sequence, [S] or [S, 1]; float, or None. A constant to autograd.
        old_logprob: [...], float, in nats, from the policy that sampled; or None. A constant.
        clip: above 0, or (low, high), each above 0 or None. Needs `old_logprob` or `objective`.
        dual_clip: above 1, or None. As `clip`.
        temperature: above 0; a number, or a float tensor that broadcasts to ``targets``. A constant.
        softcap: above 0, or None. Applied before the temperature, as Gemma 2 does.
        mask: [...], True (or non-zero) where the row counts. Other rows are not read, nor their
            targets; loss, logprob and gradient are 0 there.
        cu_seqlens, objective, tau_pos, tau_neg, ref_logprob, kl_coef, kl_estimator, kl_clamp, kl_gradient,
            rollout_weights, rollout_logprob, rollout_level, rollout_mode, rollout_bounds, aggregation,
            length, num_tokens, num_sequences: as in `ppo_loss`. Sequences are the rows of [B, T], or packed
            in [N]. All tensors are constants.
        scale: a number, or a 0-d float tensor (``1 / mask.sum()`` needs no sync). A constant.
        inplace_backward: allow the **forward** to overwrite ``logits`` with the gradient if they
            require grad. This saves a second tensor of their size; ``logits`` then hold the gradient,
            and a second backward through the graph raises. The reference, torch.compile, selective
            checkpoints, allow_mutation_on_saved_tensors and overlapping layouts ignore it.
        backend: see `fastrlhf.backends`.

    Returns:
        (loss [...], logprob [...]); float32 (float64 for float64 logits); logprob is detached. A row
        that holds a NaN gives NaN. Rows whose gradient is exactly 0 (clipped, A = 0) are zero-filled.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, value or name; a constant that requires grad; a
            setting that the objective or the aggregation does not use.
            On CPU a counted target outside [0, V) raises ValueError, before the logits are touched; on
            a GPU, where that would cost a host sync, the row's loss, logprob and gradient are NaN, and
            nothing outside it is read.

    Source: as `ppo_loss`; Milakov and Gimelshein 2018 (arXiv:1805.02867) for the online softmax.

    >>> loss, logprob = token_loss(torch.zeros(2, 4), torch.tensor([1, 3]), scale=0.5)
    >>> loss, logprob
    (tensor([0.6931, 0.6931]), tensor([-1.3863, -1.3863]))
    """
    row_temperature, temperature, softcap, mask = _checks.logit_rows(
        OP, logits, targets, temperature, softcap, mask
    )
    if old_logprob is not None:
        old_logprob = _checks.row_constant(OP, "old_logprob", old_logprob, logits, targets)
    policy = None
    per_token = targets.dim() != 2 or advantages is None
    if not settings and (per_token or _checks.has_shape(advantages, targets.shape)):
        if advantages is not None:
            advantages = _checks.row_constant(OP, "advantages", advantages, logits, targets)
        limits = _checks.ratio_limits(OP, clip, dual_clip)
        if old_logprob is None and limits != _DEFAULT_LIMITS:
            _refuse_limits(clip, dual_clip)
    else:
        settings = _settings.filled(OP, settings, _DEFAULTS)
        for name in ("ref_logprob", "rollout_weights", "rollout_logprob"):
            settings[name] = _checks.constant(OP, name, settings[name], logits)
        if settings["objective"] is None:
            settings["objective"] = "reinforce" if old_logprob is None else "ppo"
            if old_logprob is None and _checks.ratio_limits(OP, clip, dual_clip) != _DEFAULT_LIMITS:
                _refuse_limits(clip, dual_clip)
        policy = _policy.check(
            OP,
            "targets",
            targets.shape,
            _checks.acc_dtype(logits),
            logits.device,
            old_logprob=old_logprob,
            advantages=_checks.constant(OP, "advantages", advantages, logits),
            rows=True,
            clip=clip,
            dual_clip=dual_clip,
            **settings,
        )
        limits = policy.limits
    scale_tensor, number = None, 1.0
    if isinstance(scale, Tensor):
        acc = _checks.acc_dtype(logits)
        scale_tensor = _checks.scale_tensor(OP, scale, logits.device, acc)
    else:
        number = _checks.number(OP, "scale", scale)
    if type(inplace_backward) is not bool:
        _checks.flag(OP, "inplace_backward", inplace_backward)
    chosen = choose(OP, backend, logits)
    if chosen == "reference":
        _checks.row_values(OP, targets, logits.shape[-1], mask, row_temperature)
        return reference.token_loss(
            logits,
            targets,
            advantages,
            old_logprob=old_logprob,
            **_policy.reference_options(policy, limits, clip, value=False),
            temperature=temperature if row_temperature is None else row_temperature,
            softcap=softcap or None,
            mask=mask,
            scale=number if scale_tensor is None else scale_tensor,
        )
    more = options = None
    if policy is not None:
        rows = (row_temperature, temperature, softcap, mask)
        more = _more(policy, logits, targets, old_logprob, rows, chosen)
        advantages, options = policy.advantages, _policy.options(policy)
        if policy.aggregation == "token-mean":
            factor = _policy.factor(
                policy, policy.aggregation, targets, mask, _checks.acc_dtype(logits)
            )
            scale_tensor = factor * (number if scale_tensor is None else scale_tensor)
    arguments = (
        targets,
        advantages,
        old_logprob,
        more,
        *limits,
        options,
        row_temperature,
        temperature,
        softcap,
        mask,
        scale_tensor,
        number,
    )
    # A compiled graph plans memory itself, and must not meet a hidden mutation.
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and logits.requires_grad):
        loss, logprob, _, _ = FWD[chosen](logits, *arguments)
        return loss, logprob.detach()
    if policy is not None:
        given = {
            name: policy.options[name]
            for name in ("ref_logprob", "rollout_weights", "rollout_logprob")
        }
        refuse_inference(OP, **given, cu_seqlens=policy.cu_seqlens)
    inplace = inplace_backward and _checks.overwritable(logits) and not kept()
    return _gradient_in_forward(logits, chosen, inplace, *arguments)[:2]


def _refuse_limits(clip, dual_clip):
    """Without a ratio nothing would be clipped, and nobody told."""
    name, value = ("clip", clip) if dual_clip is None else ("dual_clip", dual_clip)
    raise ValueError(
        f"{OP}: {name} must come with old_logprob, or with an objective that uses it; got {value!r} and "
        "old_logprob=None"
    )


def _more(policy, logits, targets, old_logprob, settings, backend):
    """`more` of the raw ops. A term of a sequence that depends on the new log-probs costs a forward for them."""
    acc = _checks.acc_dtype(logits)
    logprob = None
    if policy.sequence_ratio and old_logprob is not None:
        logprob = token_logprob.FWD[backend](logits.detach(), targets, *settings, False, False)[0]
    elif _policy.sequence_rollout(policy) and old_logprob is None:
        logprob = token_logprob.FWD[backend](logits.detach(), targets, *settings, False, False)[0]
    elif policy.cu_seqlens is not None:  # only its shape matters
        logprob = targets.new_zeros(targets.shape, dtype=acc)
    if logprob is None:
        return _policy.more(policy, None)
    mask = settings[-1]
    return _policy.more(policy, _policy.sequence_rows(policy, logprob, old_logprob, mask, backend))


# ---- the gradient computed in the forward: eager mode --------------------------------------------


def _forward(logits, backend, inplace, *arguments):
    """fwd_ writes dL/dlogits for an upstream gradient of 1."""
    out = logits if inplace else _empty(logits)
    outputs = FWD_[backend].below(logits, *arguments, out)
    if inplace:
        # The logits are gone: let autograd detect a node that has saved them.
        torch.autograd.graph.increment_version(logits)
    return *outputs, out


def _empty(logits):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_forward(ctx, all_arguments, outputs):
    logits, ctx.backend, ctx.inplace, targets, advantages, old_logprob, more, *rest = all_arguments
    *limits, options, row_temperature, temperature, softcap, mask, scale_tensor, scale = rest
    _, _, grad_logprob, row_stats, out = outputs
    rows = (targets, advantages, old_logprob, row_temperature, mask, scale_tensor, *(more or ()))
    ctx.save_for_backward(logits, grad_logprob, row_stats, *rows)
    ctx.numbers = limits, options, temperature, softcap, scale
    ctx.grad = None if ctx.inplace else out


def _scaled(ctx, grad_loss):
    """The gradient that the forward has computed, times the upstream gradient."""
    if ctx.grad is not None and not torch.is_grad_enabled():
        grad, ctx.grad = ctx.grad, None
        BWD_[ctx.backend].below(grad, grad_loss)
        return (grad,)
    logits, grad_logprob, row_stats, *rows = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph: by an op that refuses a second derivative itself
        if ctx.inplace:
            raise NotImplementedError(f"{OP}: create_graph must not meet inplace_backward=True")
        arguments = (logits, grad_logprob, row_stats, *_arguments(ctx, rows))
        return (_from_row_stats(ctx.backend, grad_loss, *arguments),)
    if ctx.inplace:
        grad = logits.detach()
        # The only gradient; a second backward raises at saved_tensors.
        torch.autograd.graph.increment_version(logits)
    else:  # a retained graph: compute it again
        grad = _empty(logits)
        FWD_[ctx.backend](logits, *_arguments(ctx, rows), grad)
    BWD_[ctx.backend].below(grad, grad_loss)
    return (grad,)


def _arguments(ctx, rows):
    """The arguments of token_loss_fwd_ after the logits."""
    targets, advantages, old_logprob, row_temperature, mask, scale_tensor, *more = rows
    limits, options, temperature, softcap, scale = ctx.numbers
    policy = (advantages, old_logprob, more, *limits, options)
    return targets, *policy, row_temperature, temperature, softcap, mask, scale_tensor, scale


_gradient_in_forward = differentiable(
    _forward,
    op=OP,
    wrt=(0,),
    setup=_setup_forward,
    backward=_scaled,
    create_graph=True,
    names=("logits", "backend", "inplace", "targets", "advantages", "old_logprob", "more", "low", "high", "dual_clip",
           "options", "temperature", "number", "softcap", "mask", "scale"),
)  # fmt: skip
# token_logprob's backward, which here refuses a second derivative under our name.
_gradient = differentiable(
    lambda backend, *arguments: token_logprob.BWD[backend].below(*arguments),
    op=OP,
    wrt=(1, 2, 3),
    traced=lambda backend, *arguments: token_logprob.BWD[backend](*arguments),
)


def _from_row_stats(
    backend, grad_loss, logits, grad_logprob, row_stats, targets, *arguments
) -> Tensor:
    """dL/dlogits from the logits and the statistics of their rows."""
    *_, row_temperature, temperature, softcap, mask, _, _ = arguments
    return _gradient(
        backend,
        grad_loss * grad_logprob,
        None,
        logits,
        targets,
        torch.cat(
            (row_stats, row_stats.new_zeros(1, row_stats.shape[1]))
        ),  # no gradient of entropy
        row_temperature,
        temperature,
        softcap,
        mask,
    )


# ---- registration -------------------------------------------------------------------------------


def _fwd_fake(logits, targets, *rest):
    rows = logits.new_empty(targets.shape, dtype=_checks.acc_dtype(logits))
    return rows, torch.empty_like(rows), torch.empty_like(rows), rows.new_empty(2, rows.numel())


def _setup(ctx, arguments, outputs):
    logits, targets, *_, row_temperature, ctx.temperature, ctx.softcap, mask, _, _ = arguments
    _, _, grad_logprob, row_stats = outputs
    ctx.save_for_backward(logits, grad_logprob, row_stats, targets, row_temperature, mask)


def _backward(ctx, grad_loss):
    logits, grad_logprob, row_stats, targets, row_temperature, mask = ctx.saved_tensors
    rest = (row_temperature, ctx.temperature, ctx.softcap, mask, None, None)
    return (
        _from_row_stats(ctx.backend, grad_loss, logits, grad_logprob, row_stats, targets, *rest),
    )


_ARGUMENTS = (
    "Tensor logits, Tensor targets, Tensor? advantages, Tensor? old_logprob, Tensor?[]? more, float low, float high, "
    "float dual_clip, float[]? options, Tensor? row_temperature, float temperature, float softcap, Tensor? mask, "
    "Tensor? scale_tensor, float scale"
)
_RESULTS = "(Tensor loss, Tensor logprob, Tensor grad_logprob, Tensor row_stats)"
FWD = register(
    f"token_loss_fwd({_ARGUMENTS}) -> {_RESULTS}",
    _fwd_fake,
    op=OP,
    triton="token_loss.forward",
    wrt=(0,),
    setup=_setup,
    backward=_backward,
    create_graph=True,
)
# Also writes dL/dlogits to `out`, which may be the logits.
FWD_ = register(
    f"token_loss_fwd_({_ARGUMENTS}, Tensor(a!) out) -> {_RESULTS}",
    _fwd_fake,
    op=OP,
    triton="token_loss.forward",
)
# Multiplies the rows of `grad` by upstream gradients that are not 1.
BWD_ = register(
    "token_loss_bwd_(Tensor(a!) grad, Tensor upstream) -> ()",
    lambda *arguments: None,
    op=OP,
    triton="token_loss.backward",
)
# The row pass of the linear losses on a chunk's logits [n, V]. L = sum over the rows of scale * (token_loss -
# entropy_coef * entropy). Writes the log-probs, entropies and grad_logprobs [n], and dL/dlogits, which may be the
# logits, or 16-bit where they are fp32. All are 0 in masked rows.
ROWS_ = register(
    "token_loss_rows_(Tensor logits, Tensor targets, Tensor? advantages, Tensor? old_logprob, Tensor?[]? more, "
    "float low, float high, float dual_clip, float[]? options, float entropy_coef, Tensor? row_temperature, "
    "float temperature, float softcap, Tensor? mask, Tensor scale, Tensor(a!) dlogits, Tensor(b!) logprob, "
    "Tensor(c!)? entropy, Tensor(d!)? grad_logprob) -> ()",
    lambda *arguments: None,
    op=OP,
    triton="token_loss.rows_",
)
