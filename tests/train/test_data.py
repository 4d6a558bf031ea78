"""Data: shuffling, text windows, tokenized rows, and error messages for damaged files."""

import gzip
import json

import numpy as np
import pytest

from _support import tiny
from fastrlhf.errors import UserError
from fastrlhf.train import data
from fastrlhf.train.stages import sft


def test_shuffle_visits_every_item_once_per_epoch_and_resumes():
    order = data.Shuffle(7, seed=3)
    first, second = order.take(7), order.take(7)
    assert sorted(first) == sorted(second) == list(range(7)) and first != second
    resumed = data.Shuffle(7, seed=3, cursor=5)
    assert resumed.take(9) == [*first[5:], *second]


def test_text_documents_and_windows(tmp_path):
    class Letters:
        prefix, eos = [], 0

        def documents(self, texts, what):
            return [[ord(c) for c in t] for t in texts]

        def begin(self, ids):
            return self.prefix + ids

    path = tmp_path / "text.txt.gz"
    with gzip.open(path, "wt") as file:
        file.write("ab\ncd\n\n \nefg")
    documents = data.read_text(str(path))
    assert documents == ["ab\ncd", "efg"]
    windows = data.text_windows(documents, Letters(), 4, "x")
    tokens = [ord("a"), ord("b"), ord("\n"), ord("c"), ord("d"), 0, ord("e"), ord("f")]
    np.testing.assert_array_equal(np.concatenate([w.tokens for w in windows]), tokens)
    assert windows[0].targets == 3
    with pytest.raises(UserError, match="fewer than one window of 100"):
        data.text_windows(documents, Letters(), 100, "x")
    Letters.prefix = [1]  # a window begins as every sequence does
    starts = [w.tokens[:2].tolist() for w in data.text_windows(documents, Letters(), 4, "x")]
    assert starts == [[1, ord("a")], [1, ord("c")], [1, ord("e")]]


def test_next_token_rows_skip_the_prompt():
    examples = [data.Example(np.array([5, 6, 7, 8]), 2), data.Example(np.array([9, 3]), 0)]
    batch, rows, targets = data.next_token_rows(examples, "cpu")
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9, 3]
    assert rows.tolist() == [1, 2, 4] and targets.tolist() == [7, 8, 3]


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(b"not gzip at all")
    with pytest.raises(UserError, match="not a readable UTF-8 file"):
        data.read_rows(str(path), {}, "prompts")
    whole = gzip.compress(b'{"prompt": "a"}\n' * 500)
    for damaged in (whole[:40] + b"\xff" * 8 + whole[48:], whole[:-9], whole[:12]):
        path.write_bytes(damaged)  # the body, its checksum, its end
        with pytest.raises(UserError, match="not a readable UTF-8 file"):
            data.read_rows(str(path), {}, "prompts")
    with pytest.raises(UserError, match="prompts: expected a path"):
        data.read_rows("a\0b", {}, "prompts")
    with pytest.raises(UserError, match="cannot be read"):
        data.read_rows(str(tmp_path), {}, "prompts")
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n[1]\n')
    with pytest.raises(UserError, match="line 2: expected an object, got list"):
        data.read_rows(str(path), {"prompt": str}, "prompts")
    path.write_text('{"text": "a"}\n{}\n')
    with pytest.raises(UserError, match="line 2: field 'text': expected str, got nothing"):
        data.read_text(str(path))


@pytest.mark.parametrize("ranks", [[1, 0], [1, True], [1, 1.5], ["1", "2"]])
def test_rankings_must_be_ranks(tmp_path, ranks):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"prompt": "p", "completions": ["a", "b"], "ranks": ranks}))
    with pytest.raises(UserError, match="ranks must be integers from 1"):
        data.read_rankings(str(path))


def test_rows_written_and_read_back(tmp_path):
    rows = [{"prompt": "é", "n": 1}, {"prompt": "b", "n": 2}]
    data.write_rows(tmp_path / "x.jsonl.gz", rows)
    assert data.read_rows(str(tmp_path / "x.jsonl.gz"), {"prompt": str}, "x") == rows
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl.gz"]


@pytest.mark.parametrize(
    "line", ['{"prompt": "\\ud800"}', "[" * 100_000, '{"prompt": 1' + "0" * 5000]
)
def test_invalid_json_lines_are_named(line, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + line + "\n")
    with pytest.raises(UserError, match="line 2: not JSON"):
        sft.main(tiny.sft_config("x", demonstrations=str(path), out=str(tmp_path / "out")))


def test_an_empty_row_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "", "completion": ""}\n')
    with pytest.raises(UserError, match="row 2: prompt and completion are empty"):
        sft.main(tiny.sft_config("x", demonstrations=str(path), out=str(tmp_path / "out")))
