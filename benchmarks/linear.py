"""Timing ``y = x @ W.T`` with weights that come from memory, checked in float64 first.

Several copies of each weight, three times the last-level cache in all, are used in turn.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import machine
import torch
from candidates import Candidate, Prepared

MS = [1, 16, 256]
SHAPES = [(768, 768), (4096, 4096)]  # N, K
ALL_SHAPES = [*SHAPES, (3072, 768), (768, 3072), (11008, 4096), (4096, 11008), (50304, 2048)]
ROWS_CHECKED = 8


@functools.lru_cache(maxsize=1)
def source(shape: tuple[int, int]) -> torch.Tensor:
    """A float weight with rows of norm about 1."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) / math.sqrt(shape[1])


@functools.lru_cache(maxsize=1)
def prepared(candidate: Candidate, shape: tuple[int, int]) -> tuple[Prepared, list[Any]]:
    """The candidate's weight and its copies, each called once: some kernels rearrange on the first call."""
    one = candidate.prepare(source(shape))
    copies = max(1, min(400, math.ceil(machine.cold_bytes() / one.nbytes)))
    weights = [one.weight, *(one.copy() for _ in range(copies - 1))]
    x = torch.ones(1, shape[1], dtype=one.x_dtype)
    for w in weights:
        one.call(x, w)
    return one, weights


def relative_error(one: Prepared, x: torch.Tensor, y: torch.Tensor) -> float:
    """Relative Frobenius error of the first rows against float64 on the weight the candidate stands for."""
    expected = one.round_x(x[:ROWS_CHECKED]).double() @ one.dense.T
    return float((y[:ROWS_CHECKED].double() - expected).norm() / expected.norm())


def check_and_measure(
    measure: Callable[..., None], op: str, candidate: Candidate, shape: tuple[int, int], m: int
) -> None:
    """One row of results; a candidate that is wrong is not timed."""
    one, weights = prepared(candidate, shape)
    n, k = shape
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(one.x_dtype)
    error = relative_error(one, x, one.call(x, weights[-1]))
    assert error <= one.tolerance, f"{candidate} is wrong at N={n}, K={k}, M={m}: relative error {error:.1e}"

    turn = itertools.cycle(weights)
    measure(
        lambda: one.call(x, next(turn)), op=op, name=candidate.name, shape=f"{n}x{k}", m=m,
        nbytes=one.nbytes, bits=round(8 * one.nbytes / (n * k), 2), error=float(f"{error:.1e}"),
    )  # fmt: skip
