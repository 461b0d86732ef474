"""Part ``bench``: the time of ``y = x @ W.T`` for every format, width and number of rows, beside peers.

The most important rows come first; a run ends cleanly when its time is over and says what is left, and the next one of
the same sources goes on from there. A candidate whose result is wrong is not timed.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness.bars import Row
from benchmarks.harness.candidate import DTYPES, Candidate, Prepared
from benchmarks.harness.clock import CudaClock, GpuClock
from benchmarks.harness.cuda_limits import measured
from lowbit.backends import registry

from . import bars
from .formats import all_formats, fallback
from .parts import Budget, Context, Section, execute, sources, stamp
from .peers import absent, all_peers

Shape = tuple[int, int]

SQUARE = (8192, 8192)
SHAPES: tuple[Shape, ...] = (SQUARE, (4096, 4096), (4096, 11008), (11008, 4096))  # N, K
MS = (1, 16, 64, 256, 4096)

MAX_COPIES = 64
SECONDS_OF_A_ROW = 3.0
FLUSH_SECONDS = 5.0
COMPILE_SHARE, COMPILERS = 0.35, 12


@dataclass(frozen=True)
class Case:
    """One row to measure."""

    candidate: Candidate
    shape: Shape
    m: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.candidate.name, shape_name(self.shape), self.m


def shape_name(shape: Shape) -> str:
    return f"{shape[0]}x{shape[1]}"


def cases(candidates: Sequence[Candidate], shapes: Sequence[Shape] = SHAPES, ms: Sequence[int] = MS) -> list[Case]:
    """Every row once, what the bars ask for first; rows of one candidate and shape stay together inside a stage."""

    def stage(keep: Callable[[Candidate], bool], at: Iterable[Shape], rows: Iterable[int]) -> Iterator[Case]:
        for shape, candidate in itertools.product(at, candidates):
            if keep(candidate) and candidate.fits(*shape):
                yield from (Case(candidate, shape, m) for m in rows)

    def leading(candidate: Candidate) -> bool:
        return candidate.dtype == "fp16" and not candidate.int8 and candidate.family != "kron"

    def factors(candidate: Candidate) -> bool:
        return candidate.family in ("kron", "dense")

    first, rest = [m for m in ms if m in (1, 4096)], [m for m in ms if m not in (1, 4096)]
    square = [shape for shape in shapes if shape == SQUARE]
    stages = [
        stage(leading, square, first),
        stage(factors, [shape for shape in shapes if shape == (4096, 4096)], first),
        stage(leading, square, rest),
        stage(lambda _: True, square, ms),
        stage(lambda _: True, shapes, ms),
    ]
    return list({case.key: case for case in itertools.chain(*stages)}.values())


class Bench:
    """Measures rows on one device.

    Args:
        timer: the clock.
        limits: of this device: ``copy_gb_s``, ``fp16_tflop_s``, ``bf16_tflop_s`` (see ``cuda_limits.py``).
        cache_bytes: of its last-level cache: weights rotate through three times as many.
    """

    def __init__(self, timer: GpuClock, limits: dict[str, float], cache_bytes: int, device: str = "cuda") -> None:
        self.timer, self.limits, self.cache_bytes, self.device = timer, limits, cache_bytes, device
        self._prepared: tuple[tuple[str, Shape], Prepared, list[Any]] | None = None

    def row(self, case: Case) -> Row:
        """The row of one case: its figures, or why there are none."""
        row = {"shape": shape_name(case.shape), "m": case.m, "name": case.candidate.name, **case.candidate.facts}
        try:
            prepared, weights = self.prepared(case.candidate, case.shape)
            return row | self._figures(case, prepared, weights)
        except Exception as error:  # a peer or a format that fails must not cost the others
            return row | {"failed": f"{type(error).__name__}: {str(error)[:300]}"}

    def prepared(self, candidate: Candidate, shape: Shape) -> tuple[Prepared, list[Any]]:
        """The candidate's weight and its copies, kept until another one is asked for."""
        key = (candidate.name, shape)
        if self._prepared is None or self._prepared[0] != key:
            self._prepared = None
            release(self.device)
            torch.manual_seed(sum(shape))
            one = candidate.prepare(*shape, self.device)
            count = min(MAX_COPIES, math.ceil(3 * self.cache_bytes / one.nbytes) + 1)
            self._prepared = key, one, one.copies(count)
        return self._prepared[1], self._prepared[2]

    def _figures(self, case: Case, one: Prepared, weights: list[Any]) -> Row:
        k = case.shape[1]
        generator = torch.Generator(self.device).manual_seed(case.m)
        x = torch.randn(case.m, k, generator=generator, device=self.device).to(DTYPES[case.candidate.dtype])
        error = max(one.error(x, one.call(w, x)) for w in (weights[0], weights[-1]))
        row: Row = {"error": significant(error) if math.isfinite(error) else None}
        if error > one.tolerance:
            return row | {"refused": f"wrong: relative error {error:.1e}, allowed {one.tolerance:.1e}"}
        calls = [lambda w=w: one.call(w, x) for w in weights]
        try:
            row["us_graph"] = significant(self.timer.in_graph(calls))
        except RuntimeError as failure:  # of peers that cannot be captured: do_bench still times them
            if case.candidate.family in bars.OWN:
                raise
            row["graph"] = f"cannot be captured: {str(failure)[:200]}"
        row["us_alone"] = significant(self.timer.alone(calls[0]))
        return row | self._rates(case, one, x, row.get("us_graph", row["us_alone"]), len(weights))

    def _rates(self, case: Case, one: Prepared, x: torch.Tensor, us: float, copies: int) -> Row:
        n, k = case.shape
        read = one.nbytes + x.numel() * x.element_size()
        gb_s, tflop_s = read / us / 1e3, 2 * case.m * n * k / us / 1e6
        row: Row = {"nbytes": one.nbytes, "gb_s": significant(gb_s), "tflop_s": significant(tflop_s)}
        if copies * one.nbytes < 3 * self.cache_bytes:
            row["cached"] = True  # so small that the weights stay in the cache, however many copies
        for name, rate, limit in (
            ("bandwidth_share", gb_s, "copy_gb_s"), ("peak_share", tflop_s, f"{case.candidate.dtype}_tflop_s"),
        ):  # fmt: skip
            if self.limits.get(limit):
                row[name] = round(rate / self.limits[limit], 4)
        return row


