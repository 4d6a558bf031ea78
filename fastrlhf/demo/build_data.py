"""Rebuild fastrlhf/demo/data from its public sources; the result is byte-identical.

    python -m fastrlhf.demo.build_data --e2e DIR --rankme DIR --novels DIR --speeches DIR --out DIR

Each input DIR holds files that were made from a public repository. SOURCE.md, which is written beside the
data, names the repository, commit and licence of each.

* ``--e2e``: ``sft_train.jsonl.gz``, ``sft_valid.jsonl.gz``, ``test.jsonl.gz`` with rows
  ``{"mr": "name[..], eatType[..]", "ref": "human sentence"}``;
* ``--rankme``: ``rankings_k3.jsonl.gz`` with rows ``{"mr", "criterion", "setup", "rater",
  "items": [{"system", "text", "score"}, ...]}``;
* ``--novels``: one file ``<Author>_<Title>_<year>.txt.gz`` for each book;
* ``--speeches`` (optional): ``inaugural.jsonl.gz`` with rows ``{"id", "text"}``. Without it the
  pretraining text holds only novels and differs from the shipped one.

SOURCE.md also counts the rows that are dropped or changed. Splits are by *delexicalized* record.
"""

import argparse
import collections
import gzip
import hashlib
import io
import json
import re
import unicodedata
from pathlib import Path

from fastrlhf.demo import restaurants

MAX_REFERENCES = 8  # references kept for a training record; dev and test keep all
DEV_FROM_TRAIN = (
    0.06  # share of E2E training records moved to dev; E2E's dev records have only two foods
)

TRAIN_BOOKS = (
    "Barclay_Postern_1911",
    "Barclay_Rosary_1909",
    "Bennet_Helen_1910",
    "Burnett_Princess_1905",
    "Ford_Girl_1907",
    "Galsworthy_Saints_1919",
    "Gissing_Warburton_1903",
    "Lee_Penelope_1903",
    "Trollope_Angel_1881",
    "Ward_Harvest_1920",
    "Ward_Milly_1881",
    "Wcollins_Legacy_1889",
    "Wcollins_Woman_1860",
    "Woolf_Night_1919",
)
# (book, first character after cleaning, number of characters). No author wrote a training book.
DEV_BOOKS = (("Corelli_Innocent_1914", 100_000, 25_000), ("Kipling_Light_1891", 100_000, 25_000))
TEST_BOOKS = (
    ("Braddon_Audley_1862", 100_000, 46_000),
    ("Chesterton_Innocence_1911", 100_000, 46_000),
    ("Gaskell_Wives_1865", 100_000, 46_000),
)
SPEECH_YEARS = range(1933, 2010)  # modern English
DEV_SPEECHES = ("1961-Kennedy",)
TEST_SPEECHES = ("1981-Reagan",)

# Paragraphs with these words are left out of the pretraining text.
_SLURS = re.compile(
    r"\b(?:nigg\w+|kaff?irs?|dark(?:ey|ie|y)s?|coons?|hottentots?|chinam[ae]n|japs?|negress\w*"
    r"|jewess\w*|half-?breeds?|savages|blackamoors?|gyps(?:y|ies))\b",
    re.IGNORECASE,
)


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _open_lines(path: Path):
    with gzip.open(path, "rt", encoding="utf-8") as f:
        yield from f


def _write_gz(path: Path, data: bytes) -> None:
    buffer = io.BytesIO()
    # No time stamp and no file name in the header, so that the bytes depend on `data` alone.
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, compresslevel=9, mtime=0) as f:
        f.write(data)
    path.write_bytes(buffer.getvalue())


def _jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()


def _tidy(text: str) -> str:
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r" +([,.!?;:])(?!\d)", r"\1", text)


class Demonstrations:
    """Delexicalizes E2E rows and counts those it drops, by reason."""

    def __init__(self, names: set[str]):
        self.counts: collections.Counter = collections.Counter()
        self._leaks = [restaurants.mention_pattern(n) for n in sorted(names)]

    def row(self, record: dict[str, str], text: str, split: str) -> dict | None:
        """The demonstration row of a record and its sentence, or None if it is dropped."""
        name, near = record["name"], record.get("near")
        delexicalized = restaurants.delexicalize(_tidy(text), name, near)
        if delexicalized is None:
            self.counts[split, "name not found"] += 1
            return None
        folded = restaurants.fold(delexicalized)
        if any(p.search(folded) for p in self._leaks):
            self.counts[split, "another venue's name left"] += 1
            return None
        slots = restaurants.delexicalize_record(record)
        return {
            "prompt": restaurants.render_prompt(slots),
            "completion": delexicalized,
            "record": slots,
            "name": name,
            "near": near,
        }


