"""CUDA C++ kernels on the CPU, compiled by g++ on csrc/cuda/emulated/emulation.h: the case list of the CPU kernels.

Every access is checked, and what is read was synchronised. What else the emulation finds is in ``emulation.h``.
"""

from __future__ import annotations

import functools

import pytest
import torch

from lowbit.core.bitpack import pack
from lowbit.packed.format import PackedFormat
from lowbit.testing import cuda_emulated, verdicts
from lowbit.testing.cuda_emulated import packed_linear
from lowbit.testing.cuda_planted.packed_decode import some_formats
from lowbit.testing.numerics import assert_bitwise_equal, assert_linear_close
from lowbit.testing.packed_cases import SHAPES, Weight, activations, random_weight

pytestmark = [
    pytest.mark.recorded(sources=["csrc/common", "csrc/cuda"]),
    pytest.mark.skipif(cuda_emulated.why_not() is not None, reason=f"not built: {cuda_emulated.why_not()}"),
]

BITS = tuple(range(1, 9))
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ROWS = (1, 2, 3, 4, 5, 8, 9, 15, 16, 0)
FLOAT32, FLOAT32_ROWS = (torch.float32,), (17, 33)  # which no other kernel takes
# Slices of 1024 columns: several, the last one cut; a group longer than a slice, and than a tile; blocks cut by N
LONG = ((35, 7176, 128), (33, 4104, 2048), (32, 2560, 512), (3, 3001, 37))


@functools.cache
def all_weights(bits: int) -> list[Weight]:
    """Of every format; of the long shapes, which take their time, of two."""
    every = [f for shape in SHAPES for f in some_formats(bits, *shape)]
    long = [f for i, shape in enumerate(LONG) for f in list(some_formats(bits, *shape))[(bits + i) % 3 :: 3]]
    return [random_weight(f, seed) for seed, f in enumerate((*every, *long))]


