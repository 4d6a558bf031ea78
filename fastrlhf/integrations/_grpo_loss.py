"""TRL's GRPO loss on `ppo_loss`. See `trl.patch`.

TRL's own method still runs, on log-probs and entropies without a graph: it computes the metrics, the masks and the
adaptive entropy coefficient. The loss that it returns is dropped; `ppo_loss` computes the one that is trained on.

Shapes: B sequences, T completion tokens; log-probs, entropies and masks [B, T].
"""

import functools
import operator

import torch
from torch import Tensor

import fastrlhf
from fastrlhf.integrations import _common
from fastrlhf.integrations._targets import Unsupported

_AGGREGATIONS = {
    "grpo": "seq-mean-token-mean",
    "sapo": "seq-mean-token-mean",
    "bnpo": "token-mean",
    "dapo": "token-mean",
    "cispo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
    "luspo": "seq-mean-token-sum",
}
_OBJECTIVES = {"cispo": "cispo", "sapo": "sapo"}  # the others: ppo
# Methods of the trainer whose results the loss needs.
_OUTPUTS = "_get_per_token_logps_and_entropies"
_POLICY_MASKS = ("get_off_policy_mask", "get_high_entropy_mask")


def compute_loss(original, backend, inplace_backward):
    def _compute_loss(self, model, inputs):
        keep = _kept(inputs)
        options = {**_aggregation(self, inputs), "mask": keep, "backend": backend}
        settings = {**_objective(self), **_kl(self)}
        _require_tensors(self, inputs)
        entropy_coef = _entropy_coef(self)  # before TRL's method changes it
        seen = _Seen(self)
        original(seen, model, inputs)

        logprob, entropies, aux_loss = seen.results[_OUTPUTS]
        loss = _policy_loss(self, inputs, logprob, seen.results, settings, options)
        steps = _accumulation_steps(self)
        if entropy_coef:
            high = seen.results.get("get_high_entropy_mask")
            kept = keep if high is None else keep & high
            loss = loss - entropy_coef / steps * _mean(entropies, kept, None)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef / steps * aux_loss
        return loss

    return _compute_loss


class _Seen:
    """A trainer as TRL's method sees it: its log-probs and entropies have no graph. `results`: method -> result."""

    def __init__(self, trainer):
        vars(self).update(trainer=trainer, results={})

    def __getattr__(self, name):
        value = getattr(self.trainer, name)
        return functools.partial(self._call, name, value) if name in _RECORDED else value

    def __setattr__(self, name, value):
        setattr(self.trainer, name, value)

    def _call(self, name, method, *args, **kwargs):
        result = self.results[name] = method(*args, **kwargs)
        if name == _OUTPUTS:
            return tuple(x if x is None else x.detach() for x in result)
        return result


_RECORDED = (_OUTPUTS, *_POLICY_MASKS)


# ---- settings -----------------------------------------------------------------------------------


def _over_sequence(trainer) -> bool:
    return trainer.importance_sampling_level == "sequence"


def _objective(trainer) -> dict:
    """objective and what it takes: its clip, or its temperatures."""
    kind, level = trainer.loss_type, trainer.importance_sampling_level
    if level not in ("token", "sequence"):
        raise Unsupported(f"importance_sampling_level={level!r}")
    objective = _OBJECTIVES.get(kind, "gspo" if level == "sequence" else "ppo")
    found = {"objective": objective}
    number = _common.require_number
    if objective == "sapo":
        for side in ("pos", "neg"):
            name = f"sapo_temperature_{side}"
            found[f"tau_{side}"] = number(name, getattr(trainer.args, name))
        return found
    if objective == "cispo":  # epsilon_high is the limit of the ratio itself
        limit = number("epsilon_high of cispo", trainer.epsilon_high, low=1.0)
        return {**found, "clip": (None, limit - 1)}
    low, high = number("epsilon", trainer.epsilon_low), number("epsilon_high", trainer.epsilon_high)
    if trainer.args.delta is not None:
        # TRL clips the ratio to delta, then takes the minimum: delta limits the ratio where it is below 1 + high and
        # A > 0, and the loss where it is above and A < 0.
        delta = number("delta", trainer.args.delta, low=1.0)
        found["dual_clip"] = max(delta, 1 + high)
        high = min(high, delta - 1)
    return {**found, "clip": (low, high)}


def _kl(trainer) -> dict:
    """The options of the KL beside `ref_logprob`; none where `_kl_over_sequence` adds it, or without one."""
    if trainer.beta == 0.0 or _corrects_kl_over_sequence(trainer):
        return {}
    gradient = "ratio" if trainer.args.use_bias_correction_kl else "estimator"
    return {"kl_coef": trainer.beta, "kl_clamp": False, "kl_gradient": gradient}


def _corrects_kl_over_sequence(trainer) -> bool:
    corrected = trainer.beta != 0.0 and trainer.args.use_bias_correction_kl
    return bool(corrected and _over_sequence(trainer))


def _accumulation_steps(trainer) -> int:
    """What TRL divides a micro-batch's loss by. An evaluation does not accumulate."""
    return trainer.current_gradient_accumulation_steps if trainer.model.training else 1


