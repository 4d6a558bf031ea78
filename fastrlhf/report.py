"""The report of a run: tables on the terminal and one self-contained report.html.

Input is a run folder with `report.json` and, where it names them, the stages' `log.jsonl`. An *interval*
is {"mean", "low", "high", "n"} (95 %, over prompts or text windows), as `fastrlhf.evals` return it.
Only `systems` and `results` are required; whatever else is missing is left out of the page.

    {
      "title": str,
      "command": str,                       # the exact command that repeats the run
      "seconds": number,                    # whole run
      "environment": {str: str | number},   # torch, cpu, attention, seed, versions, ...
      "backends": {op: backend},
      "systems": ["base", "sft", "ppo", "ppo_ptx"],       # in the order of the tables
      "reference": "sft",                   # what win rate, error change and KL compare with
      "results": {system: {
          "sampled": {figure: interval},    # temperature 1
          "greedy": {figure: interval},     # temperature 0
          "text_loss": interval,            # held-out pretraining text, nats per token
          "text_loss_change": interval}},   # minus the reference's, on the same windows
      "human": {figure: interval},          # the human references, judged by the labeler
      "reward_model": {"held_out": {...}, "human": {...}},  # reward_accuracy.evaluate's results
      "labeler": {"agreement/<criterion>": number, "decided/<criterion>": number, ...},
      "stages": [{"name": str, "seconds": number, "log": "sft/log.jsonl"}],
      "speed": {"auto": number, "reference": number},      # PPO update, seconds an iteration
      "samples": [{"record": {slot: value}, "human": str,
                   "outputs": {system: str | {"text", "missing": [slot], "invented": [slot]}}}]
    }

Figures of "sampled" and "greedy": win_rate, coverage, missing, invented, errors, error_rate,
error_change, perfect, value, bleu, reward, kl, finished, length.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from fastrlhf.errors import UserError

CONTENT = "report.json"
PAGE = "report.html"
LABELS = {"base": "base", "sft": "SFT", "ppo": "PPO", "ppo_ptx": "PPO-ptx", "reward": "RM"}
DECODINGS = {"sampled": "temperature 1", "greedy": "greedy"}
# figure -> (heading, format): what the result tables show, in this order.
FIGURES = {
    "win_rate": ("preferred to {reference}", "percent"),
    "coverage": ("slot coverage", "percent"),
    "missing": ("missing a sentence", "number"),
    "invented": ("invented a sentence", "number"),
    "error_change": ("slot errors vs {reference}", "change"),
    "bleu": ("BLEU", "score"),
    "reward": ("RM score", "number"),
    "kl": ("KL to {reference}", "score"),
}


@dataclass
class ReportConfig:
    """Write the report of a run that is finished (again)."""

    run: str = ""  # run folder, holding report.json


def label(system: str) -> str:
    """The printed name of a system."""
    return LABELS.get(system, system)


def form(value: float, style: str) -> str:
    """One number as the tables print it."""
    if not math.isfinite(value):
        return "n/a"
    if style == "percent":
        return f"{100 * value:.1f} %"
    if style == "change":
        return f"{100 * value:+.0f} %".replace("-", "\u2212")
    text = f"{value:.1f}" if style == "score" else f"{value:.2f}"
    return text.replace("-", "\u2212")


def span(interval: dict, style: str) -> str:
    """The 95 % interval of a figure as text."""
    low, high = (form(interval[k], style).removesuffix(" %") for k in ("low", "high"))
    return f"{low} to {high}"


def duration(seconds: float) -> str:
    """45.2 s, 3 min 20 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _need(condition: bool, where: str, expected: str, got) -> None:
    if not condition:
        text = repr(got)
        text = text if len(text) <= 60 else text[:57] + "..."
        raise UserError(f"{CONTENT}: {where}: expected {expected}, got {text}")


