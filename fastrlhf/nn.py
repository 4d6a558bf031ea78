"""The losses as torch.nn modules: settings in the constructor, which checks them, tensors in `forward`.

The settings of a module have the names and defaults of its op, and its results are bitwise identical to the op's. The
modules have no parameters and no buffers: the weight of a head belongs to the model.
Shapes: B sequences, T steps, N tokens, H hidden, V vocabulary, M completions, P prompts.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastrlhf.ops import _backend, _checks, _policy, _settings
from fastrlhf.ops import linear_cross_entropy as _linear_cross_entropy
from fastrlhf.ops import linear_ppo_loss as _linear_ppo_loss
from fastrlhf.ops import ppo_loss as _ppo_loss
from fastrlhf.ops import ranking_loss as _ranking_loss
from fastrlhf.ops.linear_cross_entropy import LinearCrossEntropyOutput
from fastrlhf.ops.ppo_loss import PPOLossOutput

__all__ = ["LinearCrossEntropy", "LinearPPOLoss", "PPOLoss", "RankingLoss"]


class _Loss(nn.Module):
    """An op with its settings; `forward` takes the tensors."""

    def __init__(self, op: Callable, given: dict):
        """`given`: the constructor's locals(), its settings among them."""
        super().__init__()
        defaults = {name: p.default for name, p in inspect.signature(op).parameters.items()}
        self._defaults = {name: defaults[name] for name in given if name in defaults}
        for name in self._defaults:
            setattr(self, name, given[name])
        self._check(type(self).__name__)

    def _check(self, op: str) -> None:
        """Refuses a wrong setting; the message begins with `op`."""
        _backend.check_name(op, self.backend)

    def _current(self, **tensors: Tensor | None) -> dict:
        """The settings that are not the default, with the `tensors` that a call has in their place.

        They may change: a schedule writes `module.clip` between steps.
        """
        given = {name: getattr(self, name) for name in self._defaults}
        given |= {name: x for name, x in tensors.items() if x is not None}
        return {name: x for name, x in given.items() if not _same(x, self._defaults[name])}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._current().items())


def _same(value: object, default: object) -> bool:
    """Compares types first, because 1 == True, and because `array == number` has no single truth value."""
    return type(value) is type(default) and value == default


class _PolicyLoss(_Loss):
    """A policy loss, with the settings that its op takes as **settings."""

    def _check(self, op: str) -> None:
        super()._check(op)
        _checks.ppo_settings(
            op, self.clip, self.dual_clip, self.value_clip, self.value_coef, self.entropy_coef
        )
        names = ("clip", "dual_clip", *_settings.DEFAULTS)
        given = {name: getattr(self, name) for name in names if name in self._defaults}
        _policy.check_settings(op, **given)
        _checks.number(op, "scale", self.scale)


class _HeadLoss(_Loss):
    """A loss from hidden states and the weight of the head."""

    def _check(self, op: str) -> None:
        super()._check(op)
        _checks.number(op, "temperature", self.temperature, low=0, strict=True)
        if self.softcap is not None:
            _checks.number(op, "softcap", self.softcap, low=0, strict=True)
        _checks.word(op, "workspace", self.workspace, _checks.WORKSPACES)


