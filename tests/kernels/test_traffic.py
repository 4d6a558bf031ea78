"""benchmarks/traffic.py: its budgets hold, it detects an extra pass, and streams do not race."""

import sys

import pytest
import torch

import fastrlhf
from _support.bench_problems import BENCHMARKS
from _support.logit_cases import randint, randn
from fastrlhf.ops import _backend, _gemms, _linear, _linear_loss, _rows, linear_logprob

sys.path.insert(0, str(BENCHMARKS))
import fake_gpu
import traffic

sys.path.remove(str(BENCHMARKS))

pytestmark = pytest.mark.skipif(
    bool(_backend.unavailable_reason("linear_ppo_loss", "cpu", "cpu")),
    reason="the C++ extension is not built",
)
CASES = {case.name: case for case in traffic.CASES}


@pytest.mark.parametrize("name", CASES)
def test_budgets(name):
    found = traffic.measure(CASES[name])
    assert not traffic.over(found, CASES[name].budget)
    # A budget far above the measurement would detect nothing.
    for field, is_, allowed in zip(found._fields, found, CASES[name].budget, strict=True):
        assert is_ >= 0.5 * allowed, f"{field}: {is_:.4g} of {allowed:g}"


def test_the_table(capsys, monkeypatch):
    assert traffic.main(["--only", "linear_ppo_loss compact"]) == 0
    assert "| linear_ppo_loss compact | 10 / 10.01 | 124 / 124 |" in capsys.readouterr().out
    case = CASES["linear_ppo_loss"]
    monkeypatch.setattr(traffic, "CASES", [case._replace(budget=case.budget._replace(logit=9.9))])
    assert traffic.main([]) == 1
    assert "linear_ppo_loss: logit: 10, 9.9 allowed" in capsys.readouterr().out


# ---- what is counted -----------------------------------------------------------------------------

ROWS = torch.arange(4)
# (what runs on x [10, 40] in fp32, bytes read, bytes written, launches, syncs)
COUNTED = {
    "in place": (lambda x: x.add_(1), 1600, 1600, 1, 0),
    "overwritten": (lambda x: x.zero_(), 0, 1600, 1, 0),
    "a view": (lambda x: x[2:].t().reshape(1, 40, 8), 0, 0, 0, 0),
    "a reshape that copies": (lambda x: x.t().reshape(-1), 1600, 1600, 1, 0),
    "contiguous as it is": (lambda x: x.contiguous(), 0, 0, 0, 0),
    "memory": (lambda x: torch.empty_like(x), 0, 0, 0, 0),
    "made of a shape": (lambda x: torch.zeros_like(x), 0, 1600, 1, 0),
    "a cast": (lambda x: x.bfloat16(), 1600, 800, 1, 0),
    "a sum": (lambda x: x.sum(), 1600, 4, 1, 0),
    "one row expanded": (lambda x: x[:1].expand(10, 40).clone(), 160, 1600, 1, 0),
    "part of it": (lambda x: x[:3].mul_(2), 480, 480, 1, 0),
    "an assignment": (lambda x: x.__setitem__(slice(0, 2), x[2:4]), 320, 320, 1, 0),
    "rows by index": (lambda x: x.index_select(0, ROWS), 640 + 32, 640, 1, 0),
    "rows put back": (lambda x: x.index_copy_(0, ROWS, x[:4].clone()), 1280 + 32, 1280, 2, 0),
    "a number": (lambda x: x.sum().item(), 1600, 4, 1, 1),
    "a choice": (lambda x: bool((x[0] > 0).any()), 160 + 40, 40 + 1, 2, 1),
    "nonzero": (lambda x: (x[0] > 2e9).nonzero(), 160, 40, 1, 1),
    "rows by mask": (lambda x: x[x[:, 0] > 2e9], 40, 10, 1, 1),
}


@pytest.mark.parametrize("name", COUNTED)
def test_what_is_counted(name):
    run, read, written, launches, syncs = COUNTED[name]
    x = torch.ones(10, 40)
    with fake_gpu.FakeGpu(40, 8) as gpu:
        run(x)
    found = (gpu.read.total(), gpu.written.total(), gpu.launches, gpu.syncs)
    assert found == (read, written, launches, syncs)


