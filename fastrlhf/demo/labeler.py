"""The demo's labeler: a program that ranks sentences by how well they express their record.

RLHF needs human preferences, and a demo of minutes cannot collect any. The labeler replaces them: a sentence
is better if it expresses more slots of its record and invents fewer. It is not part of the method. The reward
model only reads a rankings file, and human rankings (rows ``{"prompt", "completions", "ranks"}``, as in the
shipped ``rankings_human.jsonl.gz``) can replace the labeler's. :func:`validate` measures its agreement with
people.

Regular expressions find the slot values that a delexicalized sentence states. Prices and ratings are compared
by level ("cheap" = "less than £20", "high" = "5 out of 5"), because the human references use them
interchangeably. For a record of n slots,

    value = (covered - invented - 0.25 * defects) / n

A slot is *covered* if the sentence states the record's value. Every other stated value is *invented*, so a
sentence that says both yes and no has one invented value. A *defect* is one of: no final punctuation; a
repeated sequence of four words; garbage (markup, fragments of placeholders, too long). A defect costs a quarter
of a slot: it breaks ties but never outweighs a slot.
"""

import functools
import re
from typing import NamedTuple

from fastrlhf.demo import restaurants

DEFECT_COST = 0.25
MAX_CHARS = 400  # the longest human reference has 395

LEVELS = {
    "priceRange": {
        "cheap": "low",
        "less than £20": "low",
        "moderate": "middle",
        "£20-25": "middle",
        "high": "high",
        "more than £30": "high",
    },
    "rating": {
        "low": "low",
        "1 out of 5": "low",
        "average": "middle",
        "3 out of 5": "middle",
        "high": "high",
        "5 out of 5": "high",
    },
}


class Score(NamedTuple):
    """How a sentence expresses its record. Slots are given by name, invented values as ``slot=value``."""

    covered: tuple[str, ...]
    missing: tuple[str, ...]
    invented: tuple[str, ...]
    defects: tuple[str, ...]
    coverage: float  # covered slots / slots of the record
    value: float  # (covered - invented - 0.25 defects) / slots of the record; at most 1

    @property
    def errors(self) -> int:
        """Slot errors: missing plus invented."""
        return len(self.missing) + len(self.invented)


def _rx(pattern: str) -> re.Pattern:
    return re.compile(pattern)


_BE = r"(?:\s+(?:is|are|was|of|at|in|on|to|the|a|an|being|be|its|very|quite|rather|fairly|falls?"
_BE += r"|falling|ranges?|ranging|tends?|from|around|about|as|it|them|that|which|they|level|scale"
_BE += r"|side|s))*"
_BE = r"(?::|'s)?" + _BE + r"\s+"
_PRICE = r"(?:pric(?:e|es|ed|ing|ey)\b(?:[\s-]*(?:range|point|bracket|tag|level)s?)?|costs?\b)"
_RATE = r"(?:rat(?:ings?|ed|es?)\b|reviews?|reviewed|feedback|scor(?:es?|ed|ing)|satisfaction"
_RATE += r"|recommend(?:ed|ation)s?|regarded|reputation|ranked|ranking|stars?\b)"
_CUSTOMER = r"(?:(?:customers?'?s?|consumers?|guests?|users?|overall|quality)[\s-]+)*"
_POUND = r"(?:(?:£|gbp|\u20ac)\s*)"

