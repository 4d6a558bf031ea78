"""The load-balancing loss of a mixture of experts, computed by the model's own function.

Transformers defines it in the module of the model (Switch Transformer, equations 4 to 6):

    loss = E * sum over experts e of (share of the top-k choices that fall on e) * (mean router probability of e)

A model without such a function (DeepSeek-V3 balances by a bias) or without experts has no router loss.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastrlhf.errors import UserError


@dataclass(frozen=True)
class RouterLoss:
    """`RouterLoss(router logits of each layer [N, E])` is the loss, 0-d; `coefficient` is the config's weight of it."""

    function: Callable
    experts: int  # E
    top_k: int
    coefficient: float

    def __call__(self, router_logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return self.function(router_logits, self.experts, self.top_k)


def router_loss(lm) -> RouterLoss | None:
    """The router loss of a causal LM; None if transformers defines none for it."""
    function = getattr(sys.modules[type(lm).__module__], "load_balancing_loss_func", None)
    config = lm.config.get_text_config()
    # A class may have no experts although its module has the function for its neighbors.
    if function is None or not routers(lm):
        return None
    nested = getattr(config, "ffn_config", None)  # DBRX
    weights = [
        getattr(config, "router_aux_loss_coef", None),
        getattr(config, "aux_loss_coef", None),
    ]
    weights.append(getattr(nested, "moe_loss_weight", None))
    coefficient = next((w for w in weights if w is not None), None)
    if coefficient is None:
        raise UserError(
            f"{type(lm).__name__} has a router loss whose weight is unknown: expected router_aux_loss_coef, "
            "aux_loss_coef or ffn_config.moe_loss_weight in config.json"
        )
    sizes = [
        getattr(lm, name, getattr(config, name, None))
        for name in ("num_experts", "num_experts_per_tok")
    ]
    if None in sizes:
        raise UserError(
            f"{type(lm).__name__}: its number of experts is unknown, so its router loss cannot be computed: expected "
            "attributes num_experts and num_experts_per_tok"
        )
    return RouterLoss(function, *sizes, float(coefficient))


def routers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules of `model` that transformers names as sources of router logits."""
    found = []
    for part in model.modules():
        recorded = (getattr(part, "_can_record_outputs", None) or {}).get("router_logits", ())
        for recorder in recorded if isinstance(recorded, list | tuple) else (recorded,):
            kind = getattr(recorder, "target_class", recorder)
            place = getattr(recorder, "layer_name", None) or ""
            found += [
                m for name, m in part.named_modules() if isinstance(m, kind) and place in name
            ]
    return list(dict.fromkeys(found))
