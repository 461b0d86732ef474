"""The kernel of many rows for sm_90a: what nvcc makes of it, executed on the CPU, and the choices of its host code."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.tools import cuda_compiled
from benchmarks.tools.cuda_kernels import CSRC, PACKED_BATCH_SM90, WIDTHS
from lowbit.testing import cuda_emulated, cuda_ptx, verdicts
from lowbit.testing.cuda_planted.packed_batch_sm90 import DTYPES, as_it_is, run  # noqa: F401 (cuda_coverage.py reads it)
from lowbit.testing.cuda_planted.packed_decode import some_formats
from lowbit.testing.numerics import assert_bitwise_equal
from lowbit.testing.packed_cases import activations, random_weight

pytestmark = pytest.mark.recorded(sources=["csrc/common", "csrc/cuda"])
needs_nvcc = pytest.mark.skipif(cuda_ptx.why_not() is not None, reason=f"not built: {cuda_ptx.why_not()}")

ROWS = (17, 64, 65, 150)  # with either dtype, one or two pieces of work
# (N, K, group_size or None): ragged in every way that the kernel takes; groups of less and of more than half a tile
SHAPES = ((130, 520, 32), (7, 1096, 128), (136, 264, 160), (65, 1032, None), (129, 40, 32), (1, 776, 512))
RING = (136, 1288, 96)  # two pieces of work of six tiles each: the ring of two to four stages goes round twice


@needs_nvcc
@pytest.mark.parametrize("bits", WIDTHS)
def test_compiled_code(bits, request):
    """Every dtype × number of rows of x of a piece of work. `make test` takes a width, another at another commit."""
    verdicts.only_in_turn(request.config, bits, len(WIDTHS))
    text = as_it_is(bits)
    for i, m in enumerate(ROWS):
        run(text, bits, *SHAPES[(bits + i) % len(SHAPES)], m, 1 + i // 2, turn=bits + i)
    for i, m in enumerate((40, 90)):
        run(text, bits, *RING, m, 1, turn=bits + 2 + i)


def broken_chains(text: str) -> list[str]:
    """What interrupts the products between a fence and their commit, in a text of PTX."""
    chains = re.findall(r"wgmma\.fence\b.*?wgmma\.commit_group", text, re.DOTALL)
    assert chains and all(chain.count("wgmma.mma_async") in (2, 8) for chain in chains)
    return [found for chain in chains for found in re.findall(r"^\s*((?:bar|bra|mbarrier|ld|st|@)\S*)", chain, re.M)]


@needs_nvcc
def test_nothing_interrupts_products():
    """No barrier, branch or access of memory: the assembler would have to wait for the products before it."""
    assert broken_chains(as_it_is(4)) == []
    barrier = as_it_is(4).replace("wgmma.commit_group", "bar.sync 0;\nwgmma.commit_group", 1)
    assert broken_chains(barrier) == ["bar.sync"]


def test_the_ring_goes_round_twice():
    n, k, _ = RING
    for bits in WIDTHS:
        for x_rows in (64, 128):
            stage = 512 * x_rows + 4096 * bits
            stages = (cuda_ptx.batch_sm90_bytes(bits, x_rows) - 1023) // (stage + 16)
            assert stages >= 2 and -(-n // 128) * -(-k // 256) >= 2 * stages + 1


@needs_nvcc
def test_a_row_is_the_same_in_every_batch():
    """By one split of K, whatever the number of rows of x, of blocks, and whichever copy comes first."""
    found = list(some_formats(4, 136, 520, 64))[5]
    weight, x = random_weight(found), activations(70, 520, torch.float16)
    whole = cuda_ptx.packed_batch_sm90(as_it_is(4), weight, x)[0]
    for m, blocks, newest_first in ((1, 1, False), (33, 2, True)):
        given = dict(blocks=blocks, newest_first=newest_first)
        assert_bitwise_equal(cuda_ptx.packed_batch_sm90(as_it_is(4), weight, x[:m].clone(), **given)[0], whole[:m])


@needs_nvcc
def test_what_is_not_finite_stays_in_its_row():
    found = list(some_formats(4, 24, 264, 64))[2]
    weight, x = random_weight(found), activations(20, 264, torch.bfloat16)
    clean = cuda_ptx.packed_batch_sm90(as_it_is(4), weight, x)[0]
    x[3, 7], x[5, 263] = torch.inf, torch.nan
    y = cuda_ptx.packed_batch_sm90(as_it_is(4), weight, x)[0]
    rest = [m for m in range(20) if m not in (3, 5)]
    assert not y[[3, 5]].isfinite().any()
    assert_bitwise_equal(y[rest], clean[rest])


@needs_nvcc
def test_small_integers_are_exact():
    found = next(some_formats(4, 130, 520, 128))
    weight, generator = random_weight(found), torch.Generator().manual_seed(0)
    weight.scales.fill_(1.0)
    x = torch.randint(-2, 3, (20, 520), generator=generator) * (torch.arange(520) % 8 == 3)
    y = cuda_ptx.packed_batch_sm90(as_it_is(4), weight, x.to(torch.float16))[0]
    exact = x.double() @ weight.dense().T
    assert exact.abs().max() < 1 << 15
    assert_bitwise_equal(y, exact.to(torch.float16))


# --- what the host decides ---

HOST = """
#include <cstdio>
#include <cstdlib>
#include "cuda/packed/batch_sm90.h"
int main(int count, char** given) {
  using namespace lowbit;
  long v[9] = {};
  for (int i = 1; i < count; ++i) v[i - 1] = std::atol(given[i]);
  cuda::packed_batch_sm90::Call call = {};
  call.weight.N = v[0], call.weight.K = v[1], call.weight.group_size = v[2], call.weight.bits = 4;
  call.weight.G = (v[1] + v[2] - 1) / v[2], call.weight.row_bytes = (v[1] + 255) / 256 * 128;
  call.M = v[3], call.dtype = v[4] ? DType::f32 : DType::f16, call.batch_invariant = v[5];
  call.x = reinterpret_cast<const void*>(v[6]);
  const cuda::Device device = {static_cast<int>(v[7]), 132, 232448};
  const char* why = cuda::packed_batch_sm90::declines(call, device);
  std::printf("%s|%d|%ld", why ? why : "", cuda::packed_batch_sm90::splits_of(call, device),
              static_cast<long>(cuda::packed_batch_sm90::workspace_bytes(call, device)));
}
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """declines(), splits_of() and workspace_bytes() of a call on a GPU of 132 processors."""
    if (reason := cuda_emulated.why_not()) is not None:
        pytest.skip(f"not built: {reason}")
    folder: Path = tmp_path_factory.mktemp("host")
    (folder / "host.cpp").write_text(HOST)
    command = ["g++", "-std=c++17", "-DLOWBIT_EMULATED", f"-I{CSRC}", str(folder / "host.cpp")]
    subprocess.run([*command, "-o", str(folder / "host")], check=True)

    def ask(n=8192, k=8192, group_size=128, m=64, float32=0, batch_invariant=0, x=4096, architecture=90):
        given = map(str, (n, k, group_size, m, float32, batch_invariant, x, architecture))
        done = subprocess.run([str(folder / "host"), *given], capture_output=True, text=True, check=True)
        why, splits, workspace = done.stdout.split("|")
        return why, int(splits), int(workspace)

    return ask


