"""CUDA C++ kernels of family ``codebook``: emulated on the CPU, and as nvcc compiles them (PTX of sm_80)."""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.tools import cuda_compiled
from benchmarks.tools.cuda_kernels import KERNELS, WIDTHS
from lowbit.core.bitpack import pack
from lowbit.testing import cuda_emulated, verdicts
from lowbit.testing.codebook_cases import SHAPES, Kind, Weight, kinds, random_bias, random_weight
from lowbit.testing.cuda_codebook import execute_ptx, execute_rows, instance, linear, multiplied, rows, taken
from lowbit.testing.cuda_planted.codebook_gather import expected
from lowbit.testing.numerics import assert_bitwise_equal, assert_linear_close
from lowbit.testing.packed_cases import DTYPES as FLOATS
from lowbit.testing.packed_cases import activations
from lowbit.testing.ptx_emulator import Fault, Statistics

pytestmark = pytest.mark.recorded(sources=["csrc/common", "csrc/cuda"])
needs_emulation = pytest.mark.skipif(
    cuda_emulated.why_not() is not None, reason=f"not built: {cuda_emulated.why_not()}"
)
needs_nvcc = pytest.mark.skipif(cuda_compiled.nvcc_version() is None, reason="no nvcc")

BITS = WIDTHS
DTYPES = (torch.float16, torch.bfloat16)
ROWS = (1, 2, 3, 4, 5, 8, 9, 15, 16, 0)
# Slices of 1024 columns: several, the last one cut; a group longer than a slice, and than a tile; blocks cut by N
LONG = ((35, 7176, 128), (33, 4104, 2048), (32, 2560, 512), (3, 3001, 37))


@functools.cache
def all_weights(bits: int, integers: bool = False) -> list[Weight]:
    """Of every kind; of the long shapes, which take their time, of a third."""
    every = [kind for shape in SHAPES for kind in kinds(bits, *shape)]
    if not integers:
        every += [kind for i, shape in enumerate(LONG) for kind in list(kinds(bits, *shape))[(bits + i) % 3 :: 3]]
    found = filter(taken, every)
    return [random_weight(kind, seed, integers=integers) for seed, kind in enumerate(found)]


