"""Rows of Kronecker products by the CUDA C++ kernel, compiled by g++ for the CPU, and as PTX. Bit for bit."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from benchmarks.tools import cuda_compiled
from benchmarks.tools.cuda_kernels import KRON_GATHER
from lowbit.testing import cuda_emulated, cuda_ptx, verdicts
from lowbit.testing.cuda_emulated import kron_rows
from lowbit.testing.cuda_planted.kron_gather import expected
from lowbit.testing.kron_cases import DENSE, SHAPES, Kind, packed_kinds, random_weight
from lowbit.testing.numerics import assert_bitwise_equal
from lowbit.testing.packed_cases import DTYPES

pytestmark = pytest.mark.recorded(sources=["csrc/common", "csrc/cuda"])
needs_emulation = pytest.mark.skipif(
    cuda_emulated.why_not() is not None, reason=f"not built: {cuda_emulated.why_not()}"
)
needs_nvcc = pytest.mark.skipif(cuda_compiled.nvcc_version() is None, reason="no nvcc")

BITS = tuple(range(2, 9))  # of packed factors


def some_ids(n: int, turn: int) -> torch.Tensor | None:
    """None, or ids of either width, some of them no rows."""
    ids = torch.tensor([n - 1, 0, n, -1, n // 2, 2**32, n - 1, -(2**40)])
    return (None, ids, ids.clamp(-(2**31), 2**31 - 1).int(), ids[:0])[turn % 4]


@needs_emulation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_factors(dtype):
    """Every shape; dtypes of factors, ids, permutations, order of warps and alignment in rotation."""
    for i, shape in enumerate((*SHAPES, (1, 9, 40, 5, 64), (2, 40, 4, 3, 24))):
        for j in range(3):
            weight = random_weight(shape, DENSE[(i + j) % 3], DENSE[j], seed=i)
            if (i + j) % 4 > 1:
                weight = weight.permuted(i, inputs=i % 3 != 0, outputs=i % 3 != 1)
            ids = some_ids(weight.n, i + j)
            rows = kron_rows(weight, ids, dtype, order=j % 2, misaligned=(i + j) % 5 == 0)
            assert_bitwise_equal(rows, expected(weight, ids, dtype))


@needs_emulation
@pytest.mark.parametrize("bits", BITS)
def test_packed_factors(bits):
    """Every kind of one factor; the other dense or packed, and the dtype, in rotation."""
    for i, kind in enumerate(packed_kinds(bits)):
        other = (*DENSE, kind, Kind(torch.float16, 4, 32))[i % 5]
        shape = ((1, 13, 6, 5, 33), (2, 12, 40, 20, 20), (1, 20, 9, 66, 17))[i % 3]
        a, b = (kind, other) if i % 2 else (other, kind)
        weight, dtype = random_weight(shape, a, b, seed=i), DTYPES[(i + bits) % 3]
        ids = some_ids(weight.n, i)
        assert_bitwise_equal(kron_rows(weight, ids, dtype, order=i % 2), expected(weight, ids, dtype))


@needs_emulation
def test_a_permutation_that_is_none_is_not_followed():
    """Numbers outside of the range are not looked at on the host: what they stand for is NaN."""
    weight = random_weight((1, 5, 6, 7, 8)).permuted(1)
    assert weight.input_permutation is not None and weight.output_permutation is not None
    columns, rows = weight.input_permutation.clone(), weight.output_permutation.clone()
    columns[3], rows[4], rows[5] = weight.k, -1, 2**31 - 1
    found = kron_rows(replace(weight, input_permutation=columns, output_permutation=rows), None, torch.float16)
    wanted = expected(weight, None, torch.float16)
    wanted[:, 3] = wanted[4:6] = torch.nan
    assert_bitwise_equal(found, wanted)


@needs_emulation
def test_a_call_that_is_declined_says_why():
    weight = random_weight((2, 1, 400, 2, 3))
    with pytest.raises(ValueError, match="the rows of two factors do not fit"):
        kron_rows(weight, None, torch.float32, shared_bytes=3 << 10)


@cache
def ptx(architecture: str) -> str:
    return cuda_compiled.compile_ptx(KRON_GATHER, architecture, None)


@needs_nvcc
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_compiled_code(architecture, dtype, request):
    """Every instance; what is added to a product is added to the rounded one."""
    turn = DTYPES.index(dtype) + 3 * (architecture == "sm_80")
    verdicts.only_in_turn(request.config, turn, 6)
    for i, shape in enumerate(((2, 5, 9, 7, 11), (2, 6, 3, 5, 16), (3, 2, 1, 33, 140), (1, 9, 20, 17, 30))):
        packed = Kind(torch.float16, BITS[(i + 4 * turn) % len(BITS)], 7, zeros="float")
        for j, kind in enumerate((DENSE[i % 3], packed)):
            weight = random_weight(shape, kind, DENSE[(i + j) % 3], seed=i)
            weight = weight.permuted(j) if i % 2 == j else weight
            ids = some_ids(weight.n, i % 3)
            rows, statistics = cuda_ptx.kron_gather(ptx(architecture), weight, ids, dtype, rows=1 + i)
            assert_bitwise_equal(rows, expected(weight, ids, dtype))
            assert weight.k * dtype.itemsize % 16 or statistics.count("st.global.v4") > 0
