"""The content of a report: the format of report.json, its checks, and the labels and formats of its figures.

A run folder holds `report.json` and the `log.jsonl` files that it names. An *interval* is
{"mean", "low", "high", "n"} (95 %, over prompts or text windows), as the functions of `fastrlhf.evals` return it.
Only `systems` and `results` are required. The page leaves out what is missing.

    {
      "title": str,
      "command": str,                       # the exact command that repeats the run
      "seconds": number,                    # total
      "environment": {str: str | number},   # torch, cpu, attention, seed, versions, ...
      "backends": {op: backend},
      "systems": ["base", "sft", "ppo", "ppo_ptx"],       # in the order of the tables
      "reference": "sft",                   # win rate and error change are relative to it
      "kl_reference": "rl_init",            # KL is measured from it (default: rl_init if it is a system)
      "results": {system: {
          "sampled": {figure: interval},    # temperature 1
          "greedy": {figure: interval},     # temperature 0
          "text_loss": interval,            # held-out pretraining text, nats per token
          "text_loss_change": interval}},   # minus that of the reference
      "human": {figure: interval},          # the human references, judged by the labeler
      "reward_model": {"held_out": {...}, "human": {...}},  # reward_accuracy.evaluate's results
      "labeler": {"agreement/<criterion>": number, "decided/<criterion>": number, ...},
      "stages": [{"name": str, "seconds": number, "log": "sft/log.jsonl"}],
      "speed": {"auto": number, "reference": number},      # PPO update, seconds per iteration
      "samples": [{"record": {slot: value}, "human": str,
                   "outputs": {system: str | {"text", "missing": [slot], "invented": [slot]}}}]
    }

Figures of "sampled" and "greedy": win_rate, coverage, missing, invented, errors, error_rate,
error_change, perfect, value, bleu, reward, kl, finished, length.
"""

import json
import math
from pathlib import Path

from fastrlhf.errors import UserError, printable

CONTENT = "report.json"
LABELS = {
    "sft": "SFT",
    "rl_init": "RL init",
    "reward": "RM",
    "ppo": "PPO",
    "ppo_ptx": "PPO-ptx",
    "pretrain": "pretraining",
    "labels": "sampling, ranking",
    "speed": "timing the ops",
    "evaluate": "evaluation",
}
DECODINGS = {"sampled": "temperature 1", "greedy": "greedy"}
JUDGES = {"held_out": "labeler, held-out prompts", "human": "people (RankME)"}
# Rows of the result tables, in order: figure -> (heading, format).
FIGURES = {
    "win_rate": ("preferred to {reference}", "percent"),
    "coverage": ("slot coverage", "percent"),
    "missing": ("missing per sentence", "number"),
    "invented": ("invented per sentence", "number"),
    "error_change": ("slot errors vs {reference}", "change"),
    "bleu": ("BLEU", "score"),
    "reward": ("RM score", "number"),
    "kl": ("KL to {kl_reference}", "score"),
}


def label(system: str) -> str:
    """Display name of a system or stage, without control characters."""
    return LABELS.get(system) or printable(system)


def format_value(value: float, style: str) -> str:
    """Format a number: style is "percent", "change" (signed percent), "score" (1 digit) or "number" (2 digits)."""
    if not math.isfinite(value):
        return "n/a"
    if style == "percent":
        return f"{100 * value:.1f} %"
    if style == "change":
        return f"{100 * value:+.0f} %".replace("-", "\u2212")
    text = f"{value:.1f}" if style == "score" else f"{value:.2f}"
    return text.replace("-", "\u2212")


def format_interval(interval: dict, style: str) -> str:
    """Format the bounds of an interval: "63.0 to 71.0"."""
    low, high = (format_value(interval[k], style).removesuffix(" %") for k in ("low", "high"))
    return f"{low} to {high}"


def duration(seconds: float) -> str:
    """Format a duration: "45.2 s", "3 min 20 s"."""
    if not math.isfinite(seconds):
        return "n/a"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def _is_number(value) -> bool:
    # JSON's ints have no bound, and floats do.
    return isinstance(value, float) or (type(value) is int and abs(value) < 1 << 63)


def _require(condition: bool, where: str, expected: str, got) -> None:
    if not condition:
        text = repr(got)
        text = text if len(text) <= 60 else text[:57] + "..."
        raise UserError(f"{CONTENT}: {where}: expected {expected}, got {text}")


def _check_intervals(found, where: str) -> None:
    _require(isinstance(found, dict), where, "an object of intervals", found)
    for name, interval in found.items():
        here = f"{where}.{name}"
        _require(isinstance(interval, dict), here, "an interval {mean, low, high}", interval)
        for key in ("mean", "low", "high"):
            _require(_is_number(interval.get(key)), f"{here}.{key}", "a number", interval.get(key))


