"""How time and bytes grow with M, N, K, bits and threads, one of them at a time.

    python -m benchmarks.tools.growth [--write] [--seconds 0.1] [--only M K]

prints every step between neighbours that is larger than 1.3 times what the work grows by. ``--write`` also renews
``benchmarks/results/growth.json`` and the plots ``docs/plots/growth-*.svg`` (matplotlib). Up to 64 copies of a layer
take turns, so that all but the smallest come from memory; one thread is timed by CPU time, several by wall time.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu import ours
from benchmarks.harness import layers, machine, results
from benchmarks.harness.clock import CpuClock
from lowbit.packed.module import PackedLinear

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "benchmarks" / "results" / "growth.json"
PLOTS = ROOT / "docs" / "plots"
STEP = 1.3  # a larger step than this times that of the work is named
POWERS = [2**i for i in range(6, 15)]
VALUES = {
    "M": [2**i for i in range(15)],
    "N": POWERS,
    "K": POWERS,
    "bits": list(range(2, 9)),
    "threads": list(range(1, machine.cores() + 1)),
}
BASE = {"M": 1, "N": 4096, "K": 4096, "bits": 4, "threads": 1}
# what stays the same while one varies: rows of x, and shapes at which the largest is still quick
SERIES: list[tuple[str, dict[str, int]]] = [
    ("M", {"N": 1024, "K": 1024}),
    *(("N", {"M": m, "K": 1024}) for m in (1, 256)),
    *(("K", {"M": m, "N": 1024}) for m in (1, 256)),
    *(("bits", {"M": m}) for m in (1, 16, 256)),
    *(("threads", {"M": m}) for m in (1, 256)),
]
MAX_COPIES = 64


@dataclass(frozen=True)
class Point:
    """One measurement."""

    varied: str
    activations: str
    M: int
    N: int
    K: int
    bits: int
    threads: int
    ms: float
    nbytes: int  # of the layer

    @property
    def series(self) -> tuple[Any, ...]:
        """Everything but what varies and what was measured."""
        fixed = (v for name, v in asdict(self).items() if name in VALUES and name != self.varied)
        return (self.varied, self.activations, *fixed)

    @property
    def value(self) -> int:
        return int(getattr(self, self.varied))

    def describe(self) -> str:
        fixed = ", ".join(f"{name}={getattr(self, name)}" for name in VALUES if name != self.varied)
        return f"{self.activations}, {fixed}"


def by_series(points: Iterable[Point]) -> dict[tuple[Any, ...], list[Point]]:
    """The points of each series, by what varies."""
    found: dict[tuple[Any, ...], list[Point]] = {}
    for point in points:
        found.setdefault(point.series, []).append(point)
    return {key: sorted(line, key=lambda p: p.value) for key, line in found.items()}


def work(before: Point, after: Point) -> float:
    """How many times as much there is to do: the larger of products and bytes, over the threads that share it."""
    products = (after.M * after.N * after.K) / (before.M * before.N * before.K)
    return max(products, after.nbytes / before.nbytes) * before.threads / after.threads


def steps(points: Iterable[Point]) -> Iterator[str]:
    """Every step between neighbours that is larger than what the work grows by, in time or in bytes."""
    for line in by_series(points).values():
        for before, after in itertools.pairwise(line):
            expected = work(before, after)
            where = f"{before.varied} {before.value} to {after.value} ({before.describe()})"
            if (found := after.ms / before.ms) > STEP * expected:
                yield f"time, {where}: {before.ms:.4g} to {after.ms:.4g} ms, {found:.2f} times; the work {expected:.2f}"
            grown = (after.N * after.K * after.bits) / (before.N * before.K * before.bits)
            if (found := after.nbytes / before.nbytes) > STEP * grown:
                yield f"bytes, {where}: {before.nbytes} to {after.nbytes}, {found:.2f} times; the codes {grown:.2f}"


def measure(sizes: dict[str, int], activations: str, varied: str, seconds: float) -> Point:
    """The time of one call of a layer with groups of 128 (of one group, if K is smaller)."""
    m, n, k, bits, threads = (sizes[name] for name in ("M", "N", "K", "bits", "threads"))
    weight, _ = layers.packed_weight(n, k, bits, min(128, k), "cpu", centered=True)
    kind = "int8" if activations == "int8" else "float"
    layer = PackedLinear.from_weight(weight, activations=kind, dtype=ours.dtype_of(activations))
    nbytes = layers.layer_nbytes(layer)
    copies = min(MAX_COPIES, math.ceil(machine.cold_bytes() / nbytes))
    turn = itertools.cycle([layers.another(layer) for _ in range(copies)])
    x = torch.randn(m, k).to(ours.dtype_of(activations))
    torch.set_num_threads(threads)
    with torch.inference_mode():
        ms = 1e3 * CpuClock(threads).median(lambda: next(turn)(x), seconds)
    return Point(varied, activations, m, n, k, bits, threads, float(f"{ms:.5g}"), nbytes)


def run(only: Sequence[str], seconds: float) -> list[Point]:
    points = []
    for varied, fixed in SERIES:
        if only and varied not in only:
            continue
        for activations in ours.ACTIVATIONS:
            for value in VALUES[varied]:
                points.append(measure({**BASE, **fixed, varied: value}, activations, varied, seconds))
                p = points[-1]
                print(f"{p.varied}={p.value} ({p.describe()}): {p.ms} ms, {p.nbytes} bytes", flush=True)
    return points


def plot(points: Sequence[Point], folder: Path) -> list[Path]:
    """One figure for each thing that varies: time, and bytes."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "lowbit"  # the same figure is the same file
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for varied in dict.fromkeys(p.varied for p in points):
        lines = [line for key, line in by_series(points).items() if key[0] == varied]
        figure, (times, sizes) = pyplot.subplots(1, 2, figsize=(11, 4.2))
        for line in lines:
            first = line[0]
            label = first.activations if varied == "M" else f"{first.activations}, M={first.M}"
            times.plot([p.value for p in line], [p.ms for p in line], marker="o", markersize=3, label=label)
        widest = max(lines, key=len)
        sizes.plot([p.value for p in widest], [p.nbytes for p in widest], marker="o", markersize=3)
        for axes, title in ((times, "ms per call"), (sizes, "bytes of the layer")):
            axes.set(xlabel=varied, ylabel=title, yscale="log")
            if varied in ("M", "N", "K"):
                axes.set_xscale("log", base=2)
            else:
                axes.set_xticks([p.value for p in widest])
            axes.grid(alpha=0.3)
        times.legend(fontsize=8)
        fixed = {name: getattr(widest[0], name) for name in ("N", "K", "bits", "threads") if name != varied}
        figure.suptitle(", ".join(f"{name} = {value}" for name, value in fixed.items()))
        file = folder / f"growth-{varied}.svg"
        figure.savefig(file, bbox_inches="tight", metadata={"Date": None})
        pyplot.close(figure)
        written.append(file)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--seconds", type=float, default=0.1, help="time for one measurement")
    parser.add_argument("--only", nargs="*", choices=list(VALUES), default=(), help="what varies")
    options = parser.parse_args()
    points = run(options.only, options.seconds)
    named = list(steps(points))
    print("\n" + ("\n".join(named) or f"no step is larger than {STEP} times what the work grows by"))
    if options.write:
        rows = [asdict(p) for p in points]
        results.write(DATA, {**machine.describe(), "steps": named, "rows": rows})
        print(f"written: {', '.join(map(str, [DATA, *plot(points, PLOTS)]))}")


if __name__ == "__main__":
    main()