def significant(value: float) -> float:
    return float(f"{value:.4g}")


def release(device: str) -> None:
    """Give back what the last candidate used."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def lost(device: str = "cuda") -> bool:
    """Whether an earlier error has made the device useless to this process."""
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def measure(
    bench: Bench, todo: Sequence[Case], budget: Budget, record: Callable[[Row], None]
) -> tuple[list[Case], bool]:
    """Rows of ``todo`` in order, as far as the budget goes; returns what is left, and whether the device was lost."""
    for i, case in enumerate(todo):
        if budget.left() < SECONDS_OF_A_ROW:
            return list(todo[i:]), False
        row = bench.row(case)
        record(row)
        if "failed" in row and lost(bench.device):
            return list(todo[i + 1 :]), True
    return [], False


# ----------------------------------------------------------------------------------------- the part on a GPU


@torch.no_grad()
def run(context: Context) -> Section:
    """The section of part ``bench``: rows, bars, absent peers, and what is left out."""
    missing = absent()
    candidates = [*all_peers()[:2], *all_formats(), *all_peers()[2:]]
    wanted = cases([candidate for candidate in candidates if candidate.family not in missing])
    rows = {} if context.fresh else earlier(context.results.section("bench"), wanted)
    todo = [case for case in wanted if case.key not in rows]
    limits = context.machine.get("limits") or measured(CudaClock())[0]
    head = {
        **stamp(), "sources": sources(), "backend": registry.active_backend("cuda"), "limits": limits,
        "absent": missing,
    }  # fmt: skip
    recorder = Recorder(rows, lambda section: context.results.write("bench", head | section))
    if any(case.candidate.family in bars.OWN for case in todo):
        compile_ahead(context.budget)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    bench = Bench(CudaClock(), limits, getattr(properties, "L2_cache_size", 0) or 64 << 20)
    left, device_lost = measure(bench, todo, context.budget, recorder)
    section = head | summarised(list(rows.values()), left, device_lost)
    return section | {"problems": [*fallback(), *section["problems"]]}


def summarised(rows: list[Row], left: Sequence[Case], device_lost: bool) -> Section:
    """The section that these rows make, bars judged."""
    ours = [row for row in rows if row["family"] in bars.OWN]
    problems = [f"{title(row)}: {row[what]}" for row in ours for what in ("refused", "failed") if what in row]
    section: Section = {
        "problems": problems,
        "left_out": [f"{name} {shape} M={m}" for name, shape, m in (case.key for case in left)],
        "bars": bars.judged(rows),
        "rows": rows,
    }
    return section | ({"device_lost": True} if device_lost else {})


def title(row: Row) -> str:
    return f"{row['name']} {row['shape']} M={row['m']}"


def earlier(section: Section, wanted: Iterable[Case]) -> dict[tuple[str, str, int], Row]:
    """Rows that an earlier run of the same sources has measured, by key."""
    if section.get("sources") != sources():
        return {}
    keys = {case.key for case in wanted}
    rows = {(row["name"], row["shape"], row["m"]): row for row in section.get("rows", [])}
    return {key: row for key, row in rows.items() if key in keys}


class Recorder:
    """Takes rows as they come, says each, and writes them out now and then, so that a killed run keeps them."""

    def __init__(
        self, rows: dict[tuple[str, str, int], Row], write: Callable[[Section], None],
        clock: Callable[[], float] = time.monotonic, say: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        self.rows, self.write, self.clock, self.say = rows, write, clock, say
        self.last = clock()

    def __call__(self, row: Row) -> None:
        self.rows[row["name"], row["shape"], row["m"]] = row
        figures = row.get("us_graph", row.get("us_alone"))
        self.say(f"  {title(row)}: " + (f"{figures} µs" if figures else row.get("refused") or row["failed"]))
        if "failed" in row or self.clock() - self.last > FLUSH_SECONDS:
            self.last = self.clock()
            section = summarised(list(self.rows.values()), [], False)
            self.write({"status": "incomplete", **section, "left_out": ["what follows the last row"]})


# ------------------------------------------------------------------------------------- compiling beforehand


def compile_ahead(budget: Budget) -> None:
    """Fill Triton's cache on disk from several processes: compiling takes far longer than measuring."""
    seconds = budget.left() * COMPILE_SHARE
    count = max(1, min(COMPILERS, (os.cpu_count() or 2) - 2))
    print(f"  compiling in {count} processes, for {seconds:.0f} s at most", flush=True)
    module = [sys.executable, "-m", "benchmarks.gpu.bench", "--seconds", str(seconds)]
    with ThreadPoolExecutor(count) as pool:
        for i in range(count):
            pool.submit(execute, [*module, "--compile", f"{i}/{count}"], seconds + 5)


@torch.no_grad()
def compile_share(share: str, seconds: float) -> None:
    """Call every ``count``-th format of this package once for each of its cases."""
    i, count = map(int, share.split("/"))
    budget, bench = Budget(seconds), Bench(CudaClock(), {}, cache_bytes=0)
    for case in cases(all_formats()[i::count]):
        if not budget:
            return
        try:
            one, weights = bench.prepared(case.candidate, case.shape)
            one.call(weights[0], torch.ones(case.m, case.shape[1], device="cuda", dtype=DTYPES[case.candidate.dtype]))
        except Exception as error:  # it will fail again, and be reported, where it is measured
            print(f"{case.key}: {error}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.bench", description=compile_ahead.__doc__)
    parser.add_argument("--compile", required=True, metavar="I/COUNT")
    parser.add_argument("--seconds", type=float, default=60)
    arguments = parser.parse_args()
    compile_share(arguments.compile, arguments.seconds)


if __name__ == "__main__":
    main()
