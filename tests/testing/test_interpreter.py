"""The interpreter's arithmetic bit by bit against torch, and that each of its checks catches a planted bug."""

from __future__ import annotations

import math
import operator
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from lowbit.testing.interpreter import OutOfBounds, Race, checks, install, launches

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run on the GPU: TRITON_INTERPRET=1 tests the interpreter", allow_module_level=True)
install()
pytestmark = pytest.mark.recorded()

FLOATS = [torch.bfloat16, torch.float16, torch.float32]


def bits(n: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Random bits as floating-point numbers, with every kind of special value among them."""
    generator = torch.Generator().manual_seed(seed)
    word = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    limits = torch.iinfo(word)
    x = torch.randint(limits.min, limits.max + 1, (n,), generator=generator).to(word).view(dtype)
    info = torch.finfo(dtype)
    special = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, info.max, info.min, info.tiny]
    special += [info.tiny / 2, -info.tiny / 4, 1 + info.eps, 3.0]
    x[: len(special)] = torch.tensor(special, dtype=torch.float64).to(dtype)
    return x[torch.randperm(n, generator=generator)]


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit; any NaN equals any other."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, (actual, expected)
    word = {1: torch.int8, 2: torch.int16, 4: torch.int32}[actual.dtype.itemsize]
    same = actual.view(word) == expected.view(word)
    if actual.is_floating_point():
        same |= actual.isnan() & expected.isnan()
    at = (~same).flatten().nonzero()[:3].flatten()
    wrong, right = actual.flatten()[at].tolist(), expected.flatten()[at].tolist()
    assert bool(same.all()), f"{int((~same).sum())} differ, at {at.tolist()}: {wrong}, not {right}"


# ------------------------------------------------------------------------------------------------ arithmetic


@triton.jit
def binary(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    if OP == "add":
        out = x + y
    elif OP == "sub":
        out = x - y
    elif OP == "mul":
        out = x * y
    elif OP == "truediv":
        out = x / y
    elif OP == "lt":
        out = x < y
    elif OP == "le":
        out = x <= y
    elif OP == "gt":
        out = x > y
    elif OP == "ge":
        out = x >= y
    elif OP == "eq":
        out = x == y
    elif OP == "ne":
        out = x != y
    elif OP == "fmin":
        out = tl.minimum(x, y)
    elif OP == "fmax":
        out = tl.maximum(x, y)
    elif OP == "where":
        out = tl.where(x < y, x, y)
    elif OP == "neg":
        out = -x
    elif OP == "clamp":
        out = tl.clamp(x, -1.0, 1.0)
    elif OP == "clamp_nan":
        out = tl.clamp(x, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "scaled":
        out = x * 0.1 + tl.abs(y)
    tl.store(out_ptr + at, out)


BINARY = {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "lt", "le", "gt", "ge", "eq", "ne")},
    "fmin": lambda x, y: torch.where(x.isnan(), y, torch.where(y.isnan(), x, torch.minimum(x, y))),
    "fmax": lambda x, y: torch.where(x.isnan(), y, torch.where(y.isnan(), x, torch.maximum(x, y))),
    "where": lambda x, y: torch.where(x < y, x, y),
    "neg": lambda x, y: -x,
    "clamp": lambda x, y: torch.where(x.isnan(), -1, x.clamp(-1, 1)).to(x.dtype),
    "clamp_nan": lambda x, y: x.clamp(-1, 1),
    "scaled": lambda x, y: x * torch.tensor(0.1, dtype=x.dtype) + y.abs(),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("op", BINARY)
def test_arithmetic_and_comparisons(op, dtype):
    x, y = bits(4096, dtype, 1), bits(4096, dtype, 2)
    y[::8] = x[::8]
    expected = BINARY[op](x, y)
    out = torch.empty_like(expected).fill_(1)
    binary[(1,)](x, y, out, OP=op, N=4096)
    if op in ("fmin", "fmax", "neg"):  # either zero may come out; Triton 3.6 negates by subtracting from 0
        assert bool(((out == expected) | out.isnan() & expected.isnan()).all())
    elif op == "where":  # moves bits, those of a NaN too
        assert torch.equal(out.view(torch.int8), expected.view(torch.int8))
    else:
        assert_same_bits(out, expected)


@triton.jit
def cast(x_ptr, out_ptr, N: tl.constexpr, BITCAST: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty, bitcast=BITCAST))


@pytest.mark.parametrize("target", FLOATS, ids=str)
@pytest.mark.parametrize("source", FLOATS, ids=str)
def test_casts_between_floats_round_to_nearest_even(source, target):
    x = bits(65536, source)
    ties = (torch.arange(-16384, 16384, dtype=torch.int32) << 16 | 0x8000).view(torch.float32).to(source)
    x[:32768] = ties  # half-way between two bfloat16 values, where the source has them
    out = torch.empty(65536, dtype=target)
    cast[(1,)](x, out, N=65536, BITCAST=False)
    assert_same_bits(out, x.to(target))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32], ids=str)
def test_casts_between_bfloat16_and_integers(dtype):
    limits = torch.iinfo(dtype)
    x = torch.randint(limits.min, limits.max + 1, (4096,)).to(dtype)
    out = torch.empty(4096, dtype=torch.bfloat16)
    cast[(1,)](x, out, N=4096, BITCAST=False)
    assert_same_bits(out, x.to(torch.bfloat16))

    x, back = (torch.rand(4096) * 254 - 127).to(torch.bfloat16), torch.empty(4096, dtype=dtype)
    cast[(1,)](x, back, N=4096, BITCAST=False)
    assert_same_bits(back, x.float().trunc().to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bitcasts(dtype):
    x = torch.arange(-32768, 32768).to(torch.int16)
    out, back = torch.empty(65536, dtype=dtype), torch.empty_like(x)
    cast[(1,)](x, out, N=65536, BITCAST=True)
    cast[(1,)](out, back, N=65536, BITCAST=True)
    assert torch.equal(out.view(torch.int16), x) and torch.equal(back, x)


@triton.jit
def cast_towards_zero(x_ptr, out_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(out_ptr + tl.arange(0, N), x.to(tl.bfloat16, fp_downcast_rounding="rtz"))


def test_other_roundings_are_refused():
    with pytest.raises(Exception, match="NotImplementedError.*only casts to nearest"):
        cast_towards_zero[(1,)](torch.ones(16), torch.empty(16, dtype=torch.bfloat16), N=16)


@triton.jit
def compare_then_cast(x_ptr, out_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(out_ptr + tl.arange(0, N), (x > 0.5).to(tl.bfloat16) + tl.full((N,), 1.0, tl.bfloat16))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_comparison_is_a_truth_value_and_not_a_number_of_its_operands_type(dtype):
    x, out = torch.linspace(0, 1, 64).to(dtype), torch.empty(64, dtype=torch.bfloat16)
    compare_then_cast[(1,)](x, out, N=64)
    assert_same_bits(out, (x > 0.5).to(torch.bfloat16) + 1)


@triton.jit
def fused(x_ptr, y_ptr, z_ptr, out_ptr, N: tl.constexpr, ONCE: tl.constexpr):
    at = tl.arange(0, N)
    x, y, z = tl.load(x_ptr + at), tl.load(y_ptr + at), tl.load(z_ptr + at)
    tl.store(out_ptr + at, tl.fma(x, y, z) if ONCE else x * y + z)


def rounded(exact: Fraction, dtype: torch.dtype) -> float:
    """To nearest even, from the definition; finite results only."""
    precision, lowest = {torch.bfloat16: (8, -133), torch.float16: (11, -24), torch.float32: (24, -149)}[dtype]
    if not exact:
        return 0.0
    exponent = math.frexp(exact.numerator / exact.denominator)[1]  # or one more, where that division rounds up
    quantum = Fraction(2) ** max(exponent - precision, lowest)
    if abs(exact) < Fraction(2) ** (exponent - 1):
        quantum = Fraction(2) ** max(exponent - 1 - precision, lowest)
    return float(round(exact / quantum) * quantum)  # round() goes to even


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fma_rounds_once(dtype):
    generator = torch.Generator().manual_seed(0)
    x, y, z = (torch.randn(2048, generator=generator).to(dtype) for _ in range(3))
    z[:512] = (-(x.double() * y.double())[:512]).to(dtype)  # all but cancels
    # a product half-way between two values, and next to it what decides the rounding: far below float32, float64 even
    x[512:768], y[512:768] = 1 + torch.finfo(dtype).eps, 1.5
    tiny = 2.0 ** -torch.linspace(2, 24 if dtype == torch.float16 else 100, 256).round()
    z[512:768] = (tiny * (-1.0) ** torch.arange(256)).to(dtype)
    terms = zip(x.tolist(), y.tolist(), z.tolist(), strict=True)
    expected = torch.tensor([rounded(Fraction(a) * Fraction(b) + Fraction(c), dtype) for a, b, c in terms])
    out = torch.empty_like(x)
    fused[(1,)](x, y, z, out, N=2048, ONCE=True)
    assert torch.equal(out.double(), expected.double())
    fused[(1,)](x, y, z, out, N=2048, ONCE=False)
    assert not torch.equal(out.double(), expected.double())  # these terms tell one rounding from two


@triton.jit
def reduced(x_ptr, out_ptr, OP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    if OP == "sum":
        out = tl.sum(x, AXIS)
    elif OP == "amax":
        out = tl.max(x, AXIS)
    elif OP == "amin":
        out = tl.min(x, AXIS)
    elif OP == "argmax":
        out = tl.argmax(x, AXIS)
    else:
        out = tl.reduce(x, AXIS, tl.standard._elementwise_max)  # tl.max is taken in float32
    tl.store(out_ptr + tl.arange(0, M if AXIS == 1 else N), out)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("op", ["amax", "amin", "argmax", "own", "sum"])
def test_reductions(op, axis, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 32, generator=generator).to(dtype)
    if op == "sum":
        x = (x * 4).round()  # few enough bits for every partial sum to be exact
    if op == "argmax":
        x = torch.stack([torch.randperm(64, generator=generator)[:32] - 48 for _ in range(16)]).to(dtype)
        x += torch.arange(16)[:, None] / 16  # no two alike along either axis
    expected = torch.amax(x, axis) if op == "own" else getattr(torch, op)(x, axis)
    expected = expected.to(torch.int32) if op == "argmax" else expected
    out = torch.empty_like(expected)
    reduced[(1,)](x, out, OP=op, M=16, N=32, AXIS=axis)
    assert_same_bits(out, expected)


@triton.jit
def sums_of_every_shape(x_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr):
    m, one = tl.arange(0, M)[:, None], tl.arange(0, 1)
    x = tl.load(x_ptr + m * N + tl.arange(0, N)[None, :])
    tl.store(out_ptr + m + one[None, :], tl.sum(x, 1, keep_dims=True))
    tl.store(out_ptr + M, tl.sum(x))
    tl.store(out_ptr + M + 1 + one[:, None] + one[None, :], tl.sum(x, keep_dims=True))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sums_of_every_shape(dtype):
    x = torch.arange(-15, 17).view(4, 8).to(dtype)
    out = torch.empty(6, dtype=dtype)
    sums_of_every_shape[(1,)](x, out, M=4, N=8)
    assert_same_bits(out, torch.cat([x.sum(1), x.sum().repeat(2)]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_sum_of_16_bit_values_rounds_at_every_step(dtype):
    """1 + u + u + ..., where 1 + u rounds to 1: one u is lost, whatever the order, and with it the last bit."""
    eps = torch.finfo(dtype).eps
    x = torch.full((1, 32), eps / 2, dtype=dtype)
    x[0, 0] = 1
    out = torch.empty(1, dtype=dtype)
    reduced[(1,)](x, out, OP="sum", M=1, N=32, AXIS=1)
    assert out.item() == 1 + 15 * eps and x.double().sum().to(dtype) == 1 + 16 * eps


@triton.jit
def scanned(x_ptr, out_ptr, N: tl.constexpr, OP: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    if OP == "sum":
        out = tl.associative_scan(x, 0, tl.standard._sum_combine)  # tl.cumsum, which Triton 3.6 takes in float32
    elif OP == "prod":
        out = tl.associative_scan(x, 0, tl.standard._prod_combine)
    else:
        out = tl.associative_scan(x, 0, added)
    tl.store(out_ptr + tl.arange(0, N), out)


@triton.jit
def added(x, y):
    return x + y


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", ["own", "prod", "sum"])
def test_scans_of_16_bit_values_round_at_every_step(op, dtype):
    x = torch.randn(64, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = x.clone()
    for i in range(1, 64):
        expected[i] = expected[i - 1] * x[i] if op == "prod" else expected[i - 1] + x[i]
    out = torch.empty_like(x)
    scanned[(1,)](x, out, N=64, OP=op)
    assert_same_bits(out, expected)


# ------------------------------------------------------------------------------------------------ tl.dot


@triton.jit
def dot(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.trans(tl.load(b_ptr + n[:, None] * K + k[None, :]))
    out = out_ptr + m[:, None] * N + n[None, :]
    tl.store(out, tl.dot(a, b, tl.load(out), input_precision=PRECISION, out_dtype=out_ptr.dtype.element_ty))


def run_dot(
    a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype, precision: str = "ieee", start: int = 0
) -> torch.Tensor:
    """``start + a @ b.T``"""
    out = torch.full((a.shape[0], b.shape[0]), start, dtype=out_dtype)
    dot[(1,)](a, b, out, M=a.shape[0], N=b.shape[0], K=a.shape[1], PRECISION=precision)
    return out


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dot_accumulates_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 64, generator=generator).to(dtype) for n in (16, 32))
    a64, b64 = a.double(), b.double()
    bound = 65 * 2.0**-24 * (a64.abs() @ b64.abs().t() + 3)  # every one of the 65 additions rounds
    error = (run_dot(a, b, torch.float32, start=3).double() - 3 - a64 @ b64.t()).abs()
    assert bool((error <= bound).all())
    accumulated_in_16_bits = (a.half() @ b.half().t()).double() - a64 @ b64.t()
    assert bool((accumulated_in_16_bits.abs() > bound).any())


def test_int8_dot_is_exact_at_the_extremes():
    a = torch.full((16, 2048), -128, dtype=torch.int8)
    b = torch.randint(-128, 128, (16, 2048)).to(torch.int8)
    b[0], b[1] = -128, 127
    a[1], a[1, 0] = 127, 126
    exact = a.long() @ b.long().t()
    assert exact[0, 0] == 2**25 and exact[1, 1] > 2**24 and exact[1, 1] % 2 == 1  # which float32 does not hold
    assert torch.equal(run_dot(a, b, torch.int32).long(), exact)
    assert torch.equal(run_dot(a, b, torch.int32, start=-7).long(), exact - 7)
    assert run_dot(a, b, torch.int32, start=2**31 - 1)[0, 0] == -(2**31) + 2**25 - 1  # wraps


def test_float32_dot_in_tf32_sees_ten_bits_of_the_mantissa():
    a, b = torch.full((16, 16), 1 + 2.0**-10 + 2.0**-11), torch.eye(16)
    assert torch.equal(run_dot(a, b, torch.float32), a)
    assert torch.equal(run_dot(a, b, torch.float32, "tf32"), torch.full((16, 16), 1 + 2.0**-10))


@pytest.mark.parametrize(("dtype", "k"), [(torch.float16, 16), (torch.bfloat16, 16), (torch.int8, 32)], ids=str)
def test_dot_has_a_gpus_smallest_shapes(dtype, k):
    out_dtype = torch.float32 if dtype.is_floating_point else torch.int32
    ones = torch.ones(16, k, dtype=dtype)
    assert bool((run_dot(ones, ones, out_dtype) == k).all())
    short = ones[:, : k // 2].contiguous()
    with pytest.raises(Exception, match=f"K >= {k}"):
        run_dot(short, short, out_dtype)


@triton.jit
def dot_in_float16(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.dot(x, x, out_dtype=tl.float16))


def test_dot_that_accumulates_in_16_bits_is_refused():
    x = torch.ones(16, 16, dtype=torch.float16)
    with pytest.raises(Exception, match="must accumulate in float32: got fp16"):
        dot_in_float16[(1,)](x, torch.empty_like(x), N=16)


# ------------------------------------------------------------------------------------------------ bounds


@triton.jit
def copy(x_ptr, out_ptr, n, BLOCK: tl.constexpr, MASK_LOAD: tl.constexpr, MASK_STORE: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    if MASK_LOAD:
        x = tl.load(x_ptr + at, mask=inside)
    else:
        x = tl.load(x_ptr + at)
    if MASK_STORE:
        tl.store(out_ptr + at, x, mask=inside)
    else:
        tl.store(out_ptr + at, x)


def run_copy(x: torch.Tensor, out: torch.Tensor, **flags: bool) -> None:
    n = min(x.numel(), out.numel())
    copy[(triton.cdiv(n, 16),)](x, out, n, BLOCK=16, **{"MASK_LOAD": True, "MASK_STORE": True, **flags})


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.bfloat16, torch.float32, torch.int64], ids=str)
def test_a_missing_mask_is_out_of_bounds(dtype):
    whole = torch.arange(64).to(dtype)
    x, out = whole[:37], torch.zeros(64, dtype=dtype)
    run_copy(x, out)
    assert torch.equal(out[:37], x) and not out[37:].any()
    with pytest.raises(OutOfBounds, match=r"program \(2, 0, 0\): load of .* of x_ptr \(shape \(37,\)"):
        run_copy(x, out, MASK_LOAD=False)  # reads the bigger buffer that x is a view of
    with pytest.raises(OutOfBounds, match=r"program \(2, 0, 0\): store of .* of out_ptr"):
        run_copy(whole, out[:37], MASK_STORE=False)
    with checks(bounds=False):
        run_copy(x, out, MASK_LOAD=False)


def test_the_neighbouring_argument_is_out_of_bounds():
    """Both arguments are slices of one buffer, so the address is inside the launch's memory but not in x."""
    buffer = torch.arange(64.0)
    x, out = buffer[:24], buffer[24:]
    with pytest.raises(OutOfBounds, match="x_ptr"):
        run_copy(x, out, MASK_LOAD=False, MASK_STORE=True)


@triton.jit
def load_shaped(x_ptr, y_ptr, out_ptr, start, WAY: tl.constexpr):
    pointers = x_ptr + (start + tl.arange(0, 16))
    if WAY == "broadcast":
        pointers = tl.broadcast_to(pointers[None, :], (2, 16))
    elif WAY == "expand":
        pointers = pointers[:, None]
    elif WAY == "reshape":
        pointers = tl.reshape(pointers, (4, 4))
    elif WAY == "trans":
        pointers = tl.trans(pointers[:, None] + tl.arange(0, 1)[None, :])
    elif WAY == "cast":
        pointers = pointers.to(tl.pointer_type(tl.float32))
    elif WAY == "splat":
        pointers = tl.broadcast_to(x_ptr + start, (16,))
    tl.store(out_ptr, tl.sum(tl.load(pointers)) + tl.load(y_ptr))


@pytest.mark.parametrize("way", ["add", "broadcast", "expand", "reshape", "trans", "cast", "splat"])
def test_a_pointer_keeps_its_tensor_in_any_shape(way):
    buffer, out = torch.ones(32), torch.zeros(1)
    load_shaped[(1,)](buffer[:16], buffer[16:], out, 0, WAY=way)
    assert out.item() == (33 if way == "broadcast" else 17)
    with pytest.raises(OutOfBounds, match="x_ptr"):
        load_shaped[(1,)](buffer[:16], buffer[16:], out, 16, WAY=way)


@triton.jit
def copy_rows(x_ptr, out_ptr, stride, N: tl.constexpr, WIDTH: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, WIDTH)
    tl.store(out_ptr + row * N + column, tl.load(x_ptr + row * stride + column, mask=column < N), mask=column < N)


def test_the_gaps_between_the_rows_of_a_view_are_out_of_bounds():
    x, out = torch.arange(64.0).view(4, 16)[:, :8], torch.zeros(4, 8)
    copy_rows[(4,)](x, out, 16, N=8, WIDTH=8)
    assert torch.equal(out, x)
    with pytest.raises(OutOfBounds, match=r"x_ptr \(shape \(4, 8\), stride \(16, 1\)"):
        copy_rows[(3,)](x, torch.zeros(4, 16), 16, N=16, WIDTH=16)  # between the rows, never past the last one


@triton.jit
def through_a_choice(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, tl.load(tl.where(at % 2 == 0, x_ptr + at, y_ptr + at)))


def test_a_pointer_into_either_of_two_arguments():
    x, y, out = torch.arange(16.0), -torch.arange(16.0), torch.zeros(16)
    through_a_choice[(1,)](x, y, out, N=16)
    assert torch.equal(out, torch.where(torch.arange(16) % 2 == 0, x, y))
    with pytest.raises(OutOfBounds, match="outside every argument"):
        through_a_choice[(1,)](x, y[:8].clone(), out, N=16)


def test_an_empty_tensor_holds_nothing():
    empty, out = torch.empty(0), torch.zeros(16)
    copy[(1,)](empty, out, 0, BLOCK=16, MASK_LOAD=True, MASK_STORE=True)
    with pytest.raises(OutOfBounds, match=r"x_ptr \(shape \(0,\)"):
        copy[(1,)](empty, out, 0, BLOCK=16, MASK_LOAD=False, MASK_STORE=True)


@triton.jit
def halves_of_words(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr.to(tl.pointer_type(tl.int16)) + at, mask=at < n, other=0)
    tl.store(out_ptr + at, x.to(tl.float16, bitcast=True), mask=at < n)


def test_a_pointer_of_another_type():
    x = torch.randint(-(2**31), 2**31 - 1, (20,)).to(torch.int32)
    out = torch.empty(40, dtype=torch.float16)
    halves_of_words[(3,)](x, out, 40, BLOCK=16)
    assert_same_bits(out, x.view(torch.float16))
    with pytest.raises(OutOfBounds, match="x_ptr"):
        halves_of_words[(3,)](x, torch.empty(48, dtype=torch.float16), 48, BLOCK=16)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.bfloat16, torch.float32], ids=str)
