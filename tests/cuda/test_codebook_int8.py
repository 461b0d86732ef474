"""int8 activations in ``csrc/cuda/codebook``, compiled by g++ on csrc/cuda/emulated/emulation.h, and as nvcc's PTX."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from benchmarks.tools import cuda_compiled
from benchmarks.tools.cuda_kernels import CODEBOOK_LINEAR_INT8, CODEBOOK_STEPS, QUANTIZE, WIDTHS
from lowbit.backends.operands import Activation
from lowbit.backends.reference import quantize_activations
from lowbit.core.bitpack import pack
from lowbit.testing import cuda_emulated, verdicts
from lowbit.testing.codebook_cases import SHAPES, Kind, Weight, kinds, random_bias, random_weight
from lowbit.testing.cuda_codebook import execute_int8, linear
from lowbit.testing.numerics import assert_bitwise_equal, assert_linear_close
from lowbit.testing.packed_cases import activations
from lowbit.testing.ptx_emulator import Fault, Statistics

pytestmark = pytest.mark.recorded(sources=["csrc/common", "csrc/cuda"])
needs_emulation = pytest.mark.skipif(
    cuda_emulated.why_not() is not None, reason=f"not built: {cuda_emulated.why_not()}"
)
needs_nvcc = pytest.mark.skipif(cuda_compiled.nvcc_version() is None, reason="no nvcc")

BITS = WIDTHS
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROWS = (1, 5, 8, 9, 16, 33, 0, 40)
STATIC = torch.tensor([0.011])
# Slices of 1024 columns: several, the last one cut; a group longer than a slice; blocks cut by N
LONG = ((35, 5128, 128), (33, 4104, 2048), (3, 3001, 37), (19, 2600, None))


def check(
    y: Tensor, weight: Weight, x: Tensor, bias: Tensor | None = None, x_scale: Tensor | None = None
) -> None:  # fmt: skip
    """The reference's bit for bit, as its sums are integers; with outliers, which meet x as it is, against float64."""
    if weight.outliers[0] is None:
        reference = weight.operands.linear(x, bias, Activation(int8=True, x_scale=x_scale))
        assert_bitwise_equal(y, reference)
        return
    q, inverse = quantize_activations(x, x_scale)
    fixed, step = weight.fixed_point()
    both = torch.cat([q.double() / inverse.double(), x.double()], 1)
    parts = torch.cat([fixed * step.double(), weight.dense() - weight.dense(outliers=False)], 1)
    assert_linear_close(y, both, parts, bias)


