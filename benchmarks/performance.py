"""Generate the tables of docs/performance.md and their plots from the newest results file of each device.

    python benchmarks/performance.py [--check]

Writes between the markers in docs/performance.md, and docs/plots/. With --check it writes nothing; the exit status
is 1 if the page differs from what the committed results give. README's table is docs/front_page.py's.
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
DOCS, RESULTS = HERE.parent / "docs", HERE / "results"
PAGE, PLOTS = DOCS / "performance.md", DOCS / "plots"
BEGIN, END = "<!-- performance -->", "<!-- /performance -->"
EAGER = ("eager", "torch.compile")
PLAIN_HEADS = ("bf16 head", "fp16 head", "fp32 head", "fp32 head, TF32")  # in a table of their own
SIDE_BY_SIDE = "16-bit heads, side by side"
SIDE_BY_SIDE_NOTE = (
    "*÷ GEMMs*: time over that of the bare products in the operands' dtype, one for a forward and three for an "
    "update. *MB*: peak memory of a call beyond its operands and results. *error*: largest error against fp64, of a "
    "log-prob or (`linear_ppo_loss`) of the loss. The bf16 head multiplies in bf16 and casts its logits to fp32; the "
    "fp32 head casts both operands. This table lists third-party heads whether or not they pass the gate."
)
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
FAMILIES = {
    "From logits": ("token_logprob", "token_loss"),
    "From hidden states": (
        "linear_logprob",
        "linear_cross_entropy",
        "linear_ppo_loss",
        "linear_token_loss",
    ),
    "Sequences": ("kl_reward", "gae", "kl_gae", "masked_whiten", "group_advantage"),
    "Losses": ("ppo_loss", "ranking_loss"),
}
YARDSTICKS = {
    "read_ms": "time ÷ `logits.sum()`",
    "gae_ms": "time ÷ `gae`",
    "gemm_ms": "time ÷ bare GEMM",
    "three_gemms_ms": "time ÷ 3 bare GEMMs",
}
# For CPU files from before cold_ms.
WARM = (
    " This file predates the cold-cache timing. Fractions above 100 % belong to calls whose data were in the cache, "
    "or to a head that ran faster than the product that measured the ceiling."
)
NONE_YET = "No results file is committed yet; `make bench` writes one."


def newest(folder: Path = RESULTS) -> dict[str, tuple[str, dict]]:
    """Device -> (file name, document) of the newest full-size run in `folder`."""
    found: dict[str, tuple[str, dict]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            document = json.loads(path.read_text())
            device, date, quick = (document[key] for key in ("device", "date", "quick"))
            document["rows"], document["machine"]["name"]  # required
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no whole results file of run.py: {error!r}") from error
        if quick or (device in found and found[device][1]["date"] > date):
            continue
        found[device] = (path.name, document)
    return {device: found[device] for device in DEVICES if device in found}


def section(found: dict[str, tuple[str, dict]]) -> str:
    """The Markdown between the markers."""
    parts = [_device(device, *found[device]) for device in found] or [NONE_YET]
    if "cuda" not in found:
        parts.append("No GPU figure exists yet.")
    return "\n\n".join(parts) + "\n"


def _device(device: str, file: str, document: dict) -> str:
    machine, rows = document["machine"], document["rows"]
    threads = f"{machine['threads']} threads, " if device == "cpu" else ""
    commit = f", commit {document['commit']}" if "commit" in document else ""
    head = (
        f"{machine['name']}, {threads}torch {machine['torch']}, {document['date']}{commit} "
        f"([`{file}`](../benchmarks/results/{file}))."
    )
    if device == "cpu" and not document.get("cold"):
        head += WARM
    head = " ".join([head, *document.get("notes", [])])
    family = _gpu_family if device == "cuda" else _family
    tables = [family(title, ops, rows) for title, ops in FAMILIES.items()]
    tables.insert(2, _side_by_side(rows))
    tables += [_updates(document.get("updates")), _bitwise(document.get("gemm_bitwise"))]
    return "\n\n".join(
        [f"## {DEVICES[device]}", head, *(t for t in tables if t), _plots(device, rows)]
    )


def _markdown(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _family(title: str, ops: tuple[str, ...], rows: list[dict]) -> str:
    """CPU: a row of ours with the speedup over every other provider."""
    rows = [row for row in rows if row["op"] in ops]
    ours = [row for row in rows if row["ours"]]
    if not ours:
        return ""
    others = list(dict.fromkeys(row["provider"] for row in rows if not row["ours"]))
    others = [other for other in others if other not in PLAIN_HEADS]
    yardsticks = [key for key in YARDSTICKS if any(key in row for row in ours)]
    head = [title, "direction", "backend", "ms", *(f"× {other}" for other in others)]
    lines = [head + [YARDSTICKS[key] for key in yardsticks] + ["of roofline"]]
    lines.append(["---"] * 3 + ["---:"] * (len(lines[0]) - 3))
    for row in ours:
        beside = _beside(row, rows)
        cells = [f"`{row['op']}` {row['case']} {row['dtype']}", row["direction"], row["provider"]]
        cells.append(_number(row.get("median_ms"), "wrong"))
        for other in others:
            if other not in beside or "median_ms" not in row:
                cells.append("")
            elif "median_ms" in beside[other]:
                cells.append(f"{_number(row['times_as_fast_as'][other])}×")
            else:
                cells.append("wrong")
        for key in yardsticks:
            cells.append(_number(row["median_ms"] / row[key]) if key in row else "")
        share = row.get("fraction_of_roofline") if "median_ms" in row else None
        cells.append(f"{share:.0%}" if share else "")
        lines.append(cells)
    return _markdown(lines)


def _side_by_side(rows: list[dict]) -> str:
    """Time, memory and error of every head with 16-bit operands, for a forward and for an update."""
    bare = {("linear_logprob", "forward"): "gemm_ms"}
    bare["linear_ppo_loss", "forward+backward"] = "three_gemms_ms"
    lines = [[SIDE_BY_SIDE, "direction", "head", "ms", "÷ GEMMs", "MB", "error", "error of dW"]]
    lines.append(["---"] * 3 + ["---:"] * 5)
    for row in rows:
        took = row.get("median_ms", None if row["ours"] else row.get("ungated_ms"))
        small = row["dtype"] in ("bfloat16", "float16") and "masked" not in row["case"]
        key = bare.get((row["op"], row["direction"]))
        if key is None or not small or took is None:
            continue
        products = next((r[key] for r in _beside(row, rows).values() if key in r), None)
        # Older files call the bf16 head "whole logits".
        name = "bf16 head" if row["provider"] == "whole logits" else row["provider"]
        cells = [f"`{row['op']}` {row['case']} {row['dtype']}", row["direction"]]
        cells += [f"**{name}**" if row["ours"] else name, _number(took)]
        cells.append(_number(took / products) if products else "")
        # A forward returns next to nothing, so its peak is what lies beyond the results.
        memory = row.get(
            "beyond_bytes", row.get("peak_bytes") if row["op"] == "linear_logprob" else None
        )
        cells.append("" if memory is None else _number(memory / 1e6))
        errors = row.get("error"), row.get("gradient_errors", {}).get("weight")
        cells += ["" if error is None else f"{error:.1e}" for error in errors]
        lines.append(cells)
    return "" if len(lines) == 2 else f"{_markdown(lines)}\n\n{SIDE_BY_SIDE_NOTE}"


def _updates(found: dict | None) -> str:
    """update.py: per head, time and peak memory of an update by tokens, and the largest batch that fits."""
    if found is None:
        return ""
    sizes = list(dict.fromkeys(row["tokens"] for row in found["rows"]))
    billions = found["model"]["parameters"] / 1e9
    lines = [[f"Update of {billions:.2g}B, {found['dtype']}", *(f"{n} tokens" for n in sizes)]]
    lines[0].append("largest batch")
    lines.append(["---"] + ["---:"] * (len(sizes) + 1))
    for head in dict.fromkeys(row["head"] for row in found["rows"]):
        rows = {row["tokens"]: row for row in found["rows"] if row["head"] == head}
        lines.append([head, *(_update(rows.get(n)) for n in sizes)])
        largest = found["largest"].get(head)
        # Nothing larger was tried, or the search ran out of time.
        more = largest and largest["does_not_fit"] is None
        lines[-1].append(f"{largest['tokens']}{' or more' * more}" if largest else "")
    return _markdown(lines)


def _update(row: dict | None) -> str:
    if row is None or "fits" not in row:
        return "failed" if row and "raised" in row else ""
    if not row["fits"]:
        return "does not fit"
    memory = row["peak_bytes"] / 1e9
    return f"{_number(row['seconds'])} s, {_number(memory)} GB"


def _bitwise(found: dict | None) -> str:
    """gemm_bitwise.py: does the product of a chunk depend on the length of the chunk?"""
    if found is None:
        return ""
    rows = [row for row in found["rows"] if row["what"] == "chunk"]
    other = sorted({row["rows"] for row in rows if not row["equal"]})
    if not other:
        return "Logits are bitwise identical in chunks of every length that the presets use."
    lengths = ", ".join(map(str, other))
    return f"Logits in chunks of {lengths} rows differ bitwise from those of the fast preset at all rows."


def _beside(row: dict, rows: list[dict]) -> dict[str, dict]:
    """Provider -> row of the same case and direction."""
    group = ("op", "case", "dtype", "direction")
    return {r["provider"]: r for r in rows if all(r[key] == row[key] for key in group)}


def _gpu_family(title: str, ops: tuple[str, ...], rows: list[dict]) -> str:
    """GPU: a row of ours, the fastest third-party provider that passed the gate, faster ones that did not."""
    ours = [row for row in rows if row["op"] in ops and row["ours"]]
    if not ours:
        return ""
    head = [title, "direction", "backend", "ms", "host ms", "× eager", "best peer", "× best peer"]
    lines = [[*head, "faster, ungated", "of roofline"]]
    lines.append(["---"] * 3 + ["---:"] * 3 + ["---", "---:", "---", "---:"])
    for row in ours:
        took, beside = row.get("median_ms"), _beside(row, rows)
        peers = {n: r for n, r in beside.items() if not r["ours"] and n not in EAGER}
        gated = {n: r["median_ms"] for n, r in peers.items() if "median_ms" in r}
        best = min(gated, key=gated.get, default=None)
        faster = [
            f"{name} {_number(r['ungated_ms'])} ms"
            for name, r in peers.items()
            if took and (r.get("ungated_ms") or took) < took
        ]
        cells = [f"`{row['op']}` {row['case']} {row['dtype']}", row["direction"], row["provider"]]
        cells += [_number(took, "wrong"), _number(row.get("host_ms"))]
        eager = row.get("times_as_fast_as", {}).get("eager")
        cells.append(f"{_number(eager)}×" if eager else "")
        cells.append(f"{best} {_number(gated[best])} ms" if best else "")
        cells.append(f"{_number(gated[best] / took)}×" if best and took else "")
        cells.append(", ".join(faster))
        share = row.get("fraction_of_roofline")
        cells.append(f"{share:.0%}" if share else "in cache" if row.get("in_cache") else "")
        lines.append(cells)
    return _markdown(lines)


def _number(value: float | None, missing: str = "") -> str:
    """Three significant digits without an exponent."""
    if value is None:
        return missing
    return f"{value:.0f}" if value >= 99.5 else f"{value:.3g}"


def _ops(rows: list[dict]) -> list[str]:
    known = [op for ops in FAMILIES.values() for op in ops]
    return [op for op in known if any(row["op"] == op and "median_ms" in row for row in rows)]


def _plots(device: str, rows: list[dict]) -> str:
    return "\n".join(f"![{op} on {DEVICES[device]}](plots/{device}-{op}.svg)" for op in _ops(rows))


def draw(device: str, file: str, document: dict, folder: Path) -> list[Path]:
    """One SVG per op, named after the results file in its metadata.

    A panel per case and direction: a bar per provider on a linear axis from 0, with its time, and the roofline.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    style = {"svg.fonttype": "none", "svg.hashsalt": "fastrlhf", "font.size": 9}
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for op in _ops(document["rows"]):
        panels: dict[tuple, list[dict]] = {}
        for r in document["rows"]:
            if r["op"] == op and "median_ms" in r:
                panels.setdefault((r["case"], r["dtype"], r["direction"]), []).append(r)
        counts = [len(rows) for rows in panels.values()]
        with pyplot.rc_context(style):
            figure, grid = pyplot.subplots(
                len(panels),
                figsize=(7, 0.5 + 0.2 * sum(counts) + 0.55 * len(panels)),
                height_ratios=[0.6 + count for count in counts],
                layout="constrained",
                squeeze=False,
            )
            for axes, (panel, rows) in zip(grid[:, 0], panels.items(), strict=True):
                _draw_panel(axes, ", ".join(panel), rows)
            grid[-1, 0].set_xlabel("ms per call (line: 20th to 80th percentile; dashed: roofline)")
            figure.suptitle(f"{op}, {document['machine']['name']}", x=0.01, ha="left")
            path = folder / f"{device}-{op}.svg"
            # No date: the same results give the same file.
            figure.savefig(path, metadata={"Date": None, "Source": file})
            pyplot.close(figure)
            written.append(path)
    return written


