"""Bugs planted in ``csrc/cuda/codebook/decode_simt.cuh`` and its launches."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from lowbit.testing import cuda_codebook, cuda_planted
from lowbit.testing.codebook_cases import kinds, random_weight
from lowbit.testing.numerics import assert_linear_close
from lowbit.testing.packed_cases import activations

Bug = partial(cuda_planted.Bug, file="codebook/decode_simt.cuh")

BUGS = (
    Bug("both codes of a pair are the first", 4, ">> 16 * (i % 2) & 0xFFFF)", "& 0xFFFF)"),
    Bug("codes are those of another part of the plane", 4, "chunk / FIELDS == part", "chunk / FIELDS <= part"),
    Bug("codes of six bits lack their upper two", 6, "if constexpr (BITS == 6 || BITS == 7) above", "if (false) above"),
    Bug("row g + 8 has the codes of row g", 3, "codes_at(w[i / 2], chunk,", "codes_at(w[0], chunk,"),
    Bug("the second four columns have the codes of the first", 5, "first / 2 + i % 2)", "i % 2)"),
    Bug("the copies of an entry overlap those of the next", 4, "4 * s.lane + 128 * code", "4 * s.lane + 64 * code"),
    Bug("half of the table is stored", 8, "i < table_end / 16;", "i < table_end / 32;"),
    Bug("x lies where the table is", 4, "slices = {x, M, K, table_end,", "slices = {x, M, K, 0,"),
    Bug("every row has the table of the first", 2, "s.row[half]) * table_row", "0) * table_row"),
    Bug("every group has the table of the first", 7, "static_cast<int64_t>(group) * table_group", "0 * table_group"),
    Bug("entries are not rounded to the dtype of x", 8, "value_of<T>(rounded_to<T>(entry))", "entry"),
    Bug("entries are found as if they had two bytes", 3, "table[half] + size_of(codebook_dtype) * code",
        "table[half] + 2 * code"),
    Bug("half of the rows have the scales of others", 4, "(s.row[1]) * groups", "(s.row[0]) * groups"),
    Bug("a group's sums are not scaled before the next group", 4, "if (group_end > 0) end_group();\n    const int",
        "const int"),
    Bug("the last group is not added", 6, "  if (group_end > 0) end_group();\n  write_result();", "  write_result();"),
    Bug("a group begins one column late", 4, "group_end = (group + 1) * group_size;",
        "group_end = (group + 1) * group_size + 1;"),
    Bug("columns of the next group belong to a group", 5, " || column + first + i >= end) entries", ") entries"),
    Bug("columns before a group belong to it", 5, "column + first + i < begin || column", "column"),
    Bug("columns past K are multiplied", 2, "end = column + 8 < K ? column + 8 : K;", "end = column + 8;"),
    Bug("x of another warp's tile is read", 3, "in_slice = s.k_warp * TILE + chunk", "in_slice = chunk"),
    Bug("the upper two of four columns of x are the lower", 7, "(i < 2 ? four.x : four.y)", "(four.x)"),
    Bug("every thread adds all outliers", 4, "load(outlier_rows + s.row[half]) + first;",
        "load(outlier_rows + s.row[half]);"),
    Bug("sums overwrite x while a warp still reads it", 4, "barrier();  // nobody reads x any more", "// "),
    Bug("sums are added before all are there", 4, "    barrier();\n    for (int i = thread_index(); i < M * ROWS",
        "    for (int i = thread_index(); i < M * ROWS"),
    Bug("a quarter of the sums is left out", 3, "k < SUMS; ++k) sum", "k < SUMS - 4; ++k) sum"),
    Bug("a split is written over another", 4, "(static_cast<int64_t>(s.split) * M + m)", "(m)"),
    Bug("the splits are not all added", 5, "split < splits; ++split) sum", "split < splits - 1; ++split) sum"),
    Bug("x of the second part begins with the first row", 4, "+ m * call.weight.K", "+ 0 * call.weight.K",
        file="codebook/decode_simt.cu"),
    Bug("there is less room for sums than they take", 3, "SUMS * X_ROWS * decode::ROWS * 4",
        "SUMS * X_ROWS * decode::ROWS", file="codebook/decode_simt.h"),
)  # fmt: skip

# (N, K, group_size or None): blocks cut by N; K cut inside a chunk, and inside copies of 16 bytes; the ring of slices
# goes round twice
SHAPES = ((33, 257, 64), (13, 172, 32), (9, 172, 7), (17, 96, None), (35, 5128, 128), (4, 1000, 96))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(kernels: Any, bits: int) -> int:
    """Compares a few cases of one width with float64; raises where one is wrong. The number of cases."""
    cases = 0
    for i, shape in enumerate(SHAPES):
        for j, kind in enumerate(kinds(bits, *shape)):
            if shape[1] > 4096 and j % 3 != bits % 3:
                continue
            weight, dtype = random_weight(kind, i), DTYPES[0 if cuda_codebook.taken(kind) else (i + j) % 3]
            x = activations((1, 16, 5)[(i + j) % 3], shape[1], dtype, j)
            y = cuda_codebook.linear(weight, x, order=j % 2, of=kernels, processors=(1, 132)[j % 2])
            assert_linear_close(y, x, cuda_codebook.multiplied(weight, dtype))
            cases += 1
    return cases