def _check_intervals(found, where: str) -> None:
    _need(isinstance(found, dict), where, "an object of intervals", found)
    for name, interval in found.items():
        here = f"{where}.{name}"
        _need(isinstance(interval, dict), here, "an interval {mean, low, high}", interval)
        for key in ("mean", "low", "high"):
            _need(_is_number(interval.get(key)), f"{here}.{key}", "a number", interval.get(key))


_SHAPES = {
    "title": (str, "text"),
    "command": (str, "text"),
    "environment": (dict, "an object"),
    "backends": (dict, "an object"),
    "human": (dict, "an object"),
    "reward_model": (dict, "an object"),
    "labeler": (dict, "an object"),
    "stages": (list, "a list"),
    "speed": (dict, "an object"),
    "samples": (list, "a list"),
}


def check(content) -> dict:
    """Return `content` if it follows the schema; UserError names the first place that does not."""
    _need(isinstance(content, dict), "top level", "an object", content)
    systems = content.get("systems")
    _need(isinstance(systems, list) and bool(systems), "systems", "a list of names", systems)
    for i, name in enumerate(systems):
        _need(isinstance(name, str), f"systems[{i}]", "a name", name)
    results = content.get("results")
    _need(isinstance(results, dict), "results", "an object", results)
    for system in systems:
        found = results.get(system)
        _need(isinstance(found, dict), f"results.{system}", "an object", found)
        for decoding in DECODINGS:
            _check_intervals(found.get(decoding, {}), f"results.{system}.{decoding}")
        losses = {k: found[k] for k in ("text_loss", "text_loss_change") if k in found}
        _check_intervals(losses, f"results.{system}")
    for key, (kind, expected) in _SHAPES.items():
        if key in content:
            _need(isinstance(content[key], kind), key, expected, content[key])
    _check_intervals(content.get("human", {}), "human")
    for name, groups in content.get("reward_model", {}).items():
        _need(isinstance(groups, dict), f"reward_model.{name}", "an object", groups)
        for group, found in groups.items():
            where = f"reward_model.{name}.{group}"
            _need(isinstance(found, dict), where, "an object", found)
            _check_intervals({k: found.get(k) for k in ("accuracy", "longer")}, where)
    for i, stage in enumerate(content.get("stages", [])):
        _need(isinstance(stage, dict), f"stages[{i}]", "an object", stage)
        _need(isinstance(stage.get("name"), str), f"stages[{i}].name", "text", stage.get("name"))
        seconds = stage.get("seconds")
        _need(_is_number(seconds), f"stages[{i}].seconds", "a number", seconds)
    for key in ("labeler", "speed"):
        for name, value in content.get(key, {}).items():
            _need(_is_number(value), f"{key}.{name}", "a number", value)
    for i, sample in enumerate(content.get("samples", [])):
        _need(isinstance(sample, dict), f"samples[{i}]", "an object", sample)
        for part in ("record", "outputs"):
            found = sample.get(part)
            _need(isinstance(found, dict), f"samples[{i}].{part}", "an object", found)
        for system, output in sample["outputs"].items():
            text = output.get("text") if isinstance(output, dict) else output
            _need(isinstance(text, str), f"samples[{i}].outputs.{system}", "text", output)
    return content


def load(run: str | Path) -> tuple[dict, dict[str, list[dict]]]:
    """Read and check a run folder -> (content of report.json, log rows by stage)."""
    run = Path(run)
    path = run / CONTENT
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"run {str(run)!r}: no {CONTENT} there; is the run finished?") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{str(path)!r}: cannot be read ({error})") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{str(path)!r}, line {error.lineno}: not JSON ({error.msg})") from error
    check(content)
    logs = {s["name"]: _rows(run / s["log"]) for s in content.get("stages", []) if s.get("log")}
    return content, logs


