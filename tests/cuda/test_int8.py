"""int8 activations in ``csrc/cuda/packed``, compiled by g++ on csrc/cuda/emulated/emulation.h, and as nvcc's PTX."""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch

from benchmarks.tools import cuda_compiled
from benchmarks.tools.cuda_kernels import PACKED_BATCH_INT8, PACKED_DECODE_INT8, QUANTIZE, WIDTHS
from lowbit.backends.reference import quantize_activations
from lowbit.core.bitpack import pack
from lowbit.packed.format import PackedFormat
from lowbit.testing import cuda_emulated, cuda_ptx, verdicts
from lowbit.testing.cuda_emulated import packed_linear
from lowbit.testing.cuda_int8 import assert_int8_close, one_integer, reference
from lowbit.testing.cuda_planted.packed_decode import some_formats
from lowbit.testing.numerics import assert_bitwise_equal
from lowbit.testing.packed_cases import SHAPES, Weight, activations, random_weight
from lowbit.testing.ptx_emulator import Fault, Statistics

pytestmark = pytest.mark.recorded(sources=["csrc/common", "csrc/cuda"])
needs_emulation = pytest.mark.skipif(
    cuda_emulated.why_not() is not None, reason=f"not built: {cuda_emulated.why_not()}"
)
needs_nvcc = pytest.mark.skipif(cuda_compiled.nvcc_version() is None, reason="no nvcc")

BITS = tuple(range(1, 9))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROWS = (1, 2, 3, 8, 9, 16, 0)
MORE_ROWS = (17, 32, 33, 64, 65)
SMALL, LARGE = 99 << 10, 227 << 10  # bytes of shared memory: a ring of two stages, of three
STATIC = torch.tensor([0.011])
# Slices of 1024 columns: several, the last one cut; a group longer than a slice, and than a tile; groups cut anywhere
LONG = ((35, 7176, 128), (33, 4104, 2048), (32, 2560, 512), (3, 3001, 37), (19, 2600, None))


def kernel_format(
    bits: int, n: int, k: int, group_size: int | None, zeros: str, outliers: bool = False
) -> PackedFormat:
    """The format of :func:`some_formats` with these zeros and outliers."""
    found = some_formats(bits, n, k, group_size)
    return next(f for f in found if f.zeros == zeros and bool(f.outliers) == outliers)


