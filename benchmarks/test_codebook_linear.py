"""Our codebook kernels beside our packed ones, torch, and bitsandbytes NF4, itself a codebook."""

from __future__ import annotations

from collections.abc import Callable

from candidates import CODEBOOK as CANDIDATES
from candidates import Candidate
from linear import ALL_SHAPES, MS, SHAPES, check_and_measure

__all__ = ["ALL_SHAPES", "CANDIDATES", "MS", "SHAPES"]


def test_codebook_linear(
    measure: Callable[..., None], candidate: Candidate, shape: tuple[int, int], threads: int, m: int
) -> None:
    check_and_measure(measure, "codebook_linear", candidate, shape, m)
