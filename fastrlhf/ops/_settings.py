"""The settings of the policy losses beyond plain PPO, as keyword arguments of the ops.

An op takes them as **settings: a call pays 40 ns for each keyword parameter that it leaves out, and most calls leave
out all of these. `shown` puts them into the op's signature.
"""

import inspect
from collections.abc import Callable

from torch import Tensor
from typing_extensions import TypedDict

from fastrlhf.reference import POLICY_DEFAULTS


class Settings(TypedDict, total=False):
    """In the order of the signatures."""

    cu_seqlens: Tensor | None
    objective: str | None
    tau_pos: float
    tau_neg: float
    ref_logprob: Tensor | None
    kl_coef: float
    kl_estimator: str
    kl_clamp: bool
    kl_gradient: str
    rollout_weights: Tensor | None
    rollout_logprob: Tensor | None
    rollout_level: str
    rollout_mode: str
    rollout_bounds: tuple[float | None, float | None]
    aggregation: str | None
    value_aggregation: str | None
    length: float | None
    num_tokens: float | Tensor | None
    num_sequences: float | Tensor | None


# Of ppo_loss; None where POLICY_DEFAULTS has no default.
DEFAULTS = {name: POLICY_DEFAULTS.get(name) for name in Settings.__annotations__} | {
    "aggregation": "token-mean"
}


def shown(defaults: dict) -> Callable:
    """Decorator of an op with **settings: its signature shows these settings, before `scale`."""

    def decorate(op):
        signature = inspect.signature(op)
        given = list(signature.parameters.values())[:-1]
        place = [parameter.name for parameter in given].index("scale")
        settings = [
            inspect.Parameter(
                name, given[place].kind, default=default, annotation=Settings.__annotations__[name]
            )
            for name, default in defaults.items()
        ]
        given[place:place] = settings
        op.__signature__ = signature.replace(parameters=given)
        return op

    return decorate


def filled(op: str, settings: dict, defaults: dict) -> dict:
    """`defaults` with the given `settings`; TypeError for another name."""
    for name in settings:
        if name not in defaults:
            raise TypeError(f"{op}() got an unexpected keyword argument {name!r}")
    return defaults | settings
