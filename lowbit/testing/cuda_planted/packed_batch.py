"""Bugs planted in ``csrc/cuda/batch.cuh`` and ``csrc/cuda/packed/batch.cuh``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from lowbit.testing import cuda_emulated, cuda_planted
from lowbit.testing.cuda_planted.packed_decode import some_formats
from lowbit.testing.numerics import assert_linear_close
from lowbit.testing.packed_cases import activations, random_weight

Bug = partial(cuda_planted.Bug, file="batch.cuh")
Groups = partial(cuda_planted.Bug, file="packed/batch.cuh")

BUGS = (
    Bug("a slice is multiplied before all threads have it", 4, "barrier();  // the slice is there", "// "),
    Bug("one copy too few is waited for", 4, "wait_copies<1>", "wait_copies<2>"),
    Bug("with two stages no copy is waited for", 8, "wait_copies<0>", "wait_copies<1>"),
    Bug("a slice overwrites the one that is read", 4, "fetch_slice(k / SLICE + task.stages - 1, free_stage)",
        "fetch_slice(k / SLICE + task.stages - 1, stage)"),
    Bug("the ring has a stage more than there is room for", 4, "end_stage = S::STAGES + task.stages",
        "end_stage = S::STAGES + (task.stages + 1)"),
    Bug("x is not swizzled where it is read", 4, "16 * t) ^ (g % 2 * 64))", "16 * t) ^ 0)"),
    Bug("rows of x past the last one are copied", 4,
        "const bool beyond = first + column >= K || m >= x_rows;\n        copy_async",
        "const bool beyond = first + column >= K;\n        copy_async"),
    Bug("a ragged K: a copy begins at K", 4,
        "const bool beyond = first + column >= K || m >= x_rows;\n        copy_async",
        "const bool beyond = first + column > K || m >= x_rows;\n        copy_async"),
    Bug("a ragged K: an element is read at K", 4,
        "const bool beyond = first + column >= K || m >= x_rows;\n        store_shared",
        "const bool beyond = first + column > K || m >= x_rows;\n        store_shared"),
    Bug("rows past the last one are read", 4, "n < N ? n : N - 1", "n"),
    Bug("the second half of a plane of 4 bits is the first", 4, "64 * (WIDE * half + p)", "64 * p"),
    Bug("the parts of 8 bits are exchanged", 8, "k / (SLICE / 2) % 2 : 0;", "k / (SLICE / 2 + 1) % 2 : 0;"),
    Bug("the next tile's plane of 2 bits overwrites this one's", 2, "to = S::TILES + tile % 2 * S::TILE_BYTES",
        "to = S::TILES"),
    Bug("the plane of one bit is read from the other tile", 1,
        "const int from = S::TILES + k / TILE % 2 * S::TILE_BYTES",
        "const int from = S::TILES + (k / TILE + 1) % 2 * S::TILE_BYTES"),
    Bug("the plane of one bit is added one bit too high", 3, "0x00010001u) << (BITS - 1);\n  }\n  return",
        "0x00010001u) << BITS;\n  }\n  return", file="codes.h"),
    Bug("the plane of two bits is taken from the next chunk", 7, "(above >> 2 * chunk &",
        "(above >> 2 * (chunk + 1) &", file="codes.h"),
    Bug("a group keeps the scales of the one before", 4, "    fetch_group(group + 1);", "    fetch_group(group);"),
    Groups("the zero of symmetric formats is one too low", 4, "nearest = 1 << (BITS - 1)",
        "nearest = (1 << (BITS - 1)) - 1"),
    Groups("what the center leaves of a zero has the wrong sign", 2, "static_cast<float>(nearest) - zero",
        "zero - static_cast<float>(nearest)"),
    Groups("what is left of a zero is overwritten by the next group's", 2, "4 * (group % 2 * ROWS +",
        "4 * (group % 1 * ROWS +"),
    Bug("the last group does not end", 2,
        "  if (rows_exist && (group_end == end_column || end_column == K)) family", "  if (false) family"),
    Bug("every split ends the group that it is in", 2, "(group_end == end_column || end_column == K)", "true"),
    Groups("sums of x are those of another group", 2, "static_cast<int64_t>(group) * x_sums_row",
        "static_cast<int64_t>(group ^ 1) * x_sums_row"),
    Bug("one column of the next group belongs to a group", 5, "column + 1 < end ?", "column + 1 <= end ?"),
    Bug("a chunk that a group ends in is multiplied once", 5, "if constexpr (!CUT) break;", "break;"),
    Groups("an operand has its rows exchanged", 4, "center[r][half]);", "center[r][1 - half]);"),
    Bug("the scale of the first row is the second's too", 4, "family.scale[r][i / 2]", "family.scale[r][0]"),
    Bug("a column's outlier is added by each split", 4, "load(task.outlier_rows + row[r][half]) + work.split;",
        "load(task.outlier_rows + row[r][half]);"),
    Bug("sums overwrite x while a warp still reads it", 4, "barrier();  // nobody reads x any more", "// "),
    Bug("sums are stored before all warps have theirs", 4, "    barrier();\n    const int n = work.first_row",
        "    const int n = work.first_row"),
    Bug("an x tile is written over another", 4, "const int64_t x_row = work.first_x + m;", "const int64_t x_row = m;"),
    Bug("rows of x that are not there are stored", 4, "m < X_ROWS && m < x_rows; ++m", "m < X_ROWS; ++m"),
    Bug("a split begins one tile late", 4, "(work.split) * tile_count / splits)",
        "(work.split) * tile_count / splits) + (work.split > 0)"),
    Bug("a split is written over another", 4, "static_cast<int64_t>(work.split) * M + x_row", "x_row"),
    Bug("the first split is added twice", 4, "for (int split = 1; split", "for (int split = 0; split"),
    Bug("the bias is added to the next row", 4, "float_at(task.bias, DType(task.bias_dtype), n)",
        "float_at(task.bias, DType(task.bias_dtype), n ^ 1)"),
    Bug("a block finds its split where its rows are", 4, "rest / row_blocks}", "rest % row_blocks}"),
)  # fmt: skip

# (N, K, group_size or None), M: blocks and warps cut by N, x tiles by M; K cut inside a chunk, inside a tile and inside
# copies of 16 bytes; groups that end inside chunks; the ring goes round twice; splits end inside groups
CASES = (
    ((33, 257, 64), 17), ((9, 172, 7), 34), ((17, 96, None), 20), ((270, 520, 128), 70), ((3, 2072, 1024), 33),
    ((5, 1000, 96), 18),
)  # fmt: skip


def check(kernels: Any, bits: int) -> int:
    """Compares a few cases of one width with float64; raises where one is wrong. The number of cases."""
    cases = 0
    for i, (shape, m) in enumerate(CASES):
        for j, found in enumerate(some_formats(bits, *shape)):
            if (i + j) % 2:
                continue
            weight = random_weight(found, i)
            x = activations(m, shape[1], (torch.float16, torch.bfloat16)[(i + j // 2) % 2], j)
            bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(j))
            y = cuda_emulated.packed_linear(
                weight, x, bias, order=cases % 2, of=kernels, processors=(132, 1)[cases // 2 % 2],
                shared_bytes=(99 << 10, 163 << 10)[cases // 2 % 2],
            )  # fmt: skip
            assert_linear_close(y, x, weight.dense(), bias)
            cases += 1
    return cases
