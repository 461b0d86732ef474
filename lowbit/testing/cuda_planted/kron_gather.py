"""Bugs of csrc/cuda/kron/gather.cuh. Of bits 0: found with dense factors; the others with packed ones."""

from __future__ import annotations

from typing import Any

import torch

from lowbit.kron.operands import KronOperands
from lowbit.testing import cuda_emulated
from lowbit.testing.cuda_planted import Bug
from lowbit.testing.kron_cases import DENSE, Kind, Weight, random_weight
from lowbit.testing.numerics import assert_bitwise_equal
from lowbit.testing.packed_cases import DTYPES

GATHER = "kron/gather.cuh"
BUGS = (
    Bug("an id of N is followed", 0, "n < 0 || n >= N", "n < 0 || n > N", GATHER),
    Bug("a negative id is followed", 0, "n < 0 || n >= N", "n >= N", GATHER),
    Bug("an id of 64 bits is cut to 32", 0, "load(static_cast<const int64_t*>(ids) + i)",
        "static_cast<int>(load(static_cast<const int64_t*>(ids) + i))", GATHER),
    Bug("rows are written before all of the factors are there", 0, "load_factors();\n  barrier();", "load_factors();",
        GATHER),
    Bug("the last rows are more than there are", 0, "count - first_row < rows ?", "count < 0 ?", GATHER),
    Bug("every term has the first a", 0, "a.at(static_cast<int64_t>(term) * N1", "a.at(static_cast<int64_t>(0) * N1",
        GATHER),
    Bug("every term has the first b", 0, "b.at(static_cast<int64_t>(term) * N2", "b.at(static_cast<int64_t>(0) * N2",
        GATHER),
    Bug("a row of b belongs to the wrong row of W", 0, "+ n % N2", "+ n % N1 % N2", GATHER),
    Bug("the second row of a block has the first one's factors", 0, "row_at(first_row + i / term_size / terms)",
        "row_at(first_row)", GATHER),
    Bug("the last column of a is not read", 0, "column < K1) value", "column < K1 - 1) value", GATHER),
    Bug("a product is not rounded before it is added", 0, "w[j + i] += multiply(left, float_of(word(right, i)))",
        "w[j + i] = fused_multiply_add(left, float_of(word(right, i)), w[j + i])", GATHER),
    Bug("a vector's second half is its first", 0, "b_begin + k2 + j))", "b_begin + k2))", GATHER),
    Bug("columns are not permuted", 0, "input_permutation == nullptr ? column : load(input_permutation + column)",
        "column", GATHER),
    Bug("rows are not permuted", 0, "if (output_permutation != nullptr) n",
        "if (output_permutation != nullptr && n < 0) n", GATHER),
    Bug("vectors are taken across rows of b", 0, "&& w.b.K % LANES == 0", "", "kron/gather.cu"),
    Bug("vectors are stored where rows begin anywhere", 0, "w.K % LANES == 0 &&", "", "kron/gather.cu"),
    Bug("a code does not go on in the next word", 3, "bit + bits > 32", "bit + bits > 64", "kron/stored.h"),
    Bug("groups are twice as long", 4, "column / group_size", "column / group_size / 2", "kron/stored.h"),
)  # fmt: skip

# rank, n1, k1, n2, k2: vectors in a row of b and across; several rows in a block and more than one block; sizes of one
SHAPES = (
    (2, 5, 9, 7, 11), (2, 6, 3, 5, 16), (1, 20, 9, 2, 24), (3, 2, 1, 33, 140), (1, 9, 20, 17, 30), (1, 1, 1, 1, 1),
    (2, 40, 4, 3, 24),
)  # fmt: skip


def expected(weight: Weight, ids: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The reference's; NaN where there is no row."""
    dense = KronOperands(**weight.arguments).dequantize(weight.k, dtype)
    if ids is None:
        return dense
    known = (ids >= 0) & (ids < len(dense))
    rows = dense[torch.where(known, ids, 0).long()]
    rows[~known] = torch.nan
    return rows


def check(kernels: Any, bits: int) -> int:
    """Compares a few cases bit for bit with the reference; raises where one is wrong. The number of cases."""
    # factors have 2 bits or more, or are dense
    packed = [Kind(torch.float16, bits, 7), Kind(torch.bfloat16, bits, None, zeros="int")]
    for i, shape in enumerate(SHAPES):
        for j, dtype in enumerate(DTYPES):
            a, b = (packed[(i + j) % 2], packed[j % 2]) if bits > 1 else (DENSE[(i + j) % 3], DENSE[(i + 2 * j) % 3])
            weight = random_weight(shape, a, b, seed=i)
            if (i + j) % 3 == 1:
                weight = weight.permuted(i)
            n = weight.n
            ids = torch.tensor([n - 1, 0, n, -1, n // 2, 2**32 + 1, n - 1, -(2**40)])
            given = (None, ids, ids.clamp(-2, n + 1).int())[(i + j // 2) % 3]
            rows = cuda_emulated.kron_rows(weight, given, dtype, order=j % 2, of=kernels)
            assert_bitwise_equal(rows, expected(weight, given, dtype))
    return len(SHAPES) * len(DTYPES)