class PPOLoss(_PolicyLoss):
    """`fastrlhf.ppo_loss`: clipped policy loss, clipped value loss and entropy bonus, with metrics.

    Args:
        clip, dual_clip, value_clip, value_coef, entropy_coef, objective, tau_pos, tau_neg, kl_coef, kl_estimator,
            kl_clamp, kl_gradient, rollout_level, rollout_mode, rollout_bounds, aggregation, value_aggregation,
            length, backend: as in `fastrlhf.ppo_loss`. The tensors that they are about and the counts of a batch
            go to `forward`.
        scale: a number; a tensor of a step goes to `forward`.

    Raises:
        TypeError, ValueError: a wrong setting, by name, in the constructor; a wrong tensor in the call.

    >>> PPOLoss(clip=0.1)(torch.zeros(1), torch.zeros(1), torch.ones(1)).loss
    tensor(-1.)
    """

    def __init__(
        self,
        *,
        clip: float | tuple[float | None, float | None] = 0.2,
        dual_clip: float | None = None,
        value_clip: float | None = 0.2,
        value_coef: float = 0.5,
        entropy_coef: float = 0.0,
        objective: str = "ppo",
        tau_pos: float = 1.0,
        tau_neg: float = 1.05,
        kl_coef: float = 0.0,
        kl_estimator: str = "k3",
        kl_clamp: bool = True,
        kl_gradient: str = "estimator",
        rollout_level: str = "token",
        rollout_mode: str = "truncate",
        rollout_bounds: tuple[float | None, float | None] = (None, None),
        aggregation: str = "token-mean",
        value_aggregation: str | None = None,
        length: float | None = None,
        scale: float = 1.0,
        backend: str = "auto",
    ):
        super().__init__(_ppo_loss.ppo_loss, locals())

    def forward(
        self,
        logprob: Tensor,
        old_logprob: Tensor | None,
        advantages: Tensor,
        *,
        values: Tensor | None = None,
        old_values: Tensor | None = None,
        returns: Tensor | None = None,
        entropy: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        ref_logprob: Tensor | None = None,
        rollout_weights: Tensor | None = None,
        rollout_logprob: Tensor | None = None,
        num_tokens: float | Tensor | None = None,
        num_sequences: float | Tensor | None = None,
        scale: Tensor | None = None,
    ) -> PPOLossOutput:
        """PPOLossOutput(loss, metrics); all tensors [...], one element per token.

        advantages and rollout_weights may have one a sequence. `scale`: a tensor in place of the module's number.
        """
        return _ppo_loss.ppo_loss(
            logprob,
            old_logprob,
            advantages,
            values=values,
            old_values=old_values,
            returns=returns,
            entropy=entropy,
            mask=mask,
            cu_seqlens=cu_seqlens,
            ref_logprob=ref_logprob,
            rollout_weights=rollout_weights,
            rollout_logprob=rollout_logprob,
            num_tokens=num_tokens,
            num_sequences=num_sequences,
            **self._current(scale=scale),
        )


