"""The bars of a CPU: what the rows of a results file are held against."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from benchmarks.harness import bars
from benchmarks.harness import cpu_limits as limits
from benchmarks.harness.bars import Bar, Row

LARGE = ("4096x4096", "4096x11008", "11008x4096")  # shapes whose weights are read at the machine's limit
LARGE_M = (64, 256, 512)
FLOATS = ("fp32", "bf16")


class Rows(bars.Rows):
    """The rows of one results file."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content["rows"])
        self.limits: dict[str, limits.Limits] = content.get("limits", {})

    def find(self, **facts: Any) -> list[Row]:
        """What is not the default (``isa``, ``x_group``, ``batch_invariant``) has no value unless one is given."""
        return super().find(**{"isa": None, "x_group": None, "batch_invariant": None, **facts})

    def conditions(self, **facts: Any) -> Iterator[dict[str, Any]]:
        """Shape, M and threads of the rows with these values."""
        found = [(r["op"], r["shape"], r["m"], r["threads"]) for r in self.find(**facts)]
        for op, shape, m, threads in dict.fromkeys(found):
            yield {"op": op, "shape": shape, "m": m, "threads": threads}

    def fastest(self, **facts: Any) -> Row | None:
        return min(self.find(**facts), key=lambda row: row["ms"], default=None)


def judged(content: dict[str, Any]) -> list[Bar]:
    """Every bar that something was measured for."""
    return [bar for found in by_kind(content).values() for bar in found]


def by_kind(content: dict[str, Any]) -> dict[str, list[Bar]]:
    """What a kind of bars asks, the first line of its function's docstring -> those that something was measured for."""
    rows = Rows(content)
    found = {(part.__doc__ or "").splitlines()[0].rstrip("."): list(part(rows)) for part in BARS}
    return {what: bars for what, bars in found.items() if bars}


def at_least(what: str, wanted: float, values: Iterable[tuple[float, str]]) -> Iterator[Bar]:
    worst = min(values, default=None)
    if worst:
        yield Bar(what, wanted, worst[0], worst[1])


def at_most(what: str, wanted: float, values: Iterable[tuple[float, str]]) -> Iterator[Bar]:
    worst = max(values, default=None)
    if worst:
        yield Bar(what, wanted, worst[0], worst[1], at_most=True)


def where(condition: dict[str, Any]) -> str:
    threads = condition["threads"]
    return f"{condition['shape']}, M={condition['m']}, {threads} thread{'s' * (threads > 1)}"


def packed(**facts: Any) -> dict[str, Any]:
    return {"who": "lowbit", "family": "packed", **facts}


def bandwidth(rows: Rows) -> Iterator[Bar]:
    """M = 1: packed, share of the streaming bandwidth."""
    wanted = {("int8", True): {1: 0.9, 2: 0.75}, ("int8", False): {1: 0.75, 2: 0.75}}
    for kind in FLOATS:
        wanted |= {(kind, True): {1: 0.85, 2: 0.85}, (kind, False): {1: 0.6, 2: 0.6}}
    for condition in rows.conditions(**packed(op="packed_linear", shape=LARGE, m=1)):
        for (kind, many), bar in wanted.items():
            found = rows.find(**packed(**condition, activations=kind, bits=(4, 5, 6, 7, 8) if many else (2, 3)))
            shares = [(row["bandwidth_share"], row["name"]) for row in found if "bandwidth_share" in row]
            what = f"packed, {kind}, {'4 to 8' if many else '2 and 3'} bits, {where(condition)}"
            if condition["threads"] in bar:
                yield from at_least(f"{what}: share of streaming bandwidth", bar[condition["threads"]], shares)


def best_peer(rows: Rows) -> Iterator[Bar]:
    """M = 1: packed, int8, time against the fastest peer of the same bits."""
    for condition in rows.conditions(**packed(op="packed_linear", shape=LARGE, m=1)):
        for bits, bar in ((2, 0.75), (4, 0.75), (8, 0.9)):
            others = [row for row in rows.find(**condition, bits=bits) if row["who"] != "lowbit"]
            ours = rows.fastest(**packed(**condition, bits=bits, activations="int8", group=128))
            if ours and others:
                peer = min(others, key=lambda row: row["ms"])
                what = f"packed, int8, {bits} bits, {where(condition)}: time against the best peer"
                yield from at_most(what, bar, [(ours["ms"] / peer["ms"], f"{ours['name']} / {peer['name']}")])


def no_cliff(rows: Rows) -> Iterator[Bar]:
    """M = 1: packed, time at 3, 5, 6 and 7 bits against the line between 2, 4 and 8 bits."""
    for condition in rows.conditions(**packed(op="packed_linear", shape=LARGE, m=1)):
        for kind in ("int8", *FLOATS):
            at = {row["bits"]: row for row in rows.find(**packed(**condition, activations=kind, group=128))}
            found = []
            for bits in (3, 5, 6, 7):
                low, high = (2, 4) if bits < 4 else (4, 8)
                if {bits, low, high} <= at.keys():
                    line = at[low]["ms"] + (at[high]["ms"] - at[low]["ms"]) * (bits - low) / (high - low)
                    found.append((at[bits]["ms"] / line, at[bits]["name"]))
            what = f"packed, {kind}, 3, 5, 6, 7 bits, {where(condition)}: time against the line between 2, 4 and 8 bits"
            yield from at_most(what, 1.1, found)


