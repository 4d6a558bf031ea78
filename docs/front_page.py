"""Writes README's table and docs/front_page.svg from the committed results files.

    python docs/front_page.py [--check]

Standard library only. With --check nothing is written, and the exit status is 1 if either is stale.
A row shows the GPU's figures if that run also timed another implementation of the op, otherwise the CPU's.
"""

import argparse
import json
import sys
from html import escape
from pathlib import Path

DOCS = Path(__file__).resolve().parent
README, PLOT = DOCS.parent / "README.md", DOCS / "front_page.svg"
RESULTS = DOCS.parent / "benchmarks" / "results"
FILES = {"H200": "nvidia-h200-2026-11-27.json", "CPU": "amd-epyc-2026-11-27.json"}
# The provider that AUTO chooses on each machine, whether or not another one of ours is faster.
OURS = {"H200": "cuda", "CPU": "cpu"}
BEGIN, END = "<!-- front-page-table -->", "<!-- /front-page-table -->"

FORWARD, BOTH = "forward", "forward+backward"
# (op, what it computes, direction)
ROWS = [
    ("token_logprob", "log-prob and entropy from logits", FORWARD),
    ("token_loss", "policy losses or NLL from logits", BOTH),
    ("linear_logprob", "log-prob and entropy from hidden states, without `[N, V]` logits", FORWARD),
    ("linear_cross_entropy", "NLL from hidden states", BOTH),
    ("linear_ppo_loss", "policy losses from hidden states", BOTH),
    ("linear_token_loss", "your own loss from hidden states", BOTH),
    ("kl_reward", "score minus β·KL, per token", FORWARD),
    ("gae", "advantages and returns, whitened", FORWARD),
    ("kl_gae", "`kl_reward` and `gae` in one pass", FORWARD),
    ("masked_whiten", "(x − mean) / std under a mask", FORWARD),
    ("ppo_loss", "policy losses, value loss, KL, entropy bonus, metrics", BOTH),
    ("ranking_loss", "pairwise reward-model loss over K completions", BOTH),
]
PYTORCH = {
    "eager", "torch.compile", "python loop", "whole logits", "bf16 head", "fp32 head",
    "F.cross_entropy", "F.cross_entropy in bf16", "F.linear_cross_entropy",
}  # fmt: skip
PANELS = [("token_logprob", FORWARD), ("linear_ppo_loss", BOTH)]


def rows_of(machine: str) -> list[dict]:
    return json.loads((RESULTS / FILES[machine]).read_text())["rows"]


def group_of(rows: list[dict], op: str, direction: str) -> list[dict]:
    """The rows of the first case of `op` in the file: every provider that has a time there."""
    rows = [r for r in rows if r["op"] == op and r["direction"] == direction and time_of(r)]
    first = rows[0] if rows else None
    return [r for r in rows if (r["case"], r["dtype"]) == (first["case"], first["dtype"])]


def time_of(row: dict) -> float | None:
    return row.get("median_ms", row.get("ungated_ms"))


def case_of(row: dict) -> str:
    dtype = {"bfloat16": "bf16", "float32": "fp32"}[row["dtype"]]
    return f"{row['case']} {dtype}, {row['direction'].replace('+', ' + ')}"


def shown(row: dict | None) -> str:
    if row is None:
        return ""
    name = row["provider"].replace("F.cross_entropy", "`F.cross_entropy`")
    return f"{name} {number(time_of(row))}{mark(row)}"


def mark(row: dict) -> str:
    """† not compared in that run; ‡ failed the accuracy check; § the host was slower than the device."""
    if "median_ms" not in row:
        return "†" if "was not compared" in row["ungated"] else "‡"
    # The host takes as long as the timed interval, so the host determines it.
    return "§" if row.get("host_ms", 0) > 0.95 * row["median_ms"] else ""


def number(value: float) -> str:
    """Three significant digits without an exponent."""
    return f"{value:.0f}" if value >= 99.5 else f"{value:.3g}"


