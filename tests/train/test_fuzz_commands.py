"""The oracle of `make fuzz` sees each kind of fault of a command line."""

import pytest

import fuzz_commands
from fastrlhf import cli
from fastrlhf.errors import UserError


@pytest.fixture(scope="module")
def world():
    return fuzz_commands.World()


def outcome(world, monkeypatch, command):
    """What the oracle says of `fastrlhf sft` when `command` runs in its place."""

    def run(name, arguments):
        return command(world)

    monkeypatch.setattr(cli, "run", run)
    world.empty()
    return fuzz_commands.finding(world, ["sft"], world.state())


def refuse(world):
    raise UserError("model: expected a path, got nothing")


def leave_a_file(world):
    (world.out / "half").mkdir()
    refuse(world)


def raise_another(world):
    raise RuntimeError("shapes")


def change_an_input(world):
    path = world.inputs / "text.txt"
    path.write_text(path.read_text() + "x")
    refuse(world)


def print_an_escape(world):
    print("\x1b[31mred")
    refuse(world)


def print_more(world):
    import sys

    print("a warning", file=sys.stderr)
    refuse(world)


def do_nothing(world):
    return 0


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (refuse, ""),
        (leave_a_file, "left ['half']"),
        (raise_another, "RuntimeError: shapes"),
        (change_an_input, "changed inputs: ['text.txt']"),
        (print_an_escape, "terminal escape"),
        (print_more, "expected one line"),
        (do_nothing, "no result"),
    ],
)
def test_a_fault_is_found(world, monkeypatch, command, words):
    before = world.state()
    _, why = outcome(world, monkeypatch, command)
    assert (words in why) if words else why == ""
    assert world.state() == before
