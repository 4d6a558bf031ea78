"""The language-model head: what a policy computes from its hidden states, without [M, V] logits.

Shapes: M rows (positions that predict a token), H hidden size, V vocabulary size.

`Policy.forward` ends in a head: a callable `head(hidden, unembedding, backend)` with hidden states [M, H]. The heads
here are the ones that several stages use. `Unembedding` is the one place that says what a model does after its body.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from fastrlhf.errors import UserError
from fastrlhf.ops.linear_cross_entropy import linear_cross_entropy
from fastrlhf.ops.linear_logprob import linear_logprob


@dataclass(frozen=True)
class Unembedding:
    """The logits of a causal LM as a function of its last hidden states.

    y = scale * (hidden @ weight.T + bias)
    logits = softcap * tanh(y / softcap), or y without a softcap
    """

    weight: torch.Tensor  # [V, H]
    bias: torch.Tensor | None = None  # [V]
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 logits [M, V] of hidden states [M, H]: operands in the weight's dtype, a product that is not rounded."""
        x, weight = hidden.to(self.weight.dtype), self.weight.t()
        with torch.autocast(x.device.type, enabled=False):
            if x.dtype != torch.float32 and x.is_cuda:
                y = torch.mm(x, weight, out_dtype=torch.float32)
            else:
                y = x.float() @ weight.float()
        if self.bias is not None:
            y = y + self.bias
        y = y * self.scale
        return y if self.softcap is None else self.softcap * torch.tanh(y / self.softcap)

    def options(self, temperature: float = 1.0) -> dict[str, Any]:
        """The arguments bias, temperature and softcap of a linear op whose logits are `self.logits / temperature`.

        The ops compute c * tanh(x / c) / t of x = hidden @ weight.T + bias, so c = softcap / scale and
        t = temperature / scale.
        """
        softcap = None if self.softcap is None else self.softcap / self.scale
        return {"bias": self.bias, "temperature": temperature / self.scale, "softcap": softcap}

    def to(self, dtype: torch.dtype) -> "Unembedding":
        """The same function with its parameters in `dtype`."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, weight=self.weight.to(dtype), bias=bias)


class Head(Protocol):
    """What `Policy.forward` calls with its hidden states [M, H] and its unembedding."""

    def __call__(self, hidden: torch.Tensor, unembedding: Unembedding, backend: str) -> Any: ...


@dataclass(frozen=True)
class TokenLogprobs:
    """logprob [M] = log_softmax(logits / temperature)[targets]; with `entropy`, (logprob [M], entropy [M]).

    In nats, differentiable.
    """

    targets: torch.Tensor  # [M] int64
    temperature: float = 1.0
    entropy: bool = False

    def __call__(self, hidden, unembedding, backend):
        return linear_logprob(
            hidden,
            unembedding.weight,
            self.targets,
            return_entropy=self.entropy,
            backend=backend,
            **unembedding.options(self.temperature),
        )


@dataclass(frozen=True)
class SummedNLL:
    """nll (0-d) = -sum over the M rows of log_softmax(logits)[targets], in nats."""

    targets: torch.Tensor  # [M] int64

    def __call__(self, hidden, unembedding, backend):
        # num_rows: no target is ignored, and knowing their number spares a GPU a synchronization.
        return linear_cross_entropy(
            hidden,
            unembedding.weight,
            self.targets,
            reduction="sum",
            num_rows=self.targets.numel(),
            backend=backend,
            **unembedding.options(),
        )


# Config attributes that scale the logits, and the model types that multiply and that divide by them.
_SCALES = {
    "logit_scale": (("cohere", "cohere2", "cohere2_moe", "cohere_compass_text"), ()),
    "lm_head_multiplier": (("falcon_h1",), ()),
    "logits_scaling": (
        ("hyperclovax",),
        (
            "granite",
            "granite_swa",
            "granite4_vision_text",
            "granite_docling_text",
            "granitemoe",
            "granitemoe_swa",
            "granitemoehybrid",
            "granitemoeshared",
            "minicpm3",
        ),
    ),
}


def _scale(lm) -> float:
    config = lm.config.get_text_config()
    scale = 1.0
    for name, (multiplied, divided) in _SCALES.items():
        factor = getattr(config, name, None)
        if factor is None or factor == 1:
            continue
        if not isinstance(factor, int | float) or not factor > 0:
            raise UserError(f"{name} in config.json: expected a positive number, got {factor!r}")
        if config.model_type in multiplied:
            scale *= factor
        elif config.model_type in divided:
            scale /= factor
        else:
            raise UserError(
                f"{type(lm).__name__} has {name} = {factor:g} in config.json, which scales the logits of other "
                f"models; its effect in a {config.model_type!r} model is unknown: expected a model without it"
            )
    return scale


def unembedding(lm) -> Unembedding:
    """The unembedding of a causal LM.

    Raises:
        UserError: the head computes more than `hidden @ weight.T + bias` (an adapter such as LoRA, a
            parametrization), or the config has a scale of the logits whose effect is unknown. The fused heads would
            silently drop the rest.
    """
    head = lm.get_output_embeddings()
    adapters = [
        n for n in ("base_layer", "lora_A", "lora_B", "modules_to_save") if hasattr(head, n)
    ]
    inside = [] if head is None else [name for name, _ in head.named_children()]
    if adapters or inside or not isinstance(getattr(head, "weight", None), torch.Tensor):
        what = ", ".join(adapters or inside) or "no weight"
        raise UserError(
            f"the output head {type(head).__name__} must be a plain linear layer; it has {what}, which the "
            "fused head would leave out: merge the adapter (merge_and_unload), or leave lm_head out of its targets"
        )
    softcap = getattr(lm.config.get_text_config(), "final_logit_softcapping", None)
    return Unembedding(head.weight, getattr(head, "bias", None), _scale(lm), softcap)
