"""Bugs planted in ``csrc/cuda/packed/decode_int8.cuh``, ``int8.cuh`` and ``quantize.cuh``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from lowbit.testing import cuda_emulated, cuda_planted
from lowbit.testing.cuda_int8 import assert_int8_close, one_integer, reference
from lowbit.testing.cuda_planted.packed_decode import SHAPES, some_formats
from lowbit.testing.numerics import assert_bitwise_equal
from lowbit.testing.packed_cases import activations, random_weight

Bug = partial(cuda_planted.Bug, file="packed/decode_int8.cuh")
Shared = partial(cuda_planted.Bug, file="int8.cuh")
Around = partial(cuda_planted.Bug, file="quantize.cuh")

BUGS = (
    Around("a half is rounded away from zero", 4, "scaled + round", "scaled + (scaled > 0 ? 0.5f : -0.5f) + round"),
    Around("one thread's largest value is forgotten", 4, "for (int i = 0; i < 16; ++i) {",
           "for (int i = 1; i < 16; ++i) {"),
    Around("the largest values are read before all threads have stored theirs", 4,
           "  barrier();\n  if (thread < THREADS / 16)", "  if (thread < THREADS / 16)"),
    Around("columns past K are not zeros", 4, "if (zero || k + i >= K) continue;", "if (zero) continue;"),
    Around("a static scale is not inverted", 4, "1.0f / load(x_scale)", "load(x_scale)"),
    Around("a row of integers begins where x's rows do", 4, "static_cast<int64_t>(m) * columns",
           "static_cast<int64_t>(m) * K"),
    Around("the first split is added twice", 4, "for (int split = 1; split", "for (int split = 0; split"),
    Around("outliers of the first split alone count", 4, "outliers += load(outlier_parts",
           "outliers += 0 * load(outlier_parts"),
    Shared("integers are added as floats", 4, "return exact ? a + b", "return exact > 1 ? a + b"),
    Shared("outliers are divided by the scale of x", 4, "sum / load(inverse + m) + outliers",
           "(sum + outliers) / load(inverse + m)"),
    Shared("every row of x has the scale of the first", 4, "load(inverse + m)", "load(inverse)"),
    Shared("a plane's high bytes are its low ones", 2, "0x7531u : 0x6420u", "0x6420u : 0x6420u"),
    Shared("bytes of four lanes are those of two", 4, "permute_bytes(part.z, part.w, which)",
           "permute_bytes(part.x, part.y, which)"),
    Shared("the plane of one bit is added one bit too high", 3, "EACH << (BITS - 1), codes", "EACH << BITS, codes"),
    Shared("the plane of two bits is taken from the next chunk", 7, "chunk % 4 * 2 - 4)", "chunk % 4 * 2 - 2)"),
    Shared("one column of the next group belongs to a group", 5, "column + i < end)", "column + i <= end)"),
    Bug("the zero of symmetric formats is one too low", 4, "{1 << (BITS - 1), 1 << (BITS - 1)}",
        "{(1 << (BITS - 1)) - 1, 1 << (BITS - 1)}"),
    Bug("what the center leaves of a zero has the wrong sign", 2, "static_cast<float>(center[half]) - zero",
        "zero - static_cast<float>(center[half])"),
    Bug("the zero of row g + 8 is that of row g", 4, "center[i / 2] * x_sums", "center[0] * x_sums"),
    Bug("columns of other groups are in the sums of x", 5, "ones[i] &= mask", "ones[i] &= ~0u"),
    Bug("an operand has its rows exchanged", 4, "bytes[i % 2].of(w[i % 2]", "bytes[1 - i % 2].of(w[1 - i % 2]"),
    Bug("an operand has its columns exchanged", 4, "chunk, i / 2);", "chunk, 1 - i / 2);"),
    Bug("a slice's copies begin a column late", 4, "slice * SLICE + column, false)",
        "slice * SLICE + column + 16, false)"),
    Bug("a ragged K: the last tile is not copied", 4, "slice * SLICE + column < columns",
        "slice * SLICE + column + TILE < columns"),
    Bug("a row of x that is not there is read", 4, "8 * m + s.g < M ? 8 * m + s.g : M - 1",
        "8 * m + s.g < M ? 8 * m + s.g : M"),
    Bug("a group's sums are not added before the next group", 4, "end_group();  // before the first one", "// "),
    Bug("an exact sum is scaled once more", 4, "  if (!exact) end_group();", "  end_group();"),
    Bug("the next tile's group is one too far", 4, "CHUNKS / group_chunks + 1", "CHUNKS / group_chunks + 2"),
    Bug("a group past K is loaded ahead", 4, ": group_end * CHUNK) < K)", ": group_end * CHUNK) < K + TILE)"),
    Bug("the first group of a split is that of K's begin", 4, "first_column < K) fetch_group(first_column",
        "first_column < K) fetch_group(s.k_warp * TILE"),
    Bug("every warp adds all outliers", 4, "i = load(outlier_rows + s.row[half]) + s.split * K_WARPS + s.k_warp;",
        "i = load(outlier_rows + s.row[half]);"),
    Bug("sums of outliers are where sums of products are", 4, "store_shared(outliers_at + place(m, i), found[m][i])",
        "store_shared(place(m, i), found[m][i])"),
    Bug("sums overwrite x while a warp still reads it", 4, "barrier();  // nobody reads x any more", "// "),
    Bug("sums are added before all warps have stored theirs", 4,
        "    barrier();\n    for (int i = thread_index(); i < M", "    for (int i = thread_index(); i < M"),
    Bug("the last warp's sums are left out", 4, "k < K_WARPS; ++k) {", "k < K_WARPS - 1; ++k) {"),
    Bug("a split is written over another", 4, "(static_cast<int64_t>(s.split) * M + m) * N + n",
        "static_cast<int64_t>(m) * N + n"),
    Bug("the second rows of x begin with the first", 5, "all.inverse + m}", "all.inverse}",
        file="packed/decode_int8.cu"),
    Bug("there is no room for the parts of outliers", 4, "(call.weight.outliers ? 2 : 1)", "1",
        file="packed/decode_int8.h"),
)  # fmt: skip

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check(kernels: Any, bits: int) -> int:
    """Compares a few cases of one width with float64; raises where one is wrong. The number of cases."""
    cases = 0
    for i, shape in enumerate(SHAPES):
        for j, found in enumerate(some_formats(bits, *shape)):
            weight = random_weight(found, i)
            x = activations((1, 16, 5)[(i + j) % 3], shape[1], DTYPES[(i + j) % 3 if j % 2 else j // 2 % 3], j)
            x_scale = torch.tensor([0.012]) if (i + j) % 4 == 1 else None
            options: dict[str, Any] = dict(int8=True, x_scale=x_scale, of=kernels, processors=(1, 132)[j % 2])
            y = cuda_emulated.packed_linear(weight, x, order=j % 2, **options)
            assert_int8_close(y, x, weight, x_scale=x_scale)
            cases += 1
    # integers of several warps
    for i, found in enumerate(f for f in some_formats(bits, 19, 2600, None) if not f.outliers):
        weight, x = random_weight(found, i), activations(3, 2600, torch.float32)
        y = cuda_emulated.packed_linear(weight, x, int8=True, of=kernels, processors=(1, 132)[i % 2])
        assert_int8_close(y, x, weight)
        if one_integer(weight):
            assert_bitwise_equal(y, reference(x, weight))
        cases += 1
    return cases