def table(results: dict[str, list[dict]]) -> str:
    lines = [
        "| op | computes | measured | ours, ms | fastest PyTorch, ms | fastest other library, ms |"
    ]
    lines.append("| --- | --- | --- | ---: | --- | --- |")
    for op, computes, direction in ROWS:
        for machine, rows in results.items():
            group = group_of(rows, op, direction)
            ours = next((r for r in group if r["provider"] == OURS[machine]), None)
            others = [r for r in group if not r["ours"]]
            if ours and others:
                break
        else:
            raise SystemExit(f"front_page.py: no results file times {op} beside another provider")
        pytorch = [r for r in others if r["provider"] in PYTORCH]
        libraries = [r for r in others if r["provider"] not in PYTORCH]
        what = f"{machine}, {case_of(ours)}"
        cells = [f"`{op}`", computes, what, number(ours["median_ms"]) + mark(ours)]
        cells += [shown(min(some, key=time_of, default=None)) for some in (pytorch, libraries)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: list[dict]) -> str:
    """Horizontal bars from 0 on a linear axis, one panel per op."""
    label, width, bar, gap = 210, 560, 16, 6
    parts, y = [], 8
    for op, direction in PANELS:
        group = sorted(group_of(rows, op, direction), key=time_of)
        step = tick_step(time_of(group[-1]))
        limit = step * -(-time_of(group[-1]) // step)
        title = f"{op} on an H200, {case_of(group[0])}, ms"
        parts.append(f'<text x="0" y="{y + 12}" font-weight="bold">{escape(title)}</text>')
        y += 24
        top = y
        for row in group:
            length = width * time_of(row) / limit
            colour = "#0f766e" if row["ours"] else "#9aa1ab"
            name = f"fastrlhf {row['provider']}" if row["ours"] else row["provider"]
            note = f"{number(time_of(row))} {mark(row)}".rstrip()
            middle = y + bar - 4
            parts.append(
                f'<text x="{label - 8}" y="{middle}" text-anchor="end">{escape(name)}</text>'
            )
            parts.append(
                f'<rect x="{label}" y="{y}" width="{length:.1f}" height="{bar}" fill="{colour}"/>'
            )
            parts.append(f'<text x="{label + length + 5:.1f}" y="{middle}">{note}</text>')
            y += bar + gap
        for i in range(round(limit / step) + 1):
            x = label + width * i * step / limit
            parts.append(
                f'<line x1="{x:.1f}" y1="{top - 3}" x2="{x:.1f}" y2="{y}" stroke="#888" stroke-opacity=".3"/>'
            )
            parts.append(f'<text x="{x:.1f}" y="{y + 13}" text-anchor="middle">{i * step:g}</text>')
        y += 34
    style = 'font-family="sans-serif" font-size="12"'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {label + width + 60} {y}" {style}>'
    )
    white = '<rect width="100%" height="100%" fill="#fff"/>'
    return "\n".join([head, white, *parts, "</svg>", ""])


def tick_step(largest: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that gives at most six ticks."""
    scale = 10.0 ** len(str(int(largest)))
    steps = sorted(scale * m * f for f in (0.1, 0.01, 0.001) for m in (1, 2, 5))
    return next(s for s in steps if largest / s <= 6)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    check = parser.parse_args().check
    results = {machine: rows_of(machine) for machine in FILES}
    old = README.read_text()
    if old.count(BEGIN) != 1 or old.count(END) != 1:
        raise SystemExit(f"README.md must hold {BEGIN} and {END} once each")
    before, _, rest = old.partition(BEGIN)
    wanted = {
        README: f"{before}{BEGIN}\n{table(results)}\n{END}{rest.partition(END)[2]}",
        PLOT: plot(results["H200"]),
    }
    stale = [p for p, text in wanted.items() if not p.is_file() or p.read_text() != text]
    for path in stale:
        print(f"{path.name} is stale: python docs/front_page.py" if check else f"wrote {path.name}")
        if not check:
            path.write_text(wanted[path])
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
