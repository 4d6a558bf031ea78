"""Pair accuracy of a reward model: does it order two completions as the ranking does?"""

from collections.abc import Sequence

import numpy as np

from fastrlhf.evals._intervals import bootstrap, cluster_sums, ratio


def _pairs(scores: Sequence[float], ranks: Sequence[int]) -> tuple[float, int]:
    # -> (correct, pairs) over pairs that `ranks` (1 = best) tells apart; equal scores count half.
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
    """Share of strictly ranked pairs that the scores order the same way, beside "longer wins".

    Args:
        rows: {"prompt": str, "completions": [str], "ranks": [int] (1 = best, ties allowed),
            "scores": [float] of the reward model, optional "criterion": str}.

    Returns:
        For "all" and for each criterion: {"accuracy": interval, "longer": interval of the rule
        that the longer completion wins, "margin": interval of their difference, "pairs": number}.
        Tied pairs of the ranking are dropped; intervals are over prompts. A criterion without a
        strict pair is left out; ValueError if there is no strict pair at all.
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
