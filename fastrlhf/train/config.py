"""Configurations: one flat dataclass per command, filled from a YAML file and command-line overrides.

A file holds the keys of one command, or sections named after commands (`sft:`, `reward:`) and variants of them
(`rl_init:`, chosen with `--section rl_init`). jsonargparse checks the types. Every mistake of the user raises a
UserError of one line that names the place, the expected value and the given one.
"""

import dataclasses
import inspect
import io
import math
import os
import re
import reprlib
import textwrap
import tokenize
import types
import typing
from collections.abc import Mapping
from pathlib import Path

import yaml

from fastrlhf.errors import UserError, did_you_mean
from fastrlhf.train.files import replace_text


class _Loader(yaml.SafeLoader):
    """SafeLoader that parses 1e-4 as a number and leaves 2026-01-31 as text."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if not tag.endswith(("float", "timestamp"))
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?$|[-+]?\.inf$|\.nan$"),
    list("-+.0123456789"),
)


# Beyond these a file is no configuration, and its aliases may expand without bound.
_MAX_CHARACTERS, _MAX_VALUES = 1 << 20, 10_000


def recipe_path(name: str) -> Path:
    """Path of the shipped recipe `name`, e.g. "quickstart"; UserError if there is none."""
    here = Path(__file__).resolve().parents[1]
    # The recipes are inside an installed package, and beside the package in a checkout.
    folder = next((f for f in (here / "recipes", here.parent / "recipes") if f.is_dir()), None)
    names = sorted(f.stem for f in folder.glob("*.yaml")) if folder else []
    if name not in names:
        raise UserError(
            f"config '{name}': no shipped recipe of this name (there are: {', '.join(names)})"
            f"{did_you_mean(name, names)}; to read a file, give a path that ends in .yaml"
        )
    return folder / f"{name}.yaml"


def read_section(file: str, command: str, section: str | None = None) -> tuple[dict, dict, Path]:
    """Read the keys meant for `command` from a YAML file or shipped recipe.

    Returns:
        (values by key, line number by key, path of the file).

    Raises:
        UserError: missing or unreadable file, malformed YAML, duplicate key, no such section.
    """
    bare = not file.endswith((".yaml", ".yml")) and os.sep not in file
    path = recipe_path(file) if bare else Path(file)
    try:
        with open(path, encoding="utf-8") as opened:
            text = opened.read(_MAX_CHARACTERS + 1)
    except FileNotFoundError:
        raise UserError(f"config {path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"config {path}: cannot be read ({error})") from None
    if len(text) > _MAX_CHARACTERS:
        raise UserError(f"config {path}: longer than {_MAX_CHARACTERS} characters")
    try:
        root = yaml.compose(text, Loader=_Loader)
        if _expanded_size(root) > _MAX_VALUES:
            raise UserError(f"{path}: more than {_MAX_VALUES} values, its aliases expanded")
        document = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = (error.problem_mark or error.context_mark).line + 1
        raise UserError(f"{path}, line {line}: malformed YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, TypeError, LookupError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: malformed YAML: {reason}") from None
    if document is None:
        document, root = {}, None
    if not isinstance(document, dict):
        got = type(document).__name__
        raise UserError(f"{path}: expected 'key: value' lines or sections, got a {got}")
    lines = _key_lines(root, path)
    sections = [key for key, value in document.items() if isinstance(value, dict)]
    wanted = section or command
    if section is None and command not in document:
        if not sections or len(sections) < len(document):
            return document, lines, path
    if wanted not in document:
        raise UserError(
            f"{path}: no section '{wanted}' (there are: {', '.join(sections) or 'none'})"
            f"{did_you_mean(wanted, sections)}"
        )
    for key, value in document.items():
        if value is not None and not isinstance(value, dict):
            raise UserError(
                f"{path}, line {lines.get(key, '?')}: key '{key}' is outside every section"
            )
    node = next((value for key, value in root.value if key.value == wanted), None)
    return document[wanted] or {}, _key_lines(node, path), path


def _expanded_size(root: yaml.Node | None) -> float:
    """Number of values in a YAML document, with every alias counted as what it names; infinite for a cycle."""
    sizes: dict[int, float] = {}

    def size(node) -> float:
        if isinstance(node, tuple):
            return sum(map(size, node))
        if not isinstance(node, yaml.CollectionNode):
            return 1
        if id(node) not in sizes:
            sizes[id(node)] = math.inf  # until it is counted: a node that contains itself
            sizes[id(node)] = 1 + sum(map(size, node.value))
        return sizes[id(node)]

    return size(root)


def _key_lines(node: yaml.Node | None, path: Path) -> dict[str, int]:
    """Line number of each key of a YAML mapping; UserError for a duplicate key."""
    lines: dict[str, int] = {}
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else []:
        line = key.start_mark.line + 1
        if key.value in lines:
            raise UserError(
                f"{path}, line {line}: duplicate key '{key.value}' (first in line "
                f"{lines[key.value]})"
            )
        lines[key.value] = line
    return lines


def load(
    config_class: type,
    section: str,
    file: str | None = None,
    overrides: Mapping[str, object] | None = None,
    *,
    variant: str | None = None,
):
    """Build `config_class` from its defaults, then the file, then the overrides.

    Args:
        config_class: a flat dataclass; values are checked against its annotations.
        section: the command; if the file has sections, the one of this name is read.
        file: a YAML file, the bare name of a shipped recipe, or None.
        overrides: values by key; strings are parsed as on the command line ("1e-4", "[a, b]", "null").
        variant: the section to read instead (--section on the command line).

    Raises:
        UserError: bad file, unknown key (suggests the nearest one), wrong type, missing required key.
    """
    fields = {f.name: f for f in dataclasses.fields(config_class) if f.init}
    hints = typing.get_type_hints(config_class)
    values = {}
    if file is not None:
        found, lines, path = read_section(file, section, variant)
        for key, value in found.items():
            where = f"{path}, line {lines.get(str(key), '?')}: "
            if key not in fields:
                raise UserError(f"{where}unknown key '{key}'{did_you_mean(str(key), fields)}")
            values[key] = _convert(where + key, hints[key], value)
    elif variant is not None:
        raise UserError(f"--section {variant}: needs --config, the file with the section")
    for key, value in (overrides or {}).items():
        if key not in fields:
            raise UserError(f"unknown option '--{key}'{did_you_mean(key, fields)}")
        values[key] = _convert(f"--{key}", hints[key], value)
    for name, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UserError(f"'{name}' is missing: give --{name} or a --config file with it")
    config = config_class(**values)
    if file is not None:
        config.config_file = str(path)  # no field: it is an input of the run and no setting
    return config


def paths(config) -> dict[str, list[str]]:
    """Existing paths among the settings, in lists too, and under "config" the file of `load`; without `out`."""
    hints = typing.get_type_hints(type(config)) | {"config_file": str}
    found = {}
    for name, value in vars(config).items():
        if name == "out" or typing.get_origin(hints.get(name)) is typing.Literal:
            continue
        texts = value if isinstance(value, list | tuple) else [value]
        texts = [os.fspath(t) for t in texts if isinstance(t, str | os.PathLike) and t]
        existing = [t for t in texts if "\0" not in t and os.path.exists(t)]
        if existing:
            found["config" if name == "config_file" else name] = existing
    return found


def _convert(where: str, hint, value):
    """Check one value against its annotation with jsonargparse, which also parses strings."""
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    expected = UserError(f"{where}: expected {describe(hint)}, got {brief(value)}")
    # A list of one item needs no brackets: --text_files a.txt
    if isinstance(value, str) and typing.get_origin(hint) is list and not value.startswith("["):
        value = [value]
    try:
        if isinstance(value, str):
            converted = parser.parse_args([f"--value={value}"]).value
        else:
            converted = parser.parse_object({"value": value}).value
    except (jsonargparse.ArgumentError, OverflowError, ValueError, RecursionError):
        raise expected from None
    # jsonargparse accepts None for every type.
    if converted is None and type(None) not in typing.get_args(hint):
        raise expected
    if isinstance(converted, float) and math.isnan(converted):
        raise expected
    return converted


# Bounds of numeric settings, whose names mean the same in every command: (low, high, whether low is allowed).
_INF = math.inf
_INT = 2**31 - 1
_MAX_LR = 1e30  # lr / (1 - beta1) must be an fp32 number
_FP32 = (1e-30, 1e30)  # of a number that an op takes as fp32, and that must not round to 0 there
RANGES = {
    "seed": (0, 2**31, True),
    "comparisons": (1, _INT, True),
    "completions_high": (2, 2**10, True),
    "lr": (0, _MAX_LR, False),
    "value_lr": (0, _MAX_LR, False),
    "muon_lr": (0, _MAX_LR, False),
    "beta1": (0, 0.9999999, True),
    "beta2": (0, 0.9999999, True),
    "adam_eps": (0, _INF, False),
    "weight_decay": (0, _INF, True),
    "max_grad_norm": (0, _INF, False),
    "lr_floor": (0, 1, True),
    "warmup": (0, _INT, True),
    "warmup_iterations": (0, _INT, True),
    "dropout": (0, 0.9999999, True),
    "save_every": (0, _INT, True),
    "log_every": (0, _INT, True),
    "max_tokens": (1, _INT, True),
    "batch": (1, _INT, True),
    "minibatch": (1, _INT, True),
    "iterations": (1, _INT, True),
    "steps": (1, _INT, True),
    "epochs": (0, 10**6, False),
    "context": (2, _INT, True),
    "vocab_size": (1, 2**24, True),
    "hidden_size": (1, 2**20, True),
    "intermediate_size": (1, 2**22, True),
    "layers": (1, 2**12, True),
    "heads": (1, 2**12, True),
    "gamma": (0, 1, True),
    "lam": (0, 1, True),
    "clip": (*_FP32, True),
    "value_clip": (*_FP32, True),
    "dual_clip": (1, _FP32[1], False),
    "ema_decay": (0, 0.9999999, True),
    "ptx_ratio": (0, 10**6, False),
    "ptx_coef": (0, _FP32[1], True),
    "kl_coef": (0, _FP32[1], True),
    "missing_eos_score": (-_FP32[1], _FP32[1], True),
    "router_coef": (0, _FP32[1], True),
    "ppo_router_coef": (0, _FP32[1], True),
    "ptx_length": (0, _INT, True),
    "pretrain_length": (0, _INT, True),
    "inner_epochs": (1, _INT, True),
    "max_new_tokens": (1, _INT, True),
    "samples": (1, _INT, True),
    "limit": (0, _INT, True),
    "window": (0, _INT, True),
}


def check_ranges(config) -> None:
    """Raise UserError for a setting outside its bounds in RANGES; None is allowed."""
    for name, (low, high, closed) in RANGES.items():
        value = getattr(config, name, None)
        if value is None:
            continue
        # The comparisons first: isfinite raises for an int beyond the floats.
        above = value >= low if closed else value > low
        if above and value <= high and (isinstance(value, int) or math.isfinite(value)):
            continue
        lower = f"{'at least' if closed else 'above'} {low}"
        bounded = high < _INT or (above and high < _INF)
        upper = f" and at most {high}" if bounded else ""
        raise UserError(f"{name}: expected a number {lower}{upper}, got {brief(value)}")


_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 100


def brief(value: object) -> str:
    """A short repr: a setting may be a number of thousands of digits, or nested lists."""
    try:
        return _BRIEF.repr(value)
    except ValueError:  # Python prints no int of more than 4300 digits
        return "a number of thousands of digits"


def require_paths(config, *names: str) -> None:
    """Raise UserError if one of these settings is empty."""
    for name in names:
        if not getattr(config, name):
            raise UserError(f"{name}: expected a path, got nothing")


def describe(hint) -> str:
    """A type in words, for messages: "float or null", "one of auto, cpu", "list of str"."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return "null"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(a) for a in args)
    if origin is not None and args:
        inner = ", ".join(describe(a) for a in args if a is not Ellipsis)
        return f"{origin.__name__} of {inner}"
    return getattr(hint, "__name__", str(hint))


