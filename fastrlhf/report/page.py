"""report.html: one self-contained file without scripts."""

import base64
from collections.abc import Sequence
from html import escape

from fastrlhf.report import plots
from fastrlhf.report.content import (
    DECODINGS,
    JUDGES,
    duration,
    figure,
    figures,
    format_interval,
    format_value,
    label,
    speed_sentence,
)

_CSS = """
:root { --ink: #1b2430; --soft: #566070; --line: #dfe3e9; --wash: #f6f7f9; --accent: #0f766e; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 1080px; padding: 40px 28px 72px; color: var(--ink);
  background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 52px 0 10px; padding-top: 18px; border-top: 1px solid var(--line); }
h3 { font-size: 16px; margin: 26px 0 8px; }
p { margin: 8px 0 14px; max-width: 74ch; }
.soft, .note { color: var(--soft); }
.note { font-size: 14px; }
code, pre { font: 13.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { background: var(--wash); border: 1px solid var(--line); border-radius: 6px;
  padding: 12px 14px; white-space: pre-wrap; overflow-wrap: anywhere; margin: 10px 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 14px;
  margin: 22px 0 8px; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; }
.card b { display: block; font-size: 28px; line-height: 1.15; letter-spacing: -0.02em; }
.card span { display: block; font-size: 14px; color: var(--soft); margin-top: 4px; }
.scroll { overflow-x: auto; margin: 8px 0 16px; }
table { border-collapse: collapse; width: 100%; font-size: 15px;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 8px 10px; border-bottom: 1px solid var(--line);
  vertical-align: top; white-space: nowrap; }
th { font-size: 13px; font-weight: 600; color: var(--soft); vertical-align: bottom;
  white-space: normal; line-height: 1.3; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td:first-child { font-weight: 600; }
td small { display: block; color: var(--soft); font-size: 12.5px; }
td.text, th.text { text-align: left; white-space: normal; }
td.text:last-child { width: 80%; }
tr:last-child td { border-bottom: 0; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 8px; }
figure { margin: 16px 0; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { font-size: 14px; color: var(--soft); max-width: 74ch; margin-top: 6px; }
.sample { margin: 22px 0 30px; }
.chips { margin: 0 0 6px; }
.chip { display: inline-block; background: var(--wash); border: 1px solid var(--line);
  border-radius: 99px; padding: 1px 10px; margin: 0 4px 5px 0; font-size: 13.5px; }
.chip i { font-style: normal; color: var(--soft); margin-right: 5px; }
.bad { color: #b42318; font-size: 13.5px; display: block; }
.good { color: var(--accent); font-size: 13.5px; display: block; }
.bar { display: block; height: 9px; border-radius: 3px; background: var(--accent); min-width: 2px; }
.warn { border-left: 4px solid #d97706; background: #fff8eb; padding: 10px 14px; margin: 14px 0; }
dl { display: grid; grid-template-columns: minmax(110px, 180px) 1fr; gap: 4px 18px; margin: 8px 0;
  font-size: 15px; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 620px) { figure { overflow-x: auto; } figure img { min-width: 660px; max-width: none; }
  body { padding: 24px 16px 48px; } h1 { font-size: 25px; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 8px; } }
@media print { body { max-width: none; padding: 0; } h2 { break-after: avoid; }
  figure, .sample, tr { break-inside: avoid; } }
"""


