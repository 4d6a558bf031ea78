"""The shipped data (splits, sizes, licences) and delexicalization."""

import gzip
import hashlib
import json
import re

import pytest

from fastrlhf.demo import build_data, restaurants
from fastrlhf.demo.restaurants import NAME, NEAR

DATA = build_data.Path(build_data.__file__).parent / "data"
SPLITS = ("train", "dev", "test")


def rows(name: str) -> list[dict]:
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def text(split: str) -> str:
    with gzip.open(DATA / f"text_{split}.txt.gz", "rt", encoding="utf-8") as f:
        return f.read()


@pytest.fixture(scope="module")
def demonstrations():
    return {split: rows(f"demonstrations_{split}") for split in SPLITS}


@pytest.fixture(scope="module")
def rankings():
    return rows("rankings_human")


def test_no_delexicalized_record_is_in_two_splits(demonstrations, rankings):
    sides = {split: {r["prompt"] for r in found} for split, found in demonstrations.items()}
    sides["rankings"] = {r["prompt"] for r in rankings}
    names = sorted(sides)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert not sides[a] & sides[b], f"{a} and {b} share records"
    assert {s: len(p) for s, p in sides.items()} == {
        "train": 4535,
        "dev": 874,
        "test": 365,
        "rankings": 53,
    }


def test_rows_are_delexicalized_and_consistent(demonstrations):
    known = set(restaurants.special_tokens())
    for split, found in demonstrations.items():
        for row in found:
            record = row["record"]
            assert restaurants.render_prompt(record) == row["prompt"]
            assert restaurants.parse_prompt(row["prompt"]) == record
            assert set(re.findall(r"<[^<>]+>", row["prompt"])) <= known
            assert NAME in row["completion"], (split, row)
            assert not re.search(rf"\b{row['name']}\b", row["completion"])
            assert (row["near"] is None) == ("near" not in record)
            assert row["completion"] == row["completion"].strip() != ""
    # The first prompts of dev and test are a random sample: rows are not sorted by name.
    for split in ("dev", "test"):
        assert len({r["name"] for r in demonstrations[split][:200]}) > 5


def test_rankings_rows(rankings):
    assert len(rankings) == 1224
    assert {r["criterion"] for r in rankings} == {"informativeness", "naturalness", "quality"}
    for row in rankings:
        assert len(row["completions"]) == len(row["ranks"]) == len(row["systems"]) == 3
        assert min(row["ranks"]) == 1
        for i in range(3):
            for j in range(3):
                better = row["scores"][i] > row["scores"][j]
                assert better == (row["ranks"][i] < row["ranks"][j])
        assert all(NAME in c for c in row["completions"])


def test_sizes_and_source():
    files = {p.name: p.stat().st_size for p in DATA.iterdir()}
    assert sum(files.values()) <= 5_000_000
    assert max(files.values()) <= 2_900_000
    source = (DATA / "SOURCE.md").read_text(encoding="utf-8")
    for needed in (
        "CC BY-SA 4.0",
        "public domain",
        "Novikova",
        "tuetschek/e2e-dataset",
        "jeknov/RankME",
        "computationalstylistics/100_english_novels",
        "nltk/nltk_data",
    ):
        assert needed in source, needed
    for name in files:
        if name.endswith(".gz"):
            digest = hashlib.sha256((DATA / name).read_bytes()).hexdigest()
            assert f"| {name} | {files[name]:,} | {digest} |" in source, name
    for book in build_data.TRAIN_BOOKS:
        assert book in source, book


def test_text_splits():
    train, dev, test = (text(s) for s in SPLITS)
    assert len(train) > 7_000_000
    assert 50_000 < len(dev) < 80_000
    assert 120_000 < len(test) < 200_000
    seen = set(train.split("\n"))
    for held in (dev, test):
        long = [p for p in held.split("\n") if len(p) > 60]
        assert len(long) > 100
        assert not [p for p in long if p in seen]
    authors = [
        {(b if isinstance(b, str) else b[0]).split("_")[0] for b in books}
        for books in (build_data.TRAIN_BOOKS, build_data.DEV_BOOKS, build_data.TEST_BOOKS)
    ]
    assert not (authors[0] & authors[1] or authors[0] & authors[2] or authors[1] & authors[2])
    assert "\ufffd" not in train + dev + test
    assert not build_data._SLURS.search(train)


@pytest.mark.parametrize(
    ("sentence", "name", "near", "expected"),
    [
        ("The Eagle is near Burger King.", "The Eagle", "Burger King", "NAMEX is near NEARX."),
        ("the eagle's menu", "The Eagle", None, "NAMEX's menu"),
        ("By Cafe Rouge is Zizzi.", "Zizzi", "Café Rouge", "By NEARX is NAMEX."),
        ("By CAFÉ ROUGE is ZIZZI.", "Zizzi", "Café Rouge", "By NEARX is NAMEX."),
        ("Brown's Cambridge is cheap.", "Browns Cambridge", None, "NAMEX is cheap."),
        ("Try Brown’s Cambridge.", "Browns Cambridge", None, "Try NAMEX."),
        ("The Mills is a pub.", "The Mill", None, "NAMEX is a pub."),
        ("Green Man near All-Bar One", "Green Man", "All Bar One", "NAMEX near NEARX"),
        ("Crown Plaza Hotel, Cotto", "Cotto", "Crowne Plaza Hotel", "NEARX, NAMEX"),
        ("The Blue Spice is a pub.", "Blue Spice", None, "NAMEX is a pub."),
        ("A miller lives here.", "The Mill", None, None),
        ("Nothing here.", "The Eagle", None, None),
        ("Strada is a pub.", "Strada", "Ranch", "NAMEX is a pub."),
    ],
)
def test_delexicalize(sentence, name, near, expected):
    assert restaurants.delexicalize(sentence, name, near) == expected


