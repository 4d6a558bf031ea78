"""Evaluations against values computed by hand, and intervals against simulations."""

from typing import NamedTuple

import numpy as np
import pytest

from fastrlhf.evals import bleu, intervals, kl, lm_loss, reward_accuracy, slots, winrate


class Judged(NamedTuple):
    covered: tuple
    missing: tuple
    invented: tuple
    value: float = 0.0


def test_bootstrap_interval_coverage():
    # 95 % intervals of a mean must contain the true mean about 95 % of the time.
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(200):
        sample = np.column_stack([rng.normal(1.0, 2.0, size=80), np.ones(80)])
        found = intervals.bootstrap(sample, intervals.ratio, seed=i, replicates=400)
        hits += found["low"] <= 1.0 <= found["high"]
    assert 180 <= hits <= 199


def test_clusters_are_resampled_together():
    # 50 identical samples of each of 10 prompts hold as much information as 10 samples.
    values = np.random.default_rng(1).normal(size=10)
    alone = intervals.mean_interval(values, seed=3)
    copies = intervals.mean_interval(np.repeat(values, 50), np.repeat(np.arange(10), 50), seed=3)
    wrong = intervals.mean_interval(np.repeat(values, 50), seed=3)
    assert copies["n"] == 10
    assert copies["high"] - copies["low"] == pytest.approx(alone["high"] - alone["low"])
    assert wrong["high"] - wrong["low"] < 0.3 * (alone["high"] - alone["low"])


def test_same_seed_same_interval():
    values = np.arange(30.0)
    assert intervals.mean_interval(values, seed=1) == intervals.mean_interval(values, seed=1)
    assert intervals.mean_interval(values, seed=1) != intervals.mean_interval(values, seed=2)


def test_winrate_counts_ties_half():
    found = winrate.evaluate([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 2.0, 1.0])
    assert found["mean"] == (2 + 0.5) / 4
    assert (found["wins"], found["ties"], found["losses"]) == (2, 1, 1)
    assert found["low"] < found["mean"] < found["high"]
    same = winrate.evaluate([1.0] * 5, [1.0] * 5)
    assert (same["mean"], same["low"], same["high"]) == (0.5, 0.5, 0.5)
    near = winrate.evaluate([0.1 + 0.2], [0.3])
    assert near["ties"] == 1
    swapped = winrate.evaluate([0.0, 2.0, 2.0, 1.0], [1.0, 2.0, 3.0, 0.0])
    assert swapped["mean"] == pytest.approx(1 - found["mean"])


