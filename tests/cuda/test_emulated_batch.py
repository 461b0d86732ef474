"""``csrc/cuda/packed/batch.cuh`` on the CPU, compiled by g++ on csrc/cuda/emulated/emulation.h."""

from __future__ import annotations

import pytest
import torch

from lowbit.core.bitpack import pack
from lowbit.packed.format import PackedFormat
from lowbit.testing import cuda_emulated, verdicts
from lowbit.testing.cuda_emulated import packed_linear
from lowbit.testing.cuda_planted.packed_decode import some_formats
from lowbit.testing.numerics import assert_bitwise_equal, assert_linear_close
from lowbit.testing.packed_cases import SHAPES, activations, random_weight

pytestmark = [
    pytest.mark.recorded(sources=["csrc/common", "csrc/cuda"]),
    pytest.mark.skipif(cuda_emulated.why_not() is not None, reason=f"not built: {cuda_emulated.why_not()}"),
]

BITS = tuple(range(1, 9))
DTYPES = (torch.float16, torch.bfloat16)
ROWS = (17, 32, 33, 64, 65)
SMALL, LARGE = 99 << 10, 163 << 10  # bytes of shared memory: a ring of two stages, of three
# N in several blocks; several tiles, the last one cut; groups of a slice, of a chunk, longer than a tile; groups that
# end inside a chunk
LONG = ((259, 1304, 128), (33, 2600, 64), (5, 3080, 1024), (35, 1290, None), (3, 1100, 37), (20, 1056, 32))