class LinearPPOLoss(_PolicyLoss, _HeadLoss):
    """`fastrlhf.linear_ppo_loss`: `PPOLoss` from hidden states and the head's weight, without logits.

    Args:
        softcap, compact_rows, workspace, backend: as in `fastrlhf.linear_ppo_loss`. The others: as in `PPOLoss`.
        temperature, scale: numbers; tensors of a step go to `forward`.

    Raises:
        TypeError, ValueError: a wrong setting, by name, in the constructor; a wrong tensor in the call.

    >>> hidden, weight, targets = torch.zeros(2, 8), torch.zeros(4, 8), torch.tensor([1, 3])
    >>> old_logprob = torch.full((2,), -1.3863)
    >>> LinearPPOLoss()(hidden, weight, targets, old_logprob, torch.ones(2)).loss
    tensor(-1.0000)
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        softcap: float | None = None,
        clip: float | tuple[float | None, float | None] = 0.2,
        dual_clip: float | None = None,
        value_clip: float | None = 0.2,
        value_coef: float = 0.5,
        entropy_coef: float = 0.0,
        objective: str = "ppo",
        tau_pos: float = 1.0,
        tau_neg: float = 1.05,
        kl_coef: float = 0.0,
        kl_estimator: str = "k3",
        kl_clamp: bool = True,
        kl_gradient: str = "estimator",
        rollout_level: str = "token",
        rollout_mode: str = "truncate",
        rollout_bounds: tuple[float | None, float | None] = (None, None),
        aggregation: str = "token-mean",
        value_aggregation: str | None = None,
        length: float | None = None,
        scale: float = 1.0,
        compact_rows: bool = False,
        workspace: str = "fast",
        backend: str = "auto",
    ):
        super().__init__(_linear_ppo_loss.linear_ppo_loss, locals())

    def _check(self, op: str) -> None:
        super()._check(op)
        _checks.flag(op, "compact_rows", self.compact_rows)

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        old_logprob: Tensor | None,
        advantages: Tensor,
        *,
        bias: Tensor | None = None,
        temperature: Tensor | None = None,
        values: Tensor | None = None,
        old_values: Tensor | None = None,
        returns: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        ref_logprob: Tensor | None = None,
        rollout_weights: Tensor | None = None,
        rollout_logprob: Tensor | None = None,
        num_tokens: float | Tensor | None = None,
        num_sequences: float | Tensor | None = None,
        scale: Tensor | None = None,
        accumulate_into: Tensor | None = None,
        num_rows: int | None = None,
        process_group: "torch.distributed.ProcessGroup | None" = None,
    ) -> PPOLossOutput:
        """PPOLossOutput(loss, metrics); hidden [..., H], weight [V, H], the others [...], one element per token.

        advantages and rollout_weights may have one a sequence. `temperature` and `scale`: tensors in place of the
        module's numbers.
        """
        return _linear_ppo_loss.linear_ppo_loss(
            hidden,
            weight,
            targets,
            old_logprob,
            advantages,
            bias=bias,
            values=values,
            old_values=old_values,
            returns=returns,
            mask=mask,
            cu_seqlens=cu_seqlens,
            ref_logprob=ref_logprob,
            rollout_weights=rollout_weights,
            rollout_logprob=rollout_logprob,
            num_tokens=num_tokens,
            num_sequences=num_sequences,
            accumulate_into=accumulate_into,
            num_rows=num_rows,
            process_group=process_group,
            **self._current(temperature=temperature, scale=scale),
        )


class LinearCrossEntropy(_HeadLoss):
    """`fastrlhf.linear_cross_entropy`: the language-model loss from hidden states, without logits.

    Args:
        ignore_index, reduction, label_smoothing, z_loss, return_lse, softcap, workspace, backend:
            as in `fastrlhf.linear_cross_entropy`.
        temperature, scale: numbers; tensors of a step go to `forward`.

    Raises:
        TypeError, ValueError: a wrong setting, by name, in the constructor; a wrong tensor in the call.

    >>> targets = torch.tensor([1, -100])
    >>> LinearCrossEntropy()(torch.zeros(2, 8), torch.zeros(4, 8), targets)
    tensor(1.3863)
    """

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        return_lse: bool = False,
        temperature: float = 1.0,
        softcap: float | None = None,
        scale: float = 1.0,
        workspace: str = "fast",
        backend: str = "auto",
    ):
        super().__init__(_linear_cross_entropy.linear_cross_entropy, locals())

    def _check(self, op: str) -> None:
        super()._check(op)
        _linear_cross_entropy.check_settings(
            *(op, self.ignore_index, self.reduction, self.label_smoothing),
            *(self.z_loss, self.return_lse),
        )
        _checks.number(op, "scale", self.scale)

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        *,
        bias: Tensor | None = None,
        class_weight: Tensor | None = None,
        temperature: Tensor | None = None,
        scale: Tensor | None = None,
        accumulate_into: Tensor | None = None,
        num_rows: int | None = None,
        process_group: "torch.distributed.ProcessGroup | None" = None,
    ) -> Tensor | LinearCrossEntropyOutput:
        """The loss, 0-d or [...] of ``reduction="none"``; hidden [..., H], weight [V, H], targets [...].

        With ``return_lse`` a named tuple (loss, lse). class_weight [V].
        `temperature` and `scale`: tensors in place of the module's numbers.
        """
        return _linear_cross_entropy.linear_cross_entropy(
            hidden,
            weight,
            targets,
            bias=bias,
            class_weight=class_weight,
            accumulate_into=accumulate_into,
            num_rows=num_rows,
            process_group=process_group,
            **self._current(temperature=temperature, scale=scale),
        )


class RankingLoss(_Loss):
    """`fastrlhf.ranking_loss`: the all-pairs loss of a reward model over ranked completions.

    Args:
        margin: a number; margins of a step go to `forward`.
        backend: see `fastrlhf.backends`.

    >>> groups = torch.tensor([0, 2], dtype=torch.int32)
    >>> RankingLoss()(torch.tensor([1.0, 0.0]), torch.tensor([1, 2]), groups)
    tensor(0.3133)
    """

    def __init__(self, *, margin: float = 0.0, backend: str = "auto"):
        super().__init__(_ranking_loss.ranking_loss, locals())

    def _check(self, op: str) -> None:
        super()._check(op)
        _checks.number(op, "margin", self.margin)

    def forward(
        self, scores: Tensor, ranks: Tensor, cu_groups: Tensor, *, margin: Tensor | None = None
    ) -> Tensor:
        """The loss, 0-d; scores and ranks [M], cu_groups [P+1]. `margin`: [P], in place of the module's number."""
        return _ranking_loss.ranking_loss(scores, ranks, cu_groups, **self._current(margin=margin))
