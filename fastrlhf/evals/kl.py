"""KL divergence of a policy from a reference, estimated on the policy's own samples."""

from collections.abc import Hashable, Sequence

import numpy as np

from fastrlhf.evals.intervals import bootstrap, cluster_sums, ratio


def evaluate(
    logprobs: Sequence[np.ndarray],
    ref_logprobs: Sequence[np.ndarray],
    prompts: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Estimates of KL(policy || reference) with 95 % intervals.

    With d_t = log p(y_t) - log p_ref(y_t) for tokens y sampled from p at temperature 1:

        sequence = mean over samples of sum_t d_t                     (k1; unbiased)
        token    = sum of all d_t / number of tokens
        k3       = mean over samples of sum_t (exp(-d_t) - 1 + d_t)   (>= 0, lower variance)

    All in nats.

    Args:
        logprobs, ref_logprobs: one array [T] of token log-probs for each sample.
        prompts: labels of the samples; samples of one prompt are resampled together.

    Returns:
        {"sequence", "token", "k3"}, each an interval of `intervals.bootstrap`.

    Raises:
        ValueError: the two arrays of a sample differ in shape.
    """
    rows = []
    for i, (p, q) in enumerate(zip(logprobs, ref_logprobs, strict=True)):
        p, q = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
        if p.shape != q.shape or p.ndim != 1:
            raise ValueError(f"sample {i}: expected equal [T] arrays, got {p.shape} and {q.shape}")
        d = p - q
        rows.append((d.sum(), np.sum(np.expm1(-d) + d), len(d)))
    sums, samples = cluster_sums(np.array(rows, dtype=np.float64).reshape(-1, 3), prompts)
    k1, k3, tokens = sums.T
    pairs = {"sequence": (k1, samples), "token": (k1, tokens), "k3": (k3, samples)}
    return {k: bootstrap(np.column_stack(v), ratio, seed=seed) for k, v in pairs.items()}