def test_round_trip():
    sentence = "The Eagle, a pub near Café Rouge, is cheap; The Eagle is small."
    delexicalized = restaurants.delexicalize(sentence, "The Eagle", "Café Rouge")
    assert delexicalized == "NAMEX, a pub near NEARX, is cheap; NAMEX is small."
    assert restaurants.relexicalize(delexicalized, "The Eagle", "Café Rouge") == sentence
    assert NEAR not in restaurants.relexicalize("by NEARX", "x", None)


def test_parse_record():
    record = restaurants.parse_record(
        "near[Ranch], name[Zizzi], customer rating[5 Stars], priceRange[£20-£25], eatType[Pub]"
    )
    assert list(record.items()) == [
        ("name", "Zizzi"),
        ("eatType", "pub"),
        ("priceRange", "£20-25"),
        ("rating", "5 out of 5"),
        ("near", "Ranch"),
    ]
    for bad, word in (
        ("name[X], colour[red]", "colour"),
        ("name[X], food[Martian]", "Martian"),
        ("name[X], name[Y]", "twice"),
        ("food[Italian]", "name"),
        ("name[X], and some words", "slot"),
    ):
        with pytest.raises(ValueError, match=word):
            restaurants.parse_record(bad)


def test_prompt():
    record = {"near": NEAR, "name": NAME, "food": "Fast food"}
    assert restaurants.render_prompt(record) == "<name=NAMEX><food=Fast food><near=NEARX><say>"
    with pytest.raises(ValueError, match="The Eagle"):
        restaurants.render_prompt({"name": "The Eagle"})
    for bad in ("<name=NAMEX>", "<food=Italian><name=NAMEX><say>", "hello<say>"):
        with pytest.raises(ValueError, match="prompt|delexicalized"):
            restaurants.parse_prompt(bad)
    tokens = restaurants.special_tokens()
    assert len(tokens) == len(set(tokens)) == 29


def test_build_on_a_small_source(tmp_path):
    """Build from a made-up source: held-out records are removed from the training split."""

    def write(path, found):
        with gzip.open(path, "wt", encoding="utf-8") as f:
            f.writelines(json.dumps(r) + "\n" for r in found)

    def mr(name, food, near="Ranch"):
        return f"name[{name}], food[{food}], near[{near}]"

    source = tmp_path / "source"
    source.mkdir()
    refs = [{"mr": mr("Zizzi", f), "ref": f"Zizzi has {f} food."} for f in ("Italian", "Indian")]
    refs += [{"mr": "name[Zizzi], eatType[pub]", "ref": "A pub without a name."}]
    refs += [{"mr": f"name[Zizzi], area[{a}]", "ref": "Zizzi."} for a in ("riverside", "center")]
    refs[-1]["mr"] = "name[Zizzi], area[city center]"
    write(source / "sft_train.jsonl.gz", refs)
    write(source / "sft_valid.jsonl.gz", [{"mr": mr("Cotto", "Indian"), "ref": "Cotto serves."}])
    write(
        source / "test.jsonl.gz",
        [
            {"mr": mr("Aromi", "French"), "ref": "Aromi, near Ranch."},
            {"mr": mr("Aromi", "English"), "ref": "Aromi is English."},
        ],
    )
    items = [{"system": s, "text": "Aromi.", "score": v} for s, v in (("b", 3), ("a", 9), ("c", 9))]
    ranking = {"mr": mr("Aromi", "English"), "criterion": "quality", "setup": 1, "rater": 2}
    write(source / "rankings_k3.jsonl.gz", [ranking | {"items": items}])
    counts: dict = build_data.collections.Counter()
    ranked = build_data.build_rankings(source, counts)
    assert [(r["systems"], r["ranks"]) for r in ranked] == [(["a", "b", "c"], [1, 3, 1])]
    out = build_data.build_demonstrations(source, {ranked[0]["prompt"]}, counts)
    foods = {s: {r["record"].get("food") for r in found} for s, found in out.items()}
    assert foods["test"] == {"French"}
    assert "Indian" in foods["dev"] and "Indian" not in foods["train"]
    assert counts["test: rows left out, record is RankME's"] == 1
    assert counts["train: dropped, name not found"] == 1
    assert counts["train: rows left out, record held out"] == 1


def test_clean_text():
    wrapped = "CHAPTER I\n\n" + "This  line is wrapped in the book and it\ngoes on “here”.\n\nEnd."
    assert build_data.clean_text(wrapped) == [
        'This line is wrapped in the book and it goes on "here".',
        "End.",
    ]
