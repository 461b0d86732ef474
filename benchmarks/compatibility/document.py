"""``docs/compatibility.md``: a line for each row. The tests run the rows, and fail where one finds something else."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping

from benchmarks.gpu.parts import ROOT

from . import architectures, libraries, processes
from .checks import COLUMNS, NOTHING, Found

DOCUMENT = ROOT / "docs" / "compatibility.md"

TEXT = """# What lowbit works with

Made by `python -m benchmarks.compatibility --write`. The tests in `tests/compatibility/` run every row, and fail where
a cell says something else.

Of the cells of architectures {architectures_works} of {architectures_cells} say `works`, of those of libraries
{libraries_works} of {libraries_cells}; the others say the words of the error. `–`: there is nothing to do.

- **convert**: `lowbit.convert(model, lowbit.Packed(bits=4, group_size=16))` unless the row says otherwise; what stays
  float is listed in `model.lowbit_skipped`, and `lowbit.report(model)` works;
- **forward**: every float output is that of the dequantized model, to 2e-5 of its largest value;
- **reload**: `save_pretrained` and `from_pretrained`; every float output is equal, bit for bit;
- **task**: greedy `generate` gives the tokens of the dequantized model, and of the reloaded one; where a model does not
  generate, the loss is theirs;
- **training**: after `lowbit.make_trainable(model, "scales")`, the gradients of all float parameters are those of the
  dequantized model, those of the scales (codebooks or factors where a row has these) are finite, and a step of Adam
  changes the loss.

## Architectures of transformers

Tiny models with random weights, from their configurations (`benchmarks/compatibility/architectures.py`). **packed**
counts linear and embedding layers, and stacks of experts.

| architecture | class | packed | {columns} |
| --- | --- | --- | {rule} |
{architectures}

What else than convolutions is large and stays float, each with its reason in `model.lowbit_skipped` or in the report;
and the layers whose `.weight` is read, and dequantized each time:

{architectures_notes}

## Libraries

A tiny packed Llama, unless the row has a model of its own (`benchmarks/compatibility/libraries.py`);
rows of two processes run on gloo (`benchmarks/compatibility/processes.py`).

| library | {columns} |
| --- | {rule} |
{libraries}
"""


def names() -> Iterator[str]:
    yield from architectures.ROWS
    yield from libraries.ROWS
    yield from processes.ROWS


def examine(name: str) -> Found:
    if name in architectures.ROWS:
        return architectures.examine(architectures.ROWS[name])
    if name in processes.ROWS:
        return processes.examine(name)
    return libraries.examine(libraries.ROWS[name])


def missing(name: str) -> str | None:
    """What the row needs and is not installed, if anything."""
    if name in libraries.ROWS:
        return next((n for n in libraries.ROWS[name].needs if importlib.util.find_spec(n) is None), None)
    if name not in architectures.ROWS:
        return None
    import transformers

    model_class = architectures.ROWS[name].model_class
    return None if hasattr(transformers, model_class) else f"transformers with {model_class}"


def line(name: str, found: Found) -> str:
    """The row; notes stand in a line of their own behind it."""
    cells = [found.cells.get(column, NOTHING) for column in COLUMNS]
    if name in architectures.ROWS:
        row = architectures.ROWS[name]
        cells = [f"`{row.model_class}`", found.packed, *cells]
    row_line = f"| {' | '.join([name, *cells])} |"
    return "\n".join([row_line, f"- **{name}**: {'; '.join(found.notes)}"] if found.notes else [row_line])


def lines() -> dict[str, str]:
    """What the document says of each row, as :func:`line` does."""
    if not DOCUMENT.exists():
        return {}
    text = DOCUMENT.read_text()
    notes = dict(re.findall(r"^(?=- \*\*(.*?)\*\*)(.*)$", text, re.MULTILINE))
    rows = re.findall(r"^(?=\| (.*?) \|)(.*)$", text, re.MULTILINE)
    return {name: "\n".join([row, notes[name]] if name in notes else [row]) for name, row in rows}


def text(found: Mapping[str, str]) -> str:
    """The document with these lines."""
    parts = {"architectures": architectures.ROWS, "libraries": [*libraries.ROWS, *processes.ROWS]}
    fields: dict[str, object] = {"columns": " | ".join(COLUMNS), "rule": " | ".join("---" for _ in COLUMNS)}
    for part, rows in parts.items():
        lines, *_ = zip(*(found[name].split("\n") for name in rows), strict=False)
        cells = [cell for line in lines for cell in line.strip("| ").split(" | ")[-len(COLUMNS) :] if cell != NOTHING]
        fields[part] = "\n".join(lines)
        fields[f"{part}_notes"] = "\n".join(n for name in rows for n in found[name].split("\n")[1:])
        fields[f"{part}_cells"], fields[f"{part}_works"] = len(cells), cells.count("works")
    return TEXT.format(**fields)
