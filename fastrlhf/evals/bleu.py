"""Corpus BLEU against several human references.

Papineni et al., ACL 2002: geometric mean of the clipped n-gram precisions for n = 1 .. 4, times a brevity penalty
with the closest reference length (the shorter one on a tie). Text is lower-cased; words, numbers and punctuation
marks are tokens. Use it to compare systems in one report: published scores use sacrebleu's tokenization.
"""

import collections
import functools
import re
from collections.abc import Hashable, Sequence

import numpy as np

from fastrlhf.evals.intervals import bootstrap, cluster_sums

ORDER = 4
_TOKEN = re.compile(r"\w+|[^\w\s]")


def tokenize(text: str) -> list[str]:
    """Words, numbers and punctuation marks of `text`, lower-cased."""
    return _TOKEN.findall(text.lower())


def _ngrams(words: list[str], n: int) -> collections.Counter:
    return collections.Counter(zip(*(words[i:] for i in range(n)), strict=False))


@functools.lru_cache(maxsize=4096)  # several systems are compared with the same references
def _best(references: tuple[str, ...]) -> tuple[list[collections.Counter], list[int]]:
    """(largest count of each n-gram in any reference, for n = 1 .. 4; reference lengths)."""
    tokens = [tokenize(r) for r in references]
    best = [collections.Counter() for _ in range(ORDER)]
    for n in range(ORDER):
        for words in tokens:
            best[n] |= _ngrams(words, n + 1)
    return best, [len(words) for words in tokens]


def _sentence(hypothesis: str, references: Sequence[str]) -> list[float]:
    """[matches for n = 1 .. 4, n-grams for n = 1 .. 4, hypothesis length, closest reference length]."""
    words = tokenize(hypothesis)
    best, lengths = _best(tuple(references))
    matches, possible = [], []
    for n in range(1, ORDER + 1):
        ours = _ngrams(words, n)
        matches.append(sum(min(count, best[n - 1][gram]) for gram, count in ours.items()))
        possible.append(max(0, len(words) - n + 1))
    closest = min((abs(length - len(words)), length) for length in lengths)[1]
    return [*matches, *possible, len(words), closest]


def _bleu(sums: np.ndarray) -> np.ndarray:
    matches, possible = sums[..., :ORDER], sums[..., ORDER : 2 * ORDER]
    hypothesis, reference = sums[..., -2], sums[..., -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(matches > 0, np.log(matches / possible), -np.inf).mean(axis=-1)
        brevity = np.minimum(0.0, 1.0 - reference / hypothesis)
        return 100.0 * np.exp(precision + np.where(hypothesis > 0, brevity, 0.0))


def evaluate(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    prompts: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
) -> dict[str, float]:
    """Corpus BLEU, 0 to 100, with its 95 % interval over prompts; see `intervals.bootstrap`.

    Args:
        hypotheses: [n] generated texts.
        references: [n] lists of at least one human text each.
        prompts: [n] labels; texts of one prompt are resampled together.

    Raises:
        ValueError: `references` has another length, or no text for a hypothesis.
    """
    if len(hypotheses) != len(references):
        raise ValueError(f"references: expected {len(hypotheses)} lists, got {len(references)}")
    for i, found in enumerate(references):
        if isinstance(found, str) or len(found) == 0:
            raise ValueError(
                f"references[{i}]: expected a list of at least one text, got {found!r}"
            )
    rows = [_sentence(h, r) for h, r in zip(hypotheses, references, strict=True)]
    sums, _ = cluster_sums(np.array(rows, dtype=np.float64).reshape(-1, 2 * ORDER + 2), prompts)
    return bootstrap(sums, _bleu, seed=seed)
