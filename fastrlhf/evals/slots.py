"""Slot errors in data-to-text generation: slots of the record that a sentence omits, and slots that it invents.

A judge maps a sentence to a `Judgement`, or to a number if it does not compare slots.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Protocol

import numpy as np

from fastrlhf.evals.intervals import bootstrap, cluster_sums, ratio


class Judgement(Protocol):
    """What a judge says of one sentence."""

    covered: Sequence[str]  # slots of the record that the sentence expresses
    missing: Sequence[str]  # slots of the record that it omits
    invented: Sequence[str]  # slots that are not in the record
    value: float  # overall score; higher is better


@dataclass
class Value:
    """The judgement of a judge that returns a number."""

    value: float
    covered: Sequence[str] = ()
    missing: Sequence[str] = ()
    invented: Sequence[str] = ()


def judgement(found: object) -> Judgement:
    """Convert what a judge returned to a `Judgement`; ValueError if it is neither that nor a number."""
    if isinstance(found, Real) and not isinstance(found, bool):
        found = Value(float(found))
    lists = [getattr(found, name, None) for name in ("covered", "missing", "invented")]
    value = getattr(found, "value", None)
    if not all(isinstance(x, Sequence) for x in lists) or not isinstance(value, Real):
        raise ValueError(
            "expected a number, or an object with a number `value` and lists `covered`, `missing` and "
            f"`invented`; got {type(found).__name__}"
        )
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {value}")
    return found


def _counts(judgements: Sequence[Judgement]) -> np.ndarray:
    """[n, 6]: covered, missing, invented, slots of the record, value, 1 if there is no error."""
    rows = []
    for j in judgements:
        c, m, i = len(j.covered), len(j.missing), len(j.invented)
        rows.append((c, m, i, c + m, j.value, float(m + i == 0)))
    return np.array(rows, dtype=np.float64).reshape(-1, 6)


def evaluate(
    judgements: Sequence[Judgement],
    prompts: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Means over sentences with 95 % intervals (cluster bootstrap over prompts).

    Returns:
        "coverage": covered slots / slots of the records; "missing", "invented", "errors": number per
        sentence (errors = missing + invented); "error_rate": errors / slots of the records;
        "perfect": share of sentences without an error; "value": the judge's mean value. Each is
        an interval {"mean", "low", "high", "n"}. If no judgement has a slot, "value" only.
    """
    sums, sentences = cluster_sums(_counts(judgements), prompts)
    covered, missing, invented, slots, value, perfect = sums.T
    errors = missing + invented
    if not sums[:, :4].any():
        return {"value": bootstrap(np.column_stack((value, sentences)), ratio, seed=seed)}
    pairs = {
        "coverage": (covered, slots),
        "missing": (missing, sentences),
        "invented": (invented, sentences),
        "errors": (errors, sentences),
        "error_rate": (errors, slots),
        "perfect": (perfect, sentences),
        "value": (value, sentences),
    }
    return {k: bootstrap(np.column_stack(v), ratio, seed=seed) for k, v in pairs.items()}


def error_change(
    judgements: Sequence[Judgement],
    baseline: Sequence[Judgement],
    prompts: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
) -> dict[str, float]:
    """Relative change of slot errors against a baseline on the same prompts; -0.3 is 30 % fewer.

        change = errors / baseline errors - 1

    The comparison is paired: both sentences of a prompt are resampled together.

    Raises:
        ValueError: the numbers of judgements differ.
    """
    if len(judgements) != len(baseline):
        raise ValueError(f"baseline: expected {len(judgements)} judgements, got {len(baseline)}")
    errors = [_counts(side)[:, 1:3].sum(axis=1) for side in (judgements, baseline)]
    sums, _ = cluster_sums(np.column_stack(errors), prompts)
    return bootstrap(sums, lambda s: ratio(s) - 1.0, seed=seed)
