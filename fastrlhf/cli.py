"""The command line: fastrlhf <command> [--config file.yaml] [--section name] [--key value ...].

Exit status: 0 done, 2 bad input (one line on stderr, nothing written), 130 interrupted. A
programming error keeps its traceback. Only the module of the chosen command is imported, so help
prints at once.
"""

import contextlib
import dataclasses
import gc
import importlib
import os
import sys
import time
import typing
from typing import NamedTuple, NoReturn

from fastrlhf import extras
from fastrlhf.errors import UserError, did_you_mean, printable


class Command(NamedTuple):
    """A command and the module that runs it.

    A command with an extra has a config dataclass, and its module defines `main(cfg)`. A command of the base install
    uses the standard library alone: its module defines `USAGE` and `main(arguments)`.
    """

    module: str
    config: str
    extra: str
    help: str


COMMANDS = {
    "doctor": Command("fastrlhf.doctor", "", "", "show what works on this machine, and why not"),
    "bench": Command("fastrlhf.bench", "", "", "time the ops (needs a clone of the repository)"),
    "pretrain": Command(
        "fastrlhf.train.stages.pretrain", "PretrainConfig", "train", "train a language model"
    ),
    "sft": Command(
        "fastrlhf.train.stages.sft", "SFTConfig", "train", "fine-tune on demonstrations"
    ),
    "reward": Command(
        "fastrlhf.train.stages.reward",
        "RewardConfig",
        "train",
        "train a reward model on rankings",
    ),
    "ppo": Command(
        "fastrlhf.train.stages.ppo",
        "PPOConfig",
        "train",
        "PPO, or PPO-ptx with a pretraining mix",
    ),
    "eval": Command("fastrlhf.evals", "EvalConfig", "eval", "evaluate trained models"),
    "report": Command("fastrlhf.report", "ReportConfig", "report", "write the report of a run"),
    "demo": Command(
        "fastrlhf.demo.run", "DemoConfig", "demo", "align the shipped tiny model, end to end"
    ),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [
        f"  {name:<{width}}  {command.help}" + f" [{command.extra}]" * bool(command.extra)
        for name, command in COMMANDS.items()
    ]
    return "\n".join(
        [
            "usage: fastrlhf <command> [--config file.yaml] [--section name] [--key value ...]",
            "",
            *lines,
            "",
            f"[extra]: the command needs it: {extras.how_to_install('extra')}",
            "fastrlhf <command> --help lists the command's options; --config takes a YAML file or",
            "the name of a shipped recipe (quickstart, instructgpt_paper, h200).",
        ]
    )


def parse_options(arguments: list[str], config_class: type) -> dict[str, str]:
    """Split `--key value`, `--key=value` and bare boolean `--key` into text by key."""
    known = {f.name for f in dataclasses.fields(config_class)} | {"config", "section"}
    hints = typing.get_type_hints(config_class)
    options, rest = {}, list(arguments)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--") or token == "--":
            raise UserError(f"unexpected argument '{token}'; options are given as --key value")
        flag, equals, value = token[2:].partition("=")
        key = flag.replace("-", "_")
        if key not in known:
            raise UserError(f"unknown option '--{flag}'{did_you_mean(key, known)}")
        if not equals:
            if rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            elif hints.get(key) is bool:
                value = "true"
            else:
                raise UserError(f"--{flag}: expected a value, got none")
        options[key] = value
    return options


def load(module: str):
    """Import a module. Without the garbage collector, which would walk the growing imports again and again: a fifth
    of the time of `fastrlhf sft --help`."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(module)
    finally:
        if collects:
            gc.enable()


def run(name: str, arguments: list[str]) -> int:
    """Run one command; UserError for everything the user can fix."""
    command = COMMANDS[name]
    wants_help = "-h" in arguments or "--help" in arguments
    if command.extra:
        extras.require(command.extra)
    module = load(command.module)
    if not command.config:
        if wants_help:
            print(module.USAGE)
            return 0
        return module.main(arguments)
    from fastrlhf.train import config

    config_class = getattr(module, command.config)
    if wants_help:
        config.option_parser(config_class, f"fastrlhf {name}").print_help()
        return 0
    options = parse_options(arguments, config_class)
    file, section = options.pop("config", None), options.pop("section", None)
    result = module.main(config.load(config_class, name, file, options, variant=section))
    return result if isinstance(result, int) else 0


def dispatch(arguments: list[str]) -> int:
    """Run the command that `arguments` start with, or answer --help and --version."""
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name == "--version":
        from fastrlhf import __version__

        print(f"fastrlhf {__version__}")
        return 0
    if name not in COMMANDS:
        raise UserError(f"unknown command '{name}'{did_you_mean(name, COMMANDS)}")
    return run(name, arguments[1:])


def main(argv: list[str] | None = None) -> int:
    """Run a command line, by default that of this process; return the exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    command = arguments[0] if arguments and arguments[0] in COMMANDS else ""
    prefix = f"fastrlhf {command}".rstrip()
    try:
        status = dispatch(arguments)
        sys.stdout.flush()
        return status
    except UserError as error:
        return _refuse(prefix, error)
    except RuntimeError:
        # A collective fails when another rank ends: repeat what that rank has said.
        if (line := _said_by_another_rank()) is None:
            raise
        print(line, file=sys.stderr)
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            # The reader closed the pipe (`fastrlhf doctor | head`). Redirect stdout so that the
            # interpreter's flush at exit does not raise again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        # A full disk or missing permission: the user can fix it, like bad input.
        return _refuse(prefix, error)
    except KeyboardInterrupt:
        print(f"{prefix}: interrupted", file=sys.stderr)
        return 130


def _refuse(prefix: str, error: Exception) -> int:
    line = f"{prefix}: error: {' '.join(printable(error).split())}"
    print(line, file=sys.stderr)
    if (ranks := _ranks()) is not None:
        store = ranks.distributed_c10d._get_default_store()
        with contextlib.suppress(RuntimeError):  # the store has ended with its rank
            store.set(_SAID, f"{line} (rank {ranks.get_rank()})")
            store.add(_ENDING, 1)
    return 2


# Keys in the store of a run of several processes: a failed rank's line, how many ranks have printed one, and how many
# use the store no more.
_SAID, _ENDING, _LEFT = "fastrlhf/said", "fastrlhf/ending", "fastrlhf/left"
_PATIENCE = 5.0  # seconds that a failed rank gives the others to repeat its line


def _ranks():
    """torch.distributed, if this process is a rank of a run of several."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not (distributed.is_available() and distributed.is_initialized()):
        return None
    return distributed


def _said_by_another_rank() -> str | None:
    if (ranks := _ranks()) is None:
        return None
    store = ranks.distributed_c10d._get_default_store()
    try:
        if not store.check([_SAID]):
            return None
        line = store.get(_SAID).decode()
        store.add(_ENDING, 1)
        return line
    except RuntimeError:  # the store has ended with its rank
        return None


def end(status: int) -> NoReturn:
    """End the process. A rank of a run of several processes skips the interpreter's shutdown.

    During that shutdown a thread of a process group that still frees a tensor is killed inside C++ ("terminate called
    without an active exception"), and torchrun reports a run as failed that had succeeded. `Run.finish` has written
    and closed every file by then.
    """
    if (ranks := _ranks()) is None:
        sys.exit(status)
    store = ranks.distributed_c10d._get_default_store()
    rank, world = ranks.get_rank(), ranks.get_world_size()
    ranks.destroy_process_group()  # the collective that the others wait in fails
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        _wait(store, rank, world)
    os._exit(status)


def _wait(store, rank: int, world: int) -> None:
    """Stay until all ranks have printed their line. Rank 0, whose process may hold the store, leaves last.

    A rank that asks the store while it ends gets a report of C++ on stderr, beside the line that a user should read.
    """
    deadline = time.monotonic() + _PATIENCE

    def reached(key: str, count: int) -> None:
        while store.add(key, 0) < count and time.monotonic() < deadline:
            time.sleep(0.05)

    with contextlib.suppress(RuntimeError):
        if store.check([_SAID]):
            reached(_ENDING, world)
            if rank:
                store.add(_LEFT, 1)
            else:
                reached(_LEFT, world - 1)


def program() -> NoReturn:
    """Run the command line of this process; the entry point of `fastrlhf` and `python -m fastrlhf`."""
    # OpenMP reads these when torch loads. Threads that spin while they wait take the cores from other processes and
    # from each other. A short spin before they sleep spares a quiet machine most of the cost of waking them.
    # benchmarks/waiting.py measures both on two cores: alone, no spin costs 45 % and 1000 rounds 13 %; beside one busy
    # process an iteration takes 1.3 and 1.9 times as long, with the default 3.3 times and more.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    sys.stdout.reconfigure(errors="backslashreplace")  # a path or a text may not fit the encoding
    end(main())