def test_winrate_refuses_bad_input():
    with pytest.raises(ValueError, match="equally long"):
        winrate.evaluate([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="finite"):
        winrate.evaluate([float("nan")], [1.0])
    with pytest.raises(ValueError, match="clusters"):
        winrate.evaluate([1.0, 2.0], [1.0, 2.0], ["a"])


def test_slots():
    judged = [
        Judged(("a", "b", "c"), ("d",), (), 0.75),
        Judged(("a",), (), ("x", "y"), -1.0),
    ]
    found = slots.evaluate(judged)
    assert found["coverage"]["mean"] == 4 / 5
    assert found["missing"]["mean"] == 0.5
    assert found["invented"]["mean"] == 1.0
    assert found["errors"]["mean"] == 1.5
    assert found["error_rate"]["mean"] == 3 / 5
    assert found["perfect"]["mean"] == 0.0
    assert found["value"]["mean"] == -0.125


def test_error_change_is_paired():
    worse = [Judged((), ("a",) * n, ()) for n in (2, 4, 6, 8)]
    better = [Judged((), ("a",) * n, ()) for n in (1, 2, 3, 4)]
    found = slots.error_change(better, worse)
    # Every pair halves its errors, so the change is -50 % in every resample.
    assert (found["mean"], found["low"], found["high"]) == (-0.5, -0.5, -0.5)
    with pytest.raises(ValueError, match="baseline"):
        slots.error_change(better, worse[:2])


def test_lm_loss():
    parts = lm_loss.windows(list(range(11)), 4)
    assert parts == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert lm_loss.windows([1, 2, 3], 2) == [[1, 2]]

    def nll(windows):
        return [np.array(w[1:], dtype=float) for w in windows]

    found = lm_loss.evaluate(lm_loss.window_sums(parts, nll))
    assert found["loss"]["mean"] == pytest.approx((1 + 2 + 3 + 5 + 6 + 7 + 9 + 10) / 8)
    assert found["tokens"] == 8
    assert found["perplexity"] == pytest.approx(np.exp(found["loss"]["mean"]))
    ours = lm_loss.window_sums(parts, lambda w: [x + 0.25 for x in nll(w)])
    moved = lm_loss.difference(ours, lm_loss.window_sums(parts, nll))
    assert moved["mean"] == pytest.approx(0.25) and moved["high"] == pytest.approx(0.25)
    with pytest.raises(ValueError, match="token_nll"):
        lm_loss.window_sums(parts, lambda w: [np.zeros(len(x)) for x in w])
    with pytest.raises(ValueError, match="window"):
        lm_loss.window_sums([], nll)
    with pytest.raises(ValueError, match="same windows"):
        lm_loss.difference(ours, ours[:2])


def test_reward_accuracy():
    rows = [
        # pairs: (1,2) right, (1,3) right, (2,3) wrong; longer wins: only (1,3)... by length 2, 1, 3
        {"prompt": "p", "completions": ["aa", "a", "aaa"], "ranks": [1, 2, 3]},
        {"prompt": "q", "completions": ["a", "aa"], "ranks": [1, 1], "criterion": "quality"},
        {"prompt": "q", "completions": ["a", "aa"], "ranks": [2, 1], "criterion": "quality"},
    ]
    scores = ([3.0, 1.0, 2.0], [0.0, 1.0], [0.5, 0.5])
    found = reward_accuracy.evaluate([r | {"scores": s} for r, s in zip(rows, scores, strict=True)])
    assert found["all"]["pairs"] == 4
    assert found["all"]["accuracy"]["mean"] == (2 + 0.5) / 4
    assert found["all"]["longer"]["mean"] == (1 + 1) / 4
    assert found["quality"]["accuracy"]["mean"] == 0.5
    assert found["quality"]["longer"]["mean"] == 1.0
    assert found["quality"]["margin"]["mean"] == -0.5
    with pytest.raises(ValueError, match="different ranks"):
        reward_accuracy.evaluate([rows[1] | {"scores": [1.0, 2.0]}])
    with pytest.raises(ValueError, match="row 1"):
        reward_accuracy.evaluate([rows[0] | {"scores": [1.0]}])


def test_kl_intervals_contain_the_true_kl():
    # Two categorical distributions whose KL is known; sequences of 5 tokens.
    rng = np.random.default_rng(0)
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    truth = 5 * float(np.sum(p * np.log(p / q)))
    tokens = rng.choice(3, p=p, size=(1500, 5))
    found = kl.evaluate(list(np.log(p)[tokens]), list(np.log(q)[tokens]))
    assert found["sequence"]["low"] < truth < found["sequence"]["high"]
    assert found["k3"]["low"] < truth < found["k3"]["high"]
    assert found["token"]["mean"] == pytest.approx(found["sequence"]["mean"] / 5)
    same = kl.evaluate([np.zeros(3)], [np.zeros(3)])
    assert same["sequence"]["mean"] == same["k3"]["mean"] == 0.0
    with pytest.raises(ValueError, match="sample 0"):
        kl.evaluate([np.zeros(3)], [np.zeros(2)])


def test_bleu_by_hand():
    # Papineni et al.'s example 2: "the" is clipped at its count in one reference.
    stats = bleu._sentence("the the the the the the the", ["The cat is on the mat."])
    assert stats[0] == 2 and stats[4] == 7
    # Several references: the clip is the largest count in any one of them, not their sum.
    assert bleu._sentence("the the", ["the cat", "the dog"])[0] == 1
    assert bleu.evaluate(["a b c d e"], [["a b c d e", "x"]])["mean"] == pytest.approx(100.0)
    # 5 words against 6: precisions 5/5, 4/4, 3/3, 2/2 and brevity exp(1 - 6/5).
    short = bleu.evaluate(["a b c d e"], [["a b c d e f"]])["mean"]
    assert short == pytest.approx(100 * np.exp(1 - 6 / 5))
    # One word of six differs at the end: 5/6, 4/5, 3/4, 2/3.
    wrong = bleu.evaluate(["a b c d e x"], [["a b c d e f"]])["mean"]
    assert wrong == pytest.approx(100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)
    # Counts are summed over the corpus before the mean; several references add their n-grams.
    both = bleu.evaluate(["a b c d", "a b x y"], [["a b c d"], ["a b q", "q x y"]])["mean"]
    assert both == pytest.approx(100 * (8 / 8 * 5 / 6 * 2 / 4 * 1 / 2) ** 0.25)
    assert bleu.evaluate(["z"], [["a b c d"]])["mean"] == 0.0
    assert bleu.tokenize("Cheap, £20-25!") == ["cheap", ",", "£", "20", "-", "25", "!"]
    with pytest.raises(ValueError, match="references"):
        bleu.evaluate(["a"], [[]])
