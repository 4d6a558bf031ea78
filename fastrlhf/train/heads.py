"""The language-model head: what a policy computes from its hidden states, without [M, V] logits.

Shapes: M rows (positions that predict a token), H hidden size, V vocabulary size.

`Policy.forward` ends in a head: a callable `head(hidden, weight, *, bias, softcap, backend)` with hidden states
[M, H] and the unembedding's weight [V, H] and bias [V]. The heads here are the ones that several stages use.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fastrlhf.errors import UserError
from fastrlhf.ops.linear_cross_entropy import linear_cross_entropy
from fastrlhf.ops.linear_logprob import linear_logprob


class Head(Protocol):
    """What `Policy.forward` calls with its hidden states [M, H] and the parameters of its unembedding."""

    def __call__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        *,
        bias: torch.Tensor | None,
        softcap: float | None,
        backend: str,
    ) -> Any: ...


@dataclass(frozen=True)
class TokenLogprobs:
    """logprob [M] = log_softmax(logits / temperature)[targets]; with `entropy`, (logprob [M], entropy [M]).

    In nats, differentiable.
    """

    targets: torch.Tensor  # [M] int64
    temperature: float = 1.0
    entropy: bool = False

    def __call__(self, hidden, weight, **unembedding):
        return linear_logprob(
            hidden,
            weight,
            self.targets,
            temperature=self.temperature,
            return_entropy=self.entropy,
            **unembedding,
        )


@dataclass(frozen=True)
class SummedNLL:
    """nll (0-d) = -sum over the M rows of log_softmax(logits)[targets], in nats."""

    targets: torch.Tensor  # [M] int64

    def __call__(self, hidden, weight, **unembedding):
        # num_rows: no target is ignored, and knowing their number spares a GPU a synchronization.
        return linear_cross_entropy(
            hidden,
            weight,
            self.targets,
            reduction="sum",
            num_rows=self.targets.numel(),
            **unembedding,
        )


# Config attributes of models that scale their logits: Cohere; Granite, HyperCLOVA X, MiniCPM3; Falcon-H1.
_LOGIT_FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier")


def unembedding_parameters(lm) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight [V, H], bias [V] or None) of a causal LM's output head.

    Raises:
        UserError: the head computes more than `hidden @ weight.T + bias` (an adapter such as LoRA, a
            parametrization, a scale of the logits). The fused heads would silently drop the rest.
    """
    head = lm.get_output_embeddings()
    adapters = [
        n for n in ("base_layer", "lora_A", "lora_B", "modules_to_save") if hasattr(head, n)
    ]
    inside = [name for name, _ in head.named_children()]
    if adapters or inside or not isinstance(getattr(head, "weight", None), torch.Tensor):
        what = ", ".join(adapters or inside) or "no weight"
        raise UserError(
            f"the output head {type(head).__name__} must be a plain linear layer; it has {what}, which the "
            "fused head would leave out: merge the adapter (merge_and_unload), or leave lm_head out of its targets"
        )
    for name in _LOGIT_FACTORS:
        factor = getattr(getattr(lm, "config", None), name, None)
        if factor is not None and factor != 1:
            raise UserError(
                f"{type(lm).__name__} scales its logits ({name} = {factor:g} in config.json), which the fused "
                "head would leave out: expected a model without such a factor"
            )
    return head.weight, getattr(head, "bias", None)