def _aggregation(trainer, inputs) -> dict:
    """aggregation, its counts, and scale. TRL counts all rows, also those without a token."""
    kind, steps = trainer.loss_type, _accumulation_steps(trainer)
    if kind not in _AGGREGATIONS:
        raise Unsupported(f"loss_type={kind!r}")
    found = {"aggregation": _AGGREGATIONS[kind]}
    if kind in ("dapo", "cispo"):  # the tokens of all processes in one optimizer step, per process
        tokens = inputs["num_items_in_batch"].clamp(min=1) / trainer.accelerator.num_processes
        if trainer.model.training:
            tokens = tokens * steps / trainer.args.steps_per_generation
        return {**found, "num_tokens": tokens}
    found["scale"] = 1 / steps
    if kind != "bnpo":
        found["num_sequences"] = inputs["completion_ids"].shape[0]
    if kind == "dr_grpo":
        found["length"] = trainer.max_completion_length
    return found


def _entropy_coef(trainer) -> float:
    """The coefficient of this micro-batch's entropy bonus; the adaptive one is 0 above its target."""
    if not trainer._entropy_bonus_enabled:
        return 0.0
    if (
        trainer.use_adaptive_entropy
        and not trainer._last_world_entropy <= trainer.args.entropy_target
    ):
        return 0.0
    return trainer.entropy_coef


# ---- tensors ------------------------------------------------------------------------------------


def _corrects_rollout(trainer) -> bool:
    return bool(trainer.use_vllm and trainer.vllm_importance_sampling_correction)


def _kept(inputs) -> Tensor:
    """The tokens that count, bool."""
    ids = inputs["completion_ids"]
    masks = (inputs["completion_mask"], inputs.get("tool_mask"))
    kept = [_common.require_binary_mask(mask, ids) for mask in masks if mask is not None]
    return functools.reduce(operator.and_, kept)


_TENSORS = (
    "advantages",
    "old_per_token_logps",
    "ref_per_token_logps",
    "importance_sampling_ratio",
)


def _require_tensors(trainer, inputs) -> None:
    for name in _TENSORS:
        if inputs.get(name) is not None:
            _common.require_dense(name, inputs[name])
            _common.require_constants(**{name: inputs[name]})
    advantages = inputs["advantages"]
    if _over_sequence(trainer) and advantages.dim() == 2 and advantages.shape[1] != 1:
        raise Unsupported("advantages per token with importance_sampling_level='sequence'")


def _mean(x: Tensor, keep: Tensor, dim: int | None) -> Tensor:
    """Mean over the tokens that count; 0 without one. Of each sequence, [B, 1], with dim=1."""
    x = x.masked_fill(~keep, 0.0)
    return x.sum(dim, keepdim=dim is not None) / keep.sum(dim, keepdim=dim is not None).clamp(min=1)


def _policy_loss(trainer, inputs, logprob, results, settings, options) -> Tensor:
    """The loss without its entropy bonus and without the loss of a mixture of experts; 0-d."""
    keep, dtype = options["mask"], torch.promote_types(logprob.dtype, torch.float32)
    given = {k: v.to(dtype) for k, v in inputs.items() if k in _TENSORS and v is not None}
    logprob = logprob.to(dtype)
    now = logprob.detach()
    old = given.get("old_per_token_logps", now)
    if "kl_coef" in settings:
        settings["ref_logprob"] = given["ref_per_token_logps"]
    weights = [results[name].to(dtype) for name in _POLICY_MASKS if name in results]
    weights += [given["importance_sampling_ratio"]] if _corrects_rollout(trainer) else []
    if weights:
        weight = functools.reduce(operator.mul, weights)
        if _over_sequence(trainer) and settings["objective"] != "cispo":
            # TRL's gradient of a sequence's ratio is spread over its tokens, whatever the weight of each.
            weight = _mean(weight.expand_as(keep), keep, 1)
        settings["rollout_weights"] = weight
    old_of_token = old
    if _over_sequence(trainer) and settings["objective"] != "gspo":
        # cispo and sapo take the ratio of a token: give each token that of its sequence.
        old_of_token = now - _mean(now - old, keep, 1)
    out = fastrlhf.ppo_loss(logprob, old_of_token, given["advantages"], **settings, **options)
    if not _corrects_kl_over_sequence(trainer):
        return out.loss
    kl = _kl_over_sequence(logprob, old, given["ref_per_token_logps"], options)
    return out.loss + trainer.beta * kl


def _kl_over_sequence(logprob, old, ref, options) -> Tensor:
    """The aggregate of s * k3, with s the ratio of a sequence; 0-d.

    TRL spreads the gradient through s over the sequence. The op's kl_gradient="ratio" would leave it with each token.
    """
    keep = options["mask"]
    d = (logprob - ref).masked_fill(~keep, 0.0)
    kl = torch.exp(_mean(logprob - old, keep, 1)) * (torch.expm1(-d) + d)
    minus_one = kl.new_full((kl.shape[0],), -1.0)
    # The loss of reinforce is -advantage * logprob, aggregated.
    return fastrlhf.ppo_loss(kl, None, minus_one, objective="reinforce", **options).loss
