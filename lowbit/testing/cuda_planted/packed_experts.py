"""Bugs of csrc/cuda/packed/experts.cuh, and of what it shares: csrc/cuda/experts_sort.cuh, experts.cuh."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lowbit.packed.format import PackedFormat
from lowbit.testing import cuda_emulated, cuda_planted
from lowbit.testing.numerics import assert_bitwise_equal, assert_linear_close
from lowbit.testing.packed_cases import DTYPES, Weight, activations, random_weight

Sort = partial(cuda_planted.Bug, file="experts_sort.cuh")
Rows = partial(cuda_planted.Bug, file="experts.cuh")
Bug = partial(cuda_planted.Bug, file="packed/experts.cuh")

BUGS = (
    Sort("a group begins behind itself", 4, "smaller += other < group", "smaller += other <= group"),
    Sort("a thread's rows leave room for themselves", 4, "if (thread < thread_index())",
         "if (thread <= thread_index())"),
    Sort("counts are read before all threads have theirs", 4, "barrier();\n  int begin", "int begin"),
    Sort("a negative id is one of elsewhere", 4, "id < 0 ? experts + 1", "id < 0 ? experts"),
    Sort("an id of 64 bits is cut to 32", 4, "const int64_t id = wide ? load", "const int64_t id = wide ? (int)load"),
    Sort("rows of elsewhere are NaN", 4, "group == experts ? ZEROS : NANS", "group == experts ? NANS : ZEROS"),
    Sort("every row of y has its own row of x", 4, "static_cast<uint32_t>(i / repeats)", "static_cast<uint32_t>(i)"),
    Sort("groups share a tile's number", 4, "(begin >> shift) + group;", "(begin >> shift);"),
    Sort("a group's last number is nobody's", 4, "+ group + 1;", "+ group;"),
    Sort("the last tile has rows of the next group", 4, "left < 1 << shift ? left : 1 << shift", "1 << shift"),
    Sort("all tiles of a group have its first rows", 4, "static_cast<uint32_t>(begin + row)",
         "static_cast<uint32_t>(begin)"),
    Rows("blocks take the rows of W that tiles have numbers of", 4, "block_index() / tile_count",
         "block_index() % tile_count"),
    Rows("zeros are written to the first columns alone", 4, "first = part.at.block() * columns", "first = 0 * columns"),
    Rows("a result goes where its x is", 4, "load(order + m).y", "load(order + m).x"),
    Rows("values of an expert begin where those of 4 bytes would", 4, "by * size;", "by * 4;"),
    Bug("decode has the first expert's scales", 4, "BITS / 8), moved(scales, row * scale_row, scale_dtype)",
        "BITS / 8), scales"),
    Bug("decode has the first expert's bias", 4, "zero_dtype), moved(bias, row, bias_dtype)", "zero_dtype), bias"),
    Bug("decode has the first expert's outliers", 4, "moved(outlier_rows, row), x, y", "outlier_rows, x, y"),
    Bug("batch has the first expert's codes", 4, "task = {tiles + row *", "task = {tiles + 0 *"),
    Bug("batch has the first expert's zeros", 4, "moved(zeros, row * zero_row, zero_dtype), x_sums", "zeros, x_sums"),
    Bug("the sums of x are those of the first rows", 4, "rows_of.of_x(row < rows ? row : 0)", "(row < rows ? row : 0)",
        file="packed/batch.cuh"),
    Bug("decode copies the first rows of x", 4, "rows_of.of_x(m) * K + first + x_column", "m * K + first + x_column",
        file="packed/decode.cuh"),
    Bug("the workspace has no room for sums of x", 4, "if (!takes_batch(call) ||", "if (takes_batch(call) ||",
        file="packed/experts.cu"),
)  # fmt: skip

# (E, N, K, group_size or None, T, r): few rows of many experts and many of few, groups that end in a chunk, tables of
# every size, N that fills no block, K that fills no tile
SHAPES = (
    (4, 5, 64, 32, 3, 2), (8, 3, 172, 32, 1, 8), (3, 33, 257, 64, 7, 1), (2, 9, 172, 7, 5, 4), (130, 2, 40, None, 2, 3),
    (2, 7, 320, 128, 37, 2), (1, 17, 96, None, 70, 1), (4, 5, 172, 7, 2, 2), (3, 2, 40, None, 300, 1),
    (5, 4, 1048, 100, 40, 3), (3, 6, 1000, 96, 1, 3), (2, 300, 40, 40, 20, 2),
)  # fmt: skip
ZEROS: tuple[Literal["none", "int", "float"], ...] = ("none", "int", "float")
SCALES = ("float32", "float16", "bfloat16")


def stack(bits: int, e: int, n: int, k: int, group_size: int | None, i: int, *, exact: bool = False) -> Weight:
    """A random stack ``[e*n, k]``; zeros, dtypes and outliers in rotation by ``i``. Layers have no codes of one bit."""
    f = PackedFormat(
        bits=max(bits, 2), out_features=e * n, in_features=k, group_size=group_size or k,
        granularity="group" if group_size else ("row", "tensor")[i % 2], zeros=ZEROS[i % 3],
        scale_dtype=SCALES[(i + bits) % 3], outlier_dtype=SCALES[i % 3],
        outliers=max(1, e * n * k // 50) * (i // 3 % 2),
    )  # fmt: skip
    object.__setattr__(f, "bits", bits)
    return random_weight(f, i, power_of_two=exact)


def some_ids(s: int, e: int, seed: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Experts in any order, some of them elsewhere, some negative; the last one has no rows where there are others."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, max(1, e - 1), (s,), generator=draw)
    kind = torch.rand(s, generator=draw)
    ids[kind < 0.2] = e + seed % 3
    ids[kind < 0.05] = -1 - seed % 2
    return ids.to(dtype)


def assert_right(y: Tensor, weight: Tensor, x: Tensor, ids: Tensor, e: int, bias: Tensor | None = None) -> None:
    """Each row by float64, of the weight ``[e*n, k]``; those of no expert are zeros, or NaN if the id is negative."""
    dense, rows = weight.view(e, -1, x.shape[1]), torch.arange(len(ids)) // (len(ids) // len(x))
    for number in ids.unique().tolist():
        mine = ids == number
        if number < 0 or number >= e:
            assert_bitwise_equal(y[mine], torch.full_like(y[mine], torch.nan if number < 0 else 0.0))
        else:
            own = None if bias is None else bias.view(e, -1)[number]
            assert_linear_close(y[mine], x[rows[mine]], dense[number], own)


def check(kernels: Any, bits: int) -> int:
    """Compares a few cases of one width with float64; raises where one is wrong. The number of cases."""
    cases = 0
    for i, (e, n, k, group_size, tokens, repeats) in enumerate(SHAPES):
        for j in range(2):
            seed = i + 3 * j + i // 3 + j
            weight = stack(bits, e, n, k, group_size, seed)
            x = activations(tokens, k, DTYPES[(i + 1 + j) % 3])
            ids = some_ids(tokens * repeats, e, seed, (torch.int64, torch.int32)[(i + j) % 2])
            if ids.dtype == torch.int64:
                ids[-1] = 2**32 + 1
            bias = None if (i + j) % 2 else activations(1, e * n, DTYPES[i % 3])[0]
            y = cuda_emulated.packed_experts(weight, x, ids, e, bias, order=j, of=kernels, by_group=i % 2 == 1)
            assert_right(y, weight.dense(), x, ids, e, bias)
            cases += 1
    return cases
