"""Bugs planted in ``csrc/cuda/codebook/batch.cuh``, its launches, and ``csrc/cuda/batch.cuh``, which it shares."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from lowbit.testing import cuda_codebook, cuda_planted
from lowbit.testing.codebook_cases import kinds, random_weight
from lowbit.testing.numerics import assert_linear_close
from lowbit.testing.packed_cases import activations

Bug = partial(cuda_planted.Bug, file="codebook/batch.cuh")
Shared = partial(cuda_planted.Bug, file="batch.cuh")

BUGS = (
    Bug("the second code of a pair is the first", 4, "(codes >> 16 << shift)", "((codes & 0xFFFF) << shift)"),
    Bug("the entries of a pair are exchanged", 3, "return low | uint32_t(load_shared_half(from +",
        "return low << 16 | uint32_t(load_shared_half(from + 0 *"),
    Bug("row g + 8 has the table of row g", 4, "next_half = one ? 0 : 2", "next_half = 0"),
    Bug("16 rows have the tables of the 16 before", 5, "next_tile = one ? 0 : 32 * ENTRIES", "next_tile = 0"),
    Bug("copies of the table are read where there are none", 8, "(1 << copies) - 1)) :", "31)) :"),
    Bug("copies of the table overlap", 6, "one ? i >> copies :", "one ? i >> (copies - 1) :"),
    Bug("rows past the last one have tables", 4, "(n < N ? n : N - 1) * table_row", "(n) * table_row"),
    Bug("a part of the tables is not stored", 4, "ROWS / 2 * ENTRIES;", "ROWS / 4 * ENTRIES;"),
    Bug("tables are where the last slice is", 4, "  LOWBIT_DEVICE void begin(const Share& s, int at) {",
        "  LOWBIT_DEVICE void begin(const Share& s, int at) {\n    at -= 1024;"),
    Bug("there is less room for tables than they take", 4, "batch::ROWS * 2 << w.bits", "batch::ROWS << w.bits",
        file="codebook/batch.h"),
    Bug("every group has the scales of the first", 2, "(s.row[r][0]) * groups + group", "(s.row[r][0]) * groups"),
    Bug("half of the rows have the scales of others", 4, "(s.row[r][1]) * groups", "(s.row[r][0]) * groups"),
    Bug("a chunk is scaled by the next group's scale", 4, "scale[i / 2][i % 2] = next_scale[i / 2][i % 2]",
        "scale[i / 2][i % 2] = 2 * next_scale[i / 2][i % 2]"),
    Bug("every group has the tables of the first", 4, "static_cast<int64_t>(group) * table_group", "0 * table_group"),
    Bug("both codes of a pair are the first, of tables of groups", 6, "gathered(at[r][half], codes >> 16) << 16;",
        "gathered(at[r][half], codes & 0xFFFF) << 16;"),
    Bug("row g + 8 has the tables of groups of row g", 2, "gathered(at[r][half], codes & 0xFFFF) |",
        "gathered(at[r][0], codes & 0xFFFF) |"),
    Bug("entries of groups are taken for numbers of two bytes", 5, "table + size_of(codebook_dtype) *", "table + 2 *"),
    Bug("tables of groups have a place in shared memory", 3, "if (MAY_GATHER && gathers) return;\n", "\n"),
    Bug("x of the second part begins with the first row", 4, "first * call.weight.K", "0 * call.weight.K",
        file="codebook/batch.cu"),
    Shared("a slice is multiplied before all threads have it", 4, "barrier();  // the slice is there", "// "),
    Shared("one copy too few is waited for", 2, "wait_copies<1>", "wait_copies<2>"),
    Shared("a slice overwrites the one that is read", 4, "fetch_slice(k / SLICE + task.stages - 1, free_stage)",
           "fetch_slice(k / SLICE + task.stages - 1, stage)"),
    Shared("one column of the next group belongs to a group", 5, "column + 1 < end ?", "column + 1 <= end ?"),
    Shared("a column's outlier is added by each split", 4, "load(task.outlier_rows + row[r][half]) + work.split;",
           "load(task.outlier_rows + row[r][half]);"),
    Shared("sums overwrite x while a warp still reads it", 4, "barrier();  // nobody reads x any more", "// "),
    Shared("a split is written over another", 4, "static_cast<int64_t>(work.split) * M + x_row", "x_row"),
)  # fmt: skip

# (N, K, group_size or None), M: blocks and warps cut by N, x tiles by M; K cut inside a chunk, inside a tile and inside
# copies of 16 bytes; groups that end inside chunks; the ring goes round twice
CASES = (
    ((33, 257, 64), 17), ((9, 172, 7), 34), ((17, 96, None), 20), ((270, 520, 128), 70), ((35, 1304, 256), 33),
)  # fmt: skip


def check(kernels: Any, bits: int) -> int:
    """Compares a few cases of one width with float64; raises where one is wrong. The number of cases."""
    cases = 0
    for i, (shape, m) in enumerate(CASES):
        for j, kind in enumerate(kinds(bits, *shape)):
            if (i + j) % 2:
                continue
            weight, dtype = random_weight(kind, i), (torch.float16, torch.bfloat16)[(i + j // 2) % 2]
            x = activations(m, shape[1], dtype, j)
            small = cases // 2 % 2 == 0  # of 6 bits on, tables of rows have no room then
            y = cuda_codebook.linear(
                weight, x, order=cases % 2, of=kernels, processors=132 if small else 1,
                shared_bytes=(99 if small else 227) << 10,
            )  # fmt: skip
            assert_linear_close(y, x, cuda_codebook.multiplied(weight, dtype))
            cases += 1
    # where rows may not depend on M, 512 at a time are split
    kind = next(kinds(bits, 5, 1032, 128))
    weight, x = random_weight(kind), activations(515, 1032, torch.float16)
    y = cuda_codebook.linear(weight, x, of=kernels, processors=132, batch_invariant=True, shared_bytes=227 << 10)
    assert_linear_close(y, x, cuda_codebook.multiplied(weight, x.dtype))
    return cases + 1