def _draw_panel(axes, title: str, rows: list[dict]) -> None:
    for place, row in enumerate(rows):
        took = row["median_ms"]  # a row without quantiles gets no line
        low, high = (abs(row.get(k, took) - took) for k in ("p20_ms", "p80_ms"))
        color = "#0f766e" if row["ours"] else "#9aa1ab"
        axes.barh(place, took, xerr=[[low], [high]], color=color, height=0.8)
        axes.annotate(
            _number(took), (took + high, place), (3, 0), textcoords="offset points", va="center"
        )
        if "roofline_ms" in row:
            line = [row["roofline_ms"]] * 2
            axes.plot(line, [place - 0.5, place + 0.5], "--", color="#d97706")
    names = [f"fastrlhf ({r['provider']})" if r["ours"] else r["provider"] for r in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    longest = max(max(row["median_ms"], row.get("p80_ms", 0)) for row in rows)
    axes.set_xlim(0, 1.12 * longest)  # room for the last label
    axes.set_title(title, loc="left", fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def spliced(text: str, body: str) -> str:
    """`text` with `body` between the markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{PAGE.name} must hold {BEGIN} and {END} once each, in this order")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{body}{END}{rest.partition(END)[2]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    arguments = parser.parse_args()
    try:
        found = newest()
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    old = PAGE.read_text()
    new = spliced(old, section(found))
    if arguments.check:
        stale = old != new
        print(f"docs/performance.md is {'stale: make bench-docs' if stale else 'current'}")
        return int(stale)
    for device, (file, document) in found.items():
        draw(device, file, document, PLOTS)
    PAGE.write_text(new)
    print(f"wrote {PAGE.name} from {', '.join(f for f, _ in found.values()) or 'no results file'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
