"""Bugs planted in ``csrc/cuda/codebook/linear_int8.cuh``, ``int8.cuh`` and ``steps.cuh``, and in their launches."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from lowbit.backends.operands import Activation
from lowbit.backends.reference import quantize_activations
from lowbit.core.bitpack import pack
from lowbit.testing import cuda_codebook, cuda_planted
from lowbit.testing.codebook_cases import kinds, random_weight
from lowbit.testing.numerics import assert_bitwise_equal, assert_linear_close
from lowbit.testing.packed_cases import activations

Bug = partial(cuda_planted.Bug, file="codebook/linear_int8.cuh")
Shared = partial(cuda_planted.Bug, file="codebook/int8.cuh")
Around = partial(cuda_planted.Bug, file="codebook/steps.cuh")
Host = partial(cuda_planted.Bug, file="codebook/linear_int8.h")

BUGS = (
    Shared("integers are rounded towards zero", 4, "scaled + 12582912.0f", "float(int(scaled)) + 12582912.0f"),
    Shared("integers end at 32766", 3, "LARGEST = 32767.0f", "LARGEST = 32766.0f"),
    Shared("the high bytes count 255", 4, "static_cast<float>(256 * high + low)",
           "static_cast<float>(255 * high + low)"),
    Shared("sums of 64 bits are added in 32", 2, "static_cast<float>(256 * high + low)",
           "static_cast<float>(int32_t(256 * high + low))"),
    Shared("every row has the step of the first", 4, "load(steps + n)", "load(steps)"),
    Shared("outliers multiply the first row of x", 4, "static_cast<int64_t>(m) * K + column", "column"),
    Around("a step knows half of its table", 5, "i < entries;", "i < entries / 2;"),
    Around("a step knows the scale of the first group alone", 4, "i < groups;", "i < 1;"),
    Around("scales below zero are no scales", 4, "bits_of(value) & 0x7FFFFFFFu", "(value < 0 ? 0 : bits_of(value))"),
    Around("the step of one thread is that of all", 4, "i < STEP_THREADS; ++i) {\n    entry",
           "i < STEP_THREADS - 1; ++i) {\n    entry"),
    Around("tables too small for a step are not zeros", 3, "0x00800000u", "0x00000000u"),
    Around("the low bytes of splits are left out", 4, "low += load(parts", "low += 0 * load(parts"),
    Bug("high bytes have no sign", 4, "multiply_signed_bytes(high[m]", "multiply_bytes(high[m]"),
    Bug("low bytes have a sign", 6, "multiply_bytes(low[m]", "multiply_signed_bytes(low[m]"),
    Bug("an operand has its columns exchanged", 4, "permute_bytes(first, second, 0x5410)",
        "permute_bytes(second, first, 0x5410)"),
    Bug("an operand has its rows exchanged", 4, "highs[2 * quad + half]", "highs[2 * quad + 1 - half]"),
    Bug("the second four columns have the codes of the first", 5, "bytes[half].of(w[half], chunk, 1)",
        "bytes[half].of(w[half], chunk, 0)"),
    Bug("the same, where groups have scales", 5, "2 * (i % 2) + 1), 0x6420)", "2 * (i % 2)), 0x6420)"),
    Bug("a group begins one column late", 4, "column >= group_end &&", "column > group_end &&"),
    Bug("a group past K is entered", 4, " && column < K) enter", ") enter"),
    Bug("half of the rows have the scales of others", 4, "(s.row[1]) * groups", "(s.row[0]) * groups"),
    Bug("every group has the table of the first", 7, "static_cast<int64_t>(group) * table_group", "0 * table_group"),
    Bug("scales are left out of tables", 3, "multiply(entry, scale_values.at(n)), 1.0f", "entry, 1.0f"),
    Bug("a table is that of the next row", 4, "s.first_row + row < N ? s.first_row + row :",
        "s.first_row + row + 1 < N ? s.first_row + row + 1 :"),
    Bug("a warp has the tables of another", 4, "16 * s.row_warp + 8 * half + s.g) * ENTRIES",
        "8 * half + s.g) * ENTRIES"),
    Bug("the copies of an entry overlap those of the next", 6, "one_table ? 7 : 2", "one_table ? 6 : 2"),
    Bug("half of the table is stored", 8, "i < table_end / 4;", "i < table_end / 8;"),
    Bug("x lies where the table is", 4, "columns, table_end,", "columns, 0,"),
    Bug("the second rows of x are the first", 4, "static_cast<int64_t>(first_x) * columns", "0 * columns"),
    Bug("a row of x that is not there is read", 4, "8 * m + s.g < x_rows ? 8 * m + s.g : x_rows - 1",
        "8 * m + s.g"),
    Bug("a ragged K: the last tile is not copied", 4, "slice * SLICE + column < columns",
        "slice * SLICE + column + TILE < columns"),
    Bug("every split begins with the first slice", 4, "s.first_slice = s.split * slices_of_k / splits,",
        "s.first_slice = 0,"),
    Bug("sums overwrite x while a warp still reads it", 4, "barrier();  // nobody reads x any more", "// "),
    Bug("sums are added before all warps have stored theirs", 4, "    barrier();\n    const codebook_int8::Finish",
        "    const codebook_int8::Finish"),
    Bug("the last warp's sums are left out", 4, "k < K_WARPS; ++k)\n", "k < K_WARPS - 1; ++k)\n"),
    Bug("a split is written over another", 4, "(2 * s.split + plane)", "(plane)"),
    Host("there is no room for the high bytes of splits", 4, "int64_t(8) * splits", "int64_t(4) * splits"),
    Bug("the second rows of x begin with the first", 4, "all.q + m * int8::columns_of(w.K)", "all.q",
        file="codebook/linear_int8.cu"),
)  # fmt: skip

# (N, K, group_size or None): blocks cut by N; K cut inside a chunk, and inside copies of 16 bytes; the ring of slices
# goes round twice; K in splits
SHAPES = ((33, 257, 64), (13, 172, 32), (9, 172, 7), (17, 96, None), (35, 5128, 128), (40, 2600, None))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(kernels: Any, bits: int) -> int:
    """Compares a few cases of one width with the reference or float64; raises where one is wrong. Their number."""
    cases = 0
    for i, shape in enumerate(SHAPES):
        for j, kind in enumerate(kinds(bits, *shape)):
            if shape[1] > 2000 and j % 3 != bits % 3:
                continue
            weight, dtype = random_weight(kind, i), DTYPES[(i + j) % 3]
            if j % 4 == 3 and kind.tables == "row":
                weight.codebook[2] = 1e-40
                if weight.scales is not None and weight.scales.dtype != torch.uint8:
                    weight.scales.neg_()
            x = activations((1, 33, 8, 16)[(i + j) % 4], shape[1], dtype, j)
            x_scale = torch.tensor([0.012]) if (i + j) % 4 == 1 else None
            options: dict[str, Any] = dict(int8=True, x_scale=x_scale, of=kernels, processors=(1, 132)[j % 2])
            y = cuda_codebook.linear(weight, x, order=j % 2, **options)
            assert_right(y, weight, x, x_scale)
            cases += 1
    # weights that are all 32767: sums are beyond 32 bits
    kind = next(kinds(bits, 3, 3100, None))
    weight, ones = random_weight(kind, 1), torch.ones(1, 3100)
    if bits == 4:  # in two launches
        x = activations(515, 3100, torch.float16)
        assert_right(cuda_codebook.linear(weight, x, int8=True, of=kernels, processors=132), weight, x, None)
    weight.codes.fill_(int(weight.codebook.abs().argmax()))
    weight.packed.copy_(pack(weight.codes, bits))
    weight._dense.clear()
    assert_right(cuda_codebook.linear(weight, ones, int8=True, of=kernels), weight, ones, None)
    return cases + 1


def assert_right(y: torch.Tensor, weight: Any, x: torch.Tensor, x_scale: torch.Tensor | None) -> None:
    if weight.outliers[0] is None:
        assert_bitwise_equal(y, weight.operands.linear(x, None, Activation(int8=True, x_scale=x_scale)))
        return
    q, inverse = quantize_activations(x, x_scale)
    fixed, step = weight.fixed_point()
    both = torch.cat([q.double() / inverse.double(), x.double()], 1)
    assert_linear_close(y, both, torch.cat([fixed * step.double(), weight.dense() - weight.dense(outliers=False)], 1))
