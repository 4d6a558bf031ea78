"""README's performance section and its plots, generated from the newest results file of each device.

    python benchmarks/readme.py [--check]

Writes between the marks in README.md and into benchmarks/plots/. With --check it writes nothing, and the
exit status is 1 where the section is not what the committed results give.
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
RESULTS, PLOTS = HERE / "results", HERE / "plots"
BEGIN, END = "<!-- bench-table -->", "<!-- /bench-table -->"
EAGER = ("eager", "torch.compile")
PLAIN_HEADS = ("bf16 head", "fp16 head", "fp32 head", "fp32 head, TF32")  # in a table of their own
SIDE_BY_SIDE = "16-bit heads, side by side"
SIDE_BY_SIDE_NOTE = (
    "*÷ GEMMs*: the time over that of the one or three bare products in the operands' type; *MB*: at the peak of a "
    "call, beyond its operands and what it returns; *error*: the largest against fp64, of a log-prob or "
    "(`linear_ppo_loss`) of the loss. The bf16 head multiplies in bf16 and casts its logits to fp32, "
    "the fp32 head casts both operands. Heads of others stand here with their time, whatever the gate says of them."
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
    "Sequences": ("kl_reward", "gae", "kl_gae", "masked_whiten"),
    "Losses": ("ppo_loss", "ranking_loss"),
}
YARDSTICKS = {
    "read_floor_ms": "time ÷ `logits.sum()`",
    "gae_ms": "time ÷ `gae`",
    "gemm_ms": "time ÷ bare GEMM",
    "three_gemms_ms": "time ÷ 3 bare GEMMs",
}
# Of a file from before short calls were timed cold as well.
CACHED = (
    " Shares above 100 % are those of calls whose data stood in the cache, where memory is no floor "
    "(sequences), and of a product that ran faster than the one it is measured by (heads): `make bench` no "
    "longer gives any."
)
NONE_YET = "No results file is committed yet; `make bench` writes one."


def newest(folder: Path = RESULTS) -> dict[str, tuple[str, dict]]:
    """Device -> (file name, document) of the newest whole run in `folder`."""
    found: dict[str, tuple[str, dict]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            document = json.loads(path.read_text())
            device, date, quick = (document[key] for key in ("device", "date", "quick"))
            document["rows"], document["machine"]["name"]  # they must be there
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no whole results file of run.py: {error!r}") from error
        if quick or (device in found and found[device][1]["date"] > date):
            continue
        found[device] = (path.name, document)
    return {device: found[device] for device in DEVICES if device in found}


def section(found: dict[str, tuple[str, dict]]) -> str:
    """The Markdown that stands between the marks."""
    parts = [_device(device, *found[device]) for device in found] or [NONE_YET]
    if "cuda" not in found:
        parts.append("No GPU figure exists yet.")
    return "\n\n".join(parts) + "\n"


def _device(device: str, file: str, document: dict) -> str:
    machine = document["machine"]
    threads = f"{machine['threads']} threads, " if device == "cpu" else ""
    commit = f", commit {document['commit']}" if "commit" in document else ""
    head = (
        f"**{DEVICES[device]}**: {machine['name']}, {threads}"
        f"torch {machine['torch']}, {document['date']}{commit} "
        f"([`{file}`](benchmarks/results/{file})). *n*× is how many times as fast as that provider, "
        "in turns within one run; *of floor* is the share of this machine's own copy bandwidth (or of "
        "its matrix product rate) that the op's definition needs."
    )
    if device == "cuda":
        head += (
            " *ms* is the device's time, *host ms* what the call keeps the CPU busy. A best peer is one "
            "whose result passed the gate; *faster, ungated* are those whose result failed it or was not "
            "compared."
        )
    elif not document.get("cold"):
        head += CACHED
    head = " ".join([head, *document.get("notes", [])])
    family = _gpu_family if device == "cuda" else _family
    tables = [family(title, ops, document["rows"]) for title, ops in FAMILIES.items()]
    tables.insert(2, _side_by_side(document["rows"]))
    tables += [_updates(document.get("updates")), _bits(document.get("gemm_bits"))]
    return "\n\n".join([head, *(t for t in tables if t), _plots(device, document["rows"])])


def _family(title: str, ops: tuple[str, ...], rows: list[dict]) -> str:
    rows = [row for row in rows if row["op"] in ops]
    ours = [row for row in rows if row["ours"]]
    if not ours:
        return ""
    others = list(dict.fromkeys(row["provider"] for row in rows if not row["ours"]))
    others = [other for other in others if other not in PLAIN_HEADS]
    yardsticks = [key for key in YARDSTICKS if any(key in row for row in ours)]
    head = [title, "direction", "backend", "ms", *(f"× {other}" for other in others)]
    lines = [head + [YARDSTICKS[key] for key in yardsticks] + ["of floor"]]
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
        share = row.get("fraction_of_floor") if "median_ms" in row else None
        cells.append(f"{share:.0%}" if share else "")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _side_by_side(rows: list[dict]) -> str:
    """Time, memory and error of every head of 16-bit operands, ours and others', of a forward and of an update."""
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
        # The name in files from before the fp32 head was timed as well.
        name = "bf16 head" if row["provider"] == "whole logits" else row["provider"]
        cells = [f"`{row['op']}` {row['case']} {row['dtype']}", row["direction"]]
        cells += [f"**{name}**" if row["ours"] else name, _number(took)]
        cells.append(_number(took / products) if products else "")
        # A forward returns next to nothing, so that the peak will do.
        memory = row.get(
            "beyond_bytes", row.get("peak_bytes") if row["op"] == "linear_logprob" else None
        )
        cells.append("" if memory is None else _number(memory / 1e6))
        errors = row.get("error"), row.get("gradient_errors", {}).get("weight")
        cells += ["" if error is None else f"{error:.1e}" for error in errors]
        lines.append(cells)
    if len(lines) == 2:
        return ""
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{table}\n\n{SIDE_BY_SIDE_NOTE}"


