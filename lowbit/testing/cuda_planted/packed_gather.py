"""Bugs of csrc/cuda/packed/gather.cuh and of csrc/cuda/gather.cuh, which it shares."""

from __future__ import annotations

from typing import Any

import torch

from lowbit.testing import cuda_emulated
from lowbit.testing.cuda_planted import Bug
from lowbit.testing.cuda_planted.packed_decode import some_formats
from lowbit.testing.numerics import assert_bitwise_equal
from lowbit.testing.packed_cases import DTYPES, Weight, random_weight

GATHER = "gather.cuh"
BUGS = (
    Bug("an id of N is followed", 4, "n >= 0 && n < c.N", "n >= 0 && n <= c.N", GATHER),
    Bug("a negative id is followed", 4, "n >= 0 && n < c.N", "n < c.N", GATHER),
    Bug("an id of 64 bits is cut to 32", 4, "load(static_cast<const int64_t*>(c.ids) + i)",
        "static_cast<int>(load(static_cast<const int64_t*>(c.ids) + i))", GATHER),
    Bug("half of the threads of float32 write the others' columns", 4, "LANES == 4 && sharer % 2)",
        "LANES == 4 && sharer % 4 == 1)", GATHER),
    Bug("a quotient is rounded down too far", 5, "(numerator + divisor - 1) / divisor", "numerator / divisor",
        "division.h"),
    Bug("a group that ends among a vector's columns is not seen", 5, "end < c.K && end < column + LANES",
        "end < c.K && end < column", GATHER),
    Bug("a group begins one column late", 5, "end = (number + 1) * c.group_size",
        "end = (number + 1) * c.group_size + 1", GATHER),
    Bug("a new group keeps the last one's scale", 4, "number = c.by_group.quotient(column);\n        group =",
        "number = c.by_group.quotient(column);\n        if (number == 0) group =", GATHER),
    Bug("the zero of symmetric formats is one too low", 3, "static_cast<float>(1 << (BITS - 1))",
        "static_cast<float>((1 << (BITS - 1)) - 1)", "packed/gather.cuh"),
    Bug("one code's field is looked for at the wrong bit", 6, "chunk % fields * width &", "chunk % fields &", GATHER),
    Bug("the plane of two bits begins a part early", 6, "code |= field(2, 2) << 4", "code |= field(1, 2) << 4", GATHER),
    Bug("the plane of one bit begins at the wrong lane", 7, "64 * (BITS / 2) + lane", "64 * (BITS / 2) + lane / 2",
        GATHER),
    Bug("columns past K are written", 4, "if (column >= c.K) break;", "if (column > c.K) break;", GATHER),
    Bug("elements past K are written", 4, "if (column + j < c.K) store_element(at + j, w[j]);",
        "store_element(at + j, w[j]);", GATHER),
    Bug("tiles past the last one are written", 4, "units - first_unit < UNITS ?", "units < 0 ?", GATHER),
    Bug("vectors are stored where rows begin anywhere", 4, "call.weight.K * element_size(call.dtype) % 16 == 0 &&", "",
        "gather.h"),
    Bug("outliers are written before what they replace", 4, "barrier();  // what is written once more", "// ", GATHER),
    Bug("outliers of a row after the first are left out", 4, "i * tile_count < end_unit; i += THREADS / 32",
        "i * tile_count < end_unit; i += THREADS", GATHER),
    Bug("outliers are taken from the row of `out`", 4, "load(c.outlier_rows + row) + lane",
        "load(c.outlier_rows + i) + lane",
        GATHER),
    Bug("an outlier replaces what it is added to", 4, "value_at(row, column) + outlier", "outlier", GATHER),
)  # fmt: skip

# (N, K, group_size or None): groups that end inside vectors, and in the last one; rows of several tiles and blocks
SHAPES = ((33, 257, 64), (13, 172, 32), (9, 172, 7), (17, 96, None), (5, 2056, 128), (4, 1000, 100))


def expected(weight: Weight, ids: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The float32 of the definition (exact in the float64 that holds it), rounded once; NaN where there is no row."""
    dense = weight.dense().float().to(dtype)
    if ids is None:
        return dense
    known = (ids >= 0) & (ids < len(dense))
    rows = dense[torch.where(known, ids, 0).long()]
    rows[~known] = torch.nan
    return rows


def check(kernels: Any, bits: int) -> int:
    """Compares a few cases of one width bit for bit; raises where one is wrong. The number of cases."""
    cases = 0
    for i, shape in enumerate(SHAPES):
        for j, found in enumerate(some_formats(bits, *shape)):
            weight, n = random_weight(found, i), shape[0]
            ids = torch.tensor([n - 1, 0, n, -1, n // 2, 2**32 + 1, n - 1, -(2**40)])
            given = (None, ids, ids.clamp(-2, n + 1).int())[(i + j) % 3]
            dtype = DTYPES[(i + j // 2) % 3]
            rows = cuda_emulated.packed_rows(weight, given, dtype, order=j % 2, of=kernels)
            assert_bitwise_equal(rows, expected(weight, given, dtype))
            cases += 1
    return cases
