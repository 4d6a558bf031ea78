"""Loss on held-out text, per token: how well a model still knows general language."""

from collections.abc import Callable, Sequence

import numpy as np

from fastrlhf.evals._intervals import bootstrap, ratio

# Token lists in, one array of negative log-likelihoods (nats, length - 1) a list out.
TokenNLL = Callable[[list[list[int]]], Sequence[np.ndarray]]


def windows(tokens: Sequence[int], length: int) -> list[list[int]]:
    """Cut a token stream into windows of `length`; a last piece under two tokens is dropped."""
    if length < 2:
        raise ValueError(f"length: expected at least 2, got {length}")
    cut = [list(tokens[i : i + length]) for i in range(0, len(tokens), length)]
    return [w for w in cut if len(w) >= 2]


def window_sums(parts: Sequence[list[int]], token_nll: TokenNLL) -> np.ndarray:
    """[P, 2]: summed loss (nats) and number of predicted tokens of each window; the model runs here, once.

    Args:
        parts: token windows, e.g. from :func:`windows`; each window's first token is given.
        token_nll: the model.
    """
    if len(parts) == 0:
        raise ValueError("windows: expected at least one window, got none")
    losses = token_nll(list(parts))
    rows = []
    for window, nll in zip(parts, losses, strict=True):
        nll = np.asarray(nll, dtype=np.float64)
        if nll.shape != (len(window) - 1,):
            raise ValueError(
                f"token_nll: expected {len(window) - 1} losses for {len(window)} tokens, "
                f"got {nll.shape}"
            )
        rows.append((nll.sum(), len(nll)))
    return np.array(rows)


def evaluate(sums: np.ndarray, *, seed: int = 0) -> dict[str, float | dict]:
    """Mean negative log-likelihood (nats) a token, the interval over windows.

    Args:
        sums: [P, 2] from :func:`window_sums`.

    Returns:
        {"loss": {"mean", "low", "high", "n": windows}, "perplexity": exp(mean), "tokens": N}.
    """
    loss = bootstrap(sums, ratio, seed=seed)
    tokens = int(sums[:, 1].sum())
    return {"loss": loss, "perplexity": float(np.exp(loss["mean"])), "tokens": tokens}


def difference(ours: np.ndarray, theirs: np.ndarray, *, seed: int = 0) -> dict[str, float]:
    """Loss minus the baseline's loss on the same windows (paired, so far tighter than either).

    Args:
        ours, theirs: [P, 2] of both models from :func:`window_sums`.
    """
    if ours.shape != theirs.shape or not np.array_equal(ours[:, 1], theirs[:, 1]):
        raise ValueError("theirs: expected the sums of the same windows as ours")
    both = np.column_stack([ours[:, 0] - theirs[:, 0], ours[:, 1]])
    return bootstrap(both, ratio, seed=seed)
