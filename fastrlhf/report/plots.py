"""The report's plots, as SVG text: results with intervals, learning curves, scores over KL."""

import functools
import io
import math
from collections.abc import Sequence

import numpy as np

from fastrlhf.report.content import DECODINGS, figure
from fastrlhf.report.content import label as plain_label

COLORS = {
    "base": "#8b929c",
    "sft": "#4a5568",
    "ppo": "#d97706",
    "ppo_ptx": "#0f766e",
    "reward": "#7c3aed",
    "pretrain": "#8b929c",
    "rl_init": "#2563eb",
}
_SPARE = ("#be185d", "#1d4ed8", "#65a30d", "#a16207")
_STYLE = {
    "svg.fonttype": "path",
    "svg.hashsalt": "fastrlhf",  # makes the output deterministic
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#9aa1ab",
    "axes.linewidth": 0.8,
    "axes.labelcolor": "#3b4350",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ee",
    "grid.linewidth": 0.8,
    "text.color": "#1b2430",
    "xtick.color": "#3b4350",
    "ytick.color": "#3b4350",
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "figure.facecolor": "none",
}

_LARGEST = 1e100  # matplotlib's axes overflow beyond; NaN compares as false

# Panels: (title, y label, metrics). The first metric found is a solid line, the others are dashed.
_LM_PANELS = (("loss", "nats per token", ("train/loss", "loss", "train/nll", "valid/loss")),)
_REWARD_PANELS = (
    ("loss", "", ("train/loss", "loss", "valid/loss")),
    ("pair accuracy", "", ("train/accuracy", "accuracy", "valid/accuracy")),
)
_PPO_PANELS = (
    ("RM score", "", ("reward/rm",)),
    ("labeler score", "", ("reward/labeler",)),
    ("KL to the reference", "nats per sentence", ("kl/reference",)),
    ("loss of the pretraining mix", "nats per token", ("ptx/loss",)),
    ("entropy", "nats per token", ("policy/entropy",)),
    ("length", "tokens", ("length/mean",)),
    ("clipped ratios", "share of tokens", ("policy/clip_fraction",)),
    ("gradient norm", "", ("grad_norm/ppo", "grad_norm/ptx")),
    ("explained variance of the value model", "", ("value/explained_variance",)),
)


def label(system: str) -> str:
    """Display name of a system, without matplotlib's mathematics."""
    return plain_label(system).replace("$", r"\$")


def color(system: str) -> str:
    """The color of a system, the same in every plot."""
    return COLORS.get(system) or _SPARE[sum(map(ord, system)) % len(_SPARE)]


def _styled(function):
    # matplotlib reads the style both when artists are created and when they are drawn.
    @functools.wraps(function)
    def inside(*arguments):
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            return function(*arguments)

    return inside


def _figure(width: float, height: float, **subplots):
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    FigureCanvasSVG(figure)
    return figure, figure.subplots(squeeze=False, **subplots)


