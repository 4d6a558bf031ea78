"""Records which families of models the trainer serves with the installed transformers.

    python tests/zoo.py [family ...]

Judges each family on a tiny random-weight model (tests/_support/zoo.py), and writes the verdicts to
docs/families.json and the table to docs/families.md. With names it prints their verdicts and writes nothing.
"""

import contextlib
import io
import json
import sys

from _support import zoo


def main() -> int:
    names = sys.argv[1:] or list(zoo.FAMILIES)
    verdicts, wrong = {}, 0
    for name in names:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                verdicts[name] = zoo.judge(name)
            print(f"{name}: {verdicts[name]}", flush=True)
        except Exception as error:  # neither right nor refused
            wrong += 1
            print(f"{name}: WRONG: {type(error).__name__}: {error}", flush=True)
    if wrong or sys.argv[1:]:
        return bool(wrong)
    record = {**zoo.recorded(), zoo.version(): verdicts}
    zoo.RECORD.write_text(json.dumps(record, indent=1) + "\n")
    page = zoo.PAGE.read_text()
    begin, end = (page.index(mark) for mark in zoo.MARKS)
    table = zoo.table(record)
    zoo.PAGE.write_text(page[: begin + len(zoo.MARKS[0])] + "\n" + table + page[end:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
