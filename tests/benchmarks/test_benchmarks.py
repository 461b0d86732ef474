"""What the benchmarks work out from their measurements: shares, ratios, bars, tables, steps of growth."""

import json

import pytest
import torch

from benchmarks import tables
from benchmarks.cpu import bars
from benchmarks.harness import candidate as candidates
from benchmarks.harness import clock, results
from benchmarks.harness import cpu_limits as limits
from benchmarks.tools import compare, growth

LIMITS = {
    "read_gb_s": {"huge pages": 20.0, "4 KiB pages": 10.0},
    "peak_gop_s": {"fp32 avx2": 50.0, "fp32 avx512": 100.0, "int8 avx2": 90.0, "int8 avx512vnni": 400.0},
}


def row(name="lowbit 4-bit g128 int8", ms=1.0, m=1, threads=1, op="packed_linear", shape="4096x4096", **facts):
    facts = {"who": "lowbit", "family": "packed", "bits": 4, "group": 128, "activations": "int8", **facts}
    return {"op": op, "shape": shape, "m": m, "threads": threads, "name": name, "ms": ms, "waited": 0.0, **facts}


def test_peaks_are_those_of_the_activations_and_the_isa():
    assert limits.bandwidth(LIMITS) == 20e9
    assert limits.peak(LIMITS, "int8") == 400e9
    assert limits.peak(LIMITS, "int8", "avx512") == 90e9  # which has no instruction of its own here
    assert limits.peak(LIMITS, "fp32", "avx2") == 50e9
    assert limits.peak(LIMITS, "bf16", "avx512bf16") == 100e9  # multiplied as fp32
    assert limits.peak(LIMITS, "fp32", "scalar") is None


def test_limits_are_medians_of_their_measurements():
    others = [{"read_gb_s": {"huge pages": v}, "peak_gop_s": {"fp32 avx2": 2 * v}} for v in (30.0, 10.0, 20.0)]
    assert limits.median(others) == {"read_gb_s": {"huge pages": 20.0}, "peak_gop_s": {"fp32 avx2": 40.0}}


def test_limits_are_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    limits.program.cache_clear()
    try:
        found = limits.measure(1, 0)
    except RuntimeError as error:
        pytest.skip(str(error))
    finally:
        limits.program.cache_clear()
    assert 0.1 < found["read_gb_s"]["4 KiB pages"] < 10_000
    assert all(1 < rate < 100_000 for rate in found["peak_gop_s"].values())


def test_without_a_compiler_there_is_a_reason(monkeypatch):
    monkeypatch.setattr(limits.shutil, "which", lambda _: None)
    limits.program.cache_clear()
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler found"):
        limits.measure(1, 0)


def test_shares_of_the_right_limit():
    rows = [row(gb_s=10.0, gop_s=1.0), row(m=64, gb_s=1.0, gop_s=200.0), row(m=16, gb_s=1.0, gop_s=1.0)]
    rows += [row(m=64, gop_s=45.0, isa="avx2"), row(m=4096, op="packed_embedding", gb_s=5.0), row(threads=2, gb_s=1.0)]
    found = results.with_shares(rows, {1: LIMITS})
    assert [(r.get("bandwidth_share"), r.get("peak_share")) for r in found] == [
        (0.5, None), (None, 0.5), (None, None), (None, 0.5), (0.25, None), (None, None),
    ]  # fmt: skip


def test_ratios_are_to_the_baseline_under_the_same_condition():
    rows = [row("torch fp32", 4.0), row("torch fp32", 8.0, m=16)]
    rows += [row(ms=2.0), row(ms=2.0, m=16), row(ms=2.0, threads=2)]
    ratios = {(r["m"], r["threads"]): r.get("x_fp32") for r in results.with_ratios(rows) if r["ms"] == 2.0}
    assert ratios == {(1, 1): 2.0, (16, 1): 4.0, (1, 2): None}


def test_disturbed_rounds_do_not_count_where_there_are_enough_others():
    assert clock.undisturbed_median([1.0, 9.0, 1.1, 1.2, 9.0], [0.0, 8.0, 0.0, 0.0, 8.0]) == 1.1
    assert clock.undisturbed_median([1.0, 9.0, 3.0], [0.0, 8.0, 2.0]) == 3.0


