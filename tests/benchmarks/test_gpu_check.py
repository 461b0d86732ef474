"""The check of a GPU, as far as it can be shown without one: the run in parts, the rows, the bars, the report."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lowbit
from benchmarks.gpu import __main__ as program
from benchmarks.gpu import bars, bench, check, cuda, parts, peers, report, sanitizer
from benchmarks.gpu import formats as contenders
from benchmarks.harness import clock as timing
from benchmarks.harness import cuda_limits as limits
from benchmarks.harness.candidate import Candidate


class Clock:
    """Passes only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeTimer:
    """Makes the calls, counts them, and says what it was told to say."""

    def __init__(self, us: float = 10.0) -> None:
        self.us, self.timed = us, 0

    def in_graph(self, calls) -> float:
        self.timed += 1
        for call in calls:
            call()
        return self.us

    def alone(self, call) -> float:
        call()
        return 2 * self.us


# ----------------------------------------------------------------------------------------------- a run in parts


def context_of(folder: Path, seconds: float = 100.0, clock=None) -> parts.Context:
    budget = parts.Budget(seconds, clock) if clock else parts.Budget(seconds)
    return parts.Context(budget, parts.Results(folder, "Test GPU"))


def test_budget_counts_down() -> None:
    clock = Clock()
    budget = parts.Budget(5, clock)
    assert budget and budget.left() == 5
    clock.now += 6
    assert not budget and budget.left() == -1


def test_a_section_is_written_beside_the_others(tmp_path) -> None:
    results = parts.Results(tmp_path, "NVIDIA H200")
    assert results.path.name == "gpu-nvidia-h200.json" and results.sections() == {}
    results.write("machine", {"limits": {"copy_gb_s": 4000.0}})
    results.write("tests", {"passed": 3})
    results.write("tests", {"passed": 4, "rows": [{"a": 1, "b": "x {y}\n z"}, {"a": 2, "b": None}]})
    again = parts.Results(tmp_path, "NVIDIA H200")
    assert again.section("machine") == {"limits": {"copy_gb_s": 4000.0}}
    assert again.section("tests")["passed"] == 4
    assert again.section("tests")["rows"] == [{"a": 1, "b": "x {y}\n z"}, {"a": 2, "b": None}]
    lines = results.path.read_text().splitlines()
    assert sum('"a": ' in line for line in lines) == 2  # one row per line
    assert list(tmp_path.iterdir()) == [results.path]


@pytest.mark.parametrize(
    ("section", "status"),
    [
        ({}, "passed"),
        ({"problems": []}, "passed"),
        ({"problems": ["one"]}, "failed"),
        ({"left_out": ["one"]}, "incomplete"),
        ({"left_out": ["one"], "problems": ["one"]}, "failed"),
    ],
)
def test_status_of_a_part(tmp_path, section, status) -> None:
    context = context_of(tmp_path)
    assert parts.run_here(parts.Part("x", lambda _: section, 1), context)["status"] == status
    written = context.results.section("x")
    assert written["status"] == status and written["date"] and "seconds" in written


def test_a_part_that_raises_is_a_failed_section(tmp_path) -> None:
    def run(_):
        raise RuntimeError("no such kernel")

    context = context_of(tmp_path)
    parts.run_here(parts.Part("x", run, 1), context)
    assert context.results.section("x")["status"] == "failed"
    assert "no such kernel" in context.results.section("x")["error"]


def runner(folder: Path, clock: Clock, seconds: float, launch, shares=(1.0, 1.0, 2.0)) -> parts.Runner:
    some = [parts.Part(name, lambda _: {}, share) for name, share in zip("abc", shares, strict=True)]
    results = parts.Results(folder, "Test GPU")
    return parts.Runner(some, results, parts.Budget(seconds, clock), launch, say=lambda _: None)


def test_time_that_a_part_leaves_goes_to_the_later_ones(tmp_path) -> None:
    clock, given = Clock(), []

    def launch(part, seconds):
        given.append((part.name, seconds))
        clock.now += 20 if part.name == "a" else seconds
        return None

    runner(tmp_path, clock, 200, launch).run()
    assert given == [("a", 50), ("b", 60), ("c", 120)]


def test_no_part_begins_when_the_time_is_over(tmp_path) -> None:
    clock, ran = Clock(), []

    def launch(part, seconds):
        ran.append(part.name)
        clock.now += 300
        return None

    one = runner(tmp_path, clock, 200, launch)
    one.run()
    assert ran == ["a"] and one.skipped == ["b", "c"]


def test_a_part_that_dies_is_written_down_and_the_others_run(tmp_path) -> None:
    results = parts.Results(tmp_path, "Test GPU")
    results.write("b", {"rows": [1, 2], "commit": "earlier", "status": "incomplete"})
    launched = []

    def launch(part, seconds):
        launched.append(part.name)
        return "exit status -9" if part.name == "b" else None

    runner(tmp_path, Clock(), 100, launch).run()
    assert launched == ["a", "b", "c"]
    section = results.section("b")
    assert section["status"] == "failed" and section["error"] == "exit status -9"
    assert section["rows"] == [1, 2] and section["commit"] == "earlier"  # what it had measured before is kept


def test_a_command_that_overstays_is_ended() -> None:
    code = "import time\nprint('begun', flush=True)\ntime.sleep(60)"
    finished = parts.execute([sys.executable, "-c", code], 2)
    assert finished.code is None and finished.tail.startswith("begun") and "past its time" in finished.why


def test_a_command_that_fails_is_told_with_its_last_lines() -> None:
    finished = parts.execute([sys.executable, "-c", "print('one'); raise SystemExit(3)"], 30)
    assert finished.code == 3 and finished.tail == "one\n" and finished.why == "exit status 3"


