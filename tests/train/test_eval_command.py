"""`fastrlhf eval` on tiny models, against plain transformers on one sequence at a time."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from fastrlhf.errors import UserError
from fastrlhf.evals import EvalConfig, main

PROMPTS = ["<name=NAMEX><eatType=pub><say>", "<name=NAMEX><area=riverside><say>"]
JUDGE = "fastrlhf.demo.labeler:score_prompt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two policies ("a", "b"), a reward model ("rm") and data files."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    root = tmp_path_factory.mktemp("eval")
    vocabulary = ["<pad>", "<eos>", "<unk>", *PROMPTS, "NAMEX", "is", "a", "riverside", "pub", "."]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.add_tokens(PROMPTS)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    for seed, name in enumerate(("a", "b", "rm")):
        torch.manual_seed(seed)
        if name == "rm":
            config.num_labels = 1
        model = (LlamaForSequenceClassification if name == "rm" else LlamaForCausalLM)(config)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    rows = [{"prompt": p, "completion": "NAMEX is a pub ."} for p in PROMPTS]
    (root / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    ranking = {
        "prompt": PROMPTS[0],
        "completions": ["NAMEX is a pub .", "a riverside"],
        "ranks": [1, 2],
        "criterion": "quality",
    }
    (root / "rankings.jsonl").write_text(json.dumps(ranking) + "\n")
    (root / "text.txt").write_text("NAMEX is a pub . " * 40)
    return root


def config(folder, **changes):
    base = EvalConfig(
        model=str(folder / "a"),
        baseline=str(folder / "b"),
        reward_model=str(folder / "rm"),
        prompts=str(folder / "prompts.jsonl"),
        text=str(folder / "text.txt"),
        rankings=str(folder / "rankings.jsonl"),
        judge=JUDGE,
        samples=3,
        max_new_tokens=6,
        window=16,
        device="cpu",
    )
    return dataclasses.replace(base, **changes)


def test_all_figures(folder, tmp_path, capsys):
    out = tmp_path / "sub" / "eval.json"
    result = main(config(folder, out=str(out)))
    assert set(result) == {
        *("finished", "length", "bleu", "coverage", "missing", "invented", "errors"),
        *("error_rate", "perfect", "value", "win_rate", "error_change", "kl", "reward"),
        *("text_loss", "text_loss_change", "pair_accuracy/all", "pair_accuracy/quality"),
        *("pair_longer/all", "pair_longer/quality"),
    }
    for figure in result.values():
        assert figure["low"] <= figure["mean"] <= figure["high"]
    assert result["coverage"]["n"] == 2
    written = json.loads(out.read_text())
    assert written["figures"] == result
    assert [s["prompt"] for s in written["samples"]] == [p for p in PROMPTS for _ in range(3)]
    said = capsys.readouterr().out
    assert "text_loss" in said and "LlamaForCausalLM passed" in said
    with pytest.raises(UserError, match="exists"):
        main(config(folder, out=str(out)))
    again = main(config(folder, out=str(out), overwrite=True))
    assert again == result


JUDGES = """
def number(prompt, completion):
    return len(completion)


def nothing(prompt, completion):
    return {"value": 1.0}