# Adjectives before the price or rating, or after it and "is", "of", ...
_PRICE_ADJ = {
    "low": r"(?:low(?:er|est)?|below[\s-]average|lower[\s-]than[\s-]average)",
    "middle": r"(?:moderate(?:ly)?|mid(?:dle|dling)?|medium|average|averagely|normal(?:ly)?"
    r"|standard|modest(?:ly)?)",
    "high": r"(?:high(?:er|ly|est)?|above[\s-]average|higher[\s-]than[\s-]average|upper|steep"
    r"|premium)",
}
_RATE_ADJ = {
    "low": r"(?:low(?:er|est|ly)?|poor(?:ly)?|bad(?:ly)?|terribl[ey]|below[\s-]average"
    r"|negative(?:ly)?)",
    "middle": r"(?:average|averagely|mediocre|moderate(?:ly)?|decent(?:ly)?|mid(?:dle|dling)?|fair"
    r"|medium|ok(?:ay)?|satisfactory|mixed)",
    "high": r"(?:high(?:er|ly|est)?|excellent(?:ly)?|great|top|good|well|best|superb|perfect"
    r"|fantastic|outstanding|exceptional|above[\s-]average|positive(?:ly)?|strong)",
}
_NOT_DEAR = r"(?<!not )(?<!not too )(?<!not very )(?<!not so )(?<!less )"
_PRICE_WORD = {
    "low": r"(?<!not )cheap|inexpensive|budget|low[\s-]?cost|bargain|value for money|up to {p}20"
    r"|(?:less|lower|cheaper) than {p}20|(?:under|below|within) {p}20"
    r"|{p}20 or (?:less|under|below)",
    "middle": r"{p}?20s?\s*(?:-|–|to|and|or|through)+\s*{p}?\s*25|mid[\s-]?(?:range|level)\b"
    r"|moderate(?:ly)?\b(?![\s-]*(?:customer|rat|review|scor))",
    "high": _NOT_DEAR + r"expensive|pricey\b|costly|upscale|high[\s-]end"
    r"|(?:more|higher|greater) than {p}30|(?:over|above|upwards of) {p}30"
    r"|{p}30\s*(?:\+|or (?:more|over|above)|and (?:up|over|above|more)|plus)"
    r"|(?:start|starting|begin)\w* (?:at|from) {p}30",
}
_NUMBER = {"low": "(?:1|one)", "middle": "(?:3|three)", "high": "(?:5|five)"}
_NO_COMPARISON = r"(?<!than )(?<!above.)(?<!below.)"
# First letters of the alternatives below. A lookahead for them skips most words of a sentence cheaply.
_STARTS = {
    ("priceRange", "low"): "bcilpuvwg£\u20ac",
    ("priceRange", "middle"): "acmnpsg2£\u20ac",
    ("priceRange", "high"): "abceghmopsu£\u20ac",
    ("rating", "low"): "bfnlprst1o",
    ("rating", "middle"): "adfmorst3",
    ("rating", "high"): "abefghoprstw5",
}
_BY = r"(?:\s+by\s+(?:\w+\s+)?(?:customers|guests|diners|people))?"


def _level_patterns(slot: str) -> dict[str, re.Pattern]:
    out = {}
    for level in ("low", "middle", "high"):
        # "an average price of more than £30" does not state the middle level.
        no_number = r"(?!\s+of\s+(?:\d|£|more|less|one|five))" if level == "middle" else ""
        if slot == "priceRange":
            adj = _PRICE_ADJ[level]
            parts = [
                _PRICE_WORD[level].replace("{p}", _POUND),
                rf"{_NO_COMPARISON}{adj}(?:[\s-]+to[\s-]+\w+)?[\s-]*(?:in\s+)?{_PRICE}{no_number}",
                rf"{_PRICE}{_BE}{adj}\b(?![\s-]*(?:customer|rat|review|quality))",
            ]
            if level != "middle":
                parts.append(rf"{adj}[\s-]+(?:price\s+)?range\b")
        else:
            adj, n = _RATE_ADJ[level], _NUMBER[level]
            parts = [
                rf"{n}\s*(?:stars?\s*)?(?:out\s*)?(?:of|/|in|-)\s*(?:a possible )?(?:5|five)\b",
                rf"(?<!of )(?<!/)(?<!-){n}[\s-]*stars?\b",
                rf"{_NO_COMPARISON}{adj}[\s-]+{_CUSTOMER}{_RATE}{no_number}",
                rf"{_RATE}{_BE}{n}\b",
                rf"{_RATE}{_BY}{_BE}{adj}\b(?![\s-]*(?:pric|cost))",
                rf"{adj}[\s-]+customers?'?s?\b(?![\s-]+{_RATE})",
            ]
        out[level] = _rx(rf"(?<![\w£])(?=[{_STARTS[slot, level]}])(?:{'|'.join(parts)})")
    return out


_FAMILY = r"(?:famil(?:y|ies)|kid(?:s|dies|die|dy)?|child(?:ren)?)(?:'?s)?"
_FAMILY_GROUP = _rx(rf"\b(?=[fkc]){_FAMILY}(?:\W+(?:and|or|with|&)\W+(?:\w+\W+)?{_FAMILY})*\b")
_NOT = _rx(
    r"\b(?:not?|non|nor|never|without|isn'?t|aren'?t|doesn'?t|don'?t|won'?t|wouldn'?t|cannot|can'?t|neither"
    r"|unsuitable|inappropriate|unfriendly|unwelcoming|lacks?|hardly|discourages?|excludes?|prohibits?|un|isnt"
    r"|rather than|anything but|instead of|no)\b"
)
_NOT_AFTER = _rx(
    r"^[\s-]*(?:friendly|dining|orient(?:ated|ed)|customers|atmosphere|environment|it|they|is|are|should|would"
    r"|will|may|be|does|do|probably|[\s-])*(?:not\b|n't|unfriendly|un-friendly|unwelcome|prohibited|free\b|aren'?t|isn'?t"
    r"|forbidden|no\b)"
)
_BREAK = _rx(r"[.;!?,]|\b(?:but|however|though|and|with|yet|which|that is)\b")
_ADULT = _rx(r"\b(?:adults?\b|grown[\s-]?ups?\b|over[\s-]18)")

