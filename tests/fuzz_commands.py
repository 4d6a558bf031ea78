"""Random command lines, odd ones included, in this process: `make fuzz`.

    python tests/fuzz_commands.py [--commands 500] [--seed 0] [--only SEED]

A command line is drawn from one number, which is printed with a finding; `--only` repeats it. It is a valid short run
in which one to three options, or one input file, are replaced by something that a user might give by mistake.

The oracle: the command ends with status 0 and its results exist; or with status 2 and one line on stderr that names
the command, and then it has left no new file. It raises nothing, takes at most TIME seconds, prints no terminal escape,
and no input changes.
"""

import argparse
import collections
import contextlib
import dataclasses
import gzip
import io
import os
import shutil
import signal
import sys
import time
import typing
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import yaml
from accelerate.state import AcceleratorState

from _support import tiny
from fastrlhf import cli
from fastrlhf.train.config import plain

TIME = 60  # seconds: a run that ends takes about one
QUICK = {
    "pretrain": {"steps": 1, "batch": 2, "context": 16},
    "sft": {"epochs": 0.3, "batch": 8},
    "reward": {"epochs": 1, "batch": 8},
    "ppo": {"iterations": 1, "warmup_iterations": 0, "max_new_tokens": 4},
    "eval": {},
    "report": {},
}
TEXTS = (
    "", " ", "x", "null", "true", "nan", "inf", "-inf", "-1", "0", "1", "0.5", "1e-4", "1e400",
    "99999999999999999999", "-1e308", "[1, 2]", "[]", "{}", "{a: 1}", "[/INST]", "[bold]x[/bold]",
    "\x1b[31mred", "a\nb", "é", "\udc80", "..", "/", "/dev/null", "/nonexistent/x", "~", "--", "-",
    "!!python/object:os.system", "&a [*a]", "'", '"', "%s", "{0}", "$HOME", "*" * 5000,
)  # fmt: skip
# Mostly of the right type: the edges of each number, and sizes that no memory holds.
INTEGERS = (
    "-1",
    "0",
    "1",
    "2",
    "3",
    "7",
    "99999999999999999999",
    "9223372036854775807",
    "4294967296",
)
# With a large number these are what they ask for: a long run.
LONG = {"steps", "epochs", "iterations", "inner_epochs", "samples", "max_new_tokens"}
NUMBERS = ("-1.0", "0.0", "1e-9", "1e-300", "0.5", "1.0", "3", "1e30", "1e308", "1e-7")