@needs_emulation
@pytest.mark.parametrize("bits", BITS)
def test_linear(bits, request):
    """Every shape and kind, with dtypes, rows of x, bias, order of warps, and splits of K in rotation.

    `make test` takes a third, others at another commit."""
    for i, weight in enumerate(all_weights(bits)):
        if not verdicts.in_turn(request.config, i, 3):
            continue
        x = activations(ROWS[(i + bits) % len(ROWS)], weight.kind.k, DTYPES[(i + bits) // 2 % 2], seed=i)
        bias = random_bias(i, weight.kind.n)
        y = linear(weight, x, bias, order=i % 2, processors=(1, 132)[i // 2 % 2])
        assert_linear_close(y, x, multiplied(weight, x.dtype), bias)


@needs_emulation
@pytest.mark.parametrize("bits", BITS)
def test_integer_arithmetic_is_exact(bits, request):
    """Integers times powers of two: float32 sums are exact, so y is the float64 result, rounded once."""
    for i, weight in enumerate(all_weights(bits, integers=True)):
        if not verdicts.in_turn(request.config, i, 3):
            continue
        dtype = DTYPES[i // 3 % 2]
        x = torch.randint(-3, 4, (5, weight.kind.k), generator=torch.Generator().manual_seed(i)).to(dtype)
        exact = x.double() @ weight.dense().t()
        assert_bitwise_equal(linear(weight, x), exact.to(dtype))


@needs_emulation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_is_the_entry_it_stands_for(dtype):
    """One-hot x: the entries themselves, of every code in every chunk of a tile, in tables of every row."""
    for bits in BITS:
        count = 1 << bits
        for tables in ("tensor", "row", "group")[: 3 if bits <= 4 else 2]:
            weight = random_weight(Kind(bits, 24, 256, 128, tables, "none", torch.float32), bits)
            codes = torch.arange(24)[:, None] * 11 + torch.arange(256) * (1 if bits > 5 else 3)
            weight.codes = (codes % count).to(torch.uint8)
            weight.packed = pack(weight.codes, bits)
            exact = multiplied(weight, dtype).t().to(dtype)
            for first in range(bits % 2 * 16, 256, 32):
                x = torch.eye(256, dtype=dtype)[first : first + 16]
                assert_bitwise_equal(linear(weight, x), exact[first : first + 16])


@needs_emulation
@pytest.mark.parametrize("bits", BITS)
def test_a_row_is_the_same_in_every_batch(bits):
    """Bit for bit, whatever M is, in whatever order the warps run, and where few rows of x fit into shared memory."""
    for i, kind in enumerate(
        (
            Kind(bits, 35, 1096, 64, "tensor", "float", outliers=700),
            Kind(bits, 17, 2600, 2600, "row", "none", torch.float16),
            Kind(bits, 5, 300, 20, "tensor", "nested", torch.bfloat16),
        )
    ):
        weight, dtype = random_weight(kind, i), DTYPES[(bits + i) % 2]
        x, bias = activations(16, kind.k, dtype), torch.randn(kind.n)
        options = dict(processors=(1, 8)[i % 2])
        whole = linear(weight, x, bias, **options)
        assert_bitwise_equal(linear(weight, x, bias, order=1, **options), whole)
        for small in (99 << 10, 80 << 10):
            assert_bitwise_equal(linear(weight, x, bias, shared_bytes=small, **options), whole)
        for m in (1, 7, 9):
            for first in (0, 16 - m):
                rows = slice(first, first + m)
                assert_bitwise_equal(linear(weight, x[rows].clone(), bias, **options), whole[rows])


@needs_emulation
@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_what_is_not_finite_stays_in_its_row(value, bits):
    weight = random_weight(Kind(bits, 19, 300, 32, "tensor", "float", outliers=100))
    x = activations(11, 300, torch.float16)
    before = linear(weight, x)
    x[6, 299] = value
    y = linear(weight, x)
    rest = [m for m in range(11) if m != 6]
    assert_bitwise_equal(y[rest], before[rest])
    assert not y[6].isfinite().any()


@needs_emulation
def test_x_at_any_address():
    """Rows that begin at no multiple of 16 bytes are not copied asynchronously, and give the same."""
    weight = random_weight(Kind(4, 19, 1048, 64, "row", "float"))
    room = torch.empty(9 * 1048 + 1, dtype=torch.float16)
    x = activations(9, 1048, torch.float16)
    elsewhere = room[1:].view(9, 1048).copy_(x)
    assert x.data_ptr() % 16 == 0 and elsewhere.data_ptr() % 16
    assert_bitwise_equal(linear(weight, elsewhere), linear(weight, x))


@needs_emulation
@pytest.mark.parametrize(
    ("kind", "rows", "dtype", "options", "reason"),
    [
        (Kind(8, 5, 64, 64, "row"), 1, torch.float16, dict(shared_bytes=64 << 10), "no room for the tables"),
    ],
)
def test_a_call_that_is_declined_says_why(kind, rows, dtype, options, reason):
    with pytest.raises(ValueError, match=reason):
        linear(random_weight(kind), activations(rows, 64, dtype), **options)


# --- rows ---


@needs_emulation
@pytest.mark.parametrize("bits", BITS)
def test_rows(bits, request):
    """Every shape and kind; dtypes, ids of both widths, none, and all rows in rotation. `make test` takes a third."""
    for i, shape in enumerate((*SHAPES, (3, 1096, 64), (2, 2052, 37))):
        for j, kind in enumerate(kinds(bits, *shape)):
            turn = i + j
            if not verdicts.in_turn(request.config, turn, 3):
                continue
            weight, n = random_weight(kind, turn), kind.n
            g, count = torch.Generator().manual_seed(j), (7, 1, 40, 0)[turn % 4]
            ids = torch.randint(-1, n + 1, (count,), generator=g, dtype=(torch.int64, torch.int32)[j % 2])
            given = None if turn // 3 % 3 == 0 else ids
            found = rows(weight, given, FLOATS[turn // 2 % 3], order=j % 2, misaligned=turn % 5 == 0)
            assert_bitwise_equal(found, expected(weight, given, FLOATS[turn // 2 % 3]))


@needs_emulation
def test_rows_are_those_of_the_reference():
    for bits, tables, scales in ((3, "row", "none"), (4, "group", "nested"), (8, "tensor", "float")):
        weight, ids = random_weight(Kind(bits, 13, 172, 32, tables, scales, outliers=40)), torch.tensor([3, 12, 0, 3])
        for dtype in FLOATS:
            assert_bitwise_equal(rows(weight, None, dtype), weight.operands.dequantize(172, dtype))
            assert_bitwise_equal(rows(weight, ids, dtype), weight.operands.embedding(ids, 172, dtype))


# --- as compiled ---

# (N, K, group_size or None): K cut inside a chunk, N inside a block; groups that end inside chunks, and at their ends
PTX_SHAPES = ((33, 1109, 64), (13, 308, 20), (35, 1304, None), (7, 520, 96))
PTX_ROWS = (2, 4, 8, 16)
RING = (5, 5128, 1024)  # the ring of slices goes round twice, and where K is split, each part has slices


@functools.cache
def ptx(bits: int, kernel: str = "codebook_decode") -> str:
    return cuda_compiled.compile_ptx(KERNELS[kernel], "sm_80", bits)


def run(text: str, kind: Kind, m: int, dtype: torch.dtype, splits: int = 1) -> Statistics:
    """One case against float64."""
    weight = random_weight(kind, m)
    x, bias = activations(m, kind.k, dtype, m), torch.randn(kind.n)
    y, statistics = execute_ptx(text, weight, x, bias, splits)
    assert_linear_close(y, x, multiplied(weight, dtype), bias)
    assert statistics.count("mma.sync") > 0
    return statistics


@needs_nvcc
@pytest.mark.parametrize("bits", BITS)
def test_compiled_code(bits, request):
    """Every instance of this width, for 2, 4, 8 and 16 rows of x, on all kinds in rotation. Of the widths, `make test`
    takes one, another at another commit."""
    verdicts.only_in_turn(request.config, bits, len(BITS))
    seen = set()
    found = [kind for shape in PTX_SHAPES for kind in kinds(bits, *shape) if taken(kind)]
    for i, kind in enumerate(found):
        for j, dtype in enumerate(DTYPES):
            for m in PTX_ROWS:
                name = (*instance(random_weight(kind), min(m, 8)), m, dtype)
                if (i + j) % 2 == 0 and name not in seen and (m == 8 or not name[2]):
                    seen.add(name)
                    run(ptx(bits), kind, m, dtype)
    assert len(seen) == 2 * (4 + 1) * (2 if bits == 4 else 1)
    for i, kind in enumerate(filter(taken, list(kinds(bits, *RING))[bits % 3 :: 3])):
        run(ptx(bits), kind, (3, 5, 8)[i], DTYPES[(bits + i) % 2], 1 + 2 * (i % 2))


@needs_nvcc
@pytest.mark.parametrize("bits", BITS)
def test_compiled_rows(bits, request):
    """Every dtype of this width; what is added to a product is added to the rounded one. `make test` takes a width."""
    verdicts.only_in_turn(request.config, bits, len(BITS))
    for i, shape in enumerate(((13, 172, 32), (9, 172, 7), (5, 1096, 64), (3, 2052, None))):
        for j, kind in enumerate(kinds(bits, *shape)):
            weight, dtype = random_weight(kind, i), FLOATS[(i + j) % 3]
            ids = torch.tensor([shape[0] - 1, -1, 0, shape[0], 2**32, 2, 2])
            given = (None, ids, ids.clamp(-1, 2**31 - 1).int())[(i + j // 2) % 3]
            found, statistics = execute_rows(ptx(bits, "codebook_gather"), weight, given, dtype)
            assert_bitwise_equal(found, expected(weight, given, dtype))
            vectors = shape[1] * dtype.itemsize % 16 == 0 and shape[2] != 7
            assert not vectors or statistics.count("st.global.v4") > 0


@needs_nvcc
@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("bar.sync", "// ", Fault),
        ("cp.async.wait_group 1;", "cp.async.wait_group 2;", Fault),
        ("0x6240", "0x6420", AssertionError),
    ],
)
def test_a_bug_planted_in_compiled_code_is_found(old, new, found):
    text, kind = ptx(3), Kind(3, 35, 1304, 1304, "row")
    old, new = (str(int(t, 16)) if t.startswith("0x") else t for t in (old, new))
    assert old in text
    run(text, kind, 8, torch.float16)
    with pytest.raises(found):
        run(text.replace(old, new), kind, 8, torch.float16)