_FOOD = _rx(
    r"\b(chinese|english|british|fast[\s-]*food|french(?! fries)|indian|italian|japan|sushi)"
)
_FOODS = {
    "chi": "Chinese",
    "eng": "English",
    "bri": "English",
    "fas": "Fast food",
    "fre": "French",
    "ind": "Indian",
    "ita": "Italian",
    "jap": "Japanese",
    "sus": "Japanese",
}
# Strong patterns state a value. Weak patterns can only cover the record's own value.
_STRONG = {
    "eatType": {
        "coffee shop": _rx(r"\bcoff?ee?(?:[\s-]*(?:shop|house|place|bar|store)s?)?\b|\bcaf[eé]\b"),
        "pub": _rx(r"\bpubs?\b|\btavern\b"),
    },
    "priceRange": _level_patterns("priceRange"),
    "rating": _level_patterns("rating"),
    "area": {
        "riverside": _rx(r"\briver(?:[\s-]*(?:side|bank|front))?\b|\bwaterfront\b"),
        "city centre": _rx(
            r"\b(?:city|town)[\s-]*(?:cent|center|central)|\bdowntown\b|\bcentrally\b"
            r"|\b(?:cent(?:re|er)|heart|middle) of (?:the )?(?:city|town)"
        ),
    },
    "near": {restaurants.NEAR: _rx(r"nearx")},
    "name": {restaurants.NAME: _rx(r"namex")},
}
_WEAK = {
    ("eatType", "restaurant"): _rx(
        r"\b(?:restau?rant|eatery|diner\b|dining\b|bistro|eating place|place to eat|establishment)"
    ),
    ("eatType", "pub"): _rx(r"\bbar\b|\binn\b"),
    ("food", "Fast food"): _rx(r"\bburgers?\b|\bfries\b|\bfast\b"),
    ("food", "English"): _rx(r"\bfish and chips\b|\bfull breakfast|\bbreakfast|\broast|\bbeef\b"),
    ("food", "French"): _rx(r"\bwines?\b|\bcheeses?\b|\bcroissant|\bfrance\b"),
    ("food", "Italian"): _rx(r"\bpastas?\b|\bpizzas?\b|\bspaghetti|\bitaly\b|\btuscan"),
    ("food", "Indian"): _rx(r"\bcurr(?:y|ies)\b|\bindia\b|\bspicy"),
    ("food", "Chinese"): _rx(r"\bnoodles?\b|\bdumpling|\bchina\b|\boriental|\bwok"),
    ("area", "city centre"): _rx(r"\bcity\b|\bcent(?:er|re)\b|\bcentral\b"),
    ("area", "riverside"): _rx(r"\briver|\bwater\b"),
    ("rating", "low"): _rx(
        r"\bnot (?:very |highly |well[\s-])*(?:good|recommended|rated|liked)|\bunpopular"
    ),
    ("rating", "middle"): _rx(r"\baverage\b|\b(?:3|three)\b"),
    ("rating", "high"): _rx(r"\bexcellent\b|\brenowned\b|\bpopular\b|\bhighly\b|\b(?:5|five)\b"),
    ("priceRange", "low"): _rx(
        rf"{_POUND}20\b|\blow\b|\breasonab|\baffordab|not (?:\w+ )?expensive"
        r"|\b(?:good|great|fair|small)[\s-]pric"
    ),
    ("priceRange", "middle"): _rx(
        rf"\baverage\b|{_POUND}2[05]|\breasonab|\baffordab|\bmid\b|not (?:\w+ )?expensive"
        r"|\b(?:good|fair|decent)[\s-]pric"
    ),
    ("priceRange", "high"): _rx(rf"{_POUND}30|\bhigh\b|\bhigher\b"),
}


def _family(text: str) -> set[str]:
    stated = set()
    for match in _FAMILY_GROUP.finditer(text):
        before = text[max(0, match.start() - 60) : match.start()]
        clause = _BREAK.split(before)[-1]
        negated = _NOT.search(clause) or _NOT_AFTER.search(text[match.end() : match.end() + 50])
        stated.add("no" if negated else "yes")
    if "yes" not in stated and _ADULT.search(text):
        stated.add("no")
    if "all ages" in text or "all the family" in text:
        stated.add("yes")
    return stated


@functools.lru_cache(maxsize=65536)
def stated(text: str) -> dict[str, frozenset[str]]:
    """The values (levels for priceRange and rating) of each slot that a delexicalized text states."""
    low = text.lower()
    out = {slot: {v for v, p in ps.items() if p.search(low)} for slot, ps in _STRONG.items()}
    out["food"] = {_FOODS[m[:3]] for m in _FOOD.findall(low)}
    out["familyFriendly"] = _family(low)
    return {slot: frozenset(values) for slot, values in out.items()}


