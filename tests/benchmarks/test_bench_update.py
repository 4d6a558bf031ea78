"""benchmarks/update.py on a tiny model: every head gives the right update, and the gate rejects a wrong one."""

import dataclasses
import json
import math
import sys

import pytest
import torch

pytest.importorskip("transformers")

from _support.bench_problems import BENCHMARKS


@pytest.fixture
def update(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import update

    # Three batches are enough here.
    monkeypatch.setattr(update, "TINY", dataclasses.replace(update.TINY, tokens={128: 1}, most=512))
    yield update
    for name in ("update", "harness"):
        sys.modules.pop(name, None)


def run(update, monkeypatch, tmp_path, *more):
    """(exit status, document) of the command."""
    out = tmp_path / "update.json"
    monkeypatch.setattr(
        "sys.argv", ["update.py", "--tiny", "--device", "cpu", "--out", str(out), *more]
    )
    status = update.main()
    return status, json.loads(out.read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_head_makes_the_same_update(update, monkeypatch, tmp_path, dtype, capsys):
    status, document = run(update, monkeypatch, tmp_path, "--dtype", dtype)
    printed = capsys.readouterr().out
    assert status == 0, printed
    # Every column and word of the output is explained before the first line that has it.
    legend, _, rest = printed.partition("\ngate\n")
    for word in ("gate:", "s:", "tokens/s:", "peak MB:", "beyond MB:", "largest batch:"):
        assert word in legend
    assert update.COLUMNS in rest and "{" not in printed
    assert [x.split()[0] for x in rest.splitlines() if x.endswith("tried")] == [
        name.split()[0] for name in update.HEADS
    ]
    assert set(document["gate"]) == set(update.HEADS) and document["dtype"] == dtype
    norms = {found["gradient_norm"] for found in document["gate"].values()}
    assert max(norms) > 0 and max(norms) / min(norms) < 1.01
    assert document["gate"][update.TRUTH]["distance"] == {"loss": 0, "head": 0, "trunk": 0}
    for row in document["rows"]:
        assert row["fits"] and row["seconds"] > 0 and row["beyond_bytes"] > 0
    assert [r["head"] for r in document["rows"]] == [update.TRUNK, *update.HEADS]
    every = {"tokens": 512, "does_not_fit": None}
    assert document["largest"] == dict.fromkeys(update.HEADS, every)


def scaled_gradient(x, factor):
    return x.detach() + factor * (x - x.detach())


WRONG = {
    "the trunk's gradient": lambda head: lambda h, w, b: head(scaled_gradient(h, 1.05), w, b),
    "the weight's gradient": lambda head: lambda h, w, b: head(h, scaled_gradient(w, 0.95), b),
    "no gradient of the weight": lambda head: lambda h, w, b: head(h, w.detach(), b),
    "the loss": lambda head: lambda h, w, b: head(h, w, b) + 0.01,
    "NaN": lambda head: lambda h, w, b: head(h, w, b) * math.nan,
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("name", ["linear_ppo_loss", "bf16 head"])
def test_a_wrong_head_fails_the_run_and_gets_no_time(update, monkeypatch, tmp_path, what, name):
    monkeypatch.setitem(update.HEADS, name, WRONG[what](update.HEADS[name]))
    status, document = run(update, monkeypatch, tmp_path)
    assert status == 1 and [n for n, f in document["gate"].items() if "wrong" in f] == [name]
    assert "distance" in document["gate"][name]["wrong"]
    ran = {r["head"] for r in document["rows"]}
    assert ran == {update.TRUNK, *update.HEADS} - {name} and name not in document["largest"]


def test_a_head_that_raises_is_wrong_and_stops_no_other(update, monkeypatch, tmp_path):
    def broken(*_):
        raise ValueError("no such kernel")

    monkeypatch.setitem(update.HEADS, "token_loss", broken)
    status, document = run(update, monkeypatch, tmp_path)
    assert status == 1 and document["gate"]["token_loss"]["wrong"] == "ValueError: no such kernel"
    assert len(document["largest"]) == 3


def test_what_does_not_fit_is_a_result(update, monkeypatch, tmp_path):
    head = update.HEADS["fp32 head"]

    def hungry(hidden, weight, batch):
        if batch.tokens.numel() > 256:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return head(hidden, weight, batch)

    setup = dataclasses.replace(update.TINY, tokens={128: 1, 512: 1})
    monkeypatch.setattr(update, "TINY", setup)
    monkeypatch.setitem(update.HEADS, "fp32 head", hungry)
    status, document = run(update, monkeypatch, tmp_path)
    assert status == 0
    rows = {r["tokens"]: r for r in document["rows"] if r["head"] == "fp32 head"}
    assert rows[128]["fits"] and rows[512] == {"head": "fp32 head", "tokens": 512, "fits": False}
    assert document["largest"]["fp32 head"] == {"tokens": 256, "does_not_fit": 320}
    assert document["largest"]["bf16 head"]["does_not_fit"] is None


def test_an_update_that_breaks_off_fails_the_run_and_stops_no_other(update, monkeypatch, tmp_path):
    head = update.HEADS["token_loss"]

    def breaks_off(hidden, weight, batch):
        if batch.tokens.numel() == 128:  # not the gate's
            raise RuntimeError("misaligned address")
        return head(hidden, weight, batch)

    monkeypatch.setitem(update.HEADS, "token_loss", breaks_off)
    status, document = run(update, monkeypatch, tmp_path)
    rows = {r["head"]: r for r in document["rows"]}
    assert status == 1 and rows["token_loss"]["raised"] == "RuntimeError: misaligned address"
    assert rows["fp32 head"]["fits"] and "fits" not in rows["token_loss"]
    assert document["largest"]["token_loss"] == {"tokens": 0, "does_not_fit": None, "untried": 128}


def test_nothing_starts_that_would_not_end_in_time(update, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTRLHF_UNTIL", "1")
    status, document = run(update, monkeypatch, tmp_path)
    assert status == 0 and all(r["not_run"] == "no time was left" for r in document["rows"])
    nothing = {"tokens": 0, "does_not_fit": None, "untried": 128}
    assert document["largest"]["linear_ppo_loss"] == nothing


@pytest.mark.parametrize("limit", [0, 5, 16, 17, 100, 127, 128, 1000])
def test_the_largest_batch_is_found_to_an_eighth(update, limit):
    tried = []
    found = update.largest(lambda n: tried.append(n) or n <= limit, 16, 128, 1)
    good, bad = found["tokens"], found["does_not_fit"]
    assert good <= limit and (bad is None or limit < bad <= good + max(1, good // 8))
    assert len(tried) == len(set(tried)) <= 10 and (bad is None) == (limit >= 128)


def test_the_billion_is_one(update):
    config = update.LlamaConfig(**update.BILLION.config, tie_word_embeddings=True)
    with torch.device("meta"):
        model = update.LlamaForCausalLM(config)
    assert 1.2e9 < sum(p.numel() for p in model.parameters()) < 1.3e9
    assert list(update.BILLION.tokens.items()) == [(16384, 3), (65536, 2), (262144, 1)]
