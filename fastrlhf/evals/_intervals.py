"""95 % intervals by the cluster bootstrap: what belongs to one prompt is drawn together.

P clusters (prompts, windows), R bootstrap replicates, S statistics.
"""

import functools
from collections.abc import Callable, Hashable, Sequence

import numpy as np

REPLICATES = 2000
LEVEL = 0.95


def cluster_sums(
    values: np.ndarray, clusters: Sequence[Hashable] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `values` [n, S] summed by cluster (None: each alone) -> (sums [P, S], counts [P])."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or len(values) == 0:
        raise ValueError(f"values: expected [n, S] with n > 0, got shape {values.shape}")
    if clusters is None:
        return values, np.ones(len(values))
    if len(clusters) != len(values):
        raise ValueError(f"clusters: expected {len(values)} labels, got {len(clusters)}")
    index = {c: i for i, c in enumerate(dict.fromkeys(clusters))}
    ids = np.array([index[c] for c in clusters])
    sums = np.zeros((len(index), values.shape[1]))
    np.add.at(sums, ids, values)
    return sums, np.bincount(ids).astype(np.float64)


@functools.lru_cache(maxsize=4)
def _weights(clusters: int, seed: int, replicates: int) -> np.ndarray:
    # Multinomial weights are the bootstrap's resampling with replacement, without the copies. The
    # many figures of one evaluation share a draw, so it is kept.
    rng = np.random.default_rng(seed)
    return rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=replicates) * 1.0


def bootstrap(
    sums: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    seed: int = 0,
    replicates: int = REPLICATES,
) -> dict[str, float]:
    """Percentile interval of a statistic of summed counts.

    Args:
        sums: [P, S], one row a cluster.
        statistic: maps summed counts [..., S] to values [...].
        seed: the draw; the same seed gives the same interval.

    Returns:
        {"mean": statistic of all, "low", "high": the 95 % interval, "n": P}.
    """
    sums = np.asarray(sums, dtype=np.float64)
    clusters = len(sums)
    drawn = statistic(_weights(clusters, seed, replicates) @ sums)
    with np.errstate(invalid="ignore"):
        tails = (100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2)
        low, high = np.nanpercentile(drawn, tails)
    mean = float(statistic(sums.sum(axis=0)[None])[0])
    return {"mean": mean, "low": float(low), "high": float(high), "n": clusters}


def ratio(sums: np.ndarray) -> np.ndarray:
    """First statistic over the second; NaN where the second is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def mean_interval(
    values: Sequence[float], clusters: Sequence[Hashable] | None = None, *, seed: int = 0
) -> dict[str, float]:
    """Mean of `values` with its interval over clusters."""
    sums, counts = cluster_sums(np.asarray(values, dtype=np.float64)[:, None], clusters)
    return bootstrap(np.column_stack([sums, counts]), ratio, seed=seed)