def test_of_repeated_measurements_the_median_counts():
    repeats = [row(ms=ms) for ms in (3.0, 1.0, 2.0)] + [row(ms=ms, m=16) for ms in (9.0, 8.0)] + [row("other", 5.0)]
    assert [(r["name"], r["m"], r["ms"]) for r in results.medians(repeats)] == [
        ("lowbit 4-bit g128 int8", 1, 2.0), ("lowbit 4-bit g128 int8", 16, 8.0), ("other", 1, 5.0),
    ]  # fmt: skip


def test_results_files_round_trip(tmp_path):
    content = {"date": "2026-01-01", "limits": {"1": LIMITS}, "rows": [row(), row(m=16)]}
    results.write(tmp_path / "r.json", content)
    assert results.read(tmp_path / "r.json") == content
    assert len([line for line in (tmp_path / "r.json").read_text().splitlines() if '"packed_linear"' in line]) == 2


def judged(*rows):
    return {bar.what: bar for bar in bars.judged({"rows": list(rows), "limits": {"1": LIMITS}})}


def test_a_bar_is_about_the_worst_row():
    found = judged(row(bandwidth_share=0.95), row("lowbit 6-bit g128 int8", bits=6, bandwidth_share=0.8))
    bar = found["packed, int8, 4 to 8 bits, 4096x4096, M=1, 1 thread: share of streaming bandwidth"]
    assert (bar.wanted, bar.got, bar.row, bar.verdict) == (0.9, 0.8, "lowbit 6-bit g128 int8", "missed by 11 %")


def test_the_best_peer_has_the_same_bits():
    peer = {"who": "onnxruntime", "family": None}
    others = [row("slow", 2.0, **peer), row("fast", 1.0, **peer), row("other bits", 0.1, **{**peer, "bits": 8})]
    found = judged(row(ms=0.6), *others)
    bar = found["packed, int8, 4 bits, 4096x4096, M=1, 1 thread: time against the best peer"]
    assert bar.verdict == "met" and bar.got == 0.6 and bar.row.endswith("/ fast")


def test_a_forced_isa_is_held_against_its_own_bar_only():
    dense = row("torch fp32", 1.0, who="torch", family="dense", bits=None, activations="fp32")
    found = judged(dense, row(ms=0.5), row("lowbit 4-bit g128 int8 avx2", 1.5, isa="avx2"))
    assert found["packed, AVX2, 4096x4096, M=1, 1 thread: time against fp32 F.linear"].verdict == "missed by 50 %"
    assert found["packed, int8: time against F.linear, every shape and M"].verdict == "met"


def test_activations_in_groups_are_held_against_their_own_bar_only():
    in_groups = row("lowbit 4-bit g128 int8 g128 activations", 9.0, m=256, x_group=128, error=0.0066)
    found = judged(row(ms=0.5, m=256, error=0.009), in_groups)
    bar = found.pop("packed, int8 in groups, 4096x4096, M=256, 1 thread: error")
    assert (bar.got, bar.verdict) == (0.0066, "missed by 10 %")
    assert all(bar.row == "lowbit 4-bit g128 int8" for bar in found.values()) and found


def test_what_is_not_batch_invariant_is_held_against_no_bar():
    bf16 = {"activations": "bf16", "bandwidth_share": 0.7}
    found = judged(row("a", 2.0, **bf16), row("b", 1.0, batch_invariant=False, **{**bf16, "bandwidth_share": 0.1}))
    assert {bar.row for bar in found.values()} == {"a"}


def test_a_bit_width_that_costs_more_than_its_bytes_is_named():
    rows = [row(f"{b} bits", ms, bits=b) for b, ms in {2: 1.0, 3: 1.5, 4: 2.0, 5: 4.0, 8: 4.0}.items()]
    bar = judged(*rows)["packed, int8, 3, 5, 6, 7 bits, 4096x4096, M=1, 1 thread: time against the line between 2, 4 "
                        "and 8 bits"]  # fmt: skip
    assert bar.row == "5 bits" and bar.got == pytest.approx(4.0 / 2.5)


def test_kronecker_layers_are_held_against_their_operations():
    same = {"m": 16, "op": "kron_linear", "activations": "bf16"}
    dense = row("torch bf16", 10.0, who="torch", family="dense", gop_s=100.0, **same)
    ours = row("kron", 1.0, family="kron", gop_s=90.0, **same)
    bar = judged(dense, ours)["kron, bf16, 4096x4096, M=16, 1 thread: share of the operations' speed-up over F.linear"]
    assert bar.got == 0.9 and bar.verdict == "met"


