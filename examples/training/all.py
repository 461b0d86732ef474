"""Every row of the table in docs/training.md.

    python examples/training/all.py --write benchmarks/results/training.json           # runs all of them: about an hour
    python examples/training/all.py --write benchmarks/results/training.json --only "k-means*"
    python examples/training/all.py --write benchmarks/results/training.json --only ""           # runs none of them

A row is a command of this folder, run with three seeds. Rows that are in the file already are replaced; the table of
docs/training.md is written anew.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
DOCUMENT = FOLDER.parents[1] / "docs" / "training.md"
BEGIN, END = "<!-- examples/training/all.py writes this table -->\n", "<!-- to here -->\n"


@dataclass(frozen=True)
class Bar:
    """The median is wanted to be at most ``limit``, or so many times ``over``: another row, or a figure of this one."""

    limit: float
    over: str = ""
    figure: str = "perplexity"
    at_least: bool = False


@dataclass(frozen=True)
class Row:
    command: str
    bars: tuple[Bar, ...] = ()
    paper: str = ""
    figure: str = "perplexity"


def quantgpt(bits: str, steps: int, quantizer: str = "Dynamic") -> str:
    return f"quantgpt.py --bits {bits} --steps {steps}" + (f" --quantizer {quantizer}" * (quantizer != "Dynamic"))


SMALLER = Bar(11, figure="times smaller", at_least=True)
ROWS = {
    "8-8-8, not trained": Row(quantgpt("8-8-8", 0), (Bar(1.01, "float"),)),
    "4-4-8, 60 steps": Row(
        quantgpt("4-4-8", 60), (Bar(6.0), Bar(0.95, "4-4-8, 60 steps, LSQ"), Bar(0.85, "4-4-8, 60 steps, MinMax"))
    ),
    "4-4-8, 60 steps, LSQ": Row(quantgpt("4-4-8", 60, "LSQ")),
    "4-4-8, 60 steps, MinMax": Row(quantgpt("4-4-8", 60, "MinMax")),
    "2-2-8, 60 steps": Row(quantgpt("2-2-8", 60), (Bar(26), Bar(0.75, "2-2-8, 60 steps, LSQ"), SMALLER)),
    "2-2-8, 60 steps, LSQ": Row(quantgpt("2-2-8", 60, "LSQ")),
    "2-2-8, 60 steps, contrastive": Row(
        quantgpt("2-2-8", 60) + " --contrastive 0.1", paper="25.54 → 16.98 by this loss (GPT-2, WikiText-103)"
    ),
    "2-2-8, 200 steps": Row(
        quantgpt("2-2-8", 200),
        (Bar(16), Bar(0.25, "2-2-8, 200 steps, PACT")),
        "14.48 → 17.30 (GPT-2, WikiText-2); 14.4× smaller",
    ),
    "2-2-8, 200 steps, LSQ": Row(quantgpt("2-2-8", 200, "LSQ")),
    "2-2-8, 200 steps, PACT": Row(quantgpt("2-2-8", 200, "PACT"), paper="its gradient is clearly worse"),
    "2-2-8, 200 steps, MinMax": Row(quantgpt("2-2-8", 200, "MinMax")),
    "k-means, 4 bits": Row(
        "kmeans.py --bits 4", (Bar(5.85), Bar(0.85, "linear levels", "untuned")), "clearly ahead of linear levels"
    ),
    "k-means, 3 bits": Row("kmeans.py --bits 3", (Bar(16), Bar(0.85, "linear levels", "untuned"))),
    "k-means, 2 bits per row": Row("kmeans.py --bits 2 --granularity row", (Bar(20),)),
    "PreQuant, 4 bits": Row("prequant.py --bits 4", (Bar(0.5, "untuned"),)),
    "PreQuant, 3 bits": Row("prequant.py --bits 3", (Bar(0.5, "untuned"),)),
    "PreQuant, 2 bits": Row("prequant.py --bits 2", (Bar(0.5, "untuned"),)),
    "PreQuant, 4 bits, random": Row("prequant.py --bits 4 --outliers-by random"),
    "MiniLM, SST-2, 2 bits + 0.5 %": Row("minilm.py", (Bar(0.54, figure="loss"),), figure="loss"),
    "MiniLM, SST-2, head only": Row("minilm.py --head-only", figure="loss"),
    "Kronecker, nearest start": Row("kngpt2.py", (Bar(0.85, "Kronecker, random start"),)),
    "Kronecker, random start": Row("kngpt2.py --start random"),
    "Kronecker, ILKD": Row("kngpt2.py --ilkd"),
}  # fmt: skip


def run(row: Row, seeds: int) -> dict[str, Any]:
    command = [sys.executable, *row.command.split(), "--seeds", str(seeds)]
    done = subprocess.run(command, cwd=FOLDER, stdout=subprocess.PIPE, text=True, check=True)
    return {"command": row.command, **json.loads(done.stdout.splitlines()[-1])}


def measured(bar: Bar, name: str, results: dict[str, Any]) -> float | None:
    """What is at most ``bar.limit``; None while the other row is missing."""
    value = float(results[name][bar.figure])
    if bar.over in ROWS:
        return value / results[bar.over][bar.figure] if bar.over in results else None
    return value / results[name][bar.over] if bar.over else value


def verdict(bar: Bar, name: str, results: dict[str, Any]) -> str:
    found = measured(bar, name, results)
    sign = "≥" if bar.at_least else "≤"
    of = bar.over.rpartition(", ")[2] or ("smaller" if bar.at_least else "")
    text = f"{sign} {bar.limit:g}" + (f" × {of}" if of else "")
    if found is None:
        return text
    held = found >= bar.limit if bar.at_least else found <= bar.limit
    return ("" if held else "**missed** ") + text + (f": {number(found)}" if of else "")


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}" if value >= 2 else f"{value:.3f}"


def table(results: dict[str, Any]) -> str:
    lines = ["| row | median of three seeds (lowest to highest) | wanted: found | in the paper | s | command |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for name, row in ROWS.items():
        if name not in results:
            continue
        found = results[name]
        each = found["each"].get(row.figure, [])
        figure = " → ".join(number(found[key]) for key in ("untuned", "untrained", row.figure) if key in found)
        if found.get("untrained") == found[row.figure]:
            figure = number(found[row.figure])
        spread = f" ({number(min(each))} to {number(max(each))})" if each else ""
        bars = "; ".join(verdict(bar, name, results) for bar in row.bars)
        cells = [name, figure + spread, bars, row.paper, str(found["seconds"]), f"`{row.command}`"]
        lines.append("|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="of names of rows")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    import torch

    results = json.loads(given.write.read_text())["rows"] if given.write and given.write.exists() else {}
    for name, row in ROWS.items():
        if not fnmatch(name, given.only):
            continue
        results[name] = run(row, given.seeds)
        print(json.dumps({name: results[name]}), flush=True)
        if given.write:
            rows = {name: results[name] for name in ROWS if name in results}
            about = {"python": platform.python_version(), "torch": torch.__version__, "threads": 1}
            given.write.write_text(json.dumps({"versions": about, "rows": rows}, indent=1) + "\n")
    if given.write:
        before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        DOCUMENT.write_text(f"{before}{BEGIN}{table(results)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
