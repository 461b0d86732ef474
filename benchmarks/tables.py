"""The tables of docs/performance.md and docs/results/, made from results files.

    python -m benchmarks.tables RESULTS.json [MORE.json ...] [--page FILE] [--document FILE]

The document has the short tables, ``headlines`` and ``misses``. The page has all others; it is named after the last of
the files, and made where there is none. Each table stands between two marker comments, ``<!-- cpu NAME: begin ... -->``
and ``<!-- cpu NAME: end -->``, and is made again as a whole: nothing there is written by hand. Of several files that
measured under the same conditions (operation, shape, M, threads) the last counts, with all of its rows; machine and
limits are the last file's.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cpu import bars
from benchmarks.harness import results
from benchmarks.harness.bars import Bar, Row
from benchmarks.harness.results import by_name, table

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "performance.md"
PAGES = ROOT / "docs" / "results"
GROWTH = ROOT / "benchmarks" / "results" / "growth.json"
NOTHING = "Not measured yet."

Content = dict[str, Any]


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def milliseconds(row: Row) -> str:
    return number(row["ms"])


def microseconds(row: Row) -> str:
    return number(1e3 * row["ms"])


def rows_per_second(row: Row) -> str:
    return number(row["rows_s"])


def threads_name(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"


def machine(content: Content) -> str:
    """What was measured on, and the limits of it that shares are of."""
    facts, versions = content["machine"], content["versions"]
    names = [f"{name} {version}" for name, version in versions.items() if version and name not in ("python", "lowbit")]
    text = (
        f"{content['date'][:10]}, {facts['cores']} cores of {facts['cpu']}, "
        f"{facts['last_level_cache_mib']} MiB last-level cache, {', '.join(names)}."
    )
    measured = content.get("limits", {})
    if "unavailable" in measured or not measured:
        return f"{text} Limits of the machine were not measured: {measured.get('unavailable', 'no data')}."
    figures = {}
    for kind, unit in (("read_gb_s", "reading, GB/s"), ("peak_gop_s", "products and sums, G/s")):
        for name in next(iter(measured.values()))[kind]:
            figures[f"{unit}: {name}"] = [f"{limit[kind][name]:g}" for limit in measured.values()]
    head = ["limit", *(threads_name(int(t)) for t in measured)]
    return f"{text}\n\n{table(head, ([name, *values] for name, values in figures.items()))}"


def products(op: str) -> Callable[[Content], str]:
    """Time by candidate and M, one table for each shape and number of threads."""

    def section(content: Content) -> str:
        rows = [row for row in content["rows"] if row["op"] == op]
        blocks = dict.fromkeys((row["shape"], row["threads"]) for row in rows)
        return "\n\n".join(
            _products([row for row in rows if (row["shape"], row["threads"]) == block], *block) for block in blocks
        )

    return section


def _products(rows: Sequence[Row], shape: str, threads: int) -> str:
    ms = sorted({row["m"] for row in rows})
    largest = ms[-1] if ms[-1] >= results.COMPUTE_BOUND else None
    head = [f"{shape}, {threads_name(threads)}, ms (× fp32 `F.linear`)", *(f"M={m}" for m in ms)]
    head += ["of bandwidth, M=1"] * (ms[0] == 1) + ([f"of peak, M={largest}"] if largest else []) + ["error"]
    lines = []
    for name, cells in by_name(rows).items():
        line = [name, *(cell(cells.get(m)) for m in ms)]
        line += [percent(cells.get(1, {}).get("bandwidth_share"))] * (ms[0] == 1)
        if largest:
            line.append(percent(cells.get(largest, {}).get("peak_share")))
        lines.append([*line, f"{max(row.get('error', 0) for row in cells.values()):.1e}"])
    return table(head, lines)


def cell(row: Row | None) -> str:
    if row is None:
        return ""
    ratio = f" ({row['x_fp32']:.2g}×)" if "x_fp32" in row else ""
    return number(row["ms"]) + ratio


def simple(op: str, title: str, value: Callable[[Row], str]) -> Callable[[Content], str]:
    """One line per candidate; columns by shape, M and threads."""

    def section(content: Content) -> str:
        rows = [row for row in content["rows"] if row["op"] == op]
        columns = list(dict.fromkeys((row["shape"], row["m"], row["threads"]) for row in rows))
        found = {(row["name"], row["shape"], row["m"], row["threads"]): value(row) for row in rows}
        several = len({shape for shape, *_ in columns}) > 1, len({m for _, m, _ in columns}) > 1
        head = [title]
        for shape, m, threads in columns:
            parts = [shape] * several[0] + [f"M={m}"] * several[1] + [threads_name(threads)]
            head.append(", ".join(parts))
        names = dict.fromkeys(row["name"] for row in rows)
        return table(head, ([name, *(found.get((name, *c), "") for c in columns)] for name in names)) if rows else ""

    return section


def decode(content: Content) -> str:
    """Tokens per second, and where the time goes."""
    blocks = [
        simple("decode", "1.1B Llama, 32 tokens by `generate`, tokens/s", rows_per_second)(content),
        simple("prefill", "1.1B Llama, a prompt of 128, tokens/s", rows_per_second)(content),
    ]
    profiles = [row for row in content["rows"] if row["op"] == "decode" and "profile" in row]
    if profiles:
        head = ["time of generating", "our operations", "others of torch", "Python between them", "largest of torch"]
        blocks.append(table(head, (_profile(row) for row in profiles)))
    return "\n\n".join(block for block in blocks if block)


def _profile(row: Row) -> list[str]:
    shares = dict(row["profile"])
    parts = [percent(shares.pop(name)) for name in ("lowbit", "torch", "python")]
    largest = ", ".join(f"{name.removeprefix('aten::')} {percent(share)}" for name, share in list(shares.items())[:2])
    return [f"{row['name']}, {threads_name(row['threads'])}", *parts, largest]


def judgement(content: Content) -> str:
    """Every bar: what is wanted, the worst that was measured, and whose it is."""
    judged = bars.judged(content)
    if not judged:
        return ""
    met = sum(bar.verdict == "met" for bar in judged)
    lines = (
        [bar.what, f"{'≤' if bar.at_most else '≥'} {bar.wanted:g}", number(bar.got), bar.verdict, bar.row]
        for bar in judged
    )
    head = ["what", "wanted", "worst measured", "", "of"]
    return f"{met} of {len(judged)} are met.\n\n{table(head, lines)}"


def misses(content: Content) -> str:
    """Of every kind of bars how many are met, and the one that is missed by most."""
    kinds = bars.by_kind(content)
    if not kinds:
        return ""
    judged = [bar for found in kinds.values() for bar in found]
    met = sum(bar.verdict == "met" for bar in judged)
    head = ["bars", "met", "missed by most", "wanted", "measured"]
    return f"{met} of {len(judged)} are met.\n\n{table(head, (_misses(*kind) for kind in kinds.items()))}"


def _misses(what: str, found: Sequence[Bar]) -> list[str]:
    worst = max(found, key=lambda bar: bar.missed)
    met = f"{sum(bar.verdict == 'met' for bar in found)} of {len(found)}"
    if worst.verdict == "met":
        return [what, met, "", "", ""]
    wanted = f"{'≤' if worst.at_most else '≥'} {worst.wanted:g}"
    return [what, met, f"{worst.what} ({worst.row})", wanted, number(worst.got)]


@dataclass(frozen=True)
class Headline:
    """What is shown of one candidate beside another, for every M at once."""

    what: str
    op: str
    shape: str
    ms: tuple[int, ...]
    ours: str
    other: str
    unit: str = "ms"
    threads: int = 1


_LARGE = ("4096x4096", (1, 16, 256))
_PACKED = ("packed_linear", *_LARGE)
_DECODE, _PREFILL = ("decode", "llama 1.1B", (32,)), ("prefill", "llama 1.1B", (128,))
HEADLINES = (
    Headline("4-bit layer, int8 x", *_PACKED, "lowbit 4-bit g128 int8", "torch fp32"),
    Headline("", *_PACKED, "lowbit 4-bit g128 int8", "onnxruntime w4 g128 int8"),
    Headline("", *_PACKED, "lowbit 4-bit g128 int8", "openvino w4 g128 int8"),
    Headline("4-bit layer, fp32 x", *_PACKED, "lowbit 4-bit g128 fp32", "torch fp32"),
    Headline("4-bit layer, bf16 x", *_PACKED, "lowbit 4-bit g128 bf16", "torch bf16"),
    Headline("2-bit layer, int8 x", *_PACKED, "lowbit 2-bit g128 int8", "torch fp32"),
    Headline("8-bit layer, int8 x", *_PACKED, "lowbit 8-bit row int8", "torch dynamic int8 onednn"),
    Headline("codebook layer, bf16 x", "codebook_linear", *_LARGE, "lowbit 4-bit codebook row bf16", "torch bf16"),
    Headline("Kronecker layer, bf16 x", "kron_linear", *_LARGE, "lowbit kron 2x1 bf16", "torch bf16"),
    Headline(
        "MiniLM, 1 and 32 sentences", "sentences", "all-MiniLM-L6-v2", (1, 32), "lowbit 4-bit g64 int8", "torch fp32",
        "sentences/s",
    ),
    Headline("1.1B Llama, `generate`", *_DECODE, "lowbit 4-bit g128 int8", "torch bf16", "tokens/s"),
    Headline("", *_DECODE, "lowbit 4-bit g128 int8", "openvino w4 g128 int8", "tokens/s"),
    Headline("1.1B Llama, a prompt of 128", *_PREFILL, "lowbit 4-bit g128 int8", "openvino w4 g128 int8", "tokens/s"),
    Headline("gather of 4096 rows", "packed_embedding", "30522x384", (4096,), "lowbit 4-bit g64", "torch fp32"),
    Headline("call of an 8×8 layer", "module_call", "8x8", (1,), "lowbit 4-bit row int8", "nn.Linear fp32", "µs"),
)
_VALUES: dict[str, Callable[[Row], str]] = {
    "ms": milliseconds, "µs": microseconds, "sentences/s": rows_per_second, "tokens/s": rows_per_second,
}  # fmt: skip


def headlines(content: Content) -> str:
    """The figures to know, each beside what it is compared with."""
    lines = [line for headline in HEADLINES if (line := _headline(headline, content))]
    head = ["what", "lowbit", "", "compared with", "", "times as fast"]
    return table(head, lines) if lines else ""


def _headline(headline: Headline, content: Content) -> list[str] | None:
    """``None`` where one of its rows was not measured."""
    facts = {"op": headline.op, "shape": headline.shape, "threads": headline.threads}
    rows = [row for row in content["rows"] if all(row[name] == value for name, value in facts.items())]
    found = by_name(rows)
    ours, other = found.get(headline.ours, {}), found.get(headline.other, {})
    if not all(m in ours and m in other for m in headline.ms):
        return None
    value = _VALUES[headline.unit]

    def values(of: dict[int, Row]) -> str:
        return f"{', '.join(value(of[m]) for m in headline.ms)} {headline.unit}"

    ratios = ", ".join(f"{other[m]['ms'] / ours[m]['ms']:.2g}" for m in headline.ms)
    return [headline.what, headline.ours.removeprefix("lowbit "), values(ours), headline.other, values(other), ratios]


def growth(content: Content) -> str:
    """The plots, and the steps that are larger than what the work grows by."""
    if not GROWTH.exists():
        return ""
    found = results.read(GROWTH)
    varied = dict.fromkeys(row["varied"] for row in found["rows"])
    blocks = [f"![time and bytes against {name}](../plots/growth-{name}.svg)" for name in varied]
    steps = found["steps"]
    blocks.append("\n".join(f"- {step}" for step in steps) if steps else "No step is larger than 1.3 × the work's.")
    return "\n\n".join(blocks)


SHORT: dict[str, Callable[[Content], str]] = {"headlines": headlines, "misses": misses}
FULL: dict[str, Callable[[Content], str]] = {
    "machine": machine,
    "bars": judgement,
    "packed": products("packed_linear"),
    "codebook": products("codebook_linear"),
    "kron": products("kron_linear"),
    "models": simple("sentences", "all-MiniLM-L6-v2, M sentences at once, sentences/s", rows_per_second),
    "decode": decode,
    "embedding": simple("packed_embedding", "gather of 4096 rows, ms", milliseconds),
    "calls": simple("module_call", "call of a layer, M = 1, µs", microseconds),
    "growth": growth,
}
SECTIONS = SHORT | FULL
TITLES = {
    "machine": "Machine", "bars": "Bars", "packed": "Packed", "codebook": "Codebook", "kron": "Kronecker",
    "models": "Sentences", "decode": "Decoding", "embedding": "Embedding", "calls": "Calls", "growth": "Growth",
}  # fmt: skip

MARKED = re.compile(r"(<!-- cpu (\w+): begin[^>]*-->).*?(<!-- cpu \2: end -->)", re.DOTALL)


def merged(contents: Sequence[Content]) -> Content:
    """Of the same conditions the last run's rows: what is compared was measured side by side."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for content in contents:
        run: dict[tuple[Any, ...], list[Row]] = {}
        for row in content["rows"]:
            run.setdefault(results.condition(row), []).append(row)
        found |= run
    return {**contents[-1], "rows": [row for key in sorted(found) for row in found[key]]}


