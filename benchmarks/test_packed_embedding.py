"""A gather of 4096 random rows out of a table: our packed embedding and ``F.embedding``."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import machine
import torch
import torch.nn.functional as F
from candidates import GROUP_SIZE, affine
from torch import Tensor

from lowbit.bitpack import pack

CANDIDATES = ["torch fp32", "torch bf16", *(f"lowbit {bits}-bit g{GROUP_SIZE}" for bits in (2, 3, 4, 8))]
MS = [4096]  # rows gathered by one call
SHAPES = [(30522, 384)]  # rows, columns: the word table of all-MiniLM-L6-v2
ALL_SHAPES = [*SHAPES, (50257, 768), (32000, 2048)]


@functools.lru_cache(maxsize=1)
def prepared(candidate: str, shape: tuple[int, int]) -> tuple[Callable[..., Tensor], list[Any], Tensor, int]:
    """(call, copies of the table, its exact float32 content, bytes of one gathered row)."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    columns = shape[1]
    if candidate.startswith("torch"):
        table = weight.bfloat16() if candidate == "torch bf16" else weight
        tensors, dense = (table,), table.float()

        def call(ids: Tensor, t: tuple[Tensor, ...]) -> Tensor:
            return F.embedding(ids, t[0])
    else:
        bits = int(candidate.split()[1].split("-")[0])
        codes, scales, zeros = affine(weight, bits, GROUP_SIZE)
        tensors = (pack(codes, bits), scales, zeros)
        expanded = [t.float().repeat_interleave(GROUP_SIZE, dim=1) for t in (zeros, scales)]
        dense = (codes.float() - expanded[0]) * expanded[1]

        def call(ids: Tensor, t: tuple[Tensor, ...]) -> Tensor:
            return torch.ops.lowbit.packed_embedding(
                ids, t[0], t[1], t[2], None, None, None, bits, GROUP_SIZE, columns, torch.float32
            )

    row_bytes = sum(t[0].nbytes for t in tensors)
    copies = max(1, min(64, math.ceil(machine.cold_bytes() / (row_bytes * shape[0]))))
    return call, [tensors, *(tuple(t.clone() for t in tensors) for _ in range(copies - 1))], dense, row_bytes


def test_packed_embedding(
    measure: Callable[..., None], candidate: str, shape: tuple[int, int], threads: int, m: int
) -> None:
    call, tables, dense, row_bytes = prepared(candidate, shape)
    ids = torch.randint(shape[0], (m,), generator=torch.Generator().manual_seed(m))
    assert torch.equal(call(ids, tables[-1]).float(), dense[ids]), f"{candidate} gathers wrong values"

    turn = itertools.cycle(tables)
    measure(
        lambda: call(ids, next(turn)), op="packed_embedding", name=candidate,
        shape=f"{shape[0]}x{shape[1]}", m=m, nbytes=m * row_bytes, bits=round(8 * row_bytes / shape[1], 2),
    )  # fmt: skip
