"""The records of compiled CUDA C++ kernels, of every kernel in ``benchmarks/tools/cuda_kernels.py``."""

from __future__ import annotations

import pytest

from benchmarks.tools import cuda_compiled
from benchmarks.tools.cuda_kernels import CSRC, KERNELS, PACKED_DECODE
from lowbit.testing import cuda_sources, verdicts

needs_nvcc = pytest.mark.skipif(cuda_compiled.nvcc_version() is None, reason="no nvcc")
every_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
COMPILATIONS = cuda_compiled.compilations()


def test_every_source_of_a_kernel_has_an_entry():
    sources = {path.with_suffix(".cu") for path in (CSRC / "cuda").rglob("*.cuh")}
    known = {kernel.path for kernel in KERNELS.values()}
    assert {path for path in sources if path.exists()} <= known


@every_kernel
def test_the_record_is_that_of_the_sources(kernel):
    assert cuda_compiled.is_current(kernel), f"python -m benchmarks.tools.cuda_compiled --write {kernel.name}"


@every_kernel
def test_gates(kernel):
    assert list(cuda_compiled.problems(kernel, cuda_compiled.read_record(kernel))) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (dict(spills=8), "spills: must be 0 bytes: got 8"),
        (dict(blocks=0), "blocks of a processor: must be at least 1"),
        (dict(weight_loads=[4, 16]), "loads of weights: must be [16]: got [4, 16]"),
    ],
)
def test_planted_entry_is_flagged(change, complaint):
    record = cuda_compiled.read_record(PACKED_DECODE)
    record["entries"]["sm_90a"]["4-bit float16 M<=8"].update(change)
    (found,) = cuda_compiled.problems(PACKED_DECODE, record)
    assert complaint in found


def test_missing_and_unknown_instances_are_flagged():
    record = cuda_compiled.read_record(PACKED_DECODE)
    entries = record["entries"]["sm_80"]
    entries["9-bit"] = entries.pop("4-bit float16 M<=8")
    missing, unknown = cuda_compiled.problems(PACKED_DECODE, record)
    assert missing == "sm_80 4-bit float16 M<=8: missing"
    assert unknown == "sm_80 9-bit: not in cuda_kernels.py"


def test_a_fingerprint_is_of_what_is_compiled():
    """Comments, and device functions that nothing calls, are not part of it."""
    texts = cuda_compiled.texts(PACKED_DECODE)
    before = list(cuda_sources.used(texts))

    def after(old: str, new: str) -> list[str]:
        assert texts["cuda/primitives.h"].count(old) == 1
        changed = {**texts, "cuda/primitives.h": texts["cuda/primitives.h"].replace(old, new)}
        return list(cuda_sources.used(changed))

    barrier = "LOWBIT_DEVICE void barrier() { __syncthreads(); }"
    helper = "LOWBIT_DEVICE int helper() { return 1; }"
    assert barrier in before
    assert after(barrier, f"{barrier}\n\n{helper}") == before
    assert after(barrier, f"{barrier}\n\ntemplate <int N>\n{helper}") == before
    assert after("__syncthreads()", "__syncwarp()") != before
    called = after(barrier, f"LOWBIT_DEVICE void barrier() {{ helper(); }}\n\n{helper}")
    assert helper in called


@needs_nvcc
@pytest.mark.parametrize("number", range(len(COMPILATIONS)), ids=lambda n: "-".join(
    (COMPILATIONS[n][0].name, COMPILATIONS[n][1], f"{COMPILATIONS[n][2] or 'all'}bits")
))  # fmt: skip
def test_what_is_compiled_is_what_the_record_says(number, request):
    """`make test` compiles one of them, another at another commit."""
    verdicts.only_in_turn(request.config, number, len(COMPILATIONS))
    assert list(cuda_compiled.differences(COMPILATIONS[number])) == []