def _rows(path: Path) -> list[dict]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"log {str(path)!r}: cannot be read ({error})") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"log {str(path)!r}, line {number}: not JSON ({error.msg})") from error
        if not isinstance(row, dict):
            raise UserError(f"log {str(path)!r}, line {number}: expected an object")
        rows.append(row)
    return rows


def figures(content: dict, decoding: str) -> dict[str, tuple[str, str]]:
    """The figures that at least one system has: figure -> (heading, format)."""
    reference = label(content.get("reference", "sft"))
    have = {f for s in content["systems"] for f in content["results"][s].get(decoding, {})}
    return {f: (h.format(reference=reference), s) for f, (h, s) in FIGURES.items() if f in have}


def print_tables(content: dict, console=None) -> None:
    """The result tables and the time per stage, on the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    results = content["results"]
    for decoding, words in DECODINGS.items():
        columns = figures(content, decoding)
        losses = decoding == "sampled" and any("text_loss" in r for r in results.values())
        if not columns:
            continue
        table = Table(title=f"{content.get('title', 'Results')}: {words}, 95 % intervals")
        table.add_column("system")
        for heading, _ in columns.values():
            table.add_column(heading, justify="right")
        if losses:
            table.add_column("loss on general text", justify="right")
        for system in content["systems"]:
            row = [label(system)]
            cells = [(results[system].get(decoding, {}).get(f), s) for f, (_, s) in columns.items()]
            if losses:
                cells.append((results[system].get("text_loss"), "number"))
            for found, style in cells:
                row.append(f"{form(found['mean'], style)}\n{span(found, style)}" if found else "")
            table.add_row(*row)
        console.print(table)
    _print_reward(content, console)
    stages = content.get("stages", [])
    if stages:
        table = Table(title="time")
        for stage in stages:
            table.add_column(label(stage["name"]), justify="right")
        table.add_row(*(duration(s["seconds"]) for s in stages))
        console.print(table)
    if {"auto", "reference"} <= content.get("speed", {}).keys():
        ours, plain = content["speed"]["auto"], content["speed"]["reference"]
        console.print(
            f"PPO update: {ours:.3f} s an iteration, reference backend {plain:.3f} s "
            f"({plain / ours:.2f} times as long)",
            highlight=False,
        )


def _print_reward(content: dict, console) -> None:
    from rich.table import Table

    reward = content.get("reward_model", {})
    if not reward:
        return
    table = Table(title="reward model: pairs ordered as the ranking does, 95 % intervals")
    for i, column in enumerate(("rankings", "criterion", "reward model", "longer wins", "pairs")):
        table.add_column(column, justify="right" if i > 1 else "left")
    for name, groups in reward.items():
        for group, found in groups.items():
            cells = [
                f"{form(found[k]['mean'], 'percent')}  {span(found[k], 'percent')}"
                for k in ("accuracy", "longer")
            ]
            table.add_row(name.replace("_", " "), group, *cells, str(found.get("pairs", "")))
    console.print(table)


def write_page(run: str | Path) -> Path:
    """Render report.html of a run folder; returns its path. The page is replaced whole."""
    from fastrlhf.report_html import page

    content, logs = load(run)
    path = Path(run) / PAGE
    scratch = path.with_name(f".{PAGE}")
    scratch.write_text(page(content, logs), encoding="utf-8")
    scratch.replace(path)
    return path


def write(run: str | Path, content: dict) -> Path:
    """Check `content`, write it as report.json into `run`, and render the page beside it."""
    text = json.dumps(check(content), ensure_ascii=False, indent=1) + "\n"
    path = Path(run) / CONTENT
    scratch = path.with_name(f".{CONTENT}")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)
    return write_page(run)


def main(cfg: ReportConfig) -> None:
    """Print the tables of a run and write its report.html."""
    if not cfg.run:
        raise UserError("run: expected a run folder, got nothing")
    path = write_page(cfg.run)
    print_tables(json.loads((Path(cfg.run) / CONTENT).read_text(encoding="utf-8")))
    print(f"report: {path}")