def rewrite(document: str, content: Content) -> str:
    """The document with every marked section made again; raises ``ValueError`` for a marker of an unknown name."""

    def section(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in SECTIONS:
            raise ValueError(f"a marker must name one of {', '.join(SECTIONS)}: got {name!r}")
        return f"{begin}\n\n{SECTIONS[name](content) or NOTHING}\n\n{end}"

    return MARKED.sub(section, document)


def missing(document: str, names: Iterable[str] = SECTIONS) -> Iterator[str]:
    """Which of ``names`` the document has no markers for."""
    present = {match.group(2) for match in MARKED.finditer(document)}
    yield from (name for name in names if name not in present)


def new_page(name: str) -> str:
    """A page of results without any: a title and markers."""
    markers = "<!-- cpu {0}: begin (made by `python -m benchmarks.tables`) -->\n\n<!-- cpu {0}: end -->"
    blocks = [f"# Results: {name}"]
    for section in FULL:
        blocks += [f"## {TITLES[section]}", markers.format(section)]
    return "\n\n".join(blocks) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--page", type=Path, help="where the full tables go; by default docs/results/<last file>.md")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    options = parser.parse_args()
    content = merged([results.read(file) for file in options.results])
    name = options.results[-1].stem
    page: Path = options.page or PAGES / f"{name}.md"
    for file, names in ((page, FULL), (options.document, SHORT)):
        text = file.read_text() if file.exists() or file != page else new_page(name)
        file.write_text(rewrite(text, content))
        print(f"written: {file}; without markers: {', '.join(missing(text, names)) or 'none'}")


if __name__ == "__main__":
    main()
