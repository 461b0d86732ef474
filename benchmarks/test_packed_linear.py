"""Our packed kernels, torch, and bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable

from candidates import PACKED as CANDIDATES
from candidates import Candidate
from linear import ALL_SHAPES, MS, SHAPES, check_and_measure

__all__ = ["ALL_SHAPES", "CANDIDATES", "MS", "SHAPES"]


def test_packed_linear(
    measure: Callable[..., None], candidate: Candidate, shape: tuple[int, int], threads: int, m: int
) -> None:
    check_and_measure(measure, "packed_linear", candidate, shape, m)
