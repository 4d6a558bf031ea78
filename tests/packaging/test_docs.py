"""README, CONTRIBUTING and docs/: snippets run, commands and links exist, the site builds without a warning.

The ```python blocks of a page run in order in one namespace, in a process per page. `<!-- needs: X -->` above a block
marks one that needs the module X, a GPU ("gpu") or the network ("network"); NEEDS counts them.
"""

import contextlib
import functools
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import yaml

import fastrlhf
from fastrlhf import cli, extras

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest installs it on Python 3.10

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"python", "bash", "console", "yaml", "text"}
NEEDS = {
    ("README.md", "trl"): 1,
    ("docs/integrations.md", "trl"): 1,
    ("docs/integrations.md", "verl"): 1,  # tests/integrations/test_page.py runs these two
    ("docs/integrations.md", "openrlhf"): 1,
}
MAX_SECONDS = 18  # of processor time per page, without the imports of torch and fastrlhf
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


class Block(NamedTuple):
    page: str
    line: int  # of its first line of code
    language: str
    text: str
    needs: str

    def __str__(self):
        return f"{self.page}:{self.line}"


def blocks_of(text: str, page: str) -> list[Block]:
    """The fenced blocks of a page. A directive of MyST has its name in braces as its language."""
    found, lines, needs, start = [], text.splitlines(), "", None
    for number, line in enumerate(lines, 1):
        if fence := re.match(r"\s*```+(.*)", line):
            if start is None:
                start, language = number + 1, fence[1].strip()
            else:
                body = "\n".join(lines[start - 1 : number - 1])
                found.append(Block(page, start, language, body, needs))
                start, needs = None, ""
        elif start is None and line.strip():
            marker = re.fullmatch(r"<!-- needs: (\w+) -->", line.strip())
            needs = marker[1] if marker else ""
    assert start is None, f"{page}:{start}: the block has no end"
    return found


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


TEXT = {name_of(page): page.read_text() for page in PAGES}
BLOCKS = [block for name, text in TEXT.items() for block in blocks_of(text, name)]
PYTHON = [b for b in BLOCKS if b.language == "python"]
MARKED = [b for b in PYTHON if b.needs]
# Without blocks, and without inline code in PROSE: what Markdown reads as links and text.
UNFENCED = {
    name: re.sub(r"(?ms)^\s*```.*?^\s*```$", "", text) for name, text in TEXT.items()
}  # fmt: skip
PROSE = {name: re.sub(r"`[^`\n]+`", "`code`", text) for name, text in UNFENCED.items()}


def environment() -> dict[str, str]:
    here = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return os.environ | here | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


