"""The CUDA C++ kernels as nvcc's PTX, executed on the CPU by :mod:`lowbit.testing.ptx_emulator`."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from lowbit.backends.triton.tiles import tile
from lowbit.testing.cuda_emulated import aligned
from lowbit.testing.packed_cases import Weight
from lowbit.testing.ptx_emulator import Statistics, execute

THREADS, ROWS = 256, 32  # of a block of csrc/cuda/packed/decode.cuh
DTYPES = (None, torch.float32, torch.float16, torch.bfloat16, torch.uint8)  # lowbit::DType


def number_of(t: Tensor | None) -> int:
    return DTYPES.index(None if t is None else t.dtype)


def cuts_chunks(weight: Weight) -> bool:
    """Whether groups end inside a chunk of 32 columns: the instances whose last parameter is true."""
    f = weight.format
    return f.group_size < f.in_features and f.group_size % 32 != 0


def packed_decode(
    ptx: str, name: str, shared_bytes: int, weight: Weight, x: Tensor, bias: Tensor | None = None, splits: int = 1
) -> tuple[Tensor, Statistics]:
    """``y = x @ W.T + bias`` by the instance ``name`` of a PTX text, with the arguments that decode.cu gives it.

    Where splits > 1, a second kernel adds them.
    """
    f, (m, k) = weight.format, x.shape
    n = f.out_features
    values, columns, rows = weight.outliers
    groups = weight.scales.shape[1]
    row = 0 if weight.scales.shape[0] == 1 and n > 1 else groups
    chunks = f.group_size // 32
    factor = 0 if cuts_chunks(weight) or f.group_size >= k else -(-(1 << 31) // chunks)
    y = torch.full((m, n), torch.nan, dtype=x.dtype)
    pointers = (aligned(tile(weight.packed, f.bits, k)), weight.scales, weight.zeros, bias, values, columns, rows)
    arguments = (
        *(0 if t is None else t for t in pointers), aligned(x), y, m, n, k, f.group_size, factor, row, 1, row, 1,
        *(number_of(t) for t in (weight.scales, weight.zeros, bias, values)),
        columns is not None and columns.dtype == torch.int32, k % 8 == 0,
    )  # fmt: skip
    parts = torch.full((splits, m, n), torch.nan)
    where = parts if splits > 1 else 0
    statistics = execute(ptx, name, (splits * -(-n // ROWS),), THREADS, (*arguments, where, splits), shared_bytes)
    if splits > 1:
        found = re.search(rf"\.entry (\w*add_splitsILNS_5DTypeE{number_of(x)}E\w*)\(", ptx)
        assert found is not None
        given = (parts, 0 if bias is None else bias, y, m, n, splits, number_of(bias))
        execute(ptx, found[1], (-(-m * n // THREADS),), THREADS, given)
    return y, statistics