def test_calls_that_are_declined(host):
    assert host()[0] == ""
    assert host(group_size=8192)[0] == host(group_size=9999, k=8192)[0] == ""
    for wrong, reason in (
        (dict(architecture=80), "for sm_90"),
        (dict(architecture=100), "for sm_90"),
        (dict(float32=1), "float16 or bfloat16"),
        (dict(k=8190), "multiples of 16 bytes"),
        (dict(x=4098), "multiples of 16 bytes"),
        (dict(group_size=40), "multiple of 32 columns"),
        (dict(k=8 << 20), "1 to 2^20 columns"),
        (dict(m=1 << 30), "fewer than 2^30 rows"),
    ):
        assert reason in host(**wrong)[0], wrong


def test_k_is_split_where_blocks_are_few(host):
    assert host()[1:] == (2, 2 * 64 * 8192 * 4)  # 64 blocks of rows
    assert host(n=1024)[1] == 8  # four tiles of 32 for each split
    assert host(n=1024, m=128)[1] == 8 and host(n=1024, m=256)[1] == 8
    assert host(n=128, k=1 << 17)[1] == 16
    assert host(m=4096)[1:] == host(n=28672)[1:] == (1, 0)
    assert host(n=128, k=264)[1] == 1
    assert host(batch_invariant=1)[1:] == (1, 0)


def test_serialized_products_are_no_record(monkeypatch):
    text = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, "", text))
    with pytest.raises(RuntimeError, match="C7510"):
        cuda_compiled.run_nvcc((PACKED_BATCH_SM90, "sm_90a", 4), Path("none"))