def _svg(figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def series(rows: Sequence[dict], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the rows with a finite `metric`."""
    found = []
    for number, row in enumerate(rows, 1):
        value = row.get(metric)
        if isinstance(value, int | float) and abs(value) < _LARGEST:
            found.append((row.get("step", number), value))
    return tuple(np.array(found, dtype=float).reshape(-1, 2).T)


def _points(rows: Sequence[dict], keys: Sequence[str]) -> list[list[float]]:
    points = [[r.get(k, math.nan) for k in keys] for r in rows]
    return [p for p in points if all(abs(x) < _LARGEST for x in p)]


def _drawable(interval: dict | None) -> bool:
    return bool(interval) and all(abs(interval[k]) < _LARGEST for k in ("mean", "low", "high"))


def smooth(values: np.ndarray, width: int = 5) -> np.ndarray:
    """Centered moving average over `width` values; shorter windows at the ends."""
    half = width // 2
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


@_styled
def results(content: dict) -> str | None:
    """Win rate, slot errors and loss on general text of every system, with intervals; None without figures."""
    systems = content["systems"]
    reference = content.get("reference", "sft")
    panels = []
    for title, name, scale in (
        (f"preferred to {label(reference)}, %", "win_rate", 100),
        ("slot errors per sentence", "errors", 1),
    ):
        points = [
            (system, i, figure(content, system, decoding, name), scale)
            for system in systems
            for i, decoding in enumerate(DECODINGS)
        ]
        panels.append((title, points))
    losses = [(s, 0, content["results"][s].get("text_loss"), 1) for s in systems]
    panels.append(("loss on general text, nats per token", losses))
    panels = [(title, [p for p in points if _drawable(p[2])]) for title, points in panels]
    panels = [p for p in panels if p[1]]
    if not panels:
        return None
    canvas, axes = _figure(10.6, 0.9 + 0.44 * len(systems), ncols=len(panels), sharey=True)
    for axis, (title, points) in zip(axes[0], panels, strict=True):
        axis.set_title(title)
        if title.startswith("preferred"):
            axis.axvline(50, color="#9aa1ab", linewidth=1, linestyle=":")
        paired = any(i for _, i, _, _ in points)
        for system, i, found, scale in points:
            y = systems.index(system) + (0.14 * (2 * i - 1) if paired else 0.0)
            mean, low, high = (scale * found[k] for k in ("mean", "low", "high"))
            axis.plot([low, high], [y, y], color=color(system), linewidth=2.2, alpha=0.75)
            fill = "white" if i else color(system)
            axis.plot(
                [mean], [y], "o", markersize=6, markerfacecolor=fill, markeredgecolor=color(system)
            )
        axis.set_yticks(range(len(systems)), [label(s) for s in systems])
        axis.set_ylim(len(systems) - 0.5, -0.5)
        axis.grid(axis="y", visible=False)
        axis.margins(x=0.12)
    return _svg(canvas)


def _curves(panels, stages: list[tuple[str, list[dict]]]) -> list[tuple]:
    """The panels that have data: (title, y label, [(stage, metric, steps, values)])."""
    out = []
    for title, unit, metrics in panels:
        lines = []
        for name, rows in stages:
            for metric in metrics:
                steps, values = series(rows, metric)
                if len(steps) > 1:
                    lines.append((name, metric, steps, values))
        if lines:
            out.append((title, unit, lines))
    return out


@_styled
def learning(logs: dict[str, list[dict]]) -> list[tuple[str, str]]:
    """Learning curves, as (heading, SVG): language-model and reward stages, then PPO and PPO-ptx together."""
    groups = []
    policy = [(n, rows) for n, rows in logs.items() if any("kl/reference" in r for r in rows)]
    names = {n for n, _ in policy}
    others = []
    for name, rows in logs.items():
        if name not in names:
            panels = _REWARD_PANELS if name.startswith(("reward", "rm")) else _LM_PANELS
            others += [
                (f"{label(name)}: {t}", u, lines) for t, u, lines in _curves(panels, [(name, rows)])
            ]
    groups.append(("Language model and reward model", others))
    groups.append(("PPO", _curves(_PPO_PANELS, policy)))
    return [(heading, _grid(panels)) for heading, panels in groups if panels]


def _grid(panels: list[tuple]) -> str:
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    canvas, axes = _figure(10.6 * columns / 3, 2.3 * lines, nrows=lines, ncols=columns)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    named = False
    for axis, (title, unit, curves) in zip(axes.flat, panels, strict=False):
        axis.set_title(title)
        axis.set_ylabel(unit)
        axis.set_xlabel("step")
        stages = list(dict.fromkeys(c[0] for c in curves))
        metrics = list(dict.fromkeys(c[1] for c in curves))
        for stage, metric, steps, values in curves:
            tone, dash = color(stage), "--" if metrics.index(metric) else "-"
            if len(values) > 30:
                axis.plot(steps, values, color=tone, alpha=0.22, linewidth=0.9)
                values = smooth(values, max(5, len(values) // 25))
            axis.plot(steps, values, dash, color=tone)
        entries = []
        if len(metrics) > 1:
            entries = [
                (m.replace("/", " "), "#3b4350", "--" if i else "-") for i, m in enumerate(metrics)
            ]
        elif len(stages) > 1 and not named:
            named, entries = True, [(label(s), color(s), "-") for s in stages]
        for words, tone, dash in entries:
            axis.plot([], [], dash, color=tone, label=words)
        if entries:
            axis.legend(fontsize=8)
    return _svg(canvas)


@_styled
def over_kl(logs: dict[str, list[dict]]) -> str | None:
    """RM score and labeler score over the KL to the reference; None without such logs.

    Where the two curves diverge, PPO over-optimizes the reward model (Gao et al. 2023).
    """
    runs = []
    for name, rows in logs.items():
        keys = ("kl/reference", "reward/rm", "reward/labeler")
        points = _points(rows, keys)
        if len(points) > 2:
            runs.append((name, np.array(points, dtype=float)))
    if not runs:
        return None
    canvas, axes = _figure(7.6, 4.8, nrows=2, sharex=True)
    for column, title in (
        (1, "RM score (PPO maximizes it)"),
        (2, "labeler score (the actual goal)"),
    ):
        axis = axes[column - 1, 0]
        axis.set_title(title)
        for name, points in runs:
            x, y = smooth(points[:, 0]), smooth(points[:, column])
            axis.scatter(points[:, 0], points[:, column], s=9, color=color(name), alpha=0.3)
            axis.plot(x, y, color=color(name), label=label(name))
            axis.plot(x[-1:], y[-1:], "o", color=color(name), markersize=6)
        if column == 1:
            axis.legend(fontsize=8)
    axes[1, 0].set_xlabel("KL to the reference, nats per sentence (large dot: end of training)")
    return _svg(canvas)


def over_optimized(rows: Sequence[dict]) -> float | None:
    """The KL, in nats, at which the labeler's score peaked while the RM's score kept rising; None if it did not.

    Both curves are smoothed. The labeler's score must fall by more than a fifth of its range.
    """
    keys = ("kl/reference", "reward/rm", "reward/labeler")
    points = _points(rows, keys)
    if len(points) < 10:
        return None
    kl, rm, labeler = (smooth(column, 7) for column in np.array(points, dtype=float).T)
    peak = int(labeler.argmax())
    fall = labeler[peak] - labeler[-1]
    if fall > 0.2 * np.ptp(labeler) and rm[-1] > rm[peak]:
        return float(kl[peak])
    return None