"""


def test_a_judge_in_the_working_directory(folder, tmp_path, monkeypatch):
    """A judge that returns numbers gives no slot figures; one that returns anything else is an error of one line."""
    (tmp_path / "own_judges.py").write_text(JUDGES)
    monkeypatch.chdir(tmp_path)
    few = {"rankings": "", "text": "", "reward_model": ""}
    result = main(config(folder, judge="own_judges:number", **few))
    assert {"value", "win_rate"} <= set(result) and not {"errors", "error_change"} & set(result)
    assert result["value"]["mean"] > 0
    with pytest.raises(
        UserError, match="judge own_judges:nothing: expected a number, .*; got dict"
    ):
        main(config(folder, judge="own_judges:nothing", **few))


def test_text_loss_equals_plain_transformers(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = main(config(folder, prompts="", rankings="", baseline="", judge=""))
    lm = AutoModelForCausalLM.from_pretrained(folder / "a")
    tokenizer = AutoTokenizer.from_pretrained(folder / "a")
    text = (folder / "text.txt").read_text()
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], 1]
    losses = []
    for i in range(0, len(ids) - 15, 16):
        window = torch.tensor([ids[i : i + 16]])
        with torch.no_grad():
            logits = lm(window).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, window[0, 1:]).item())
    assert result["text_loss"]["mean"] == pytest.approx(np.mean(losses), abs=1e-5)


def test_token_logprobs_keep_their_order(folder):
    """Packing reorders sequences by length; the results keep the order of the examples."""
    from fastrlhf.train.data import Example
    from fastrlhf.train.models import load_policy
    from fastrlhf.train.runtime import Runtime
    from fastrlhf.train.steps import token_logprobs

    policy = load_policy(str(folder / "a"), Runtime(config(folder)), trainable=False)
    rng = np.random.default_rng(0)
    examples = [Example(rng.integers(2, 9, size=n), 1) for n in (3, 9, 2, 7, 5)]
    together = token_logprobs(policy, examples, 12)
    for example, found in zip(examples, together, strict=True):
        alone = token_logprobs(policy, [example], 64)[0]
        assert found.shape == (len(example.tokens) - 1,)
        np.testing.assert_allclose(found, alone, atol=1e-5)


def test_greedy_and_limit(folder):
    result = main(config(folder, temperature=0.0, limit=1, text="", rankings=""))
    assert result["coverage"]["n"] == 1
    assert "kl" not in result  # its estimate needs samples at temperature 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "model"),
        ({"prompts": "", "text": "", "rankings": ""}, "nothing to evaluate"),
        ({"reward_model": ""}, "reward_model"),
        ({"judge": "fastrlhf.demo.labeler:nothing"}, "judge"),
        ({"judge": "no.such.module:f"}, "judge"),
        ({"samples": 0}, "samples"),
        ({"prompts": "missing.jsonl"}, "no such file"),
        ({"model": "missing"}, "config.json"),
        ({"max_new_tokens": 40}, "context"),
        ({"rankings": "missing.jsonl"}, "no such file"),
        (
            {"window": 1, "prompts": ""},
            "window: expected 0, or 2 to the context's 32 tokens, got 1",
        ),
        ({"window": 33, "prompts": ""}, "window: expected 0, or 2 to"),
        ({"max_tokens": 2}, "max_tokens: expected at least .* prompts with max_new_tokens, got 2"),
        ({"max_tokens": 2, "prompts": ""}, "max_tokens: expected at least .* of text .*, got 2"),
        ({"max_tokens": 2, "prompts": "", "text": ""}, "max_tokens: expected .* of rankings"),
    ],
)
def test_bad_input_is_one_line(folder, changes, message):
    with pytest.raises(UserError, match=message) as error:
        main(config(folder, **changes))
    assert "\n" not in str(error.value)


def test_every_model_has_its_own_context(folder, tmp_path, monkeypatch):
    """A shorter context of the baseline or of the reward model is an error before the samples."""
    for name in ("b", "rm"):
        short = shutil.copytree(folder / name, tmp_path / name) / "config.json"
        short.write_text(json.dumps(json.loads(short.read_text()) | {"max_position_embeddings": 4}))
    short = {"baseline": str(tmp_path / "b"), "reward_model": str(tmp_path / "rm")}
    monkeypatch.setattr("fastrlhf.evals.run._Model.sample", lambda *_, **__: 1 / 0)
    for name, path in short.items():
        message = f"^{name} '.*': its context holds 4 tokens, prompts . max_new_tokens reach 7$"
        with pytest.raises(UserError, match=message):
            main(config(folder, text="", rankings="", **{name: path}))
    with pytest.raises(UserError, match="7 tokens, but the reward model's context holds 4"):
        main(config(folder, prompts="", text="", reward_model=short["reward_model"]))
    with pytest.raises(UserError, match="window: expected 0, or 2 to the context's 4 tokens"):
        main(config(folder, prompts="", rankings="", baseline=short["baseline"]))
    texts = {"prompts": "", "rankings": "", "reward_model": "", "window": 0}
    found = main(config(folder, **texts, baseline=short["baseline"]))
    assert found["text_loss"]["n"] == 201 // 4


def test_overwrite_replaces_nothing_but_an_earlier_evaluation(folder, tmp_path):
    """Neither an input, in whatever role, nor any other file that exists."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "notes.json").write_text("{}")
    mine = {"overwrite": True, "text": "", "rankings": "", "reward_model": "", "baseline": ""}
    (copy / "rows.partial").write_text((copy / "prompts.jsonl").read_text())
    for out, message in (
        ("rows", "prompts .*rows.partial' lies inside out"),
        ("prompts.jsonl", "prompts .* lies inside out"),
        ("rankings.jsonl", "is not a result of eval"),  # of no option here
        ("a/config.json", "is not a result of eval"),
        ("notes.json", "is not a result of eval"),
        ("a", "expected a file to write"),
        ("notes.json/x.json", "nothing can be written to"),
    ):
        before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
        with pytest.raises(UserError, match=message):
            prompts = {"prompts": str(copy / "rows.partial")} if out == "rows" else {}
            main(config(copy, out=str(copy / out), **mine, **prompts))
        assert before == {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}


SHOUT = "[/INST] [bold]\x1b[31m \x9b \u202e[/]"


def test_text_of_data_is_neither_markup_nor_a_terminal_escape(
    folder, tmp_path, monkeypatch, capsys
):
    """The result is written before anything is printed, and data cannot break the printing."""
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    (tmp_path / "prompts.jsonl").write_text(
        json.dumps(rows[0] | {"prompt": rows[0]["prompt"] + SHOUT})
    )
    row = json.loads((folder / "rankings.jsonl").read_text()) | {"criterion": SHOUT}
    (tmp_path / "rankings.jsonl").write_text(json.dumps(row))
    model = shutil.copytree(folder / "a", tmp_path / "a[/red]")
    out = tmp_path / "eval.json"
    changes = {
        "judge": "",
        "prompts": str(tmp_path / "prompts.jsonl"),
        "rankings": str(tmp_path / "rankings.jsonl"),
    }
    main(config(folder, model=str(model), out=str(out), **changes))
    said = capsys.readouterr().out
    assert "[/INST] [bold]\\x1b[31m" in said and "a[/red]" in said.replace("\n", "")
    assert not {"\x1b", "\x9b", "\u202e"} & set(said)
    out.unlink()
    monkeypatch.setattr("rich.console.Console.print", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(config(folder, out=str(out), **changes))
    assert json.loads(out.read_text())["samples"]
