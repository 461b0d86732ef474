"""Every configuration that ships, run, and compared with float64 arithmetic on the exactly dequantized weight.

The cases are in :mod:`lowbit.testing.gpu_configurations`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit
from lowbit.backends.triton.launch import collecting
from lowbit.testing import kron_cases
from lowbit.testing.gpu_configurations import (
    FAMILIES,
    KINDS,
    WAYS,
    WHERE,
    Case,
    configurations,
    families,
    here,
    is_int8,
    kron_plans,
)
from lowbit.testing.mistakes import Mistake, plant
from lowbit.testing.numerics import assert_bitwise_equal
from lowbit.testing.packed_cases import activations
from lowbit.testing.where import running

# --------------------------------------------------------------------------------------------------------- the check


def check_rows_alone(family: str, bits: int, kind: torch.dtype, scales: str, *, invariant: bool = True) -> None:
    """A row of x alone gives the bits that it gives in a batch of several blocks, of a K that can be split often."""
    k = 8 * 256 + 44
    weight = FAMILIES[family].weights[scales](bits, 23, k, kind, bits)
    x = activations(67, k, torch.float16 if is_int8(kind) else kind)
    with running(WHERE[0]), lowbit.batch_invariant(invariant):
        y = weight.linear(x, int8=is_int8(kind))
        assert_bitwise_equal(weight.linear(x[66:], int8=is_int8(kind)), y[66:])


PACKED, CODEBOOK, KRON = (f"lowbit.{family}.triton" for family in ("packed", "codebook", "kron"))
# of the kernel that multiplies codes: another one makes each weight first
BOUNDS = "DTYPE)\n\n    begin = (part * tiles) // SPLIT\n    end = ((part + 1) * tiles) // SPLIT"
OPS = ("lowbit.packed.op", "lowbit.codebook.op", "lowbit.kron.op")
pytestmark = pytest.mark.recorded("lowbit.backends", PACKED, CODEBOOK, KRON, *OPS)
needs_triton = pytest.mark.skipif(not WHERE, reason="the backend triton runs neither here nor in its interpreter")


@needs_triton
@pytest.mark.parametrize("case", configurations(*here()), ids=str)
def test_configuration(case: Case) -> None:
    case.check()


ROWS_ALONE = [
    (family, bits, KINDS[i % 4], list(FAMILIES[family].weights)[i // 2 % 2])
    for family in families()
    for i, bits in enumerate(FAMILIES[family].bits)
]


@needs_triton
@pytest.mark.parametrize(("family", "bits", "kind", "scales"), ROWS_ALONE, ids=str)
def test_a_row_alone_is_the_row_of_a_batch(family: str, bits: int, kind: torch.dtype, scales: str) -> None:
    check_rows_alone(family, bits, kind, scales)


@needs_triton
def test_a_row_alone_is_the_row_of_a_batch_of_kron() -> None:
    weight = kron_cases.random_weight((1, 2, 1, 70, 1500), *[kron_cases.Kind(torch.float16)] * 2)
    x = activations(40, weight.k, torch.float16)
    with running(WHERE[0]), lowbit.batch_invariant():
        y = weight.linear(x)
        for row in range(3):
            assert_bitwise_equal(weight.linear(x[row : row + 1]), y[row : row + 1])


# ------------------------------------------------------------------------------------------------- planted mistakes


BLOCKS, ROWS = "lowbit.backends.triton.codes", "lowbit.backends.triton.activations"


def of(family: str, condition: Callable[[Any], bool] = lambda case: True) -> Callable[[Any], bool]:
    """Whether a case belongs to the family, takes its common kernel and fulfils the condition."""
    names = (family, FAMILIES[family].kernel if family in FAMILIES else None)
    return lambda case: (case.family, getattr(case, "kernel", None)) == names and condition(case)


MISTAKES = {
    "a shift by one bit too many": Mistake(
        BLOCKS, "CHUNK % fields(W0) * W0, W0, 0, PTX)", "CHUNK % fields(W0) * W0 + 1, W0, 0, PTX)",
        of("packed", lambda case: case.bits == 4 and not case.config.dense),
    ),
    "a plane left out": Mistake(
        BLOCKS, "codes = field(third, codes,", "field(third, codes,", of("packed", lambda case: case.bits == 7)
    ),
    "a float zero point taken for the nearest integer": Mistake(
        PACKED, "(center.to(tl.float32) - zero)", "(center - center)",
        of("packed", lambda case: case.scales == "per row, float zeros" and not case.config.dense),
    ),
    "parts of K that begin a tile late": Mistake(
        PACKED, BOUNDS, BOUNDS.replace("begin = (part * tiles) // SPLIT", "begin = (part * tiles) // SPLIT + 1"),
        of("packed", lambda case: case.config.split > 1),
    ),
    "bounds of a part exchanged": Mistake(
        PACKED, BOUNDS, BOUNDS.replace("begin =", "last =").replace("end =", "begin =").replace("last =", "end ="),
        of("packed", lambda case: not case.config.dense),
    ),
    "a last group with the scale of the one before": Mistake(
        PACKED, "* 32 // GROUP_SIZE, groups - 1)", "* 32 // GROUP_SIZE, groups - 2)",
        of("packed", lambda case: case.scales == "group 128" and not case.config.dense),
    ),
    "a part of K not added": Mistake(
        ROWS, "for p in tl.static_range(PARTS):", "for p in tl.static_range(PARTS - 1):",
        of("packed", lambda case: case.config.split > 1),
    ),
    "an outlier without its sign": Mistake(
        BLOCKS, "value[:, :, None] * x", "tl.abs(value)[:, :, None] * x",
        of("packed", lambda case: case.scales == "group 128, outliers" and not case.config.dense),
    ),
    "a piece of a float32 left out": Mistake(
        BLOCKS, "sums = tl.dot(weights, middle, sums)", "pass", of("packed", lambda case: case.kind == torch.float32)
    ),
    "activations quantized to 255 steps": Mistake(
        ROWS, "* 127.0\n", "* 127.5\n", of("packed", lambda case: is_int8(case.kind))
    ),
    "a dense weight with the scale of its first group": Mistake(
        PACKED, "+ group\n    scale = tl.load(scales_ptr + at)", "+ group\n    scale = tl.load(scales_ptr)",
        of("packed", lambda case: case.config.dense),
    ),
    "one table for all rows": Mistake(
        CODEBOOK, "table = codebook_ptr + _table(n_row,", "table = codebook_ptr + _table(n_row * 0,",
        of("codebook", lambda case: case.scales == "row" and case.kind == torch.float16 and not case.config.dense),
    ),
    "the lower bytes of 16-bit weights 128 too small": Mistake(
        CODEBOOK, "low_products.to(tl.int64) + 128 *", "low_products.to(tl.int64) + 0 *",
        of("codebook", lambda case: is_int8(case.kind)),
    ),
    "a group with the scale of the next": Mistake(
        CODEBOOK, "at = n_row[:, None] * groups + group\n", "at = n_row[:, None] * groups + groups - 1\n",
        of("codebook", lambda case: case.scales == "tensor" and case.kind == torch.bfloat16 and not case.config.dense),
    ),
    "a sum of Kronecker products without its last": Mistake(
        KRON, "for start in range(0, q_columns, BLOCK_K):", "for start in range(0, q_columns - BLOCK_K, BLOCK_K):",
        of("kron", lambda case: case.way in ("a sum", "two launches")),
    ),
    "rows of a factor exchanged": Mistake(
        KRON, "row = q_row + nq.to(tl.int64)", "row = q_row + (nq ^ 1).to(tl.int64)",
        of("kron", lambda case: case.way == "a sum"),
    ),
    "one term for all": Mistake(
        KRON, "p_ptr, p_scales_ptr, p_zeros_ptr, (term * p_rows + np)", "p_ptr, p_scales_ptr, p_zeros_ptr, (np)",
        of("kron", lambda case: case.way == "a matrix product of each row"),
    ),
}  # fmt: skip


@needs_triton
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_planted_mistake_is_noticed(mistake: Mistake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spoiled = [case for case in configurations(*here()) if mistake.spoils(case)]
    if not spoiled:
        pytest.skip("the family has no Triton kernels")
    case = spoiled[0]
    plant(mistake, [f"lowbit.{case.family}.triton"], monkeypatch, tmp_path)
    with pytest.raises(AssertionError, match=r"error .* > bound|elements differ"):
        case.check()


@needs_triton
def test_rows_that_depend_on_their_batch_are_noticed() -> None:
    with pytest.raises(AssertionError, match="elements differ"):
        check_rows_alone("packed", 4, torch.float32, "per row", invariant=False)


@needs_triton
@pytest.mark.skipif(bool(WHERE) and WHERE[0].device == "cuda", reason="the interpreter's launches are looked at")
@pytest.mark.parametrize("way", WAYS)
def test_a_way_is_the_one_it_is_called(way: str) -> None:
    cases_of_way = [case for case in kron_plans(here()) if case.way == way]
    assert cases_of_way
    for case in cases_of_way:
        weight = case.weight()
        with case.planning(), collecting() as launches:
            torch.ops.lowbit.kron_linear(case.activations(weight.k), bias=None, **weight.arguments)
        assert launches[-1].kernel.fn.__name__ == WAYS[way].kernel
