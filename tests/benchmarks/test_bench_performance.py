"""docs/performance.md: its tables and plots are generated, current, and say what is missing."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def performance(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import performance

    return performance


def row(**more):
    base = {"op": "gae", "case": "padded 2x3", "dtype": "float32", "direction": "forward"}
    base |= {"ours": False, "median_ms": 8.0, "p20_ms": 7.5, "p80_ms": 9.0, "roofline_ms": 0.5}
    return base | {"fraction_of_roofline": 0.0625, "times_as_fast_as": {}} | more


def document(date="2026-01-02", device="cpu", quick=False):
    ours = row(provider="cpu", ours=True, median_ms=2.0, p20_ms=1.9, p80_ms=2.2, gae_ms=1.6)
    ours |= {"fraction_of_roofline": 0.25, "times_as_fast_as": {"eager": 4.0, "python loop": 123.4}}
    wrong = row(provider="peer")
    del wrong["median_ms"], wrong["fraction_of_roofline"]
    rows = [row(provider="eager"), row(provider="python loop", median_ms=246.8), wrong, ours]
    machine = {"name": "A CPU", "threads": 2, "torch": "2.13.0"}
    return {"date": date, "device": device, "quick": quick, "machine": machine, "rows": rows}


def write(folder, name, **more):
    (folder / name).write_text(json.dumps(document(**more)))


def test_page_is_what_the_committed_results_give(performance):
    text = performance.PAGE.read_text()
    found = performance.newest()
    assert performance.spliced(text, performance.section(found)) == text, (
        "stale: run make bench-performance"
    )
    if not found:
        pytest.skip("current, but says little: no results file is committed yet")


def test_plots_are_those_of_the_committed_results(performance):
    for device, (file, results) in performance.newest().items():
        for op in {r["op"] for r in results["rows"] if r["op"] != "pack"}:
            assert file in (performance.PLOTS / f"{device}-{op}.svg").read_text(), (
                "run make bench-performance"
            )


def test_table(performance):
    text = performance.section({"cpu": ("r.json", document())})
    head, _, line = (x for x in text.splitlines() if x.startswith("|"))
    assert head == (
        "| Sequences | direction | backend | ms | × eager | × python loop | × peer "
        "| time ÷ `gae` | of roofline |"
    )
    assert (
        line == "| `gae` padded 2x3 float32 | forward | cpu | 2 | 4× | 123× | wrong | 1.25 | 25% |"
    )
    assert f"[`r.json`](../{performance.RESULTS.relative_to(ROOT)}/r.json)" in text
    assert "No GPU figure exists yet." in text
    assert "No GPU figure" not in performance.section({"cuda": ("r.json", document(device="cuda"))})
    assert performance.NONE_YET in performance.section({})


def gpu_document(**more):
    """Ours beside a peer that passed, a faster one and a slower one that did not, and one that did not run."""
    ours = row(provider="cuda", ours=True, median_ms=2.0, host_ms=0.05, fraction_of_roofline=0.25)
    ours |= {"times_as_fast_as": {"eager": 4.0}}
    faster = row(provider="Liger", ungated="NaN", ungated_ms=1.0)
    slower = row(provider="quack", ungated="its error is 9 of the bar", ungated_ms=3.0)
    for wrong in (faster, slower):
        del wrong["median_ms"], wrong["fraction_of_roofline"]
    absent = {**slower, "provider": "TRL"}
    del absent["ungated_ms"]
    rows = [
        row(provider="eager"),
        row(provider="A", median_ms=6.0),
        row(provider="B", median_ms=5.0),
    ]
    rows += [faster, slower, absent, ours, {**ours, "provider": "triton", "in_cache": True}]
    del (
        rows[-1]["fraction_of_roofline"],
        rows[-1]["p20_ms"],
        rows[-1]["p80_ms"],
        rows[-1]["roofline_ms"],
    )
    document = {
        "date": "2026-01-02",
        "device": "cuda",
        "quick": False,
        "commit": "abc",
        "rows": rows,
    }
    return (
        document | {"machine": {"name": "A GPU", "torch": "2.11.0"}, "notes": ["So it is."]} | more
    )


def test_gpu_table_never_shows_an_ungated_row_as_the_best_peer(performance):
    text = performance.section({"cuda": ("g.json", gpu_document())})
    head, _, cuda, triton = (x for x in text.splitlines() if x.startswith("|"))
    assert head.endswith("| × eager | best peer | × best peer | faster, ungated | of roofline |")
    assert cuda == (
        "| `gae` padded 2x3 float32 | forward | cuda | 2 | 0.05 | 4× | B 5 ms | 2.5× | Liger 1 ms | 25% |"
    )
    assert triton.endswith("| Liger 1 ms | in cache |")
    assert "commit abc" in text and "So it is." in text and "threads" not in text


def test_gpu_rows_without_quantiles_or_roofline_are_drawn(performance, tmp_path):
    (path,) = performance.draw("cuda", "g.json", gpu_document(), tmp_path)
    assert "triton" in path.read_text() and "Liger" not in path.read_text()


def test_a_cpu_file_from_before_the_cold_calls_says_what_its_shares_are(performance):
    assert "were in the cache" in performance.section({"cpu": ("r.json", document())})
    assert "in the cache" not in performance.section(
        {"cpu": ("r.json", {**document(), "cold": True})}
    )


def test_committed_gpu_file_marks_what_was_not_compared(performance):
    """The first run on a GPU: no row without a check has a time that others are compared with."""
    text = (performance.RESULTS / "nvidia-h200-2026-11-27.json").read_text()
    results = json.loads(text, parse_constant=pytest.fail)  # NaN is null
    assert results["commit"] == "d9ecab4" and not results["whole"]
    for r in results["rows"]:
        assert r["ours"] or r["provider"] in ("eager", "TRL") or "median_ms" not in r
        assert r.get("fraction_of_roofline", 0) <= 1
        assert ("ungated" in r) != ("median_ms" in r)
    (liger,) = [
        r for r in results["rows"] if (r["provider"], r["op"]) == ("Liger", "token_logprob")
    ]
    assert liger["error"] is None and "8184" in liger["ungated"]


def head_row(**more):
    base = row(
        op="linear_logprob", case="3x4x5, no gradient", dtype="bfloat16", peak_bytes=3_000_000
    )
    return base | {"beyond_bytes": 2_000_000, "error": 1.5e-6} | more


def test_heads_of_16_bit_operands_stand_side_by_side(performance):
    """With time, memory and error, the bf16 head too, which no gate of fp32 lets pass; ours only where right."""
    ours = head_row(provider="cpu", ours=True, median_ms=2.0, gemm_ms=1.6)
    rounded = head_row(provider="bf16 head", ungated_ms=1.0, ungated="its error", error=5.7e-3)
    update = {"op": "linear_ppo_loss", "direction": "forward+backward"}
    wrong = head_row(provider="cpu", ours=True, **update, ungated="its error is 9 of the bar")
    for r in (rounded, wrong):
        del r["median_ms"], r["fraction_of_roofline"]
    cast = head_row(provider="fp32 head", **update, gradient_errors={"weight": 1e-3}, error=2e-8)
    rows = [ours, rounded, head_row(provider="fp32 head", median_ms=4.0), cast, wrong]
    rows += [head_row(provider="masked", case="3x4x5, 60 % masked", **update)]
    rows += [head_row(provider="fp32 operands", dtype="float32")]
    text = performance.section({"cpu": ("r.json", {**document(), "rows": rows})})
    table = text[text.index(performance.SIDE_BY_SIDE) :].split("\n\n")
    case = "`linear_logprob` 3x4x5, no gradient bfloat16 | forward"
    assert table[0].splitlines()[2:] == [
        f"| {case} | **cpu** | 2 | 1.25 | 2 | 1.5e-06 |  |",
        f"| {case} | bf16 head | 1 | 0.625 | 2 | 5.7e-03 |  |",
        f"| {case} | fp32 head | 4 | 2.5 | 2 | 1.5e-06 |  |",
        "| `linear_ppo_loss` 3x4x5, no gradient bfloat16 | forward+backward | fp32 head | 8 |  | 2 "
        "| 2.0e-08 | 1.0e-03 |",
    ]
    assert table[1] == performance.SIDE_BY_SIDE_NOTE
    head = next(x for x in text.splitlines() if x.startswith("| From hidden states"))
    assert "bf16 head" not in head and "fp32 head" not in head  # they have this table
    assert performance.SIDE_BY_SIDE not in performance.section({"cpu": ("r.json", document())})


def test_updates_and_bits_of_a_gpu_run(performance):
    rows = [
        {
            "head": "linear_ppo_loss",
            "tokens": 16384,
            "fits": True,
            "seconds": 0.5,
            "peak_bytes": 2e10,
        },
        {"head": "fp32 head", "tokens": 16384, "fits": False},
        {"head": "linear_ppo_loss", "tokens": 65536, "not_run": "no time was left"},
    ]
    largest = {
        "linear_ppo_loss": {"tokens": 32768, "does_not_fit": None, "untried": 65536},
        "fp32 head": {"tokens": 8192, "does_not_fit": 9216},
    }
    updates = {"rows": rows, "largest": largest, "dtype": "bfloat16"}
    updates["model"] = {"parameters": 1_236_000_000}
    chunk = {"what": "chunk", "rows": 512, "equal": False}
    bits = {"rows": [chunk, {**chunk, "rows": 2048, "equal": True}, {**chunk, "what": "block"}]}
    document = gpu_document(updates=updates, gemm_bitwise=bits)
    text = performance.section({"cuda": ("g.json", document)})
    assert "| Update of 1.2B, bfloat16 | 16384 tokens | 65536 tokens | largest batch |" in text
    assert "| linear_ppo_loss | 0.5 s, 20 GB |  | 32768 or more |" in text
    assert "| fp32 head | does not fit |  | 8192 |" in text
    assert "in chunks of 512 rows differ bitwise from" in text
    chunk["equal"] = True
    assert "bitwise identical in chunks of every length" in performance.section(
        {"cuda": ("g", document)}
    )


def test_a_wrong_result_of_ours_has_no_number(performance):
    results = document()
    del results["rows"][-1]["median_ms"], results["rows"][-1]["gae_ms"]
    (line,) = [
        x for x in performance.section({"cpu": ("r.json", results)}).splitlines() if "| cpu |" in x
    ]
    assert line == "| `gae` padded 2x3 float32 | forward | cpu | wrong |  |  |  |  |"


def test_newest_whole_run_of_each_device(performance, tmp_path):
    write(tmp_path, "b.json", date="2026-01-01")
    write(tmp_path, "a.json", date="2026-02-01")
    write(tmp_path, "c.json", date="2026-03-01", quick=True)
    write(tmp_path, "g.json", date="2025-01-01", device="cuda")
    assert {d: f for d, (f, _) in performance.newest(tmp_path).items()} == {
        "cpu": "a.json",
        "cuda": "g.json",
    }


def test_splice_replaces_only_what_is_between_the_markers(performance):
    text = f"a\n{performance.BEGIN}\nold\n{performance.END}\nb\n"
    assert (
        performance.spliced(text, "new\n") == f"a\n{performance.BEGIN}\nnew\n{performance.END}\nb\n"
    )
    for broken in ("nothing", f"{performance.END}{performance.BEGIN}", f"{performance.BEGIN} only"):
        with pytest.raises(ValueError, match="once each"):
            performance.spliced(broken, "new")


def test_plots_have_a_linear_axis_from_0(performance, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    panels = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda figure, *a, **k: panels.extend(figure.axes) or save(figure, *a, **k),
    )
    rows = [
        row(provider="eager", case=case, median_ms=ms) for case, ms in (("a", 3.0), ("b", 900.0))
    ]
    performance.draw("cpu", "r.json", {**document(), "rows": rows}, tmp_path)
    assert [axes.get_title("left") for axes in panels] == [
        "a, float32, forward",
        "b, float32, forward",
    ]
    for axes, longest in zip(panels, (3.0, 900.0), strict=True):
        assert axes.get_xscale() == "linear"
        low, high = axes.get_xlim()
        assert low == 0 and longest < high < 4 * longest


def test_plots(performance, tmp_path):
    (path,) = performance.draw("cpu", "r.json", document(), tmp_path)
    assert path.name == "cpu-gae.svg"
    first = path.read_text()
    assert "r.json" in first and "python loop" in first and "peer" not in first
    performance.draw("cpu", "r.json", document(), tmp_path)
    assert path.read_text() == first
    assert len(first) < 30_000


def test_check_tells_stale_from_current(performance, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(performance, "PAGE", tmp_path / "performance.md")
    monkeypatch.setattr(performance, "newest", lambda: {"cpu": ("r.json", document())})
    monkeypatch.setattr(performance, "PLOTS", tmp_path / "plots")
    performance.PAGE.write_text(f"{performance.BEGIN}\n{performance.END}\n")
    monkeypatch.setattr("sys.argv", ["performance.py", "--check"])
    assert performance.main() == 1
    monkeypatch.setattr("sys.argv", ["performance.py"])
    assert performance.main() == 0
    monkeypatch.setattr("sys.argv", ["performance.py", "--check"])
    assert performance.main() == 0
    assert (tmp_path / "plots" / "cpu-gae.svg").exists()
    capsys.readouterr()


@pytest.mark.parametrize(
    "damaged", ["", "{", "[]", "{}", '{"device": "cpu", "date": "", "quick": 0}']
)
def test_a_damaged_results_file_is_named(performance, tmp_path, damaged):
    (tmp_path / "cpu.json").write_text(damaged)
    with pytest.raises(ValueError, match=r"cpu.json is no whole results file of run.py"):
        performance.newest(tmp_path)