def few_rows(rows: Rows) -> Iterator[Bar]:
    """M = 4 and 16: packed, int8, time at every bit-width against the fastest int8 peer, whatever its bits."""
    for condition in rows.conditions(**packed(op="packed_linear", shape=LARGE, m=(4, 16))):
        others = [row for row in rows.find(**condition, activations="int8") if row["who"] != "lowbit"]
        if others:
            peer = min(others, key=lambda row: row["ms"])
            ours = rows.find(**packed(**condition, activations="int8", group=128))
            found = [(row["ms"] / peer["ms"], f"{row['name']} / {peer['name']}") for row in ours]
            yield from at_most(f"packed, int8, every bits, {where(condition)}: time against the best peer", 0.9, found)


def many_rows_int8(rows: Rows) -> Iterator[Bar]:
    """M from 64 on: packed, int8, share of the int8 peak, time and error against peers."""
    for condition in rows.conditions(**packed(op="packed_linear", shape=LARGE, m=LARGE_M)):
        for group, bar in (("row", 0.8), (128, 0.7)):
            ours = rows.find(**packed(**condition, activations="int8", group=group))
            name = "row" if group == "row" else f"g{group}"
            what = f"packed, int8, {name}, {where(condition)}"
            shares = [(row["peak_share"], row["name"]) for row in ours if "peak_share" in row]
            yield from at_least(f"{what}: share of the int8 peak", bar, shares)
            peers = [(128, "openvino w4 g128 int8"), ("row", "torch dynamic int8 onednn")]
            for of, peer_name in peers:
                peer = rows.fastest(**condition, name=peer_name)
                if of == group and peer:
                    times = [(row["ms"] / peer["ms"], row["name"]) for row in ours]
                    yield from at_most(f"{what}: time against {peer_name}", 1.0, times)
                    if group == "row":
                        errors = [(row["error"] / peer["error"], row["name"]) for row in ours]
                        yield from at_most(f"{what}: error against {peer_name}", 0.5, errors)
            yield from at_most(f"{what}: error", 1e-2, [(row["error"], row["name"]) for row in ours])


def activations_in_groups(rows: Rows) -> Iterator[Bar]:
    """M from 64 on: packed, int8 activations in groups, error."""
    in_groups = packed(activations="int8", x_group=(64, 128))
    for condition in rows.conditions(**in_groups, op="packed_linear", shape=LARGE, m=LARGE_M):
        errors = [(row["error"], row["name"]) for row in rows.find(**in_groups, **condition)]
        yield from at_most(f"packed, int8 in groups, {where(condition)}: error", 6e-3, errors)


def many_rows_float(rows: Rows) -> Iterator[Bar]:
    """M from 64 on: packed, fp32 and bf16, speed against oneDNN's prepacked product of the same dtype."""
    for condition in rows.conditions(**packed(op="packed_linear", shape=LARGE, m=LARGE_M)):
        for kind in FLOATS:
            peer = rows.fastest(**condition, prepacked=True, activations=kind)
            if peer:
                ours = rows.find(**packed(**condition, activations=kind))
                speeds = [(peer["ms"] / row["ms"], row["name"]) for row in ours]
                yield from at_least(f"packed, {kind}, {where(condition)}: speed against {peer['name']}", 0.9, speeds)


def never_slower(rows: Rows) -> Iterator[Bar]:
    """Every family, shape, M and bits: time against `F.linear` of the dtype of x."""
    for family in ("packed", "codebook", "kron"):
        for kind in ("int8", *FLOATS):
            found = []
            for condition in rows.conditions(who="lowbit", family=family, activations=kind):
                dense = rows.fastest(**condition, name="torch bf16" if kind == "bf16" else "torch fp32")
                if dense:
                    ours = rows.find(**condition, who="lowbit", family=family, activations=kind)
                    found += [(row["ms"] / dense["ms"], f"{row['name']}, {where(condition)}") for row in ours]
            yield from at_most(f"{family}, {kind}: time against F.linear, every shape and M", 1.0, found)


def calls(rows: Rows) -> Iterator[Bar]:
    """M = 1: time of the call of a small layer."""
    for condition in rows.conditions(who="lowbit", op="module_call"):
        if condition["threads"] != 1:
            continue
        for kind in ("int8", *FLOATS):
            ours = rows.find(**condition, who="lowbit", activations=kind)
            linear = rows.fastest(**condition, name="nn.Linear bf16" if kind == "bf16" else "nn.Linear fp32")
            if condition["shape"] == "8x8" and linear:
                times = [(row["ms"] / linear["ms"], row["name"]) for row in ours]
                yield from at_most(f"call of an 8x8 layer, {kind}: time against {linear['name']}", 1.3, times)
            elif condition["shape"] == "768x768":
                times = [(1e3 * row["ms"], row["name"]) for row in ours if row["family"] == "packed"]
                yield from at_most(f"call of a 768x768 layer, {kind}, 4 bits, M=1: µs", 20.0, times)


