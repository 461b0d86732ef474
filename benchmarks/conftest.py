"""Options, the `measure` fixture, and the table and file of results.

`pytest benchmarks --benchmark-only` prints one table; `--results FILE` also writes it as JSON (see harness/results.py),
and `--repeat N` measures everything N times. A candidate is checked against its float64 reference first, and is never
timed when it is wrong.

With one thread the clock is the process's CPU time, which other work on the machine hardly disturbs; with
more it is wall time, and `waited` says which part of it other work took. Figures are medians, of the rounds that
nothing disturbed where there are enough. The machine's limits (harness/cpu_limits.py) are measured again every minute,
and their medians used.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import pytest
import torch

from benchmarks.harness import cpu_limits as limits
from benchmarks.harness import machine, results
from benchmarks.harness.clock import CpuClock, calls_per_round, undisturbed_median, wall_seconds

LIMITS_EVERY = 60  # seconds
MIN_ROUNDS = 3


class Session:
    """What one run of pytest collects."""

    def __init__(self) -> None:
        self.rows: list[results.Row] = []
        self.notes: list[str] = []
        self.measured: dict[int, list[limits.Limits]] = {}
        self.measured_at: dict[int, float] = {}
        self.no_limits: str | None = None

    def measure_limits(self, threads: int) -> None:
        """Unless that was done with this number of threads within the last minute."""
        if self.no_limits or time.monotonic() - self.measured_at.get(threads, -math.inf) < LIMITS_EVERY:
            return
        try:
            self.measured.setdefault(threads, []).append(machine.measured_limits(threads))
        except RuntimeError as error:
            self.no_limits = str(error)
        self.measured_at[threads] = time.monotonic()

    def limits(self) -> dict[int, limits.Limits]:
        return {threads: limits.median(measured) for threads, measured in self.measured.items() if measured}

    def content(self) -> dict[str, Any]:
        """Of the results file."""
        found: dict[str, Any] = {str(threads): limit for threads, limit in sorted(self.limits().items())}
        return {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **machine.describe(),
            "limits": {"unavailable": self.no_limits} if self.no_limits else found,
            "rows": results.with_shares(results.with_ratios(results.medians(self.rows)), self.limits()),
        }


session_key = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lowbit benchmarks")
    group.addoption("--threads", default="1,2", help="thread counts to measure with (default: 1,2)")
    group.addoption("--all-shapes", action="store_true", help="the shapes of larger models too")
    group.addoption("--full", action="store_true", help="every M, bit-width, group size and kind of activations")
    group.addoption("--seconds", type=float, default=0.2, help="time for one measurement (default: 0.2)")
    group.addoption("--repeat", type=int, default=1, help="times to measure everything, for medians (default: 1)")
    group.addoption("--results", metavar="FILE", help="write the results as JSON")


def thread_counts(config: pytest.Config) -> list[int]:
    return [int(text) for text in config.option.threads.split(",")]


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[session_key] = Session()
    config.option.benchmark_quiet = True  # one table, ours: it has the ratios and the shares of the limits


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(machine.describe())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What is repeated is repeated minutes later, when the machine may be busier or less so. Then the slowest to
    prepare varies slowest; `threads` and `m` share one prepared weight."""
    module, option = metafunc.module, metafunc.config.option

    def values(name: str, every: bool) -> list[Any]:
        return list(getattr(module, f"ALL_{name}", ()) if every else ()) or list(getattr(module, name, ()))

    parameters = {
        "shape": values("SHAPES", option.all_shapes),
        "candidate": values("CANDIDATES", option.full),
        "threads": thread_counts(metafunc.config),
        "m": values("MS", option.full),
    }
    if option.repeat > 1:
        metafunc.fixturenames.append("repeat")
        metafunc.parametrize("repeat", range(option.repeat))
    for name in parameters:
        if name in metafunc.fixturenames:
            metafunc.parametrize(
                name, parameters[name], ids=lambda v: "x".join(map(str, v)) if type(v) is tuple else str(v)
            )


@pytest.fixture(autouse=True)
def _conditions(threads: int, request: pytest.FixtureRequest) -> Any:
    request.node.add_marker(pytest.mark.benchmark(timer=CpuClock(threads).now))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Add a line below the table."""
    return request.config.stash[session_key].notes.append


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.option.full)


@pytest.fixture
def fewest_threads(request: pytest.FixtureRequest) -> int:
    """Of the numbers of threads that this run measures with."""
    return min(thread_counts(request.config))


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest, threads: int) -> Callable[..., None]:
    """Time a call without arguments and record a row.

    One call makes `products` times `m` rows, reading `nbytes` bytes and doing `operations` multiplications and
    additions for each of the products.
    """
    session, clock = request.config.stash[session_key], CpuClock(threads)

    def run(
        call: Callable[[], Any], *, op: str, name: str, shape: str, m: int, products: int = 1,
        nbytes: int | None = None, operations: int | None = None, **facts: Any,
    ) -> None:  # fmt: skip
        session.measure_limits(threads)
        once = wall_seconds(call)
        if once < 0.1:
            once = wall_seconds(call)
        iterations = calls_per_round(once)
        wanted = request.config.option.seconds * (1 if threads == 1 else 2)  # some of these will be disturbed
        rounds = min(500, max(MIN_ROUNDS, int(wanted / (iterations * once))))
        waited: list[float] = []

        def round_() -> None:
            for _ in range(iterations):
                call()

        benchmark.group = f"{op} {shape} m={m} threads={threads}"
        benchmark.pedantic(round_, setup=lambda: waited.append(clock.waited()), rounds=rounds)
        if benchmark.disabled:
            return
        waited.append(clock.waited())
        times = list(benchmark.stats.stats.data)
        waits = [after - before for before, after in itertools.pairwise(waited)][-len(times) :]
        seconds = undisturbed_median(times, waits) / (iterations * products)
        row = {
            "op": op, "shape": shape, "m": m, "threads": threads, "name": name, "ms": round(seconds * 1e3, 5),
            "rows_s": float(f"{m / seconds:.5g}"), "waited": round(sum(waits) / sum(times), 3), **facts,
        }  # fmt: skip
        if nbytes is not None:
            row["gb_s"] = round(nbytes / seconds / 1e9, 2)
        if operations is not None:
            row["gop_s"] = round(operations / seconds / 1e9, 2)
        benchmark.extra_info.update(row)
        session.rows.append(row)

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = config.stash[session_key]
    if not session.rows:
        return
    content = session.content()
    rows = content["rows"]
    for line in results.lines(rows):
        terminalreporter.write_line(line)
    terminalreporter.write_line("")
    for threads, limit in content["limits"].items():
        terminalreporter.write_line(f"limits, {threads}: {limit}")
    for line in session.notes:
        terminalreporter.write_line(line)
    if disturbed := results.disturbed(rows):
        terminalreporter.write_line(
            f"\nDo not trust {len(disturbed)} of {len(rows)} rows: their threads waited for a core more than 5 % "
            "of the time. Run on a quiet machine."
        )
    if config.option.results:
        results.write(config.option.results, content)
        terminalreporter.write_line(f"\nwritten to {config.option.results}")
