"""Bugs planted in ``csrc/cuda/codebook/batch_sm90.cuh``, and in ``csrc/cuda/batch_sm90.cuh``, which it shares: found by
what nvcc makes of them for sm_90a, executed as PTX."""

from __future__ import annotations

from functools import cache, partial

import torch

from lowbit.testing import cuda_codebook, cuda_emulated, cuda_planted, cuda_ptx
from lowbit.testing.codebook_cases import Kind, kinds, random_weight
from lowbit.testing.numerics import assert_linear_close
from lowbit.testing.packed_cases import activations

Bug = partial(cuda_planted.Bug, file="codebook/batch_sm90.cuh")
Shared = partial(cuda_planted.Bug, file="batch_sm90.cuh")
why_not = cuda_ptx.why_not

BUGS = (
    Bug("both codes of a pair are the first", 4, "load_pair(from + (codes >> 16 << shift)) << 16",
        "load_pair(from + ((codes & 0xFFFF) << shift)) << 16"),
    Bug("row g + 8 has the table of row g", 4, "(table_row == 0 ? 0 : 2 * upper)", "0"),
    Bug("the copies of an entry overlap those of the next", 3, "table_row == 0 ? 7 : 5", "table_row == 0 ? 6 : 5"),
    Bug("entries of rows are as far apart as copies of entries", 4, "table_row == 0 ? 7 : 5", "7"),
    Bug("half of the one table is stored", 5, "i < 32 << BITS", "i < 16 << BITS"),
    Bug("half of the tables of rows is stored", 4, "i < 8 << BITS", "i < 4 << BITS"),
    Bug("all warps have their tables in one place", 4, "at + warp() * WARP_BYTES", "at"),
    Bug("the tables of the first rows stay", 4, "if (table_row == 0 || row == first_row) return;",
        "if (table_row == 0 || first_row >= 0) return;"),
    Bug("all warps have the tables of the first 16 rows", 2, "row + 16 * warp() + i % 8", "row + i % 8"),
    Bug("rows past the last one have tables", 4, "(n < N ? n : N - 1) * table_row", "(n) * table_row"),
    Bug("entries are taken for numbers of the dtype of x", 4,
        "store_word(at + 4 * i, entry_at<T, decltype(stored)::value>(codebook, i / 32))",
        "store_word(at + 4 * i, entry_at<T, T>(codebook, i / 32))"),
    Bug("every group has the scales of the first", 4, "static_cast<int64_t>(row[1]) * groups + group",
        "static_cast<int64_t>(row[1]) * groups"),
    Bug("half of the rows have the scales of others", 7, "static_cast<int64_t>(row[1]) * groups",
        "static_cast<int64_t>(row[0]) * groups"),
    Bug("both rows have the scale of the first", 4, "{{group.scale[0], group.scale[1]}, {}}",
        "{{group.scale[0], group.scale[0]}, {}}"),
    Shared("tables lie where the mbarriers are", 4, "family.begin(bars + 16 * S::COUNT)", "family.begin(bars)"),
    Shared("tables are read before they are there", 4, "barrier();  // the mbarriers", "// "),
    Shared("a piece of work has the tables of the one before", 6, "      family.begin_rows(work.first_row);\n",
           "      if (i == block_index()) family.begin_rows(work.first_row);\n"),
    Shared("a stage is read before it is full", 4, "        mbarrier_wait(full(stage), parity);\n", ""),
    Shared("the sums are read before the products end", 4, "products_wait();\n        promote(operands.scale);",
           "promote(operands.scale);"),
)  # fmt: skip

DTYPES = (torch.float16, torch.bfloat16)
# (N, K, group_size or None, M, splits), tables and scales: two blocks of rows, a ragged one; K cut inside a tile, half
# of it, a chunk; the ring goes round twice. Groups of several tiles, of half a tile, and that end inside.
CASES = (
    ((136, 1032, 64, 20, 1), "row", "float"), ((130, 808, 256, 70, 1), "tensor", "nested"),
    ((40, 1048, 96, 9, 2), "tensor", "float"), ((136, 1160, None, 33, 1), "row", "none"),
)  # fmt: skip


def built(bits: int, bug: cuda_planted.Bug | None) -> str:
    """The text of PTX."""
    if bug is None:
        return as_it_is(bits)
    with cuda_emulated.changed_sources(bug.file, bug.old, bug.new) as csrc:
        return cuda_ptx.compiled(csrc, "codebook/batch_sm90.cu", "sm_90a", bits)


@cache
def as_it_is(bits: int) -> str:
    return cuda_ptx.compiled(cuda_emulated.ROOT / "csrc", "codebook/batch_sm90.cu", "sm_90a", bits)


def check(ptx: str, bits: int) -> int:
    """Compares a few cases of one width with float64; raises where one is wrong. The number of cases."""
    for i, ((n, k, group_size, m, splits), tables, scales) in enumerate(CASES):
        every = kinds(bits, n, k, group_size)
        run(ptx, next(kind for kind in every if (kind.tables, kind.scales) == (tables, scales)), m, splits, turn=i)
    return len(CASES)


def run(ptx: str, kind: Kind, m: int, splits: int, *, turn: int) -> None:
    """One case of the dtype and order that ``turn`` says, against float64."""
    weight, dtype = random_weight(kind, turn), DTYPES[turn % 2]
    x, bias = activations(m, kind.k, dtype, turn), torch.randn(kind.n) if turn % 3 else None
    y, statistics = cuda_codebook.execute_sm90(ptx, weight, x, bias, splits, newest_first=turn // 2 % 2 == 0)
    assert_linear_close(y, x, cuda_codebook.multiplied(weight, dtype), bias)
    assert statistics.count("wgmma.mma_async") > 0 and statistics.count("cp.async.bulk.tensor") > 0
