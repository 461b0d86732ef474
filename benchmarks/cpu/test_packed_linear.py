"""Our packed kernels and what else multiplies by a weight of few bits: torch, bitsandbytes, ONNX Runtime, OpenVINO."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.cpu import ours
from benchmarks.cpu.linear import ALL_MS, ALL_SHAPES, MS, SHAPES, check_and_measure
from benchmarks.harness.candidate import Candidate
from benchmarks.peers import onnxruntime, openvino
from benchmarks.peers.bitsandbytes import NF4
from benchmarks.peers.torch import DENSE, PREPACKED, QUANTIZED
from lowbit.backends.cpu import native

__all__ = ["ALL_MS", "ALL_SHAPES", "MS", "SHAPES"]

PEERS = [*DENSE, *PREPACKED, *QUANTIZED, NF4, *onnxruntime.CANDIDATES, *openvino.CANDIDATES]
IN_GROUPS = [ours.packed(bits, 128, "int8", x_group=128) for bits in (4, 8)]
IN_ANY_BATCH = [ours.packed_in_any_batch(bits, 128) for bits in (2, 4, 8)]
CANDIDATES = [
    *PEERS,
    *ours.every_packed((2, 4, 8), (128,), ours.ACTIVATIONS),
    *ours.every_packed((3,), (128,), ("int8",)),
    *ours.every_packed((4, 8), ("row",), ("int8",)),
    *IN_GROUPS,
    *IN_ANY_BATCH,
    *(ours.packed(4, 128, kind, isa="avx2") for kind in ("int8", "fp32")),
]
ALL_CANDIDATES = [
    *PEERS,
    *ours.every_packed(range(2, 9), (128, 64, "row"), ours.ACTIVATIONS),
    *IN_GROUPS,
    *IN_ANY_BATCH,
    ours.packed(4, 128, "int8", x_group=64),
    *(ours.packed(bits, 128, kind, isa="avx2") for bits in range(2, 9) for kind in ("int8", "fp32")),
]


def test_packed_linear(
    measure: Callable[..., None], candidate: Candidate, shape: tuple[int, int], threads: int, m: int
) -> None:
    if (isa := candidate.facts.get("isa")) and isa not in native.isas():
        pytest.skip(f"this machine does not have {isa}")
    if candidate in IN_ANY_BATCH and m > 1:
        pytest.skip("one row of x says what invariance costs")
    check_and_measure(measure, "packed_linear", candidate, shape, threads, m)
