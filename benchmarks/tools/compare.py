"""Compare two checkouts: the time of every family's module calls, before and after, in turns.

    python -m benchmarks.tools.compare BEFORE [AFTER] [--only "packed 4-bit"] [--sets 3] [--threads 1] [--write FILE]

BEFORE and AFTER are source trees with a compiled library each (AFTER: this one by default). Each is imported in a
process of its own, and both run on the same cores; a round is a slice of calls of one and then the same number of calls
of the other, in alternating order. With one thread CPU time is measured, so that waiting for a core does not count.

Two ratios, after / before: the median of the rounds' (``median``), which load on the machine disturbs little when
rounds are short, and that of the fastest slices (``fastest``). A row is slower when both exceed the limit; the same
tree twice says how far noise goes. Rows whose results are not bit for bit the same are named. Exit status: 0, or 1
where a row is slower, differs or does not run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("compare_worker.py")
MS = (1, 16, 256)
ACTIVATIONS = ("fp32", "bf16", "int8")
LIMIT = 1.03
SETS, ROUNDS, LONG_ROUNDS = 3, 7, 3  # long: a call takes longer than a slice
SLICE = 0.01  # seconds


@dataclass(frozen=True)
class Case:
    """One row: what the worker makes, and M."""

    name: str
    what: dict[str, Any]
    m: int

    def __str__(self) -> str:
        n, k = self.what["shape"]
        return f"{self.name}, {n}x{k}, M={self.m}"


def _layers(shape: tuple[int, int], activations: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and description of a linear layer of every family, width and kind of activations."""
    for kind in activations:
        common = {"op": "linear", "shape": shape, "activations": kind}
        for bits in range(2, 9):
            yield f"packed {bits}-bit g128 {kind}", {**common, "family": "packed", "bits": bits, "group": 128}
        yield f"packed 8-bit row {kind}", {**common, "family": "packed", "bits": 8}
        for bits in (2, 3, 4, 8):
            yield f"codebook {bits}-bit row {kind}", {**common, "family": "codebook", "bits": bits}
        yield f"codebook 4-bit g64 scales {kind}", {**common, "family": "codebook", "bits": 4, "group": 64}
        if kind != "int8":
            for a in ((64, 64), (2, 1), (1, 2)):
                yield f"kron {a[0]}x{a[1]} {kind}", {**common, "family": "kron", "a": a}
            yield f"kron 64x64 4-bit factors {kind}", {**common, "family": "kron", "a": (64, 64), "bits": 4}


def cases() -> Iterator[Case]:
    """Linear layers of 4096x4096, gathers of 4096 rows, and the lightest calls: of an 8x8 layer."""
    for name, what in _layers((4096, 4096), ACTIVATIONS):
        yield from (Case(name, {**what, "cold": True}, m) for m in MS)
    table = {"op": "gather", "shape": (30720, 384), "cold": True, "activations": "fp32"}
    for bits in (2, 4, 8):
        yield Case(f"gather packed {bits}-bit g64", {**table, "family": "packed", "bits": bits, "group": 64}, 4096)
    yield Case("gather codebook 4-bit row", {**table, "family": "codebook", "bits": 4}, 4096)
    yield Case("gather kron 2x1", {**table, "family": "kron", "a": (2, 1)}, 4096)
    for kind in ACTIVATIONS:
        call = {"op": "linear", "shape": (8, 8), "activations": kind, "cold": False}
        yield Case(f"call packed 4-bit row {kind}", {**call, "family": "packed", "bits": 4}, 1)
        yield Case(f"call codebook 4-bit row {kind}", {**call, "family": "codebook", "bits": 4}, 1)
        if kind != "int8":
            yield Case(f"call kron 2x1 {kind}", {**call, "family": "kron", "a": (2, 1)}, 1)


class Side:
    """The process of one source tree."""

    def __init__(self, tree: Path, threads: int) -> None:
        self.tree = tree.resolve()
        paths = [str(self.tree), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads)}
        # in huge pages, weights take the same time wherever they lie: without, the same tree twice differs by 15 %
        environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        # not as a script: its folder is no place to import from
        code = f"import runpy; runpy.run_path({str(WORKER)!r}, run_name='__main__')"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(threads)], cwd=self.tree, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        if hasattr(os, "sched_setaffinity"):  # the last cores: a system's own work is often on the first
            os.sched_setaffinity(self.process.pid, sorted(os.sched_getaffinity(0))[-threads:])
        self.serving = False
        self.facts = self.answer()
        if not Path(self.facts["lowbit"]).is_relative_to(self.tree):
            raise RuntimeError(f"{self.tree} has no lowbit: {self.facts['lowbit']} was imported")

    def send(self, command: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.tree} ended with status {self.process.wait()}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise RuntimeError(f"{self.tree}: {found['error']}")
        return found

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        """Raises ``RuntimeError`` where the side fails."""
        self.serving |= "layer" in command
        self.send(command)
        return self.answer()

    def end(self) -> None:
        """Of the layer's process, if there is one."""
        if self.serving:
            self.serving = False
            self.ask({"end": True})

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


Sides = tuple[Side, Side]