def _repeats(text: str) -> bool:
    words = text.lower().split()
    grams = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return len(set(grams)) < len(grams) or text.count(restaurants.NEAR) > 2


_END = _rx(r"[.!?][\"')]?\s*$")
_GARBAGE = _rx(r"[<>\[\]{}|\ufffd]")


def _fragments(text: str) -> bool:
    return text.count("NAM") != text.count(restaurants.NAME) or text.count("NEAR") != text.count(
        restaurants.NEAR
    )


def _defects(text: str) -> tuple[str, ...]:
    found = []
    if not _END.search(text[-4:]):
        found.append("no final punctuation")
    if _repeats(text):
        found.append("repetition")
    if len(text) > MAX_CHARS or _GARBAGE.search(text) or _fragments(text):
        found.append("garbage")
    return tuple(found)


def score(record: dict[str, str], text: str) -> Score:
    """Compare a delexicalized text with its record, by the rules in the module's docstring."""
    says = stated(text)
    low = text.lower()
    covered, missing, invented = [], [], []
    for slot in restaurants.SLOTS:
        want = record.get(slot)
        level = LEVELS.get(slot, {}).get(want, want)
        values = says.get(slot, frozenset())
        if want is not None:
            weak = _WEAK.get((slot, level))
            hit = level in values or (not values and weak is not None and weak.search(low))
            (covered if hit else missing).append(slot)
        invented += [f"{slot}={v}" for v in sorted(values) if v != level]
    defects = _defects(text)
    n = len(record)
    value = (len(covered) - len(invented) - DEFECT_COST * len(defects)) / n
    return Score(tuple(covered), tuple(missing), tuple(invented), defects, len(covered) / n, value)


@functools.lru_cache(maxsize=4096)
def _record(prompt: str) -> dict[str, str]:
    return restaurants.parse_prompt(prompt)


def score_prompt(prompt: str, text: str) -> Score:
    """:func:`score` for a prompt string (``<name=NAMEX>...<say>``) instead of a record."""
    return score(_record(prompt), text)


def rank(record: dict[str, str], completions: list[str]) -> list[int]:
    """Ranks of `completions`, 1 = best; equal values share a rank."""
    values = [round(score(record, text).value, 9) for text in completions]
    return [1 + sum(other > value for other in values) for value in values]


def validate(demonstrations: list[dict], rankings: list[dict]) -> dict[str, float]:
    """Measure the labeler against people.

    Args:
        demonstrations: rows with "record" and the human reference "completion".
        rankings: human rankings with "record", "completions", "ranks" and "criterion".

    Returns:
        ``references/coverage``, ``references/invented`` (values per sentence) and ``references/value``: means
        over the human references. ``decided/<criterion>``: share of strictly ranked human pairs that the
        labeler does not tie. ``agreement/<criterion>``: share of those that it orders as the rater does.
    """
    out: dict[str, float] = {}
    scores = [score(r["record"], r["completion"]) for r in demonstrations]
    if scores:
        slots = sum(len(r["record"]) for r in demonstrations)
        out["references/coverage"] = sum(len(s.covered) for s in scores) / slots
        out["references/invented"] = sum(len(s.invented) for s in scores) / len(scores)
        out["references/value"] = sum(s.value for s in scores) / len(scores)
    tally: dict[str, list[int]] = {}
    for row in rankings:
        ours = rank(row["record"], row["completions"])
        theirs = row["ranks"]
        agree, decided, strict = tally.setdefault(row["criterion"], [0, 0, 0])
        for i in range(len(ours)):
            for j in range(i):
                if theirs[i] == theirs[j]:
                    continue
                strict += 1
                if ours[i] != ours[j]:
                    decided += 1
                    agree += (ours[i] < ours[j]) == (theirs[i] < theirs[j])
        tally[row["criterion"]] = [agree, decided, strict]
    for criterion, (agree, decided, strict) in sorted(tally.items()):
        out[f"agreement/{criterion}"] = agree / decided if decided else float("nan")
        out[f"decided/{criterion}"] = decided / strict if strict else float("nan")
    return out


def main() -> None:
    """Print the labeler's agreement with people: ``python -m fastrlhf.demo.labeler``."""
    import gzip
    import json
    from pathlib import Path

    data = Path(__file__).parent / "data"
    rows = {}
    for name in ("demonstrations_train", "rankings_human"):
        with gzip.open(data / f"{name}.jsonl.gz", "rt", encoding="utf-8") as f:
            rows[name] = [json.loads(line) for line in f]
    for key, value in validate(rows["demonstrations_train"], rows["rankings_human"]).items():
        print(f"{key:32s} {value:.3f}")


if __name__ == "__main__":
    main()
