"""Bugs planted in ``csrc/cuda/packed/batch_int8.cuh``, its plan and its launches."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from lowbit.testing import cuda_emulated, cuda_planted
from lowbit.testing.cuda_int8 import assert_int8_close, one_integer, reference
from lowbit.testing.cuda_planted.packed_decode import some_formats
from lowbit.testing.numerics import assert_bitwise_equal
from lowbit.testing.packed_cases import activations, random_weight

Bug = partial(cuda_planted.Bug, file="packed/batch_int8.cuh")

BUGS = (
    Bug("a tile is multiplied before all threads have it", 4, "barrier();  // the tile is there", "// "),
    Bug("one copy too few is waited for", 4, "wait_copies<1>();", "wait_copies<2>();"),
    Bug("a tile overwrites the one that is read", 4, "fetch_tile(tile + stages - 1, free_stage)",
        "fetch_tile(tile + stages - 1, stage)"),
    Bug("the ring has a stage more than there is room for", 8, "end_stage = stages * STAGE_BYTES",
        "end_stage = (stages + 1) * STAGE_BYTES"),
    Bug("x is not swizzled where it is read", 4, "^ g % 4 * 32)", "^ 0)"),
    Bug("rows of x past the last one are copied", 4, "const bool beyond = m >= x_rows;", "const bool beyond = false;"),
    Bug("rows of W past the last one are read", 4, "n < N ? n : N - 1", "n"),
    Bug("the parts of 8 bits are the first one", 8, "(i * PARTS + chunk / FIELDS)", "(i * PARTS + 0 * chunk)"),
    Bug("the plane of two bits is another one", 6, "(i * PARTS + 2) * THREADS + mine",
        "(i * PARTS + 1) * THREADS + mine"),
    Bug("a plane's high bytes are its low ones", 2, "0x7531u : 0x6420u", "0x6420u : 0x6420u"),
    Bug("the plane of two bits is taken from the next chunk", 7, ">> chunk % 4 * 2 & 0x03u",
        ">> (chunk + 1) % 4 * 2 & 0x03u"),
    Bug("the plane of one bit is added one bit too high", 3, "EACH) << (BITS - 1)", "EACH) << BITS"),
    Bug("the zero of symmetric formats is one too low", 4, "center[i] = 1 << (BITS - 1)",
        "center[i] = (1 << (BITS - 1)) - 1"),
    Bug("what the center leaves of a zero has the wrong sign", 2, "static_cast<float>(center[i]) - zero",
        "zero - static_cast<float>(center[i])"),
    Bug("sums of x are those of another group", 2, "static_cast<int64_t>(group) * x_sums_row",
        "static_cast<int64_t>(group ^ 1) * x_sums_row"),
    Bug("each split subtracts the zero of an exact sum", 4, "exact && split > 0 ? 0 : load", "false ? 0 : load"),
    Bug("products of a group stay for the next one", 4, "          product = 0;\n", ""),
    Bug("a group keeps the scales of the one before", 4, "    fetch_group(group + 1);", "    fetch_group(group);"),
    Bug("the last group does not end", 2, "      end_group();\n      LOWBIT_UNROLL", "      LOWBIT_UNROLL"),
    Bug("a chunk that a group ends in is multiplied once", 5, "if constexpr (!CUT) break;", "break;"),
    Bug("columns of other groups count", 5, "a[i][j] &= int8::bytes_inside", "a[i][j] &= ~0u | int8::bytes_inside"),
    Bug("an operand has its rows exchanged", 4, "a[2 * r][0], a[2 * r + 1][0], a[2 * r][1], a[2 * r + 1][1]",
        "a[2 * r + 1][0], a[2 * r][0], a[2 * r + 1][1], a[2 * r][1]"),
    Bug("the scale of the first row is the second's too", 4, "fused_multiply_add(scale[i], sum",
        "fused_multiply_add(scale[i & ~1], sum"),
    Bug("every split adds all outliers", 4, "int i = begin + split; i < end; i += splits",
        "int i = begin; i < end; ++i"),
    Bug("sums overwrite x while a warp still reads it", 4, "barrier();  // nobody reads x any more", "// "),
    Bug("sums are stored before all warps have theirs", 4, "    barrier();\n    const int n = block_row",
        "    const int n = block_row"),
    Bug("an x tile is written over another", 4, "const int m = first_x + first + j;", "const int m = first + j;"),
    Bug("a split is written over another", 4, "(static_cast<int64_t>(split) * M + m) * N + n",
        "static_cast<int64_t>(m) * N + n"),
    Bug("a split begins one tile late", 4, "first_tile = split * units / splits * unit,",
        "first_tile = split * units / splits * unit + (split > 0),"),
    Bug("one lane's sums of x are left out", 4, "for (int i = 0; i < 32; ++i) sum +=",
        "for (int i = 1; i < 32; ++i) sum +="),
    Bug("sums of x go on in the next group", 4, "begin + group_size < K ? begin + group_size : K",
        "begin + group_size < K ? begin + group_size + 1 : K"),
    Bug("a group is in two splits", 4, "group / std::gcd(group, int64_t(TILE))", "1", file="packed/batch_int8.h"),
    Bug("x of the second part begins with the first row", 4, "first * w.K * element", "0 * w.K * element",
        file="packed/batch_int8.cu"),
)  # fmt: skip

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# (N, K, group_size or None), M: blocks and warps cut by N, x tiles by M; K cut inside a chunk and a tile; groups that
# end inside chunks; the ring goes round twice; groups longer than a tile
CASES = (
    ((33, 257, 64), 17), ((9, 172, 7), 34), ((17, 96, None), 20), ((140, 520, 128), 70), ((35, 1304, None), 33),
    ((5, 3080, 512), 17), ((5, 3080, 1024), 17),
)  # fmt: skip


def check(kernels: Any, bits: int) -> int:
    """Compares a few cases of one width with float64; raises where one is wrong. The number of cases."""
    cases = 0
    for i, (shape, m) in enumerate(CASES):
        for j, found in enumerate(some_formats(bits, *shape)):
            if shape[0] > 100 and j % 2:
                continue
            weight, dtype = random_weight(found, i), DTYPES[(i + j) % 3]
            x, x_scale = activations(m, shape[1], dtype, j), torch.tensor([0.012]) if j % 4 == 1 else None
            small = (i + j // 2) % 2 == 0
            y = cuda_emulated.packed_linear(
                weight, x, int8=True, x_scale=x_scale, order=j % 2, of=kernels, processors=132 if small else 1,
                shared_bytes=(99 if small else 227) << 10,
            )  # fmt: skip
            assert_int8_close(y, x, weight, x_scale=x_scale)
            if one_integer(weight) and not found.outliers:
                assert_bitwise_equal(y, reference(x, weight, x_scale=x_scale))
            cases += 1
    # 512 rows of x at a time, where K is split
    weight = random_weight(next(some_formats(bits, 5, 1032, 128)))
    x = activations(515, 1032, torch.float16)
    y = cuda_emulated.packed_linear(weight, x, int8=True, of=kernels, processors=132, batch_invariant=True)
    assert_int8_close(y, x, weight)
    return cases + 1
