"""The error a user caused, and the helper that suggests what was meant."""

import difflib
from collections.abc import Iterable


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