_SHAPES = {
    "title": (str, "text"),
    "command": (str, "text"),
    "reference": (str, "a name"),
    "kl_reference": (str, "a name"),
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
    """Return `content` if it follows the format above; else raise a UserError that names the first mistake."""
    _require(isinstance(content, dict), "top level", "an object", content)
    systems = content.get("systems")
    _require(isinstance(systems, list) and bool(systems), "systems", "a list of names", systems)
    for i, name in enumerate(systems):
        _require(isinstance(name, str), f"systems[{i}]", "a name", name)
    results = content.get("results")
    _require(isinstance(results, dict), "results", "an object", results)
    for system in systems:
        found = results.get(system)
        _require(isinstance(found, dict), f"results.{system}", "an object", found)
        for decoding in DECODINGS:
            _check_intervals(found.get(decoding, {}), f"results.{system}.{decoding}")
        losses = {k: found[k] for k in ("text_loss", "text_loss_change") if k in found}
        _check_intervals(losses, f"results.{system}")
    for key, (kind, expected) in _SHAPES.items():
        if key in content:
            _require(isinstance(content[key], kind), key, expected, content[key])
    if "seconds" in content:
        _require(_is_number(content["seconds"]), "seconds", "a number", content["seconds"])
    _check_intervals(content.get("human", {}), "human")
    for name, groups in content.get("reward_model", {}).items():
        _require(isinstance(groups, dict), f"reward_model.{name}", "an object", groups)
        for group, found in groups.items():
            where = f"reward_model.{name}.{group}"
            _require(isinstance(found, dict), where, "an object", found)
            _check_intervals({k: found.get(k) for k in ("accuracy", "longer")}, where)
            pairs = found.get("pairs", 0)
            _require(_is_number(pairs), f"{where}.pairs", "a number", pairs)
    for i, stage in enumerate(content.get("stages", [])):
        _require(isinstance(stage, dict), f"stages[{i}]", "an object", stage)
        _require(isinstance(stage.get("name"), str), f"stages[{i}].name", "text", stage.get("name"))
        seconds = stage.get("seconds")
        _require(_is_number(seconds), f"stages[{i}].seconds", "a number", seconds)
        log = stage.get("log", "")
        inside = isinstance(log, str) and "\0" not in log and not Path(log).is_absolute()
        inside = inside and ".." not in Path(log).parts
        _require(inside, f"stages[{i}].log", "a path inside the run", log)
    for key in ("labeler", "speed"):
        for name, value in content.get(key, {}).items():
            _require(_is_number(value), f"{key}.{name}", "a number", value)
    for i, sample in enumerate(content.get("samples", [])):
        _require(isinstance(sample, dict), f"samples[{i}]", "an object", sample)
        for part in ("record", "outputs"):
            found = sample.get(part)
            _require(isinstance(found, dict), f"samples[{i}].{part}", "an object", found)
        for system, output in sample["outputs"].items():
            text = output.get("text") if isinstance(output, dict) else output
            _require(isinstance(text, str), f"samples[{i}].outputs.{system}", "text", output)
            for part in ("missing", "invented") if isinstance(output, dict) else ():
                slots = output.get(part, [])
                where = f"samples[{i}].outputs.{system}.{part}"
                _require(isinstance(slots, list), where, "a list", slots)
    return content


def load(run: str | Path) -> tuple[dict, dict[str, list[dict]]]:
    """Read and check a run folder.

    Returns:
        (content of report.json, log rows by stage).

    Raises:
        UserError: a file is missing or damaged, or the content does not follow the format.
    """
    run = Path(run)
    path = run / CONTENT
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"run {str(run)!r}: no {CONTENT} there; report takes the folder of a finished "
            "`fastrlhf demo` (for a single stage: tensorboard --logdir RUN, fastrlhf eval)"
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(f"{str(path)!r}, line {error.lineno}: not JSON ({error.msg})") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{str(path)!r}: cannot be read ({error})") from error
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
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)
            raise UserError(f"log {str(path)!r}, line {number}: not JSON ({reason})") from error
        if not isinstance(row, dict) or not all(map(_is_number, row.values())):
            raise UserError(f"log {str(path)!r}, line {number}: expected an object of numbers")
        rows.append(row)
    return rows


def kl_reference(content: dict) -> str:
    """The system that KL is measured from: as given, else the RL initialization if there is one."""
    default = "rl_init" if "rl_init" in content["systems"] else content.get("reference", "sft")
    return content.get("kl_reference", default)


def figures(content: dict, decoding: str) -> dict[str, tuple[str, str]]:
    """Figures that at least one system has: figure -> (heading, format)."""
    reference = content.get("reference", "sft")
    names = {
        "reference": label(reference),
        "kl_reference": label(kl_reference(content)),
    }
    have = {f for s in content["systems"] for f in content["results"][s].get(decoding, {})}
    if decoding == "greedy":
        have.discard("kl")  # the estimate is valid for samples at temperature 1 only
    return {f: (h.format(**names), s) for f, (h, s) in FIGURES.items() if f in have}


def figure(content: dict, system: str, decoding: str, name: str) -> dict | None:
    """Interval of one figure; None if it is missing or compares a system with itself."""
    reference = content.get("reference", "sft")
    same = {"win_rate": reference, "error_change": reference}
    same["kl"] = kl_reference(content)
    if same.get(name) == system:
        return None
    return content["results"][system].get(decoding, {}).get(name)


def speed_sentence(speed: dict) -> str:
    """A sentence that compares the time of a PPO update on the fused and on the reference ops."""
    ours, plain = speed["auto"], speed["reference"]
    faster = f": {plain / ours:.2f} times as fast" if ours > 0 else ""
    return (
        f"One PPO update takes {ours:.3f} s with this package's kernels (backend auto) and "
        f"{plain:.3f} s with the PyTorch reference, on the same experience{faster}."
    )
