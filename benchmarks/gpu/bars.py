"""The bars of a GPU: what the rows of part ``bench`` are held against."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from benchmarks.harness import bars
from benchmarks.harness.bars import Bar, Row

OWN = ("packed", "codebook", "kron")  # families of this package

BANDWIDTH = {bits: 0.65 if bits in (4, 8) else 0.5 for bits in range(2, 9)}
CODEBOOK_SPEED = 0.6
CODEBOOK_BITS = (2, 3, 4, 8)
DENSE_SPEED = 0.85
KRON_SPEED = 5.0
PEER_SPEED = 1.0


class Rows(bars.Rows):
    """Rows of one device."""

    def one(self, shape: str, m: int, **facts: Any) -> Row:
        """The first such row; empty where there is none."""
        return next(iter(self.find(shape=shape, m=m, **facts)), {})

    def us(self, shape: str, m: int, **facts: Any) -> float | None:
        """In a graph; None where no such row was timed."""
        return self.one(shape, m, **facts).get("us_graph")


def speed(of: float | None, against: float | None) -> float | None:
    """How many times as fast a call of ``of`` µs is as one of ``against`` µs."""
    return None if of is None or against is None else against / of


def judged(rows: Iterable[Row]) -> list[Row]:
    """Every bar's verdict, as rows for the results file."""
    found = Rows(rows)
    return [_row(bar) for part in BARS for bar in part(found)]


def _row(bar: Bar) -> Row:
    got = None if bar.got is None else round(bar.got, 3)
    return {"bar": bar.what, "wanted": bar.wanted, "got": got, "verdict": bar.state}


def counts(verdicts: Iterable[Row]) -> dict[str, int]:
    """How many were met, missed and not measured."""
    found = Counter(verdict["verdict"] for verdict in verdicts)
    return {state: found[state] for state in ("met", "missed", "not measured")}


def _fp16(**facts: Any) -> Row:
    return {"dtype": "fp16", "int8": False, **facts}


def bandwidth(rows: Rows) -> Iterator[Bar]:
    """M = 1: the share of the measured copy bandwidth."""
    for scheme in ("g128", "row"):
        for bits, wanted in BANDWIDTH.items():
            row = rows.one("8192x8192", 1, **_fp16(family="packed", bits=bits, scheme=scheme))
            got = row.get("bandwidth_share") if "us_graph" in row else None
            yield Bar(f"packed {bits}-bit {scheme}, 8192x8192, M=1: share of copy bandwidth", wanted, got)


def codebook_speed(rows: Rows) -> Iterator[Bar]:
    """M = 1: as fast as packed layers of the same bits, or nearly."""
    pairs = [(scheme, "row", bits) for scheme in ("row", "tensor") for bits in CODEBOOK_BITS] + [("nf4", "g128", 4)]
    for scheme, packed_scheme, bits in pairs:
        ours = rows.us("8192x8192", 1, **_fp16(family="codebook", bits=bits, scheme=scheme))
        packed = rows.us("8192x8192", 1, **_fp16(family="packed", bits=bits, scheme=packed_scheme))
        name = f"codebook {bits}-bit {scheme}, 8192x8192, M=1: speed against packed {packed_scheme}"
        yield Bar(name, CODEBOOK_SPEED, speed(ours, packed))


def dense_speed(rows: Rows) -> Iterator[Bar]:
    """M = 4096: as fast as a dense float16 layer, or nearly."""
    dense = rows.us("8192x8192", 4096, family="dense", dtype="fp16")
    for bits in BANDWIDTH:
        ours = rows.us("8192x8192", 4096, **_fp16(family="packed", bits=bits, scheme="g128"))
        name = f"packed {bits}-bit g128, 8192x8192, M=4096: speed against dense fp16"
        yield Bar(name, DENSE_SPEED, speed(ours, dense))


def kron_speed(rows: Rows) -> Iterator[Bar]:
    """64 ⊗ 64 at M = 4096: many times as fast as the dense layer of the same dtype."""
    for dtype in ("fp16", "bf16"):
        ours = rows.us("4096x4096", 4096, family="kron", scheme="64x64", dtype=dtype)
        dense = rows.us("4096x4096", 4096, family="dense", dtype=dtype)
        name = f"kron 64x64 {dtype}, 4096x4096, M=4096: speed against dense {dtype}"
        yield Bar(name, KRON_SPEED, speed(ours, dense))


def peer_speed(rows: Rows) -> Iterator[Bar]:
    """At least as fast as GemLite wherever it was timed; one line where it was not."""
    theirs = [row for row in rows.rows if row["family"] == "gemlite" and row.get("us_graph")]
    for row in theirs:
        shape, m, bits, scheme = row["shape"], row["m"], row["bits"], row["scheme"]
        ours = rows.us(shape, m, **_fp16(family="packed", bits=bits, scheme=scheme))
        name = f"packed {bits}-bit {scheme}, {shape}, M={m}: speed against GemLite"
        yield Bar(name, PEER_SPEED, speed(ours, row["us_graph"]))
    if not theirs:
        yield Bar("packed: speed against GemLite", PEER_SPEED, None)


BARS: tuple[Callable[[Rows], Iterator[Bar]], ...] = (
    bandwidth, codebook_speed, dense_speed, kron_speed, peer_speed,
)  # fmt: skip
