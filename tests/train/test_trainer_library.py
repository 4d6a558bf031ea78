"""The trainer's small parts: order of data, files, checkpoints, schedules, optimizers, logs."""

import gzip
import json

import numpy as np
import pytest
import torch
from torch import nn

from fastrlhf.errors import UserError
from fastrlhf.train import checkpoint, data, optim


def test_shuffle_visits_everything_once_an_epoch_and_resumes():
    order = data.Shuffle(7, seed=3)
    first, second = order.take(7), order.take(7)
    assert sorted(first) == sorted(second) == list(range(7)) and first != second
    resumed = data.Shuffle(7, seed=3, cursor=5)
    assert resumed.take(9) == [*first[5:], *second]


def test_text_documents_and_windows(tmp_path):
    class Letters:
        eos_token_id = 0

        def __call__(self, texts, **_):
            return {"input_ids": [[ord(c) for c in t] for t in texts]}

    path = tmp_path / "text.txt.gz"
    with gzip.open(path, "wt") as file:
        file.write("ab\ncd\n\n \nefg")
    documents = data.read_text(str(path))
    assert documents == ["ab\ncd", "efg"]
    windows = data.text_windows(documents, Letters(), 4, "x")
    tokens = [ord("a"), ord("b"), ord("\n"), ord("c"), ord("d"), 0, ord("e"), ord("f")]
    np.testing.assert_array_equal(np.concatenate([w.tokens for w in windows]), tokens)
    assert windows[0].targets == 3
    with pytest.raises(UserError, match="fewer than one window of 100"):
        data.text_windows(documents, Letters(), 100, "x")


def test_next_token_rows_skip_the_prompt():
    examples = [data.Example(np.array([5, 6, 7, 8]), 2), data.Example(np.array([9, 3]), 0)]
    batch, rows, targets = data.next_token_rows(examples, "cpu")
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9, 3]
    assert rows.tolist() == [1, 2, 4] and targets.tolist() == [7, 8, 3]


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(b"not gzip at all")
    with pytest.raises(UserError, match="not a readable UTF-8 file"):
        data.read_rows(str(path), {}, "prompts")
    with pytest.raises(UserError, match="cannot be read"):
        data.read_rows(str(tmp_path), {}, "prompts")
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n[1]\n')
    with pytest.raises(UserError, match="line 2: expected an object, got list"):
        data.read_rows(str(path), {"prompt": str}, "prompts")
    path.write_text('{"text": "a"}\n{}\n')
    with pytest.raises(UserError, match="line 2: field 'text': expected str, got nothing"):
        data.read_text(str(path))


@pytest.mark.parametrize("ranks", [[1, 0], [1, True], [1, 1.5], ["1", "2"]])
def test_rankings_must_be_ranks(tmp_path, ranks):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"prompt": "p", "completions": ["a", "b"], "ranks": ranks}))
    with pytest.raises(UserError, match="ranks must be integers from 1"):
        data.read_rankings(str(path))


def test_rows_written_and_read_back(tmp_path):
    rows = [{"prompt": "é", "n": 1}, {"prompt": "b", "n": 2}]
    data.write_rows(tmp_path / "x.jsonl.gz", rows)
    assert data.read_rows(str(tmp_path / "x.jsonl.gz"), {"prompt": str}, "x") == rows
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl.gz"]


def test_checkpoints_are_whole_or_absent(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"step": step, "w": torch.arange(3.0)})
    assert checkpoint.steps(tmp_path) == [2, 3]  # the newest two stay

    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 4, {"step": 4})
    monkeypatch.undo()
    state = checkpoint.load_latest(tmp_path)
    assert state["step"] == 3 and torch.equal(state["w"], torch.arange(3.0))
    (tmp_path / "step_00000003" / "state.pt").write_bytes(b"torn")
    with pytest.raises(
        UserError, match="step_00000003/state.pt is damaged .* to continue from step 2"
    ):
        checkpoint.load_latest(tmp_path)


def test_checkpoints_never_unpickle_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    folder = tmp_path / "step_00000001"
    folder.mkdir()
    torch.save({"step": 1, "x": Evil()}, folder / "state.pt")
    with pytest.raises(UserError, match="is damaged .* and start again"):
        checkpoint.load_latest(tmp_path)


def test_schedules():
    assert optim.cosine(0, 100) == 1.0
    assert optim.cosine(100, 100) == pytest.approx(0.1)
    assert optim.cosine(50, 100) == pytest.approx(0.55)
    assert optim.cosine(0, 100, warmup=9) == pytest.approx(0.1)
    assert [optim.warm_constant(i, warmup=10) for i in (0, 5, 10, 400)] == pytest.approx(
        [0.1, 0.55, 1.0, 1.0]
    )
    assert optim.warm_constant(0, warmup=0) == 1.0


def test_ema_is_the_weighted_mean():
    layer = nn.Linear(2, 2, bias=False)
    start = layer.weight.detach().clone()
    ema = optim.EMA(layer, 0.9)
    with torch.no_grad():
        layer.weight.add_(1.0)
    ema.update(layer)
    ema.copy_to(layer)
    torch.testing.assert_close(layer.weight.detach(), start + 0.1)


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48)])
def test_muon_steps_are_near_orthogonal_and_of_adamw_size(shape):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape)
    optim.Muon([weight], lr=1.0).step()
    singular = torch.linalg.svdvals(weight.detach()) / (0.2 * max(shape) ** 0.5)
    assert singular.min() > 0.6 and singular.max() < 1.25
    assert torch.sum(weight.detach() * weight.grad) < 0


def test_muon_descends_like_torchs_own():
    torch.manual_seed(0)
    target, ours, theirs = (torch.randn(12, 8) for _ in range(3))
    theirs = ours.clone()
    ours, theirs = nn.Parameter(ours), nn.Parameter(theirs)
    a = optim.Muon([ours], lr=0.02)
    b = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for weight, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            (weight - target).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)  # theirs orthogonalises in bf16


@pytest.mark.parametrize("stacked", [1, 300, 1 << 24])
def test_muon_steps_matrices_together_as_each_alone(monkeypatch, stacked):
    torch.manual_seed(0)
    monkeypatch.setattr(optim.Muon, "STACKED", stacked)
    shapes = [(12, 8), (8, 12), (12, 12), (12, 8), (8, 12)]
    together = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    optimizers = [optim.Muon(together, lr=0.02, weight_decay=0.1)]
    optimizers += [optim.Muon([p], lr=0.02, weight_decay=0.1) for p in alone]
    for _ in range(3):
        for p, q in zip(together, alone, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_muon_takes_hidden_matrices_only():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens = nn.Embedding(4, 3)
            self.layer = nn.Linear(3, 3)

    parts = optim.Optimizers(
        Model(), optim.OptimConfig(optimizer="muon", lr=1e-3, muon_lr=1e-2)
    ).parts
    assert [sum(p.numel() for g in part.param_groups for p in g["params"]) for part in parts] == [
        15,
        9,
    ]
    assert [part.param_groups[0]["lr"] for part in parts] == [1e-3, 1e-2]
