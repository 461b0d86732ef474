"""``csrc/cuda/packed/batch.cuh`` as nvcc compiles it: PTX of sm_80 executed on the CPU."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from benchmarks.tools import cuda_compiled
from benchmarks.tools.cuda_kernels import PACKED_BATCH, WIDTHS
from lowbit.testing import cuda_ptx, verdicts
from lowbit.testing.cuda_planted.packed_decode import some_formats
from lowbit.testing.numerics import assert_linear_close
from lowbit.testing.packed_cases import activations, random_weight
from lowbit.testing.ptx_emulator import Fault, Statistics

pytestmark = pytest.mark.recorded(sources=["csrc/common", "csrc/cuda"])
needs_nvcc = pytest.mark.skipif(cuda_compiled.nvcc_version() is None, reason="no nvcc")

DTYPES = (torch.float16, torch.bfloat16)
ROWS = (20, 33)  # one and two instances' M; the latter is cut
# (N, K, group_size or None): K cut inside a chunk, N inside a warp; the ring of slices goes round twice; groups that
# end inside chunks
SHAPES = ((33, 429, 64), (35, 904, None), (13, 308, 20), (7, 520, 128))


@cache
def ptx(bits: int) -> str:
    return cuda_compiled.compile_ptx(PACKED_BATCH, "sm_80", bits)


def run(
    text: str, bits: int, shape: tuple[int, int, int | None], m: int, dtype: torch.dtype, turn: int, splits: int = 1
) -> Statistics:
    """One case, of the format that ``turn`` says, against float64."""
    found = list(some_formats(bits, *shape))
    weight = random_weight(found[turn % len(found)], turn)
    x, bias = activations(m, shape[1], dtype, turn), torch.randn(shape[0])
    y, statistics = cuda_ptx.packed_batch(text, weight, x, bias, splits, stages=2 + turn % 2)
    assert_linear_close(y, x, weight.dense(), bias)
    assert statistics.count("mma.sync") > 0
    return statistics


@needs_nvcc
@pytest.mark.parametrize("bits", WIDTHS)
def test_compiled_code(bits, request):
    """Every dtype × range of M of this width, on shapes in rotation. Of the widths, `make test` takes one."""
    verdicts.only_in_turn(request.config, bits, 8)
    for i, dtype in enumerate(DTYPES):
        for j, m in enumerate(ROWS):
            shape = SHAPES[(bits + i + j) % len(SHAPES)]
            run(ptx(bits), bits, shape, m, dtype, bits + 3 * i + 5 * j, splits=1 + (i + j) % 2)
        run(ptx(bits), bits, SHAPES[2], 17, dtype, bits + i)


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
    run(text, 4, SHAPES[1], 20, torch.float16, 1)
    with pytest.raises(found):
        run(text.replace(old, new), 4, SHAPES[1], 20, torch.float16, 1)