def test_no_child_is_kept_off_the_gpu(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("LOWBIT_BACKEND", "reference")
    code = "import os; print(sorted({'TRITON_INTERPRET', 'LOWBIT_BACKEND', 'X'} & set(os.environ)))"
    assert parts.execute([sys.executable, "-c", code], 30, env={"X": "1"}).tail == "['X']\n"


@pytest.mark.parametrize("codes", [[0], [parts.LOST, parts.LOST, 0], [parts.LOST, 1]])
def test_a_part_that_lost_its_device_goes_on_in_a_new_process(tmp_path, monkeypatch, codes) -> None:
    commands = []

    def execute(command, seconds, **_):
        commands.append(list(command))
        return parts.Finished(codes[len(commands) - 1], "tail")

    monkeypatch.setattr(parts, "execute", execute)
    problem = parts.launch_process(tmp_path, fresh=True)(parts.Part("bench", lambda _: {}, 1), 100)
    assert len(commands) == len(codes)
    assert (problem is None) == (codes[-1] == 0)
    assert ["--fresh" in command for command in commands] == [True] + [False] * (len(codes) - 1)


def test_parts_are_chosen_by_name_and_keep_their_order() -> None:
    some = [parts.Part(name, lambda _: {}, 1) for name in ("machine", "tests", "bench")]
    assert [part.name for part in parts.choose(some, "bench, machine")] == ["machine", "bench"]
    assert parts.choose(some, None) == some
    with pytest.raises(ValueError, match="part must be one of machine, tests, bench: got part='benhc'"):
        parts.choose(some, "benhc")
    with pytest.raises(ValueError, match="at least one"):
        parts.choose(some, ",")


def test_every_part_is_there_and_only_the_report_needs_no_gpu() -> None:
    found = program.all_parts()
    names = ["machine", "tests", "opcheck", "graphs", "cuda", "sanitizer", "bench", "report"]
    assert [part.name for part in found] == names
    assert [part.name for part in found if not part.needs_gpu] == ["report"]


# ------------------------------------------------------------------------------------- CUDA C++ kernels


def test_cuda_without_a_library_says_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(cuda.registry, "why_unavailable", lambda name: "not compiled")
    section = cuda.run(context_of(tmp_path))
    assert section["problems"] == ["the backend cuda cannot run: not compiled"]


def test_cuda_bars_and_where_triton_is_faster() -> None:
    def row(bits, m, name, us):
        return dict(bits=bits, family="packed", shape="8192x8192", m=m, backend=name, us_graph=us)

    rows = [row(4, 1, "cuda", 11.0), row(4, 1, "triton", 10.0), row(2, 1, "cuda", 9.0), row(2, 1, "triton", 18.0)]
    found = {bar["bar"]: (bar["got"], bar["verdict"]) for bar in cuda.judged(rows)}
    assert found["4 bits 8192x8192 M=1: µs"] == (11.0, "met")
    assert found["2 bits 8192x8192 M=1: µs"] == (9.0, "missed")
    assert found["8 bits 8192x8192 M=1: µs"] == (None, "not measured")
    assert found["packed 4 bits 8192x8192 M=1: times Triton's"] == (1.1, "missed")
    assert found["packed 2 bits 8192x8192 M=1: times Triton's"] == (0.5, "met")


# ----------------------------------------------------------------------------------------------- the command


@pytest.fixture
def no_gpu(monkeypatch, tmp_path):
    """A machine without a GPU whose report goes elsewhere."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(program, "build_native", lambda budget: "CPU kernels: up to date")
    document = tmp_path / "performance.md"
    document.write_text("# Performance\n")
    monkeypatch.setattr(report, "DOCUMENT", document)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    return document


def test_without_a_gpu_it_says_so_and_exits_with_2(no_gpu, tmp_path, capsys) -> None:
    assert program.main(["--out", str(tmp_path)]) == 2
    said = capsys.readouterr().out
    assert "no GPU" in said and "machine, tests, opcheck, graphs, cuda, sanitizer, bench" in said
    assert report.NOTHING in no_gpu.read_text()  # what needs none has run
    assert not list(tmp_path.glob("*.json"))


def test_the_report_alone_needs_no_gpu(no_gpu, tmp_path) -> None:
    assert program.main(["--part", "report", "--out", str(tmp_path)]) == 0
    assert report.NOTHING in no_gpu.read_text()


def test_wrong_arguments_exit_with_2(no_gpu, capsys) -> None:
    assert program.main(["--part", "all"]) == 2
    assert "part must be one of" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        program.main(["--seconds", "0"])
    assert stopped.value.code == 2
    assert "--seconds must be greater than 0: got 0" in capsys.readouterr().err


def test_the_command_runs_as_a_module() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--help"]
    found = subprocess.run(command, cwd=parts.ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0 and "--part" in found.stdout and "--in-process" not in found.stdout


@pytest.fixture
def fake_gpu(monkeypatch, tmp_path):
    """A machine with a GPU, whose parts are what the test says and run in this process."""
    monkeypatch.setattr(program, "build_native", lambda budget: "CPU kernels: up to date")
    monkeypatch.setattr(limits, "device_name", lambda: "Test GPU")

    def launch_process(out, fresh):
        results = parts.Results(out, "Test GPU")

        def launch(part, seconds):
            parts.run_here(part, parts.Context(parts.Budget(seconds), results, fresh))
            return None

        return launch

    monkeypatch.setattr(program, "launch_process", launch_process)

    def run(*arguments: str, **sections: parts.Section) -> int:
        some = [parts.Part(name, lambda _, section=section: section, 1) for name, section in sections.items()]
        monkeypatch.setattr(program, "all_parts", lambda: some)
        return program.main([*arguments, "--out", str(tmp_path)])

    return run


def test_all_is_well_exits_with_0_and_says_the_summary_last(fake_gpu, tmp_path, capsys) -> None:
    assert fake_gpu(opcheck={"passed": ["a"], "problems": []}, report={}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [f"== Test GPU: {tmp_path / 'gpu-test-gpu.json'}", "    passed  opcheck: 1 passed; 0 failed",
                          "    passed  report: "]  # fmt: skip


@pytest.mark.parametrize("section", [{"problems": ["x"]}, {"left_out": ["x"]}])
def test_what_failed_or_is_incomplete_exits_with_1(fake_gpu, section) -> None:
    assert fake_gpu(opcheck={}, graphs=section) == 1


def test_one_part_alone_leaves_the_sections_of_the_others(fake_gpu, tmp_path) -> None:
    assert fake_gpu(tests={"passed": 1, "problems": ["x"]}, opcheck={"passed": ["a"]}) == 1
    assert fake_gpu("--part", "opcheck", tests={"passed": 2}, opcheck={"passed": ["a", "b"]}) == 0
    sections = parts.Results(tmp_path, "Test GPU").sections()
    assert sections["tests"]["passed"] == 1 and sections["opcheck"]["passed"] == ["a", "b"]


def full_sections() -> dict[str, parts.Section]:
    rows = [row(family="packed", bits=4, scheme="g128", us=30.0), row(family="dense", bits=16, us=40.0)]
    failing = [f"check {i}: differs" for i in range(200)]
    return {
        "machine": {"status": "passed", "limits": {"copy_gb_s": 4000.0, "bf16_tflop_s": 700.0}},
        "tests": {"status": "failed", "passed": 10, "failed": 2, "errors": 0, "skipped": 1, "problems": ["2 failed"],
                  "failures": ["tests.packed.test_kernels::test_a", "tests.packed.test_kernels::test_b"]},
        "opcheck": {"status": "passed", "passed": ["a", "b"], "problems": []},
        "graphs": {"status": "failed", "passed": [], "problems": failing},
        "sanitizer": {"status": "incomplete", "absent": ["compute-sanitizer"], "tools": {}, "left_out": ["every tool"]},
        "bench": {"status": "incomplete", "rows": rows, "bars": bars.judged(rows), "left_out": ["x"] * 7},
    }  # fmt: skip


def test_the_summary_is_short_and_names_what_failed(tmp_path) -> None:
    names = [part.name for part in program.all_parts()]
    sections = full_sections()
    missed = [{"bar": f"bar {i}", "wanted": 0.65, "got": 0.1, "verdict": "missed"} for i in range(100)]
    sections["bench"]["bars"] = missed
    text = program.summary("Test GPU", parts.Results(tmp_path, "Test GPU"), sections, names, ["report"])
    assert len(text.splitlines()) < 60
    for said in ("10 passed; 2 failed", "test_kernels::test_a", "check 0: differs", "... and 196 more",
                 "absent: compute-sanitizer", "bars missed: 100", "missed  bar 0: 0.1, wanted 0.65", "more missed bars",
                 "no time  report"):  # fmt: skip
        assert said in text, (said, text)


# -------------------------------------------------------------------------------------------------------- rows


def make_bench(timer=None, **limits: float) -> bench.Bench:
    return bench.Bench(timer or FakeTimer(), limits, cache_bytes=4096, device="cpu")


SHAPE = (128, 256)


@pytest.mark.turns(4)
@pytest.mark.parametrize("contender", contenders.all_formats(), ids=lambda c: c.name)
def test_every_format_is_right_and_is_timed(contender) -> None:
    timer = FakeTimer()
    row = make_bench(timer, copy_gb_s=1000.0).row(bench.Case(contender, SHAPE, 3))
    assert "failed" not in row and "refused" not in row, row
    assert timer.timed == 1 and row["us_graph"] == 10 and row["us_alone"] == 20
    read = row["nbytes"] + 3 * 256 * 2
    assert row["gb_s"] == pytest.approx(read / 10e-6 / 1e9, rel=1e-3)
    assert row["bandwidth_share"] == pytest.approx(row["gb_s"] / 1000, abs=1e-4)
    assert row["tflop_s"] == pytest.approx(2 * 3 * 128 * 256 / 10e-6 / 1e12, rel=1e-3)
    assert "peak_share" not in row  # that limit was not measured


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_dense_peer_is_timed(dtype) -> None:
    row = make_bench(fp16_tflop_s=1.0, bf16_tflop_s=2.0).row(bench.Case(peers.dense(dtype), SHAPE, 5))
    assert row["us_graph"] == 10 and row["nbytes"] == 2 * 128 * 256
    assert row["peak_share"] == pytest.approx(row["tflop_s"] / {"fp16": 1, "bf16": 2}[dtype], abs=1e-4)


def spoiled(contender: Candidate, spoil) -> Candidate:
    """The contender with a kernel whose result is spoiled."""

    def prepare(n, k, device):
        one = contender.prepare(n, k, device)
        call = one.call
        one.call = lambda w, x: spoil(call(w, x))
        return one

    return replace(contender, prepare=prepare)


def one_wrong_column(y):
    y = y.clone()
    y[:, 5] = 0
    return y


def wrong_last_row(y):
    y = y.clone()
    y[-1] = y[0]
    return y


def one_nan(y):
    y = y.clone()
    y[40, 0] = torch.nan  # in a row that is not compared
    return y


SPOILED = [one_wrong_column, wrong_last_row, one_nan, lambda y: y * 1.001, lambda y: y.roll(1, 1)]


@pytest.mark.parametrize("spoil", SPOILED)
@pytest.mark.parametrize("contender", [contenders.packed(4, 128, "fp16"), contenders.codebook(3, "row", "fp16")])
def test_a_wrong_result_is_refused_before_it_is_timed(contender, spoil) -> None:
    timer = FakeTimer()
    row = make_bench(timer).row(bench.Case(spoiled(contender, spoil), SHAPE, 67))
    assert timer.timed == 0 and "us_graph" not in row and "us_alone" not in row
    assert row["refused"].startswith("wrong: relative error")
    problems = bench.summarised([row], [], False)["problems"]
    assert len(problems) == 1 and contender.name in problems[0]


def test_a_wrong_copy_of_the_weight_is_refused_too() -> None:
    good = contenders.packed(4, 128, "fp16")

    class Weight:
        """Right itself, wrong in every copy."""

        def __init__(self, layer, wrong=False):
            self.layer, self.wrong = layer, wrong

        def __deepcopy__(self, memo):
            return Weight(self.layer, True)

    def prepare(n, k, device):
        one = good.prepare(n, k, device)
        one.weight = Weight(one.weight)
        one.call = lambda w, x: w.layer(x) * (2 if w.wrong else 1)
        return one

    row = make_bench().row(bench.Case(replace(good, prepare=prepare), SHAPE, 1))
    assert "refused" in row


def test_weights_rotate_through_more_than_three_times_the_cache() -> None:
    seen = []

    class Timer(FakeTimer):
        def in_graph(self, calls) -> float:
            seen.append(len(calls))
            return super().in_graph(calls)

    one = make_bench(Timer())
    one.cache_bytes = 1 << 16
    row = one.row(bench.Case(contenders.packed(2, None, "fp16"), SHAPE, 1))
    assert seen[0] * row["nbytes"] > 3 * one.cache_bytes and "cached" not in row
    one.cache_bytes = 1 << 30
    one._prepared = None
    row = one.row(bench.Case(contenders.packed(2, None, "fp16"), (8, 32), 1))
    assert seen[1] == bench.MAX_COPIES and row["cached"] is True


def test_a_contender_that_fails_is_named_and_the_others_are_timed() -> None:
    def prepare(n, k, device):
        raise ModuleNotFoundError("No module named 'gemlite'")

    broken = replace(peers.gemlite(4), prepare=prepare)
    todo = [bench.Case(c, SHAPE, 1) for c in (broken, peers.dense("fp16"))]
    rows = []
    left, lost = bench.measure(make_bench(), todo, parts.Budget(100), rows.append)
    assert not left and not lost
    assert rows[0]["failed"] == "ModuleNotFoundError: No module named 'gemlite'" and rows[1]["us_graph"]


class NoCapture(FakeTimer):
    def in_graph(self, calls) -> float:
        raise RuntimeError("operation not permitted when stream is capturing")


def test_only_a_peer_may_be_timed_without_a_graph() -> None:
    peer = make_bench(NoCapture()).row(bench.Case(peers.dense("fp16"), SHAPE, 1))
    assert peer["us_alone"] == 20 and "us_graph" not in peer and "cannot be captured" in peer["graph"]
    ours = make_bench(NoCapture()).row(bench.Case(contenders.packed(4, 128, "fp16"), SHAPE, 1))
    assert "capturing" in ours["failed"] and "us_alone" not in ours


def test_measuring_stops_at_the_budget_and_says_what_is_left() -> None:
    clock, rows = Clock(), []
    todo = [bench.Case(peers.dense("fp16"), SHAPE, m) for m in (1, 2, 3, 4)]

    def record(row):
        rows.append(row)
        clock.now += 5

    left, lost = bench.measure(make_bench(), todo, parts.Budget(12, clock), record)
    assert [row["m"] for row in rows] == [1, 2] and left == todo[2:] and not lost
    section = bench.summarised(rows, left, lost)
    assert section["left_out"] == ["torch fp16 128x256 M=3", "torch fp16 128x256 M=4"]


def test_a_lost_device_ends_the_measuring_at_once(monkeypatch) -> None:
    def prepare(n, k, device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(bench, "lost", lambda device: True)
    rows = []
    todo = [bench.Case(replace(peers.dense("fp16"), prepare=prepare), SHAPE, m) for m in (1, 2)]
    left, lost = bench.measure(make_bench(), todo, parts.Budget(100), rows.append)
    assert lost and len(rows) == 1 and left == todo[1:]
    assert bench.summarised(rows, left, lost)["device_lost"] is True


def test_rows_of_the_same_sources_are_kept_and_others_measured_again(monkeypatch) -> None:
    case = bench.Case(peers.dense("fp16"), (8192, 8192), 1)
    row = {"name": "torch fp16", "shape": "8192x8192", "m": 1, "us_graph": 3.0}
    gone = {**row, "name": "a format that no longer exists"}
    section = {"sources": parts.sources(), "rows": [row, gone]}
    assert bench.earlier(section, [case]) == {case.key: row}
    assert bench.earlier({**section, "sources": "others"}, [case]) == {}
    assert bench.earlier({}, [case]) == {}
    monkeypatch.setattr(parts, "ROOT", Path(parts.ROOT) / "benchmarks")  # other files: another hash
    assert parts.sources() != section["sources"]


def test_rows_are_written_now_and_then_and_at_once_when_one_failed() -> None:
    clock, written, said = Clock(), [], []
    recorder = bench.Recorder({}, lambda section: written.append(len(section["rows"])), clock, said.append)
    recorder(row(us=3.0))
    assert written == []
    clock.now += bench.FLUSH_SECONDS + 1
    recorder(row(us=3.0, m=16))
    assert written == [2]
    recorder({**untimed(row(m=64)), "failed": "RuntimeError: no"})
    assert written == [2, 3] and "RuntimeError: no" in said[-1] and len(said) == 3


def test_the_cases_cover_everything_once_and_the_bars_first() -> None:
    all_contenders = [*peers.all_peers(), *contenders.all_formats()]
    cases = bench.cases(all_contenders)
    keys = [case.key for case in cases]
    assert len(set(keys)) == len(keys)
    fitting = [(c, s) for s in bench.SHAPES for c in all_contenders if c.fits(*s)]
    assert len(keys) == len(fitting) * len(bench.MS)
    names = [key[0] for key in keys[:14]]
    assert {"torch fp16", "lowbit 4-bit g128 fp16", "lowbit 8-bit g128 fp16"} <= set(names)
    # every row that a bar asks for comes before any that none does
    needed = {("lowbit 4-bit g128 fp16", "8192x8192", 1), ("lowbit 8-bit g128 fp16", "8192x8192", 4096),
              ("lowbit 4-bit codebook nf4 fp16", "8192x8192", 1), ("lowbit kron 64x64 bf16", "4096x4096", 4096),
              ("torch bf16", "4096x4096", 4096), ("GemLite 4-bit g128 fp16", "8192x8192", 1)}  # fmt: skip
    first_other = next(i for i, key in enumerate(keys) if key[1:] == ("4096x4096", 16))
    assert all(keys.index(key) < first_other for key in needed)


def test_the_formats_are_those_that_were_asked_for() -> None:
    found = {(c.family, c.bits, c.scheme, c.dtype, c.int8) for c in contenders.all_formats()}
    for bits in range(2, 9):
        for scheme in ("g128", "row"):
            assert {("packed", bits, scheme, dtype, False) for dtype in ("fp16", "bf16")} <= found
    assert {("packed", bits, "g128", "fp16", True) for bits in (4, 8)} <= found
    assert {("codebook", bits, scheme, "fp16", False) for bits in (2, 3, 4, 8) for scheme in ("row", "tensor")} <= found
    assert {("codebook", 4, "nf4", "fp16", False), ("kron", None, "64x64", "fp16", False)} <= found
    assert {("kron", None, scheme, "bf16", False) for scheme in ("2x1", "1x2", "64x64")} <= found


def test_absent_peers_are_named() -> None:
    def load(name):
        if name != "torchao":
            raise ModuleNotFoundError(f"No module named {name!r}")

    found = peers.absent(load)
    assert set(found) == {"gemlite", "bitsandbytes"}
    assert found["gemlite"] == "gemlite cannot be imported: ModuleNotFoundError: No module named 'gemlite'"
    assert set(peers.PACKAGES) <= {peer.family for peer in peers.all_peers()}


# -------------------------------------------------------------------------------------------------------- bars


def row(us: float = 10.0, shape: str = "8192x8192", m: int = 1, **facts) -> dict:
    given = {"family": "packed", "bits": 4, "scheme": "g128", "dtype": "fp16", "int8": False, **facts}
    name = " ".join(str(given[key]) for key in ("family", "bits", "scheme", "dtype", "int8"))
    return {"name": name, "shape": shape, "m": m, "us_graph": us, "us_alone": 2 * us, **given}


def untimed(row: dict) -> dict:
    return {key: value for key, value in row.items() if not key.startswith("us_")}


def verdict_of(rows, text: str) -> dict:
    [found] = [bar for bar in bars.judged(rows) if text in bar["bar"]]
    return found


@pytest.mark.parametrize(("share", "verdict"), [(0.66, "met"), (0.65, "met"), (0.6499, "missed")])
def test_bandwidth_at_4_and_8_bits(share, verdict) -> None:
    for bits in (4, 8):
        found = verdict_of([{**row(bits=bits), "bandwidth_share": share}], f"packed {bits}-bit g128, 8192x8192, M=1")
        assert (found["verdict"], found["wanted"]) == (verdict, 0.65)


@pytest.mark.parametrize(("share", "verdict"), [(0.51, "met"), (0.4999, "missed")])
@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7])
def test_bandwidth_at_other_bits(bits, share, verdict) -> None:
    rows = [{**row(bits=bits, scheme="row"), "bandwidth_share": share}]
    found = verdict_of(rows, f"packed {bits}-bit row, 8192x8192, M=1")
    assert (found["verdict"], found["wanted"]) == (verdict, 0.5)


@pytest.mark.parametrize(("us", "verdict"), [(16.6, "met"), (16.8, "missed")])
def test_codebook_against_packed(us, verdict) -> None:
    rows = [row(10.0, scheme="row", bits=3), row(us, family="codebook", scheme="row", bits=3)]
    assert verdict_of(rows, "codebook 3-bit row")["verdict"] == verdict
    rows = [row(10.0, scheme="g128", bits=4), row(us, family="codebook", scheme="nf4", bits=4)]
    assert verdict_of(rows, "codebook 4-bit nf4")["verdict"] == verdict


@pytest.mark.parametrize(("us", "verdict"), [(117.0, "met"), (118.0, "missed")])
def test_many_rows_against_dense(us, verdict) -> None:
    rows = [row(100.0, m=4096, family="dense", bits=16, scheme=""), row(us, m=4096)]
    assert verdict_of(rows, "packed 4-bit g128, 8192x8192, M=4096: speed against dense")["verdict"] == verdict


@pytest.mark.parametrize(("us", "verdict"), [(20.0, "met"), (20.1, "missed")])
def test_kron_against_dense_of_its_own_dtype(us, verdict) -> None:
    at = {"shape": "4096x4096", "m": 4096, "dtype": "bf16"}
    dense = row(100.0, family="dense", bits=16, scheme="", **at)
    rows = [dense, row(us, family="kron", bits=None, scheme="64x64", **at)]
    assert verdict_of(rows, "kron 64x64 bf16")["verdict"] == verdict
    assert verdict_of(rows, "kron 64x64 fp16")["verdict"] == "not measured"


@pytest.mark.parametrize(("us", "verdict"), [(10.0, "met"), (10.1, "missed")])
def test_peer(us, verdict) -> None:
    rows = [row(10.0, family="gemlite", m=64), row(us, m=64)]
    assert verdict_of(rows, "against GemLite")["verdict"] == verdict


def test_what_was_not_measured_is_not_met() -> None:
    assert {bar["verdict"] for bar in bars.judged([])} == {"not measured"}
    wrong = {**untimed(row()), "bandwidth_share": 0.9, "refused": "wrong: relative error 1"}
    assert bars.counts(bars.judged([wrong]))["met"] == 0
    int8 = {**row(int8=True), "bandwidth_share": 0.9}  # another format: it does not stand for float activations
    assert bars.counts(bars.judged([int8]))["met"] == 0


# ----------------------------------------------------------------------------------------- tests, checks, sanitizer

JUNIT = """<testsuites><testsuite name="pytest" tests="4">
<testcase classname="tests.packed.test_kernels" name="test_good" time="0.1"/>
<testcase classname="tests.packed.test_kernels" name="test_bad[4]"><failure message="assert 1 == 2"/></testcase>
<testcase classname="" name="tests.kron.test_op"><error message="collection failure">no module</error></testcase>
<testcase classname="tests.packed.test_op" name="test_off"><skipped message="no"/></testcase>
</testsuite></testsuites>"""


def test_outcomes_are_counted_and_failures_named(tmp_path) -> None:
    file = tmp_path / "junit.xml"
    file.write_text(JUNIT)
    counted = check.count_tests(file)
    assert {what: counted[what] for what in ("passed", "failed", "errors", "skipped")} == {
        "passed": 1, "failed": 1, "errors": 1, "skipped": 1
    }  # fmt: skip
    assert counted["failures"] == ["tests.packed.test_kernels::test_bad[4]", "::tests.kron.test_op"]
    assert check.run_problems(counted, 1, "") == ["1 failed", "1 errors"]


@pytest.mark.parametrize(
    ("counted", "code", "problem"),
    [
        ({"passed": 5, "failed": 0, "errors": 0, "skipped": 1}, 0, None),
        ({"passed": 5, "failed": 0, "errors": 0, "skipped": 1}, None, None),  # out of time is no failure
        ({"passed": 5, "failed": 0, "errors": 0, "skipped": 1}, 1, "status 1"),
        ({"passed": 0, "failed": 0, "errors": 0, "skipped": 9}, 0, "no test passed"),
        ({}, 4, "status 4"),
        ({}, None, "no report"),
    ],
)
def test_a_test_run_that_proves_nothing_is_a_problem(counted, code, problem) -> None:
    problems = check.run_problems(counted, code, "usage: pytest")
    assert (not problems) if problem is None else (problem in problems[0])


def test_the_test_command_runs_and_its_failures_arrive(tmp_path) -> None:
    bad = tmp_path / "test_two.py"
    bad.write_text("def test_one(): pass\ndef test_two(): assert 0\n")
    broken = tmp_path / "test_import.py"
    broken.write_text("import no_such_module\n")
    file = tmp_path / "junit.xml"
    command = [part for part in check.pytest_command(file, parallel=False) if f"{parts.ROOT}/tests/" not in part]
    finished = parts.execute([*command, f"--rootdir={tmp_path}", str(broken), str(bad)], 120)
    counted = check.count_tests(file)
    assert finished.code == 1 and (counted["passed"], counted["failed"], counted["errors"]) == (1, 1, 1), finished.tail


def test_the_test_command_names_the_kernel_tests() -> None:
    command = " ".join(check.pytest_command(Path("x"), parallel=True))
    for name in ("packed/test_kernels.py", "kron/test_kernels.py", "test_families.py", "test_gpu_check.py", "-n 8"):
        assert name in command
    assert "-n 8" not in " ".join(check.pytest_command(Path("x"), parallel=False))


def test_every_op_of_every_family_is_opchecked() -> None:
    calls = list(check.op_calls("meta"))
    ops = {str(op) for _, op, _, _ in calls}
    assert ops == {
        f"lowbit.{family}_{what}.default"
        for family in ("packed", "codebook", "kron") for what in ("linear", "dequantize", "embedding")
    }  # fmt: skip
    for _, _, args, kwargs in calls:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        assert all(tensor.device.type == "meta" for tensor in tensors)


def test_differences_are_seen_bit_for_bit() -> None:
    y = torch.randn(3, 4).half()
    assert check.difference(y.clone(), y) is None
    assert check.difference(torch.full((2,), torch.nan), torch.full((2,), torch.nan)) is None
    other = y.clone()
    other[1, 2] = torch.nextafter(other[1, 2].float(), torch.tensor(9.0)).half() + 2**-8
    assert check.difference(other, y).startswith("1 of 12 elements differ")
    assert check.difference(torch.zeros(1), -torch.zeros(1)) is not None
    assert "instead of" in check.difference(y.float(), y) and "instead of" in check.difference(y[:2], y)
    assert check.compared(iter([("M=1", y, y), ("M=3", other, y)]))[0].startswith("M=3: 1 of 12")


class Recorded:
    """Stands for a CUDA graph: replaying it makes the calls again and writes where they had written."""

    stale = False

    def __init__(self, calls) -> None:
        self.calls = calls
        for call in calls:
            call()

    def replay(self) -> None:
        for call in self.calls:
            outputs = call.__defaults__[1]
            call()
            if not self.stale:
                outputs[-2].copy_(outputs[-1])
            outputs.pop()


class Streamless:
    """torch.cuda where everything runs at once, in order."""

    def __init__(self, monkeypatch) -> None:
        monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


class Forgetful(torch.nn.Module):
    """A layer that is right the first time only: its scratch memory is shared between calls."""

    in_features, device, dtype = 8, "cpu", torch.float32

    def __init__(self, right: int) -> None:
        super().__init__()
        self.right, self.calls = right, 0

    def forward(self, x):
        self.calls += 1
        return x * 2 if self.calls <= self.right else x * 2 + 1


def test_a_replay_that_differs_is_a_problem(monkeypatch) -> None:
    monkeypatch.setattr(timing, "capture", Recorded)
    layer = Forgetful(1000)
    assert check.replay(layer) == []
    monkeypatch.setattr(Recorded, "stale", True)  # a graph that does not write its output
    problems = check.replay(layer)
    assert len(problems) == 3 * len(check.ROWS) and "elements differ" in problems[0]
    monkeypatch.setattr(Recorded, "stale", False)
    assert check.replay(Forgetful(20))


def test_streams_that_disturb_each_other_are_a_problem(monkeypatch) -> None:
    Streamless(monkeypatch)
    assert check.streams(Forgetful(10000)) == []
    assert "stream" in check.streams(Forgetful(30))[0]


def test_compiled_layers_that_differ_are_a_problem(monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda layer, fullgraph, dynamic: layer)
    assert check.compiled(Forgetful(1000)) == []
    monkeypatch.setattr(torch, "compile", lambda layer, fullgraph, dynamic: lambda x: layer(x).add_(1e-6))
    assert len(check.compiled(Forgetful(1000))) == len(check.ROWS)


def test_kernels_that_are_compiled_late_are_a_problem(monkeypatch) -> None:
    count = [0]
    monkeypatch.setattr(check, "counting_compilations", lambda: contextlib.nullcontext(count))
    monkeypatch.setattr(check, "sees_compilations", lambda: True)

    class Specialised(Forgetful):
        def forward(self, x):
            count[0] += len(x) % 16 == 0  # as a kernel that is compiled again for multiples of 16
            return x

    monkeypatch.setattr(lowbit, "warmup", lambda layer, max_m: count.__setitem__(0, 5), raising=False)
    assert check.no_compilation(Forgetful(1000)) == []
    assert check.no_compilation(Specialised(0)) == ["18 kernels were compiled after warmup, for M up to 300"]
    monkeypatch.setattr(check, "sees_compilations", lambda: False)
    assert "nothing can be said" in check.no_compilation(Forgetful(1000))[0]
    monkeypatch.delattr(lowbit, "warmup")
    assert check.no_compilation(Forgetful(1000)) == ["lowbit.warmup does not exist"]


def test_synchronisation_must_be_noticed(monkeypatch) -> None:
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch, "ones", lambda *_, device: torch.zeros(1))  # .item() that nobody objects to
    with pytest.raises(RuntimeError, match="does not notice"), check.refusing_synchronisation():
        pass
    assert modes == ["error", "default"]


def test_limits_that_cannot_be_measured_are_named(monkeypatch) -> None:
    def refuse(timer):
        raise RuntimeError("no such matrix product")

    monkeypatch.setattr(limits, "LIMITS", {"copy_gb_s": lambda timer: 4321.98, "int8_top_s": refuse})
    assert limits.measured(FakeTimer()) == ({"copy_gb_s": 4322.0}, ["int8_top_s: RuntimeError: no such matrix product"])


def test_a_check_that_raises_is_a_problem() -> None:
    def check_that_raises(layer):
        raise RuntimeError("called a synchronizing CUDA operation")

    [problem] = check.attempt(check_that_raises, torch.nn.Identity())
    assert "synchronizing" in problem and "test_gpu_check.py" in problem


def test_the_layers_of_the_checks_can_be_made_and_called() -> None:
    for name, layer in check.some_layers("cpu").items():
        y = layer(check.inputs(layer, 3))
        assert y.shape == (3, 384) and y.dtype == layer.dtype and bool(y.isfinite().all()), name


def said_by(text: str, code: int | None = 0) -> parts.Finished:
    return parts.Finished(code, text)


CLEAN = said_by("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n")
RACE = said_by("========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n", 9)
BUG = said_by("========= Invalid __global__ write of size 4 bytes\n========= ERROR SUMMARY: 1 error\n", 9)
REFUSED = said_by("========= Error: Target application could not be started\n", 1)


@pytest.mark.parametrize(
    ("finished", "expected", "outcome", "as_expected"),
    [
        (CLEAN, "clean", "clean", True),
        (CLEAN, "bug", "clean", False),
        (BUG, "bug", "found", True),
        (BUG, "clean", "found", False),
        (RACE, "clean", "found", False),
        (REFUSED, "bug", "not run", None),
        (REFUSED, "clean", "not run", None),
        (said_by("", None), "clean", "not run", None),
        (None, "bug", "not run", None),
    ],
)
def test_verdicts_of_the_sanitizer(finished, expected, outcome, as_expected) -> None:
    found = sanitizer.verdict(finished, "no nvcc", expected=expected)
    assert (found["outcome"], found["as_expected"]) == (outcome, as_expected)
    assert found["as_expected"] is True or found["detail"]


def sanitized(answers, tools=("compute-sanitizer", "nvcc")) -> parts.Section:
    """The section where ``answers(command)`` stands for running it."""

    def execute(command, seconds, **_):
        return answers([str(part) for part in command])

    def which(name):
        return f"/bin/{name}" if name in tools else None

    return sanitizer.checked(parts.Budget(100), execute, which)


def good_machine(command: list[str]) -> parts.Finished:
    if "compute-sanitizer" not in command[0]:
        return said_by("")
    return BUG if command[-2].endswith("planted") else CLEAN


def test_a_clean_run_of_the_sanitizer() -> None:
    section = sanitized(good_machine)
    assert set(section["tools"]) == set(sanitizer.TOOLS)
    assert section["problems"] == [] and section["left_out"] == []


def test_an_error_in_our_kernels_is_a_problem() -> None:
    def answers(command):
        ours = "--tool=racecheck" in command and command[-1] == "benchmarks.gpu.sanitizer"
        return RACE if ours else good_machine(command)

    assert sanitized(answers)["problems"] == ["racecheck: 2 errors in this package's kernels"]


def test_a_tool_that_misses_the_planted_bug_is_a_problem() -> None:
    def answers(command):
        return CLEAN if command[-1] == "initcheck" else good_machine(command)

    [problem] = sanitized(answers)["problems"]
    assert problem.startswith("initcheck does not see the planted bug")


def test_what_is_missing_for_the_sanitizer_is_said() -> None:
    assert sanitized(good_machine, tools=())["absent"] == ["compute-sanitizer"]
    section = sanitized(good_machine, tools=("compute-sanitizer",))
    assert section["tools"]["memcheck"]["planted"]["detail"].startswith("no nvcc here")
    assert section["left_out"] == [f"{tool} on planted" for tool in sanitizer.TOOLS]
    refused = sanitized(lambda command: REFUSED if "sanitizer" in command[0] else said_by(""))
    assert len(refused["left_out"]) == 8 and refused["problems"] == []
    broken = sanitized(lambda command: said_by("illegal memory access", 1))
    assert "do not run even without a tool" in broken["problems"][0]


def test_the_planted_program_has_a_bug_for_every_tool() -> None:
    source = sanitizer.SOURCE.read_text()
    assert all(f'"{tool}"' in source for tool in sanitizer.TOOLS)


def test_the_program_under_the_tools_has_every_family_and_width() -> None:
    layers = dict(sanitizer.small_layers())
    assert {layer.family for layer in layers.values()} == {"packed", "codebook", "kron"}
    assert {layer.format.bits for layer in layers.values() if layer.family == "packed"} == set(range(2, 9))
    for layer in layers.values():
        assert bool(layer(torch.ones(2, 132, dtype=layer.dtype)).isfinite().all())


# ------------------------------------------------------------------------------------------------------ report


def written(folder: Path, sections, document: str = "# Performance\n") -> str:
    results = parts.Results(folder, "NVIDIA H200")
    for name, section in sections.items():
        results.write(name, section)
    path = folder / "performance.md"
    if not path.exists():
        path.write_text(document)
    report.write(path, report.devices(folder))
    return path.read_text()


def test_the_report_shows_rows_bars_checks_and_what_is_absent(tmp_path) -> None:
    sections = full_sections()
    sections["machine"] |= {"date": "2026-01-01", "commit": "abc", "versions": {"torch": "2.11"}, "nvidia_smi": {}}
    rows = [
        {**row(10.0), "bandwidth_share": 0.66}, row(20.0, family="dense", bits=16, scheme=""),
        row(400.0, m=4096, family="dense", bits=16, scheme=""), row(800.0, m=4096),
    ]  # fmt: skip
    bad = {**untimed(row(family="codebook")), "refused": "wrong: relative error 1"}
    sections["bench"] = {
        "rows": [*rows, bad], "bars": bars.judged(rows), "absent": {"gemlite": "no"}, "left_out": ["a", "b"],
        "backend": "triton", "status": "failed",
    }  # fmt: skip
    text = written(tmp_path, sections)
    for said in ("### NVIDIA H200", "torch 2.11", "copy inside the device, read + write, GB/s | 4000",
                 "| packed 4 g128 fp16 False | 10 (2×) | 800 (0.5×) | 66 % |",
                 "| packed 4-bit g128, 8192x8192, M=1: share of copy bandwidth | 0.65 | 0.66 | met |",
                 "M=4096: speed against dense fp16 | 0.85 | 0.5 | missed |", "Absent peers: gemlite",
                 "2 rows", "Not timed: codebook 4 g128 fp16 False (wrong: relative error 1)",
                 "| tests | failed | 10 passed; 2 failed; 0 errors; 1 skipped |"):  # fmt: skip
        assert said in text, (said, text)


def test_the_report_replaces_only_what_is_between_the_markers(tmp_path) -> None:
    before = f"# Performance\n\nOne.\n\n{report.BEGIN}\nold\n{report.END}\n\n## Tried\n\nTwo.\n"
    text = written(tmp_path, {"bench": full_sections()["bench"]}, before)
    assert text.startswith(f"# Performance\n\nOne.\n\n{report.BEGIN}\n") and text.endswith(
        f"{report.END}\n\n## Tried\n\nTwo.\n"
    )
    assert "old" not in text and "### NVIDIA H200" in text
    assert written(tmp_path, {}) == text  # again: the same


def test_without_results_the_report_says_so(tmp_path) -> None:
    text = written(tmp_path, {})
    assert text.startswith("# Performance\n") and report.NOTHING in text and text.count(report.BEGIN) == 1


def test_the_document_of_this_repository_has_the_markers() -> None:
    text = report.DOCUMENT.read_text()
    assert text.count(report.BEGIN) == 1 and text.count(report.END) == 1


def test_results_of_other_machines_are_not_a_gpu(tmp_path) -> None:
    (tmp_path / "zen4.json").write_text(json.dumps({"rows": []}))
    assert report.devices(tmp_path) == []


def test_an_error_with_nan_is_infinite() -> None:
    one = contenders.packed(4, 128, "fp16").prepare(8, 128, "cpu")
    x = torch.randn(2, 128).half()
    assert one.error(x, one.call(one.weight, x)) < 1e-3
    assert one.error(x, torch.full((2, 8), torch.nan)) == math.inf
