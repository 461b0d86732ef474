"""Which CUDA C++ kernel takes which call, and what checked it: ``docs/results/cuda_coverage.md``.

    python -m benchmarks.tools.cuda_coverage            whether the document is up to date
    python -m benchmarks.tools.cuda_coverage --write    write it

Kernels come from ``cuda_kernels.py``, compiled code from ``cuda_records``, checks from the lists that the tests use.
"""

from __future__ import annotations

import argparse
import json
import runpy
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from .cuda_compiled import read_record
from .cuda_kernels import FLOATS, HALVES, KERNELS, ROOT, WIDTHS, Instance, Kernel

DOCUMENT = ROOT / "docs" / "results" / "cuda_coverage.md"
TEMPLATE = ROOT / "benchmarks" / "tools" / "cuda_coverage.template.md"
DISPATCH = ROOT / "lowbit" / "backends" / "cuda" / "dispatch.json"
INT8, FEW, MORE, ANY = "int8", "1–16", "more", "any"
WEIGHTS = {
    "packed": ("codes",), "codebook": ("one table", "a table per row", "a table per group"),
    "kron": ("dense factors", "packed factors"),
}  # fmt: skip


class Line(NamedTuple):
    """A kind of call. ``x``: the dtype of the activations, or of an embedding's rows. ``bits``: 0 of dense factors."""

    family: str
    op: str
    weight: str
    rows: str  # of x
    x: str
    bits: int


# By kernel, what its tests in tests/cuda run, emulated and as PTX: a module, and the names of its lists of bits
# (-: dense factors), dtypes and rows of x (-: an embedding).
CHECKS = {
    "packed_decode": ("test_emulated BITS DTYPES ROWS; test_emulated BITS FLOAT32 FLOAT32_ROWS",
                      "test_compiled WIDTHS HALVES ROWS; test_compiled WIDTHS FLOAT32 FLOAT32_ROWS"),
    "packed_decode_int8": ("test_int8 BITS DTYPES ROWS", "test_int8 WIDTHS DTYPES PTX_ROWS"),
    "packed_batch_int8": ("test_int8 BITS DTYPES MORE_ROWS", "test_int8 WIDTHS DTYPES MORE_PTX_ROWS"),
    "packed_batch": ("test_emulated_batch BITS DTYPES ROWS", "test_compiled_batch WIDTHS DTYPES ROWS"),
    "packed_batch_sm90": ("", "test_batch_sm90 WIDTHS DTYPES ROWS"),
    "packed_experts": ("test_experts WIDTHS DTYPES -", "test_experts COMPILED DTYPES -"),
    "packed_gather": ("test_rows WIDTHS DTYPES -", "test_rows WIDTHS DTYPES -"),
    "codebook_decode": ("test_codebook BITS DTYPES ROWS", "test_codebook BITS DTYPES PTX_ROWS"),
    "codebook_decode_simt": ("test_codebook_simt BITS FLOAT32 ROWS; test_codebook_simt HALF_BITS HALVES HALF_ROWS",
                             "test_codebook_simt BITS FLOAT32 FLOAT32_PTX_ROWS; "
                             "test_codebook_simt HALF_BITS HALVES PTX_ROWS"),
    "codebook_linear_int8": ("test_codebook_int8 BITS DTYPES ROWS", "test_codebook_int8 BITS DTYPES PTX_ROWS"),
    "codebook_batch": ("test_codebook_batch WIDTHS DTYPES ROWS", "test_codebook_batch WIDTHS DTYPES PTX_ROWS"),
    "codebook_batch_sm90": ("", "test_codebook_sm90 WIDTHS DTYPES ROWS"),
    "codebook_experts": ("test_codebook_experts WIDTHS DTYPES -", "test_codebook_experts WIDTHS DTYPES -"),
    "codebook_gather": ("test_codebook BITS FLOATS -", "test_codebook BITS FLOATS -"),
    "kron_fused": ("test_kron - DTYPES ROWS; test_kron BITS DTYPES PACKED_ROWS",
                   "test_kron - DTYPES PTX_ROWS; test_kron PTX_BITS DTYPES PTX_ROWS"),
    "kron_gather": ("test_kron_rows - DTYPES -; test_kron_rows BITS DTYPES -",
                    "test_kron_rows - DTYPES -; test_kron_rows BITS DTYPES -"),
}  # fmt: skip


@cache
def names_of(module: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "tests" / "cuda" / f"{module}.py"))


def checked(checks: str, line: Line) -> str:
    """Whether one of the checks runs a call."""
    for module, *lists in map(str.split, filter(None, checks.split(";"))):
        bits, dtypes, rows = (() if name == "-" else names_of(module)[name] for name in lists)
        regimes = {FEW if m <= 16 else MORE for m in rows if m} or {ANY}
        known = line.x == INT8 or f"torch.{line.x}" in map(str, dtypes)  # x of any dtype becomes int8
        if line.bits in (bits or (0,)) and known and line.rows in regimes:
            return "yes"
    return "–"


