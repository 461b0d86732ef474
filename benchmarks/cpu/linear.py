"""Timing ``y = x @ W.T`` with weights that come from memory, checked in float64 first.

Several copies of each weight, three times the last-level cache in all, are used in turn.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.harness import machine
from benchmarks.harness.candidate import Candidate, Prepared, Unavailable

MS = [1, 16, 256]
ALL_MS = [1, 4, 16, 64, 256, 512]
SHAPES = [(4096, 4096), (768, 768)]  # N, K
ALL_SHAPES = [*SHAPES, (3072, 768), (768, 3072), (11008, 4096), (4096, 11008), (50304, 2048)]
MAX_COPIES = 400


@functools.lru_cache(maxsize=1)
def prepared(candidate: Candidate, shape: tuple[int, int], **needs: int) -> tuple[Prepared, list[Any]]:
    """The candidate's weight, and as many copies as are needed for each to come from memory when its turn comes."""
    one = prepare(candidate, shape, **needs)
    copies = math.ceil(machine.cold_bytes() / (one.nbytes * one.products))
    return one, one.copies(max(1, min(MAX_COPIES, copies)))


def prepare(candidate: Candidate, shape: tuple[int, int], **needs: int) -> Prepared:
    """Skips the test where the candidate cannot run."""
    if not candidate.fits(*shape):
        pytest.skip(f"{candidate} has no form for N={shape[0]}, K={shape[1]}")
    torch.manual_seed(sum(shape))
    try:
        return candidate.prepare(*shape, "cpu", **needs)
    except Unavailable as reason:
        pytest.skip(str(reason))


def check(candidate: Candidate, one: Prepared, x: torch.Tensor, y: torch.Tensor) -> None:
    """Fail where ``y`` is not the candidate's own arithmetic on x: what is wrong is not timed."""
    off = one.error(x, y)
    assert off <= one.tolerance, f"{candidate} is wrong with x {list(x.shape)}: relative error {off:.1e}"


def check_and_measure(
    measure: Callable[..., None], op: str, candidate: Candidate, shape: tuple[int, int], threads: int, m: int
) -> None:
    """One row of results; its ``error`` is that of all the arithmetic, rounding x included, on its own weights."""
    conditions = {"threads": threads, "m": m}
    one, weights = prepared(candidate, shape, **{name: conditions[name] for name in candidate.needs})
    n, k = shape
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(one.x_dtype)
    with candidate.forced():
        calls = [one.bound(weight, x) for weight in weights]
        y = calls[0]()
        check(candidate, one, x, y)
        error = one.error(x, y, rounded=False)
        until = time.perf_counter() + 0.5
        for call in calls:  # some kernels rearrange at the first call
            if m == 1 or time.perf_counter() < until:
                call()

        turn = itertools.cycle(calls)
        measure(
            lambda: next(turn)(), op=op, name=candidate.name, shape=f"{n}x{k}", m=m, products=one.products,
            nbytes=one.nbytes, operations=m * (one.operations or 2 * n * k),
            bits_stored=round(8 * one.nbytes / (n * k), 2), error=float(f"{error:.1e}"),
            **candidate.facts,
        )  # fmt: skip
