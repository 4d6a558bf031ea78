"""Restaurant records of the E2E challenge: parsing, delexicalization, prompts.

A record is a flat dictionary of at most eight slots, e.g.
``{"name": "NAMEX", "eatType": "pub", "food": "Italian", "near": "NEARX"}``. Proper names are an open vocabulary
and irrelevant to the task. *Delexicalization* replaces them with the placeholders ``NAMEX`` and ``NEARX`` in the
record and in the sentence; `relexicalize` restores them for display. In a prompt every slot value is one special
token: ``<name=NAMEX><eatType=pub>...<say>``.
"""

import difflib
import re
import unicodedata

NAME = "NAMEX"
NEAR = "NEARX"
SAY = "<say>"

# The values of each slot. A prompt lists the slots in this order.
SLOTS: dict[str, tuple[str, ...]] = {
    "name": (NAME,),
    "eatType": ("coffee shop", "pub", "restaurant"),
    "food": ("Chinese", "English", "Fast food", "French", "Indian", "Italian", "Japanese"),
    "priceRange": (
        "cheap",
        "less than £20",
        "moderate",
        "£20-25",
        "high",
        "more than £30",
    ),
    "rating": ("low", "1 out of 5", "average", "3 out of 5", "high", "5 out of 5"),
    "area": ("city centre", "riverside"),
    "familyFriendly": ("yes", "no"),
    "near": (NEAR,),
}

_SLOT_NAMES = {re.sub(r"\W", "", s).lower(): s for s in SLOTS} | {"customerrating": "rating"}

# Spellings in the E2E data sets and in systems' outputs -> canonical value.
_VARIANTS = {
    "eatType": {"coffeeshop": "coffee shop", "cafe": "coffee shop", "café": "coffee shop"},
    "food": {"fastfood": "Fast food", "fast-food": "Fast food", "british": "English"},
    "priceRange": {
        "£20-£25": "£20-25",
        "20-25": "£20-25",
        "less than 20": "less than £20",
        "under £20": "less than £20",
        "more than 30": "more than £30",
        "over £30": "more than £30",
        "expensive": "high",
        "average": "moderate",
        "low": "cheap",
    },
    "rating": {
        "1/5": "1 out of 5",
        "1 star": "1 out of 5",
        "3/5": "3 out of 5",
        "3 star": "3 out of 5",
        "3 stars": "3 out of 5",
        "5/5": "5 out of 5",
        "5 star": "5 out of 5",
        "5 stars": "5 out of 5",
        "excellent": "high",
        "good": "high",
        "decent": "average",
        "poor": "low",
    },
    "area": {"city center": "city centre", "centre": "city centre", "river": "riverside"},
    "familyFriendly": {"true": "yes", "false": "no"},
}


def normalize_value(slot: str, value: str) -> str:
    """The canonical spelling of a slot's value; ValueError, with the slot's values, if it has none."""
    value = re.sub(r"\s+", " ", unicodedata.normalize("NFC", value)).strip()
    if slot in ("name", "near"):
        if not value:
            raise ValueError(f"{slot}: expected a non-empty name, got an empty string")
        return value
    low = value.lower()
    for canonical in SLOTS[slot]:
        if canonical.lower() == low:
            return canonical
    if low in _VARIANTS.get(slot, {}):
        return _VARIANTS[slot][low]
    raise ValueError(f"{slot}: expected one of {', '.join(SLOTS[slot])}, got {value!r}")


def parse_record(text: str) -> dict[str, str]:
    """Parse ``name[The Eagle], eatType[pub], customer rating[low]`` into slots in canonical order.

    Raises:
        ValueError: unknown slot or value, repeated slot, missing name, or text that is not of the form
            ``slot[value], slot[value], ...``.
    """
    found: dict[str, str] = {}
    rest = re.sub(r"\s*([^,\[\]]+?)\s*\[([^\[\]]*)\]\s*(?:,|$)", "", text)
    if rest.strip():
        raise ValueError(f"record: expected 'slot[value], slot[value], ...', got {text!r}")
    for slot_text, value in re.findall(r"([^,\[\]]+?)\s*\[([^\[\]]*)\]", text):
        slot = _SLOT_NAMES.get(re.sub(r"\W", "", slot_text).lower())
        if slot is None:
            raise ValueError(f"record: expected a slot of {', '.join(SLOTS)}, got {slot_text!r}")
        if slot in found:
            raise ValueError(f"record: slot {slot!r} occurs twice in {text!r}")
        found[slot] = normalize_value(slot, value)
    if "name" not in found:
        raise ValueError(f"record: slot 'name' is missing in {text!r}")
    return {slot: found[slot] for slot in SLOTS if slot in found}


