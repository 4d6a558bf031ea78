"""The labeler against hand-written cases, human references and human rankings."""

import gzip
import json
import time
from pathlib import Path

import pytest

from fastrlhf.demo import labeler

DATA = Path(labeler.__file__).parent / "data"


def rows(name: str) -> list[dict]:
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


FULL = {
    "name": "NAMEX",
    "eatType": "pub",
    "food": "Italian",
    "priceRange": "less than £20",
    "rating": "high",
    "area": "riverside",
    "familyFriendly": "yes",
    "near": "NEARX",
}
PERFECT = (
    "NAMEX is a cheap, family friendly pub by the river near NEARX. It serves Italian food and has "
    "a customer rating of 5 out of 5."
)


def test_perfect_sentence_has_value_one():
    score = labeler.score(FULL, PERFECT)
    assert score == labeler.Score(tuple(FULL), (), (), (), 1.0, 1.0)


def test_missing_and_invented_are_named_and_cost_one_slot_each():
    text = "NAMEX is a cheap French pub in the city centre near NEARX."
    score = labeler.score(FULL, text)
    assert score.covered == ("name", "eatType", "priceRange", "near")
    assert score.missing == ("food", "rating", "area", "familyFriendly")
    assert score.invented == ("food=French", "area=city centre")
    assert score.errors == 6
    assert score.coverage == 4 / 8
    assert score.value == (4 - 2) / 8


def test_slot_outside_the_record_is_invented():
    record = {"name": "NAMEX", "eatType": "pub"}
    assert labeler.score(record, "NAMEX is a cheap pub.").invented == ("priceRange=low",)
    assert labeler.score(record, "NAMEX is a pub near NEARX.").invented == ("near=NEARX",)


def test_contradiction_scores_below_truth_and_at_most_as_silence():
    yes = "NAMEX is family friendly and is near NEARX."
    both = "NAMEX is family friendly and is not family friendly and is near NEARX."
    silent = "NAMEX is near NEARX."
    record = {"name": "NAMEX", "familyFriendly": "yes", "near": "NEARX"}
    scores = [labeler.score(record, t) for t in (yes, both, silent)]
    assert scores[1].invented == ("familyFriendly=no",)
    assert scores[0].value > scores[1].value
    assert scores[1].value <= scores[2].value


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("a family friendly pub", {"yes"}),
        ("not family-friendly", {"no"}),
        ("isn't kid-friendly", {"no"}),
        ("no kids or families allowed", {"no"}),
        ("children are not welcome", {"no"}),
        ("kids are welcome", {"yes"}),
        ("for adults only", {"no"}),
        ("not suitable for families with children", {"no"}),
        ("not located near NEARX, and is family friendly", {"yes"}),
        ("is kid friendly but not cheap", {"yes"}),
        ("family-friendly and not expensive", {"yes"}),
        ("a non-family-friendly pub", {"no"}),
        ("does not cater to families", {"no"}),
        ("a child free venue", {"no"}),
        ("near NEARX", set()),
    ],
)
def test_family_friendly(text, stated):
    assert labeler.stated(text)["familyFriendly"] == stated


@pytest.mark.parametrize(
    ("text", "price", "rating"),
    [
        ("high customer rating and moderate price range", {"middle"}, {"high"}),
        ("a low customer rating with a high price range", {"high"}, {"low"}),
        ("the price range is high and the customer rating is low", {"high"}, {"low"}),
        ("price range moderate and customer rating low", {"middle"}, {"low"}),
        ("highly rated and cheap", {"low"}, {"high"}),
        ("rated 1 out of 5 stars", set(), {"low"}),
        ("one out of five stars", set(), {"low"}),
        ("a three star coffee shop", set(), {"middle"}),
        ("customers rate it 5 out of 5, prices over £30", {"high"}, {"high"}),
        ("an average price of more than £30", {"high"}, set()),
        ("an average customer rating of 5 out of 5", set(), {"high"}),
        ("above average prices", {"high"}, set()),
        ("£20-25", {"middle"}, set()),
        ("between £20 and £25", {"middle"}, set()),
        ("less than £20", {"low"}, set()),
        ("1 out of 5 customer rating", set(), {"low"}),
        ("average rating, low prices", {"low"}, {"middle"}),
        ("NAMEX is near NEARX", set(), set()),
    ],
)
def test_price_and_rating_are_distinguished(text, price, rating):
    says = labeler.stated(text)
    assert (says["priceRange"], says["rating"]) == (price, rating)


def test_defects_only_break_ties():
    bare = PERFECT.rstrip(".")
    repeated = PERFECT[:-1] + " and has a customer rating of 5 out of 5."
    markup = PERFECT + " <say>."
    for text, defect in ((bare, "no final punctuation"), (repeated, "repetition")):
        assert labeler.score(FULL, text).defects == (defect,)
    assert labeler.score(FULL, markup).defects == ("garbage",)
    assert labeler.score(FULL, "NAMEX NEAR.").defects == ("garbage",)
    one_slot_less = PERFECT.replace("cheap, ", "")
    ranks = labeler.rank(FULL, [one_slot_less, bare, PERFECT, repeated])
    assert ranks == [4, 2, 1, 2]


def test_empty_text():
    score = labeler.score(FULL, "")
    assert score.covered == () and score.value < 0


def test_score_prompt_reads_the_record_from_the_prompt():
    prompt = "<name=NAMEX><eatType=pub><area=riverside><say>"
    assert labeler.score_prompt(prompt, "NAMEX is a riverside pub.").value == 1.0
    with pytest.raises(ValueError, match="eatType"):
        labeler.score_prompt("<eatType=castle><say>", "NAMEX is a castle.")


def test_agrees_with_people():
    figures = labeler.validate(rows("demonstrations_train")[::5], rows("rankings_human"))
    assert figures["references/coverage"] > 0.90
    assert figures["references/invented"] < 0.12
    assert figures["agreement/informativeness"] >= 0.95
    assert figures["agreement/quality"] >= 0.75
    assert figures["decided/informativeness"] > 0.8


def test_shuffled_records_score_far_worse():
    # A labeler that accepts every sentence would pass test_agrees_with_people, but not this.
    train = rows("demonstrations_train")[::11]
    shifted = [
        {"record": a["record"], "completion": b["completion"]}
        for a, b in zip(train, train[7:] + train[:7], strict=True)
    ]
    figures = labeler.validate(shifted, [])
    assert figures["references/invented"] > 1.5
    assert figures["references/coverage"] < 0.65


def test_validate_drops_human_ties_and_counts_ours():
    record = {"name": "NAMEX", "eatType": "pub", "area": "riverside"}
    texts = ["NAMEX is a riverside pub.", "NAMEX is a pub.", "NAMEX is a pub!"]
    row = {"record": record, "completions": texts, "criterion": "c", "ranks": [1, 2, 3]}
    figures = labeler.validate([], [row, row | {"ranks": [1, 1, 1]}])
    assert figures == {"agreement/c": 1.0, "decided/c": pytest.approx(2 / 3)}
    figures = labeler.validate([], [row | {"ranks": [3, 1, 1]}])
    assert figures["agreement/c"] == 0.0


def test_speed():
    data = rows("demonstrations_train")[:4000]
    labeler.stated.cache_clear()
    start = time.process_time()
    for row in data:
        labeler.score(row["record"], row["completion"])
    # About 0.3 s of CPU time; the limit leaves room for slower machines.
    assert time.process_time() - start < 1.5