# Imports what every page imports, once. Each line of standard input is a job for a fork: a folder, a file for what it
# says, and blocks. A fifth of a short process is garbage collection of what the imports leave, which is nothing.
RUNNER = """
import gc, json, os, sys
gc.disable()
import fastrlhf, torch
for line in sys.stdin:
    folder, log, blocks = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        file = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1), os.dup2(file, 2)
        namespace = {"__name__": "__main__"}
        for page, first, text in blocks:
            exec(compile("\\n" * (first - 1) + text, page, "exec"), namespace)
        sys.exit()
    _, status, used = os.wait4(child, 0)
    print(json.dumps([status, used.ru_utime + used.ru_stime]), flush=True)
"""


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    """Run blocks in order in one namespace; seconds of processor time. A failure names page and line."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", RUNNER]
    folder = tmp_path_factory.mktemp("runner")
    with subprocess.Popen(command, cwd=folder, env=environment(), **pipes) as process:

        def run_blocks(blocks: list[Block], folder: Path) -> float:
            log = folder / "said"
            pages = [(str(ROOT / b.page), b.line, b.text) for b in blocks]
            process.stdin.write(json.dumps([str(folder), str(log), pages]) + "\n")
            process.stdin.flush()
            status, seconds = json.loads(process.stdout.readline())
            assert status == 0, log.read_text()[-3000:]
            return seconds

        yield run_blocks
        process.stdin.close()


@pytest.mark.parametrize("page", sorted({b.page for b in PYTHON}))
def test_snippets_run(page, tmp_path, runner):
    seconds = runner([b for b in PYTHON if b.page == page and not b.needs], tmp_path)
    assert seconds < MAX_SECONDS, f"{page}: {seconds:.1f} s"


@pytest.mark.parametrize("block", MARKED, ids=str)
def test_marked_snippets_run(block, tmp_path, runner):
    if block.needs in ("gpu", "network"):
        pytest.skip(f"{block} needs the {block.needs}")
    if importlib.util.find_spec(block.needs) is None:
        pytest.skip(f"{block} needs {block.needs}, which is not installed beside fastrlhf here")
    before = [b for b in PYTHON if b.page == block.page and b.line < block.line and not b.needs]
    assert runner([*before, block], tmp_path) < MAX_SECONDS


def test_marked_snippets_are_counted():
    assert Counter((b.page, b.needs) for b in BLOCKS if b.needs) == NEEDS


def test_a_broken_snippet_fails(tmp_path, runner):
    page = "# Page\n\n```python\nx = 1\n```\n\n```python\ny = x + 1\nassert y == 3\n```\n"
    with pytest.raises(AssertionError, match=r'README.md", line 9'):
        runner(blocks_of(page, "README.md"), tmp_path)


def test_every_block_has_a_language_that_is_checked():
    for block in BLOCKS:
        assert block.language in LANGUAGES or block.language.startswith("{"), str(block)


# Commands of the shell ------------------------------------------------------------------------------


def commands() -> list[tuple[str, list[str]]]:
    """(place, words) of each command in the bash and console blocks, without assignments before it."""
    found = []
    for block in BLOCKS:
        if block.language not in ("bash", "console"):
            continue
        lines = block.text.replace("\\\n", " ").replace("&&", "\n").splitlines()
        for line in lines:
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and re.match(r"\w+=", words[0]):
                words.pop(0)
            if words[:1] == ["timeout"]:
                words = words[2:]
            if words:
                found.append((f"{block}: {line.strip()}", words))
    return found


@functools.cache
def help_texts() -> dict[str, str]:
    """Command of fastrlhf -> what its --help prints, or its error: a missing extra is one."""
    texts = {}
    with mock.patch.dict(os.environ, COLUMNS="200"):
        for name in cli.COMMANDS:
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
                try:
                    cli.main([name, "--help"])
                except Exception:
                    traceback.print_exc()
            texts[name] = out.getvalue()
    return texts


def value_of(flag: str, words: list[str]) -> str | None:
    return words[words.index(flag) + 1] if flag in words else None


def check_fastrlhf(words: list[str]) -> None:
    name, *rest = words
    assert name in help_texts(), f"no command {name}"
    recipe, section = value_of("--config", rest), value_of("--section", rest)
    if recipe and not recipe.endswith(".yaml"):
        settings = yaml.safe_load((ROOT / "recipes" / f"{recipe}.yaml").read_text())
        assert section is None or section in settings, section
    for word in rest:
        if word.startswith(("fastrlhf/", "recipes/", "examples/")):
            assert (ROOT / word).exists(), word
    # Last, because only the help needs the packages of the command's extra.
    extra = cli.COMMANDS[name].extra if name in cli.COMMANDS else ""
    if extra and extras.missing(extra):
        pytest.skip(f"the help of fastrlhf {name} needs the extra [{extra}]")
    assert help_texts()[name].startswith("usage: "), help_texts()[name]
    for flag in (word.partition("=")[0] for word in rest if word.startswith("--")):
        assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", help_texts()[name]), flag


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())
    for word in words:
        variable, equals, _ = word.partition("=")
        if equals:
            assert re.search(rf"^{variable} \?=", makefile, re.MULTILINE), f"no variable {variable}"
        else:
            assert word in targets, f"no target {word}"


def check_python(words: list[str]) -> None:
    if words[0] == "-m":
        module, *rest = words[1:]
        if module == "fastrlhf":
            check_fastrlhf(rest)
        else:
            assert module in ("pytest", "venv", "http.server"), module
        return
    if words[0] == "setup.py":
        check_setup(*words[1:])
        return
    source = (ROOT / words[0]).read_text()
    for word in words[1:]:
        if word.startswith("--"):
            assert f'"{word.partition("=")[0]}"' in source, word


def check_setup(command: str, *options: str) -> None:
    module = importlib.import_module(f"setuptools.command.{command}")
    known = {name.rstrip("=") for name, *_ in getattr(module, command).user_options}
    for option in options:
        assert option.removeprefix("--") in known, option


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    extras = PYPROJECT["project"]["optional-dependencies"]
    for word in words[1:]:
        if local := re.fullmatch(r"\.\[([\w,]+)\]", word):
            for extra in local[1].split(","):
                assert extra in extras, f"no extra {extra}"


def test_extras_of_the_installation_page_exist():
    table = TEXT["docs/install.md"].partition("| extra |")[2].partition("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"(?m)^\|([^|]*)\|", table))))
    assert named and named <= set(PYPROJECT["project"]["optional-dependencies"]), named


@functools.cache
def pytest_help() -> str:
    return run("-m", "pytest", "--help", "benchmarks/", cwd=ROOT).stdout


def check_pytest(words: list[str]) -> None:
    for word in words:
        if word.startswith("--") and importlib.util.find_spec("pytest_benchmark"):
            assert word.partition("=")[0] in pytest_help(), word
        if "/" in word and not word.startswith("-"):
            assert (ROOT / word.partition("::")[0]).exists(), word


def check_torchrun(words: list[str]) -> None:
    start = words.index("-m")
    assert words[start + 1] == "fastrlhf"
    check_fastrlhf(words[start + 2 :])


CHECKS = {
    "fastrlhf": check_fastrlhf,
    "make": check_make,
    "pip": check_pip,
    "pytest": check_pytest,
    "python": check_python,
    "python3": check_python,
    ".venv/bin/python": check_python,
    "torchrun": check_torchrun,
}


@pytest.mark.parametrize(("place", "words"), commands(), ids=lambda value: str(value)[:80])
def test_commands_and_their_options_exist(place, words):
    assert words[0] in CHECKS, f"{place}: test_docs.py has no check of {words[0]}"
    CHECKS[words[0]](words[1:])


def commands_in_text() -> list[str]:
    pages = "\n".join(UNFENCED.values())
    return sorted(set(re.findall(r"`((?:make|fastrlhf) [a-z][^`]*)`", pages)))


@pytest.mark.parametrize("command", commands_in_text())
def test_commands_in_the_text_exist(command):
    name, *words = shlex.split(command)
    CHECKS[name](words)


def test_yaml_blocks_are_configurations(tmp_path):
    from fastrlhf.train import config

    blocks = [b for b in BLOCKS if b.language == "yaml"]
    sections = []
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block.text)
        sections += [(name, str(path)) for name in yaml.safe_load(block.text)]
    assert sections
    for section, path in sections:
        command = cli.COMMANDS[section]
        kind = getattr(importlib.import_module(command.module), command.config)
        config.load(kind, section, path)


# Links and names ------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The anchors that GitHub and MyST give to the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", TEXT)
def test_links_exist(page):
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", PROSE[page]):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (folder / path).resolve() if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(file.read_text()), f"{page}: {target}"


@pytest.mark.parametrize("page", TEXT)
def test_cited_files_exist(page):
    folders = "benchmarks|csrc|docs|examples|fastrlhf|kernels|recipes|tests"
    for path in re.findall(rf"`((?:{folders})/[\w./*-]*)`", UNFENCED[page]):
        if "my_op" not in path:
            assert list(ROOT.glob(path.rstrip("/"))), f"{page}: {path}"


@pytest.mark.parametrize("page", TEXT)
def test_names_of_the_package_exist(page):
    for name in set(re.findall(r"`(fastrlhf(?:\.\w+)+)(?:\(.*?\))?`", UNFENCED[page])):
        value = fastrlhf
        for part in name.split(".")[1:]:
            if not hasattr(value, part):
                importlib.import_module(f"{value.__name__}.{part}")
            value = getattr(value, part)


def test_every_public_name_is_in_the_reference():
    for name in set(fastrlhf.__all__) - {"__version__"}:
        assert re.search(rf":: fastrlhf\.{name}\b", TEXT["docs/api.md"]), name


# What README and CITATION claim ---------------------------------------------------------------------


def test_badges_are_true():
    project, readme = PYPROJECT["project"], TEXT["README.md"]
    torch = next(d for d in project["dependencies"] if d.startswith("torch>="))
    badges = dict(
        re.findall(r"!\[(\w+) [^\]]*\]\(https://img\.shields\.io/badge/(\S+)-blue\)", readme)
    )
    assert badges == {
        "licence": f"licence-{project['license'].replace('-', '--')}",
        "python": f"python-{project['requires-python'].removeprefix('>=')}%2B",
        "torch": f"torch-{torch.removeprefix('torch>=')}%2B",
    }


def test_table_and_plot_are_those_of_the_results_files():
    result = run("docs/front_page.py", "--check", cwd=ROOT)
    assert result.returncode == 0, result.stdout


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == fastrlhf.__version__
    assert citation["license"] == PYPROJECT["project"]["license"]
    assert "2203.02155" in citation["references"][0]["url"]


def test_the_site_builds_without_a_warning(tmp_path):
    for module in ("sphinx", "myst_parser", "furo"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: `make docs` installs the extra docs")
    command = ("-m", "sphinx", "-q", "-W", "--keep-going", "-d", str(tmp_path / "cache"))
    result = run(*command, "-b", "html", "docs", str(tmp_path / "site"), cwd=ROOT)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "site" / "api.html").read_text()
    for name in set(fastrlhf.__all__) - {"__version__", "nn"}:
        assert f'id="fastrlhf.{name}"' in page, name
