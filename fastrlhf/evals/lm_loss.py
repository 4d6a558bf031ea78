"""Language-model loss on held-out text, in nats per token. Shapes: P windows."""

from collections.abc import Callable, Sequence

import numpy as np

from fastrlhf.evals.intervals import bootstrap, ratio

# Maps windows of L tokens to arrays [L - 1] of negative log-likelihoods, in nats.
TokenNLL = Callable[[list[list[int]]], Sequence[np.ndarray]]


def windows(tokens: Sequence[int], length: int) -> list[list[int]]:
    """Cut a token stream into windows of `length`; a last window of one token is dropped."""
    if length < 2:
        raise ValueError(f"length: expected at least 2, got {length}")
    cut = [list(tokens[i : i + length]) for i in range(0, len(tokens), length)]
    return [w for w in cut if len(w) >= 2]


def window_sums(parts: Sequence[list[int]], token_nll: TokenNLL) -> np.ndarray:
    """Run the model on each window: [P, 2] of summed loss (nats) and number of predicted tokens.

    Args:
        parts: P token windows, e.g. from :func:`windows`; the first token of each is not predicted.
        token_nll: the model.

    Raises:
        ValueError: there is no window, or `token_nll` returns arrays of the wrong shape.
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
    """Mean negative log-likelihood, in nats per token, with its interval over windows.

    Args:
        sums: [P, 2] from :func:`window_sums`.

    Returns:
        {"loss": {"mean", "low", "high", "n": windows}, "perplexity": exp(mean), "tokens": N}.
    """
    loss = bootstrap(sums, ratio, seed=seed)
    tokens = int(sums[:, 1].sum())
    return {"loss": loss, "perplexity": float(np.exp(loss["mean"])), "tokens": tokens}


def difference(ours: np.ndarray, theirs: np.ndarray, *, seed: int = 0) -> dict[str, float]:
    """Loss of one model minus that of another on the same windows, in nats per token.

    The comparison is paired, so its interval is narrower than those of the two losses.

    Args:
        ours, theirs: [P, 2] of the two models from :func:`window_sums`.

    Raises:
        ValueError: the windows differ.
    """
    if ours.shape != theirs.shape or not np.array_equal(ours[:, 1], theirs[:, 1]):
        raise ValueError("theirs: expected the sums of the same windows as ours")
    both = np.column_stack([ours[:, 0] - theirs[:, 0], ours[:, 1]])
    return bootstrap(both, ratio, seed=seed)
