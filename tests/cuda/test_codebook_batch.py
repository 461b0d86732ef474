"""``csrc/cuda/codebook/batch.cuh``: emulated on the CPU, and as nvcc compiles it (PTX of sm_80)."""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.tools import cuda_compiled
from benchmarks.tools.cuda_kernels import CODEBOOK_BATCH, WIDTHS
from lowbit.core.bitpack import pack
from lowbit.testing import cuda_emulated, verdicts
from lowbit.testing.codebook_cases import SHAPES, Kind, kinds, random_bias, random_weight
from lowbit.testing.cuda_codebook import execute_batch, linear, multiplied
from lowbit.testing.numerics import assert_bitwise_equal, assert_linear_close
from lowbit.testing.packed_cases import activations
from lowbit.testing.ptx_emulator import Fault, Statistics

pytestmark = pytest.mark.recorded(sources=["csrc/common", "csrc/cuda"])
needs_emulation = pytest.mark.skipif(
    cuda_emulated.why_not() is not None, reason=f"not built: {cuda_emulated.why_not()}"
)
needs_nvcc = pytest.mark.skipif(cuda_compiled.nvcc_version() is None, reason="no nvcc")

DTYPES = (torch.float16, torch.bfloat16)
ROWS = (17, 32, 33, 64, 65)
ROOM = (163 << 10, 227 << 10)  # bytes of shared memory
LONG = ((259, 1304, 128), (33, 2600, 64), (5, 3080, 1024), (3, 1100, 37), (20, 1056, 32))


