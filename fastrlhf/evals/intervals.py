"""95 % confidence intervals by the cluster bootstrap: samples of one prompt are resampled together.

Shapes: n samples, P clusters (prompts, or windows of text), S statistics of a sample.
"""

import functools
from collections.abc import Callable, Hashable, Sequence

import numpy as np

REPLICATES = 2000
LEVEL = 0.95


def cluster_sums(
    values: np.ndarray, clusters: Sequence[Hashable] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Sum the rows of `values` [n, S] by cluster.

    Args:
        values: [n, S].
        clusters: [n] labels; None: every row is its own cluster.

    Returns:
        (sums [P, S], counts [P]).
    """
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
    # [R, P] counts of each cluster in R resamples with replacement. Cached: one evaluation computes many figures
    # from the same resamples.
    rng = np.random.default_rng(seed)
    return rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=replicates) * 1.0


def bootstrap(
    sums: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    seed: int = 0,
    replicates: int = REPLICATES,
) -> dict[str, float]:
    """Percentile bootstrap interval of a statistic of sums over clusters.

    Args:
        sums: [P, S], one row per cluster.
        statistic: maps sums [..., S] to values [...].
        seed: of the resampling; the interval is deterministic.
        replicates: number of resamples.

    Returns:
        {"mean": the statistic of all clusters, "low", "high": the 95 % interval, "n": P}.
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
    """sums[..., 0] / sums[..., 1]; NaN where the divisor is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def mean_interval(
    values: Sequence[float], clusters: Sequence[Hashable] | None = None, *, seed: int = 0
) -> dict[str, float]:
    """Mean of `values` [n] with its interval over `clusters` [n]; see `bootstrap`."""
    sums, counts = cluster_sums(np.asarray(values, dtype=np.float64)[:, None], clusters)
    return bootstrap(np.column_stack([sums, counts]), ratio, seed=seed)
