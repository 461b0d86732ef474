"""Gathered rows and whole weights by the CUDA C++ kernels: compiled by g++ for the CPU, and as PTX. Bit for bit."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from benchmarks.tools import cuda_compiled
from benchmarks.tools.cuda_kernels import PACKED_GATHER, WIDTHS
from lowbit.testing import cuda_emulated, cuda_ptx, verdicts
from lowbit.testing.cuda_emulated import packed_rows
from lowbit.testing.cuda_planted.packed_decode import some_formats
from lowbit.testing.cuda_planted.packed_gather import expected
from lowbit.testing.numerics import assert_bitwise_equal
from lowbit.testing.packed_cases import DTYPES, SHAPES, Weight, random_weight

pytestmark = pytest.mark.recorded(sources=["csrc/common", "csrc/cuda"])
needs_emulation = pytest.mark.skipif(
    cuda_emulated.why_not() is not None, reason=f"not built: {cuda_emulated.why_not()}"
)
needs_nvcc = pytest.mark.skipif(cuda_compiled.nvcc_version() is None, reason="no nvcc")

# Rows of several tiles: of whole vectors, the last tile cut; in groups that end inside vectors; longer than a block
LONG = ((3, 1096, 64), (2, 2052, 37), (1, 17_000, None), (5, 512, 100))


@needs_emulation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", WIDTHS)
def test_rows(bits, dtype):
    """Every shape and format; ids of both widths, none, and all rows, order of scales and of warps in rotation."""
    for i, shape in enumerate((*SHAPES, *LONG)):
        for j, found in enumerate(some_formats(bits, *shape)):
            weight, turn = random_weight(found, i), i + j
            n = found.out_features
            g = torch.Generator().manual_seed(j)
            ids = torch.randint(0, n, ((7, 1, 40, 0)[turn % 4],), generator=g, dtype=(torch.int64, torch.int32)[j % 2])
            given = None if turn % 3 == 0 else ids
            by_group = turn % 4 < 2 and weight.scales.shape[0] == n
            rows = packed_rows(weight, given, dtype, order=j % 2, by_group=by_group, misaligned=turn % 5 == 0)
            assert_bitwise_equal(rows, expected(weight, given, dtype))


@needs_emulation
@pytest.mark.parametrize("bits", WIDTHS[1:])
def test_rows_are_those_of_the_reference(bits):
    (*_, last) = some_formats(bits, 13, 172, 32)
    weight, ids = random_weight(last), torch.tensor([3, 12, 0, 3])
    assert weight.zeros is not None and weight.outliers[0] is not None
    for dtype in DTYPES:
        assert_bitwise_equal(packed_rows(weight, None, dtype), weight.operands.dequantize(172, dtype))
        assert_bitwise_equal(packed_rows(weight, ids, dtype), weight.operands.embedding(ids, 172, dtype))


def with_outliers(bits: int, n: int, k: int, group_size: int | None, outliers: bool = True) -> Weight:
    return random_weight(next(f for f in some_formats(bits, n, k, group_size) if bool(f.outliers) == outliers))


@needs_emulation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_id_that_is_no_row_gives_nan(dtype):
    for k, outliers in ((96, True), (96, False), (301, True)):
        weight = with_outliers(4, 5, k, 32, outliers)
        ids = torch.tensor([4, -1, 0, 5, 2, 2**31 - 1, -(2**31)], dtype=torch.int32)
        wide = torch.tensor([4, -1, 2**32, 5, 2, 2**62, -(2**63), 1 - 2**32])
        for given in (ids, wide):
            assert_bitwise_equal(packed_rows(weight, given, dtype), expected(weight, given, dtype))


@needs_emulation
def test_columns_of_outliers_beyond_16_bits():
    weight = with_outliers(3, 2, 66_000, None)
    assert weight.outliers[1] is not None and weight.outliers[1].dtype == torch.int32
    assert_bitwise_equal(packed_rows(weight, None, torch.float16), expected(weight, None, torch.float16))


@cache
def ptx(bits: int) -> str:
    return cuda_compiled.compile_ptx(PACKED_GATHER, "sm_80", bits)


@needs_nvcc
@pytest.mark.parametrize("bits", WIDTHS)
def test_compiled_code(bits, request):
    """Every dtype of this width; what is added to a product is added to the rounded one. `make test` takes a width."""
    verdicts.only_in_turn(request.config, bits, len(WIDTHS))
    for i, shape in enumerate(((13, 172, 32), (9, 172, 7), (5, 1096, 64), (3, 2052, None))):
        for j, found in enumerate(some_formats(bits, *shape)):
            weight, dtype = random_weight(found, i), DTYPES[(i + j) % 3]
            ids = torch.tensor([shape[0] - 1, -1, 0, shape[0], 2**32, 2, 2])
            given = (None, ids, ids.clamp(-1, 2**31 - 1).int())[(i + j // 2) % 3]
            rows, statistics = cuda_ptx.packed_gather(ptx(bits), weight, given, dtype)
            assert_bitwise_equal(rows, expected(weight, given, dtype))
            vectors = shape[1] * dtype.itemsize % 16 == 0 and shape[2] != 7
            assert not vectors or statistics.count("st.global.v4") > 0
