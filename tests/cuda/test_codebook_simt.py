"""``csrc/cuda/codebook/decode_simt.cuh``: emulated on the CPU, and as nvcc compiles it (PTX of sm_80)."""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.tools import cuda_compiled
from benchmarks.tools.cuda_kernels import CODEBOOK_DECODE_SIMT, WIDTHS
from lowbit.testing import cuda_emulated, verdicts
from lowbit.testing.codebook_cases import SHAPES, Kind, kinds, random_bias, random_weight
from lowbit.testing.cuda_codebook import execute_simt, linear, multiplied, taken
from lowbit.testing.numerics import assert_bitwise_equal, assert_linear_close
from lowbit.testing.packed_cases import activations
from lowbit.testing.ptx_emulator import Fault, Statistics

pytestmark = pytest.mark.recorded(sources=["csrc/common", "csrc/cuda"])
needs_emulation = pytest.mark.skipif(
    cuda_emulated.why_not() is not None, reason=f"not built: {cuda_emulated.why_not()}"
)
needs_nvcc = pytest.mark.skipif(cuda_compiled.nvcc_version() is None, reason="no nvcc")

# float32 x meets every weight; x of 16 bits those of which the other decode kernel has no tables
FLOAT32, HALVES = (torch.float32,), (torch.float16, torch.bfloat16)
BITS, HALF_BITS = WIDTHS, (5, 6, 7, 8)
ROWS, HALF_ROWS = (1, 2, 5, 8, 9, 16, 17, 0, 3), (1, 2, 5, 8, 9, 16, 3)
# Slices of 1024 columns: several, the last one cut; a group longer than a slice; blocks cut by N
LONG = ((35, 5128, 128), (33, 4104, 2048), (3, 3001, 37))


def dtype_of(kind: Kind, turn: int) -> torch.dtype:
    return torch.float32 if taken(kind) else (*HALVES, torch.float32)[turn % 3]


