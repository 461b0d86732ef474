"""Bugs of csrc/cuda/codebook/experts.cuh and of what it asks of decode and batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from lowbit.testing import cuda_codebook, cuda_planted
from lowbit.testing.codebook_cases import Kind, Weight, random_weight
from lowbit.testing.cuda_planted.packed_experts import assert_right, some_ids
from lowbit.testing.packed_cases import DTYPES, activations

Bug = partial(cuda_planted.Bug, file="codebook/experts.cuh")
Rows = partial(cuda_planted.Bug, file="experts.cuh")

BUGS = (
    Bug("every expert has the codes of the first", 4, "one.tiles += row *", "one.tiles += 0 *"),
    Bug("codes of an expert begin where those of one bit would", 4, "(TILE * BITS / 8);\n    one.codebook",
        "(TILE / 8);\n    one.codebook"),
    Bug("every expert has the tables of the first", 4, "moved(codebook, row * table_row,", "moved(codebook, 0,"),
    Bug("every expert has the scales of the first", 4, "moved(scales, first_scale,", "moved(scales, 0,"),
    Bug("every expert has the largest values of the first", 4, "one.scale_absmax += first_scale / NESTED_BLOCK",
        "one.scale_absmax += 0"),
    Bug("every expert has the bias of the first", 4, "moved(bias, row, bias_dtype)", "bias"),
    Bug("every expert has the outliers of the first", 4, "moved(outlier_rows, row)", "outlier_rows"),
    Bug("an expert has the weight of the next", 4, "static_cast<int64_t>(expert) * N",
        "static_cast<int64_t>(expert + 1) * N"),
    Bug("decode multiplies a row too many", 4, "x, y, part.rows, w.N", "x, y, part.rows + 1, w.N"),
    Bug("batch multiplies a row too few", 4, "part.rows, w.N, w.K, w.group_size, w.bias_dtype",
        "part.rows - 1, w.N, w.K, w.group_size, w.bias_dtype"),
    Rows("blocks take the rows of W that tiles have numbers of", 4, "block_index() / tile_count",
         "block_index() % tile_count"),
    Rows("a result goes where its x is", 4, "load(order + m).y", "load(order + m).x"),
    Bug("decode copies the first rows of x", 4, "rows_of.of_x(m) * K + first + column),", "m * K + first + column),",
        file="decode.cuh"),
    Bug("outliers meet the first rows of x", 4, "rows_of.of_x(x_row) * K + column)", "int64_t(x_row) * K + column)",
        file="decode.cuh"),
)  # fmt: skip

# (E, N, K, group_size, T, r): few rows of many experts and many of few, groups that end in a chunk, N that fills no
# block, K that fills no tile
SHAPES = (
    (4, 5, 64, 32, 3, 2), (3, 33, 257, 64, 7, 1), (2, 9, 172, 7, 5, 4), (130, 2, 40, 40, 2, 3), (2, 7, 320, 128, 37, 2),
    (4, 5, 172, 7, 2, 2), (5, 4, 1048, 100, 40, 3), (3, 64, 128, 32, 5, 2), (2, 256, 40, 40, 20, 2),
)  # fmt: skip
KINDS = tuple((tables, scales) for tables in ("tensor", "row", "group") for scales in ("none", "float", "nested"))


def stack(
    bits: int, e: int, n: int, k: int, group_size: int, i: int, *, integers: bool = False, sparse: bool = True
) -> Weight:
    """A random stack ``[e*n, k]``; tables, scales, dtypes and outliers in rotation by ``i``."""
    tables, scales = KINDS[i % 9]
    if scales == "nested" and n * -(-k // group_size) % 256:
        scales = "float"  # an expert has whole blocks of nested scales
    outliers = max(1, e * n * k // 50) * (i // 2 % 2 and sparse)
    kind = Kind(bits, e * n, k, group_size, tables, scales, DTYPES[i % 3], DTYPES[i // 2 % 3], outliers)
    return random_weight(kind, i, integers=integers)


def check(kernels: Any, bits: int) -> int:
    """Compares a few cases of one width with float64; raises where one is wrong. The number of cases."""
    cases = 0
    for i, (e, n, k, group_size, tokens, repeats) in enumerate(SHAPES):
        for j in range(3):
            seed = 2 * i + 3 * j + (i + j) % 2
            if n * -(-k // group_size) % 256 == 0:
                seed = 2 + 3 * j  # nested
            weight = stack(bits, e, n, k, group_size, seed)
            x = activations(tokens, k, (torch.float16, torch.bfloat16)[(i + j) % 2])
            ids = some_ids(tokens * repeats, e, seed, (torch.int64, torch.int32)[(i + j) % 2])
            bias = None if (i + j) % 2 else activations(1, e * n, DTYPES[i % 3])[0]
            small = (163 << 10, 99 << 10)[j % 2]
            y = cuda_codebook.experts(weight, x, ids, e, bias, order=j % 2, of=kernels, shared_bytes=small)
            assert_right(y, cuda_codebook.multiplied(weight, x.dtype), x, ids, e, bias)
            cases += 1
    return cases
