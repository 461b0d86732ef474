"""What the CUDA C++ kernels must get right on a GPU before they are used there: a product of each kernel and width."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lowbit.backends import registry

N, K = 48, 320
ROWS = (3, 80)  # for the kernels of few rows of x, and of many


def why_wrong(device: torch.device, prepared: Callable[[str, tuple[Any, ...]], tuple[Any, ...]]) -> str | None:
    """What is wrong with the kernels on ``device``, by the reference on the CPU, or None. It waits for the GPU.

    Args:
        prepared: an op and its arguments → the arguments as kernels take them.
    """
    for what, op, args in _calls():
        moved = tuple(a.to(device) if isinstance(a, Tensor) else a for a in prepared(op, args))
        if getattr(torch.ops.lowbit_cuda, f"{op}_declines")(*moved):
            continue
        expected = registry.reference(op)(*args)
        found = getattr(torch.ops.lowbit_cuda, op)(*moved).cpu()
        error = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
        if not error <= 8 * torch.finfo(expected.dtype).eps:
            return f"its self-check failed: {op}, {what}, is off by {float(error):.1e} of the largest result"
    return None


def _calls() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """(what, op, arguments on the CPU, codes in canonical words)."""
    draw = torch.Generator().manual_seed(0)

    def words(bits: int) -> Tensor:
        return torch.randint(-(1 << 31), 1 << 31, (N, K // 32 * bits), generator=draw).to(torch.int32)

    def x(rows: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(rows, K, generator=draw).to(dtype)

    none = (None, None, None)
    scales = torch.rand(N, K // 64, generator=draw) + 0.5
    ids = torch.tensor([0, N - 1, 5])
    for bits in range(2, 9):
        weight: tuple[Any, ...] = (words(bits), *none, scales, *none, bits, 64, 0, False, 0)
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for rows in ROWS:
                what = f"{bits} bits, {rows} rows of {str(dtype).removeprefix('torch.')}"
                for int8 in (False, True):
                    activations = f"{what}{' as int8' if int8 else ''}"
                    yield activations, "packed_linear", (x(rows, dtype), *weight, None, None, int8, 0)
        dtype = (torch.float16, torch.bfloat16, torch.float32)[bits % 3]
        for rows in ROWS:  # 3 experts of 16 rows of W; the fourth is elsewhere
            what = f"{bits} bits, {rows} rows of {str(dtype).removeprefix('torch.')}"
            of_rows = torch.arange(2 * rows) % 4
            yield what, "packed_experts", (x(rows, dtype), of_rows, *weight, 3, None, None, False, 0)
        yield f"{bits} bits", "packed_embedding", (ids, *weight, K, torch.float16)
    for bits in range(1, 9):
        table = torch.randn(1, 1, 1 << bits, generator=draw).half()
        weight = (words(bits), *none, table, *none, None, bits, K, 0)
        for dtype in (torch.float16, torch.float32):
            for rows in ROWS:
                what = f"{bits} bits, {rows} rows of {str(dtype).removeprefix('torch.')}"
                for int8 in (False, True) if dtype == torch.float16 else (False,):
                    activations = f"{what}{' as int8' if int8 else ''}"
                    yield activations, "codebook_linear", (x(rows, dtype), *weight, None, None, int8)
        for rows in ROWS:
            dtype, of_rows = (torch.float16, torch.bfloat16)[bits % 2], torch.arange(2 * rows) % 4
            what = f"{bits} bits, {rows} rows of {str(dtype).removeprefix('torch.')}"
            yield what, "codebook_experts", (x(rows, dtype), of_rows, *weight, 3, None, None, False)
        yield f"{bits} bits", "codebook_embedding", (ids, *weight, K, torch.float16)
        tables = torch.randn(N, K // 64, 1 << bits, generator=draw)
        weight = (words(bits), *none, tables, *none, None, bits, 64, 0)
        for rows in ROWS:
            what = f"{bits} bits, a table for each group, {rows} rows of float16"
            yield what, "codebook_linear", (x(rows, torch.float16), *weight, None, None, False)
        yield f"{what} as int8", "codebook_linear", (x(rows, torch.float16), *weight, None, None, True)
    a, b = torch.randn(1, 6, 20, generator=draw), torch.randn(1, 8, 16, generator=draw)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        factors = (a.to(dtype), None, None, b.to(dtype), None, None, None, None, 1, 6, 20, 8, 16, 0, 0, 0, 0)
        yield f"3 rows of {str(dtype).removeprefix('torch.')}", "kron_linear", (x(3, dtype), *factors, None)