def render_prompt(record: dict[str, str]) -> str:
    """The prompt of a delexicalized record: one special token for each slot value, then ``<say>``."""
    for slot, value in record.items():
        if value not in SLOTS.get(slot, ()):
            raise ValueError(f"record: {slot}={value!r} is not a delexicalized slot value")
    return "".join(f"<{slot}={record[slot]}>" for slot in SLOTS if slot in record) + SAY


def parse_prompt(prompt: str) -> dict[str, str]:
    """The inverse of :func:`render_prompt`."""
    body = prompt.removesuffix(SAY)
    record = dict(re.findall(r"<([^<>=]+)=([^<>]+)>", body))
    if body == prompt or render_prompt(record) != prompt:
        raise ValueError(f"prompt: expected '<slot=value>...{SAY}', got {prompt!r}")
    return record


def special_tokens() -> list[str]:
    """All 29 special tokens of prompts, in a fixed order."""
    return [f"<{slot}={value}>" for slot, values in SLOTS.items() for value in values] + [SAY]


def delexicalize_record(record: dict[str, str]) -> dict[str, str]:
    """The record with placeholders for its names."""
    names = {"name": NAME, "near": NEAR}
    return {slot: names.get(slot, value) for slot, value in record.items()}


def fold(text: str) -> str:
    """`text` in lower case, without accents, with one kind of apostrophe.

    The length is unchanged, so spans are valid in the original text.
    """
    folded = []
    for ch in text:
        base = unicodedata.normalize("NFD", ch)[0]
        folded.append("'" if base in "’‘`´" else base)
    return "".join(folded).lower()


def _words(name: str) -> list[str]:
    words = re.findall(r"[a-z0-9]+", fold(name).replace("'", ""))
    return words[1:] if len(words) > 1 and words[0] == "the" else words


def mention_pattern(name: str) -> re.Pattern:
    """A pattern for mentions of `name` in folded text."""

    # Allows an apostrophe inside a word (Brown's / Browns), an optional "The" and an optional plural "s".
    def word(w: str) -> str:
        return w[:-1] + "'?s" if w.endswith("s") and len(w) > 3 else w

    words = [word(w) for w in _words(name)]
    return re.compile(r"(?<![a-z0-9])(?:the[\s-]+)?" + r"[\s,-]*".join(words) + r"s?(?![a-z0-9])")


def _fuzzy_spans(folded: str, name: str) -> list[tuple[int, int]]:
    """The span of a misspelt mention: the most similar window of as many words, plus or minus one, if over 82 %."""
    words = _words(name)
    target = "".join(words)
    if len(target) < 5:
        return []
    tokens = [m.span() for m in re.finditer(r"[a-z0-9']+", folded)]
    best: tuple[float, int, int] | None = None
    for i in range(len(tokens)):
        for n in {max(1, len(words) - 1), len(words), len(words) + 1}:
            if i + n > len(tokens):
                continue
            start, end = tokens[i][0], tokens[i + n - 1][1]
            window = re.sub(r"[^a-z0-9]", "", folded[start:end])
            if abs(len(window) - len(target)) > 3 or window[:1] != target[:1]:
                continue
            ratio = difflib.SequenceMatcher(None, window, target).ratio()
            if ratio >= 0.82 and (best is None or ratio > best[0]):
                best = (ratio, start, end)
    if best is None:
        return []
    start = best[1] - 4 if folded[: best[1]].endswith("the ") else best[1]
    return [(start, best[2])]


def _replace(text: str, name: str, placeholder: str, fuzzy: bool) -> str:
    folded = fold(text)
    spans = [m.span() for m in mention_pattern(name).finditer(folded)]
    if not spans and fuzzy:
        spans = _fuzzy_spans(folded, name)
    for start, end in reversed(spans):
        text = text[:start] + placeholder + text[end:]
    return text


def delexicalize(
    text: str, name: str, near: str | None = None, *, fuzzy: bool = True
) -> str | None:
    """Replace every mention of `name` and `near` in `text` with ``NAMEX`` and ``NEARX``.

    Case, accents, apostrophes, hyphens and a leading "The" are ignored. If there is no such mention and `fuzzy`
    is set, one misspelt mention (82 % similar) is replaced. Returns None if `name` is not found, because the
    sentence may contain it in an unknown form. A missing `near` is accepted.
    """
    text = unicodedata.normalize("NFC", text)
    pairs = [(name, NAME)] + ([(near, NEAR)] if near else [])
    # Exact mentions first, longest name first, in case one name contains the other.
    for value, placeholder in sorted(pairs, key=lambda p: -len(p[0])):
        text = _replace(text, value, placeholder, fuzzy=False)
    for value, placeholder in pairs:
        if placeholder not in text:
            text = _replace(text, value, placeholder, fuzzy=fuzzy)
    return text if NAME in text else None


def relexicalize(text: str, name: str, near: str | None = None) -> str:
    """Replace the placeholders with real names; without `near`, ``NEARX`` becomes "somewhere"."""
    return text.replace(NAME, name).replace(NEAR, near if near else "somewhere")
