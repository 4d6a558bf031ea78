"""The report of a made-up run: content of the page and the tables, and error messages."""

import base64
import copy
import functools
import html.parser
import io
import itertools
import json
import math
import re
import xml.etree.ElementTree
from unittest import mock

import numpy as np
import pytest
import rich.console

from fastrlhf import report
from fastrlhf.errors import UserError
from fastrlhf.report import page, plots


def interval(mean: float, half: float, n: int = 365) -> dict:
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def ppo_rows(seed: int, over: bool) -> list[dict]:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(45):
        kl = 9.0 * (1 - math.exp(-i / 20))
        rise = 0.75 + 0.2 * (1 - math.exp(-i / 12))
        rows.append(
            {
                "step": i + 1,
                "time": 2.0 * i,
                "reward/rm": 0.1 + 1.5 * (1 - math.exp(-i / 15)) + 0.05 * rng.normal(),
                "reward/labeler": rise - over * 0.012 * max(0, i - 20) + 0.005 * rng.normal(),
                "kl/reference": kl + 0.1 * rng.random(),
                "policy/entropy": 1.6 - 0.01 * i,
                "policy/clip_fraction": 0.1 + 0.02 * rng.random(),
                "length/mean": 30 + 0.1 * i,
                "grad_norm/ppo": 0.5 + 0.1 * rng.random(),
                "grad_norm/ptx": 0.7 + 0.1 * rng.random(),
                "ptx/loss": 6.4 - 0.03 * i,
            }
        )
    return rows


def fabricate(run) -> dict:
    """Write a run folder as `fastrlhf demo` does; return the content of its report.json."""
    means = {
        "base": (0.04, 0.35, 1.2, 5.9, -2.1, 4.37),
        "sft": (0.5, 0.82, 0.31, 1.9, 0.0, 6.42),
        "ppo": (0.68, 0.93, 0.12, 0.7, 1.4, 6.63),
        "ppo_ptx": (0.67, 0.92, 0.15, 0.8, 1.3, 5.10),
    }
    results = {}
    for system, (win, coverage, invented, errors, reward, loss) in means.items():
        sampled = {
            "coverage": interval(coverage, 0.015),
            "missing": interval(errors - invented, 0.1),
            "invented": interval(invented, 0.05),
            "errors": interval(errors, 0.12),
            "bleu": interval(40 + 10 * coverage, 1.2),
            "reward": interval(reward, 0.08),
        }
        sampled["win_rate"] = interval(win, 0.04)
        sampled["error_change"] = interval(errors / 1.9 - 1, 0.06)
        sampled["kl"] = interval(8.1, 0.3)
        greedy = dict(sampled)
        results[system] = {
            "sampled": sampled,
            "greedy": greedy,
            "text_loss": interval(loss, 0.05, 300),
        }
    accuracy = {"accuracy": interval(0.86, 0.02), "longer": interval(0.61, 0.03), "pairs": 2310}
    human = {c: copy.deepcopy(accuracy) for c in ("all", "informativeness", "quality")}
    record = {"name": "The Eagle", "food": "Italian", "near": "Café Rouge <b>"}
    wrong = {"text": "The Eagle & co.", "missing": ["near"], "invented": ["food=French"]}
    right = {"text": "The Eagle is Italian, near Café Rouge <b>.", "missing": [], "invented": []}
    content = {
        "title": "fastrlhf demo",
        "command": "fastrlhf demo --out 'runs/<demo>'",
        "seconds": 301.5,
        "environment": {"torch": "2.13.0", "cpu": "a <fast> one", "seed": 0, "date": "2026-11-23"},
        "backends": {"token_logprob": "cpu", "gae": "cpu"},
        "systems": list(means),
        "reference": "sft",
        "kl_reference": "rl_init",
        "results": results,
        "human": {"coverage": interval(0.92, 0.01), "invented": interval(0.09, 0.01)},
        "reward_model": {"held_out": {"all": accuracy}, "human": human},
        "labeler": {"agreement/quality": 0.81, "decided/quality": 0.78, "references/invented": 0.1},
        "stages": [
            {"name": "sft", "seconds": 62.0, "log": "sft/log.jsonl"},
            {"name": "reward", "seconds": 30.5, "log": "reward/log.jsonl"},
            {"name": "ppo", "seconds": 88.0, "log": "ppo/log.jsonl"},
            {"name": "ppo_ptx", "seconds": 101.0, "log": "ppo_ptx/log.jsonl"},
            {"name": "evaluation", "seconds": 20.0},
        ],
        "speed": {"auto": 0.8, "reference": 1.0},
        "samples": [
            {
                "record": record,
                "human": "Try The Eagle.",
                "outputs": {"base": "the of and", "sft": wrong, "ppo": right, "ppo_ptx": right},
            }
        ],
    }
    loss = [{"step": i, "train/loss": 3 + 3 / i} for i in range(1, 80)]
    loss[-1]["valid/loss"] = loss[39]["valid/loss"] = 3.2
    logs = {
        "sft": loss,
        "reward": [{"step": i, "train/loss": 0.7 / i, "train/accuracy": 0.9} for i in range(1, 9)],
        "ppo": ppo_rows(1, over=True),
        "ppo_ptx": ppo_rows(2, over=False),
    }
    for name, rows in logs.items():
        (run / name).mkdir(parents=True)
        text = "".join(json.dumps(r) + "\n" for r in rows)
        (run / name / "log.jsonl").write_text(text)
    (run / "report.json").write_text(json.dumps(content))
    return content


