"""Bugs planted in ``csrc/cuda/batch_sm90.cuh``, as ``packed/batch_sm90.cuh`` uses it, found by what nvcc makes of them
for sm_90a, executed as PTX."""

from __future__ import annotations

from functools import cache, partial

import torch

from lowbit.testing import cuda_emulated, cuda_planted, cuda_ptx
from lowbit.testing.cuda_planted.packed_decode import some_formats
from lowbit.testing.numerics import assert_linear_close
from lowbit.testing.packed_cases import activations, random_weight

Bug = partial(cuda_planted.Bug, file="batch_sm90.cuh")
why_not = cuda_ptx.why_not

BUGS = (
    Bug("a stage is written before it is empty", 4, "        mbarrier_wait(empty(stage), parity);\n", ""),
    Bug("the first stages are waited for", 4, "int stage = 0, parity = 1;", "int stage = 0, parity = 0;"),
    Bug("the bytes of x alone are expected", 4, "mbarrier_arrive_expect(full(stage), S::BYTES)",
        "mbarrier_arrive_expect(full(stage), S::X_BYTES)"),
    Bug("more bytes are expected than come", 4, "mbarrier_arrive_expect(full(stage), S::BYTES)",
        "mbarrier_arrive_expect(full(stage), S::BYTES + 16)"),
    Bug("a stage is read before it is full", 4, "        mbarrier_wait(full(stage), parity);\n", ""),
    Bug("a consumer's parity stays", 4,
        "if (lane == 0) mbarrier_arrive(empty(stage));\n        if (++stage == S::COUNT) stage = 0, parity ^= 1;",
        "if (lane == 0) mbarrier_arrive(empty(stage));\n        if (++stage == S::COUNT) stage = 0;"),
    Bug("seven warps empty a stage", 4, "mbarrier_init(empty(stage), CONSUMER_WARPS)",
        "mbarrier_init(empty(stage), CONSUMER_WARPS - 1)"),
    Bug("every thread empties a stage", 4, "if (lane == 0) mbarrier_arrive", "mbarrier_arrive"),
    Bug("a stage is emptied before its second half", 4, "          if (first >= end) break;\n",
        "          if (first >= end) break;\n          if (half == 1 && lane == 0) mbarrier_arrive(empty(stage));\n"),
    Bug("the mbarriers are used before they are there", 4, "barrier();  // the mbarriers", "// "),
    Bug("copies do not see the mbarriers", 4, "      mbarrier_init(empty(stage), CONSUMER_WARPS);\n    }\n"
        "    mbarrier_init_done();", "      mbarrier_init(empty(stage), CONSUMER_WARPS);\n    }"),
    Bug("the sums are read before the products end", 4, "        products_wait();\n        promote(operands.scale);",
        "        promote(operands.scale);"),
    Bug("products begin before their operands are there", 4,
        "        products_begin();\n        LOWBIT_UNROLL\n        for (int c = 0; c < CHUNKS; ++c) {\n"
        "          if (c == 0)\n            multiply_begin<T, false>(products, a",
        "        LOWBIT_UNROLL\n        for (int c = 0; c < CHUNKS; ++c) {\n"
        "          if (c == 0)\n            multiply_begin<T, false>(products, a"),
    Bug("the mbarriers lie in the last stage", 4, "bars = stages + S::COUNT * S::BYTES;",
        "bars = stages + S::COUNT * S::BYTES - 1024;"),
    Bug("the words of a tile are looked for without their swizzle", 4, "(lane / 8 ^ (row >> 1 & 3)) << 4",
        "(lane / 8) << 4"),
    Bug("the second half has the words of the first", 4, "COUNT * half + p) * ROWS", "p) * ROWS"),
    Bug("x is looked for one box too early", 4, "half * (HALF / BOX) * S::X_BOX", "half * (HALF / BOX - 1) * S::X_BOX"),
    Bug("a group's products are added to the last", 4, "multiply_begin<T, false>(products, a[0][0]",
        "multiply_begin<T, true>(products, a[0][0]"),
    Bug("half a tile has the group of its first chunk", 4, "if (group_of(first) == group_of(last))", "if (true)"),
    Bug("the next half has the group of this one", 4,
        "next = family.fetch_group(row, group_of(first + 4 < end ? first + 4 : last));",
        "next = family.fetch_group(row, group_of(last));"),
    Bug("a piece of work begins with the group of the first tile", 4,
        "next = family.fetch_group(row, group_of(work.first_tile * (TILE / CHUNK)))",
        "next = family.fetch_group(row, 0)"),
    Bug("the last chunks of K are left out", 4, "end = (K + CHUNK - 1) / CHUNK;", "end = K / CHUNK;"),
    Bug("rows past the last one are stored", 4, "if (n >= N || m >= M) continue;", "if (m >= M) continue;"),
    Bug("rows of x past the last one are stored", 4, "if (n >= N || m >= M) continue;", "if (n >= N) continue;"),
    Bug("what the center leaves of a zero is not scaled", 4, "by[2] = {operands.scale[0] * operands.residual[0],",
        "by[2] = {operands.residual[0],"),
    Bug("every split adds the outliers", 4, "task.outlier_values != nullptr && work.split == 0",
        "task.outlier_values != nullptr"),
    Bug("a split begins one tile late", 4, "x_block * X_ROWS, split, split * tiles / splits,",
        "x_block * X_ROWS, split, split * tiles / splits + (split > 0),"),
    Bug("the octets of the upper rows are those of the lower", 3, "(first_row + 8 * upper + g) * OCTETS",
        "(first_row + g) * OCTETS"),
    Bug("the plane of two bits is taken from the next chunk", 7, "moved(second[upper][j], 2 * chunk, 4)",
        "moved(second[upper][j], 2 * (chunk + 1), 4)"),
    Bug("the second half has the octets of the first", 5, "(two | two << 8) >> 4 * half", "two | two << 8"),
)  # fmt: skip