def test_marked_sections_are_made_again_and_nothing_else():
    content = {"rows": results.with_ratios([row("torch fp32", 2.0, error=1e-7), row(ms=0.5, error=0.007)])}
    text = "before\n<!-- cpu packed: begin (x) -->\nold\n<!-- cpu packed: end -->\nafter <!-- cpu decode: begin -->" \
           "<!-- cpu decode: end -->"  # fmt: skip
    found = tables.rewrite(text, content)
    assert found.startswith("before\n<!-- cpu packed: begin (x) -->\n\n| 4096x4096, 1 thread, ms")
    assert "| lowbit 4-bit g128 int8 | 0.5 (4×) |" in found and "old" not in found
    assert tables.NOTHING in found.split("after")[1]
    assert tables.rewrite(found, content) == found
    with pytest.raises(ValueError, match="one of headlines, misses, machine, bars, .* got 'nonsense'"):
        tables.rewrite("<!-- cpu nonsense: begin --><!-- cpu nonsense: end -->", content)
    assert "packed" not in list(tables.missing(text)) and "kron" in list(tables.missing(text))


def test_of_the_same_conditions_the_last_run_counts():
    """With all of its rows: what is compared was measured side by side."""
    first = {"date": "1", "rows": [row(ms=1.0), row("other", 2.0), row(m=4, ms=3.0)]}
    last = {"date": "2", "rows": [row(ms=5.0)]}
    merged = tables.merged([first, last])
    assert merged["date"] == "2" and [r["ms"] for r in merged["rows"]] == [5.0, 3.0]


def test_every_section_has_its_place_in_the_documents():
    assert list(tables.missing(tables.DOCUMENT.read_text(), tables.SHORT)) == []
    pages = sorted(tables.PAGES.glob("zen*.md"))
    assert pages and all(list(tables.missing(page.read_text(), tables.FULL)) == [] for page in pages)
    assert list(tables.missing(tables.new_page("new"), tables.FULL)) == [] and set(tables.TITLES) == set(tables.FULL)


def test_the_documents_show_the_results_that_are_stored():
    folder = tables.ROOT / "benchmarks" / "results"
    content = tables.merged([results.read(folder / f"{name}.json") for name in ("zen4-shapes", "zen4")])
    for file in (tables.DOCUMENT, tables.PAGES / "zen4.md"):
        assert tables.rewrite(file.read_text(), content) == file.read_text()


def test_headlines_stand_beside_what_they_are_compared_with():
    ours = [row(ms=ms, m=m) for m, ms in ((1, 0.5), (16, 2.0), (256, 20.0))]
    dense = [row("torch fp32", ms, m=m, who="torch", family="dense") for m, ms in ((1, 5.0), (16, 4.0), (256, 10.0))]
    (line,) = tables.headlines({"rows": ours + dense}).splitlines()[2:]
    assert line == (
        "| 4-bit layer, int8 x | 4-bit g128 int8 | 0.5, 2, 20 ms | torch fp32 | 5, 4, 10 ms | 10, 2, 0.5 |"
    )
    assert tables.headlines({"rows": ours}) == ""  # nothing to compare it with


def test_of_every_kind_of_bars_the_one_missed_by_most_is_named():
    calls = [row(f"{name} fp32", ms, op="module_call", shape="8x8", who=who, activations="fp32", family="packed")
             for name, ms, who in (("nn.Linear", 1.0, "torch"), ("ours", 2.6, "lowbit"))]  # fmt: skip
    said = tables.misses({"rows": calls})
    assert said.startswith("0 of 1 are met.")
    assert "| 0 of 1 | call of an 8x8 layer, fp32: time against nn.Linear fp32 (ours fp32) | ≤ 1.3 | 2.6 |" in said


def point(varied, value, ms, nbytes=1000, **sizes):
    sizes = {"M": 1, "N": 64, "K": 64, "bits": 4, "threads": 1, **sizes, varied: value}
    return growth.Point(varied, "int8", **sizes, ms=ms, nbytes=nbytes)


