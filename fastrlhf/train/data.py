"""Data: reading the user's files, tokenizing them, and shuffling in an order that a resumed run repeats."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastrlhf.errors import UserError
from fastrlhf.train.files import replacing
from fastrlhf.train.packing import PackedBatch, collate
from fastrlhf.train.text import TextEncoder


def read_rows(path: str, fields: dict[str, type], what: str) -> list[dict]:
    """Read a JSONL file (.jsonl or .jsonl.gz).

    Args:
        path: the file.
        fields: required fields and their types.
        what: what the file is, for error messages.

    Raises:
        UserError: names file and line of a missing or empty file, malformed JSON, or a row without a field.
    """
    rows = []
    for number, line in enumerate(_lines(path, what), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # rejects lone surrogates
        except (ValueError, RecursionError) as error:
            raise UserError(f"{what} {path!r}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(
                f"{what} {path!r}, line {number}: expected an object, got {type(row).__name__}"
            )
        for field, kind in fields.items():
            if not isinstance(row.get(field), kind):
                got = f"{type(row[field]).__name__}" if field in row else "nothing"
                raise UserError(
                    f"{what} {path!r}, line {number}: field {field!r}: expected {kind.__name__}, got {got}"
                )
        rows.append(row)
    if not rows:
        raise UserError(f"{what} {path!r}: the file has no rows")
    return rows


def read_rankings(path: str) -> list[dict]:
    """Read JSONL rows {"prompt", "completions": [str], "ranks": [int]}; rank 1 is the best, ties are allowed.

    Raises:
        UserError: names file and line or row of the first mistake, or all rows are ties.
    """
    rows = read_rows(path, {"prompt": str, "completions": list, "ranks": list}, "rankings")
    for number, row in enumerate(rows, 1):
        texts, ranks = row["completions"], row["ranks"]
        if len(texts) != len(ranks) or len(texts) < 2:
            raise UserError(
                f"rankings {path!r}, row {number}: expected as many ranks as completions and at least 2, "
                f"got {len(texts)} completions and {len(ranks)} ranks"
            )
        if not all(isinstance(t, str) for t in texts):
            raise UserError(f"rankings {path!r}, row {number}: completions must be strings")
        if not all(
            isinstance(r, int) and not isinstance(r, bool) and 1 <= r < 2**31 for r in ranks
        ):
            raise UserError(
                f"rankings {path!r}, row {number}: ranks must be integers from 1 (best), got {ranks}"
            )
    if all(len(set(row["ranks"])) == 1 for row in rows):
        raise UserError(f"rankings {path!r}: no two completions of a prompt have different ranks")
    return rows


def read_text(path: str) -> list[str]:
    """Read the documents of a .txt(.gz) file, separated by blank lines, or the "text" fields of a .jsonl(.gz) file."""
    if path.removesuffix(".gz").endswith(".jsonl"):
        return [row["text"] for row in read_rows(path, {"text": str}, "text")]
    documents = [d for d in re.split(r"\n\s*\n", "".join(_lines(path, "text"))) if d.strip()]
    if not documents:
        raise UserError(f"text {path!r}: the file is empty")
    return documents


def write_rows(path: Path, rows: Sequence[dict]) -> None:
    """Write a JSONL file atomically, compressed if its name ends in .gz."""
    opener = gzip.open if path.suffix == ".gz" else open
    with replacing(path) as partial, opener(partial, "wt", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class Example:
    """A tokenized sequence and the part of it that is predicted."""

    tokens: np.ndarray  # int64 [L]
    start: int  # the targets are tokens[start:]; never the first token, which nothing predicts

    @property
    def targets(self) -> int:
        """Number of targets."""
        return len(self.tokens) - max(self.start, 1)


def next_token_rows(
    examples: Sequence[Example], device
) -> tuple[PackedBatch, torch.Tensor, torch.Tensor]:
    """Pack examples into (batch of N tokens, rows [M], targets [M]).

    The hidden state at position rows[i] predicts token targets[i]; both int64. M is the number of all targets.
    """
    tokens = [e.tokens for e in examples]
    offsets = np.cumsum([0, *(len(t) for t in tokens)])
    rows = [
        np.arange(o + max(e.start, 1) - 1, o + len(e.tokens) - 1)
        for o, e in zip(offsets, examples, strict=False)
    ]
    targets = [e.tokens[max(e.start, 1) :] for e in examples]
    rows, targets = (
        torch.from_numpy(np.concatenate(parts)).to(device) for parts in (rows, targets)
    )
    return collate(tokens).to(device), rows, targets


def encode_examples(
    rows: Sequence[dict], text: TextEncoder, context: int, what: str, full_loss=False, whose="model"
) -> list[Example]:
    """Tokenize prompt + completion + EOS of each row.

    The targets are the completion and its EOS, or with `full_loss` all tokens but the first.

    Raises:
        UserError: names the row that is empty or longer than `context` tokens.
    """
    pairs = text.pairs([row["prompt"] for row in rows], [row["completion"] for row in rows], what)
    examples = []
    for number, (row, (prompt, completion)) in enumerate(zip(rows, pairs, strict=True), 1):
        tokens = np.array([*prompt, *completion, text.eos], dtype=np.int64)
        if len(tokens) > context:
            raise UserError(
                f"{what}, row {number}: {len(tokens)} tokens, but the {whose}'s context holds {context}"
            )
        if not row["prompt"] and not row["completion"] or len(tokens) < 2:
            raise UserError(f"{what}, row {number}: prompt and completion are empty")
        examples.append(Example(tokens, 1 if full_loss else len(prompt)))
    return examples


def encode_prompts(
    rows: Sequence[dict], text: TextEncoder, context: int, room: int, what: str
) -> list[list[int]]:
    """Tokenize the prompt of each row.

    Raises:
        UserError: names the row whose prompt is empty or leaves fewer than `room` tokens of the context.
    """
    prompts = text.prompts([row["prompt"] for row in rows], what)
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise UserError(f"{what}, row {number}: the prompt has no tokens")
        if len(prompt) + room > context:
            raise UserError(
                f"{what}, row {number}: prompt of {len(prompt)} tokens + {room} new ones "
                f"(max_new_tokens) do not fit the context of {context}"
            )
    return prompts


def window_length(length: int, context: int, name: str) -> int:
    """`length`, or `context` if it is 0. UserError if it is not 0 and outside 2 to `context`."""
    if length and not 2 <= length <= context:
        raise UserError(f"{name}: expected 0, or 2 to the context's {context} tokens, got {length}")
    return length or context


def text_windows(
    documents: Sequence[str], text: TextEncoder, length: int, what: str
) -> list[Example]:
    """Concatenate documents, separated by EOS, and cut the tokens into windows of `length`; the rest is dropped.

    Each window begins with `text.prefix`, which counts towards its length. It is not repeated where the text of the
    window begins with it.

    Raises:
        UserError: the text is shorter than one window.
    """
    stream: list[int] = []
    for ids in text.documents(documents, what):
        stream += ids
        stream.append(text.eos)
    part = length - len(text.prefix)
    if part < 1:
        raise UserError(
            f"{what}: a window of {length} tokens has no room for text after the {len(text.prefix)} tokens that "
            "every sequence begins with"
        )
    windows, at = [], 0
    while len(window := text.begin(rest := stream[at : at + length])) >= length:
        windows.append(Example(np.array(window[:length], dtype=np.int64), 1))
        at += length - (len(window) - len(rest))
    if not windows:
        raise UserError(f"{what}: {len(stream)} tokens, fewer than one window of {part}")
    return windows


class Shuffle:
    """An endless sequence of passes over `size` items, each pass in a new random order.

    Item i of the sequence depends on (size, seed, i) alone, so `cursor`, the number of items drawn so far, is the
    complete state.
    """

    def __init__(self, size: int, seed: int, cursor: int = 0):
        self.size, self.seed, self.cursor = size, seed, cursor
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def take(self, count: int) -> list[int]:
        """The next `count` items."""
        out = []
        for _ in range(count):
            epoch, place = divmod(self.cursor, self.size)
            if epoch != self._epoch:
                self._order = np.random.default_rng([self.seed, epoch]).permutation(self.size)
                self._epoch = epoch
            out.append(int(self._order[place]))
            self.cursor += 1
        return out

    def state_dict(self) -> dict:
        return {"cursor": self.cursor, "size": self.size}

    def load_state_dict(self, state: dict) -> None:
        if state["size"] != self.size:
            raise ValueError(f"the data has {self.size} rows and had {state['size']}")
        self.cursor = state["cursor"]


def _lines(path: str, what: str) -> Iterator[str]:
    opener = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            yield from file
    except FileNotFoundError as error:
        raise UserError(f"{what} {path!r}: no such file") from error
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(f"{what} {path!r}: cannot be read ({error.strerror})") from error
    except (gzip.BadGzipFile, zlib.error, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path!r}: not a readable UTF-8 file ({error})") from error
    except ValueError as error:  # a NUL byte
        raise UserError(f"{what}: expected a path, got {path!r} ({error})") from error