def test_live_memory_is_counted():
    with fake_gpu.FakeGpu(40, 8) as gpu:
        x = torch.empty(10, 40, device=fake_gpu.DEVICE)
        half = x[:5]
        del x
        y = torch.zeros(10, 8, device=fake_gpu.DEVICE)
        assert gpu.live == {"logits": 1600, "hidden": 320}
        del half, y
        assert gpu.live.total() == 0 and (gpu.peak, gpu.largest) == (1920, 1600)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_that_only_a_gpu_has(dtype):
    a, b, total = (randn(*size, seed=i) for i, size in enumerate(((4, 8), (8, 40), (4, 40))))
    a, b = a.to(dtype), b.to(dtype)
    right = a.double() @ b.double()
    with fake_gpu.FakeGpu(40, 8) as gpu:
        plain = torch.mm(a, b, out_dtype=torch.float32)
        out = torch.mm(a, b, out_dtype=torch.float32, out=torch.empty(4, 40))
        added = torch.addmm(total, a, b, out_dtype=torch.float32, out=total.clone())
        with pytest.raises(AssertionError):
            torch.mm(a, b.float(), out_dtype=torch.float32)
        torch.mm(a.repeat(1, 2)[:, ::2], b, out_dtype=torch.float32)
    assert gpu.copies == 1  # the last one's operand
    for found in (plain, out, added - total):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)


# ---- regressions that must be detected -----------------------------------------------------------


def over(name):
    """Names of the fields that exceed their budget."""
    return [
        line.split(":")[0]
        for line in traffic.over(traffic.measure(CASES[name]), CASES[name].budget)
    ]


def after(monkeypatch, owner, name, more):
    """Patches a method to return more(result, *arguments)."""
    method = getattr(owner, name)

    def both(self, *arguments, **options):
        out = method(self, *arguments, **options)
        return more(out, *arguments)

    monkeypatch.setattr(owner, name, both)


def test_a_pass_over_the_logits_is_seen(monkeypatch):
    after(monkeypatch, _gemms.CudaGemms, "logits", lambda out, *_: out.mul_(1.0))
    assert over("linear_ppo_loss") == ["logit", "launches"]
    assert "logit" in over("linear_logprob forward")


def test_a_copy_of_dlogits_is_seen(monkeypatch):
    after(
        monkeypatch,
        _linear.Gradients,
        "add_parts",
        lambda _, parts, dlogits: (dlogits.clone(), None)[1],
    )
    assert {"logit", "workspace", "beyond"} <= set(over("linear_cross_entropy"))


def test_a_pass_over_dw_is_seen(monkeypatch):
    after(monkeypatch, _gemms.CudaGemms, "grad_weight", lambda out, *_: out.mul_(1.0))
    assert over("linear_ppo_loss compact") == ["dw", "launches"]


def test_an_older_torch_is_over_the_budget(monkeypatch):
    real = fake_gpu.FakeGpu
    monkeypatch.setattr(traffic, "FakeGpu", lambda *a, **o: real(*a, **o, adds_in_place=False))
    assert {"dw", "beyond"} <= set(over("linear_ppo_loss"))


def test_a_scaled_gradient_is_seen(monkeypatch):
    """A backward that multiplies by an upstream gradient of 1."""
    monkeypatch.setattr(_linear_loss, "_keeps_graph", lambda: True)
    assert {"dw", "dx"} <= set(over("linear_ppo_loss"))


def test_a_chunk_that_lives_on_is_seen(monkeypatch):
    kept = []
    after(monkeypatch, _linear.Head, "_logits", lambda out, *_: kept.append(out) or out)
    assert over("linear_ppo_loss") == ["beyond"]


def test_a_host_sync_is_seen(monkeypatch):
    after(monkeypatch, _gemms.CudaGemms, "grad_hidden", lambda out, *_: (out.sum().item(), out)[1])
    assert {"syncs", "dx"} <= set(over("linear_token_loss compact"))


def test_more_chunks_than_needed_are_seen(monkeypatch):
    monkeypatch.setattr(_gemms.CudaGemms, "chunks_a_product", {"fast": 1, "compact": 1})
    assert "dw_gemms" in over("linear_ppo_loss")


def test_larger_chunks_are_seen(monkeypatch):
    # Instances share the class attribute.
    monkeypatch.setitem(_gemms.CudaGemms.logits_bytes, "compact", 512 << 20)
    assert {"workspace"} <= set(over("linear_logprob forward compact"))


# ---- streams -------------------------------------------------------------------------------------

N, H, V = 64, 8, 40


def forward(mask=None, chunk_rows=5, **options):
    """Compares logprob and entropy on a fake GPU with the reference; returns the fake GPU."""
    hidden, weight, targets = randn(N, H, seed=0), randn(V, H, seed=1), randint(V, (N,), 2)
    expected = fastrlhf.linear_logprob(
        hidden.bfloat16().double(), weight.bfloat16().double(), targets,
        mask=mask, return_entropy=True, backend="reference",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, fake_gpu.FakeGpu(V, H) as gpu:
        patch.setattr(_gemms, "chunk_rows", lambda *_: chunk_rows)
        found = fastrlhf.linear_logprob(
            hidden.bfloat16(), weight.bfloat16(), targets, mask=mask, return_entropy=True, **options
        )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)
    return gpu


