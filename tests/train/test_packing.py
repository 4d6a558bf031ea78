"""The sequence packer (csrc/packer.cpp): its guarantees, and equality with the Python reference."""

import doctest
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrlhf.train import packing
from fastrlhf.train.packing import collate, pack, pack_reference

needs_extension = pytest.mark.skipif(
    packing._C is None, reason="the extension is not built, so pack() is the reference itself"
)


def loads(bins, lengths):
    return np.array([lengths[b].sum() for b in bins])


def check_guarantees(bins, lengths, max_tokens, multiple_of):
    """Check every guarantee of pack()."""
    held = np.concatenate(bins) if bins else np.array([], dtype=np.int64)
    assert sorted(held.tolist()) == list(range(len(lengths)))
    assert all((np.diff(b) > 0).all() for b in bins)
    assert all(b.dtype == np.int64 for b in bins)
    assert len(bins) % multiple_of == 0
    load = loads(bins, lengths)
    assert (load <= max_tokens).all()
    assert (np.diff(load) <= 0).all()
    # First-fit leaves at most one bin half empty, which bounds k before it is rounded up.
    needed = -(-len(bins) // multiple_of) * multiple_of - (multiple_of - 1)
    assert needed <= 2 * (lengths.sum() // max_tokens + 1) + 1


@st.composite
def problems(draw):
    max_tokens = draw(st.integers(1, 300))
    longest = draw(st.integers(1, max_tokens))
    lengths = draw(st.lists(st.integers(1, longest), max_size=120))
    return np.array(lengths, dtype=np.int64), max_tokens, draw(st.sampled_from([1, 2, 3, 8]))


@settings(max_examples=150, deadline=None)
@given(problems())
def test_guarantees_and_reference(problem):
    lengths, max_tokens, multiple_of = problem
    bins = pack(lengths, max_tokens, multiple_of=multiple_of)
    check_guarantees(bins, lengths, max_tokens, multiple_of)
    expected = pack_reference(lengths, max_tokens, multiple_of)
    assert [b.tolist() for b in bins] == [b.tolist() for b in expected]


@pytest.mark.parametrize(
    ("draw", "max_tokens", "multiple_of"),
    [
        pytest.param(lambda g: g.integers(20, 60, 3000), 512, 1, id="short"),
        pytest.param(lambda g: g.integers(1, 1000, 1500), 1024, 8, id="evened-out"),
        pytest.param(lambda g: g.integers(1, 10**9, 500), 10**10, 4, id="beyond-int32"),
        pytest.param(lambda g: np.full(700, 300), 8192, 1, id="equal"),
        pytest.param(lambda g: g.integers(600, 1000, 400), 1000, 1, id="one-in-each"),
    ],
)
def test_matches_reference_at_size(draw, max_tokens, multiple_of):
    lengths = draw(np.random.default_rng(0)).astype(np.int64)
    bins = pack(lengths, max_tokens, multiple_of=multiple_of)
    check_guarantees(bins, lengths, max_tokens, multiple_of)
    expected = pack_reference(lengths, max_tokens, multiple_of)
    assert [b.tolist() for b in bins] == [b.tolist() for b in expected]


def test_few_and_balanced_bins():
    lengths = np.random.default_rng(1).integers(20, 200, 2000)
    bins = pack(lengths, 4096)
    assert len(bins) <= -(-lengths.sum() // 4096) + 1
    load = loads(bins, lengths)
    assert load.min() > 0.95 * load.max()


def test_evened_out_when_greedy_overflows():
    """Lengths that leave almost no room: greedy balancing overflows, first-fit does not."""
    lengths = np.random.default_rng(2).integers(1, 1000, 20_000)
    bins = pack(lengths, 1024)
    assert len(bins) <= 1.005 * lengths.sum() / 1024
    assert loads(bins, lengths).min() > 0.85 * 1024


def test_minimum_number_of_bins_against_exhaustive_search():
    """On tiny inputs, compare with the optimum: at most 11/9 OPT + 6/9 bins."""
    generator = np.random.default_rng(3)

    def optimum(lengths, max_tokens):
        best = len(lengths)

        def place(i, room):
            nonlocal best
            if len(room) >= best:
                return
            if i == len(lengths):
                best = len(room)
                return
            for b in range(len(room)):
                if room[b] >= lengths[i]:
                    place(i + 1, [*room[:b], room[b] - lengths[i], *room[b + 1 :]])
            place(i + 1, [*room, max_tokens - lengths[i]])

        place(0, [])
        return best

    for _ in range(40):
        lengths = generator.integers(1, 11, 8)
        assert len(pack(lengths, 12)) <= 11 / 9 * optimum(lengths.tolist(), 12) + 6 / 9


def test_multiple_of_leaves_empty_bins_when_sequences_are_few():
    bins = pack([3, 2], 10, multiple_of=4)
    assert [b.tolist() for b in bins] == [[0], [1], [], []]


def test_no_sequences():
    assert pack([], 8) == []
    assert pack(np.array([], dtype=np.int64), 8, multiple_of=4) == []


def test_deterministic_and_does_not_modify_its_input():
    lengths = np.random.default_rng(4).integers(1, 100, 5000)
    before = lengths.copy()
    first, second = pack(lengths, 1000), pack(lengths, 1000)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert np.array_equal(lengths, before)


def test_accepts_strided_int32_lengths():
    lengths = np.arange(1, 41, dtype=np.int32)[::2]
    assert [b.tolist() for b in pack(lengths, 64)] == [b.tolist() for b in pack(list(lengths), 64)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([4, 9, 3], 8), ValueError, r"lengths\[1\]: expected 1 to max_tokens = 8, got 9"),
        (([4, 0], 8), ValueError, r"lengths\[1\]: expected 1 to max_tokens = 8, got 0"),
        (([[4]], 8), ValueError, r"lengths: expected one axis, got shape \(1, 1\)"),
        (([1.5], 8), TypeError, "lengths: expected integers, got float64"),
        (([1], 0), ValueError, "max_tokens: expected at least 1, got 0"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        pack(*arguments)


def test_error_names_multiple_of():
    with pytest.raises(ValueError, match="multiple_of: expected at least 1, got 0"):
        pack([1], 1, multiple_of=0)


@needs_extension
@pytest.mark.parametrize("lengths", [[4, 9], [-1], [0]])
def test_extension_checks_its_arguments(lengths):
    with pytest.raises(ValueError, match="expected 1 to 8, got"):
        packing._C.pack(np.array(lengths), 8, 1)


@needs_extension
def test_a_million_lengths():
    """Takes about 0.2 s of CPU time; the limit of 2 s catches a worse complexity."""
    lengths = np.random.default_rng(5).integers(1, 2049, 10**6)
    start = time.thread_time()
    order, offsets = packing._C.pack(lengths, 16384, 1)
    seconds = time.thread_time() - start
    load = np.add.reduceat(lengths[order], offsets[:-1])
    assert load.max() <= 16384
    assert len(load) <= 1.001 * lengths.sum() / 16384 + 1
    assert seconds < 2.0


def test_without_extension(monkeypatch):
    lengths = np.random.default_rng(6).integers(1, 100, 200)
    expected = pack(lengths, 300, multiple_of=2)
    monkeypatch.setattr(packing, "_C", None)
    bins = pack(lengths, 300, multiple_of=2)
    assert [b.tolist() for b in bins] == [b.tolist() for b in expected]


def test_collate():
    batch = collate([[5, 6, 7], np.array([8]), torch.tensor([9, 10], dtype=torch.int32)])
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9, 10]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert (batch.input_ids.dtype, batch.position_ids.dtype) == (torch.int64, torch.int64)
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.max_seqlen == 3


def test_batch_moves_to_a_device():
    moved = collate([[1, 2]]).to("meta")
    assert {t.device.type for t in (moved.input_ids, moved.position_ids, moved.cu_seqlens)} == {
        "meta"
    }
    assert moved.max_seqlen == 2


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([], "sequences: expected at least one, got none"),
        ([[1], []], r"sequences\[1\]: expected one axis with at least one token, got shape \(0,\)"),
        ([[[1]]], r"sequences\[0\]: expected one axis with at least one token, got shape \(1, 1\)"),
    ],
)
def test_collate_errors(sequences, message):
    with pytest.raises(ValueError, match=message):
        collate(sequences)


def test_docstring_examples():
    result = doctest.testmod(packing)
    assert result.attempted >= 2
    assert result.failed == 0
