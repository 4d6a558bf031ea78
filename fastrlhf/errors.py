"""The error a user caused, and the helpers that word its message."""

import difflib
import unicodedata
from collections.abc import Iterable

# Bidirectional classes of the characters that change the order of the text after them.
_REORDERING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


class UserError(Exception):
    """Bad input to a stage or a command: the CLI prints it as one line and exits with status 2.

    The message names what was wrong, what was expected and what came. Programming errors must not
    use it: they keep their traceback.
    """


def nearest(name: str, options: Iterable[str]) -> str | None:
    """Return the option closest in spelling to `name`, or None when nothing is close."""
    found = difflib.get_close_matches(name, list(options), n=1, cutoff=0.6)
    return found[0] if found else None


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the nearest option, or an empty string."""
    best = nearest(name, options)
    return f"; did you mean '{best}'?" if best else ""


def printable(text: object) -> str:
    """`text` without characters that a terminal would obey or cannot print; newlines and tabs are kept.

    Control characters, bidirectional overrides and the bytes of a path that is not UTF-8 become escapes such as
    ``\\x1b``. Data, models and paths may hold any of them.
    """
    return "".join(
        c.encode("unicode_escape").decode("ascii")
        if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" or _reorders(c)
        else c
        for c in str(text)
    )


def counted(number: int, noun: str) -> str:
    """Return such as "1 step" or "2 steps"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _reorders(character: str) -> bool:
    return unicodedata.bidirectional(character) in _REORDERING
