"""Kronecker factors: our kernels, the dense layer they stand for, and torch formulations with two matmuls."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.cpu import ours
from benchmarks.cpu.linear import ALL_MS, MS, check_and_measure
from benchmarks.harness.candidate import BF16, F32, Candidate
from benchmarks.peers import torch as peer

__all__ = ["ALL_MS", "MS"]

SHAPES = [(4096, 4096)]  # N, K
ALL_SHAPES = [*SHAPES, (768, 3072)]


def _candidates(ways: tuple[str, ...]) -> list[Candidate]:
    """Ours, and torch's ``ways`` to write the product."""
    return [
        one
        for dtype in (F32, BF16)
        for shape in ours.KRON_SHAPES
        for one in (ours.kron(shape, dtype), *(peer.kron(how, shape, dtype) for how in ways))
    ]


CANDIDATES = [*peer.DENSE, *_candidates(("B first", "A first"))]
ALL_CANDIDATES = [*peer.DENSE, *_candidates(tuple(peer.KRON_CALLS))]


def test_kron_linear(
    measure: Callable[..., None], candidate: Candidate, shape: tuple[int, int], threads: int, m: int
) -> None:
    check_and_measure(measure, "kron_linear", candidate, shape, threads, m)
