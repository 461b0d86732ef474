"""Bugs planted in ``csrc/cuda/codebook/decode.cuh``, and in ``csrc/cuda/decode.cuh``, which it shares."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from lowbit.testing import cuda_codebook, cuda_planted
from lowbit.testing.codebook_cases import kinds, random_weight
from lowbit.testing.numerics import assert_linear_close
from lowbit.testing.packed_cases import activations

Bug = partial(cuda_planted.Bug, file="codebook/decode.cuh")
Shared = partial(cuda_planted.Bug, file="decode.cuh")

BUGS = (
    Bug("low and high bytes of entries are exchanged", 3, "pairs[0] = permute_bytes(lows, highs,",
        "pairs[0] = permute_bytes(highs, lows,"),
    Bug("the upper half of a table is not looked at", 4, "0x4444u, known.halves)", "0x0000u, known.halves)"),
    Bug("a selector of four bits keeps its top bit", 4, "known.by_16)) & 0x7777u", "known.by_16)) & 0xF777u"),
    Bug("a shift by 17 is one by 16", 4, "opaque(0x8000u)", "opaque(0x10000u)"),
    Bug("a group ends one chunk late", 2, "(next + 1) * (group_size / CHUNK);",
        "(next + 1) * (group_size / CHUNK) + 1;"),
    Bug("the end of a group is counted from its tile", 3, "group_end - tile * (TILE / CHUNK))", "group_end)"),
    Bug("the second half of a quad has the codes of the first", 2, "(s >> 4 & 0x03030303u)", "(s & 0x03030303u)"),
    Bug("the top bits of two chunks are exchanged", 3, "(BITS == 1 ? 9 : 36)", "(BITS == 1 ? 9 : 24)"),
    Bug("codes of one bit are those of the chunk before", 1, "(bits >> 2 & 0x03030303u) * 9",
        "(bits >> 1 & 0x03030303u) * 9"),
    Bug("the second quad has the codes of the first", 3, ">> 16 * quad;", ">> 0 * quad;"),
    Bug("the last entry of a table is left out", 2, "4 * w + byte < LAST ?", "4 * w + byte < LAST - 1 ?"),
    Bug("the entries of a pair of codes are exchanged", 4, "entry(0, e % 16) | entry(0, e / 16) << 16",
        "entry(0, e / 16) | entry(0, e % 16) << 16"),
    Bug("codes of a pair are those of another chunk", 4, "chunk % 4 < 2 ?", "chunk % 4 < 3 ?"),
    Bug("rows g and g + 8 have the entries of one", 6, "(codes & 0xFFFF) + 2 * half)", "(codes & 0xFFFF))"),
    Bug("both row warps read one table", 5, "s.row_warp * TABLE_BYTES", "0 * TABLE_BYTES"),
    Bug("slices of x overwrite the tables", 8, "slices = {x, M, K, tables,", "slices = {x, M, K, 0,"),
    Bug("the tables of rows past the last one are read", 7, "row = n < N ? n : N - 1", "row = n"),
    Bug("a group is multiplied with the table of the one before", 3, "if (table_group != 0) load_words(group);",
        "if (table_group != 0 && group == 0) load_words(group);"),
    Bug("nested scales have a maximum for 128 of them", 4, "absmax + at[half] / 256",
        "absmax + at[half] / 128", file="codebook/stored.h"),
    Bug("half of the rows have the scales of the first", 5, "{static_cast<int64_t>(s.row[0]) * groups", "{0 * groups"),
    Bug("a group's sums are not scaled before the next group", 4, "if (group >= 0) end_group();\n    group = next;",
        "group = next;"),
    Bug("x of the second part begins with the first row", 8, "+ m * call.weight.K", "+ 0 * call.weight.K",
        file="codebook/decode.cu"),
    Bug("a group is looked up with a factor that is rounded down", 4, "+ chunks - 1) / chunks", ") / chunks",
        file="decode.h"),
    Shared("a slice is multiplied before all threads have it", 4, "barrier();  // the slice is there", "// "),
    Shared("one column of the next group belongs to a group", 3, "column + 1 < end ?", "column + 1 <= end ?"),
    Shared("a ragged K: a copy begins at K", 4, "const bool beyond = first + column >= K;\n        copy_async",
        "const bool beyond = first + column > K;\n        copy_async"),
    Shared("weights are fetched one tile too far", 4, "DEPTH < s.end_slice && tile + DEPTH * K_WARPS < s.tile_count",
        "DEPTH <= s.end_slice && tile + DEPTH * K_WARPS <= s.tile_count"),
    Shared("one copy too few is waited for", 4, "wait_copies<STAGES - 2>", "wait_copies<STAGES - 1>"),
    Shared("a slice overwrites the one that is read", 5, "slices.fetch(slice + STAGES - 1);",
        "slices.fetch(slice + STAGES);"),
    Shared("sums overwrite x while a warp still reads it", 4, "barrier();  // nobody reads x any more", "// "),
    Shared("every warp adds all outliers", 2, "load(outliers.rows + s.row[half]) + s.split * K_WARPS + s.k_warp;",
        "load(outliers.rows + s.row[half]);"),
    Shared("the last warp's sums are left out", 3, "k < K_WARPS; ++k) sum", "k < K_WARPS - 1; ++k) sum"),
    Shared("a split begins one slice late", 4, "s.first_slice = s.split * slices / splits",
        "s.first_slice = s.split * slices / splits + (s.split > 0)"),
    Shared("a split is written over another", 4, "static_cast<int64_t>(s.split) * M + m",
        "static_cast<int64_t>(0) * M + m"),
)  # fmt: skip

# (N, K, group_size or None): blocks cut by N; K cut inside a chunk, and inside copies of 16 bytes; the ring of slices
# goes round twice
SHAPES = ((33, 257, 64), (13, 172, 32), (9, 172, 7), (17, 96, None), (35, 7176, 128), (4, 1000, 96))


def check(kernels: Any, bits: int) -> int:
    """Compares a few cases of one width with float64; raises where one is wrong. The number of cases."""
    cases = 0
    for i, shape in enumerate(SHAPES):
        for j, kind in enumerate(filter(cuda_codebook.taken, kinds(bits, *shape))):
            if shape[1] > 4096 and j % 3:
                continue
            weight = random_weight(kind, i)
            x = activations((1, 16, 5)[(i + j) % 3], shape[1], (torch.float16, torch.bfloat16)[(i + j // 2) % 2], j)
            y = cuda_codebook.linear(weight, x, order=j % 2, of=kernels, processors=(1, 132)[j % 2])
            assert_linear_close(y, x, cuda_codebook.multiplied(weight, x.dtype))
            cases += 1
    return cases
