"""Kronecker factors: our kernels, the dense layer they stand for, and torch formulations with two matmuls."""

from __future__ import annotations

from collections.abc import Callable

import ours
import peers_torch
from candidates import BF16, F32, Candidate
from linear import ALL_MS, MS, check_and_measure

__all__ = ["ALL_MS", "MS"]

SHAPES = [(4096, 4096)]  # N, K
ALL_SHAPES = [*SHAPES, (768, 3072)]


def _candidates(ways: tuple[str, ...]) -> list[Candidate]:
    """Ours, and torch's ``ways`` to write the product."""
    return [
        one
        for dtype in (F32, BF16)
        for shape in ours.KRON_SHAPES
        for one in (ours.kron(shape, dtype), *(peers_torch.kron(how, shape, dtype) for how in ways))
    ]


CANDIDATES = [*peers_torch.DENSE, *_candidates(("B first", "A first"))]
ALL_CANDIDATES = [*peers_torch.DENSE, *_candidates(tuple(peers_torch.KRON_CALLS))]


def test_kron_linear(
    measure: Callable[..., None], candidate: Candidate, shape: tuple[int, int], threads: int, m: int
) -> None:
    check_and_measure(measure, "kron_linear", candidate, shape, threads, m)
