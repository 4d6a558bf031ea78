"""The harness: every op has a case; gate, times, memory and roofline are right; results files are written."""

import contextlib
import dataclasses
import importlib
import json
import subprocess
import sys

import pytest
import torch

import fastrlhf
from _support.bench_problems import BENCHMARKS, SIZES, problem_with_little_time, token_problem


def test_every_op_has_a_case_on_every_device(harness):
    _, cases, _, run = harness
    for listed in (cases.CPU, cases.GPU):
        assert {c.op for c in listed} - {"pack"} == set(fastrlhf.backends())


def test_a_case_that_cannot_be_timed_leaves_the_others(harness, monkeypatch, tmp_path, capsys):
    module, cases, _, run = harness
    listed = [c for c in cases.CPU if c.op in ("masked_whiten", "kl_reward")]
    monkeypatch.setattr(run, "CPU", listed)

    def bench_op(case, *rest):
        if case.op == "kl_reward":
            raise MemoryError("too big")
        return [
            {"op": case.op, "case": case.name, "dtype": "float32", "direction": "forward"}
            | {"provider": "cpu", "ours": True, "error_share_of_bar": 0.5, "median_ms": 1.0}
        ]

    monkeypatch.setattr(run, "bench_op", bench_op)
    out = tmp_path / "r.json"
    monkeypatch.setattr("sys.argv", ["run.py", "--quick", "--device", "cpu", "--out", str(out)])
    assert run.main() == 1
    assert "WRONG: kl_reward" in capsys.readouterr().out
    rows = {r["op"]: r for r in json.loads(out.read_text())["rows"]}
    assert rows["kl_reward"]["raised"] == "MemoryError: too big"
    assert rows["masked_whiten"]["median_ms"] == 1.0


def run_quickly(run, monkeypatch, out, device="cpu"):
    monkeypatch.setattr("sys.argv", ["run.py", "--quick", "--device", device, "--out", str(out)])
    return run.main()


def test_an_out_that_cannot_be_written_stops_before_the_measurements(
    harness, monkeypatch, tmp_path, capsys
):
    _, _, _, run = harness
    monkeypatch.setattr(run, "measure_roofline", lambda *_: pytest.fail("it measured"))
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file" / "r.json"):
        with pytest.raises(SystemExit) as stopped:
            run_quickly(run, monkeypatch, out)
        assert stopped.value.code == 2 and f"--out {out}: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_quickly(run, monkeypatch, tmp_path / "r.json", device="gpu")
    assert "--device: invalid choice: 'gpu'" in capsys.readouterr().err


