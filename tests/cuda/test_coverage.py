"""``docs/results/cuda_coverage.md``: made by its tool, and right about what the library declines."""

from __future__ import annotations

import pytest
import torch

from benchmarks.tools import cuda_coverage
from benchmarks.tools.cuda_coverage import ANY, FEW, INT8, MORE, Line
from lowbit.testing import codebook_cases, cuda_codebook, cuda_emulated, kron_cases, packed_cases, verdicts
from lowbit.testing.cuda_planted.packed_decode import some_formats

MOST_BYTES = 227 << 10  # of shared memory


def test_the_document_is_what_the_tool_gives():
    command = "python -m benchmarks.tools.cuda_coverage --write"
    assert cuda_coverage.DOCUMENT.read_text(encoding="utf-8") == cuda_coverage.document(), command


def test_a_hole_is_shown(monkeypatch):
    line = Line("packed", "linear", "codes", FEW, "float16", 4)
    (kernel,) = cuda_coverage.kernels(line)
    assert cuda_coverage.checked(cuda_coverage.CHECKS[kernel.name][1], line) == "yes"
    assert cuda_coverage.checked(cuda_coverage.CHECKS[kernel.name][1], line._replace(bits=9)) == "–"
    assert cuda_coverage.checked(cuda_coverage.CHECKS[kernel.name][1], line._replace(rows=MORE)) == "–"
    record = cuda_coverage.read_record(kernel)
    assert cuda_coverage.recorded(kernel, line) == "80, 89, 90a, 100, 120"
    record["entries"]["sm_89"]["4-bit float16 M<=8"]["spills"] = 8
    del record["entries"]["sm_100"]["4-bit float16 M<=16"]
    monkeypatch.setattr(cuda_coverage, "read_record", lambda kernel: record)
    assert cuda_coverage.recorded(kernel, line) == "80, 90a, 120"


def answer(line: Line) -> str | None:
    """Why the emulated library declines a call; None: it ran it."""
    m, int8 = (1 if line.rows == FEW else 17), line.x == INT8
    dtype, bits = torch.float16 if int8 else getattr(torch, line.x), line.bits
    options = dict(shared_bytes=MOST_BYTES, int8=int8)
    try:
        if line.family == "packed":
            weight = packed_cases.random_weight(next(some_formats(bits, 5, 64, 32)))
            if line.op == "experts":
                ids = torch.tensor([0, 4, 5, 1])
                cuda_emulated.packed_experts(weight, packed_cases.activations(2, 64, dtype), ids, 5)
            elif line.rows == ANY:
                cuda_emulated.packed_rows(weight, None, dtype)
            else:
                cuda_emulated.packed_linear(weight, packed_cases.activations(m, 64, dtype), **options)
        elif line.family == "codebook":
            tables = {"one table": "tensor", "a table per row": "row", "a table per group": "group"}[line.weight]
            coded = codebook_cases.random_weight(codebook_cases.Kind(bits, 5, 64, 32, tables))
            if line.op == "experts":
                ids = torch.tensor([0, 4, 5, 1])
                cuda_codebook.experts(coded, packed_cases.activations(2, 64, dtype), ids, 5)
            elif line.rows == ANY:
                cuda_codebook.rows(coded, None, dtype)
            else:
                cuda_codebook.linear(coded, packed_cases.activations(m, 64, dtype), **options)
        else:
            factor = kron_cases.Kind(torch.float16, bits)
            product = kron_cases.random_weight((1, 3, 4, 5, 6), factor, factor)
            if line.rows == ANY:
                cuda_emulated.kron_rows(product, None, dtype)
            else:
                cuda_emulated.kron_linear(product, packed_cases.activations(m, product.k, dtype))
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.skipif(cuda_emulated.why_not() is not None, reason=f"not built: {cuda_emulated.why_not()}")
def test_the_library_takes_what_the_document_says(request):
    for line in cuda_coverage.lines():
        if verdicts.in_turn(request.config, line.bits, 8):
            assert answer(line) is None, line
