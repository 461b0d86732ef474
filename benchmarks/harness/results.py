"""Rows of results: what is worked out from them, how they are printed and written.

A results file is JSON: ``{"date", "machine", "versions", "limits", "rows"}``, one row per measurement, ``limits`` by
number of threads, as :func:`limits.measure` gives them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import cpu_limits as limits
from benchmarks.harness.bars import Row

BASELINES = {"torch fp32": "x_fp32", "torch bf16": "x_bf16"}
# name and width
COLUMNS = {
    "ms": 11, "rows_s": 12, "gb_s": 8, "bandwidth_share": 17, "gop_s": 8, "peak_share": 12, "error": 10, "x_fp32": 8,
    "x_bf16": 8, "ratio": 8, "peak_mib": 10,
}  # fmt: skip
COMPUTE_BOUND = 64  # from this M on a product is compared with the peak rate, and not with the bandwidth


def medians(rows: Iterable[Row]) -> list[Row]:
    """Of what was measured several times, the row with the median time (the lower one of an even number)."""
    repeats: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        repeats.setdefault((condition(row), row["name"]), []).append(row)
    return [sorted(same, key=lambda row: row["ms"])[(len(same) - 1) // 2] for same in repeats.values()]


def condition(row: Row) -> tuple[Any, ...]:
    """Rows with the same are compared with each other."""
    return row["op"], row["shape"], row["m"], row["threads"]


def with_ratios(rows: Iterable[Row]) -> list[Row]:
    """Each row with its speed relative to the dense baselines measured under the same conditions; one that names its
    ``baseline`` with its time over that one's, ``ratio``."""
    rows = list(rows)
    named = {(condition(r), r["name"]): r["ms"] for r in rows}
    base = {(condition(r), BASELINES[r["name"]]): r["ms"] for r in rows if r["name"] in BASELINES}
    result = []
    for row in rows:
        keys = [key for key in BASELINES.values() if (condition(row), key) in base]
        found = {key: round(base[condition(row), key] / row["ms"], 2) for key in keys}
        if (own := named.get((condition(row), row.get("baseline")))) is not None:
            found["ratio"] = round(row["ms"] / own, 2)
        result.append({**row, **found})
    return sorted(result, key=condition)


def with_shares(rows: Iterable[Row], measured: dict[int, limits.Limits]) -> list[Row]:
    """Each row with its share of the machine's limits, measured with the same number of threads.

    ``bandwidth_share`` where every weight is used once (M = 1, or what a row gathers), ``peak_share`` of the products
    of the row's activations from M = 64 on.
    """
    result = []
    for row in rows:
        limit, shares = measured.get(row["threads"]), {}
        if limit and "gb_s" in row and (row["m"] == 1 or "gop_s" not in row):
            shares["bandwidth_share"] = round(1e9 * row["gb_s"] / limits.bandwidth(limit), 3)
        if limit and "gop_s" in row and row["m"] >= COMPUTE_BOUND:
            peak = limits.peak(limit, row["activations"], row.get("isa"))
            if peak:
                shares["peak_share"] = round(1e9 * row["gop_s"] / peak, 3)
        result.append({**row, **shares})
    return result


def lines(rows: list[Row]) -> Iterator[str]:
    """The table that a run prints: one block per condition."""
    width = max(len(r["name"]) for r in rows)
    heading = None
    for row in rows:
        group = f"{row['op']} {row['shape']}, M={row['m']}, {row['threads']} thread(s)"
        if group != heading:
            heading = group
            yield f"\n{group:<{max(width, len(group))}}"
            yield " " * width + "".join(f"{c:>{w}}" for c, w in COLUMNS.items())
        yield f"{row['name']:<{width}}" + "".join(f"{row.get(c, ''):>{w}}" for c, w in COLUMNS.items())


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def by_name(rows: Iterable[Row]) -> dict[str, dict[int, Row]]:
    """Candidate -> M -> row."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        found.setdefault(row["name"], {})[row["m"]] = row
    return found


def disturbed(rows: Iterable[Row]) -> list[Row]:
    """Rows whose threads waited for a core: with one thread CPU time is measured, which does not contain that."""
    return [row for row in rows if row["threads"] > 1 and row["waited"] > 0.05]


def write(file: str | Path, content: dict[str, Any]) -> None:
    """One row per line, so that two results files can be compared line by line."""
    text = json.dumps({**content, "rows": []}, indent=1).rstrip("}\n").removesuffix("[]")
    rows = ",\n  ".join(json.dumps(row) for row in content["rows"])
    Path(file).write_text(f"{text}[\n  {rows}\n ]\n}}\n")


def read(file: str | Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(file).read_text())
    return content