@needs_emulation
@pytest.mark.parametrize("bits", BITS)
def test_linear(bits, request):
    """Every shape and format; dtypes, rows of x, bias, static scales, orders and splits of K in rotation."""
    turn = verdicts.turn_of(8, request.config.rootpath) if request.config.getoption("verdicts") else None
    for i, found in enumerate(f for shape in (*SHAPES, *LONG) for f in some_formats(bits, *shape)):
        if turn is not None and (i + bits) % 8 != turn:
            continue  # `make test` runs an eighth
        weight, n, k = random_weight(found, i), found.out_features, found.in_features
        dtype, x_scale = DTYPES[(i // 2 + bits) % 3], STATIC if i % 5 < 2 else None
        x = activations(ROWS[(i + bits) % len(ROWS)], k, dtype, seed=i)
        bias = None if i % 3 == 0 else activations(1, n, DTYPES[i % 3], seed=n)[0]
        y = packed_linear(
            weight, x, bias, int8=True, x_scale=x_scale, order=i % 2, processors=(1, 132)[i // 2 % 2],
            by_group=i % 4 < 2 and weight.scales.shape[0] == n,
        )  # fmt: skip
        assert_int8_close(y, x, weight, bias, x_scale)
        if one_integer(weight) and not found.outliers:
            assert_bitwise_equal(y, reference(x, weight, bias, x_scale))


# N in several blocks; several tiles, the last one cut; groups of a tile, of a chunk, longer than a tile; groups that
# end inside a chunk
BATCHED = ((131, 1304, 128), (33, 2600, 64), (5, 3080, 1024), (35, 1290, None), (3, 1100, 37), (20, 1056, 32))


@needs_emulation
@pytest.mark.parametrize("bits", BITS)
def test_many_rows(bits, request):
    """As above for the batch kernel; stages of its ring, too, in rotation."""
    turn = verdicts.turn_of(16, request.config.rootpath) if request.config.getoption("verdicts") else None
    for i, found in enumerate(f for shape in (*SHAPES, *BATCHED) for f in some_formats(bits, *shape)):
        if turn is not None and (i + bits) % 16 != turn:
            continue  # `make test` runs a sixteenth
        weight, n, k = random_weight(found, i), found.out_features, found.in_features
        dtype, x_scale = DTYPES[(i // 2 + bits) % 3], STATIC if i % 5 < 2 else None
        x = activations(MORE_ROWS[(i // 2 + bits) % len(MORE_ROWS)], k, dtype, seed=i)
        bias = None if i % 3 == 0 else activations(1, n, DTYPES[i % 3], seed=n)[0]
        y = packed_linear(
            weight, x, bias, int8=True, x_scale=x_scale, order=i % 2, processors=(1, 132)[i // 2 % 2],
            by_group=i % 4 < 2 and weight.scales.shape[0] == n, shared_bytes=(SMALL, LARGE)[i // 3 % 2],
        )  # fmt: skip
        assert_int8_close(y, x, weight, bias, x_scale)
        if one_integer(weight) and not found.outliers:
            assert_bitwise_equal(y, reference(x, weight, bias, x_scale))


@needs_emulation
@pytest.mark.parametrize("rows", [5, 17])
@pytest.mark.parametrize("bits", BITS)
def test_integer_arithmetic_is_exact(bits, rows):
    """Integers times powers of two: every product and sum is exact, so the result has one right value."""
    for i, (n, k, group_size) in enumerate(SHAPES):
        for j, format in enumerate(some_formats(bits, n, k, group_size)):
            weight = random_weight(format, i, power_of_two=True)
            if (i + j + bits) % (3 if rows > 16 else 2):
                continue
            x = torch.randint(-127, 128, (rows, k), generator=torch.Generator().manual_seed(j)).float()
            x[:, 0] = 127  # scale 1
            exact = (x.double() @ weight.dense().t()).float()
            x_scale = torch.ones(1) if j % 2 else None
            assert_bitwise_equal(packed_linear(weight, x, int8=True, x_scale=x_scale), exact)


@needs_emulation
def test_every_code_is_the_byte_it_stands_for():
    """One-hot x: the weights themselves, for every code and every zero."""
    for bits in BITS:
        count = 1 << bits
        format = kernel_format(bits, count, count, None, "int")
        object.__setattr__(format, "granularity", "row")
        weight = random_weight(format, power_of_two=True)
        weight.codes = torch.arange(count, dtype=torch.uint8).expand(count, count).contiguous()
        weight.packed = pack(weight.codes, bits)
        weight.zeros = torch.arange(count, dtype=torch.uint8)[:, None]
        exact = weight.dense().t().float()
        for at_once in (16, 256):
            for first in range(0, count, at_once):
                x = torch.eye(max(count, 17), count)[first : first + at_once]
                y = packed_linear(weight, x, int8=True, x_scale=torch.ones(1), processors=132)
                assert_bitwise_equal(y[: count - first], exact[first : first + at_once])


@needs_emulation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_x_is_quantized_as_the_reference_does(dtype):
    """Halves, the largest magnitudes, tiny and zero rows, and what is not finite: one integer sum shows each q."""
    k = 300
    weight = random_weight(kernel_format(8, k, k, None, "int"), power_of_two=True)
    weight.codes = torch.eye(k, dtype=torch.uint8)
    weight.packed, weight.zeros = pack(weight.codes, 8), torch.zeros_like(weight.scales, dtype=torch.uint8)
    x = activations(16, k, torch.float32)
    x[1] = torch.arange(k) / 2 - 64
    x[2] *= 1e-5
    x[3] = 0
    x[4] *= 2.0**-100 / x[4].abs().max()
    x[5] *= 2.0**-101 / x[5].abs().max()
    x[6, 7], x[7, 299], x[8, 0] = torch.nan, torch.inf, -torch.inf
    x[9] *= 1000
    x = x.to(dtype)
    for x_scale in (None, torch.tensor([0.5]), STATIC):
        y = packed_linear(weight, x, int8=True, x_scale=x_scale)
        assert_bitwise_equal(y, reference(x, weight, None, x_scale))
        assert bool(y[6].isnan().all()) and bool(y[7].isnan().all()) == (x_scale is None)


def some_rows(
    weight: Weight, x: torch.Tensor, bias: torch.Tensor, processors: int, first: int, count: int, order: int = 0
) -> torch.Tensor:
    """Those of y where they may not depend on M."""
    some = x[first : first + count].clone()
    return packed_linear(weight, some, bias, int8=True, batch_invariant=True, order=order, processors=processors)


@needs_emulation
@pytest.mark.parametrize("processors", [1, 132])
def test_a_row_is_the_same_in_every_batch(processors):
    """Bit for bit, whatever M is and in whatever order the warps run."""
    for i, (bits, n, k, group_size, zeros, outliers) in enumerate(
        ((4, 35, 2600, 64, "float", True), (7, 17, 2600, None, "int", False), (5, 5, 1100, 20, "float", True))
    ):
        weight = random_weight(kernel_format(bits, n, k, group_size, zeros, outliers), i)
        x, bias = activations(40, k, torch.bfloat16), torch.randn(n)

        rows = partial(some_rows, weight, x, bias, processors)
        whole = rows(0, 40)
        assert_int8_close(whole, x, weight, bias)
        assert_bitwise_equal(rows(0, 40, order=1), whole)
        for first, count in ((39, 1), (3, 8), (12, 17), (7, 33)):
            assert_bitwise_equal(rows(first, count), whole[first : first + count])
        if processors == 1:  # decode, which has an order of its own
            few = packed_linear(weight, x[:16].clone(), bias, int8=True)
            assert_int8_close(few, x[:16], weight, bias)
            for first, count in ((0, 1), (15, 1), (3, 7), (2, 8), (7, 9)):
                y = packed_linear(weight, x[first : first + count].clone(), bias, int8=True)
                assert_bitwise_equal(y, few[first : first + count])


@needs_emulation
def test_sums_of_the_longest_rows_do_not_overflow():
    """As many columns as are taken, of extreme codes and activations."""
    weight = random_weight(kernel_format(8, 2, 1 << 16, None, "int"), power_of_two=True)
    weight.codes.fill_(255)
    weight.packed = pack(weight.codes, 8)
    assert weight.zeros is not None
    weight.zeros.fill_(0)
    x = torch.full((2, 1 << 16), 127.0)
    x[1] = -127.0
    for processors in (1, 132):
        for m in (2, 18) if processors > 1 else (2,):
            y = packed_linear(weight, x.repeat(m // 2, 1), int8=True, processors=processors)
            assert_bitwise_equal(y, reference(x, weight).repeat(m // 2, 1))


@needs_emulation
def test_many_rows_are_split_in_parts():
    """Where K is split, 512 rows of x are in the workspace at a time."""
    weight = random_weight(kernel_format(4, 9, 1032, 128, "float"))
    x = activations(520, 1032, torch.bfloat16)
    whole = packed_linear(weight, x, int8=True, batch_invariant=True, processors=132)
    assert_int8_close(whole, x, weight)
    for first in (0, 500, 519):
        one = packed_linear(weight, x[first : first + 1].clone(), int8=True, batch_invariant=True, processors=132)
        assert_bitwise_equal(one, whole[first : first + 1])


@needs_emulation
@pytest.mark.parametrize("zeros", ["none", "int", "float"])
def test_what_is_not_finite_stays_in_its_row(zeros):
    weight = random_weight(kernel_format(4, 19, 300, 32, zeros, outliers=True))
    for count in (11, 40):
        x = activations(count, 300, torch.float16)
        before = packed_linear(weight, x, int8=True)
        x[6, 299] = torch.nan
        y = packed_linear(weight, x, int8=True)
        rest = [m for m in range(count) if m != 6]
        assert_bitwise_equal(y[rest], before[rest])
        assert bool(y[6].isnan().all())


@needs_emulation
def test_columns_of_outliers_beyond_16_bits():
    weight = random_weight(kernel_format(2, 3, 66_000, 64, "none", outliers=True))
    for m in (2, 17):
        x = activations(m, 66_000, torch.bfloat16)
        assert_int8_close(packed_linear(weight, x, int8=True), x, weight)


@needs_emulation
@pytest.mark.parametrize(
    ("k", "group_size", "options", "reason"),
    [
        (64, 32, dict(x_group=32), "one scale for each row of x"),
        (66_000, None, dict(), "groups of up to 2\\^16 columns"),
    ],
)
def test_a_call_that_is_declined_says_why(k, group_size, options, reason):
    weight = random_weight(kernel_format(4, 5, k, group_size, "int"))
    with pytest.raises(ValueError, match=reason):
        packed_linear(weight, activations(2, k, torch.float16), int8=True, **options)


# ---------------------------------------------------------------------------------------------------- the compiled code

PTX_ROWS, MORE_PTX_ROWS = (2, 4, 8, 16), (20, 33)
# (N, K, group_size or None): K cut inside a chunk, N inside a block; groups that end inside chunks, and at their ends
PTX_SHAPES = ((33, 1109, 64), (13, 308, 20), (35, 1304, None), (7, 520, 96))
MORE_PTX_SHAPES = ((33, 1109, 64), (35, 1304, None), (13, 308, 20), (7, 1028, 128))
RING = (5, 5128, 1024)  # the ring of slices goes round twice, and where K is split, each part has slices


@cache
def decode_ptx(bits: int) -> str:
    return cuda_compiled.compile_ptx(PACKED_DECODE_INT8, "sm_80", bits)


@cache
def batch_ptx(bits: int) -> str:
    return cuda_compiled.compile_ptx(PACKED_BATCH_INT8, "sm_80", bits)


@cache
def quantize_ptx() -> str:
    return cuda_compiled.compile_ptx(QUANTIZE, "sm_80", None)


def run(
    text: str, bits: int, shape: tuple[int, int, int | None], m: int, dtype: torch.dtype, turn: int,
    splits: int = 1,
) -> Statistics:  # fmt: skip
    """One case, of the format that ``turn`` says, against float64; where its sums are exact, against the reference."""
    found = list(some_formats(bits, *shape))
    weight = random_weight(found[turn % len(found)], turn)
    x, bias = activations(m, shape[1], dtype, turn), torch.randn(shape[0])
    x_scale = STATIC if turn % 3 == 1 else None
    if m <= 16:
        y, statistics = cuda_ptx.packed_decode_int8(text, quantize_ptx(), weight, x, bias, x_scale, splits)
    else:
        y, statistics = cuda_ptx.packed_batch_int8(
            text, quantize_ptx(), weight, x, bias, x_scale, splits, stages=2 + turn % 2
        )
    assert_int8_close(y, x, weight, bias, x_scale)
    if one_integer(weight) and weight.outliers[0] is None:
        assert_bitwise_equal(y, reference(x, weight, bias, x_scale))
    assert statistics.count("mma.sync") > 0
    return statistics


@needs_nvcc
@pytest.mark.parametrize("bits", WIDTHS)
def test_compiled_code(bits, request):
    """Every dtype × range of M of this width, on all shapes in rotation. Of the widths, `make test` takes one."""
    verdicts.only_in_turn(request.config, bits, 8)
    for i, dtype in enumerate(DTYPES):
        for j, m in enumerate(PTX_ROWS):
            shape = PTX_SHAPES[(bits + i + j) % len(PTX_SHAPES)]
            shape = PTX_SHAPES[2] if m > 8 and shape[2] == 20 else shape  # 8 rows at a time
            run(decode_ptx(bits), bits, shape, m, dtype, bits + 3 * i + 5 * j)
        run(decode_ptx(bits), bits, RING, (3, 11, 5)[i], dtype, bits + 2 * i, splits=1 + 2 * (i % 2))


@needs_nvcc
@pytest.mark.parametrize("bits", WIDTHS)
def test_compiled_code_of_many_rows(bits, request):
    verdicts.only_in_turn(request.config, bits, 8)
    for i, dtype in enumerate(DTYPES):
        for j, m in enumerate(MORE_PTX_ROWS):
            shape = MORE_PTX_SHAPES[(bits + i + j) % len(MORE_PTX_SHAPES)]
            run(batch_ptx(bits), bits, shape, m, dtype, bits + 3 * i + 5 * j, splits=1 + (i + j) % 2)
    run(batch_ptx(bits), bits, MORE_PTX_SHAPES[2], 17, DTYPES[bits % 3], bits)


@needs_nvcc
def test_compiled_code_quantizes_as_the_reference_does():
    for dtype in DTYPES:
        x = activations(9, 300, torch.float32)
        x[1], x[2], x[3] = torch.arange(300) / 2 - 64, x[2] * 1e-5, 0
        x[4] *= 2.0**-101 / x[4].abs().max()
        x[5, 7], x[6, 299] = torch.nan, -torch.inf
        for x_scale in (None, torch.tensor([0.5])):
            q, inverse = cuda_ptx.quantized(quantize_ptx(), x.to(dtype), x_scale)
            expected_q, expected = quantize_activations(x.to(dtype), x_scale)
            assert_bitwise_equal(q[:, :300].float(), expected_q)
            assert not q[:, 300:].any()
            assert_bitwise_equal(inverse[:, None], expected)


@needs_nvcc
@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("bar.sync", "// ", Fault),
        ("cp.async.wait_group 1;", "cp.async.wait_group 2;", Fault),
        ("s32.u8.s8.s32", "s32.s8.s8.s32", AssertionError),
    ],
)
def test_a_bug_planted_in_compiled_code_is_found(old, new, found):
    for text, m in ((decode_ptx(8), 8), (batch_ptx(8), 20)):
        assert old in text
        run(text, 8, PTX_SHAPES[2], m, torch.float16, 1)
        with pytest.raises(found):
            run(text.replace(old, new), 8, PTX_SHAPES[2], m, torch.float16, 1)
