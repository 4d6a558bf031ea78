"""The command line: fastrlhf <command> [--config file.yaml] [--section name] [--key value ...].

Exit status: 0 done, 2 bad input (one line on stderr, nothing written), 130 interrupted. A
programming error keeps its traceback. Only the module of the chosen command is imported, so help
prints at once.
"""

import dataclasses
import importlib
import os
import sys
import typing
from typing import NamedTuple, NoReturn

from fastrlhf import extras
from fastrlhf.errors import UserError, did_you_mean


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


def run(name: str, arguments: list[str]) -> int:
    """Run one command; UserError for everything the user can fix."""
    command = COMMANDS[name]
    wants_help = "-h" in arguments or "--help" in arguments
    if command.extra:
        extras.require(command.extra)
    module = importlib.import_module(command.module)
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
        print(f"{prefix}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            # The reader closed the pipe (`fastrlhf doctor | head`). Redirect stdout so that the
            # interpreter's flush at exit does not raise again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        # A full disk or missing permission: the user can fix it, like bad input.
        print(f"{prefix}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prefix}: interrupted", file=sys.stderr)
        return 130


def end(status: int) -> NoReturn:
    """End the process. A rank of a run of several processes skips the interpreter's shutdown.

    During that shutdown a thread of a process group that still frees a tensor is killed inside C++ ("terminate called
    without an active exception"), and torchrun reports a run as failed that had succeeded. `Run.finish` has written
    and closed every file by then.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not (distributed.is_available() and distributed.is_initialized()):
        sys.exit(status)
    distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def program() -> NoReturn:
    """Run the command line of this process; the entry point of `fastrlhf` and `python -m fastrlhf`."""
    end(main())
