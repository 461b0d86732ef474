"""Kronecker factors: our kernels, the dense layer they stand for, and torch formulations with two matmuls."""

from __future__ import annotations

from collections.abc import Callable

from candidates import KRON as CANDIDATES
from candidates import Candidate
from linear import MS, check_and_measure

__all__ = ["CANDIDATES", "MS"]

SHAPES = ALL_SHAPES = [(768, 3072), (4096, 4096)]  # N, K


def test_kron_linear(
    measure: Callable[..., None], candidate: Candidate, shape: tuple[int, int], threads: int, m: int
) -> None:
    check_and_measure(measure, "kron_linear", candidate, shape, m)
