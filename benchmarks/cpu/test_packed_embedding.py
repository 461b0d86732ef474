"""A gather of 4096 random rows out of a table that is not in a cache: our packed embedding and ``F.embedding``."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import layers, machine
from benchmarks.harness.candidate import BF16, F32, affine
from lowbit.packed.format import PackedWeight
from lowbit.packed.module import PackedEmbedding

GROUP = 64
CANDIDATES = ["torch fp32", "torch bf16", *(f"lowbit {bits}-bit g{GROUP}" for bits in (2, 4, 8))]
ALL_CANDIDATES = [*CANDIDATES[:2], *(f"lowbit {bits}-bit g{GROUP}" for bits in range(2, 9))]
MS = [4096]  # rows gathered by one call
SHAPES = [(30522, 384)]  # rows, columns: the word table of all-MiniLM-L6-v2
ALL_SHAPES = [*SHAPES, (50257, 768), (32000, 2048)]


@functools.lru_cache(maxsize=1)
def prepared(candidate: str, shape: tuple[int, int]) -> tuple[list[Callable[[Tensor], Tensor]], Tensor, int]:
    """(calls with copies of the table, its exact float32 content, bytes of one row)."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    if candidate.startswith("torch"):
        table = weight.to(BF16 if candidate == "torch bf16" else F32)
        dense, nbytes = table.float(), table.nbytes

        def make() -> Any:
            return functools.partial(F.embedding, weight=table.clone())
    else:
        bits = int(candidate.split()[1].split("-")[0])
        codes, scales, zeros = affine(weight, bits, GROUP)
        expanded = [t.float().repeat_interleave(GROUP, dim=1) for t in (zeros, scales)]
        dense = (codes.float() - expanded[0]) * expanded[1]
        layer = PackedEmbedding.from_weight(PackedWeight(codes, scales, zeros, bits, GROUP))
        nbytes = layers.layer_nbytes(layer)

        def make() -> Any:
            return layers.another(layer)

    copies = max(1, math.ceil(machine.cold_bytes() / nbytes))
    return [make() for _ in range(copies)], dense, nbytes // shape[0]


def test_packed_embedding(
    measure: Callable[..., None], candidate: str, shape: tuple[int, int], threads: int, m: int
) -> None:
    tables, dense, row_bytes = prepared(candidate, shape)
    ids = torch.randint(shape[0], (m,), generator=torch.Generator().manual_seed(m))
    assert torch.equal(tables[-1](ids).float(), dense[ids]), f"{candidate} gathers wrong values"

    turn = itertools.cycle(tables)
    measure(
        lambda: next(turn)(ids), op="packed_embedding", name=candidate, shape=f"{shape[0]}x{shape[1]}", m=m,
        nbytes=m * row_bytes, bits_stored=round(8 * row_bytes / shape[1], 2), who=candidate.split()[0],
    )  # fmt: skip
