"""The correctness gate of the benchmarks: a wrong result gets no time."""

import importlib
import re

import pytest
import torch

from _support.bench_problems import SIZES, problem_with_little_time, token_problem


def problem_of(harness):
    harness, cases, bench_losses, _ = harness
    case = cases.Case("ranking_loss", "tiny", "float32", {"P": 3, "K": 4})
    return harness.prepare(bench_losses.ranking_loss(case, "cpu"))


def test_right_results_pass_the_gate(harness):
    problem = problem_of(harness)
    found = harness[0].providers(problem, compiled=False)
    assert "eager" in found
    assert max(harness[0].errors(problem, found).values()) <= 1


@pytest.mark.parametrize("wrong", [lambda loss: loss * 1.001, lambda loss: loss * float("nan")])
def test_a_wrong_result_does_not(harness, wrong):
    problem = problem_of(harness)
    found = harness[0].providers(problem, compiled=False)
    right = found["eager"]
    found["broken"] = harness[0].Provider(lambda **args: wrong(right.call(**args)))
    shares = harness[0].errors(problem, found)
    assert shares["broken"] > 1
    assert shares["eager"] <= 1


def test_a_provider_that_raises_is_wrong_and_says_why(harness):
    problem = problem_of(harness)
    found = harness[0].providers(problem, compiled=False)

    def broken(**args):
        raise RuntimeError("no such kernel")

    broken = harness[0].Provider(broken)
    shares = harness[0].errors(problem, {**found, "broken": broken})
    assert shares["broken"] == float("inf") and shares["eager"] <= 1
    assert problem.raised == {"broken": "RuntimeError: no such kernel"}
    with pytest.raises(RuntimeError, match="no such kernel"):  # without eager there is no bar
        harness[0].errors(problem, {"eager": broken})


def test_a_wrong_gradient_does_not(harness):
    problem = problem_of(harness)
    found = harness[0].providers(problem, compiled=False)
    right = found["eager"]

    def half_gradient(**args):
        loss = right.call(**args)
        return loss.detach() + 0.5 * (loss - loss.detach())

    found["broken"] = harness[0].Provider(half_gradient)
    assert harness[0].errors(problem, found)["broken"] > 1


def test_wrong_provider_gets_no_number(harness, monkeypatch):
    module, cases, bench_losses, run = harness
    case = cases.Case("ranking_loss", "tiny", "float32", {"P": 3, "K": 4})
    right = module.providers

    def with_broken(problem, compiled):
        found = right(problem, compiled)
        wrong = lambda **args: 2 * found["eager"].call(**args)  # noqa: E731
        return {**found, "broken": module.Provider(wrong)}

    monkeypatch.setattr(module, "providers", with_broken)
    roofline = {"copy_bytes_per_s": 1e10, "gemm_float32_flop_per_s": 1e11}
    make = lambda *args: problem_with_little_time(bench_losses.ranking_loss(*args))  # noqa: E731
    rows = run.bench_op(case, make, "cpu", roofline, compiled=False)
    timed = {row["provider"] for row in rows if "median_ms" in row}
    assert "broken" not in timed and "eager" in timed
    # Its time is kept apart, with the reason; no speedup refers to it.
    (broken,) = [r for r in rows if (r["provider"], r["direction"]) == ("broken", "forward")]
    assert broken["ungated_ms"] > 0 and "times the bar" in broken["ungated"]
    assert all("broken" not in row.get("times_as_fast_as", {}) for row in rows)


def result_of(*shape, value=0.0):
    return lambda **args: torch.full(shape, value)


