"""Options, the `measure` fixture, and the table and file of results.

`pytest benchmarks --benchmark-only` prints one table; `--results FILE` also writes it as JSON:
`{"date", "machine", "versions", "bandwidth_gb_s", "rows"}`, one row per measurement. A candidate is checked
against its float64 reference first, and is never timed when it is wrong.

With one thread the clock is the process's CPU time, which other work on the machine hardly disturbs; with
more it is wall time, and `waited` says which part of it other work took. Figures are medians.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import machine
import pytest
import torch

BASELINES = {"torch fp32": "x_fp32", "torch bf16": "x_bf16"}
rows_key = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lowbit benchmarks")
    group.addoption("--threads", default="1,2", help="thread counts to measure with (default: 1,2)")
    group.addoption("--all-shapes", action="store_true", help="the shapes of larger models too")
    group.addoption("--seconds", type=float, default=0.25, help="time for one measurement (default: 0.25)")
    group.addoption("--results", metavar="FILE", help="write the results as JSON")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[rows_key] = []
    config.option.benchmark_quiet = True  # one table, ours: it has the ratios and the bandwidth


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(machine.describe())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The slowest to prepare varies slowest; `threads` and `m` share one prepared weight."""
    module, option = metafunc.module, metafunc.config.option
    values = {
        "shape": getattr(module, "ALL_SHAPES" if option.all_shapes else "SHAPES", []),
        "candidate": getattr(module, "CANDIDATES", []),
        "threads": [int(t) for t in option.threads.split(",")],
        "m": getattr(module, "MS", []),
    }
    for name in values:
        if name in metafunc.fixturenames:
            metafunc.parametrize(
                name, values[name], ids=lambda v: "x".join(map(str, v)) if type(v) is tuple else str(v)
            )


@pytest.fixture(autouse=True)
def _pinned(threads: int, request: pytest.FixtureRequest) -> Any:
    if threads == 1:
        request.node.add_marker(pytest.mark.benchmark(timer=time.process_time))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest, threads: int) -> Callable[..., None]:
    """Time a call without arguments and record a row: `m` rows out of `nbytes` bytes of weights each time."""

    def run(
        call: Callable[[], Any], *, op: str, name: str, shape: str, m: int, nbytes: int | None = None, **extra: Any
    ) -> None:
        call()
        start = time.perf_counter()
        call()
        once = max(time.perf_counter() - start, 1e-7)
        # A round lasts a millisecond at least, so that neither the clock nor the loop around it matters.
        iterations = max(1, math.ceil(1e-3 / once))
        rounds = min(500, max(3, int(request.config.option.seconds / (iterations * once))))
        benchmark.group = f"{op} {shape} m={m} threads={threads}"
        start, waited = time.perf_counter(), machine.waited_seconds()
        benchmark.pedantic(call, rounds=rounds, iterations=iterations, warmup_rounds=1)
        waited = (machine.waited_seconds() - waited) / (time.perf_counter() - start)
        if benchmark.disabled:
            return
        seconds = benchmark.stats.stats.median
        row = {
            "op": op, "shape": shape, "m": m, "threads": threads, "name": name,
            "ms": round(seconds * 1e3, 4), "rows_s": round(m / seconds),
            "waited": round(waited, 3), **extra,
        }  # fmt: skip
        if nbytes is not None:
            rate = nbytes / seconds
            row["gb_s"] = round(rate / 1e9, 2)
            row["bandwidth_share"] = round(rate / machine.read_bandwidth(threads), 3)
        torch.set_num_threads(threads)
        benchmark.extra_info.update(row)
        request.config.stash[rows_key].append(row)

    return run


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with its speed relative to the dense baselines measured under the same conditions."""

    def condition(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["op"], row["shape"], row["m"], row["threads"]

    base = {(condition(r), BASELINES[r["name"]]): r["ms"] for r in rows if r["name"] in BASELINES}
    result = []
    for row in rows:
        ratios = {
            key: round(base[condition(row), key] / row["ms"], 2)
            for key in BASELINES.values()
            if (condition(row), key) in base
        }
        result.append({**row, **ratios})
    return sorted(result, key=lambda r: condition(r))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = with_ratios(config.stash[rows_key])
    if not rows:
        return
    columns = ["ms", "rows_s", "gb_s", "bandwidth_share", *BASELINES.values()]
    width = max(len(r["name"]) for r in rows)
    heading = None
    for row in rows:
        group = f"{row['op']} {row['shape']}, M={row['m']}, {row['threads']} thread(s)"
        if group != heading:
            heading = group
            terminalreporter.write_sep("-", group)
            terminalreporter.write_line(" " * width + "".join(f"{c:>17}" for c in columns))
        cells = "".join(f"{row.get(c, ''):>17}" for c in columns)
        terminalreporter.write_line(f"{row['name']:<{width}}{cells}")
    disturbed = [row for row in rows if row["threads"] > 1 and row["waited"] > 0.05]
    if disturbed:
        terminalreporter.write_line(
            f"\nDo not trust {len(disturbed)} of {len(rows)} rows: their threads waited for a core more than 5 % "
            "of the time. Run on a quiet machine."
        )
    if config.option.results:
        used = sorted({row["threads"] for row in rows})
        content = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **machine.describe(),
            "bandwidth_gb_s": {str(t): round(machine.read_bandwidth(t) / 1e9, 1) for t in used},
            "rows": rows,
        }
        with open(config.option.results, "w") as file:
            # one row per line, so that two results files can be compared line by line
            text = json.dumps({**content, "rows": []}, indent=1).rstrip("}\n").removesuffix("[]")
            lines = ",\n  ".join(json.dumps(row) for row in rows)
            file.write(f"{text}[\n  {lines}\n ]\n}}\n")
        terminalreporter.write_line(f"\nwritten to {config.option.results}")