def codebook(rows: Rows) -> Iterator[Bar]:
    """Codebook: time against packed of the same bits, groups and activations; at M = 256 share of the peak."""
    ours = {"who": "lowbit", "family": "codebook", "op": "codebook_linear"}
    for condition in rows.conditions(**ours, shape=LARGE, m=(1, 16)):
        for kind in ("int8", *FLOATS):
            found = []
            for row in rows.find(**ours, **_but_op(condition), activations=kind):
                same = {"bits": row["bits"], "group": row["group"], "activations": kind}
                other = rows.fastest(**packed(**condition, **same))
                if other:
                    found.append((row["ms"] / other["ms"], row["name"]))
            yield from at_most(f"codebook, {kind}, {where(condition)}: time against packed", 1.15, found)
    for condition in rows.conditions(**ours, shape=LARGE, m=256):
        limit = rows.limits.get(str(condition["threads"]))
        peak = limits.peak(limit, "bf16") if limit else None
        for kind in ("int8", "bf16"):
            if peak:
                found = rows.find(**ours, **_but_op(condition), activations=kind)
                shares = [(1e9 * row["gop_s"] / peak, row["name"]) for row in found]
                yield from at_least(f"codebook, {kind}, {where(condition)}: share of the bf16 peak", 0.75, shares)


def _but_op(condition: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in condition.items() if name != "op"}


def kron(rows: Rows) -> Iterator[Bar]:
    """Kronecker, M from 16 on: speed-up over `F.linear`, of what the saved operations promise."""
    ours = {"who": "lowbit", "family": "kron"}
    for condition in rows.conditions(**ours):
        for kind in FLOATS:
            dense = rows.fastest(**condition, name=f"torch {kind}")
            if condition["m"] >= 16 and dense:
                found = rows.find(**ours, **condition, activations=kind)
                rates = [(row["gop_s"] / dense["gop_s"], row["name"]) for row in found]
                what = f"kron, {kind}, {where(condition)}: share of the operations' speed-up over F.linear"
                yield from at_least(what, 0.8, rates)


def embedding(rows: Rows) -> Iterator[Bar]:
    """Gather of 4096 embedding rows at 4 bits: time against fp32 `F.embedding`."""
    for condition in rows.conditions(who="lowbit", op="packed_embedding"):
        dense = rows.fastest(**condition, name="torch fp32")
        if dense:
            found = [row for row in rows.find(**condition, who="lowbit") if " 4-bit" in row["name"]]
            times = [(row["ms"] / dense["ms"], row["name"]) for row in found]
            yield from at_most(f"gather, {where(condition)}: time against fp32 F.embedding", 0.5, times)


def avx2(rows: Rows) -> Iterator[Bar]:
    """M = 1: packed, AVX2 forced, time against fp32 `F.linear` with all that the machine has."""
    for condition in rows.conditions(**packed(op="packed_linear", m=1, isa="avx2")):
        dense = rows.fastest(**condition, name="torch fp32")
        if dense:
            found = rows.find(**packed(**condition, isa="avx2"))
            times = [(row["ms"] / dense["ms"], row["name"]) for row in found]
            yield from at_most(f"packed, AVX2, {where(condition)}: time against fp32 F.linear", 1.0, times)


def experts(rows: Rows) -> Iterator[Bar]:
    """Experts of one layer: time against their linear layers one after the other, and against other libraries."""
    for condition in rows.conditions(op="experts"):
        for ours in rows.find(**condition, who="lowbit", linears=False):
            alike = {name: ours[name] for name in ("bits", "activations")}
            what = f"experts, {ours['activations']}, {ours['bits']} bits, {where(condition)}"
            for one in rows.find(**condition, **alike, linears=True):
                bar = 1.15 if condition["m"] == 1 else 1 / 0.7 if condition["m"] == 512 else None
                if bar is not None:
                    ratio = ours["ms"] / one["ms"]
                    yield from at_most(f"{what}: time against its linear layers", bar, [(ratio, one["name"])])
            theirs = rows.find(**condition, who="transformers")
            if theirs and ours["bits"] == 4 and condition["m"] == 1:
                best = min(theirs, key=lambda row: row["ms"])
                yield from at_least(f"{what}: speed against transformers", 5, [(best["ms"] / ours["ms"], best["name"])])
            for one in rows.find(**condition, **alike, who="llama.cpp"):
                yield from at_least(f"{what}: speed against llama.cpp", 1, [(one["ms"] / ours["ms"], one["name"])])


BARS: tuple[Callable[[Rows], Iterator[Bar]], ...] = (
    bandwidth, best_peer, no_cliff, few_rows, many_rows_int8, activations_in_groups, many_rows_float, never_slower,
    calls, codebook, kron, embedding, experts, avx2,
)  # fmt: skip
