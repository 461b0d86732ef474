"""Our codebook kernels beside our packed ones, torch, and bitsandbytes NF4, itself a codebook."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from benchmarks.cpu import ours
from benchmarks.cpu.linear import ALL_MS, ALL_SHAPES, MS, check_and_measure
from benchmarks.harness.candidate import Candidate
from benchmarks.peers.bitsandbytes import NF4
from benchmarks.peers.torch import DENSE

__all__ = ["ALL_MS", "ALL_SHAPES", "MS"]

SHAPES = [(4096, 4096)]  # N, K

GROUP = 64


def _ours(bits: Iterable[int], activations: tuple[str, ...]) -> list[Candidate]:
    """One table and scales per group, or a table per row; packed layers of the same bits and groups."""
    return [
        make(b, group, kind)
        for b in bits
        for group in (GROUP, "row")
        for make in (ours.codebook, ours.packed)
        for kind in activations
        if make is ours.codebook or b > 1  # packed layers have two bits and more
    ]


CANDIDATES = [*DENSE, NF4, *_ours((4,), ours.ACTIVATIONS), *(ours.codebook(b, "row", "bf16") for b in (2, 3, 8))]
ALL_CANDIDATES = [*DENSE, NF4, *_ours(range(1, 9), ours.ACTIVATIONS)]


def test_codebook_linear(
    measure: Callable[..., None], candidate: Candidate, shape: tuple[int, int], threads: int, m: int
) -> None:
    check_and_measure(measure, "codebook_linear", candidate, shape, threads, m)