def lines() -> Iterator[Line]:
    for family, weights in WEIGHTS.items():
        for weight in weights:
            bits = (0,) if weight == "dense factors" else WIDTHS[1:] if family == "kron" else WIDTHS
            for rows in (FEW, MORE):  # a Kronecker product has no int8 activations
                for x in FLOATS if family == "kron" else (*FLOATS, INT8):
                    yield from (Line(family, "linear", weight, rows, x, b) for b in bits)
            yield from (Line(family, "embedding, dequantize", weight, ANY, x, b) for x in FLOATS for b in bits)
            if family != "kron":  # a loop over experts
                floats = FLOATS if family == "packed" else HALVES
                yield from (Line(family, "experts", weight, ANY, x, b) for x in floats for b in bits)


def instances(kernel: Kernel, line: Line) -> list[Instance]:
    """Those that run a call. ``kron_fused`` is compiled for operands that factors and x of any dtype become."""
    every = [one for one in kernel.instances().values() if one.values.get("bits", line.bits) == line.bits]
    any_dtype = kernel.name == "kron_fused" or line.x == INT8
    return [one for one in every if any_dtype or one.values["dtype"] == line.x]


def kernels(line: Line) -> list[Kernel]:
    """Those that take a call; of two, the GPU and the shape decide. Rows of float32 decode takes 8 at a time."""
    stages = {FEW: ("decode", "fused"), MORE: ("batch_sm90", "batch", "fused"), ANY: ("gather",)}[line.rows]
    if line.op == "experts":
        stages = ("experts",)
    elif line.x == INT8:
        stages = ("linear_int8",) if line.family == "codebook" else tuple(f"{stage}_int8" for stage in stages)
    elif line.weight == "a table per group" and line.rows != ANY:
        few = ("decode",) if line.bits <= 4 else ("decode_simt",)
        stages = few if line.rows == FEW else ("batch",)
    for some in (stages, ("decode",), ("decode_simt",)):
        named = [KERNELS[name] for name in (f"{line.family}_{stage}" for stage in some) if name in KERNELS]
        if found := [kernel for kernel in named if instances(kernel, line)]:
            return found
    raise ValueError(f"no kernel is compiled for {line}")


def recorded(kernel: Kernel, line: Line) -> str:
    """The architectures whose every instance for a call is in the record and spills nothing."""
    labels, sound = {one.label for one in instances(kernel, line)}, []
    for architecture, entries in read_record(kernel)["entries"].items():
        if labels <= {label for label, entry in entries.items() if entry["spills"] == 0}:
            sound.append(architecture.removeprefix("sm_"))
    return ", ".join(sound) or "–"


def by_default(line: Line, kernel: Kernel) -> str:
    """Which backend takes a call that a kernel takes too."""
    rows = json.loads(DISPATCH.read_text(encoding="utf-8"))["rows"]
    op = f"{line.family}_{'experts' if line.op == 'experts' else 'linear'}"
    mine = [row for row in rows if row["op"] == op and line.x in row["dtypes"]]
    on_sm90 = kernel.architectures == ("sm_90a",)
    limits = [row["most_rows"] for row in mine if on_sm90 or "architectures" not in row]
    if line.op == "embedding, dequantize" or any(most < 0 or (line.rows == FEW and most >= 16) for most in limits):
        return "CUDA C++"
    most = max(limits)
    return "Triton: `dispatch.json`" if most <= 16 else f"CUDA C++ up to {most}, then Triton: `dispatch.json`"


def table() -> list[list[str]]:
    """Lines that differ in bits alone are one; then those that differ in x alone, then in the weight alone."""
    bits_of: dict[tuple[str, ...], list[int]] = {}
    for line in lines():
        for kernel in kernels(line):
            marks = [*(checked(some, line) for some in CHECKS[kernel.name]), recorded(kernel, line), "not yet"]
            bits_of.setdefault((*line[:5], kernel.name, by_default(line, kernel), *marks), []).append(line.bits)
    rows = []
    for row, bits in bits_of.items():
        whole = len(bits) > 2 and bits == [*range(bits[0], bits[-1] + 1)]
        rows.append([*row[:3], f"{bits[0]}–{bits[-1]}" if whole else ", ".join(map(str, bits)), *row[3:]])
    for column in (5, 2):  # x, weight
        merged: dict[tuple[str, ...], list[str]] = {}
        for row in rows:
            merged.setdefault((*row[:column], *row[column + 1 :]), []).append(row[column])
        rows = [[*key[:column], ", ".join(values), *key[column:]] for key, values in merged.items()]
    return rows


def document() -> str:
    text = "\n".join(f"| {' | '.join(row)} |" for row in table())
    return TEMPLATE.read_text(encoding="utf-8").replace("TABLE", text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tools.cuda_coverage")
    parser.add_argument("--write", action="store_true", help="write docs/results/cuda_coverage.md")
    if parser.parse_args(arguments).write:
        DOCUMENT.write_text(document(), encoding="utf-8")
    current = DOCUMENT.is_file() and DOCUMENT.read_text(encoding="utf-8") == document()
    print("up to date" if current else "out of date: python -m benchmarks.tools.cuda_coverage --write")
    return 0 if current else 1


if __name__ == "__main__":
    raise SystemExit(main())