def _updates(found: dict | None) -> str:
    """A row a head: seconds and peak memory of an update by tokens, and the largest batch (`update.py`)."""
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
        more = (
            largest and largest["does_not_fit"] is None
        )  # nothing larger was tried, or did not end
        lines[-1].append(f"{largest['tokens']}{' or more' * more}" if largest else "")
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _update(row: dict | None) -> str:
    if row is None or "fits" not in row:
        return "broke off" if row and "raised" in row else ""
    if not row["fits"]:
        return "does not fit"
    memory = row["peak_bytes"] / 1e9
    return f"{_number(row['seconds'])} s, {_number(memory)} GB"


def _bits(found: dict | None) -> str:
    """Whether the library's GEMM gives a logit the same bits in every chunk (`gemm_bits.py`)."""
    if found is None:
        return ""
    rows = [row for row in found["rows"] if row["what"] == "chunk"]
    other = sorted({row["rows"] for row in rows if not row["equal"]})
    if not other:
        return "A logit has the same bits in chunks of every length that the presets make."
    lengths = ", ".join(map(str, other))
    return f"A logit has other bits in chunks of {lengths} rows than in those of the fast preset at all rows."


def _beside(row: dict, rows: list[dict]) -> dict[str, dict]:
    """Provider -> row, of those at the same case and in the same direction."""
    group = ("op", "case", "dtype", "direction")
    return {r["provider"]: r for r in rows if all(r[key] == row[key] for key in group)}


def _gpu_family(title: str, ops: tuple[str, ...], rows: list[dict]) -> str:
    """Ours, the best of the others that passed the gate, and those that did not but were faster."""
    ours = [row for row in rows if row["op"] in ops and row["ours"]]
    if not ours:
        return ""
    head = [title, "direction", "backend", "ms", "host ms", "× eager", "best peer", "× best peer"]
    lines = [[*head, "faster, ungated", "of floor"]]
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
        share = row.get("fraction_of_floor")
        cells.append(f"{share:.0%}" if share else "in cache" if row.get("in_cache") else "")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _number(value: float | None, missing: str = "") -> str:
    """Three digits, no exponent."""
    if value is None:
        return missing
    return f"{value:.0f}" if value >= 99.5 else f"{value:.3g}"


def _ops(rows: list[dict]) -> list[str]:
    known = [op for ops in FAMILIES.values() for op in ops]
    return [op for op in known if any(row["op"] == op and "median_ms" in row for row in rows)]


def _plots(device: str, rows: list[dict]) -> str:
    return "\n".join(
        f"![{op} on {DEVICES[device]}](benchmarks/plots/{device}-{op}.svg)" for op in _ops(rows)
    )


def draw(device: str, file: str, document: dict, folder: Path) -> list[Path]:
    """One SVG an op: time of every provider, and the floor. Each names the file it was drawn from."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    style = {"svg.fonttype": "none", "svg.hashsalt": "fastrlhf", "font.size": 9}
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for op in _ops(document["rows"]):
        rows = [r for r in document["rows"] if r["op"] == op and "median_ms" in r]
        groups = list(dict.fromkeys((r["case"], r["dtype"], r["direction"]) for r in rows))
        with pyplot.rc_context(style):
            height = 0.6 + 0.2 * (len(rows) + len(groups))
            figure, axes = pyplot.subplots(figsize=(7, height), layout="constrained")
            place, ticks = 0.0, []
            for group in groups:
                axes.text(0, place, "  " + ", ".join(group), va="center", weight="bold")
                axes.texts[-1].set_transform(axes.get_yaxis_transform())
                place += 1
                for row in rows:
                    if (row["case"], row["dtype"], row["direction"]) != group:
                        continue
                    took = row["median_ms"]  # without quantiles in the file there is no bar
                    low, high = (abs(row.get(k, took) - took) for k in ("p20_ms", "p80_ms"))
                    axes.barh(
                        place,
                        row["median_ms"],
                        xerr=[[low], [high]],
                        color="#0f766e" if row["ours"] else "#9aa1ab",
                        height=0.8,
                    )
                    if "floor_ms" in row:
                        line = [row["floor_ms"]] * 2
                        axes.plot(line, [place - 0.5, place + 0.5], "--", color="#d97706")
                    ticks.append((place, row["provider"]))
                    place += 1
            axes.set_xscale("log")
            axes.set_yticks([t for t, _ in ticks], [name for _, name in ticks])
            axes.set_ylim(place - 0.4, -0.7)
            axes.set_xlabel("ms a call, 20 to 80 % of samples (dashed: the floor)")
            axes.set_title(f"{op}, {document['machine']['name']}", loc="left")
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
            path = folder / f"{device}-{op}.svg"
            # Without the date, the same results give the same file.
            figure.savefig(path, metadata={"Date": None, "Source": file})
            pyplot.close(figure)
            written.append(path)
    return written


def spliced(text: str, body: str) -> str:
    """`text` with `body` between the marks."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README.md must hold {BEGIN} and {END} once each, in this order")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{body}{END}{rest.partition(END)[2]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; is README up to date?")
    arguments = parser.parse_args()
    try:
        found = newest()
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    old = README.read_text()
    new = spliced(old, section(found))
    if arguments.check:
        stale = old != new
        print(
            "README's performance section is "
            + ("stale: make bench-readme" if stale else "current")
        )
        return int(stale)
    for device, (file, document) in found.items():
        draw(device, file, document, PLOTS)
    README.write_text(new)
    print(f"wrote README.md from {', '.join(f for f, _ in found.values()) or 'no results file'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
