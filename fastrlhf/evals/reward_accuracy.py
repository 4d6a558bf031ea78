"""Pair accuracy of a reward model: how often it orders two completions as the ranking does."""

from collections.abc import Sequence

import numpy as np

from fastrlhf.evals.intervals import bootstrap, cluster_sums, ratio


def _pairs(scores: Sequence[float], ranks: Sequence[int]) -> tuple[float, int]:
    """(correct, pairs) over the pairs with different `ranks` (1 = best); equal scores count as half correct."""
    correct, pairs = 0.0, 0
    for i in range(len(ranks)):
        for j in range(i):
            if ranks[i] == ranks[j]:
                continue
            better = (ranks[i] < ranks[j]) * 2 - 1
            correct += 0.5 + 0.5 * better * np.sign(scores[i] - scores[j])
            pairs += 1
    return correct, pairs


def evaluate(rows: Sequence[dict], *, seed: int = 0) -> dict[str, dict]:
    """Share of strictly ranked pairs that the scores order in the same way, and that text length would.

    Args:
        rows: {"prompt": str, "completions": [str], "ranks": [int] (1 = best, ties allowed),
            "scores": [float] of the reward model, optional "criterion": str}.

    Returns:
        For "all" and for each criterion with a strict pair: {"accuracy": share that the scores order
        correctly, "longer": share that the rule "the longer completion wins" orders correctly, "margin":
        their difference, "pairs": number of strict pairs}. The first three are intervals over prompts.
        Tied pairs of the ranking are dropped.

    Raises:
        ValueError: there is no strict pair, or a row's lists differ in length.
    """
    counts: dict[str, list[tuple[str, float, float, int]]] = {"all": []}
    for number, row in enumerate(rows, 1):
        texts, ranks, scores = row["completions"], row["ranks"], row["scores"]
        if not len(texts) == len(ranks) == len(scores):
            raise ValueError(
                f"row {number}: expected as many completions as ranks and scores, got "
                f"{len(texts)}, {len(ranks)} and {len(scores)}"
            )
        right, pairs = _pairs(scores, ranks)
        longer, _ = _pairs([len(t) for t in texts], ranks)
        if pairs == 0:
            continue
        for group in {"all", row.get("criterion", "all")}:
            counts.setdefault(group, []).append((row["prompt"], right, longer, pairs))
    if not counts["all"]:
        raise ValueError("rows: no two completions of a prompt have different ranks")
    result = {}
    for group, entries in counts.items():
        prompts = [e[0] for e in entries]
        sums, _ = cluster_sums(np.array([e[1:] for e in entries], dtype=np.float64), prompts)
        right, longer, pairs = sums.T
        stats = {"accuracy": right, "longer": longer, "margin": right - longer}
        result[group] = {
            k: bootstrap(np.column_stack([v, pairs]), ratio, seed=seed) for k, v in stats.items()
        }
        result[group]["pairs"] = int(pairs.sum())
    return result
