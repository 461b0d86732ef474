"""CUDA C++ kernels as nvcc compiles them: PTX of sm_80 executed on the CPU."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from benchmarks.tools import cuda_compiled
from benchmarks.tools.cuda_kernels import PACKED_DECODE, WIDTHS
from lowbit.testing import cuda_ptx, verdicts
from lowbit.testing.cuda_planted.packed_decode import some_formats
from lowbit.testing.numerics import assert_bitwise_equal, assert_linear_close
from lowbit.testing.packed_cases import activations, random_weight
from lowbit.testing.ptx_emulator import Fault, Statistics

pytestmark = pytest.mark.recorded(sources=["csrc/common", "csrc/cuda"])
needs_nvcc = pytest.mark.skipif(cuda_compiled.nvcc_version() is None, reason="no nvcc")

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (*HALVES, torch.float32)
ROWS = (2, 4, 8, 16)
FLOAT32, FLOAT32_ROWS = (torch.float32,), (2, 4, 17)  # 8 rows at a time
# (N, K, group_size or None): K cut inside a chunk, N inside a block; groups that end inside chunks, and at their ends
SHAPES = ((33, 1109, 64), (13, 308, 20), (35, 1304, None), (7, 520, 96))
RING = (5, 5128, 1024)  # the ring of slices goes round twice, and where K is split, each part has slices


@cache
def ptx(bits: int) -> str:
    return cuda_compiled.compile_ptx(PACKED_DECODE, "sm_80", bits)


def run(
    text: str, bits: int, shape: tuple[int, int, int | None], m: int, dtype: torch.dtype, turn: int,
    splits: int = 1,
) -> Statistics:  # fmt: skip
    """One case, of the format that ``turn`` says, against float64."""
    found = list(some_formats(bits, *shape))
    weight = random_weight(found[turn % len(found)], turn)
    x, bias = activations(m, shape[1], dtype, turn), torch.randn(shape[0])
    y, statistics = cuda_ptx.packed_decode(text, weight, x, bias, splits)
    assert_linear_close(y, x, weight.dense(), bias)
    assert statistics.count("mma.sync") > 0
    return statistics


@needs_nvcc
@pytest.mark.parametrize("bits", WIDTHS)
def test_compiled_code(bits, request):
    """Every dtype × range of M of this width, on all shapes in rotation. Of the widths, `make test` takes two."""
    verdicts.only_in_turn(request.config, bits, 4)
    for i, dtype in enumerate(DTYPES):
        for j, m in enumerate(FLOAT32_ROWS if dtype in FLOAT32 else ROWS):
            run(ptx(bits), bits, SHAPES[(bits + i + j) % len(SHAPES)], m, dtype, bits + 3 * i + 5 * j)
        for splits in (1, 3):
            run(ptx(bits), bits, RING, (3, 11, 5)[i], dtype, bits + 2 * i, splits)


@needs_nvcc
def test_a_row_is_the_same_in_every_batch():
    (found, *_) = some_formats(4, 19, 1109, 64)
    weight, x = random_weight(found), activations(16, 1109, torch.float16)

    def rows(m: int) -> torch.Tensor:
        return cuda_ptx.packed_decode(ptx(4), weight, x[:m].clone())[0]

    whole = rows(16)
    for m in (1, 7, 9):
        assert_bitwise_equal(rows(m), whole[:m])


@needs_nvcc
@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("bar.sync", "// ", Fault),
        ("cp.async.wait_group 1;", "cp.async.wait_group 2;", Fault),
        ("sub.f16x2", "add.f16x2", AssertionError),
    ],
)
def test_a_bug_planted_in_compiled_code_is_found(old, new, found):
    text = ptx(4)
    assert old in text
    run(text, 4, SHAPES[2], 8, torch.float16, 0)
    with pytest.raises(found):
        run(text.replace(old, new), 4, SHAPES[2], 8, torch.float16, 0)
