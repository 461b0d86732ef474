"""Which configurations that ship went through which check, by what the checks say: ``docs/gpu_coverage.md``.

    python -m benchmarks.tools.coverage            what is missing, and whether the document is up to date
    python -m benchmarks.tools.coverage --write    write the document

A line is a family, a number of bits and a kind of activations; a cell names the regimes of M that passed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.parts import RESULTS, ROOT
from lowbit.backends.triton.launch import TARGETS, Launch, Target
from lowbit.core.family import dtype_name
from lowbit.testing import gpu_configurations as interpreted
from lowbit.testing.ptx_sample import SAMPLE

from .offline import FAMILIES, RECORD, RECORDED, Entries, complaints, fingerprint, read_record

DOCUMENT = ROOT / "docs" / "gpu_coverage.md"
RUN = "run on a GPU"
EXECUTED = "PTX executed"
INTERPRETED = "interpreted"
SHOWN = 20  # problems at most

Regime = int | str
# How a family's ``shipped`` names a matrix product
LABELS = {
    "packed": re.compile(r"packed_linear (?P<bits>\d)-bit .* (?P<kind>\w+) M=(?P<m>\d+)"),
    "codebook": re.compile(r"codebook_linear (?P<bits>\d)-bit .* (?P<kind>\w+) M=(?P<m>\d+)"),
    "kron": re.compile(r"linear .*, (?P<kind>\w+), (?:(?P<bits>\d)-bit|dense) factors, M=(?P<m>\d+)"),
}


class Line(NamedTuple):
    family: str
    bits: int
    kind: str  # of activations

    def __str__(self) -> str:
        return f"{self.family} {self.bits}-bit {self.kind}"


def is_recorded(line: Line) -> bool:
    """Whether the record should have a line's code; WHY_NOT says why not that of the others."""
    return line.family != "kron" or line.bits == 0 or (line.bits, line.kind) == (4, "float16")


WHY_NOT = """Of Kronecker factors, only dense ones
  and, for float16, those of 4 bits are compiled. The others run the same kernels; a code of 3, 5, 6 or 7 bits may end
  in the next word, which takes one more load."""

Cells = dict[Line, set[Regime]]
Table = dict[str, Cells]  # by check


# --- what there is to check ------------------------------------------------------------------------------------------


def lines() -> Iterator[Line]:
    for name, family in interpreted.FAMILIES.items():
        yield from (Line(name, bits, dtype_name(kind)) for bits in family.bits for kind in interpreted.KINDS)
    kinds = [kind for kind in interpreted.KINDS if kind != torch.int8]
    yield from (Line("kron", bits, dtype_name(kind)) for bits in interpreted.KRON_BITS for kind in kinds)


def regimes(line: Line, target: Target) -> list[Regime]:
    """The largest M of each row of ``tuned.json`` for a target, or ``"dense"``; of ``kron``, one row and many."""
    if line.family == "kron":
        return list(interpreted.KRON_REGIMES)
    kernel = interpreted.FAMILIES[line.family].kernel
    return [regime for regime, _ in interpreted.rows(target, kernel, getattr(torch, line.kind), line.bits)]


# --- what the checks say ---------------------------------------------------------------------------------------------


def of_cases(cases: Iterable[Any], target: Target) -> Cells:
    """The cells of the cases of lowbit/testing/gpu_configurations.py for a target."""
    common = {family.kernel for family in interpreted.FAMILIES.values()}
    found = [
        (Line(case.family, case.bits, dtype_name(case.kind)), case.regime)
        for case in cases
        if case.target == target.name and getattr(case, "kernel", "") in ("", *common)
    ]
    return gathered(found, target)


def gathered(found: Iterable[tuple[Line, Regime]], target: Target) -> Cells:
    """By line, what is a regime there."""
    cells: Cells = {}
    for line, regime in found:
        if regime in regimes(line, target):
            cells.setdefault(line, set()).add(regime)
    return cells


def parse(family: str, label: str) -> tuple[Line, int] | None:
    """(line, M) of a matrix product that ships; None for what is none."""
    match = LABELS[family].fullmatch(label)
    return match and (Line(family, int(match["bits"] or 0), match["kind"]), int(match["m"]))


def compiled(target: Target, entries: Entries, mark: Callable[[Launch, Target], str] = fingerprint) -> Cells:
    """What the record has the code of: every launch of every product that ships, with nothing to complain of."""
    sound = {entry["fingerprint"] for entry in entries.get(target.name, {}).values() if not complaints(entry)}
    planned, missing = [], set()
    for family in FAMILIES:
        for label, launches in importlib.import_module(f"lowbit.{family}.triton").shipped(target):
            product = parse(family, label)
            if product is not None:
                planned.append(product)
                if not all(mark(launch, target) in sound for launch in launches):
                    missing.add(product)
    return gathered((product for product in planned if product not in missing), target)


def executed() -> Cells:
    """Of the sample whose PTX is executed, (target, name in the record)."""
    cells: Cells = {}
    for target, name in SAMPLE:
        family, _, label = name.partition(" ")
        product = parse(family, label.rpartition(", launch ")[0])
        add(cells, gathered([product] if product else [], TARGETS[target]))
    return cells


