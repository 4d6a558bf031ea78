"""The losses as torch.nn modules: settings in the constructor, which checks them, tensors in `forward`.

The settings of a module have the names and defaults of its op, and its results are bitwise identical to the op's. The
modules have no parameters and no buffers: the weight of a head belongs to the model.
Shapes: B sequences, T steps, N tokens, H hidden, V vocabulary, M completions, P prompts.
"""

import torch
from torch import Tensor, nn

from fastrlhf.ops import _backend, _checks
from fastrlhf.ops import linear_cross_entropy as _linear_cross_entropy
from fastrlhf.ops import linear_ppo_loss as _linear_ppo_loss
from fastrlhf.ops import ppo_loss as _ppo_loss
from fastrlhf.ops import ranking_loss as _ranking_loss
from fastrlhf.ops.linear_cross_entropy import LinearCrossEntropyOutput
from fastrlhf.ops.ppo_loss import PPOLossOutput

__all__ = ["LinearCrossEntropy", "LinearPPOLoss", "PPOLoss", "RankingLoss"]


class _Loss(nn.Module):
    """An op with its settings; `forward` takes the tensors."""

    def __init__(self, op: str, **settings):
        super().__init__()
        _backend.check_name(op, settings["backend"])
        self._settings = settings
        for name, value in settings.items():
            setattr(self, name, value)

    def _current(self) -> dict:
        """The current settings, because a schedule may change `module.clip` between steps."""
        return {name: getattr(self, name) for name in self._settings}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._current().items())


class PPOLoss(_Loss):
    """`fastrlhf.ppo_loss`: clipped policy loss, clipped value loss and entropy bonus, with metrics.

    Args:
        clip, dual_clip, value_clip, value_coef, entropy_coef, backend: as in `fastrlhf.ppo_loss`.

    Raises:
        TypeError, ValueError: a wrong setting, by name, in the constructor; a wrong tensor in the call.

    >>> PPOLoss(clip=0.1)(torch.zeros(1), torch.zeros(1), torch.ones(1)).loss
    tensor(-1.)
    """

    def __init__(
        self,
        *,
        clip: float = 0.2,
        dual_clip: float | None = None,
        value_clip: float | None = 0.2,
        value_coef: float = 0.5,
        entropy_coef: float = 0.0,
        backend: str = "auto",
    ):
        _checks.ppo_settings("PPOLoss", clip, dual_clip, value_clip, value_coef, entropy_coef)
        super().__init__(
            "PPOLoss",
            clip=clip,
            dual_clip=dual_clip,
            value_clip=value_clip,
            value_coef=value_coef,
            entropy_coef=entropy_coef,
            backend=backend,
        )

    def forward(
        self,
        logprob: Tensor,
        old_logprob: Tensor,
        advantages: Tensor,
        *,
        values: Tensor | None = None,
        old_values: Tensor | None = None,
        returns: Tensor | None = None,
        entropy: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> PPOLossOutput:
        """PPOLossOutput(loss, metrics); all tensors [...], one element per token."""
        return _ppo_loss.ppo_loss(
            logprob,
            old_logprob,
            advantages,
            values=values,
            old_values=old_values,
            returns=returns,
            entropy=entropy,
            mask=mask,
            **self._current(),
        )


class LinearPPOLoss(_Loss):
    """`fastrlhf.linear_ppo_loss`: `PPOLoss` from hidden states and the head's weight, without logits.

    Args:
        softcap, clip, dual_clip, value_clip, value_coef, entropy_coef, compact_rows, workspace, backend:
            as in `fastrlhf.linear_ppo_loss`.
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
        clip: float = 0.2,
        dual_clip: float | None = None,
        value_clip: float | None = 0.2,
        value_coef: float = 0.5,
        entropy_coef: float = 0.0,
        scale: float = 1.0,
        compact_rows: bool = False,
        workspace: str = "fast",
        backend: str = "auto",
    ):
        op = "LinearPPOLoss"
        _checks.number(op, "temperature", temperature, low=0, strict=True)
        if softcap is not None:
            _checks.number(op, "softcap", softcap, low=0, strict=True)
        _checks.ppo_settings(op, clip, dual_clip, value_clip, value_coef, entropy_coef)
        _checks.number(op, "scale", scale)
        _checks.flag(op, "compact_rows", compact_rows)
        _checks.word(op, "workspace", workspace, _checks.WORKSPACES)
        super().__init__(
            op,
            temperature=temperature,
            softcap=softcap,
            clip=clip,
            dual_clip=dual_clip,
            value_clip=value_clip,
            value_coef=value_coef,
            entropy_coef=entropy_coef,
            scale=scale,
            compact_rows=compact_rows,
            workspace=workspace,
            backend=backend,
        )

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        old_logprob: Tensor,
        advantages: Tensor,
        *,
        bias: Tensor | None = None,
        temperature: Tensor | None = None,
        values: Tensor | None = None,
        old_values: Tensor | None = None,
        returns: Tensor | None = None,
        mask: Tensor | None = None,
        scale: Tensor | None = None,
        accumulate_into: Tensor | None = None,
        num_rows: int | None = None,
        process_group: "torch.distributed.ProcessGroup | None" = None,
    ) -> PPOLossOutput:
        """PPOLossOutput(loss, metrics); hidden [..., H], weight [V, H], the others [...], one element per token.

        `temperature` and `scale`: tensors in place of the module's numbers.
        """
        settings = self._current()
        given = {"temperature": temperature, "scale": scale}
        settings |= {name: value for name, value in given.items() if value is not None}
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
            accumulate_into=accumulate_into,
            num_rows=num_rows,
            process_group=process_group,
            **settings,
        )


class LinearCrossEntropy(_Loss):
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
        op = "LinearCrossEntropy"
        settings = (ignore_index, reduction, label_smoothing, z_loss, return_lse)
        _linear_cross_entropy.check_settings(op, *settings)
        _checks.number(op, "temperature", temperature, low=0, strict=True)
        if softcap is not None:
            _checks.number(op, "softcap", softcap, low=0, strict=True)
        _checks.number(op, "scale", scale)
        _checks.word(op, "workspace", workspace, _checks.WORKSPACES)
        super().__init__(
            op,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            return_lse=return_lse,
            temperature=temperature,
            softcap=softcap,
            scale=scale,
            workspace=workspace,
            backend=backend,
        )

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
        settings = self._current()
        given = {"temperature": temperature, "scale": scale}
        settings |= {name: value for name, value in given.items() if value is not None}
        return _linear_cross_entropy.linear_cross_entropy(
            hidden,
            weight,
            targets,
            bias=bias,
            class_weight=class_weight,
            accumulate_into=accumulate_into,
            num_rows=num_rows,
            process_group=process_group,
            **settings,
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
        _checks.number("RankingLoss", "margin", margin)
        super().__init__("RankingLoss", margin=margin, backend=backend)

    def forward(
        self, scores: Tensor, ranks: Tensor, cu_groups: Tensor, *, margin: Tensor | None = None
    ) -> Tensor:
        """The loss, 0-d; scores and ranks [M], cu_groups [P+1]. `margin`: [P], in place of the module's number."""
        settings = self._current() | ({} if margin is None else {"margin": margin})
        return _ranking_loss.ranking_loss(scores, ranks, cu_groups, **settings)