@dataclass(frozen=True)
class Row:
    """What was measured of a case; microseconds are those of the fastest slices."""

    case: str
    before_us: float
    after_us: float
    median: float  # of the rounds' ratios
    fastest: float  # ratio of the fastest slices
    same: bool  # bit for bit

    @property
    def ratio(self) -> float:
        """What a row is judged by: noise must disturb both to make it slower."""
        return min(self.median, self.fastest)

    def __str__(self) -> str:
        times = f"{self.before_us:>11.2f} {self.after_us:>11.2f}"
        return f"{self.case:<52} {times} {self.median:>8.3f} {self.fastest:>8.3f}{'' if self.same else '  DIFFERS'}"


class Times:
    """Seconds of one call of a case on each side, a pair for each round."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.rounds: list[tuple[float, float]] = []
        self.same = True

    def add(self, sides: Sides, rounds: int, seconds: float) -> None:
        """So many rounds more of the layer that was made last; fewer where a call takes longer than a slice."""
        made = [side.ask({"m": self.case.m}) for side in sides]
        self.same &= made[0]["digest"] == made[1]["digest"]
        once = min(answer["seconds"] for answer in made)
        calls = max(1, math.ceil(seconds / once))
        for number in range(rounds if once < seconds else min(rounds, LONG_ROUNDS)):
            order = sides if number % 2 else sides[::-1]
            found = {side: side.ask({"calls": calls})["seconds"] for side in order}
            self.rounds.append((found[sides[0]], found[sides[1]]))

    def row(self) -> Row:
        before, after = (1e6 * min(times) for times in zip(*self.rounds, strict=True))
        median = statistics.median(after / before for before, after in self.rounds)
        return Row(str(self.case), before, after, median, after / before, self.same)


def measure(same_layer: Sequence[Case], sides: Sides, options: argparse.Namespace) -> list[Row]:
    """Rows of one layer, made anew for each set of rounds, by the sides in turns: where its memory lies matters, too.

    Rows that seem slower get up to three times the sets. Raises ``RuntimeError`` where a side cannot run one.
    """
    found = [Times(case) for case in same_layer]
    for number in range(3 * options.sets):
        todo = [times for times in found if number < options.sets or times.row().ratio > options.limit]
        if not todo:
            break
        try:
            for side in sides if number % 2 else sides[::-1]:
                side.ask({"layer": same_layer[0].what})
            for times in todo:
                times.add(sides, options.rounds, options.seconds)
        finally:
            for side in sides:
                side.end()
    return [times.row() for times in found]


def summary(rows: Sequence[Row], limit: float) -> Iterator[str]:
    for name in ("median", "fastest"):
        ratios = [getattr(row, name) for row in rows]
        worst = max(rows, key=lambda row, name=name: getattr(row, name))
        mean = statistics.geometric_mean(ratios)
        yield f"{name}: geometric mean {mean:.3f}, worst {getattr(worst, name):.3f} ({worst.case})"
    slower = [row for row in rows if row.ratio > limit]
    names = "; ".join(row.case for row in slower) or "-"
    yield f"{len(slower)} of {len(rows)} rows are slower than {limit:g} times: {names}"
    different = [row.case for row in rows if not row.same]
    yield f"{len(different)} of {len(rows)} results differ: {'; '.join(different) or '-'}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tools.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path, nargs="?", default=ROOT)
    parser.add_argument("--only", default="", metavar="REGEX", help="rows whose name has this")
    parser.add_argument("--sets", type=int, default=SETS, help=f"of rounds, layers made anew (default: {SETS})")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"in a set (default: {ROUNDS})")
    parser.add_argument("--seconds", type=float, default=SLICE, help=f"for one slice (default: {SLICE:g})")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"on after / before (default: {LIMIT:g})")
    parser.add_argument("--write", type=Path, metavar="FILE", help="the rows as JSON")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    chosen = [case for case in cases() if re.search(options.only, str(case))]
    sides = before, after = Side(options.before, options.threads), Side(options.after, options.threads)
    print(f"before: {before.tree}, {before.facts['backend']}\nafter: {after.tree}, {after.facts['backend']}")
    print(f"{'':<52} {'before, µs':>11} {'after, µs':>11} {'median':>8} {'fastest':>8}")
    rows: list[Row] = []
    failures: list[str] = []
    for name, same_layer in itertools.groupby(chosen, key=lambda case: case.name):
        try:
            rows += (found := measure(list(same_layer), sides, options))
            print(*found, sep="\n", flush=True)
        except RuntimeError as error:
            failures.append(f"{name}: {error}")
            print(failures[-1], flush=True)
    for side in sides:
        side.close()
    if rows:
        print("", *summary(rows, options.limit), sep="\n")
    print(*failures, sep="\n", end="\n" if failures else "")
    if options.write:
        content = {"sides": [side.facts for side in sides], "threads": options.threads, "failures": failures}
        content["rows"] = [asdict(row) for row in rows]
        options.write.write_text(json.dumps(content, indent=1) + "\n")
    return int(bool(failures) or any(row.ratio > options.limit or not row.same for row in rows))


if __name__ == "__main__":
    sys.exit(main())