def add(cells: Cells, more: Cells) -> None:
    for line, found in more.items():
        cells.setdefault(line, set()).update(found)


def run_on_gpus(results: Iterable[Path]) -> Cells:
    """Cases that passed on a GPU, by the results of ``python -m benchmarks.gpu`` whose tests all had time to run."""
    cells: Cells = {}
    for path in results:
        sections = json.loads(path.read_text())["sections"]
        tests, properties = sections.get("tests", {}), sections.get("machine", {}).get("properties", {})
        name = f"sm_{properties.get('major')}{properties.get('minor')}"
        if not tests.get("passed") or tests.get("left_out") or tests.get("errors") or name not in TARGETS:
            continue
        failed = [failure.partition("[")[2] for failure in tests["failures"] if "test_configurations" in failure]
        target = TARGETS[name]
        passed = [
            case
            for case in interpreted.configurations(target)
            if not any(failure.startswith(str(case)) for failure in failed)
        ]
        add(cells, of_cases(passed, target))
    return cells


def table(entries: Entries) -> Table:
    """Every check's cells."""
    cases = interpreted.configurations(*interpreted.PLANNED)
    return {
        INTERPRETED: of_cases(cases, interpreted.PLANNED[0]),
        **{f"compiled {name}": compiled(target, entries) for name, target in RECORDED.items()},
        EXECUTED: executed(),
        RUN: run_on_gpus(sorted(RESULTS.glob("gpu-*.json"))),
    }


def holes(checks: Table) -> Iterator[str]:
    """What should be interpreted or compiled, and is not."""
    for name, cells in checks.items():
        if name != INTERPRETED and not name.startswith("compiled "):
            continue
        target = TARGETS[name.removeprefix("compiled ")] if name != INTERPRETED else interpreted.PLANNED[0]
        for line in lines():
            if name != INTERPRETED and not is_recorded(line):
                continue
            for regime in regimes(line, target):
                # a dense product is the library's: what is compiled for it is not a matrix product
                if regime not in cells.get(line, ()) and not (regime == interpreted.DENSE and name != INTERPRETED):
                    yield f"{name}: {line}: M {shown(regime)}"


# --- the document ----------------------------------------------------------------------------------------------------


def shown(regime: Regime) -> str:
    if isinstance(regime, str):
        return regime
    return "1" if regime == 1 else "more" if regime == interpreted.LARGE else f"≤{regime}"


def cell(found: set[Regime]) -> str:
    return ", ".join(map(shown, sorted(found, key=lambda regime: (isinstance(regime, str), regime)))) or "–"


TEXT = """# What GPU kernels were checked by

Made by `python -m benchmarks.tools.coverage --write`. A test fails while it is out of date.

Each line is a family, a number of bits (0: dense factors) and the dtype of the activations. A cell names the regimes of
M, the rows of x, that a check covers:

- `≤16`: a row of `lowbit/backends/triton/tuned.json`, up to that M;
- `more`: without a limit;
- `dense`: a dense weight and the library's matrix product.

Kronecker products have no such table: their regimes are one row, and more.

Stacks of experts run the kernels of the products below with other rows. Their own checks are not in this table:
`tests/experts/test_triton.py` interprets every number of bits with every kind of activations, `compiled.json` has
`packed_experts` and `codebook_experts`, and some of these are executed as PTX.

The checks:

- **interpreted**: run in Triton's interpreter with the configurations of an H200 (sm_90), and compared with float64
  arithmetic: `tests/backends/triton/test_configurations.py`. What is cut differently for other targets runs at one
  number of bits for each kind of activations.
- **compiled**: `benchmarks/tools/compiled.json`, {record}, has the code of every launch,
  without spills and with tensor-core instructions. {why_not}
- **PTX executed**: a sample is compiled for a GPU and executed instruction by instruction on a CPU:
  `tests/backends/triton/test_ptx.py`.
- **run on a GPU**: passed by `make gpu-check`, by its results in `benchmarks/results`.

{table}
"""


def document(checks: Table, made_with: str) -> str:
    """The document; ``made_with``: the version of Triton that made the record, or nothing where there is none."""
    head = ["family", "bits", "activations", *checks]
    rows = [head, ["---"] * len(head)]
    rows += [[*map(str, line), *(cell(found.get(line, set())) for found in checks.values())] for line in lines()]
    return TEXT.format(
        record=f"made with Triton {made_with}" if made_with else "still to be written",
        why_not=WHY_NOT,
        table="\n".join(f"| {' | '.join(row)} |" for row in rows),
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tools.coverage", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write docs/gpu_coverage.md")
    options = parser.parse_args(arguments)
    made_with, entries = read_record() if RECORD.exists() else ("", {})
    checks = table(entries)
    text = document(checks, made_with)
    if options.write:
        DOCUMENT.write_text(text)
    problems = [hole for hole in holes(checks) if made_with or hole.startswith(INTERPRETED)]
    if not DOCUMENT.exists() or DOCUMENT.read_text() != text:
        problems.append(f"{DOCUMENT.relative_to(ROOT)} is out of date: python -m benchmarks.tools.coverage --write")
    print(*problems[:SHOWN], *["..."] * (len(problems) > SHOWN), f"{len(problems)} problems", sep="\n")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
