"""Bugs planted in ``csrc/cuda/packed/decode.cuh``, and what it shares."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from lowbit.packed.format import PackedFormat
from lowbit.testing import cuda_emulated, cuda_planted
from lowbit.testing.numerics import assert_linear_close
from lowbit.testing.packed_cases import activations, formats, random_weight

Bug = partial(cuda_planted.Bug, file="packed/decode.cuh")
OPERANDS, SHARED = "packed/operands.h", "decode.cuh"

BUGS = (
    Bug("a slice is multiplied before all threads have it", 4, "barrier();  // the slice is there", "// ", file=SHARED),
    Bug("a field of a plane is looked for at the wrong bit", 4, "IN_PLACE ? chunk * WIDTH % 8",
        "IN_PLACE ? chunk * (WIDTH - 1) % 8", file=OPERANDS),
    Bug("a group is looked up with a factor that is rounded down", 4, "+ chunks - 1) / chunks", ") / chunks",
        file="decode.h"),
    Bug("the plane of one bit is added one bit too high", 3, "0x00010001u << place, codes",
        "0x00010001u << (place + 1), codes", file=OPERANDS),
    Bug("the plane of two bits is taken from the next chunk", 7, "2 * chunk - 4 - lift)",
        "2 * chunk - 2 - lift)", file=OPERANDS),
    Bug("the top bit of 8 counts as half", 8, "(codes & 0x00800080u) | BASES", "(codes >> 1 & 0x00400040u) | BASES",
        file="codes.h"),
    Bug("the zero of symmetric formats is one too low", 4, "0.0f, 1 << (BITS - 1)};", "0.0f, (1 << (BITS - 1)) - 1};"),
    Bug("what the center leaves of a zero has the wrong sign", 2, "static_cast<float>(u.nearest) - zero",
        "zero - static_cast<float>(u.nearest)"),
    Bug("a group's sums are not added before the next group", 4, "end_group(at + residuals_behind);", ""),
    Bug("one column of the next group belongs to a group", 5, "column + 1 < end ?", "column + 1 <= end ?", file=SHARED),
    Bug("a ragged K: a copy begins at K", 4, "first + x_column >= K", "first + x_column > K"),
    Bug("a ragged K: an element is read at K", 4, "const bool beyond = first + column >= K;\n        store_shared",
        "const bool beyond = first + column > K;\n        store_shared"),
    Bug("weights are fetched one tile too far", 4,
        "slice + DEPTH < s.end_slice && tile + DEPTH * K_WARPS < s.tile_count",
        "slice + DEPTH <= s.end_slice && tile + DEPTH * K_WARPS <= s.tile_count", file=SHARED),
    Bug("rows of scales past the last one are read", 4, "n < N ? n : N - 1", "n"),
    Bug("rows of codes past the last one are read", 4, "n < N ? n : N - 1", "n", file=SHARED),
    Bug("a row of x that is not there is read", 4, "8 * m + s.g < M ? 8 * m + s.g : M - 1",
        "8 * m + s.g < M ? 8 * m + s.g : M"),
    Bug("one copy too few is waited for", 4, "wait_copies<STAGES - 2>", "wait_copies<STAGES - 1>", file=SHARED),
    Bug("a slice overwrites the one that is read", 4, "stage == ring_bytes)", "stage == ring_bytes - stage_bytes)"),
    Bug("sums overwrite x while a warp still reads it", 4, "barrier();  // nobody reads x any more", "// ",
        file=SHARED),
    Bug("sums are added before all warps have stored theirs", 4, "  barrier();\n  for (int i = thread_index(); i < M",
        "  for (int i = thread_index(); i < M", file=SHARED),
    Bug("every warp adds all outliers", 4,
        "i = load(outliers.rows + s.row[half]) + s.split * K_WARPS + s.k_warp;",
        "i = load(outliers.rows + s.row[half]);", file=SHARED),
    Bug("the last warp's sums are left out", 4, "k < K_WARPS; ++k) sum", "k < K_WARPS - 1; ++k) sum", file=SHARED),
    Bug("a split begins one slice late", 4, "s.first_slice = s.split * slices / splits",
        "s.first_slice = s.split * slices / splits + (s.split > 0)", file=SHARED),
    Bug("a split is written over another", 4, "static_cast<int64_t>(s.split) * M + m",
        "static_cast<int64_t>(0) * M + m", file=SHARED),
    Bug("the first split is added twice", 4, "for (int split = 1; split", "for (int split = 0; split", file=SHARED),
    Bug("the last piece of float32 x is forgotten", 4, "LOWBIT_UNROLL\n      for (int piece = PIECES - 1; piece >= 0;",
        "LOWBIT_UNROLL\n      for (int piece = PIECES - 1; piece >= (PIECES == 3);"),
    Bug("float32 x is multiplied before all threads have split it", 4, "barrier();  // the pieces are there",
        "// "),
    Bug("float32 x arrives where its last piece is", 4, "? PIECES * stage_bytes", "? (PIECES - 1) * stage_bytes"),
    Bug("the table of scales that is read is written", 4, "other_table = table_bytes;", "other_table = 0;"),
    Bug("the table of scales is that of the slice before", 4, "load_table(slice - AHEAD + 2);",
        "load_table(slice - AHEAD + 1);"),
    Bug("the second group of a tile has the scales of the first", 4, "at += TABLE_PITCH;", ""),
    Bug("a warp has the scales of another one's tile", 4, "(s.k_warp << (shift - 2))", "(s.k_warp << (shift - 3))"),
    Bug("small groups: the rows that a thread prepares but for the first are left out", 4,
        "i < MOST_ENTRIES; ++i) {", "i < 1; ++i) {"),
    Bug("a group past K is loaded ahead", 4, "if (of_group < groups)", "if (of_group <= groups)"),
    Bug("the first group of a split is that of K's begin", 4, "load_table(s.first_slice);", "load_table(0);"),
    Bug("groups of any size: the plane of two bits is another one", 7, "parts[BITS / 2 - 1], i) : 0",
        "parts[0], i) : 0"),
    Bug("a field that stays in its place has the factor of another", 2, "(0x3C00u - 0x0400u * lift)",
        "(0x3C00u - 0x0400u * WIDTH)", file=OPERANDS),
    Bug("a center that is lifted lacks what its base is lifted by", 4, "- (0x6400u << lift))", "- 0x6400u)",
        file=OPERANDS),
    Bug("an operand has its rows exchanged", 4, "operands[i % 2].of(w[i % 2]", "operands[1 - i % 2].of(w[1 - i % 2]"),
)  # fmt: skip

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# (N, K, group_size or None): blocks cut by N; K cut inside a chunk, and inside copies of 16 bytes; the ring of slices
# goes round twice
SHAPES = ((33, 257, 64), (13, 172, 32), (9, 172, 7), (17, 96, None), (35, 7176, 128), (4, 1000, 96))


def some_formats(bits: int, n: int, k: int, group_size: int | None) -> Iterator[PackedFormat]:
    """:func:`~lowbit.testing.packed_cases.formats`, and of one bit, which the kernels have and the layers have not."""
    for found in formats(max(bits, 2), n, k, group_size):
        object.__setattr__(found, "bits", bits)
        yield found


def check(kernels: Any, bits: int) -> int:
    """Compares a few cases of one width with float64; raises where one is wrong. The number of cases."""
    cases = 0
    for i, shape in enumerate(SHAPES):
        for j, found in enumerate(some_formats(bits, *shape)):
            weight = random_weight(found, i)
            x = activations((1, 16, 5)[(i + j) % 3], shape[1], DTYPES[(i + j) % 3 if j % 2 else j // 2 % 3], j)
            y = cuda_emulated.packed_linear(weight, x, order=j % 2, of=kernels, processors=(1, 132)[j % 2])
            assert_linear_close(y, x, weight.dense())
            cases += 1
    return cases
