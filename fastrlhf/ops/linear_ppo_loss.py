"""linear_ppo_loss: ppo_loss straight from hidden states, three GEMMs and never N x V logits.

Shapes: hidden [..., H] -> N rows, weight [V, H], bias [V]; every other tensor [...].
"""

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastrlhf import reference
from fastrlhf.ops import (
    _backend,
    _checks,
    _linear_loss,
    _linear_policy,
    _metrics,
    _policy,
    _settings,
    ppo_loss,
    token_loss,
)
from fastrlhf.ops._register import choose, needs, on_all_ranks
from fastrlhf.ops._settings import Settings
from fastrlhf.reference import PPOLossOutput

OP = "linear_ppo_loss"


@_settings.shown(_settings.DEFAULTS)
@on_all_ranks
def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprob: Tensor | None,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    mask: Tensor | None = None,
    clip: float | tuple[float | None, float | None] = 0.2,
    dual_clip: float | None = None,
    value_clip: float | None = 0.2,
    value_coef: float = 0.5,
    entropy_coef: float = 0.0,
    scale: float | Tensor = 1.0,
    accumulate_into: Tensor | None = None,
    compact_rows: bool = False,
    num_rows: int | None = None,
    workspace: str = "fast",
    process_group: "torch.distributed.ProcessGroup | None" = None,
    backend: str = "auto",
    **settings: Unpack[Settings],
) -> PPOLossOutput:
    """`ppo_loss` of `linear_logprob`'s log-probs and entropies; the forward computes the gradients.

    Loss and metrics are bitwise identical to those of the two ops in sequence. A chunk's log-probs
    determine its dL/dlogprob, so its logits are turned into dlogits, dX and dW at once: 6 N H V FLOP
    for forward and backward instead of 8; the backward only scales. The entropy is free and always
    among the metrics. Masked rows enter no GEMM.

    With objective="gspo" dL/dlogprob needs the log-probs of the whole sequence (and so does the
    rollout weight of a sequence without `old_logprob`). Chunks are then cut where sequences end, also
    6 N H V FLOP; the rows of a sequence that is longer than a chunk take 8, as they are multiplied with
    the weight twice. The log-probs, and so loss and metrics, can then differ from those of the two ops
    by the rounding of a GEMM with another number of rows.

    Args:
        hidden, weight, targets, bias, temperature, softcap, workspace: as in `linear_logprob`.
        old_logprob, advantages, values, old_values, returns, mask: as in `ppo_loss`.
        cu_seqlens, objective, clip, dual_clip, tau_pos, tau_neg: as in `ppo_loss`. On a GPU the host
            waits once for the lengths with "gspo", if the rows exceed one chunk; while a CUDA graph is
            captured it cannot, and all rows are multiplied with the weight twice.
        value_clip, value_coef, entropy_coef: as in `ppo_loss`.
        ref_logprob, kl_coef, kl_estimator, kl_clamp, kl_gradient: as in `ppo_loss`.
        rollout_weights, rollout_logprob, rollout_level, rollout_mode, rollout_bounds: as in `ppo_loss`.
        aggregation, value_aggregation, length, num_tokens, num_sequences: as in `ppo_loss`.
        scale, accumulate_into: as in `linear_cross_entropy`; the metrics are not scaled.
        compact_rows: rows whose gradient is exactly 0 (clipped, A = 0) enter only the first GEMM. On a
            GPU the host waits twice per chunk. Ignored while a CUDA graph is captured.
        num_rows: as in `linear_logprob`. Without it the host waits for a GPU once, in the forward. On a
            GPU a wrong number makes loss, metrics and gradients NaN.
        process_group: as in `linear_logprob`; accumulate_into, like dW, has this rank's rows. Every rank
            gets the same loss and metrics. Not under torch.compile.
        backend: runs the row kernels and the loss; the GEMMs are PyTorch's.

    Returns:
        PPOLossOutput(loss, metrics), as `ppo_loss`, with "entropy" among the metrics. Gradients flow to
        hidden, weight, bias and values, once.

    Raises:
        TypeError, ValueError: as `linear_logprob` and `ppo_loss`.

    Source: as `ppo_loss`; the gradients in the forward follow Liger Kernel (arXiv:2410.10989).

    >>> row = torch.zeros(1)
    >>> out = linear_ppo_loss(torch.zeros(1, 8), torch.zeros(4, 8), torch.tensor([1]), row, row + 1)
    >>> out.loss, out.metrics["entropy"]
    (tensor(-0.2500), tensor(1.3863))
    """
    acc = _checks.linear_head(OP, hidden, weight, bias, workspace)
    row_temperature, temperature_number, cap, _ = _checks.logit_rows(
        *(OP, hidden, targets, temperature, softcap, mask if weight.shape[0] == 1 else None),
        vocab=weight.shape[0],
        sharded=process_group is not None,
    )
    if advantages is None:
        _checks.tensor(OP, "advantages", advantages)
    shape = targets.shape
    per_token = len(shape) != 2 or _checks.has_shape(advantages, shape)
    plain = not settings and per_token and old_logprob is not None
    _checks.tokens_of(
        OP,
        "the log-prob",
        shape,
        acc,
        hidden.device,
        old_logprob=old_logprob,
        advantages=advantages if plain else None,
        values=values,
        old_values=old_values,
        returns=returns,
    )
    policy = None
    if not plain:
        policy = _policy.check(
            OP,
            "the log-prob",
            shape,
            acc,
            hidden.device,
            old_logprob=old_logprob,
            advantages=advantages,
            values=values is not None,
            clip=clip,
            dual_clip=dual_clip,
            **_settings.filled(OP, settings, _settings.DEFAULTS),
        )
    if mask is not None:
        mask = _checks.token_mask(OP, mask, targets)
    numbers = _checks.ppo_settings(OP, clip, dual_clip, value_clip, value_coef, entropy_coef)
    if values is not None or old_values is not None or returns is not None:
        _checks.ppo_values(OP, values, old_values, returns, value_clip)
    _checks.ppo_constants(OP, old_logprob, advantages, old_values, returns)
    if compact_rows is not False:
        _checks.flag(OP, "compact_rows", compact_rows)
    if num_rows is not None:
        num_rows = _checks.num_rows(OP, num_rows, mask, targets)
    factor = None
    if type(scale) is not float or scale != 1:
        factor = _checks.scale_argument(OP, scale, hidden.device, acc)
    if accumulate_into is not None:
        inputs = {"hidden": hidden, "weight": weight, "targets": targets, "bias": bias}
        inputs |= {"old_logprob": old_logprob, "advantages": advantages, "values": values}
        inputs |= {"old_values": old_values, "returns": returns}
        inputs |= {"temperature": row_temperature, "scale": factor}
        inputs |= {name: x for name, x in settings.items() if isinstance(x, Tensor)}
        _linear_loss.check_accumulate(OP, accumulate_into, weight, acc, inputs)
    chosen = choose(OP, backend, hidden, weight, bias)
    vocab = weight.shape[0]
    if process_group is not None:
        vocab = _linear_loss.whole_vocab(OP, process_group, hidden, weight)
    into = accumulate_into if torch.is_grad_enabled() else None
    if chosen == "reference" or into is not None or process_group is not None:
        _checks.row_values(OP, targets, vocab, mask, row_temperature)
    if chosen == "reference":
        *limits, number, value_coef, entropy_coef = numbers
        value_clip = None if number == _checks.UNLIMITED else number

        def loss(hidden, weight, bias, values):
            return reference.linear_ppo_loss(
                hidden,
                weight,
                targets,
                old_logprob,
                advantages,
                bias=bias,
                temperature=temperature_number if row_temperature is None else row_temperature,
                softcap=cap or None,
                values=values,
                old_values=old_values,
                returns=returns,
                mask=mask,
                value_clip=value_clip,
                value_coef=value_coef,
                entropy_coef=entropy_coef,
                **_policy.reference_options(policy, limits, clip),
                scale=1.0 if factor is None else factor,
                num_rows=num_rows,
                workspace=workspace,
            )

        parameters = (hidden, weight, bias, values)
        return _linear_loss.by_reference(OP, loss, parameters, into=into, group=process_group)
    if policy is not None:
        advantages, numbers = policy.advantages, (*policy.limits, *numbers[3:])
    per_token = [old_logprob, advantages, old_values, returns]
    flat_values, flat_mask = values, mask
    if len(shape) != 1:
        flat = lambda x: None if x is None else x.reshape(-1)  # noqa: E731
        per_token, flat_values, flat_mask = [flat(x) for x in per_token], flat(values), flat(mask)
    numbers = [temperature_number, cap, *numbers]
    if policy is not None:
        more = _linear_policy.arguments(
            policy, per_token[0], flat_mask, targets.reshape(-1), acc, chosen
        )
        per_token += more[0]
        numbers += more[1]
    arguments = (
        hidden,
        weight,
        bias,
        flat_values,
        targets,
        flat_mask,
        row_temperature,
        factor,
        per_token,
        numbers,
        num_rows,
        compact_rows,
        OP,
        workspace,
        chosen,
        needs(hidden, weight, bias, values),
    )
    if into is not None or process_group is not None:
        found = _linear_loss.in_forward(arguments, values, into=into, group=process_group)
    else:
        found = _linear_loss.FWD(*arguments)
    if policy is None:
        names = ppo_loss.PLAIN_NAMES[values is not None, True]
    else:
        names = ppo_loss.names_of(values is not None, True, policy)
    return PPOLossOutput(found[0], _metrics.named(names, found[1]))


_backend.provide(OP, _backend.kernels(token_loss.OP) & _backend.kernels(ppo_loss.OP), gradient=True)
