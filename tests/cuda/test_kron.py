"""Kronecker products by the CUDA C++ kernel, compiled by g++ for the CPU, and as PTX, against float64."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.tools import cuda_compiled
from benchmarks.tools.cuda_kernels import KRON_FUSED
from lowbit.testing import cuda_emulated, cuda_ptx, verdicts
from lowbit.testing.cuda_emulated import kron_linear
from lowbit.testing.kron_cases import DENSE, SHAPES, Kind, packed_kinds, random_weight
from lowbit.testing.numerics import assert_bitwise_equal
from lowbit.testing.packed_cases import DTYPES, activations

pytestmark = pytest.mark.recorded(sources=["csrc/common", "csrc/cuda"])
needs_emulation = pytest.mark.skipif(
    cuda_emulated.why_not() is not None, reason=f"not built: {cuda_emulated.why_not()}"
)
needs_nvcc = pytest.mark.skipif(cuda_compiled.nvcc_version() is None, reason="no nvcc")

BITS = tuple(range(2, 9))  # of packed factors
ROWS, PACKED_ROWS = (1, 2, 3, 5, 17, 0), (3, 3, 3, 17)
# KP and NP beyond 64 and beyond 128; two terms; whole tiles; several chunks of KQ
LARGER = ((1, 20, 72, 24, 40), (1, 72, 100, 24, 40), (1, 140, 33, 9, 12), (2, 32, 64, 16, 32), (1, 8, 130, 16, 8))

WIDE = (1, 3, 2, 5, 1056)


@needs_emulation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("a", DENSE, ids=str)
def test_dense_factors(a, dtype):
    """Every shape; the other factor, rows of x, bias, permutations, order of warps and alignment in rotation."""
    for i, shape in enumerate((*SHAPES, *LARGER)):
        weight = random_weight(shape, a, DENSE[i % 3], seed=i)
        if i % 4 > 1:
            weight = weight.permuted(i, inputs=i % 3 != 0, outputs=i % 3 != 1)
        x = activations(ROWS[i % len(ROWS)], weight.k, dtype, seed=i)
        bias = None if i % 3 == 0 else activations(1, weight.n, DTYPES[i % 3], seed=i)[0]
        if shape == WIDE and dtype == torch.float32:
            continue  # declined: a row of x does not fit
        y = kron_linear(weight, x, bias, order=i % 2, processors=1 + i % 2, misaligned=i % 5 == 0)
        weight.assert_close(y, x, bias)


@needs_emulation
@pytest.mark.parametrize("bits", BITS)
def test_packed_factors(bits):
    """Every kind of one factor; the other dense or packed, and the dtype of x, in rotation."""
    for i, kind in enumerate(packed_kinds(bits)):
        other = (*DENSE, kind, Kind(torch.float16, 4, 32))[i % 5]
        shape = ((1, 13, 6, 5, 33), (2, 12, 40, 20, 20), (1, 20, 9, 66, 17))[i % 3]
        a, b = (kind, other) if i % 2 else (other, kind)
        weight = random_weight(shape, a, b, seed=i)
        x = activations(PACKED_ROWS[i % len(PACKED_ROWS)], weight.k, DTYPES[(i + bits) % 3], seed=i)
        weight.assert_close(kron_linear(weight, x, order=i % 2), x)


@needs_emulation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integer_arithmetic_is_exact(dtype):
    """Small integers and powers of two: float32 sums are exact, so y is the float64 result, rounded once."""
    for i, kind in enumerate((*DENSE, Kind(torch.float32, 3, 7, zeros="int"), Kind(torch.bfloat16, 4, None))):
        for shape in ((2, 5, 9, 7, 11), (1, 20, 40, 24, 36), (1, 9, 20, 17, 30)):
            weight = random_weight(shape, kind, DENSE[i % 3], seed=i, integers=True).permuted(i)
            x = torch.randint(-3, 4, (5, weight.k), generator=torch.Generator().manual_seed(i)).to(dtype)
            exact = (x.double() @ weight.dense().t()).to(dtype)
            assert_bitwise_equal(kron_linear(weight, x), exact)


@needs_emulation
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_one_hot_activations_give_the_weight(dtype):
    """Of factors of 16 bits their products are exact in float32: each is rounded once, to the dtype of x."""
    for a in DENSE[1:]:
        for b in DENSE[1:]:
            weight = random_weight((1, 5, 6, 7, 8), a, b).permuted(1)
            y = kron_linear(weight, torch.eye(weight.k, dtype=dtype))
            assert_bitwise_equal(y, weight.dense().t().float().to(dtype))


@needs_emulation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_in_every_batch(dtype):
    """Bit for bit, whatever M, the number of blocks and the room for x are, and in whatever order the warps run."""
    for shape in ((2, 12, 10, 20, 20), (1, 40, 33, 9, 30), (1, 72, 8, 20, 16)):
        weight = random_weight(shape, DENSE[1], DENSE[2]).permuted(3, inputs=False)
        x, bias = activations(19, weight.k, dtype), torch.randn(weight.n)
        whole = kron_linear(weight, x, bias)
        for m, first, options in (
            (1, 0, {}), (1, 18, {}), (2, 17, {}), (7, 3, dict(processors=1)), (8, 11, dict(shared_bytes=99 << 10)),
            (19, 0, dict(order=1, processors=1)), (19, 0, dict(shared_bytes=40 << 10, processors=1)),
        ):  # fmt: skip
            rows = slice(first, first + m)
            assert_bitwise_equal(kron_linear(weight, x[rows], bias, **options), whole[rows])


@needs_emulation
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_what_is_not_finite_stays_in_its_row(value):
    weight = random_weight((1, 13, 33, 5, 20), DENSE[1], DENSE[2])
    for dtype in DTYPES:
        x = activations(11, weight.k, dtype)
        before = kron_linear(weight, x)
        x[6, weight.k - 1] = value
        y = kron_linear(weight, x)
        rest = [m for m in range(11) if m != 6]
        assert_bitwise_equal(y[rest], before[rest])
        assert not y[6].isfinite().any()


@needs_emulation
def test_a_weight_that_is_not_finite_stays_in_its_rows():
    """Where factors are filled up with zeros, an infinite weight would give NaN."""
    for name in "ab":
        weight = random_weight((1, 13, 33, 5, 20), DENSE[2], DENSE[2])
        getattr(weight, name).tensor[0, 2, 3] = torch.inf
        getattr(weight, name).values[0, 2, 3] = torch.inf
        x = activations(2, weight.k, torch.bfloat16)
        y, finite = kron_linear(weight, x), weight.dense().isfinite().all(1)
        assert 0 < int(finite.sum()) < weight.n
        assert bool(y[:, finite].isfinite().all()) and not bool(y[:, ~finite].isfinite().any())


@needs_emulation
def test_a_permutation_that_is_none_is_not_followed():
    """Numbers outside of the range are not looked at on the host: nothing else is read or written for them."""
    weight = random_weight((1, 5, 6, 7, 8), DENSE[2], DENSE[2]).permuted(1)
    assert weight.output_permutation is not None
    wrong = weight.output_permutation.clone()
    wrong[3], wrong[4] = -1, weight.n
    x = activations(2, weight.k, torch.bfloat16)
    y, whole = kron_linear(replace(weight, output_permutation=wrong), x), kron_linear(weight, x)
    rest = [n for n in range(weight.n) if n not in (3, 4)]
    assert_bitwise_equal(y[:, rest], whole[:, rest])


@needs_emulation
@pytest.mark.parametrize(
    ("shape", "shared_bytes", "reason"),
    [
        (WIDE, 99 << 10, "a row of x and of y do not fit"),
        ((1, 30, 30, 30, 30), 20 << 10, "a row of x and of y do not fit"),
        ((1, 2000, 1000, 1, 1), 227 << 10, "the factors do not fit"),
    ],
)
def test_a_call_that_is_declined_says_why(shape, shared_bytes, reason):
    weight = random_weight(shape)
    with pytest.raises(ValueError, match=reason):
        kron_linear(weight, activations(1, weight.k, torch.float16), shared_bytes=shared_bytes)


@cache
def ptx(architecture: str) -> str:
    return cuda_compiled.compile_ptx(KRON_FUSED, architecture, None)


PTX_ROWS, PTX_BITS = (5, 17), tuple(range(2, 9))
COMPILED: tuple[dict[str, Any], ...] = (
    dict(shape=(1, 20, 40, 24, 40)), dict(shape=(2, 5, 9, 7, 11), rows=1, stages=1, blocks=2),
    dict(shape=(1, 72, 8, 20, 24), rows=3), dict(shape=(1, 20, 9, 66, 17), a_first=True, blocks=2),
)  # fmt: skip


@needs_nvcc
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_compiled_code(architecture, dtype, request):
    """Every instance: dense and packed factors of every dtype, with permutations and without, in either order."""
    turn = DTYPES.index(dtype) + 3 * (architecture == "sm_80")
    verdicts.only_in_turn(request.config, turn, 6)
    for i, case in enumerate(COMPILED):
        options = dict(case)
        packed = Kind(torch.float16, PTX_BITS[(i + 4 * turn) % len(PTX_BITS)], 7)
        for j, kind in enumerate((DENSE[i % 3], DENSE[DTYPES.index(dtype)], packed)):
            a, b = (kind, DENSE[1 + (i + j) % 2]) if j < 2 else (DENSE[i % 3], kind)
            weight = random_weight(case["shape"], a, b, seed=i)
            weight = weight.permuted(j) if j == 1 else weight
            x, bias = activations(PTX_ROWS[i == 1], weight.k, dtype, seed=i), torch.randn(weight.n)
            options.pop("shape", None)
            y, statistics = cuda_ptx.kron_fused(ptx(architecture), weight, x, bias, **options)
            weight.assert_close(y, x, bias)
            assert statistics.count("mma.sync") > 0
