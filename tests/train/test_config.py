"""Configurations: files, sections, overrides, and error messages of one line."""

import importlib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import pytest
import yaml

from fastrlhf import cli
from fastrlhf.errors import UserError, did_you_mean, nearest
from fastrlhf.train import config


@dataclass
class BaseConfig:
    seed: int = 0  # of every random choice
    overwrite: bool = False


@dataclass
class StubConfig(BaseConfig):
    """Settings of a stage that does not exist."""

    model: str = ""  # folder, or "hub/name" # 1
    learning_rate: float = 1e-5
    steps: int = 10
    clip: float | None = 0.2
    files: list[str] = field(default_factory=list)  # JSONL
    backend: Literal["auto", "cpu"] = "auto"
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass
class RequiredConfig:
    model: str
    steps: int = 1


@pytest.fixture
def write(tmp_path):
    def write(text, name="run.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def load(file=None, overrides=None, cls=StubConfig, **kwargs):
    return config.load(cls, "sft", file, overrides, **kwargs)


def error_of(*args, **kwargs):
    with pytest.raises(UserError) as caught:
        load(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message.strip()
    return message


def test_precedence_of_defaults_file_and_overrides(write):
    file = write("learning_rate: 1e-4\nsteps: 20\nclip: null\n")
    cfg = load(file, {"steps": "30", "files": "[a.jsonl, b.jsonl]", "overwrite": "true"})
    assert cfg == StubConfig(
        learning_rate=1e-4, steps=30, clip=None, files=["a.jsonl", "b.jsonl"], overwrite=True
    )
    assert isinstance(cfg.learning_rate, float)


def test_one_item_of_a_list_needs_no_brackets():
    assert load(overrides={"files": "a.jsonl"}).files == ["a.jsonl"]


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("learning_rate", "9.65e-6", 9.65e-6),
        ("learning_rate", "2", 2.0),
        ("learning_rate", ".5", 0.5),
        ("model", "2026-01-31", "2026-01-31"),
        ("betas", "[0.8, 0.9]", (0.8, 0.9)),
        ("clip", "null", None),
        ("backend", "cpu", "cpu"),
    ],
)
def test_file_and_command_line_parse_values_equally(write, key, text, value):
    assert getattr(load(write(f"{key}: {text}\n")), key) == value
    assert getattr(load(overrides={key: text}), key) == value


def test_sections_and_variants(write):
    file = write("pretrain: {steps: 1}\nsft: {steps: 2}\nrl_init: {steps: 3}\nempty:\n")
    assert load(file).steps == 2
    assert load(file, variant="rl_init").steps == 3
    assert load(file, variant="empty") == StubConfig()


def test_empty_file_gives_the_defaults(write):
    assert load(write("")) == StubConfig()
    assert load(write("# only a comment\n")) == StubConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nstpes: 1\n", "line 2: unknown key 'stpes'; did you mean 'steps'?"),
        ("zzz: 1\n", "line 1: unknown key 'zzz'"),
        ("steps: ten\n", "line 1: steps: expected int, got 'ten'"),
        ("steps: 1.5\n", "line 1: steps: expected int, got 1.5"),
        ("steps: true\n", "steps: expected int, got True"),
        ("steps:\n", "steps: expected int, got None"),
        ("model: 5\n", "model: expected str, got 5"),
        ("learning_rate: .nan\n", "learning_rate: expected float, got nan"),
        ("clip: high\n", "clip: expected float or null, got 'high'"),
        ("files: [a, 1]\n", "files: expected list of str, got ['a', 1]"),
        ("backend: gpu\n", "backend: expected one of auto, cpu, got 'gpu'"),
        ("betas: [1.0]\n", "betas: expected tuple of float, float, got [1.0]"),
        ("a: [1\nb: 2\n", "line 2: malformed YAML: expected ',' or ']'"),
        ("sft: {steps: 1}\n  x: 2\n", "line 2: malformed YAML"),
        ("x: \x00\n", "malformed YAML"),
        ("steps: !!int ''\n", "malformed YAML"),
        ("steps: 1\nsteps: 2\n", "line 2: duplicate key 'steps' (first in line 1)"),
        ("sft:\n  steps: 1\n  steps: 2\n", "line 3: duplicate key 'steps'"),
        ("- steps\n", "expected 'key: value' lines or sections, got a list"),
        ("reward: {steps: 1}\n", "no section 'sft' (there are: reward)"),
        ("sft: {steps: 1}\nseed: 3\n", "line 2: key 'seed' is outside every section"),
        ("sft: {stpes: 1}\n", "line 1: unknown key 'stpes'; did you mean 'steps'?"),
    ],
)  # fmt: skip
def test_errors_in_a_file(write, text, message):
    file = write(text)
    assert f"{file}" in error_of(file)
    assert message in error_of(file)


