"""`fastrlhf report`: tables on the terminal, and report.html."""

import json
from dataclasses import dataclass
from pathlib import Path

from fastrlhf.errors import UserError, printable
from fastrlhf.report.content import (
    CONTENT,
    DECODINGS,
    JUDGES,
    check,
    duration,
    figure,
    figures,
    format_interval,
    format_value,
    label,
    load,
    speed_sentence,
)
from fastrlhf.report.page import page

PAGE = "report.html"


@dataclass
class ReportConfig:
    """Print the results of a finished `fastrlhf demo` run and write its report.html.

    For the curves of a single stage use tensorboard --logdir.
    """

    run: str = ""  # folder of the demo run


def print_tables(content: dict, console=None) -> None:
    """Print the result tables and the time of each stage."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    systems, results = content["systems"], content["results"]
    for decoding, words in DECODINGS.items():
        rows = figures(content, decoding)
        if not rows:
            continue
        table = Table(title=f"Results, {words}; 95 % intervals", box=box.SIMPLE_HEAD)
        table.add_column("")
        for system in systems:
            table.add_column(Text(label(system)), justify="right")
        lines = [
            (heading, style, [figure(content, s, decoding, f) for s in systems])
            for f, (heading, style) in rows.items()
        ]
        if decoding == "sampled" and any("text_loss" in r for r in results.values()):
            losses = [results[s].get("text_loss") for s in systems]
            lines.append(("loss on general text", "number", losses))
        for heading, style, found in lines:
            cells = (
                f"{format_value(i['mean'], style)}\n[dim]{_tight(i, style)}[/]" if i else ""
                for i in found
            )
            table.add_row(Text(heading), *cells)
        console.print(table)
    _print_reward(content, console)
    stages = content.get("stages", [])
    if stages:
        table = Table(title="Time")
        table.add_column("stage")
        table.add_column("time", justify="right")
        for stage in stages:
            table.add_row(Text(label(stage["name"])), duration(stage["seconds"]))
        console.print(table)
    if {"auto", "reference"} <= content.get("speed", {}).keys():
        console.print(speed_sentence(content["speed"]), highlight=False)


def _tight(interval: dict, style: str) -> str:
    # Tables of five systems must fit into 80 columns.
    return format_interval(interval, style).replace(" to ", "\u2026")


def _print_reward(content: dict, console) -> None:
    from rich.table import Table
    from rich.text import Text

    reward = content.get("reward_model", {})
    if not reward:
        return
    table = Table(title="Pairs ordered as the ranking does; 95 % intervals")
    for i, column in enumerate(("ranked by", "criterion", "RM", "longer wins", "pairs")):
        table.add_column(column, justify="right" if i > 1 else "left")
    for name, groups in reward.items():
        for group, found in groups.items():
            cells = [
                f"{format_value(found[k]['mean'], 'percent')}\n[dim]{format_interval(found[k], 'percent')}[/]"
                for k in ("accuracy", "longer")
            ]
            words = (Text(printable(word)) for word in (JUDGES.get(name, name), group))
            table.add_row(*words, *cells, str(found.get("pairs", "")))
    console.print(table)


def write_page(run: str | Path) -> Path:
    """Render report.html in a run folder; return its path."""
    content, logs = load(run)
    return _replace(Path(run) / PAGE, page(content, logs))


def write(run: str | Path, content: dict) -> Path:
    """Check `content`, write it to `run`/report.json, and render report.html; return the path of the page."""
    text = json.dumps(check(content), ensure_ascii=False, indent=1) + "\n"
    _replace(Path(run) / CONTENT, text)
    return write_page(run)


def _replace(path: Path, text: str) -> Path:
    # Atomic: a reader never sees a part of the file.
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    return partial.replace(path)


def main(cfg: ReportConfig) -> None:
    """Print the tables of `cfg.run` and write its report.html."""
    if not cfg.run:
        raise UserError("run: expected a run folder, got nothing")
    path = write_page(cfg.run)
    print_tables(json.loads((Path(cfg.run) / CONTENT).read_text(encoding="utf-8")))
    print(f"report: {printable(path)}")