class World:
    """A folder of valid inputs, and the valid options of each command."""

    def __init__(self):
        self.inputs, self.out = tiny.folder(), tiny.folder() / "fuzz-out"
        policy = tiny.base()
        configs = {
            "sft": tiny.sft_config("fuzz"),
            "reward": tiny.reward_config("fuzz"),
            "ppo": tiny.ppo_config("fuzz"),
        }
        options = {name: changed(config) for name, config in configs.items()}
        options["pretrain"] = {
            **tiny.QUIET,
            "text": str(self.inputs / "text.txt"),
            "vocab_size": 300,
            "hidden_size": 16,
            "intermediate_size": 32,
            "layers": 1,
            "heads": 2,
        }
        options["eval"] = {
            "model": policy,
            "text": str(self.inputs / "text.txt"),
            "rankings": str(self.inputs / "rankings.jsonl"),
            "prompts": str(self.inputs / "prompts.jsonl"),
            "reward_model": tiny.reward_model(),
            "max_new_tokens": 4,
            "limit": 2,
            "device": "cpu",
        }
        options["report"] = {"run": policy}
        self.options = {name: found | QUICK[name] for name, found in options.items()}
        for name, found in self.options.items():
            if name != "report":
                found["out"] = str(self.out / ("result.json" if name == "eval" else "run"))
        self.fields = {name: fields_of(name) for name in self.options}

    def empty(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()

    def state(self) -> dict[Path, bytes]:
        """The content of each input file."""
        return {
            path: path.read_bytes()
            for path in sorted(self.inputs.rglob("*"))
            if path.is_file() and self.out not in path.parents
        }

    def restore(self, before: dict[Path, bytes], after: dict[Path, bytes]) -> list[str]:
        """Undo all changes of inputs; return their names."""
        names = [k for k in before.keys() | after.keys() if before.get(k) != after.get(k)]
        for path in names:
            path.unlink(missing_ok=True)
            if path in before:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(before[path])
        return sorted(path.name for path in names)


def fields_of(command: str) -> dict[str, object]:
    """Option -> its type."""
    entry = cli.COMMANDS[command]
    module = __import__(entry.module, fromlist=[entry.config])
    return typing.get_type_hints(getattr(module, entry.config))


def changed(config) -> dict:
    """The settings that differ from their defaults."""
    return {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if getattr(config, f.name) != f.default and f.name != "out"
    }


def damaged(path: Path, folder: Path, rng) -> Path:
    """A copy of an input file, or of a folder with one file of it, damaged in one of several ways."""
    target = folder / path.name
    if path.is_dir():
        shutil.copytree(path, target)
        files = sorted(p for p in target.rglob("*") if p.is_file())
        inner = files[rng.integers(len(files))]
    else:
        shutil.copy(path, target)
        inner = target
    data = inner.read_bytes()
    cut = int(rng.integers(len(data) + 1))
    kind = rng.integers(9)
    if kind == 0:
        inner.unlink()
    elif kind == 1:
        inner.unlink()
        inner.mkdir()
    else:
        noise = rng.integers(0, 256, 40, dtype=np.uint8).tobytes()
        changes = (
            b"",
            data[:cut],
            data[:cut] + noise + data[cut:],
            noise,
            data.replace(b'"', b"", 1),
            data.replace(b":", b": [", 1),
            data + b'\n{"prompt": 3}\n[1]\nnull\n',
        )
        inner.write_bytes(changes[kind - 2])
    if target.is_file() and target.suffix == ".jsonl" and rng.random() < 0.3:
        body = gzip.compress(target.read_bytes())
        target = target.with_suffix(".jsonl.gz")
        target.write_bytes(body[: rng.integers(len(body) + 1)])
    return target


def text_of(value) -> str:
    return (
        yaml.safe_dump(plain(value), default_flow_style=True, width=10**9).split("\n...")[0].strip()
    )


def float_of(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def wrong_value(hint, rng) -> str:
    """A value for an option of this type, mostly one that parses."""
    kinds = typing.get_args(hint) or (hint,)
    values = TEXTS
    if rng.random() < 0.8:
        if bool in kinds:
            values = ("true", "false")
        elif int in kinds:
            values = INTEGERS
        elif float in kinds:
            values = NUMBERS
        elif typing.get_origin(hint) is typing.Literal:
            values = tuple(map(str, kinds))
    return values[rng.integers(len(values))]


def draw(world: World, seed: int) -> list[str]:
    """A command line; files that belong to it are under world.out."""
    rng = np.random.default_rng(seed)
    names = sorted(world.options)
    command = names[rng.integers(len(names))]
    options = dict(world.options[command])
    fields = world.fields[command]
    kind = rng.random()
    if kind < 0.3:  # an input file
        paths = [k for k, v in options.items() if isinstance(v, str) and Path(v).exists()]
        if paths:
            key = paths[rng.integers(len(paths))]
            folder = world.out / "in"
            folder.mkdir()
            options[key] = str(damaged(Path(options[key]), folder, rng))
    elif kind < 0.9:
        for _ in range(rng.integers(1, 4)):
            key = sorted(fields)[rng.integers(len(fields))]
            if rng.random() < 0.15:
                options.pop(key, None)
            else:
                options[key] = wrong_value(fields[key], rng)
                if key == "out":
                    options[key] = f"{world.out}/{options[key]}"
                if key in LONG and float_of(options[key]) > 100:
                    options[key] = "3"
    if rng.random() < 0.1:  # an input as the output
        inputs = [v for v in options.values() if isinstance(v, str) and world.inputs.name in v]
        if inputs and "out" in fields:
            options["out"] = inputs[rng.integers(len(inputs))]
            options["overwrite"] = True
    if rng.random() < 0.25 and options.get("out", "x").isprintable():
        file = world.out / "config.yaml"
        first = f"out: {options.pop('out')}\n" if "out" in options else ""  # never cut
        try:
            text = yaml.safe_dump(plain(options), allow_unicode=True, width=10**9)
            cut = rng.integers(len(text)) if rng.random() < 0.4 else len(text)
            file.write_text(first + text[:cut])
            return [command, "--config", str(file)]
        except (UnicodeEncodeError, yaml.YAMLError):
            pass
    line = [command]
    for key, value in options.items():
        line += [f"--{key}={value if isinstance(value, str) else text_of(value)}"]
    if rng.random() < 0.05:
        line.insert(int(rng.integers(1, len(line) + 1)), TEXTS[rng.integers(len(TEXTS))])
    return line


class TooLong(BaseException):
    """Raised by the alarm: no handler of the program catches it."""


def run(line: list[str]) -> tuple[int | str, str, str]:
    """(status or what was raised, stdout, stderr) of a command line."""
    out, err = io.StringIO(), io.StringIO()

    def alarm(*_):
        raise TooLong

    before = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(TIME)
    AcceleratorState._reset_state(
        reset_partial_state=True
    )  # one run after another may differ in precision
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.main(line)
    except SystemExit as error:
        status = f"SystemExit({error.code})"
    except TooLong:
        status = f"no end within {TIME} s"
    except Exception as error:
        status = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return status, out.getvalue(), err.getvalue()


def finding(world: World, line: list[str], before: dict[Path, bytes]) -> tuple[str, str]:
    """(kind of outcome, why it is a fault or "") of a command line."""
    present = set(world.out.rglob("*"))
    status, out, err = run(line)
    after = world.state()
    if after != before:
        return "inputs", f"changed inputs: {world.restore(before, after)[:3]}"
    if "\x1b" in out + err:
        return "text", "prints a terminal escape"
    if status == 0:
        results = set(world.out.rglob("*")) - present
        return "done", "" if results or line[0] == "eval" else "no result"
    if status != 2:
        return "raised", str(status)
    lines = err.strip().splitlines()
    if len(lines) != 1 or not lines[0].startswith(f"fastrlhf {line[0]}: error: "):
        return "refused", f"expected one line on stderr, got {err[-300:]!r}"
    new = sorted(str(p.relative_to(world.out)) for p in set(world.out.rglob("*")) - present)
    if (
        new and " step " not in err and " iteration " not in err
    ):  # a run that had begun keeps its logs
        return "refused", f"left {new[:3]} after {lines[0][-200:]!r}"
    return "refused", ""


def fuzz(commands: int, seed: int, say=print) -> list[str]:
    """Check `commands` command lines; return the findings, one line each."""
    warnings.simplefilter("ignore")
    world = World()
    before = world.state()
    findings, counts = [], collections.Counter()
    started = time.perf_counter()
    for number in range(seed, seed + commands):
        world.empty()
        line = draw(world, number)
        kind, why = finding(world, line, before)
        counts[kind] += 1
        if why:
            shown = " ".join(repr(part)[:120] for part in line)
            findings.append(f"--only {number}: {shown}: {why}")
            say(findings[-1].encode("utf-8", "backslashreplace").decode(), flush=True)
    seconds = time.perf_counter() - started
    told = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))
    say(f"{commands} command lines ({told}) in {seconds:.0f} s, {len(findings)} findings")
    return findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commands", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="the first one; -1: a fresh one")
    parser.add_argument("--only", type=int, help="repeat one command line with its output")
    chosen = parser.parse_args()
    if chosen.only is not None:
        world = World()
        world.empty()
        line = draw(world, chosen.only)
        print(ascii(line))
        status, out, err = run(line)
        print(ascii(out[-2000:]), ascii(err[-2000:]), status, sep="\n")
        return 0
    first = chosen.seed if chosen.seed >= 0 else time.time_ns() % 2**40
    return bool(fuzz(chosen.commands, first))


if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")
    sys.exit(main())