def test_yaml_bombs_and_endless_files_are_refused(write):
    levels = "".join(f"l{i + 1}: &l{i + 1} [{', '.join([f'*l{i}'] * 9)}]\n" for i in range(9))
    bomb = "l0: &l0 [x, x, x]\n" + levels
    for text in (
        bomb,
        "sft: {steps: 1}\n" + bomb,
        "l0: &l0 {x: 1}\n" + levels.replace("[", "{<<: [").replace("]", "]}"),  # of merge keys
        "files: &a [*a]\n",
        "files: [" + "1, " * 11_000 + "]\n",
    ):
        assert "more than 10000 values, its aliases expanded" in error_of(write(text))
    assert "longer than 1048576 characters" in error_of("/dev/zero")


HUGE, LARGE = "1" + "0" * 400, "99999999999"


def is_refused(cls, name: str, value: str) -> bool:
    try:
        config.check_ranges(config.load(cls, "sft", None, {name: value}))
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 300
        return True
    return False


@pytest.mark.parametrize("name", ["clip", "value_clip", "dual_clip"])
def test_clips_are_numbers_of_float32(name):
    """An op would refuse them in the middle of a run."""
    from fastrlhf.train.stages.ppo import PPOConfig

    assert is_refused(PPOConfig, name, "1e-300") and is_refused(PPOConfig, name, "1e308")
    assert not is_refused(PPOConfig, name, "1.5")


@pytest.mark.parametrize("value", [HUGE, "1" + "0" * 5000, "1e400", "-" + HUGE, LARGE])
def test_huge_numbers_are_one_line(write, value):
    """On the command line, in a file, and given to a stage; only a float without a bound may be large."""
    from fastrlhf.train.stages.ppo import PPOConfig
    from fastrlhf.train.stages.pretrain import PretrainConfig

    for cls in (PPOConfig, PretrainConfig):
        for name in (f.name for f in fields(cls) if f.name in config.RANGES):
            whole = isinstance(getattr(cls(), name), int)
            assert is_refused(cls, name, value) or (value == LARGE and not whole), name
    assert len(error_of(write(f"steps: {value}x\n"))) < 400
    with pytest.raises(UserError, match="^batch: expected a number"):
        config.check_ranges(PPOConfig(batch=10**400))


def test_errors_of_overrides():
    unknown = error_of(overrides={"learnin_rate": "1"})
    assert unknown == "unknown option '--learnin_rate'; did you mean 'learning_rate'?"
    assert error_of(overrides={"steps": "x"}) == "--steps: expected int, got 'x'"
    assert error_of(cls=RequiredConfig) == (
        "'model' is missing: give --model or a --config file with it"
    )


def test_errors_of_missing_files_and_sections(write, tmp_path):
    assert error_of(str(tmp_path / "no.yaml")).endswith("no.yaml: no such file")
    assert "cannot be read" in error_of(str(tmp_path) + "/")
    file = write("sft: {}\nrl_init: {}\n")
    assert "no section 'rl_int' (there are: sft, rl_init); did you mean 'rl_init'?" in error_of(
        file, variant="rl_int"
    )
    assert "needs --config" in error_of(variant="rl_init")


def test_recipes_by_name():
    assert RECIPES
    for recipe in RECIPES:
        assert config.recipe_path(recipe.stem).resolve() == recipe.resolve()
    message = error_of("quickstrat")
    assert "no shipped recipe of this name" in message


RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))
VARIANTS = {"rl_init": "sft", "ppo_ptx": "ppo"}  # section -> the command it is a variant of


@pytest.mark.parametrize(
    ("recipe", "section"),
    [(r.stem, section) for r in RECIPES for section in yaml.safe_load(r.read_text())],
)
def test_every_section_of_every_recipe_fits_its_stage(recipe, section):
    command = VARIANTS.get(section, section)
    stage = cli.COMMANDS[command]
    config_class = getattr(importlib.import_module(stage.module), stage.config)
    loaded = config.load(config_class, command, recipe, variant=section)
    text = config.recipe_path(recipe).read_text()
    given = yaml.load(text, Loader=config._Loader)[section]
    assert {key: getattr(loaded, key) for key in given} == given


def test_saved_config_reads_back_equal(tmp_path):
    cfg = StubConfig(model="m", learning_rate=1e-12, clip=None, files=["a"], betas=(0.5, 0.6))
    path = tmp_path / "new" / "resolved_config.yaml"
    config.save_resolved(cfg, path)
    assert load(str(path)) == cfg
    assert set(yaml.safe_load(path.read_text())) == set(vars(cfg))
    assert [p.name for p in path.parent.iterdir()] == ["resolved_config.yaml"]


def test_field_comments_become_help():
    comments = config.field_help(StubConfig)
    assert comments == {
        "seed": "of every random choice",
        "model": 'folder, or "hub/name" # 1',
        "files": "JSONL",
    }
    text = config.option_parser(StubConfig, "fastrlhf sft").format_help()
    assert "--learning_rate" in text
    assert "default: 1e-05" in text
    assert "of every random choice" in text


def test_nearest():
    assert nearest("stpes", ["steps", "seed"]) == "steps"
    assert nearest("qqq", ["steps", "seed"]) is None
    assert did_you_mean("stpes", ["steps"]) == "; did you mean 'steps'?"
    assert did_you_mean("qqq", ["steps"]) == ""