@pytest.fixture
def run(tmp_path):
    fabricate(tmp_path)
    return tmp_path


class Reader(html.parser.HTMLParser):
    """Collects text, links and images; fails on unbalanced tags."""

    VOID = {"meta", "img", "br"}

    def __init__(self, page: str):
        super().__init__()
        self.open, self.words, self.links, self.images = [], [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        values = dict(attrs)
        assert tag != "script"
        if tag == "img":
            self.images.append(values)
        self.links += [v for k, v in attrs if k in ("src", "href", "srcset", "action")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def test_page_is_self_contained_and_complete(run):
    report.main(report.ReportConfig(run=str(run)))
    page = (run / "report.html").read_text(encoding="utf-8")
    read = Reader(page)
    assert read.links and all(link.startswith("data:image/svg+xml;base64,") for link in read.links)
    assert "url(" not in page and "@import" not in page
    for needed in (
        "preferred to SFT",
        "67.0 %",
        "63.0 to 71.0",
        "\u221258 %",
        "PPO-ptx",
        "slot coverage",
        "missing per sentence",
        "invented per sentence",
        "BLEU",
        "RM score",
        "KL to RL init",
        "loss on general text",
        "5.10",
        "5.05 to 5.15",
        "longer wins",
        "informativeness",
        "2,310",
        "stands in for people",
        "Café Rouge <b>",
        "missing: near; invented: food=French",
        "all slots, nothing invented",
        "Try The Eagle.",
        "1 min 41 s",
        "1.25 times as fast",
        "token_logprob",
        "a <fast> one",
        "fastrlhf demo --out 'runs/<demo>'",
        "PPO is over-optimized",
    ):
        assert needed in read.text, needed
    assert "PPO-ptx is over-optimized" not in read.text
    assert read.text.count("KL to RL init") == 1  # none from greedy samples
    # Nothing is compared with itself: SFT has no win rate.
    assert "50.0 %" not in read.text
    assert len(read.images) == 4
    for image in read.images:
        assert image["alt"]
        svg = base64.b64decode(image["src"].split(",")[1]).decode()
        xml.etree.ElementTree.fromstring(svg)
    assert len(page) < 1_500_000


def test_page_is_deterministic(run):
    content, logs = report.load(run)
    few = {"reward": logs["reward"]}
    assert page.page(content, few) == page.page(content, few)


def test_tables_on_the_terminal(run):
    from rich.console import Console

    out = io.StringIO()
    report.print_tables(report.load(run)[0], Console(file=out, width=200))
    for needed in ("PPO-ptx", "67.0 %", "63.0\u202671.0", "5.10", "longer wins", "1.25 times"):
        assert needed in out.getvalue(), needed


def test_only_results_are_required(tmp_path):
    content = {"systems": ["sft"], "results": {"sft": {"sampled": {"bleu": interval(40, 1)}}}}
    path = report.write(tmp_path, content)
    read = Reader(path.read_text(encoding="utf-8"))
    assert "40.0" in read.text
    for absent in ("Learning curves", "Environment", "Reward model", "What they write", "Time"):
        assert absent not in read.text


def test_write_checks_before_it_writes(tmp_path):
    with pytest.raises(UserError, match="systems"):
        report.write(tmp_path, {"results": {}})
    assert list(tmp_path.iterdir()) == []


def test_text_of_a_report_is_neither_markup_nor_a_terminal_escape(run, capsys):
    content = json.loads((run / "report.json").read_text())
    name = "x[/]\x1b[2J$\\frac$"
    content["systems"].append(name)
    content["results"][name] = content["results"]["ppo"]
    content["stages"].append({"name": "[/INST]\x1b[31m", "seconds": 1.0})
    content["reward_model"]["[/b]"] = {"[/c]": content["reward_model"]["human"]["all"]}
    report.run.print_tables(content)
    said = capsys.readouterr().out
    assert "[/INST]\\x1b[31m" in said and "[/b]" in said and "\x1b" not in said
    assert plots.results(content)


def change(path: str, value):
    def apply(content):
        *parents, last = path.split(".")
        for key in parents:
            content = content[int(key) if key.isdigit() else key]
        content[last] = value

    return apply


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("systems", [], r"systems: expected a list of names, got \[\]"),
        ("systems", ["sft", "other"], "results.other"),
        ("results.ppo", 3, "results.ppo: expected an object, got 3"),
        ("results.ppo.sampled.bleu", 40.0, "results.ppo.sampled.bleu"),
        ("results.ppo.sampled.bleu.low", "x", "results.ppo.sampled.bleu.low: expected a number"),
        ("results.ppo.text_loss", None, "results.ppo.text_loss"),
        ("reward_model.human.quality", {}, "reward_model.human.quality.accuracy"),
        ("stages.0.seconds", "long", r"stages\[0\].seconds"),
        ("speed.auto", None, "speed.auto"),
        ("samples.0.outputs.ppo", 5, r"samples\[0\].outputs.ppo: expected text"),
        ("command", 5, "command: expected text, got 5"),
    ],
)
def test_malformed_content_names_the_place(run, path, value, message):
    content = json.loads((run / "report.json").read_text())
    change(path, value)(content)
    (run / "report.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        report.main(report.ReportConfig(run=str(run)))
    assert "\n" not in str(error.value)
    assert not (run / "report.html").exists()


DAMAGE = (None, "x", [], {}, [1], -1, True, 10**400, math.inf, math.nan)


def leaves(value, path=()):
    """The path of every value inside nested dicts and lists; of a list, to its first item only."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:1])
    for key, item in items:
        yield (*path, key)
        if isinstance(item, dict | list):
            yield from leaves(item, (*path, key))


@pytest.mark.parametrize("every", [20, pytest.param(1, marks=pytest.mark.nightly)])
def test_any_damaged_value_is_one_line_or_harmless(run, monkeypatch, every):
    """Without the drawing of the plots, which is slow."""
    monkeypatch.setattr(plots, "_svg", lambda figure: "<svg/>")
    axis = mock.MagicMock()

    def figure(*_, nrows=1, ncols=1, **__):
        axes = np.empty((nrows, ncols), dtype=object)
        axes.fill(axis)
        return axis, axes

    monkeypatch.setattr(plots, "_figure", figure)
    content = json.loads((run / "report.json").read_text())
    content["systems"] = content["systems"][:2]
    for name in set(content["results"]) - set(content["systems"]):
        del content["results"][name]
    rows = ppo_rows(0, over=True)[:10]
    console = rich.console.Console(file=io.StringIO())
    refused = 0
    for path, value in list(itertools.product(leaves(content), DAMAGE))[::every]:
        damaged = copy.deepcopy(content)
        place = functools.reduce(lambda x, key: x[key], path[:-1], damaged)
        place[path[-1]] = value
        try:
            report.content.check(damaged)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        page.page(damaged, {"ppo": rows})
        report.run.print_tables(damaged, console)
    assert refused > 500 / every


@pytest.mark.parametrize(
    "line",
    [b'{"step": "x"}', b"[" * 100_000, b'{"step": 1' + b"0" * 5000 + b"}", b"\xff", b'{"a": [1]}'],
)
def test_damaged_logs_are_one_line(run, line):
    (run / "ppo" / "log.jsonl").write_bytes(b'{"step": 1}\n' + line)
    with pytest.raises(UserError, match="log .*(line 2|cannot be read)") as error:
        report.load(run)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a": 1' + b"0" * 5000, b"\xff\xfe"])
def test_damaged_content_is_one_line(run, text):
    (run / "report.json").write_bytes(text)
    with pytest.raises(UserError, match="report.json'") as error:
        report.load(run)
    assert "\n" not in str(error.value)


def test_missing_and_broken_files(run, tmp_path):
    with pytest.raises(UserError, match="run: expected"):
        report.main(report.ReportConfig())
    with pytest.raises(UserError, match="no report.json"):
        report.main(report.ReportConfig(run=str(tmp_path / "nowhere")))
    (run / "ppo" / "log.jsonl").write_text('{"step": 1}\n{"step": ')
    with pytest.raises(UserError, match="log.jsonl', line 2: not JSON"):
        report.load(run)
    (run / "ppo" / "log.jsonl").unlink()
    with pytest.raises(UserError, match="log .*cannot be read"):
        report.load(run)
    (run / "report.json").write_text("{")
    with pytest.raises(UserError, match="report.json', line 1: not JSON"):
        report.load(run)


def test_over_optimization_is_detected():
    assert plots.over_optimized(ppo_rows(0, over=False)) is None
    kl = plots.over_optimized(ppo_rows(0, over=True))
    assert 4.0 < kl < 8.0
    # If the RM score falls as well, PPO does not over-optimize the RM.
    both = [r | {"reward/rm": r["reward/labeler"]} for r in ppo_rows(0, over=True)]
    assert plots.over_optimized(both) is None
    assert plots.over_optimized([]) is None


def test_series_skips_what_is_missing_or_not_finite():
    rows = [{"step": 1, "a": 1.0}, {"step": 2}, {"step": 3, "a": float("nan")}, {"step": 4, "a": 2}]
    steps, values = plots.series(rows, "a")
    assert steps.tolist() == [1, 4] and values.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("value", "style", "text"),
    [
        (0.6712, "percent", "67.1 %"),
        (-0.412, "change", "\u221241 %"),
        (0.1, "change", "+10 %"),
        (-2.345, "number", "\u22122.35"),
        (41.26, "score", "41.3"),
        (float("nan"), "number", "n/a"),
    ],
)
def test_format_value(value, style, text):
    assert report.content.format_value(value, style) == text
