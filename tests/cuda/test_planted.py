"""Bugs planted in the CUDA C++ kernels are found by what their tests compare: lowbit/testing/cuda_planted/."""

from __future__ import annotations

import pytest

from lowbit.testing import cuda_emulated, cuda_planted, verdicts
from lowbit.testing.cuda_planted import caught

needs_emulation = pytest.mark.skipif(
    cuda_emulated.why_not() is not None, reason=f"not built: {cuda_emulated.why_not()}"
)
BUGS, KERNELS = cuda_planted.bugs(), cuda_planted.kernels()
recorded = pytest.mark.recorded(
    *(f"lowbit.testing.cuda_planted.{kernel}" for kernel in KERNELS), sources=["csrc/common", "csrc/cuda"]
)
SAMPLE = 3  # of all bugs, in `make test`
CHECKS = [
    (kernel, bits)
    for kernel in KERNELS
    for bits in (cuda_emulated.WIDTHS if cuda_emulated.SANITIZED else sorted({b.bits for k, b in BUGS if k == kernel}))
]


def needs_a_build(kernel):
    if (reason := cuda_planted.why_not(kernel)) is not None:
        pytest.skip(f"not built: {reason}")


@recorded
@pytest.mark.parametrize("number", range(len(BUGS)), ids=lambda n: f"{BUGS[n][0]}: {BUGS[n][1].name}")
def test_a_planted_bug_is_found(number, request):
    needs_a_build(BUGS[number][0])
    verdicts.only_in_turn(request.config, number, max(1, len(BUGS) // SAMPLE))
    assert caught(*BUGS[number]) is not None


@(lambda test: test if cuda_emulated.SANITIZED else recorded(test))
@pytest.mark.parametrize(("kernel", "bits"), CHECKS)
def test_a_kernel_as_it_is_passes_what_finds_its_bugs(kernel, bits, request):
    """Under sanitizers (tests/sanitize.py): what is emulated, of the widths that were compiled, every other kernel."""
    needs_a_build(kernel)
    number = KERNELS.index(kernel)
    if not cuda_emulated.SANITIZED:  # of one width, as other tests of this commit
        verdicts.only_in_turn(request.config, bits + 8 * (number % 4), 32)
    elif hasattr(cuda_planted.suite(kernel), "built"):
        pytest.skip("it is not emulated")
    else:  # the width is the commit's number below 8 (tests/sanitize.py): at two of 16 it meets either half
        verdicts.only_in_turn(request.config, bits - 1 + 8 * (number % 2), 16)
    assert cuda_planted.suite(kernel).check(cuda_planted.built(kernel, bits), bits)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_document_has_every_bug(kernel):
    table = cuda_planted.sections().get(kernel, [])
    names = [bug.name for bug in cuda_planted.suite(kernel).BUGS]
    assert cuda_planted.described(table) == names, f"python -m lowbit.testing.cuda_planted --write {kernel}"
    assert len(names) >= 12 and not any("nothing" in line for line in table)


def test_every_bug_has_its_place():
    """Also those that `make test` does not plant: sources change, and a text may be elsewhere then."""
    csrc = cuda_emulated.ROOT / "csrc" / "cuda"
    for kernel, bug in BUGS:
        count = (csrc / bug.file).read_text(encoding="utf-8").count(bug.old)
        assert count == 1, f"{kernel}, {bug.name}: {bug.old!r} must be in {bug.file} once: got {count} times"


@needs_emulation
def test_a_bug_that_cannot_be_planted_is_an_error():
    with pytest.raises(ValueError, match="once: got 0 times"):
        cuda_emulated.planted("packed/decode.cuh", "no such text", "", 4)