@pytest.mark.parametrize("mask", [None, torch.arange(N) % 3 > 0])
@pytest.mark.parametrize("chunk_rows", [1, 5, 32, 64])
def test_the_forward_overlaps_without_a_race(mask, chunk_rows):
    gpu = forward(mask, chunk_rows)
    rows = N if mask is None else int(mask.sum())
    streams = 2 if rows > chunk_rows else 1
    assert len(gpu.streams) == streams
    kernels = {number for name, number in gpu.where if name == "token_logprob_fwd"}
    gemms = {number for name, number in gpu.where if name == "mm"}
    assert kernels == {streams - 1} and gemms == {0}


def nothing(*arguments):
    return None


def test_a_missing_wait_of_the_main_stream_is_a_race(monkeypatch):
    monkeypatch.setattr(_gemms.SideStream, "main_waits", nothing)
    with pytest.raises(
        fake_gpu.Race, match="mm on stream 0 writes a logits tensor while token_logprob_fwd"
    ):
        forward()


def test_a_missing_wait_of_the_side_stream_is_a_race(monkeypatch):
    monkeypatch.setattr(fake_gpu.Stream, "wait_stream", nothing)
    with pytest.raises(
        fake_gpu.Race, match="token_logprob_fwd on stream 1 reads a logits tensor while mm"
    ):
        forward()


def test_one_memory_for_two_chunks_is_a_race(monkeypatch):
    real = _linear.Head._overlapped
    monkeypatch.setattr(
        _linear.Head,
        "_overlapped",
        lambda self, side, cuts, memories: real(self, side, cuts, memories[:1] * 2),
    )
    with pytest.raises(fake_gpu.Race, match="mm on stream 0 writes a logits tensor"):
        forward()


def test_the_last_waits_are_needed(monkeypatch):
    """Without them the caller would read log-probs before they are written, and memory would be freed too early."""
    real = _gemms.SideStream.main_waits
    left = iter(range(-(-N // 5) - 2))  # one per chunk, except for the first two
    monkeypatch.setattr(
        _gemms.SideStream,
        "main_waits",
        lambda self, mark: real(self, mark) if next(left, None) is not None else None,
    )
    with pytest.raises(fake_gpu.Race):
        forward()


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_an_error_on_the_side_stream_restores_the_streams(monkeypatch, chunk):
    """The caller's stream is current again, and no memory is freed too early."""
    calls = []
    forward = _rows.RowKernels.forward

    def fails(self, *arguments):
        calls.append(1)
        found = forward(self, *arguments)
        if len(calls) == chunk:
            raise KeyError("a chunk")
        return found

    monkeypatch.setattr(_rows.RowKernels, "forward", fails)
    monkeypatch.setattr(_gemms, "chunk_rows", lambda *_: 5)
    hidden, weight = randn(N, H, seed=0).bfloat16(), randn(V, H, seed=1).bfloat16()
    with fake_gpu.FakeGpu(V, H) as gpu:
        try:
            fastrlhf.linear_logprob(hidden, weight, randint(V, (N,), 2))
        except KeyError:
            pass
        assert gpu.current is gpu.streams[0] and len(calls) == chunk


def test_freeing_memory_that_another_stream_uses_is_a_race():
    with pytest.raises(
        fake_gpu.Race, match="logits tensor is freed on stream 0 while mul_ on stream 1"
    ):
        with fake_gpu.FakeGpu(V, H):
            side = torch.cuda.Stream("cuda")
            x = torch.ones(N, V, device=fake_gpu.DEVICE)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                x.mul_(2)
            del x


def test_a_host_sync_orders_streams():
    with fake_gpu.FakeGpu(V, H) as gpu:
        side = torch.cuda.Stream("cuda")
        x = torch.ones(N, V, device=fake_gpu.DEVICE)
        assert x.sum().item() == N * V and gpu.syncs == 1
        with torch.cuda.stream(side):
            x.mul_(2)
            assert x.sum().item() == 2 * N * V
        x.mul_(2)


def test_training_does_not_keep_logits_that_the_side_stream_writes(monkeypatch):
    """The backward runs on the main stream only."""
    monkeypatch.setattr(linear_logprob, "KEEP_BYTES", 0)
    monkeypatch.setattr(_gemms, "chunk_rows", lambda *_: 5)
    hidden = randn(N, H, seed=0).bfloat16().requires_grad_()
    weight = randn(V, H, seed=1).bfloat16().requires_grad_()
    with fake_gpu.FakeGpu(V, H) as gpu:
        out = fastrlhf.linear_logprob(hidden, weight, randint(V, (N,), 2))
        forward = len(gpu.where)
        out.sum().backward()
    assert {number for _, number in gpu.where[:forward]} == {0, 1}
    assert {number for _, number in gpu.where[forward:]} == {0}
