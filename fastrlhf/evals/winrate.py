"""Win rate: how often a system's completion is preferred to a baseline's for the same prompt."""

from collections.abc import Hashable, Sequence

import numpy as np

from fastrlhf.evals.intervals import mean_interval


def evaluate(
    scores: Sequence[float],
    baseline_scores: Sequence[float],
    prompts: Sequence[Hashable] | None = None,
    *,
    tolerance: float = 1e-9,
    seed: int = 0,
) -> dict[str, float]:
    """Compare two systems pair by pair; a tie counts as half a win.

        win rate = (wins + ties / 2) / n

    Args:
        scores, baseline_scores: [n] the judge's scores; entry i of both belongs to the same prompt.
        prompts: [n] labels; pairs of one prompt are resampled together. None: each pair by itself.
        tolerance: scores that differ by at most this tie.

    Returns:
        {"mean", "low", "high": win rate and its 95 % interval (cluster bootstrap over prompts),
        "n": number of prompts, "pairs", "wins", "ties", "losses": counts}.

    Raises:
        ValueError: the scores differ in length, are empty, or are not finite.
    """
    a, b = np.asarray(scores, dtype=np.float64), np.asarray(baseline_scores, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0:
        raise ValueError(
            f"scores: expected two equally long non-empty lists, got {a.shape} and {b.shape}"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("scores: expected finite numbers")
    wins, losses = a > b + tolerance, b > a + tolerance
    outcome = 0.5 + 0.5 * wins - 0.5 * losses
    result = mean_interval(outcome, prompts, seed=seed)
    counts = {"wins": int(wins.sum()), "losses": int(losses.sum())}
    ties = len(a) - counts["wins"] - counts["losses"]
    return result | {"pairs": len(a), "ties": ties} | counts