@needs_emulation
@pytest.mark.parametrize("bits", BITS)
def test_linear(bits, request):
    """Every shape and kind, with dtypes, rows of x, bias, order of warps, and splits of K in rotation.

    `make test` takes a twelfth, others at another commit."""
    for i, kind in enumerate(kind for shape in (*SHAPES, *LONG) for kind in kinds(bits, *shape)):
        if not verdicts.in_turn(request.config, i, 12):
            continue
        weight, dtype = random_weight(kind, i), dtype_of(kind, i + bits)
        counts = ROWS if dtype == torch.float32 else HALF_ROWS
        x = activations(counts[(i + bits) % len(counts)], kind.k, dtype, seed=i)
        bias = random_bias(i, kind.n)
        y = linear(weight, x, bias, order=i % 2, processors=(1, 132)[i // 2 % 2])
        assert_linear_close(y, x, multiplied(weight, dtype), bias)


@needs_emulation
@pytest.mark.parametrize("bits", BITS)
def test_integer_arithmetic_is_exact(bits, request):
    """Integers times powers of two: float32 sums are exact, so y is the float64 result, rounded once."""
    for i, kind in enumerate(kind for shape in SHAPES for kind in kinds(bits, *shape)):
        if not verdicts.in_turn(request.config, i, 6):
            continue
        weight, dtype = random_weight(kind, i, integers=True), dtype_of(kind, i)
        x = torch.randint(-3, 4, (5, kind.k), generator=torch.Generator().manual_seed(i)).to(dtype)
        assert_bitwise_equal(linear(weight, x), (x.double() @ weight.dense().t()).to(dtype))


@needs_emulation
@pytest.mark.parametrize("bits", BITS)
def test_entries_are_as_they_are_stored(bits):
    """One-hot x: entries of float32 keep all their bits, of every chunk of a tile and every kind of table."""
    for tables in ("tensor", "row", "group"):
        weight = random_weight(Kind(bits, 24, 256, 96, tables), bits)
        for dtype in FLOAT32 if bits <= 4 or tables != "group" else (*FLOAT32, *HALVES):
            x = torch.eye(256, dtype=dtype)[bits % 16 :: 16].clone()
            assert_bitwise_equal(linear(weight, x), multiplied(weight, dtype).t()[bits % 16 :: 16].to(dtype))


@needs_emulation
@pytest.mark.parametrize("bits", BITS)
def test_a_row_is_the_same_in_every_batch(bits, request):
    """Bit for bit, whatever M is, in whatever order the warps run, and where few rows of x fit into shared memory.

    `make test` takes two widths, others at another commit."""
    verdicts.only_in_turn(request.config, bits, 4)
    for i, kind in enumerate(
        (
            Kind(bits, 35, 1096, 64, "tensor", "float", outliers=700),
            Kind(bits, 17, 2100, 2100, "row", "none", torch.float16),
            Kind(bits, 5, 300, 20, "group", "nested", torch.bfloat16),
        )
    ):
        weight, dtype = random_weight(kind, i), dtype_of(kind, bits)
        x, bias = activations(16, kind.k, dtype), torch.randn(kind.n)
        options = dict(processors=(1, 8)[i % 2])
        whole = linear(weight, x, bias, **options)
        assert_bitwise_equal(linear(weight, x, bias, order=1, **options), whole)
        for small in (99 << 10, 64 << 10):
            assert_bitwise_equal(linear(weight, x, bias, shared_bytes=small, **options), whole)
        for m, invariant in ((1, False), (9, dtype == torch.float32)):
            rows = slice(16 - m, 16)
            found = linear(weight, x[rows].clone(), bias, batch_invariant=invariant, **options)
            assert_bitwise_equal(found, whole[rows])


@needs_emulation
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_what_is_not_finite_stays_in_its_row(value):
    for weight in (
        random_weight(Kind(4, 19, 300, 32, "tensor", "float", outliers=100)),
        random_weight(Kind(6, 19, 300, 7, "group")),
    ):
        x = activations(11, 300, torch.float32)
        before = linear(weight, x)
        x[6, 299] = value
        y = linear(weight, x)
        rest = [m for m in range(11) if m != 6]
        assert_bitwise_equal(y[rest], before[rest])
        assert not y[6].isfinite().any()


@needs_emulation
def test_an_infinite_x_gives_what_it_gives_in_float64():
    """No product of it is split into parts that would be NaN together."""
    weight, x = random_weight(Kind(4, 19, 300, 64, "row", "float")), activations(3, 300, torch.float32)
    x[1, 70] = torch.inf
    exact = x.double() @ weight.dense().t()
    assert torch.equal(linear(weight, x)[1].isposinf(), exact[1].isposinf()) and exact[1].isposinf().any()


@needs_emulation
def test_x_at_any_address():
    """Rows that begin at no multiple of 16 bytes are not copied asynchronously, and give the same."""
    weight = random_weight(Kind(4, 19, 1048, 64, "row", "float"))
    room = torch.empty(9 * 1048 + 1)
    x = activations(9, 1048, torch.float32)
    elsewhere = room[1:].view(9, 1048).copy_(x)
    assert x.data_ptr() % 16 == 0 and elsewhere.data_ptr() % 16
    assert_bitwise_equal(linear(weight, elsewhere), linear(weight, x))


# --- as compiled ---

# (N, K, group_size or None): K cut inside a chunk, N inside a block; groups that end inside chunks, and at their ends
PTX_SHAPES = ((33, 1109, 64), (13, 308, 20), (35, 1304, None), (7, 520, 96))
FLOAT32_PTX_ROWS, PTX_ROWS = (2, 8, 17), (2, 4, 9)  # 8 rows at a time
RING = (5, 4104, 1024)  # the ring of slices goes round twice, and where K is split, each part has slices


@functools.cache
def ptx(bits: int) -> str:
    return cuda_compiled.compile_ptx(CODEBOOK_DECODE_SIMT, "sm_80", bits)


def run(text: str, kind: Kind, m: int, dtype: torch.dtype, splits: int = 1) -> Statistics:
    """One case against float64."""
    weight = random_weight(kind, m)
    x, bias = activations(m, kind.k, dtype, m), torch.randn(kind.n)
    y, statistics = execute_simt(text, weight, x, bias, splits)
    assert_linear_close(y, x, multiplied(weight, dtype), bias)
    assert statistics.count("fma.rn.f32") > 0 and statistics.count("mma.sync") == 0
    return statistics


@needs_nvcc
@pytest.mark.parametrize("bits", BITS)
def test_compiled_code(bits, request):
    """Every dtype of this width, with few rows of x and many, on kinds in rotation. Of the widths, `make test` takes
    one, another at another commit."""
    verdicts.only_in_turn(request.config, bits, len(BITS))
    for i, shape in enumerate(PTX_SHAPES):
        found = list(kinds(bits, *shape))
        for j, m in enumerate(FLOAT32_PTX_ROWS):
            run(ptx(bits), found[(bits + i + 4 * j) % len(found)], m, torch.float32)
    found = list(kinds(bits, *RING))
    run(ptx(bits), found[bits % 9], 3, torch.float32, 2)
    for i, dtype in enumerate(HALVES if bits > 4 else ()):
        for j, m in enumerate(PTX_ROWS):
            kind = list(kinds(bits, *PTX_SHAPES[(0, 1, 3)[(i + j) % 3]]))[6 + (bits + j) % 3]
            run(ptx(bits), kind, m, dtype)
        run(ptx(bits), found[6 + i], 5, dtype, 2)


@needs_nvcc
@pytest.mark.parametrize(
    ("old", "new", "found"),
    [("bar.sync", "// ", Fault), ("cp.async.wait_group 0;", "cp.async.wait_group 1;", Fault)],
)
def test_a_bug_planted_in_compiled_code_is_found(old, new, found):
    text, kind = ptx(3), Kind(3, 35, 1304, 1304, "tensor")
    assert old in text
    run(text, kind, 8, torch.float32)
    with pytest.raises(found):
        run(text.replace(old, new), kind, 8, torch.float32)
