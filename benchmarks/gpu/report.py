"""Part ``report``: the GPU section of ``docs/results/gpu.md``, made from every ``gpu-*.json`` among the results.

It stands between two marker comments and is made again as a whole, so nothing in it is ever written by hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.harness.bars import Row
from benchmarks.harness.results import by_name, table

from .bars import counts
from .parts import RESULTS, ROOT, Context, Section, slug

DOCUMENT = ROOT / "docs" / "results" / "gpu.md"
BEGIN, END = "<!-- gpu: begin (made by `python -m benchmarks.gpu --part report`) -->", "<!-- gpu: end -->"
NOTHING = "No GPU results yet: `make gpu-check` on a machine with a GPU measures them."

Device = tuple[str, dict[str, Section]]  # name, sections


def run(context: Context) -> Section:
    """Write the document again; the section says which devices it shows."""
    folders = dict.fromkeys([RESULTS, context.results.path.parent])
    return write(DOCUMENT, [device for folder in folders for device in devices(folder)])


def devices(folder: Path) -> list[Device]:
    """Every results file of a GPU in ``folder``, by name."""
    found = []
    for path in sorted(folder.glob("gpu-*.json")):
        content = json.loads(path.read_text())
        if content.get("device"):
            found.append((content["device"], content["sections"]))
    return found


def write(document: Path, found: Sequence[Device]) -> Section:
    """Replace what stands between the markers; where there are none, they are put at the end."""
    found = list(dict(found).items())  # of two files of one device the later: that of --out
    text = document.read_text()
    plots = [path for name, sections in found for path in plot(name, sections, document.parent)]
    section = f"{BEGIN}\n\n{markdown(found, plots)}\n\n{END}"
    if BEGIN in text and END in text:
        before, rest = text.split(BEGIN, 1)
        text = before + section + rest.split(END, 1)[1]
    else:
        text = f"{text.rstrip()}\n\n{section}\n"
    document.write_text(text)
    return {"devices": [name for name, _ in found], "document": document.name, "plots": plots}


def markdown(found: Sequence[Device], plots: Sequence[str] = ()) -> str:
    """The section as text."""
    blocks = ["## GPU"]
    if not found:
        return "\n\n".join([*blocks, NOTHING])
    blocks.append(
        "Times are those of one call inside a CUDA graph of calls that rotate over more than three times the last-level"
        "\ncache of weights; every candidate is checked against float64 before it is timed. Shares are of limits that"
        "\nwere measured on the same device."
    )
    for name, sections in found:
        blocks += [f"### {name}", *_machine(sections), *_checks(sections), *_bench(sections)]
        blocks += [f"![{name}]({path})" for path in plots if slug(name) in path]
    return "\n\n".join(blocks)


def _machine(sections: dict[str, Section]) -> Iterable[str]:
    machine = sections.get("machine", {})
    if not machine:
        return
    limits, versions = machine.get("limits", {}), machine.get("versions", {})
    smi = machine.get("nvidia_smi", {})
    facts = [f"{name} {versions[name]}" for name in ("python", "torch", "triton") if versions.get(name)]
    facts += [f"{text} {smi[key]}" for text, key in (("driver", "driver_version"), ("SM clock", "clocks.sm"),
              ("memory clock", "clocks.mem"), ("power limit", "power.limit")) if key in smi]  # fmt: skip
    yield ", ".join([str(machine.get("date")), f"commit {machine.get('commit')}", *facts]) + "."
    if limits:
        yield table(["limit", "measured"], [[LIMITS.get(name, name), f"{limits[name]:g}"] for name in limits])


LIMITS = {
    "copy_gb_s": "copy inside the device, read + write, GB/s",
    "read_gb_s": "sum of a float32 vector, read, GB/s",
    "bf16_tflop_s": "bf16 matrix product 8192³, TFLOP/s",
    "fp16_tflop_s": "fp16 matrix product 8192³, TFLOP/s",
    "int8_top_s": "int8 matrix product 8192³, TOP/s",
    "launch_us_in_graph": "an empty Triton kernel in a graph, µs",
    "launch_us_eager": "an empty Triton kernel launched from Python, µs",
}


def _checks(sections: dict[str, Section]) -> Iterable[str]:
    lines = [[name, status(section), said(name, section)] for name, section in sections.items() if name in CHECKED]
    if lines:
        yield table(["check", "", ""], lines)


CHECKED = ("tests", "opcheck", "graphs", "cuda", "sanitizer")


def status(section: Section) -> str:
    return str(section.get("status", "not run"))


def said(name: str, section: Section) -> str:
    """One line on what a part found."""
    if "error" in section:
        return str(section["error"]).strip().splitlines()[-1][:160]
    if name == "tests" and "passed" in section:
        words = [f"{section.get(what, 0)} {what}" for what in ("passed", "failed", "errors", "skipped")]
    elif name == "sanitizer" and section.get("tools"):
        words = [
            f"{tool}: kernels {found['kernels']['outcome']}, planted bug {found['planted']['outcome']}"
            for tool, found in section["tools"].items()
        ]
    elif name == "bench":
        words = [f"{len(section.get('rows', []))} rows"]
        words += [f"bars {what}: {count}" for what, count in counts(section.get("bars", [])).items()]
    elif name in ("opcheck", "graphs"):
        words = [f"{len(section.get('passed', []))} passed", f"{len(section.get('problems', []))} failed"]
    else:
        words = [f"{len(section['problems'])} problems"] if section.get("problems") else []
    if section.get("absent"):
        words.append("absent: " + ", ".join(section["absent"]))
    if section.get("left_out"):
        words.append(f"{len(section['left_out'])} left out")
    return "; ".join(words)


def _bench(sections: dict[str, Section]) -> Iterable[str]:
    bench = sections.get("bench", {})
    rows = bench.get("rows", [])
    if not rows:
        return
    yield f"Kernels of commit {bench.get('commit')}, {bench.get('date')}, backend `{bench.get('backend')}`."
    for shape in dict.fromkeys(row["shape"] for row in rows):
        yield times([row for row in rows if row["shape"] == shape], shape)
    refused = [row for row in rows if "refused" in row or "failed" in row]
    if refused:
        yield "Not timed: " + "; ".join(sorted({f"{row['name']} ({reason(row)})" for row in refused})) + "."
    if bench.get("absent"):
        yield "Absent peers: " + ", ".join(bench["absent"]) + "."
    if bench.get("left_out"):
        yield f"Left out, for want of time: {len(bench['left_out'])} rows."
    if bench.get("bars"):
        cells = [[bar["bar"], f"{bar['wanted']:g}", show(bar["got"]), bar["verdict"]] for bar in bench["bars"]]
        yield table(["bar (at least)", "wanted", "got", ""], cells)


def reason(row: Row) -> str:
    text = str(row.get("refused") or row["failed"]).splitlines()[0]
    return text[:120].replace("|", "/")


def times(rows: Sequence[Row], shape: str) -> str:
    """µs by candidate and M, with the speed against the dense layer of the same dtype."""
    ms = sorted({row["m"] for row in rows})
    timed = [row for row in rows if row["family"] == "dense" and "us_graph" in row]
    dense = {(row["dtype"], row["m"]): row["us_graph"] for row in timed}
    head = [f"{shape}, µs in a graph (speed against dense)", *(f"M={m}" for m in ms), "share of copy bandwidth, M=1"]
    lines = []
    for name, cells in by_name(rows).items():
        share = cells.get(1, {}).get("bandwidth_share")
        lines.append([name, *(cell(cells.get(m), dense) for m in ms), "" if share is None else f"{100 * share:.0f} %"])
    return table(head, lines)


def cell(row: Row | None, dense: dict[tuple[str, int], float]) -> str:
    if row is None:
        return ""
    if "us_graph" not in row:
        return f"({row['us_alone']:g} alone)" if "us_alone" in row else "–"
    base = dense.get((row["dtype"], row["m"]))
    return f"{row['us_graph']:g}" + (f" ({base / row['us_graph']:.2g}×)" if base else "")


def show(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def plot(name: str, sections: dict[str, Section], folder: Path) -> list[str]:
    """The speed of packed layers against dense, by M: an SVG beside the document; none without matplotlib."""
    rows = [row for row in sections.get("bench", {}).get("rows", []) if "us_graph" in row]
    rows = [row for row in rows if row["shape"] == "8192x8192" and row["dtype"] == "fp16" and not row["int8"]]
    dense = {row["m"]: row["us_graph"] for row in rows if row["family"] == "dense"}
    lines = [row for row in rows if row["family"] == "packed" and row["scheme"] == "g128" and row["m"] in dense]
    if not lines:
        return []
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for bits in sorted({row["bits"] for row in lines}):
        points = sorted((row["m"], dense[row["m"]] / row["us_graph"]) for row in lines if row["bits"] == bits)
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{bits} bits")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="M", ylabel="speed against dense fp16", title=f"8192x8192, groups of 128, {name}")
    axes.legend()
    file = f"gpu-{slug(name)}.svg"
    figure.savefig(folder / file, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    return [file]