def test_masked_lanes_without_other_are_poisoned(dtype):
    x, out = torch.zeros(10, dtype=dtype), torch.zeros(16, dtype=dtype)
    copy[(1,)](x, out, 10, BLOCK=16, MASK_LOAD=True, MASK_STORE=False)
    assert not out[:10].any()
    poison = out[10:].isnan() if dtype.is_floating_point else out[10:].view(torch.int8) == 0x5A
    assert bool(poison.all())


# ------------------------------------------------------------------------------------------------ races and order


@triton.jit
def row_sums(x_ptr, out_ptr, N: tl.constexpr, SHARED: tl.constexpr):
    row = tl.program_id(0)
    total = tl.sum(tl.load(x_ptr + row * N + tl.arange(0, N)), 0)
    tl.store(out_ptr + (row // 2 if SHARED else row), total)


def test_two_programs_that_store_to_one_place_race():
    x, out = torch.rand(8, 16), torch.zeros(8)
    row_sums[(8,)](x, out, N=16, SHARED=False)
    assert torch.allclose(out, x.sum(1))
    with pytest.raises(Race, match=r"program \(\d, 0, 0\): store of byte \d+ of out_ptr .* program \(\d, 0, 0\) tou"):
        row_sums[(8,)](x, out, N=16, SHARED=True)
    results = set()
    for seed in range(4):  # unchecked, whoever runs last wins
        with checks(race=False, shuffle=seed):
            row_sums[(8,)](x, out, N=16, SHARED=True)
        results.add(tuple(out.tolist()))
    assert len(results) > 1


@triton.jit
def in_place(x_ptr, BLOCK: tl.constexpr, SHIFT: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    last = tl.num_programs(0) * BLOCK - 1
    x = tl.load(x_ptr + tl.minimum(at + SHIFT, last))
    tl.store(x_ptr + at, x + 1)
    tl.store(x_ptr + at, tl.load(x_ptr + at) * 2)  # what the program itself stored


def test_reading_what_another_program_stores_races():
    x = torch.zeros(64)
    in_place[(4,)](x, BLOCK=16, SHIFT=0)
    assert bool((x == 2).all())
    for seed in range(4):
        with checks(shuffle=seed), pytest.raises(Race, match="x_ptr"):
            in_place[(4,)](x, BLOCK=16, SHIFT=1)


@triton.jit
def last_stores(x_ptr, out_ptr):
    pid = tl.program_id(0)
    tl.store(out_ptr + pid, tl.load(x_ptr))
    if pid == tl.num_programs(0) - 1:
        tl.store(x_ptr, 2.0)


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_storing_what_several_programs_read_races(seed):
    """Among the readers is the one that stores: in the order of seed None it is also the last to read."""
    with checks(shuffle=seed), pytest.raises(Race, match=r"(several programs|program .*) touched"):
        last_stores[(4,)](torch.ones(1), torch.zeros(4))


def test_a_race_through_two_arguments_that_share_memory():
    buffer = torch.zeros(48)
    run_copy(buffer[:16], buffer[16:32])
    with pytest.raises(Race):
        run_copy(buffer[:32], buffer[16:])


@triton.jit
def bytes_and_words(bytes_ptr, words_ptr, OVERLAP: tl.constexpr):
    pid = tl.program_id(0)
    at = tl.arange(0, 8)
    if pid == 0:
        tl.store(words_ptr + at // 4, (at // 4).to(tl.int32))
    else:
        tl.store(bytes_ptr + 8 - OVERLAP + at, at.to(tl.int8))


@pytest.mark.parametrize("seed", [None, 0])  # None: words first; 0: bytes first
def test_accesses_of_different_sizes(seed):
    memory = torch.zeros(16, dtype=torch.int8)
    with checks(shuffle=seed):
        bytes_and_words[(2,)](memory, memory.view(torch.int32), OVERLAP=0)
        assert memory.tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7]
        with pytest.raises(Race):
            bytes_and_words[(2,)](memory, memory.view(torch.int32), OVERLAP=1)


@pytest.mark.parametrize("seed", [None, 0])
def test_words_that_do_not_begin_where_their_memory_does(seed):
    """Stores to bytes 4..11, and to 8 bytes from the 12th or the 11th on; the launch's memory begins at byte 1."""
    memory = torch.zeros(20, dtype=torch.int8)
    with checks(shuffle=seed):
        bytes_and_words[(2,)](memory[1:], memory[4:].view(torch.int32), OVERLAP=-3)
        with pytest.raises(Race):
            bytes_and_words[(2,)](memory[1:], memory[4:].view(torch.int32), OVERLAP=-2)


@triton.jit
def lanes_to_one_place(out_ptr, SAME: tl.constexpr):
    at = tl.arange(0, 16)
    tl.store(out_ptr + at // 2, at // 2 if SAME else at)


def test_two_lanes_that_store_different_values_to_one_place_race():
    out = torch.zeros(8, dtype=torch.int32)
    lanes_to_one_place[(1,)](out, SAME=True)
    assert out.tolist() == list(range(8))
    with pytest.raises(Race, match="different values to one address"):
        lanes_to_one_place[(1,)](out, SAME=False)
    with checks(race=False):
        lanes_to_one_place[(1,)](out, SAME=False)


@triton.jit
def access(x_ptr, KIND: tl.constexpr):
    if KIND == "load":
        tl.device_assert(tl.load(x_ptr) >= 0)
    elif KIND == "store":
        tl.store(x_ptr, 1)
    elif KIND == "cas":
        tl.atomic_cas(x_ptr, 0, 1)
    else:
        tl.atomic_add(x_ptr, 1)


@triton.jit
def access_twice(x_ptr, FIRST: tl.constexpr, SECOND: tl.constexpr, APART: tl.constexpr):
    if tl.program_id(0) == 0:
        access(x_ptr, FIRST)
    else:
        access(x_ptr + APART, SECOND)


@pytest.mark.parametrize("second", ["load", "store", "add", "cas"])
@pytest.mark.parametrize("first", ["load", "store", "add", "cas"])
def test_what_two_programs_may_do_to_one_place(first, second):
    x = torch.zeros(2, dtype=torch.int32)
    with checks(shuffle=None):
        access_twice[(2,)](x, FIRST=first, SECOND=second, APART=1)
        if first == second == "load" or {first, second} <= {"add", "cas"}:
            access_twice[(2,)](x, FIRST=first, SECOND=second, APART=0)
            return
        with pytest.raises(Race, match=r"program \(1, 0, 0\): .* program \(0, 0, 0\) touched"):
            access_twice[(2,)](x, FIRST=first, SECOND=second, APART=0)


@pytest.mark.parametrize("kind", ["load", "store", "add", "cas"])
def test_every_access_is_held_to_its_tensor(kind):
    x = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(OutOfBounds, match="x_ptr"):
        access_twice[(2,)](x[:1], FIRST="load", SECOND=kind, APART=1)


@triton.jit
def count(counter_ptr, seen_ptr):
    tl.store(seen_ptr + tl.program_id(0), tl.atomic_add(counter_ptr, 1))


def test_the_order_of_programs_is_shuffled_and_depends_on_the_seed():
    """Which ticket each program drew is a result that depends on the order: seeds tell."""

    def tickets(seed: int | None, programs: int = 8) -> list[int]:
        counter, seen = torch.zeros(1, dtype=torch.int32), torch.zeros(programs, dtype=torch.int32)
        with checks(shuffle=seed):
            count[(programs,)](counter, seen)
        assert counter.item() == programs
        return seen.tolist()

    assert tickets(None) == list(range(8))
    assert tickets(0) == tickets(0) != tickets(None)
    assert len({tuple(tickets(seed)) for seed in range(4)}) == 4
    assert tickets(0, programs=2) == [1, 0]


@triton.jit
def where_am_i(out_ptr):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    nx, ny = tl.num_programs(0), tl.num_programs(1)
    tl.store(out_ptr + x + nx * (y + ny * z), 100 * x + 10 * y + z)


def test_every_program_of_a_grid_runs_once():
    out = torch.full((4 * 3 * 2,), -1, dtype=torch.int32)
    where_am_i[(4, 3, 2)](out)
    expected = [100 * x + 10 * y + z for z in range(2) for y in range(3) for x in range(4)]
    assert out.tolist() == expected


@triton.jit
def atomic_sum(x_ptr, out_ptr):
    tl.atomic_add(out_ptr, tl.load(x_ptr + tl.program_id(0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32], ids=str)
def test_floating_point_atomics_are_refused(dtype):
    x, out = torch.ones(4, dtype=dtype), torch.zeros(1, dtype=dtype)
    if dtype.is_floating_point:
        with pytest.raises(Race, match="atomic depends on the order"):
            atomic_sum[(4,)](x, out)
    else:
        atomic_sum[(4,)](x, out)
        assert out.item() == 4


def test_large_tensors_are_not_followed():
    """What follows a tensor takes 12 bytes for each element; where that is more than 64 MiB, races are not seen."""
    x = torch.ones(8, 16)
    with pytest.raises(Race):
        row_sums[(8,)](x, torch.empty(5 << 20), N=16, SHARED=True)
    row_sums[(8,)](x, torch.empty(6 << 20), N=16, SHARED=True)


# ------------------------------------------------------------------------------------------------ the whole


@triton.jit
def unpacked(words, field, BITS: tl.constexpr):
    return (words >> (field * BITS)) & ((1 << BITS) - 1)


@triton.jit
def linear_w4(x_ptr, words_ptr, scales_ptr, out_ptr, m, n, k, BLOCK: tl.constexpr, K: tl.constexpr):
    rows, columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in tl.range(0, tl.cdiv(k, K)):
        at = start * K + tl.arange(0, K)
        inside = (rows[:, None] < m) & (at[None, :] < k)
        x = tl.load(x_ptr + rows[:, None] * k + at[None, :], mask=inside, other=0.0)
        here = (columns[:, None] < n) & (at[None, :] < k)
        words = tl.load(words_ptr + columns[:, None] * (k // 8) + at[None, :] // 8, mask=here, other=0)
        weight = (unpacked(words, at[None, :] % 8, 4) - 8).to(x.dtype)
        total = tl.dot(x, tl.trans(weight), total)
    scales = tl.load(scales_ptr + columns, mask=columns < n, other=0.0)
    out = (total * scales[None, :]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * n + columns[None, :], out, mask=(rows[:, None] < m) & (columns[None, :] < n))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_packed_linear_layer(dtype):
    m, n, k = 5, 20, 72
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(m, k, generator=generator).to(dtype)
    words = torch.randint(-(2**31), 2**31 - 1, (n, k // 8), generator=generator).to(torch.int32)
    scales = torch.rand(n, generator=generator)
    out, before = torch.empty(m, n, dtype=dtype), launches["linear_w4"]
    linear_w4[(1, 2)](x, words, scales, out, m, n, k, BLOCK=16, K=32)
    codes = (words.unsqueeze(-1) >> (4 * torch.arange(8))) & 15
    exact = x.double() @ (codes.view(n, k) - 8).double().t() * scales.double()
    assert torch.allclose(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)
    assert launches["linear_w4"] == before + 1


def test_install_again_changes_nothing():
    stock = sys.modules["triton.runtime.interpreter"]
    before = stock.GridExecutor, type(stock.interpreter_builder)
    install()
    assert (stock.GridExecutor, type(stock.interpreter_builder)) == before


@triton.jit
def three(out_ptr):
    tl.store(out_ptr + tl.arange(0, 4), tl.zeros((4,), tl.float32) + 3)


def test_a_launch_leaves_triton_as_it_was():
    modules = (tl, tl.core, tl.math, tl.tensor)
    before = [dict(vars(module)) for module in modules]
    out = torch.empty(4)
    three[(1,)](out)
    assert out.tolist() == [3, 3, 3, 3]
    assert [dict(vars(module)) for module in modules] == before


def test_checks_are_restored_after_an_error():
    x = torch.zeros(20)
    with pytest.raises(ZeroDivisionError), checks(bounds=False):
        _ = 1 / 0
    with pytest.raises(OutOfBounds):
        run_copy(x, x.clone(), MASK_LOAD=False)


PROGRAM = """
import sys
import torch, triton
import triton.language as tl

@triton.jit
def product(x_ptr, y_ptr, out_ptr):
    at = tl.arange(0, 2)
    tl.store(out_ptr + at, tl.load(x_ptr + at) * tl.load(y_ptr + at))

if __name__ == "__main__":
    if "install" in sys.argv[1:]:
        from lowbit.testing.interpreter import install
        install()
    x, y, out = torch.tensor([1.5, 3.0]), torch.tensor([2.5, -1.0]), torch.zeros(2).bfloat16()
    product[(1,)](x.bfloat16(), y.bfloat16(), out)
    print(out.tolist())
"""


def run_program(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "program.py").write_text(PROGRAM)
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "program.py", *arguments],
        cwd=folder,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
    )


def test_without_install_bfloat16_is_wrong(tmp_path):
    """Why there is an install(): should a new Triton be right here, see what of it can go."""
    installed = run_program(tmp_path, "install", TRITON_INTERPRET="1")
    assert installed.stdout.strip() == "[3.75, -3.0]", installed.stderr
    as_shipped = run_program(tmp_path, TRITON_INTERPRET="1")
    assert as_shipped.returncode == 0 and as_shipped.stdout.strip() != "[3.75, -3.0]", as_shipped.stderr


def test_install_needs_the_environment_variable(tmp_path):
    result = run_program(tmp_path, "install")
    assert result.returncode != 0
    assert "RuntimeError: TRITON_INTERPRET must be 1 before triton is imported" in result.stderr
