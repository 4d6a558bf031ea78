"""The report of a run: tables on the terminal and one self-contained report.html."""

import json
from dataclasses import dataclass
from pathlib import Path

from fastrlhf.errors import UserError
from fastrlhf.report.content import (
    CONTENT,
    DECODINGS,
    JUDGES,
    check,
    duration,
    figure,
    figures,
    form,
    label,
    load,
    span,
    speed_words,
)

PAGE = "report.html"


@dataclass
class ReportConfig:
    """Write report.html of a finished `fastrlhf demo` run again (one stage's curves: tensorboard --logdir)."""

    run: str = ""  # folder of the demo run, holding report.json


def print_tables(content: dict, console=None) -> None:
    """The result tables and the time per stage, on the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    systems, results = content["systems"], content["results"]
    for decoding, words in DECODINGS.items():
        rows = figures(content, decoding)
        if not rows:
            continue
        table = Table(title=f"Results, {words}; 95 % intervals", box=box.SIMPLE_HEAD)
        table.add_column("")
        for system in systems:
            table.add_column(label(system), justify="right")
        lines = [
            (heading, style, [figure(content, s, decoding, f) for s in systems])
            for f, (heading, style) in rows.items()
        ]
        if decoding == "sampled" and any("text_loss" in r for r in results.values()):
            losses = [results[s].get("text_loss") for s in systems]
            lines.append(("loss on general text", "number", losses))
        for heading, style, found in lines:
            cells = (
                f"{form(i['mean'], style)}\n[dim]{_tight(i, style)}[/]" if i else "" for i in found
            )
            table.add_row(heading, *cells)
        console.print(table)
    _print_reward(content, console)
    stages = content.get("stages", [])
    if stages:
        table = Table(title="Time")
        table.add_column("stage")
        table.add_column("time", justify="right")
        for stage in stages:
            table.add_row(label(stage["name"]), duration(stage["seconds"]))
        console.print(table)
    if {"auto", "reference"} <= content.get("speed", {}).keys():
        console.print(speed_words(content["speed"]), highlight=False)


def _tight(interval: dict, style: str) -> str:
    # Five systems must fit into 80 columns.
    return span(interval, style).replace(" to ", "\u2026")


def _print_reward(content: dict, console) -> None:
    from rich.table import Table

    reward = content.get("reward_model", {})
    if not reward:
        return
    table = Table(title="Pairs ordered as the ranking does; 95 % intervals")
    for i, column in enumerate(("ranked by", "criterion", "RM", "longer wins", "pairs")):
        table.add_column(column, justify="right" if i > 1 else "left")
    for name, groups in reward.items():
        for group, found in groups.items():
            cells = [
                f"{form(found[k]['mean'], 'percent')}\n[dim]{span(found[k], 'percent')}[/]"
                for k in ("accuracy", "longer")
            ]
            table.add_row(JUDGES.get(name, name), group, *cells, str(found.get("pairs", "")))
    console.print(table)


def write_page(run: str | Path) -> Path:
    """Render report.html of a run folder; returns its path. The page is replaced whole."""
    from fastrlhf.report.page import page

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