def field_help(config_class: type) -> dict[str, str]:
    """Help text of each option: the comment at the end of the field's definition, in `config_class` or a base."""
    found = {}
    for base in reversed(config_class.__mro__):
        names = base.__dict__.get("__annotations__", {})
        try:
            source = textwrap.dedent(inspect.getsource(base)) if names else ""
            tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
        except (OSError, SyntaxError, tokenize.TokenError):
            continue
        name = None
        for token, after in zip(tokens, tokens[1:], strict=False):
            if token.string in names and after.string == ":":
                name = token.string
                found.pop(name, None)
            elif token.type == tokenize.COMMENT and name:
                found[name] = token.string.lstrip("# ")
            elif token.type == tokenize.NEWLINE:
                name = None
    return found


def option_parser(config_class: type, prog: str):
    """A jsonargparse parser with the options of `config_class`, to print their help."""
    import jsonargparse

    parser = jsonargparse.ArgumentParser(prog=prog, description=inspect.getdoc(config_class))
    parser.add_argument("--config", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument(
        "--section", help="section of the file to read instead of the one named after the command"
    )
    hints, comments = typing.get_type_hints(config_class), field_help(config_class)
    for f in dataclasses.fields(config_class):
        factory = f.default_factory
        default = f.default if factory is dataclasses.MISSING else factory()
        text = comments.get(f.name, f.name.replace("_", " ")).replace("%", "%%")
        kwargs = {"required": True} if default is dataclasses.MISSING else {"default": default}
        parser.add_argument(f"--{f.name}", type=hints[f.name], help=text, **kwargs)
    return parser


def save_resolved(config, path: str | os.PathLike) -> None:
    """Write all settings as YAML that `--config` accepts; `path` is replaced atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False))


def plain(value):
    """`value` in YAML's types: tuples become lists, paths become strings."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, os.PathLike) else value
