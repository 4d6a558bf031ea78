"""The command line: fastrlhf <command> [--config file.yaml] [--section name] [--key value ...].

Exit status: 0 done, 2 bad input (one line on stderr, nothing written), 130 interrupted. A
programming error keeps its traceback. Only the chosen command's module is imported, so that help
is immediate.
"""

import dataclasses
import importlib
import os
import sys
import typing
from typing import NamedTuple

from fastrlhf.errors import UserError, did_you_mean


class Command(NamedTuple):
    module: str  # holds the config dataclass and main(cfg)
    config: str
    help: str


COMMANDS = {
    "demo": Command("fastrlhf.demo.run", "DemoConfig", "align the shipped tiny model, end to end"),
    "pretrain": Command(
        "fastrlhf.train.stages.pretrain", "PretrainConfig", "train a language model"
    ),
    "sft": Command("fastrlhf.train.stages.sft", "SFTConfig", "fine-tune on demonstrations"),
    "reward": Command(
        "fastrlhf.train.stages.reward", "RewardConfig", "train a reward model on rankings"
    ),
    "ppo": Command(
        "fastrlhf.train.stages.ppo", "PPOConfig", "PPO, or PPO-ptx with a pretraining mix"
    ),
    "eval": Command("fastrlhf.evals", "EvalConfig", "evaluate trained models"),
    "report": Command("fastrlhf.report", "ReportConfig", "write the report of a run"),
    "bench": Command("fastrlhf.bench", "BenchConfig", "time the ops on this machine"),
    "doctor": Command("fastrlhf.doctor", "DoctorConfig", "what works on this machine, and why not"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastrlhf <command> [--config file.yaml] [--section name] [--key value ...]",
            "",
            *lines,
            "",
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
    """Run one command; UserError for everything the user can mend."""
    from fastrlhf.train import config

    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    config_class = getattr(module, command.config)
    if "-h" in arguments or "--help" in arguments:
        config.option_parser(config_class, f"fastrlhf {name}").print_help()
        return 0
    options = parse_options(arguments, config_class)
    file, section = options.pop("config", None), options.pop("section", None)
    result = module.main(config.load(config_class, name, file, options, variant=section))
    return result if isinstance(result, int) else 0


def dispatch(arguments: list[str]) -> int:
    """Answer --help and --version, or run the command that `arguments` begin with."""
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
    """Entry point of the `fastrlhf` command; returns the exit status."""
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
            # The reader of our output left (`fastrlhf doctor | head`); nothing more can be said to it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        # A full disk, a folder that may not be written: the user's to mend, like bad input.
        print(f"{prefix}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prefix}: interrupted", file=sys.stderr)
        return 130