def _image(svg: str, words: str, caption: str = "") -> str:
    data = base64.b64encode(svg.encode()).decode()
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{escape(words)}" src="data:image/svg+xml;base64,{data}">{below}</figure>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], text_columns=frozenset()) -> str:
    # Cells are HTML; the callers escape text.
    def cell(tag: str, i: int, content: str) -> str:
        return f"<{tag}{' class=text' if i in text_columns else ''}>{content}</{tag}>"

    top = "".join(cell("th", i, h) for i, h in enumerate(head))
    top = f"<tr>{top}</tr>" if any(head) else ""
    body = "".join(
        "<tr>" + "".join(cell("td", i, c) for i, c in enumerate(row)) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table>{top}{body}</table></div>'


def _name(system: str) -> str:
    dot = f'<span class="dot" style="background:{plots.color(system)}"></span>'
    return dot + escape(label(system))


def _cell(found: dict | None, style: str) -> str:
    if not found:
        return ""
    return f"{format_value(found['mean'], style)}<small>{format_interval(found, style)}</small>"


def _list(entries: dict) -> str:
    items = (f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in entries.items())
    return f"<dl>{''.join(items)}</dl>"


def _best(content: dict) -> str | None:
    """The system of the headline: the last one that is compared with the reference."""
    results = content["results"]
    compared = [s for s in content["systems"] if "win_rate" in results[s].get("sampled", {})]
    compared = [s for s in compared if s != content.get("reference", "sft")]
    return compared[-1] if compared else None


def _cards(content: dict) -> str:
    system = _best(content)
    if system is None:
        return ""
    results, reference = content["results"], label(content.get("reference", "sft"))
    sampled, name = results[system]["sampled"], label(system)
    cards = []
    win = sampled["win_rate"]
    interval = format_interval(win, "percent")
    cards.append(
        (format_value(win["mean"], "percent"), f"{name} preferred to {reference} ({interval} %)")
    )
    if change := sampled.get("error_change"):
        words = f"slot errors, {name} against {reference} ({format_interval(change, 'change')} %)"
        cards.append((format_value(change["mean"], "change"), words))
    if coverage := sampled.get("coverage"):
        before = results.get(content.get("reference", "sft"), {}).get("sampled", {})
        words = f"of the record's slots expressed by {name}"
        if "coverage" in before:
            words += f"; {reference} {format_value(before['coverage']['mean'], 'percent')}"
        cards.append((format_value(coverage["mean"], "percent"), words))
    losses = {s: results[s].get("text_loss") for s in content["systems"]}
    if losses.get("ppo") and losses.get("ppo_ptx"):
        words = (
            f"loss on general text of PPO-ptx; PPO {format_value(losses['ppo']['mean'], 'number')}"
        )
        if losses.get("base"):
            words += f", base {format_value(losses['base']['mean'], 'number')}"
        cards.append((format_value(losses["ppo_ptx"]["mean"], "number"), words))
    boxes = "".join(
        f'<div class="card"><b>{escape(b)}</b><span>{escape(s)}</span></div>' for b, s in cards
    )
    return f'<div class="cards">{boxes}</div>'


def _results(content: dict) -> str:
    judged = (
        "Preferences, coverage, missing and invented slots are judged by the labeler, a program that "
        "compares each sentence with its record. It stands in for people."
    )
    parts = [f"<h2>Results</h2><p>{judged}</p>"]
    if svg := plots.results(content):
        caption = (
            "Filled: sampled at temperature 1. Hollow: greedy. Bars are 95 % intervals "
            "(bootstrap over prompts, and over windows of text)."
        )
        parts.append(_image(svg, "win rate, slot errors and loss on general text", caption))
    results = content["results"]
    for decoding, words in DECODINGS.items():
        columns = figures(content, decoding)
        if not columns:
            continue
        losses = decoding == "sampled" and any("text_loss" in r for r in results.values())
        rows = []
        for system in content["systems"]:
            cells = (figure(content, system, decoding, f) for f in columns)
            styles = (style for _, style in columns.values())
            row = [_name(system), *map(_cell, cells, styles)]
            if losses:
                row.append(_cell(results[system].get("text_loss"), "number"))
            rows.append(row)
        if human := content.get("human"):
            row = ["people", *(_cell(human.get(f), s) for f, (_, s) in columns.items())]
            rows.append(row + [""] * losses)
        head = ["system", *(escape(h) for h, _ in columns.values())]
        head += ["loss on general text"] * losses
        parts.append(
            f"<h3>{'At ' if decoding == 'sampled' else ''}{escape(words)}</h3>".replace(
                "<h3>greedy", "<h3>Greedy"
            )
        )
        parts.append(_table(head, rows))
    count = next(
        (f["n"] for s in results.values() for f in s.get("sampled", {}).values() if f.get("n")),
        None,
    )
    note = "Small print: 95 % intervals. KL in nats per sentence, losses in nats per token."
    if count:
        dev = content.get("environment", {}).get("split") == "dev"
        seen = "that settings were chosen on" if dev else "that were not trained on"
        note = f"Measured on {count} records {seen}. {note}"
    parts.append(f'<p class="note">{escape(note)}</p>')
    return "".join(parts)


_UNITS = {
    "coverage": "(share of the record's slots)",
    "invented": "(slots per sentence)",
    "value": "(mean score)",
}


def _reward_model(content: dict) -> str:
    groups = content.get("reward_model", {})
    labeler = content.get("labeler", {})
    if not (groups or labeler):
        return ""
    parts = ["<h2>Reward model and labeler</h2>"]
    rows = []
    for name, found in groups.items():
        for group, accuracy in found.items():
            cells = [_cell(accuracy[k], "percent") for k in ("accuracy", "longer")]
            pairs = f"{accuracy['pairs']:,}" if "pairs" in accuracy else ""
            criterion = "all pairs" if group == "all" else group
            rows.append([escape(JUDGES.get(name, name)), escape(criterion), *cells, pairs])
    if rows:
        head = ["ranked by", "criterion", "reward model agrees", "longer wins", "pairs"]
        parts.append(
            "<p>How often the reward model orders two completions as the ranking does, compared "
            "with the rule that the longer one wins. Tied pairs are left out.</p>"
        )
        parts.append(_table(head, rows, {1}))
    if labeler:
        parts.append(
            "<h3>The labeler stands in for people</h3><p>The reward model was trained on rankings by a "
            "program that compares each sentence with its record. Its agreement with human "
            "judgements:</p>"
        )
        rows = []
        for key, value in labeler.items():
            group, _, name = key.partition("/")
            words = {
                "agreement": f"agrees with people's strict preferences: {name}",
                "decided": f"share of those pairs that it does not tie: {name}",
                "references": f"human references: {name} {_UNITS.get(name, '')}",
            }.get(group, key)
            style = "number" if name in ("invented", "value") else "percent"
            rows.append([escape(words), format_value(value, style)])
        parts.append(_table(["", ""], rows))
    return "".join(parts)


def _sample(content: dict, sample: dict) -> str:
    chips = "".join(
        f'<span class="chip"><i>{escape(str(k))}</i>{escape(str(v))}</span>'
        for k, v in sample["record"].items()
    )
    rows = []
    for system in content["systems"]:
        if system not in sample["outputs"]:
            continue
        output = sample["outputs"][system]
        found = {"text": output} if isinstance(output, str) else output
        text = escape(found["text"])
        wrong = [
            f"{w}: {', '.join(map(str, found[w]))}" for w in ("missing", "invented") if found.get(w)
        ]
        if wrong:
            text += f'<span class="bad">{escape("; ".join(wrong))}</span>'
        elif "missing" in found:
            text += '<span class="good">all slots, nothing invented</span>'
        rows.append([_name(system), text])
    if isinstance(sample.get("human"), str):
        rows.append(["a person", escape(sample["human"])])
    return f'<div class="sample"><p class="chips">{chips}</p>{_table(["", ""], rows, {1})}</div>'


def _samples(content: dict) -> str:
    samples = content.get("samples", [])
    if not samples:
        return ""
    intro = "<p>One sample of each system for the same record.</p>"
    return "<h2>What they write</h2>" + intro + "".join(_sample(content, s) for s in samples)


def _curves(logs: dict[str, list[dict]]) -> str:
    parts = []
    if svg := plots.over_kl(logs):
        parts.append("<h2>Reward model against labeler</h2>")
        caption = (
            "Each point is one PPO iteration. While both scores rise, the reward model is a good guide. "
            "Where the upper one keeps rising and the lower one falls, it is over-optimized."
        )
        parts.append(_image(svg, "RM score and labeler score over KL", caption))
        for name, rows in logs.items():
            if (kl := plots.over_optimized(rows)) is not None:
                parts.append(
                    f'<p class="warn"><b>{escape(label(name))} is over-optimized:</b> beyond a KL of '
                    f"about {kl:.1f} nats the reward model's score still rises while the labeler's "
                    f"falls. Raise the KL coefficient or stop earlier.</p>"
                )
    curves = plots.learning(logs)
    if curves:
        parts.append("<h2>Learning curves</h2>")
        for heading, svg in curves:
            parts.append(f"<h3>{escape(heading)}</h3>{_image(svg, f'learning curves: {heading}')}")
    return "".join(parts)


def _time(content: dict) -> str:
    stages, speed = content.get("stages", []), content.get("speed", {})
    if not (stages or speed):
        return ""
    parts = ["<h2>Time</h2>"]
    if stages:
        longest = max(s["seconds"] for s in stages) or 1.0
        rows = [
            [
                escape(label(s["name"])),
                duration(s["seconds"]),
                f'<span class="bar" style="width:{100 * max(s["seconds"], 0) / longest:.1f}%"></span>',
            ]
            for s in stages
        ]
        parts.append(_table(["stage", "time", "&nbsp;"], rows, {2}))
    if {"auto", "reference"} <= speed.keys():
        parts.append(f"<p>{escape(speed_sentence(speed))}</p>")
    return "".join(parts)


def _environment(content: dict) -> str:
    parts = []
    if content.get("environment"):
        parts.append("<h2>Environment</h2>" + _list(content["environment"]))
    if content.get("backends"):
        rows = [
            [f"<code>{escape(str(k))}</code>", escape(str(v))]
            for k, v in content["backends"].items()
        ]
        parts.append("<h3>Backend of each op</h3>" + _table(["op", "backend"], rows, {1}))
    return "".join(parts)


def page(content: dict, logs: dict[str, list[dict]]) -> str:
    """The HTML of the report.

    Args:
        content: content of report.json, checked by `content.check`. Its text is escaped here.
        logs: log rows by stage.
    """
    title = content.get("title", "fastrlhf run")
    under = []
    if isinstance(content.get("seconds"), int | float):
        under.append(f"total time {duration(content['seconds'])}")
    date = content.get("environment", {}).get("date")
    if date:
        under.append(str(date))
    command = content.get("command")
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(", ".join(under))}</p>' if under else "",
        f"<pre>{escape(command)}</pre>" if command else "",
        _cards(content),
        _results(content),
        _samples(content),
        _curves(logs),
        _reward_model(content),
        _time(content),
        _environment(content),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head>\n<body>"
        + "\n".join(part for part in body if part)
        + "</body></html>\n"
    )