def kernel_format(
    bits: int, n: int, k: int, group_size: int | None, zeros: str, outliers: bool = False
) -> PackedFormat:
    """The format of :func:`some_formats` with these zeros and outliers."""
    found = some_formats(bits, n, k, group_size)
    return next(f for f in found if f.zeros == zeros and bool(f.outliers) == outliers)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_linear(bits, dtype, request):
    """Every shape; formats, rows of x, bias, order of scales and of warps, splits and stages in rotation."""
    turn = verdicts.turn_of(10, request.config.rootpath) if request.config.getoption("verdicts") else None
    cases = [f for shape in (*SHAPES, *LONG) for f in some_formats(bits, *shape)]
    for i, found in enumerate(cases):
        if turn is not None and (i + bits) % 10 != turn:
            continue  # `make test` runs a tenth
        weight, n, k = random_weight(found, i), found.out_features, found.in_features
        x = activations(ROWS[(i // 2 + bits) % len(ROWS)], k, dtype, seed=i)
        bias = None if i % 3 == 0 else activations(1, n, (torch.float32, *DTYPES)[i % 3], seed=n)[0]
        y = packed_linear(
            weight, x, bias, order=i % 2, by_group=i % 4 < 2 and weight.scales.shape[0] == n,
            processors=(1, 132)[i // 2 % 2], shared_bytes=(SMALL, LARGE)[i // 3 % 2],
        )  # fmt: skip
        assert_linear_close(y, x, weight.dense(), bias)


@pytest.mark.parametrize("bits", BITS)
def test_integer_arithmetic_is_exact(bits):
    """Small integers and powers of two: float32 sums are exact, so y is the float64 result, rounded once."""
    for i, (n, k, group_size) in enumerate(SHAPES):
        format = list(some_formats(bits, n, k, group_size))[(i + bits) % 6]
        weight, dtype = random_weight(format, i, power_of_two=True), DTYPES[(i + bits) % 2]
        x = torch.randint(-3, 4, (17, k), generator=torch.Generator().manual_seed(i)).to(dtype)
        exact = x.double() @ weight.dense().t()
        assert_bitwise_equal(packed_linear(weight, x), exact.to(dtype))


@pytest.mark.parametrize("bits", BITS)
def test_every_code_is_the_operand_it_stands_for(bits):
    """One-hot x: the weights themselves, for every code and every center."""
    count = 1 << bits
    format = kernel_format(bits, count, count, None, "int")
    object.__setattr__(format, "granularity", "row")
    weight = random_weight(format, power_of_two=True)
    weight.codes = torch.arange(count, dtype=torch.uint8).expand(count, count).contiguous()
    weight.packed = pack(weight.codes, bits)
    weight.zeros = torch.arange(count, dtype=torch.uint8)[:, None]
    exact = weight.dense().t()
    for dtype in DTYPES:
        x = torch.eye(max(count, 17), count, dtype=dtype)
        y = packed_linear(weight, x, processors=132)
        assert_bitwise_equal(y[:count], exact.to(dtype))
        assert not y[count:].any()


@pytest.mark.parametrize(
    ("bits", "group_size", "zeros", "processors"),
    [(4, 128, "float", 1), (4, 128, "float", 132), (3, 1024, "float", 3), (7, 20, "int", 3)],
)
def test_a_row_is_the_same_in_every_batch(bits, group_size, zeros, processors):
    """Bit for bit, where a call says so: the splits depend on N, K and the GPU alone, and one kernel takes every M."""
    weight = random_weight(kernel_format(bits, 35, 2072, group_size, zeros, outliers=bits == 4))
    x, bias = activations(70, 2072, torch.float16), torch.randn(35)

    def rows(first: int, count: int, order: int = 0, shared_bytes: int = LARGE) -> torch.Tensor:
        some = x[first : first + count].clone()
        return packed_linear(
            weight, some, bias, batch_invariant=True, order=order, processors=processors, shared_bytes=shared_bytes
        )

    whole = rows(0, 70)
    assert_linear_close(whole, x, weight.dense(), bias)
    assert_bitwise_equal(rows(0, 70, order=1, shared_bytes=SMALL), whole)
    for first, count in ((3, 1), (60, 8), (5, 16), (0, 17), (20, 33)):
        assert_bitwise_equal(rows(first, count), whole[first : first + count])


def test_many_rows_are_split_in_parts():
    """Where rows may not depend on M, K is split for any M: 512 rows of x are in the workspace at a time."""
    weight = random_weight(kernel_format(4, 9, 1032, 128, "float"))
    x = activations(520, 1032, torch.bfloat16)
    whole = packed_linear(weight, x, batch_invariant=True, processors=132)
    assert_linear_close(whole, x, weight.dense())
    for first in (0, 500, 519):
        one = packed_linear(weight, x[first : first + 1].clone(), batch_invariant=True, processors=132)
        assert_bitwise_equal(one, whole[first : first + 1])


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("zeros", ["none", "int", "float"])
def test_what_is_not_finite_stays_in_its_row(zeros, value):
    weight = random_weight(kernel_format(4, 19, 300, 32, zeros, outliers=True))
    x = activations(40, 300, torch.float16)
    before = packed_linear(weight, x)
    x[36, 299] = value
    y = packed_linear(weight, x)
    rest = [m for m in range(40) if m != 36]
    assert_bitwise_equal(y[rest], before[rest])
    assert not y[36].isfinite().any()


def test_x_at_any_address():
    """Rows that begin at no multiple of 16 bytes are not copied asynchronously, and give the same."""
    weight = random_weight(kernel_format(4, 19, 1048, 64, "int"))
    room = torch.empty(20 * 1048 + 1, dtype=torch.float16)
    x = activations(20, 1048, torch.float16)
    elsewhere = room[1:].view(20, 1048).copy_(x)
    assert x.data_ptr() % 16 == 0 and elsewhere.data_ptr() % 16
    assert_bitwise_equal(packed_linear(weight, elsewhere), packed_linear(weight, x))


def test_columns_of_outliers_beyond_16_bits():
    weight = random_weight(kernel_format(2, 3, 66_000, None, "none", outliers=True))
    x = activations(17, 66_000, torch.bfloat16)
    assert_linear_close(packed_linear(weight, x, processors=132), x, weight.dense())


@pytest.mark.parametrize(
    ("dtype", "options", "reason"),
    [
        (torch.float16, dict(int8=True, x_group=32), "one scale for each row of x"),
        (torch.float16, dict(int8=True, shared_bytes=48 << 10), "99 KiB of shared memory"),
        (torch.float16, dict(shared_bytes=48 << 10), "99 KiB of shared memory"),
    ],
)
def test_a_call_that_is_declined_says_why(dtype, options, reason):
    weight = random_weight(kernel_format(4, 5, 64, 32, "int"))
    with pytest.raises(ValueError, match=reason):
        packed_linear(weight, activations(17, 64, dtype), **options)