@needs_emulation
@pytest.mark.parametrize("bits", WIDTHS)
def test_linear(bits, request):
    """Every shape and kind; dtypes, rows of x, bias, order of warps, splits and room in rotation. `make test` takes a
    twelfth."""
    for i, kind in enumerate(kind for shape in (*SHAPES, *LONG) for kind in kinds(bits, *shape)):
        room, dtype = ROOM[i // 3 % 2], DTYPES[(i + bits) // 2 % 2]
        if not verdicts.in_turn(request.config, i, 12):
            continue
        weight, bias = random_weight(kind, i), random_bias(i, kind.n)
        x = activations(ROWS[(i // 2 + bits) % len(ROWS)], kind.k, dtype, seed=i)
        y = linear(weight, x, bias, order=i % 2, processors=(1, 132)[i // 2 % 2], shared_bytes=room)
        assert_linear_close(y, x, multiplied(weight, dtype), bias)


@needs_emulation
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_is_the_entry_it_stands_for(bits):
    """One-hot x: the entries themselves, of every code in every chunk of a tile, wherever tables are."""
    for i, (tables, room) in enumerate(
        (("tensor", 99 << 10), ("tensor", 227 << 10), ("row", 227 << 10), ("row", 99 << 10), ("group", 99 << 10))
    ):
        weight, dtype = random_weight(Kind(bits, 40, 256, 128, tables, "none", torch.float32), bits), DTYPES[i % 2]
        codes = torch.arange(40)[:, None] * 11 + torch.arange(256) * (1 if bits > 5 else 3)
        weight.codes = (codes % (1 << bits)).to(torch.uint8)
        weight.packed = pack(weight.codes, bits)
        y = linear(weight, torch.eye(256, dtype=dtype), shared_bytes=room)
        assert_bitwise_equal(y, multiplied(weight, dtype).t().to(dtype))


@needs_emulation
@pytest.mark.parametrize(("tables", "processors"), [("row", 1), ("row", 132), ("group", 132)])
def test_a_row_is_the_same_in_every_batch(tables, processors):
    """Bit for bit, where a call says so: one kernel takes every M."""
    weight = random_weight(Kind(4, 35, 1100, 20, tables, "float", outliers=300))
    x, bias = activations(70, 1100, torch.float16), torch.randn(35)

    def rows(first: int, count: int, order: int = 0, room: int = ROOM[0]) -> torch.Tensor:
        some = x[first : first + count].clone()
        return linear(
            weight, some, bias, batch_invariant=True, order=order, processors=processors, shared_bytes=room
        )  # fmt: skip

    whole = rows(0, 70)
    assert_linear_close(whole, x, multiplied(weight, x.dtype), bias)
    assert_bitwise_equal(rows(0, 70, order=1, room=ROOM[1]), whole)
    for first, count in ((3, 1), (60, 8), (0, 17), (20, 33)):
        assert_bitwise_equal(rows(first, count), whole[first : first + count])


@needs_emulation
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_what_is_not_finite_stays_in_its_row(value):
    weight = random_weight(Kind(4, 19, 300, 32, "tensor", "float", outliers=100))
    x = activations(40, 300, torch.float16)
    before = linear(weight, x)
    x[36, 299] = value
    y = linear(weight, x)
    rest = [m for m in range(40) if m != 36]
    assert_bitwise_equal(y[rest], before[rest])
    assert not y[36].isfinite().any()


@needs_emulation
@pytest.mark.parametrize(
    ("kind", "dtype", "options", "reason"),
    [
        (Kind(8, 5, 64, 64, "row"), torch.float16, dict(shared_bytes=48 << 10), "no room for x"),
    ],
)
def test_a_call_that_is_declined_says_why(kind, dtype, options, reason):
    with pytest.raises(ValueError, match=reason):
        linear(random_weight(kind), activations(17, 64, dtype), **options)


# --- as compiled ---

PTX_ROWS = (20, 33)
PTX_SHAPES = ((33, 429, 64), (35, 904, None), (13, 308, 20), (7, 520, 128))


@functools.cache
def ptx(bits: int) -> str:
    return cuda_compiled.compile_ptx(CODEBOOK_BATCH, "sm_80", bits)


def run(text: str, kind: Kind, m: int, dtype: torch.dtype, splits: int = 1, turn: int = 0) -> Statistics:
    """One case against float64."""
    weight = random_weight(kind, m)
    x, bias = activations(m, kind.k, dtype, m), torch.randn(kind.n)
    stages = 2 if (kind.bits, kind.tables) == (8, "row") else 2 + turn % 2  # beside 128 KiB of tables two have room
    y, statistics = execute_batch(text, weight, x, bias, splits, stages, copies=(0, 3, 5)[turn % 3])
    assert_linear_close(y, x, multiplied(weight, dtype), bias)
    assert statistics.count("mma.sync") > 0
    return statistics


@needs_nvcc
@pytest.mark.parametrize("bits", WIDTHS)
def test_compiled_code(bits, request):
    """Every dtype × range of M of this width, on shapes and kinds in rotation. Of the widths, `make test` takes one."""
    verdicts.only_in_turn(request.config, bits, 8)
    for i, dtype in enumerate(DTYPES):
        for j, m in enumerate(PTX_ROWS):
            found = [kind for kind in kinds(bits, *PTX_SHAPES[(bits + i + j) % 4]) if kind.tables != "group"]
            run(ptx(bits), found[(bits + 3 * i + 2 * j) % len(found)], m, dtype, 1 + (i + j) % 2, bits + i + j)
            grouped = list(kinds(bits, *PTX_SHAPES[(0, 2, 3)[(bits + i + j) % 3]]))[6:]
            run(ptx(bits), grouped[(bits + i) % 3], m, dtype, 1 + j, bits + j)
        run(ptx(bits), Kind(bits, *PTX_SHAPES[2], tables="row"), 17, dtype, turn=i)


@needs_nvcc
@pytest.mark.parametrize(
    ("old", "new", "found"),
    [("bar.sync", "// ", Fault), ("cp.async.wait_group 1;", "cp.async.wait_group 2;", Fault)],
)
def test_a_bug_planted_in_compiled_code_is_found(old, new, found):
    text, kind = ptx(4), Kind(4, 35, 904, 904, "row")
    assert old in text
    run(text, kind, 20, torch.float16, turn=1)
    with pytest.raises(found):
        run(text.replace(old, new), kind, 20, torch.float16, turn=1)