def test_an_interrupted_run_leaves_the_old_results(harness, monkeypatch, tmp_path):
    _, _, _, run = harness
    out = tmp_path / "r.json"
    out.write_text("old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "show", interrupt)
    monkeypatch.setattr(run, "CPU", [])
    with pytest.raises(KeyboardInterrupt):
        run_quickly(run, monkeypatch, out)
    assert out.read_text() == "old" and list(tmp_path.iterdir()) == [out]


def test_only_our_own_wrong_result_fails_the_run(harness):
    run = harness[3]
    row = {"op": "gae", "case": "c", "direction": "forward", "provider": "p"}
    wrong = {**row, "error_share_of_bar": 3.0}
    assert run.failures([{**wrong, "ours": False}]) == []
    (line,) = run.failures([{**wrong, "ours": True}])
    assert line.startswith("WRONG: gae c forward p")


def test_memory_above_its_limit_fails_the_run(harness):
    run = harness[3]
    row = {"op": "gae", "case": "c", "direction": "forward", "provider": "cpu", "ours": True}
    row |= {"median_ms": 1.0, "peak_bytes": 100, "peak_limit_bytes": 100}
    assert run.failures([row]) == []
    (line,) = run.failures([{**row, "peak_bytes": 101}])
    assert line.startswith("MEMORY: gae c forward cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's allocator is asked instead")
def test_peak_bytes_counts_what_is_held_at_once(harness):
    def call():
        first = torch.empty(1000, dtype=torch.uint8)
        del first
        return torch.empty(400, dtype=torch.uint8), torch.empty(300, dtype=torch.uint8)

    assert harness[0].peak_bytes(call, "cpu") == 1000


def test_our_token_logprob_holds_o_of_n_and_eager_does_not(harness):
    """Eager exceeds the limit, so the limit can fail."""
    case, make = token_problem(harness)
    problem = harness[0].prepare(make(case, "cpu"))
    found = harness[0].providers(problem, compiled=False)
    peaks = {}
    for direction in harness[0].directions(problem):
        steps = {n: harness[0].step(problem, p, direction) for n, p in found.items()}
        peaks[direction] = {n: harness[0].peak_bytes(f, "cpu") for n, f in steps.items()}
    for direction, peak in peaks.items():
        limit = problem.peak_limits[direction]
        assert peak["eager"] > limit
        assert all(peak[name] <= limit for name in peak if name in fastrlhf.ops._backend.BACKENDS)


def test_rows_of_a_case(harness):
    """Every direction, the yardstick, and the speedup over every other provider."""
    case, make = token_problem(harness)
    roofline = {"copy_bytes_per_s": 1e10, "gemm_float32_flop_per_s": 1e11}
    quick = lambda *args: problem_with_little_time(make(*args))  # noqa: E731
    rows = harness[3].bench_op(case, quick, "cpu", roofline, compiled=False)
    assert {r["direction"] for r in rows} == {"forward", "backward", "forward+backward"}
    names = {r["provider"] for r in rows}
    assert {"eager", "F.cross_entropy"} <= names
    for row in rows:
        assert ("read_ms" in row) == (row["direction"] == "forward")
        assert set(row["times_as_fast_as"]) == names - {row["provider"]}
        assert row["peak_bytes"] > 0
    assert harness[3].failures(rows) == []


def linear_problem(harness, op="linear_logprob", dtype="bfloat16", **sizes):
    every = {"N": 96, "H": 64, "V": 9000, "masked": 0, "frozen": 0, "variants": 0, **sizes}
    case = harness[1].Case(op, "t", dtype, every)
    return case, importlib.import_module("bench_linear_logprob").PROBLEMS[op]


@pytest.mark.parametrize("op", ["linear_logprob", "linear_ppo_loss"])
def test_the_bf16_and_the_fp32_head_beside_ours(harness, op):
    """Every row has an error and its memory. The bf16 head fails the gate by its error."""
    case, make = linear_problem(harness, op)
    quick = lambda *args: problem_with_little_time(make(*args))  # noqa: E731
    roofline = {"copy_bytes_per_s": 1e10, "gemm_float32_flop_per_s": 1e13}
    rows = harness[3].bench_op(case, quick, "cpu", roofline, compiled=False)
    assert harness[3].failures(rows, quick=True) == []
    (rounded, cast, ours) = (
        next(r for r in rows if r["provider"] == name and r["direction"] == "forward+backward")
        for name in ("bf16 head", "fp32 head", "cpu")
    )
    assert rounded["ungated_ms"] > 0 and "times the bar" in rounded["ungated"]
    assert ours["median_ms"] > 0 and cast["median_ms"] > 0
    assert rounded["error"] > 10 * max(ours["error"], cast["error"])
    for row in (rounded, cast, ours):
        assert row["gradient_errors"].keys() == {"hidden", "weight"}
        assert 0 <= row["beyond_bytes"] < row["peak_bytes"]
    # Ours holds one chunk, the fp32 head whole logits and their gradient. linear_logprob keeps small logits.
    assert op == "linear_logprob" or ours["beyond_bytes"] < 0.8 * cast["beyond_bytes"]


def test_heads_of_fp32_operands_need_no_cast(harness):
    import peers

    hidden = torch.zeros(2, 3)
    assert set(peers.plain_heads(hidden)) == {"whole logits"}
    assert set(peers.plain_heads(hidden.half())) == {"fp16 head", "fp32 head"}
    before = torch.get_float32_matmul_precision()
    with peers.tf32():
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before


def test_the_context_of_a_provider_covers_its_backward(harness):
    """TF32 must cover the products of the backward, which are the larger part."""
    module, seen = harness[0], []

    @contextlib.contextmanager
    def within():
        seen.append("in")
        yield
        seen.append("out")

    class Seen(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append("backward")
            return grad

    case, make = token_problem(harness)
    problem = module.prepare(make(case, "cpu"))
    right = module.providers(problem, compiled=False)["eager"].call
    call = lambda **args: Seen.apply(right(**args))  # noqa: E731
    provider = module.Provider(call, within=within)
    module.step(problem, provider, "forward+backward")()
    module._results(problem, provider)
    assert seen == ["in", "backward", "out"] * 2
    del seen[:]
    module.step(problem, provider, "backward")()
    assert seen == ["in", "out", "in", "backward", "out"]


def variants_of(harness, op, **sizes):
    case, make = linear_problem(harness, op, variants=1, **sizes)
    problem = harness[0].prepare(make(case, "cpu"))
    found = harness[0].providers(problem, compiled=False)
    return problem, {n.removeprefix("cpu, "): p for n, p in found.items() if n.startswith("cpu, ")}


@pytest.mark.parametrize(
    ("op", "sizes", "names"),
    [
        ("linear_logprob", {}, {"compact", "blocks of 128x1024"}),
        ("linear_ppo_loss", {}, {"compact", "dW added to fp32"}),
        ("linear_ppo_loss", {"masked": 60}, {"compact", "rows selected by the caller", "num_rows"}),
    ],
)
def test_other_ways_to_call_the_heads_are_gated(harness, op, sizes, names):
    problem, found = variants_of(harness, op, **sizes)
    assert set(found) == names
    eager = harness[0].providers(problem, compiled=False)["eager"]
    shares = harness[0].errors(problem, {"eager": eager, **found})
    assert max(shares.values()) <= 1, problem.raised


def test_a_dw_that_is_added_wrong_is_seen(harness, monkeypatch):
    """The gate compares what the forward adds to the fp32 gradient, not the result of autograd."""
    module = harness[0]
    problem, found = variants_of(harness, "linear_ppo_loss")
    right = found["dW added to fp32"]

    def twice(**args):
        out = right.call(**args)
        args["accumulate_into"].mul_(2)
        return out

    eager = module.providers(problem, compiled=False)["eager"]
    wrong = dataclasses.replace(right, call=twice)
    shares = module.errors(problem, {"eager": eager, "right": right, "wrong": wrong})
    assert shares["right"] <= 1 < shares["wrong"]


@pytest.mark.parametrize("sms, l2", [(132, 50 << 20), (108, 40 << 20), (148, 126 << 20)])
def test_blocks_are_whole_waves_that_the_cache_holds(harness, sms, l2):
    blocks = importlib.import_module("blocks")
    found = blocks.shapes(sms, l2, (8192, 4096, 128256))
    assert found and blocks.shapes(sms, 2**20, (8192, 4096, 128256)) == []
    for rows, columns in found:
        tiles = (rows // blocks.TILE[0]) * (columns // blocks.TILE[1])
        assert rows % blocks.TILE[0] == columns % blocks.TILE[1] == 0
        assert tiles % sms == 0 and 4 * rows * (columns + 2048) <= l2


@pytest.mark.parametrize("shape", [(40, 1000), (96, 9000), (7, 4500), (1000, 10000)])
def test_the_forward_by_blocks_is_the_ops(harness, shape):
    blocks = importlib.import_module("blocks")
    torch.manual_seed(0)
    hidden, weight = torch.randn(96, 16), torch.randn(9000, 16)
    targets = torch.randint(9000, (96,))
    expected = fastrlhf.linear_logprob(hidden, weight, targets)
    found = blocks.logprob(hidden, weight, targets, shape, "cpu")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("what", ["length", "repeat", None])
def test_a_product_that_differs_bitwise_in_another_shape_is_reported(
    harness, monkeypatch, tmp_path, what
):
    module, calls = importlib.import_module("gemm_bitwise"), []

    def product(x, weight):
        # Small integers are exact in any GEMM.
        out = x.float().round() @ (8 * weight.float()).round().t()
        calls.append(len(x))
        if (what == "length" and len(x) == 25) or (what == "repeat" and len(calls) == 2):
            out[3, 5] += 2**-10
        return out

    monkeypatch.setattr(module, "product", product)
    out = tmp_path / "bitwise.json"
    monkeypatch.setattr("sys.argv", ["x", "--tiny", "--device", "cpu", "--out", str(out)])
    assert module.main() == (what == "repeat")
    document = json.loads(out.read_text())
    wrong = [row for row in document["rows"] if not row["equal"]]
    assert all(row["differing"] == 1 and row["largest"] == 2**-10 for row in wrong)
    assert document["chunks_equal"] == (what != "length")
    if what == "length":
        assert {row["rows"] for row in wrong} == {25}
        assert {row["preset"] for row in wrong} == {"fast", "compact"}
    else:
        assert [row["what"] for row in wrong] == ["the same product again"] * (what == "repeat")


def test_bytes_that_a_step_returns_are_counted_once(harness):
    x, y = torch.zeros(1000), torch.zeros(50)
    assert harness[0].returned_bytes(([x, x[:5]], [y, None])) == 4200
    assert harness[0].returned_bytes(x) == 4000 and harness[0].returned_bytes({"a": 1}) == 0
    if not torch.cuda.is_available():
        made = harness[0].memory(lambda: (torch.empty(2000).sum(), torch.empty(1000)), "cpu")
        assert made["peak_bytes"] >= 8004 and made["beyond_bytes"] == made["peak_bytes"] - 4004


@pytest.mark.parametrize("op", ["gae", "kl_gae"])
def test_python_loop_gives_the_ops_result(harness, op):
    case = harness[1].Case(op, "t", "float32", {"B": 7, "T": 13, "packed": 0, "whiten": 1})
    make = importlib.import_module("bench_sequence_ops").PROBLEMS[op]
    problem = harness[0].prepare(make(case, "cpu"))
    found = harness[0].providers(problem, compiled=False)
    assert "python loop" in found
    assert max(harness[0].errors(problem, found).values()) <= 1


@pytest.mark.parametrize(("seconds", "warm", "turns"), [(0.5, 2, 5), (2.0, 1, 3)])
def test_providers_take_turns_and_short_calls_warm_up(harness, monkeypatch, seconds, warm, turns):
    """A round of over a second is sampled three times, and its long call is warmed up once."""
    order = []
    took = {"short": 0.001, "long": seconds}

    def sample(function, device, cold):
        assert not cold  # cold is the default on a GPU only
        function()
        order.append("timed")
        return took[order[-2]]

    monkeypatch.setattr(harness[0], "sample", sample)
    functions = {name: lambda name=name: order.append(name) for name in took}
    taken = harness[0].times(functions, "cpu", 0.0)
    assert {name: len(samples) for name, samples in taken.items()} == dict.fromkeys(took, turns)
    first = ["short", "timed"] * 2 + ["long", "timed"] * warm
    turn = ["short"] * harness[0].WARM + ["short", "timed", "long", "timed"]
    assert order == first + turn * turns


def test_a_call_slower_than_slow_keeps_its_first_sample(harness, monkeypatch):
    monkeypatch.setattr(harness[0], "sample", lambda function, device, cold: function())
    taken = harness[0].times({"a": lambda: 0.1, "b": lambda: 0.5}, "cpu", 0.0, slow=0.3)
    assert taken == {"a": [0.1] * 5, "b": [0.5]}


def test_cold_samples_of_short_calls_evict_the_caches_first(harness, monkeypatch):
    module, flushed = harness[0], []
    monkeypatch.setattr(module, "flush", flushed.append)
    taken = {"short": [0.001], "long": [1.0]}
    cold = module.cold_times({"short": lambda: None, "long": lambda: None}, taken, 0.0)
    assert list(cold) == ["short"] and len(cold["short"]) == 5
    assert flushed == ["cpu"] * 7


def test_flush_reads_more_than_the_last_cache(harness):
    module = harness[0]
    module.flush("cpu")
    read = module._flush["cpu"]
    assert read.numel() * read.element_size() >= 2 * module.cache_bytes()


def test_the_best_rate_that_was_seen_is_the_ceiling(harness):
    """A plain read, or a bare product of the same shape, may be faster than the large copy and product."""
    module = importlib.import_module("roofline")
    roofline = {
        "copy_bytes_per_s": 10.0,
        "read_bytes_per_s": 20.0,
        "gemm_float32_flop_per_s": 100.0,
    }
    ceilings = module.Ceilings.of(roofline, "float32")
    assert ceilings.roofline_ms(40, 0) == 2e3 and ceilings.roofline_ms(40, 300) == 3e3
    ceilings.raise_to(harness[0].Yardstick(None, flops=900), 3.0)
    ceilings.raise_to(harness[0].Yardstick(None, bytes=90), 3.0)
    # A slower yardstick does not lower them.
    ceilings.raise_to(harness[0].Yardstick(None, bytes=1, flops=1), 3.0)
    assert ceilings.roofline_ms(60, 0) == 2e3 and ceilings.roofline_ms(0, 300) == 1e3


def faked_times(harness, monkeypatch, **seconds):
    """Make `sample` return these seconds by the name of the function, with the prefix "cold_" for cold samples."""
    module = harness[0]
    step = module.step

    def named(problem, provider, direction, args=None):
        run = step(problem, provider, direction, args)
        run.__name__ = "eager" if provider.call is module.reference.token_logprob else "other"
        return run

    def sample(function, device, cold=False):
        return seconds[("cold_" if cold else "") + function.__name__]

    monkeypatch.setattr(harness[3], "step", named)
    monkeypatch.setattr(module, "sample", sample)


def test_a_share_of_the_roofline_is_that_of_the_cold_call_and_of_the_best_ceiling(
    harness, monkeypatch
):
    """Warm, the call is faster than its roofline. The yardstick reads twice as fast as the copy."""
    case, make = token_problem(harness)
    size = 4 * SIZES["N"] * SIZES["V"]
    copy = size / 8e-3  # bytes per second: a copy of as many bytes takes 8 ms
    faked_times(harness, monkeypatch, eager=2e-3, other=2e-3, cold_eager=5e-3, cold_other=5e-3)

    def with_named_yardstick(*args):
        problem = make(*args)
        read = lambda: None  # noqa: E731
        read.__name__ = "eager"  # 2 ms
        problem.yardsticks = {"read": harness[0].Yardstick(read, bytes=size // 2)}
        return problem

    roofline = {"copy_bytes_per_s": copy, "gemm_float32_flop_per_s": 1e11}
    rows = harness[3].bench_op(case, with_named_yardstick, "cpu", roofline, compiled=False)
    row = next(r for r in rows if (r["provider"], r["direction"]) == ("eager", "forward"))
    assert (row["median_ms"], row["cold_ms"]) == (2.0, 5.0)
    assert row["roofline_ms"] == pytest.approx(4.0, rel=1e-2)  # not 8
    assert row["fraction_of_roofline"] == pytest.approx(0.8, rel=1e-2)
    forward = [r for r in rows if r["direction"] == "forward"]
    assert not [x for x in harness[3].failures(forward) if x.startswith("ROOFLINE")]


def test_faster_than_the_roofline_fails_the_run(harness):
    run = harness[3]
    row = {"op": "gae", "case": "c", "direction": "forward", "provider": "cpu", "ours": True}
    row |= {"median_ms": 1.0, "fraction_of_roofline": run.NOISE}
    assert run.failures([row]) == []
    (line,) = run.failures([{**row, "fraction_of_roofline": run.NOISE + 0.01}])
    assert line.startswith("ROOFLINE: gae c forward cpu: 111%")
    assert run.failures([{**row, "fraction_of_roofline": 9.0}], quick=True) == []


@pytest.mark.parametrize("op", ["kl_reward", "gae", "kl_gae", "masked_whiten"])
@pytest.mark.parametrize("packed", [0, 1])
def test_roofline_of_a_sequence_counts_what_must_move(harness, op, packed):
    """Unmasked inputs, all outputs and the mask; whitening adds no pass."""
    made = importlib.import_module("bench_sequence_ops").PROBLEMS[op]
    sizes = {"B": 5, "T": 40, "packed": packed, "whiten": 1}
    problem = made(harness[1].Case(op, "t", "float32", sizes), "cpu")
    outputs = harness[0].tensors(getattr(fastrlhf, op)(**problem.args, backend="reference"))
    tokens = outputs[0].numel()
    counted = tokens if packed else int(problem.args["mask"].sum())
    inputs = [x for x in problem.args.values() if isinstance(x, torch.Tensor)]
    read = sum(4 * counted for x in inputs if x.is_floating_point() and x.numel() == tokens)
    written = sum(4 * x.numel() for x in outputs if x.numel() == tokens)
    assert problem.forward_bytes == read + written + (0 if packed else tokens)


def test_json_has_null_for_nan(harness):
    value = {"a": [float("nan"), 1.0, (float("inf"),)], "b": {"c": -float("inf")}, "d": "x"}
    assert harness[0].plain(value) == {"a": [None, 1.0, [None]], "b": {"c": None}, "d": "x"}


def test_committed_rows_are_not_faster_than_their_roofline(harness):
    """Except in the CPU file that predates cold timing, which docs/performance.md explains."""
    run, old = harness[3], "amd-epyc-2026-11-26.json"
    files = sorted((BENCHMARKS / "results").glob("*.json"))
    assert files
    for path in files:
        document = json.loads(path.read_text())
        assert document.get("cold") or document["device"] == "cuda" or path.name == old
        if path.name != old:
            assert [x for x in run.failures(document["rows"]) if x.startswith("ROOFLINE")] == []


def test_cases_without_time_left_are_listed(harness, monkeypatch, tmp_path, capsys):
    """The file is written after each case, so that a run that is killed leaves what it measured."""
    _, cases, _, run = harness
    listed = [c for c in cases.CPU if c.op in ("masked_whiten", "kl_reward", "ranking_loss")]
    monkeypatch.setitem(run.LISTS, "gpu-quick", listed)
    out = tmp_path / "r.json"
    written = []

    def bench_op(case, *rest, **more):
        written.append(json.loads(out.read_text())["rows"] if out.exists() else None)
        if len(written) == 2:
            clock.append(100.0)
        return [
            {"op": case.op, "case": case.name, "dtype": "float32", "direction": "forward"}
            | {
                "provider": "cpu",
                "ours": True,
                "error_share_of_bar": float("nan"),
                "median_ms": 1.0,
            }
        ]

    clock = [0.0]
    monkeypatch.setattr(run, "bench_op", bench_op)
    monkeypatch.setattr(run.time, "time", lambda: clock[-1])
    monkeypatch.setattr(run, "measure_roofline", lambda *_: {"copy_bytes_per_s": 1.0})
    monkeypatch.setenv("FASTRLHF_UNTIL", "50")
    arguments = ["--device", "cpu", "--list", "gpu-quick", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["run.py", *arguments])
    assert run.main() == 0
    assert written[0] is None and len(written[1]) == 1
    document = json.loads(out.read_text())
    assert len(document["rows"]) == 2 and document["rows"][0]["error_share_of_bar"] is None
    assert document["not_run"] == ["ranking_loss 512 prompts x 9 float32"]
    assert document["whole"] is False and "NOT RUN" in capsys.readouterr().out


def test_warming_up_runs_every_provider_on_few_rows_past_failures(harness, monkeypatch, capsys):
    module, cases, _, run = harness
    sizes = []
    made = run.makers()

    def makers():
        def make(case, device):
            sizes.append(case.sizes)
            if case.op == "gae":
                raise MemoryError("too big")
            return made[case.op](case, device)

        return dict.fromkeys(made, make)

    monkeypatch.setattr(run, "makers", makers)
    arguments = ["--warm-up", "--list", "gpu-quick", "--quick", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["run.py", *arguments, "gae", "masked_whiten"])
    assert run.main() == 0
    printed = capsys.readouterr().out
    assert "gae capped padded 512x4096: MemoryError: too big" in printed
    assert "masked_whiten capped padded 512x4096: 2 providers" in printed
    assert all(s["B"] <= cases.WARM_UP["B"] for s in sizes) and len(sizes) == 3


def test_command_writes_its_results(tmp_path):
    out = tmp_path / "results.json"
    command = [sys.executable, BENCHMARKS / "run.py", "pack", "--quick", "--device", "cpu"]
    result = subprocess.run(
        [*command, "--out", out],
        capture_output=True,
        text=True,
        cwd=BENCHMARKS.parent,
    )
    assert result.returncode == 0, result.stderr
    document = json.loads(out.read_text())
    assert document["quick"] is True
    assert document["device"] == "cpu"
    assert document["machine"]["torch"] == torch.__version__
    (row,) = document["rows"]
    assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