def test_steps_larger_than_the_work_are_named():
    line = [point("M", 1, 1.0), point("M", 2, 2.5), point("M", 4, 5.1)]
    assert list(growth.steps(line)) == []
    line[2] = point("M", 4, 6.6)
    (step,) = growth.steps(line)
    assert step.startswith("time, M 2 to 4 (int8, N=64, K=64, bits=4, threads=1): 2.5 to 6.6 ms, 2.64 times; the work")


def test_bytes_count_as_work_and_threads_share_it():
    def named(*points):
        return [step.split(",")[0] for step in growth.steps(points)]

    four = point("bits", 4, 1.0, 1000)
    assert named(four, point("bits", 5, 1.6, 1250)) == []
    assert named(four, point("bits", 5, 1.7, 1250)) == ["time"]
    assert named(four, point("bits", 5, 1.7, 2000)) == ["bytes"]
    assert named(point("threads", 1, 1.0), point("threads", 2, 0.6)) == []
    assert named(point("threads", 1, 1.0), point("threads", 2, 0.7)) == ["time"]


def test_peers_weights():
    weight = torch.randn(4, 64)
    for bits in (2, 4, 8):
        codes, scales = candidates.symmetric(weight, bits, 32)
        dense = (codes.double() - 2 ** (bits - 1)) * candidates.expand(scales, 32)
        steps = candidates.expand(scales, 32)
        assert float(((weight - dense).abs() / steps).max()) <= 0.5 + 1e-4 + (bits < 8) * 0.01
        packed = candidates.pack_bytes(codes, bits).int()
        unpacked = torch.stack([packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)], -1).flatten(1)
        assert torch.equal(unpacked, codes.int())


# ------------------------------------------------------------------------------------------------- two checkouts


def test_cases_that_are_compared_have_names_of_their_own_and_cover_every_family() -> None:
    cases = list(compare.cases())
    assert len({str(case) for case in cases}) == len(cases)
    products = [case for case in cases if case.what["op"] == "linear" and case.what["shape"] == (4096, 4096)]
    for family, least in (("packed", 7 * 3 * 3), ("codebook", 5 * 3 * 3), ("kron", 2 * 2 * 3)):
        assert sum(case.what["family"] == family for case in products) >= least
        assert any(case.what["family"] == family and case.what["op"] == "gather" for case in cases)
        assert any(case.what["family"] == family and case.what["shape"] == (8, 8) for case in cases)


def test_a_row_is_slower_only_where_median_and_fastest_are() -> None:
    times = compare.Times(next(compare.cases()))
    times.rounds = [(1.0, 1.5), (1.0, 1.5), (1.0, 1.0)]
    row = times.row()
    assert (row.median, row.fastest, row.ratio) == (1.5, 1.0, 1.0)
    times.rounds = [(1.0, 1.5), (1.0, 1.5), (1.0, 1.1)]
    slower, different = times.row(), compare.Row("b", 1.0, 1.0, 0.9, 0.9, False)
    said = list(compare.summary([row, slower, different], 1.03))
    assert said[0].endswith(f"worst 1.500 ({row.case})")
    assert said[2] == f"1 of 3 rows are slower than 1.03 times: {slower.case}"
    assert said[3] == "1 of 3 results differ: b"


@pytest.mark.turns(3)
def test_comparing_a_checkout_with_itself_finds_the_same_results(tmp_path) -> None:
    file = tmp_path / "rows.json"
    quick = ["--rounds", "1", "--sets", "1", "--seconds", "0.001", "--limit", "1000", "--write", str(file)]
    assert compare.main([str(compare.ROOT), "--only", "^call (packed|kron).*fp32", *quick]) == 0
    content = json.loads(file.read_text())
    assert [row["same"] for row in content["rows"]] == [True, True]
    assert not content["failures"]


def test_comparing_names_a_side_that_cannot_run_a_case() -> None:
    side = compare.Side(compare.ROOT, 1)
    case = compare.Case("wrong", {"op": "linear", "family": "packed", "bits": 1, "shape": (8, 8), "activations": "fp32",
                                  "cold": False}, 1)  # fmt: skip
    with pytest.raises(RuntimeError, match="bits"):
        compare.measure([case], (side, side), compare.parse(["."]))
    assert side.ask({"layer": {**case.what, "bits": 4}}) == {}  # it goes on
    side.end()
    side.close()
