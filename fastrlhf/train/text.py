"""From text to token ids and back.

- A sequence begins with the tokens that the tokenizer's own encoding puts in front of a text (BOS), once.
- A prompt has the tokens of the prompt alone, in training as in sampling.
- A completion has tokens that decode, after those of its prompt, to exactly its text. Its tokens alone may not:
  SentencePiece-style tokenizers put a space in front of every text.
- A special token that is written in a text ("</s>") is text, unless `parse_special_tokens` is set.

`TextEncoder.notes` says where one of these rules decided something.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from fastrlhf.errors import UserError

# Texts in front of which a completion is encoded to get the tokens that it has inside a text.
_ANCHORS = ("\n", ".", "a", "0", ":")
_PROBES = 1000  # tokens of the vocabulary among which one should show the prefix


@dataclass
class TextConfig:
    """Settings of every command that reads text."""

    parse_special_tokens: bool = False  # special tokens written in the data are tokens, not text


class TextEncoder:
    """Encodes prompts, completions and documents, and decodes responses.

    Args:
        tokenizer: the model's tokenizer.
        parse_special_tokens: whether a special token that is written in a text becomes that token.

    Attributes:
        prefix: ids that every sequence begins with.
        eos: id that ends a document and a completion.
        notes: lines for the user.
    """

    def __init__(self, tokenizer, parse_special_tokens: bool = False):
        self.tokenizer, self.parse_special_tokens = tokenizer, parse_special_tokens
        self.eos: int = tokenizer.eos_token_id
        self.prefix = sequence_prefix(tokenizer)
        self.notes: list[str] = []
        if self.prefix:
            self.notes.append(
                f"sequences begin with {self._name(self.prefix)}, as in the tokenizer's own encoding"
            )
        special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        special |= set(tokenizer.all_special_tokens)
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
        # UNK is no sign of a parsed token: ordinary text gives it too. GPT-2 names its EOS as UNK and never uses it so.
        self._special_ids = set(tokenizer.convert_tokens_to_ids(sorted(special)))
        self._special_ids -= {tokenizer.unk_token_id} - {self.eos}

    def note_ends(self, ends: Sequence[int]) -> None:
        """Add a note of the tokens that end a response, if there is another than EOS."""
        if len(ends) > 1:
            self.notes.append(f"responses end at {self._name(ends)}")

    def documents(self, texts: Sequence[str], what: str) -> list[list[int]]:
        """Token ids of each text, with no `prefix` added.

        Raises:
            UserError: names the text that the tokenizer encodes to a special token without `parse_special_tokens`.
        """
        encoded = self._encode(texts)
        self._check_special(texts, encoded, what)
        return encoded

    def prompts(self, texts: Sequence[str], what: str) -> list[list[int]]:
        """Token ids of each prompt, with `prefix` in front; errors as in `documents`."""
        return [self.begin(ids) for ids in self.documents(texts, what)]

    def pairs(
        self, prompts: Sequence[str], completions: Sequence[str], what: str
    ) -> list[tuple[list[int], list[int]]]:
        """(prompt's ids with `prefix`, completion's ids without EOS) of each pair; errors as in `documents`.

        The completion's ids are the first of these that decode exactly: its part of the joined text, where the
        prompt's ids begin that; the completion alone; the completion after an anchor, a text that ends in a token.
        """
        texts = [p + c for p, c in zip(prompts, completions, strict=True)]
        unique = list(dict.fromkeys(prompts))
        ids_of = dict(zip(unique, self._encode(unique), strict=True))
        start_of = dict(zip(unique, self._decode(list(ids_of.values())), strict=True))
        heads = [ids_of[p] for p in prompts]
        inside = [_after(head, ids) for head, ids in zip(heads, self._encode(texts), strict=True)]
        chosen: list[list[int] | None] = [None] * len(texts)

        def offer(candidates: dict[int, list[int] | None]) -> list[int]:
            """Choose the candidates that decode exactly; return the rows that still have none."""
            ids = {i: heads[i] + c for i, c in candidates.items() if c is not None}
            for i, text in zip(ids, self._decode(list(ids.values())), strict=True):
                if text == start_of[prompts[i]] + completions[i]:
                    chosen[i] = candidates[i]
            return [i for i, c in enumerate(chosen) if c is None]

        rows = offer(dict(enumerate(inside)))
        alone = dict(zip(rows, self._encode([completions[i] for i in rows]), strict=True))
        rows = offer(alone)
        for anchor in _ANCHORS if rows else ():
            (start,) = self._encode([anchor])
            found = self._encode([anchor + completions[i] for i in rows])
            rows = offer({i: _after(start, ids) for i, ids in zip(rows, found, strict=True)})
        unknown = self.tokenizer.unk_token_id
        tails = []
        for i, (head, ids, part) in enumerate(zip(heads, chosen, inside, strict=True)):
            if (
                ids is None
            ):  # no way is exact; an UNK at the prompt's end may hold the completion's begin
                ids = alone[i] if part is None or unknown in head[-1:] else part
            tails.append(ids)
        self._check_special(texts, [h + t for h, t in zip(heads, tails, strict=True)], what)
        self._note_pairs(what, chosen, inside)
        return [self._begin_pair(h, t) for h, t in zip(heads, tails, strict=True)]

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        finished: Sequence[bool],
    ) -> list[str]:
        """The text of each response, as it continues its prompt; special tokens are left out.

        Args:
            prompts, responses: token ids.
            finished: whether a response ends with an end token, which is left out.
        """
        heads = [list(p) for p in prompts]
        tails = [
            [int(t) for t in r[: len(r) - bool(end)]]
            for r, end in zip(responses, finished, strict=True)
        ]
        starts = self._decode(heads, skip_special=True)
        wholes = self._decode([h + t for h, t in zip(heads, tails, strict=True)], skip_special=True)
        alone = self._decode(tails, skip_special=True)
        return [
            whole[len(start) :] if whole.startswith(start) else text
            for start, whole, text in zip(starts, wholes, alone, strict=True)
        ]

    def begin(self, ids: list[int]) -> list[int]:
        """`ids` with `prefix` in front, unless the text has it there, as a chat template may write it."""
        return ids if self._begun(ids) else self.prefix + ids

    def _begun(self, ids: list[int]) -> bool:
        # A prefix of ordinary tokens may also begin a text: that is no written BOS.
        return self.parse_special_tokens and ids[: len(self.prefix)] == self.prefix

    def _begin_pair(self, head: list[int], tail: list[int]) -> tuple[list[int], list[int]]:
        size = len(self.prefix)
        if len(head) < size and self._begun(head + tail):  # the completion has the prefix
            return self.prefix, (head + tail)[size:]
        return self.begin(head), tail

    def _note_pairs(self, what: str, chosen: list, inside: list) -> None:
        split = sum(a is not None and a != b for a, b in zip(chosen, inside, strict=True))
        if split:
            self.notes.append(
                f"{what}: {split} of {len(chosen)} rows have other tokens here than as one text; each prompt has the "
                "tokens of the prompt alone, and each completion decodes to its text"
            )
        lossy = chosen.count(None)
        if lossy:
            self.notes.append(
                f"{what}: {lossy} of {len(chosen)} completions do not decode to exactly their text (the tokenizer "
                "changes characters or spaces)"
            )

    def _check_special(self, texts: Sequence[str], encoded: list[list[int]], what: str) -> None:
        if self.parse_special_tokens:
            return
        count, seen, rows = 0, {}, 0
        for number, (text, ids) in enumerate(zip(texts, encoded, strict=True), 1):
            found = self._special.findall(text)
            # Also without a match: a normalizer may turn other text into a special token.
            if not self._special_ids.isdisjoint(ids):
                token = next(i for i in ids if i in self._special_ids)
                name = found[0] if found else self.tokenizer.convert_ids_to_tokens(token)
                source = "" if found else ", which its normalizer makes from other characters,"
                raise UserError(
                    f"{what}, row {number}: this tokenizer cannot encode {name!r}{source} as text; remove it, or set "
                    "parse_special_tokens to read it as the special token"
                )
            if not found:
                continue
            count, rows = count + len(found), rows + 1
            seen |= dict.fromkeys(found)
        if count:
            names = ", ".join(map(repr, list(seen)[:3])) + ", ..." * (len(seen) > 3)
            self.notes.append(
                f"{what}: {count} special tokens in {rows} of {len(texts)} rows ({names}) are read as text; with "
                "parse_special_tokens they would be tokens"
            )

    def _name(self, ids: Sequence[int]) -> str:
        tokens = self.tokenizer.convert_ids_to_tokens(list(ids))
        return ", ".join(f"{t!r} (id {i})" for t, i in zip(tokens, ids, strict=True))

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            if not texts:  # which the call below refuses
                return []
            return self.tokenizer(
                list(texts),
                add_special_tokens=False,
                return_attention_mask=False,
                split_special_tokens=not self.parse_special_tokens,
            )["input_ids"]
        # Skips the offsets that the call above computes: 2.1 s instead of 4.2 s for 7.5 MB of text.
        backend.no_truncation()
        backend.no_padding()
        with _special_as_text(backend, not self.parse_special_tokens):
            return [x.ids for x in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _decode(self, sequences: list[list[int]], skip_special: bool = False) -> list[str]:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return self.tokenizer.batch_decode(
                sequences, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
            )
        return backend.decode_batch(sequences, skip_special_tokens=skip_special)


@contextmanager
def _special_as_text(backend, as_text: bool):
    before = backend.encode_special_tokens
    backend.encode_special_tokens = as_text
    try:
        yield
    finally:
        backend.encode_special_tokens = before


def check_same_ends(text: TextEncoder, tokenizer, what: str) -> None:
    """Raise UserError unless sequences begin and end with the same ids in both, as a reward model's input must."""
    ours, theirs = [text.prefix, text.eos], [sequence_prefix(tokenizer), tokenizer.eos_token_id]
    if ours != theirs:
        raise UserError(
            f"{what}: sequences begin and end with the ids {ours[0]} and {ours[1]} in one and with {theirs[0]} and "
            f"{theirs[1]} in the other; train both from one tokenizer"
        )


def _after(start: list[int], ids: list[int]) -> list[int] | None:
    return ids[len(start) :] if ids[: len(start)] == start else None


def sequence_prefix(tokenizer) -> list[int]:
    """Ids in front of a text in the tokenizer's own encoding, such as BOS. An EOS that it appends is left out."""
    for probe in _probes(tokenizer):
        text = tokenizer(probe, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        whole = tokenizer(probe, return_attention_mask=False)["input_ids"]
        ends = range(len(text), len(whole) + 1)
        found = [end - len(text) for end in ends if whole[end - len(text) : end] == text]
        # A tokenizer may drop the probe, and the prefix may contain it.
        if text and len(found) == 1:
            return list(whole[: found[0]])
    whole = list(tokenizer("", return_attention_mask=False)["input_ids"])
    return whole[:-1] if whole[-1:] == [tokenizer.eos_token_id] else whole


def _probes(tokenizer) -> Iterator[str]:
    """Texts that `sequence_prefix` tries in turn: a letter, then tokens of the vocabulary."""
    yield "a"
    ids = sorted(tokenizer.get_vocab().values())[:_PROBES]
    yield from (tokenizer.decode([i]) for i in ids)