def kernel_format(
    bits: int, n: int, k: int, group_size: int | None, zeros: str, outliers: bool = False
) -> PackedFormat:
    """The format of :func:`some_formats` with these zeros and outliers."""
    found = some_formats(bits, n, k, group_size)
    return next(f for f in found if f.zeros == zeros and bool(f.outliers) == outliers)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_linear(bits, dtype, request):
    """Every shape and format, with rows of x, bias, order of scales and of warps, and splits of K in rotation."""
    for i, weight in enumerate(all_weights(bits)):
        if not verdicts.in_turn(request.config, i + bits, 2):
            continue
        n, k = weight.format.out_features, weight.format.in_features
        x = activations(ROWS[(i + bits) % len(ROWS)], k, dtype, seed=i)
        bias = None if i % 3 == 0 else activations(1, n, DTYPES[i % 3], seed=n)[0]
        by_group = i % 4 < 2 and weight.scales.shape[0] == n
        y = packed_linear(weight, x, bias, order=i % 2, by_group=by_group, processors=(1, 132)[i // 2 % 2])
        assert_linear_close(y, x, weight.dense(), bias)


@pytest.mark.parametrize("dtype", FLOAT32, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_more_rows(bits, dtype):
    """8 at a time, the last ones fewer; where K is split, too."""
    for i, m in enumerate(FLOAT32_ROWS):
        weight = random_weight(kernel_format(bits, 35, (1096, 2600)[i], (64, None)[i], "float", outliers=i == 0), i)
        x, bias = activations(m, weight.format.in_features, dtype, seed=i), torch.randn(35)
        assert_linear_close(packed_linear(weight, x, bias, processors=(1, 132)[i]), x, weight.dense(), bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_integer_arithmetic_is_exact(bits, dtype):
    """Small integers and powers of two: float32 sums are exact, so y is the float64 result, rounded once."""
    for i, (n, k, group_size) in enumerate(SHAPES):
        for j, format in enumerate(some_formats(bits, n, k, group_size)):
            weight = random_weight(format, i, power_of_two=True)
            x = torch.randint(-3, 4, (5, k), generator=torch.Generator().manual_seed(j)).to(dtype)
            exact = x.double() @ weight.dense().t()
            assert_bitwise_equal(packed_linear(weight, x), exact.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_a_row_is_the_same_in_every_batch(bits, dtype, request):
    """Bit for bit, whatever M is and in whatever order the warps run."""
    verdicts.only_in_turn(request.config, bits + DTYPES.index(dtype), 2)
    for i, (n, k, group_size, zeros, outliers) in enumerate(
        ((35, 1096, 64, "float", True), (17, 2600, None, "int", False), (5, 300, 20, "float", True))
    ):
        weight = random_weight(kernel_format(bits, n, k, group_size, zeros, outliers), i)
        x, bias = activations(16, k, dtype), torch.randn(n)
        whole = packed_linear(weight, x, bias)
        assert_bitwise_equal(packed_linear(weight, x, bias, order=1), whole)
        for m in (1, 2, 7, 8, 9):
            for first in (0, 16 - m):
                rows = slice(first, first + m)
                assert_bitwise_equal(packed_linear(weight, x[rows].clone(), bias), whole[rows])


@pytest.mark.parametrize("processors", [3, 8, 132])
def test_a_row_is_the_same_in_every_batch_where_k_is_split(processors):
    """On GPUs of several sizes: the splits depend on N, K and the GPU alone."""
    for outliers in (False, True):
        weight = random_weight(kernel_format(4, 35, 9000, 128, "float", outliers))
        x, bias = activations(16, 9000, torch.float16), torch.randn(35)
        whole = packed_linear(weight, x, bias, processors=processors)
        assert_linear_close(whole, x, weight.dense(), bias)
        for m in (1, 8, 9):
            assert_bitwise_equal(packed_linear(weight, x[:m].clone(), bias, processors=processors), whole[:m])


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("zeros", ["none", "int", "float"])
def test_what_is_not_finite_stays_in_its_row(zeros, value):
    weight = random_weight(kernel_format(4, 19, 300, 32, zeros, outliers=True))
    x = activations(11, 300, torch.float16)
    before = packed_linear(weight, x)
    x[6, 299] = value
    y = packed_linear(weight, x)
    rest = [m for m in range(11) if m != 6]
    assert_bitwise_equal(y[rest], before[rest])
    assert not y[6].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_is_the_operand_it_stands_for(dtype):
    """One-hot x: the weights themselves, for every code and every center."""
    for bits in BITS:
        count = 1 << bits
        format = kernel_format(bits, count, count, None, "int")
        object.__setattr__(format, "granularity", "row")
        weight = random_weight(format, power_of_two=True)
        weight.codes = torch.arange(count, dtype=torch.uint8).expand(count, count).contiguous()
        weight.packed = pack(weight.codes, bits)
        weight.zeros = torch.arange(count, dtype=torch.uint8)[:, None]
        exact = weight.dense().t()
        for first in range(0, count, 16):
            x = torch.eye(count, dtype=dtype)[first : first + 16]
            assert_bitwise_equal(packed_linear(weight, x), exact[first : first + 16].to(dtype))


def test_x_at_any_address():
    """Rows that begin at no multiple of 16 bytes are not copied asynchronously, and give the same."""
    weight = random_weight(kernel_format(4, 19, 1048, 64, "int"))
    room = torch.empty(9 * 1048 + 1, dtype=torch.float16)
    x = activations(9, 1048, torch.float16)
    elsewhere = room[1:].view(9, 1048).copy_(x)
    assert x.data_ptr() % 16 == 0 and elsewhere.data_ptr() % 16
    assert_bitwise_equal(packed_linear(weight, elsewhere), packed_linear(weight, x))


def test_float32_x_of_any_size_counts_in_full():
    """Its three pieces are exact: at every exponent whose products with integer codes are below the largest float32."""
    weight = random_weight(kernel_format(4, 5, 64, None, "none"), power_of_two=True)
    exponents = torch.arange(-100, 120).float()
    x = torch.zeros(2 * len(exponents), 64)
    x[: len(exponents), 7] = torch.exp2(exponents) * (2 - 2.0**-23)
    x[len(exponents) :, 7] = -torch.exp2(exponents) * (1 + 2.0**-23)
    weight.scales = torch.full_like(weight.scales, 2.0**-10)
    y = torch.cat([packed_linear(weight, rows) for rows in x.split(16)])
    expected = x.double() @ weight.dense().t()
    assert_bitwise_equal(y, expected.float())


def test_columns_of_outliers_beyond_16_bits():
    weight = random_weight(kernel_format(2, 3, 66_000, None, "none", outliers=True))
    assert weight.outliers[1] is not None and weight.outliers[1].dtype == torch.int32
    x = activations(2, 66_000, torch.bfloat16)
    assert_linear_close(packed_linear(weight, x), x, weight.dense())


@pytest.mark.parametrize(
    ("rows", "dtype", "options", "reason"),
    [
        (1, torch.float16, dict(int8=True, x_group=32), "one scale for each row of x"),
    ],
)
def test_a_call_that_is_declined_says_why(rows, dtype, options, reason):
    weight = random_weight(kernel_format(4, 5, 64, 32, "int"))
    with pytest.raises(ValueError, match=reason):
        packed_linear(weight, activations(rows, 64, dtype), **options)


def test_numbers_of_16_bits_are_torchs():
    """Every float16; and float32 close to the middle between two numbers, and at the ends."""
    module = cuda_emulated.module()
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    halves = patterns.view(torch.float16)
    read = torch.tensor([module.half_to_float(int(bits) & 0xFFFF) for bits in patterns])
    assert_bitwise_equal(read, halves.float())
    finite = halves[halves.isfinite()].float().unique()
    middle = (finite[1:] + finite[:-1]) / 2
    near = torch.cat([middle, middle.nextafter(torch.tensor(torch.inf)), middle.nextafter(-torch.tensor(torch.inf))])
    near = torch.cat([near[::37], torch.tensor([65519.0, 65520.0, 7e4, 1e-9, -1e-9, 3e38, torch.inf])])
    for dtype, function in ((torch.float16, module.float_to_half), (torch.bfloat16, module.float_to_bfloat)):
        bits = torch.tensor([function(float(value)) for value in near], dtype=torch.int32).to(torch.int16)
        assert_bitwise_equal(bits.view(dtype), near.to(dtype))
