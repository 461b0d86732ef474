"""The CUDA C++ kernels as nvcc's PTX, executed on the CPU by :mod:`lowbit.testing.ptx_emulator`."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.triton.tiles import tile
from lowbit.testing.cuda_emulated import aligned
from lowbit.testing.cuda_names import DTYPES, symbol
from lowbit.testing.packed_cases import Weight
from lowbit.testing.ptx_emulator import Statistics, execute

THREADS, ROWS = 256, 32  # of a block of csrc/cuda/packed/decode.cuh


def number_of(t: Tensor | None) -> int:
    """The DType of C++."""
    return 0 if t is None else DTYPES.index(dtype_name(t))


def dtype_name(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def cuts_chunks(weight: Weight) -> bool:
    """Whether groups end inside a chunk of 32 columns: the instances whose last parameter is true."""
    f = weight.format
    return f.group_size < f.in_features and f.group_size % 32 != 0


def packed_decode_bytes(m: int) -> int:
    """As ``shared_bytes`` of packed/decode.cuh."""
    tiles = 1 if m <= 8 else 2
    return max((3 if tiles == 1 else 2) * m * (2 * 1024 + 64), 4 * 32 * 8 * tiles * 4)


def packed_decode(
    ptx: str, weight: Weight, x: Tensor, bias: Tensor | None = None, splits: int = 1
) -> tuple[Tensor, Statistics]:
    """``y = x @ W.T + bias`` by the instance of a PTX text that takes it, with the arguments that decode.cu gives it.

    Where splits > 1, a second kernel adds them.
    """
    f, (m, k) = weight.format, x.shape
    n = f.out_features
    values, columns, rows = weight.outliers
    groups = weight.scales.shape[1]
    row = 0 if weight.scales.shape[0] == 1 and n > 1 else groups
    chunks = f.group_size // 32
    cut = cuts_chunks(weight)
    factor = 0 if cut or f.group_size >= k else -(-(1 << 31) // chunks)
    y = torch.full((m, n), torch.nan, dtype=x.dtype)
    pointers = (aligned(tile(weight.packed, f.bits, k)), weight.scales, weight.zeros, bias, values, columns, rows)
    parts = torch.full((splits, m, n), torch.nan)
    arguments = (
        *(0 if t is None else t for t in pointers), aligned(x), y, m, n, k, f.group_size, factor, row, 1, row, 1,
        *(number_of(t) for t in (weight.scales, weight.zeros, bias, values)),
        columns is not None and columns.dtype == torch.int32, k % 8 == 0, parts if splits > 1 else 0, splits,
    )  # fmt: skip
    name = symbol(ptx, "packed_decode::kernel", f.bits, dtype_name(x), 1 if m <= 8 else 2, cut)
    blocks = splits * -(-n // ROWS)
    statistics = execute(ptx, name, (blocks,), THREADS, arguments, packed_decode_bytes(m))
    if splits > 1:
        given = (parts, 0 if bias is None else bias, y, m, n, splits, number_of(bias))
        adding = symbol(ptx, "packed_decode::add_splits", dtype_name(x))
        execute(ptx, adding, (-(-m * n // THREADS),), THREADS, given)
    return y, statistics


def divisor(number: int) -> tuple[int, int]:
    """As ``divisor_of`` of csrc/cuda/division.h."""
    shift = (number - 1).bit_length()
    return -(-(1 << 31 + shift) // number), shift


def packed_gather(ptx: str, weight: Weight, ids: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Statistics]:
    """``W[ids]``, or W where ids is None, by the instance of a PTX text, with the arguments that gather.cu gives it."""
    f, (values, columns, rows) = weight.format, weight.outliers
    n, k, groups = f.out_features, f.in_features, weight.scales.shape[1]
    row = 0 if weight.scales.shape[0] == 1 and n > 1 else groups
    count, tiles = n if ids is None else len(ids), -(-k // 256)
    out = aligned(torch.full((count, k), torch.nan, dtype=dtype))
    pointers = (weight.scales, weight.zeros, values, columns, rows, ids)
    arguments = (
        aligned(tile(weight.packed, f.bits, k)), *(0 if t is None else t for t in pointers), out, count, n, k,
        f.group_size, *divisor(f.group_size), *divisor(tiles), row, 1, row, 1,
        *(number_of(t) for t in (weight.scales, weight.zeros, values)),
        columns is not None and columns.dtype == torch.int32, ids is not None and ids.dtype == torch.int64,
        k * dtype.itemsize % 16 == 0,
    )  # fmt: skip
    name = symbol(ptx, "packed_gather::kernel", f.bits, dtype_name(out))
    units = 32 if dtype == torch.float32 else 64
    return out, execute(ptx, name, (-(-count * tiles // units),), THREADS, arguments)