def build_demonstrations(e2e: Path, rankme_prompts: set[str], counts: dict) -> dict[str, list]:
    """Rows of the three demonstration splits; no prompt (delexicalized record) is in two of them."""
    raw: dict[str, list] = {}
    for split, file in (("train", "sft_train"), ("dev", "sft_valid"), ("test", "test")):
        raw[split] = []
        for line in _open_lines(e2e / f"{file}.jsonl.gz"):
            row = json.loads(line)
            raw[split].append((restaurants.parse_record(row["mr"]), row["ref"]))
    records = [r for rows in raw.values() for r, _ in rows]
    names = {r["name"] for r in records} | {r["near"] for r in records if "near" in r}
    reader = Demonstrations(names)

    groups: dict[str, dict[str, list]] = {s: collections.defaultdict(list) for s in raw}
    for split, rows in raw.items():
        counts[f"{split}: rows in the source"] = len(rows)
        for record, text in rows:
            row = reader.row(record, text, split)
            if row is not None:
                groups[split][row["prompt"]].append(row)
    # Held-out splits take precedence: a record that is in one of them is removed from the others.
    for prompt in rankme_prompts & set(groups["test"]):
        counts["test: rows left out, record is RankME's"] += len(groups["test"].pop(prompt))
    held = set(groups["test"]) | rankme_prompts
    for prompt in held & set(groups["dev"]):
        counts["dev: rows left out, record in test"] += len(groups["dev"].pop(prompt))
    for prompt in (held | set(groups["dev"])) & set(groups["train"]):
        counts["train: rows left out, record held out"] += len(groups["train"].pop(prompt))
    for prompt in [p for p in groups["train"] if int(_key(p)[:8], 16) < DEV_FROM_TRAIN * 2**32]:
        groups["dev"][prompt] = groups["train"].pop(prompt)
        counts["dev: records taken from E2E's training part"] += 1

    out = {}
    for split, by_prompt in groups.items():
        out[split] = []
        # In hash order, any first n prompts are a random sample of the split. The references of a record are
        # adjacent, which halves the compressed file.
        for prompt in sorted(by_prompt, key=_key):
            rows = list({r["completion"]: r for r in by_prompt[prompt]}.values())
            counts[f"{split}: repeated sentences of a record"] += len(by_prompt[prompt]) - len(rows)
            if split == "train":
                rows.sort(key=lambda r: _key(r["completion"]))
                counts["train: references beyond 8 a record"] += max(0, len(rows) - MAX_REFERENCES)
                rows = rows[:MAX_REFERENCES]
            out[split] += rows
        counts[f"{split}: rows"] = len(out[split])
        counts[f"{split}: records"] = len(by_prompt)
    for (split, reason), n in reader.counts.items():
        counts[f"{split}: dropped, {reason}"] = n
    return out


def build_rankings(rankme: Path, counts: dict) -> list[dict]:
    """One row for each rater, record and criterion. The highest score gets rank 1."""
    rows = []
    for line in _open_lines(rankme / "rankings_k3.jsonl.gz"):
        source = json.loads(line)
        record = restaurants.parse_record(source["mr"])
        name, near = record["name"], record.get("near")
        items = sorted(source["items"], key=lambda i: i["system"])
        texts = [restaurants.delexicalize(_tidy(i["text"]), name, near) for i in items]
        if None in texts:
            counts["rankings: dropped, name not found"] += 1
            continue
        scores = [i["score"] for i in items]
        slots = restaurants.delexicalize_record(record)
        rows.append(
            {
                "prompt": restaurants.render_prompt(slots),
                "completions": texts,
                "ranks": [1 + sum(s > score for s in scores) for score in scores],
                "scores": scores,
                "criterion": source["criterion"],
                "systems": [i["system"] for i in items],
                "setup": source["setup"],
                "rater": source["rater"],
                "record": slots,
                "name": name,
                "near": near,
            }
        )
    counts["rankings: rows"] = len(rows)
    counts["rankings: records"] = len({r["prompt"] for r in rows})
    return rows


_ASCII = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "—": " - ", "–": "-", "…": "...", "\xa0": " ", "_": ""}
)


