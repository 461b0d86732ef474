"""Bugs of csrc/cuda/codebook/gather.cuh and of csrc/cuda/gather.cuh, which it shares."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from lowbit.testing import cuda_codebook, cuda_planted
from lowbit.testing.codebook_cases import Weight, kinds, random_weight
from lowbit.testing.numerics import assert_bitwise_equal
from lowbit.testing.packed_cases import DTYPES

Bug = partial(cuda_planted.Bug, file="codebook/gather.cuh")
Shared = partial(cuda_planted.Bug, file="gather.cuh")

BUGS = (
    Bug("rows have the tables of the next one", 4, "{n * table_row +", "{(n + 1) * table_row +"),
    Bug("groups have the table of the first", 3, "+ group * table_group", "+ 0 * table_group"),
    Bug("groups have the scale of the first", 4, "scales.at(n * groups + group)", "scales.at(n * groups)"),
    Bug("entries are not scaled", 5, "group.table + code), group.scale);", "group.table + code), 1.0f);"),
    Bug("a row that is not there has the first table", 4, "if (group.table < 0) return not_a_number();", ""),
    Bug("a table of rows is that of groups", 4, "int64_t(1) << w.bits : w.G << w.bits",
        "w.G << w.bits : w.G << w.bits", file="codebook/stored.h"),
    Bug("scales are rounded once with their offset", 4,
        "return multiply(load(codebook + code), load(absmax + i / 256)) + load(offset);",
        "return fused_multiply_add(load(codebook + code), load(absmax + i / 256), load(offset));",
        file="codebook/stored.h"),
    Bug("nested scales have no offset", 6, "load(absmax + i / 256)) + load(offset)", "load(absmax + i / 256))",
        file="codebook/stored.h"),
    Bug("float16 tables are read as bfloat16", 7, "static_cast<int>(w.codebook_dtype)",
        "3 - (w.codebook_dtype == DType::f32) * 2", file="codebook/gather.cu"),
    Shared("an id of N is followed", 4, "n >= 0 && n < c.N", "n >= 0 && n <= c.N"),
    Shared("an id of 64 bits is cut to 32", 4, "load(static_cast<const int64_t*>(c.ids) + i)",
        "static_cast<int>(load(static_cast<const int64_t*>(c.ids) + i))"),
    Shared("half of the threads of float32 write the others' columns", 4, "LANES == 4 && sharer % 2)",
        "LANES == 4 && sharer % 4 == 1)"),
    Shared("a group that ends among a vector's columns is not seen", 5, "end < c.K && end < column + LANES",
        "end < c.K && end < column"),
    Shared("a new group keeps what the last one had", 4, "number = c.by_group.quotient(column);\n        group =",
        "number = c.by_group.quotient(column);\n        if (number == 0) group ="),
    Shared("outliers are written before what they replace", 4, "barrier();  // what is written once more", "// "),
    Shared("outliers are taken from the row of `out`", 4, "load(c.outlier_rows + row) + lane",
        "load(c.outlier_rows + i) + lane"),
    Shared("an outlier replaces what it is added to", 8, "value_at(row, column) + outlier", "outlier"),
)  # fmt: skip

# (N, K, group_size or None): groups that end inside vectors, and in the last one; rows of several tiles and blocks;
# nested scales of several blocks of 256
SHAPES = ((33, 257, 64), (13, 172, 32), (9, 172, 7), (17, 96, None), (5, 2056, 128), (40, 104, 7))


def expected(weight: Weight, ids: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The float32 of the definition (exact in the float64 that holds it), rounded once; NaN where there is no row."""
    dense = weight.dense().float().to(dtype)
    if ids is None:
        return dense
    known = (ids >= 0) & (ids < len(dense))
    found = dense[torch.where(known, ids, 0).long()]
    found[~known] = torch.nan
    return found


def check(kernels: Any, bits: int) -> int:
    """Compares a few cases of one width bit for bit; raises where one is wrong. The number of cases."""
    cases = 0
    for i, shape in enumerate(SHAPES):
        for j, kind in enumerate(kinds(bits, *shape)):
            weight, n = random_weight(kind, i), shape[0]
            ids = torch.tensor([n - 1, 0, n, -1, n // 2, 2**32 + 1, n - 1, -(2**40)])
            given = (None, ids, ids.clamp(-2, n + 1).int())[(i + j) % 3]
            dtype = DTYPES[(i + j // 2) % 3]
            found = cuda_codebook.rows(weight, given, dtype, order=j % 2, of=kernels)
            assert_bitwise_equal(found, expected(weight, given, dtype))
            cases += 1
    return cases
