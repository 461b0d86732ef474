"""``csrc/cuda/codebook/batch_sm90.cuh``: what nvcc makes of it, executed on the CPU, and what its host code decides."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.tools.cuda_kernels import CSRC, WIDTHS
from lowbit.core.bitpack import pack
from lowbit.testing import cuda_emulated, cuda_ptx, verdicts
from lowbit.testing.codebook_cases import Kind, kinds, random_weight
from lowbit.testing.cuda_codebook import execute_sm90, multiplied, sm90_bytes
from lowbit.testing.cuda_planted.codebook_batch_sm90 import DTYPES, as_it_is, run
from lowbit.testing.numerics import assert_bitwise_equal
from lowbit.testing.packed_cases import activations

pytestmark = pytest.mark.recorded(sources=["csrc/common", "csrc/cuda"])
needs_nvcc = pytest.mark.skipif(cuda_ptx.why_not() is not None, reason=f"not built: {cuda_ptx.why_not()}")

TABLES = ("tensor", "row")
ROWS = (17, 64, 65, 130)  # with either dtype, one or two pieces of work
# (N, K, group_size or None): ragged in every way that the kernel takes; groups of less and of more than half a tile
SHAPES = ((130, 520, 32), (7, 1096, 128), (136, 264, 160), (65, 1032, None), (129, 40, 32))
RING = (136, 1288, 96)  # two pieces of work of six tiles each: the ring of two to four stages goes round twice


@needs_nvcc
@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_compiled_code(bits, tables, request):
    """Every dtype × number of rows of x of a piece of work. `make test` takes a width and kind of tables, others at
    another commit."""
    j = TABLES.index(tables)
    verdicts.only_in_turn(request.config, 2 * bits + j, 2 * len(WIDTHS))
    for i, m in enumerate(ROWS):
        found = [kind for kind in kinds(bits, *SHAPES[(bits + i + 3 * j) % len(SHAPES)]) if kind.tables == tables]
        run(as_it_is(bits), found[(bits + i) % 3], m, 1 + (i + j) % 2, turn=bits + i + j)
    run(as_it_is(bits), list(kinds(bits, *RING))[3 * j + bits % 3], (40, 90)[(bits + j) % 2], 1, turn=bits)


@needs_nvcc
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_every_code_is_the_entry_it_stands_for(bits, request):
    """One-hot x: the entries themselves, of every code in every chunk of a tile, wherever tables are."""
    verdicts.only_in_turn(request.config, bits // 3, 3)
    for i, tables in enumerate(TABLES):
        weight, dtype = random_weight(Kind(bits, 40, 256, 256, tables, "none", torch.float32), bits), DTYPES[i]
        codes = torch.arange(40)[:, None] * 11 + torch.arange(256) * (1 if bits > 5 else 3)
        weight.codes = (codes % (1 << bits)).to(torch.uint8)
        weight.packed = pack(weight.codes, bits)
        y, _ = execute_sm90(as_it_is(bits), weight, torch.eye(256, dtype=dtype)[64 * i : 64 * i + 65])
        assert_bitwise_equal(y, multiplied(weight, dtype).t().to(dtype)[64 * i : 64 * i + 65])


@needs_nvcc
def test_a_row_is_the_same_in_every_batch():
    """By one split of K, whatever the number of rows of x, of blocks, and whichever copy comes first."""
    weight = random_weight(Kind(4, 136, 264, 64, "row", "float", outliers=300))
    x = activations(70, 264, torch.float16)
    whole = execute_sm90(as_it_is(4), weight, x)[0]
    for m, blocks, newest_first in ((1, 1, False), (33, 2, True)):
        found = execute_sm90(as_it_is(4), weight, x[:m].clone(), blocks=blocks, newest_first=newest_first)[0]
        assert_bitwise_equal(found, whole[:m])


@needs_nvcc
def test_what_is_not_finite_stays_in_its_row():
    weight, x = random_weight(Kind(4, 24, 264, 64, "tensor", "float")), activations(20, 264, torch.bfloat16)
    clean = execute_sm90(as_it_is(4), weight, x)[0]
    x[3, 7], x[5, 263] = torch.inf, torch.nan
    y = execute_sm90(as_it_is(4), weight, x)[0]
    rest = [m for m in range(20) if m not in (3, 5)]
    assert not y[[3, 5]].isfinite().any()
    assert_bitwise_equal(y[rest], clean[rest])


@needs_nvcc
def test_integer_arithmetic_is_exact():
    for tables in TABLES:
        weight = random_weight(Kind(4, 130, 264, 32, tables, "float"), 1, integers=True)
        x = torch.randint(-3, 4, (20, 264), generator=torch.Generator().manual_seed(0)).to(torch.float16)
        y = execute_sm90(as_it_is(4), weight, x)[0]
        assert_bitwise_equal(y, (x.double() @ weight.dense().t()).to(torch.float16))


def test_what_lies_in_shared_memory_has_room():
    for bits in WIDTHS:
        for x_rows in (64, 128):
            assert sm90_bytes(bits, x_rows) <= 227 << 10


# --- what the host decides ---

HOST = """
#include <cstdio>
#include <cstdlib>
#include "cuda/codebook/batch_sm90.h"
int main(int, char** given) {
  using namespace lowbit;
  long v[6] = {};
  for (int i = 0; i < 6; ++i) v[i] = std::atol(given[i + 1]);
  cuda::codebook_batch_sm90::Call call = {};
  codebook::Weight& w = call.weight;
  w.N = v[0], w.K = 1024, w.G = v[1], w.group_size = 1024 / v[1], w.bits = static_cast<int>(v[2]);
  w.row_bytes = 4 * 32 * w.bits, w.tables = static_cast<codebook::Weight::Tables>(v[3]);
  call.M = v[4], call.dtype = DType::f16;
  const cuda::Device device = {static_cast<int>(v[5]), 132, 232448};
  const char* why = cuda::codebook_batch_sm90::declines(call, device);
  std::printf("%s|%d", why ? why : "", cuda::codebook_batch_sm90::x_rows_of(call));
}
"""


def test_what_the_host_decides(tmp_path: Path):
    if (reason := cuda_emulated.why_not()) is not None:
        pytest.skip(f"not built: {reason}")
    (tmp_path / "host.cpp").write_text(HOST)
    command = ["g++", "-std=c++17", "-DLOWBIT_EMULATED", f"-I{CSRC}", str(tmp_path / "host.cpp")]
    subprocess.run([*command, "-o", str(tmp_path / "host")], check=True)

    def ask(n=256, groups=8, bits=4, tables=0, m=100, architecture=90):
        given = map(str, (n, groups, bits, tables, m, architecture))
        return subprocess.run([str(tmp_path / "host"), *given], capture_output=True, text=True, check=True).stdout

    assert ask() == ask(tables=1) == ask(tables=2, groups=1) == ask(bits=8) == "|128"
    assert ask(m=64) == ask(bits=8, tables=1) == ask(bits=8, tables=2, groups=1) == "|64"
    assert "one table, or one for each row" in ask(tables=2)
    assert "for sm_90" in ask(architecture=100)