@needs_emulation
@pytest.mark.parametrize("bits", BITS)
def test_linear(bits, request):
    """Every shape and kind; dtypes, rows of x, bias, static scales, orders and splits of K in rotation.

    `make test` takes a thirtieth, others at another commit."""
    for i, kind in enumerate(kind for shape in (*SHAPES, *LONG) for kind in kinds(bits, *shape)):
        if not verdicts.in_turn(request.config, i + 4 * bits, 30):
            continue
        weight, dtype, x_scale = random_weight(kind, i), DTYPES[(i + bits) % 3], STATIC if i % 5 < 2 else None
        x, bias = activations(ROWS[(i + bits) % len(ROWS)], kind.k, dtype, seed=i), random_bias(i, kind.n)
        y = linear(weight, x, bias, int8=True, x_scale=x_scale, order=i % 2, processors=(1, 132)[i // 2 % 2])
        check(y, weight, x, bias, x_scale)


@needs_emulation
@pytest.mark.parametrize("rows", [5, 17])
@pytest.mark.parametrize("bits", BITS)
def test_every_code_is_the_integer_it_stands_for(bits, rows, request):
    """One-hot x: the weights themselves, of every kind of table. `make test` takes a quarter of the widths."""
    verdicts.only_in_turn(request.config, bits, 4)
    for scales, tables in (("none", "tensor"), ("float", "tensor"), ("nested", "row"), ("none", "group")):
        weight = random_weight(Kind(bits, 24, 280, 96, tables, scales), bits)
        x = torch.eye(280)[bits % 8 :: 280 // rows][:rows].clone()
        fixed, step = weight.fixed_point()
        exact = x @ (fixed.float() * step).t()
        assert_bitwise_equal(linear(weight, x, int8=True, x_scale=torch.ones(1)), exact)


@needs_emulation
def test_a_row_is_the_same_in_every_batch():
    """Bit for bit, outliers too, whatever M is, with or without splits."""
    weight = random_weight(Kind(4, 35, 2600, 64, "row", "float", outliers=700))
    x, bias = activations(40, 2600, torch.bfloat16), torch.randn(35)
    whole = linear(weight, x, bias, int8=True)
    for first, count in ((39, 1), (3, 8), (12, 17), (7, 33)):
        some = x[first : first + count].clone()
        y = linear(weight, some, bias, int8=True, processors=132, batch_invariant=bool(count % 2), order=1)
        assert_bitwise_equal(y, whole[first : first + count])


@needs_emulation
def test_sums_do_not_overflow():
    """Extreme codes and activations of more columns than one int32 holds the sum of: K is split."""
    k = 70_001
    weight = random_weight(Kind(2, 2, k, k))
    weight.codes.fill_(3)
    weight.packed.copy_(pack(weight.codes, 2))
    weight.codebook[..., -1] = 5.0
    weight.codebook.clamp_(-5, 5)
    x = torch.full((2, k), 127.0)
    x[1] = -127.0
    check(linear(weight, x, int8=True), weight, x)
    weight.codebook[..., -1] = -5.0
    weight._dense.clear()
    check(linear(weight, x, int8=True), weight, x)


@needs_emulation
def test_many_rows_are_split_in_parts(request):
    """Where K is split, 512 rows of x are in the workspace at a time. `make test` runs this at every fourth commit."""
    verdicts.only_in_turn(request.config, 0, 4)
    weight, x = random_weight(Kind(1, 3, 4100, 4100)), activations(515, 4100, torch.bfloat16)
    check(linear(weight, x, int8=True, processors=132), weight, x)


@needs_emulation
@pytest.mark.parametrize("entry", [0.0, 1e-40, -3e-38])
def test_tables_of_zeros_and_of_subnormals(entry):
    """Too small for a step: such a weight counts as zero."""
    weight = random_weight(Kind(3, 5, 40, 40, "row"))
    weight.codebook[2] = entry
    x = activations(3, 40, torch.float32)
    y = linear(weight, x, int8=True)
    check(y, weight, x)
    assert not y[:, 2].any()


@needs_emulation
@pytest.mark.parametrize("count", [11, 40])
def test_what_is_not_finite_stays_in_its_row(count):
    for tables in ("tensor", "group"):
        weight, x = random_weight(Kind(4, 19, 300, 32, tables, "float")), activations(count, 300, torch.float16)
        x[6, 299] = torch.nan
        y = linear(weight, x, int8=True)
        check(y, weight, x)
        assert y[6].isnan().all() and y[7].isfinite().all()


@needs_emulation
def test_a_call_that_is_declined_says_why():
    weight = random_weight(Kind(8, 5, 64, 64, "row"))
    with pytest.raises(ValueError, match="no room for the tables"):
        linear(weight, activations(9, 64, torch.float16), int8=True, shared_bytes=64 << 10)


# --- as compiled ---

# (N, K, group_size or None): K cut inside a chunk, N inside a block; groups that end inside chunks, and at their ends
PTX_SHAPES = ((33, 1109, 64), (13, 308, 20), (35, 1304, None), (7, 520, 96))
PTX_ROWS = (3, 8, 20, 33)
RING = (5, 5128, 1024)  # the ring of slices goes round twice, and where K is split, each part has slices


@cache
def ptx(bits: int) -> str:
    return cuda_compiled.compile_ptx(CODEBOOK_LINEAR_INT8, "sm_80", bits)


@cache
def around() -> tuple[str, str]:
    return cuda_compiled.compile_ptx(CODEBOOK_STEPS, "sm_80", None), cuda_compiled.compile_ptx(QUANTIZE, "sm_80", None)


def run(text: str, kind: Kind, m: int, dtype: torch.dtype, turn: int, splits: int = 1) -> Statistics:
    weight, x_scale = random_weight(kind, m), STATIC if turn % 3 == 1 else None
    x, bias = activations(m, kind.k, dtype, turn), random_bias(turn, kind.n)
    y, statistics = execute_int8(text, *around(), weight, x, bias, x_scale, splits)
    check(y, weight, x, bias, x_scale)
    assert statistics.count("mma.sync") > 0
    return statistics


@needs_nvcc
@pytest.mark.parametrize("bits", BITS)
def test_compiled_code(bits, request):
    """Every dtype × rows of x of this width, on kinds in rotation. Of the widths, `make test` takes one, of its cases a
    third."""
    verdicts.only_in_turn(request.config, bits, 8)
    for i, dtype in enumerate(DTYPES):
        for j, m in enumerate(PTX_ROWS):
            if not verdicts.in_turn(request.config, i + j, 3):
                continue
            found = list(kinds(bits, *PTX_SHAPES[(bits + i + j) % len(PTX_SHAPES)]))
            run(ptx(bits), found[(bits + 4 * i + j) % len(found)], m, dtype, bits + i + 2 * j)
        if not verdicts.in_turn(request.config, i, 3):
            continue
        found = list(kinds(bits, *RING))
        run(ptx(bits), found[(bits + 4 * i) % 9], (3, 11, 5)[i], dtype, bits + i, splits=1 + (i + bits) % 3)


@needs_nvcc
@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("bar.sync", "// ", Fault),
        ("cp.async.wait_group 1;", "cp.async.wait_group 2;", Fault),
        ("s32.s8.s8.s32", "s32.u8.s8.s32", AssertionError),
    ],
)
def test_a_bug_planted_in_compiled_code_is_found(old, new, found, request):
    """`make test` plants one of them at half of the commits."""
    verdicts.only_in_turn(request.config, ord(old[0]) % 3, 6)
    text, kind = ptx(3), Kind(3, 35, 1304, 1304, "tensor")
    assert old in text
    run(text, kind, 8, torch.float16, 1)
    with pytest.raises(found):
        run(text.replace(old, new), kind, 8, torch.float16, 1)