@pytest.mark.parametrize(
    "result, reason",
    [
        (result_of(8, value=float("nan")), "not finite"),
        (result_of(8, value=float("inf")), "not finite"),
        (result_of(7), r"the shapes \[\(7,\)\]; expected \[\(8,\)\]"),
        (result_of(), r"the shapes \[\(\)\]"),  # would broadcast
        (result_of(8, 1), "shapes"),
    ],
)
def test_the_gate_refuses_nan_and_other_shapes(harness, result, reason):
    module, cases, _, _ = harness
    _, make = token_problem(harness)
    problem = module.prepare(make(cases.Case("token_logprob", "t", "float32", SIZES), "cpu"))
    found = {"eager": module.providers(problem, compiled=False)["eager"]}
    found["peer"] = module.Provider(result, forward_only=True)
    shares = module.errors(problem, found)
    assert shares["peer"] == float("inf") and shares["eager"] <= 1
    assert re.search(
        reason, importlib.import_module("registry").rejected(shares, problem.raised)["peer"]
    )


def test_the_gate_samples_independent_rows_and_checks_shapes_and_nan_on_all(harness, monkeypatch):
    """Values are compared on SAMPLED_ROWS rows; a NaN or a wrong shape elsewhere is found as well."""
    module, cases, _, _ = harness
    _, make = token_problem(harness)
    monkeypatch.setattr(module, "SAMPLED_ROWS", 3)
    case = cases.Case("token_logprob", "t", "float32", {**SIZES, "N": 9})
    problem = module.prepare(make(case, "cpu"))
    rows = []
    asked, problem.rows = problem.rows, lambda at: rows.extend(at.tolist()) or asked(at)
    found = module.providers(problem, compiled=False)
    right = found["eager"]

    def with_row(row, value):
        def call(**args):
            out = right.call(**args).clone()
            out[row] += value
            return out

        return module.Provider(call)

    found |= {"sampled": with_row(4, 1.0), "other": with_row(5, float("nan"))}
    shares = module.errors(problem, found)
    assert rows == [0, 4, 8]
    assert shares["sampled"] > 1 and shares["other"] == float("inf")
    assert shares["cpu" if "cpu" in shares else "eager"] <= 1


def test_a_provider_that_overwrites_its_inputs_gets_a_copy(harness):
    module, cases, _, _ = harness
    _, make = token_problem(harness)
    problem = module.prepare(make(cases.Case("token_logprob", "t", "float32", SIZES), "cpu"))
    before = problem.args["logits"].detach().clone()

    def call(logits, targets, return_entropy):
        out = torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]
        with torch.no_grad():
            logits.view_as(logits).zero_()
        return out

    writer = module.Provider(call, forward_only=True, lay_out=module.copy_of("logits"))
    module.step(problem, writer, "forward")()
    assert torch.equal(problem.args["logits"], before)


def test_peers_that_fail_to_import_are_reported_and_skipped(harness, monkeypatch):
    import peers

    monkeypatch.setattr(peers, "_runs_triton", lambda tensor: True)

    def broken(module):
        raise RuntimeError(f"{module} is broken")

    monkeypatch.setattr(peers.importlib, "import_module", broken)
    logits = torch.zeros(8, 4)
    # TRL's, which takes seconds to import, fails at its first call, in the gate.
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name)
    late = peers.token_logprob(logits, False)
    assert set(late) == {"F.cross_entropy", "TRL"}
    for _ in range(2):
        with pytest.raises(ImportError, match="RuntimeError: trl.trainer.utils is broken"):
            late["TRL"].call(logits, torch.zeros(8, dtype=torch.long), return_entropy=False)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert set(peers.token_logprob(logits, False)) == {"F.cross_entropy"}
    assert set(peers.token_loss(logits, 0)) == {"F.cross_entropy"}
    assert peers.token_loss(logits, 1) == {} and peers.linear_logprob(logits) == {}
    found = peers.available()
    assert "broken" in found["liger_kernel.ops.grpo_loss.fused_selective_log_softmax"]
    assert set(peers.PACKAGES) <= set(found)


def test_the_layout_of_ligers_functions(harness):
    """T targets for T + 1 positions; the first T hold our values."""
    import peers

    logits = torch.arange(16 * 3.0).view(16, 3)
    laid_out = peers._with_a_row_between(logits)
    assert laid_out.shape == (8, 3, 3)
    assert torch.equal(laid_out[:, :-1].flatten(0, 1), logits)