DTYPES = (torch.float16, torch.bfloat16)
# (N, K, group_size or None, M, splits): two blocks of rows, a ragged one; K cut inside a tile, half of it, a chunk; the
# ring goes round twice. Groups of several tiles, of half a tile, and that end inside.
CASES = ((136, 1032, 64, 20, 1), (130, 808, 256, 70, 1), (40, 2072, 96, 9, 2), (136, 1160, None, 33, 1))


def built(bits: int, bug: cuda_planted.Bug | None) -> str:
    """The text of PTX."""
    if bug is None:
        return as_it_is(bits)
    with cuda_emulated.changed_sources(bug.file, bug.old, bug.new) as csrc:
        return cuda_ptx.compiled(csrc, "packed/batch_sm90.cu", "sm_90a", bits)


@cache
def as_it_is(bits: int) -> str:
    return cuda_ptx.compiled(cuda_emulated.ROOT / "csrc", "packed/batch_sm90.cu", "sm_90a", bits)


def check(ptx: str, bits: int) -> int:
    """Compares a few cases of one width with float64; raises where one is wrong. The number of cases."""
    for i, case in enumerate(CASES):
        run(ptx, bits, *case, turn=(0, 5, 3, 4)[i])
    return len(CASES)


def run(ptx: str, bits: int, n: int, k: int, group_size: int | None, m: int, splits: int, *, turn: int) -> None:
    """One case of the format, dtype and order that ``turn`` says, against float64."""
    found = list(some_formats(bits, n, k, group_size))
    weight, dtype = random_weight(found[turn % len(found)], turn), DTYPES[turn % 2]
    x, bias = activations(m, k, dtype, turn), torch.randn(n) if turn % 3 else None
    y, statistics = cuda_ptx.packed_batch_sm90(
        ptx, weight, x, bias, splits, by_group=turn % 4 == 1, newest_first=turn % 2 == 0
    )  # fmt: skip
    assert_linear_close(y, x, weight.dense(), bias)
    assert statistics.count("wgmma.mma_async") > 0 and statistics.count("cp.async.bulk.tensor") > 0