def clean_text(text: str, counts: dict | None = None) -> list[str]:
    """Split a book into paragraphs: lines unwrapped, quotes and dashes in ASCII, headings and slurs removed."""
    text = unicodedata.normalize("NFC", text).translate(_ASCII)
    lines = [line.strip() for line in text.splitlines()]
    width = sorted(map(len, filter(None, lines)))[int(0.9 * sum(map(bool, lines)))]
    paragraphs, current = [], ""
    for line in lines:
        # Hard-wrapped books end a paragraph with a short line that closes a sentence.
        wrapped = width <= 90
        if line:
            current = f"{current} {line}" if current else line
        closes = bool(re.search(r"""[.!?]["']?$""", current)) and len(line) < 0.85 * width
        if current and (not line or not wrapped or closes):
            paragraphs.append(re.sub(r"\s+", " ", current))
            current = ""
    paragraphs.append(current)
    kept = []
    for p in paragraphs:
        letters = [c for c in p if c.isalpha()]
        lower = sum(c.islower() for c in letters)
        if (
            len(letters) < 3
            or lower < 0.6 * len(letters)
            or re.search(r"[\[\]{}*=<>|\\^~\ufffdŰť]", p)
        ):
            continue
        if not re.search(r"""[.!?;:,\-"')]$""", p):
            continue
        if _SLURS.search(p):
            if counts is not None:
                counts["text: paragraphs dropped for a slur"] += 1
            continue
        kept.append(p)
    return kept


def build_text(novels: Path, speeches: Path | None, counts: dict) -> dict[str, str]:
    """Training, dev and test text: one paragraph per line, documents separated by a blank line."""

    def book(name: str) -> str:
        return "\n".join(clean_text("".join(_open_lines(novels / f"{name}.txt.gz")), counts))

    def part(name: str, start: int, size: int) -> str:
        text = book(name)
        start = text.index("\n", start) + 1
        return text[start : text.index("\n", start + size)]

    documents = {
        "train": [book(name) for name in TRAIN_BOOKS],
        "dev": [part(*p) for p in DEV_BOOKS],
        "test": [part(*p) for p in TEST_BOOKS],
    }
    if speeches is not None:
        for line in _open_lines(speeches / "inaugural.jsonl.gz"):
            row = json.loads(line)
            if int(row["id"][:4]) not in SPEECH_YEARS:
                continue
            held = {
                i: s for s, ids in (("dev", DEV_SPEECHES), ("test", TEST_SPEECHES)) for i in ids
            }
            documents[held.get(row["id"], "train")].append("\n".join(clean_text(row["text"])))
    for split, docs in documents.items():
        counts[f"text {split}: documents"] = len(docs)
        counts[f"text {split}: characters"] = sum(map(len, docs))
    return {split: "\n\n".join(docs) + "\n" for split, docs in documents.items()}


def write_source(out: Path, counts: dict[str, int]) -> None:
    """Write SOURCE.md: the prose of the shipped one with new tables of files and counts."""
    prose = (Path(__file__).parent / "data" / "SOURCE.md").read_text(encoding="utf-8")
    lines = ["## Files", "", "| file | bytes | sha256 |", "| --- | --- | --- |"]
    for path in sorted(out.glob("*.gz")):
        data = path.read_bytes()
        lines.append(f"| {path.name} | {len(data):,} | {hashlib.sha256(data).hexdigest()} |")
    lines += ["", "## Counts", "", "| what | number |", "| --- | --- |"]
    lines += [f"| {what} | {n:,} |" for what, n in sorted(counts.items())]
    text = prose[: prose.index("## Files")] + "\n".join(lines) + "\n"
    (out / "SOURCE.md").write_text(text, encoding="utf-8")


def build(e2e: Path, rankme: Path, novels: Path, speeches: Path | None, out: Path) -> dict:
    """Write every data file and SOURCE.md to `out`; return the counts."""
    out.mkdir(parents=True, exist_ok=True)
    counts: collections.Counter = collections.Counter()
    rankings = build_rankings(rankme, counts)
    demonstrations = build_demonstrations(e2e, {r["prompt"] for r in rankings}, counts)
    for split, rows in demonstrations.items():
        _write_gz(out / f"demonstrations_{split}.jsonl.gz", _jsonl(rows))
    _write_gz(out / "rankings_human.jsonl.gz", _jsonl(rankings))
    for split, text in build_text(novels, speeches, counts).items():
        _write_gz(out / f"text_{split}.txt.gz", text.encode())
    write_source(out, dict(counts))
    return dict(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description="Rebuild the demo's data from its public sources.")
    for name in ("e2e", "rankme", "novels", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--speeches", type=Path, default=None)
    args = parser.parse_args()
    for key, value in sorted(build(**vars(args)).items()):
        print(f"{key}: {value:,}")


if __name__ == "__main__":
    main()
