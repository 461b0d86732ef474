"""What the Triton kernels of all families do with x and with parts of y, and what their launches need to know of x."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends.triton.experts import Rows, expert_of_row
from lowbit.backends.triton.launch import Launch
from lowbit.backends.triton.tiles import CHUNKS, LANES, TILE, tiles_per_row

# An int32 holds the sum of this many products of two int8, and as many of an int8 with a zero point.
INT8_COLUMNS = 1 << 16
# Of a weight that is dequantized for the library's matrix product, at a time.
DENSE_BYTES = 1 << 28


@triton.jit(do_not_specialize=["x_stride"])
def quantize_rows_kernel(
    x_ptr, x_scale_ptr, q_ptr, inverse_ptr, sums_ptr, x_stride, k_size, columns, BLOCK: tl.constexpr
):
    """``lowbit.reference.quantize_activations`` of one row, and the int32 sum of q; columns past K are zeros."""
    m = tl.program_id(0).to(tl.int64)
    row = x_ptr + m * x_stride
    offset = tl.arange(0, BLOCK)
    peaks = tl.zeros((BLOCK,), tl.float32)
    bad = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, k_size, BLOCK):
        k = start + offset
        x = tl.load(row + k, mask=k < k_size, other=0.0).to(tl.float32)
        size = tl.abs(x)
        finite = size < float("inf")
        if x_scale_ptr is not None:
            bad |= (x != x).to(tl.int32)
        else:
            bad |= 1 - finite.to(tl.int32)
        peaks = tl.maximum(peaks, tl.where(finite, size, 0.0))
    spoiled = tl.max(bad, 0) > 0
    if x_scale_ptr is not None:
        inverse = tl.div_rn(1.0, tl.load(x_scale_ptr).to(tl.float32))
        nothing = spoiled
    else:
        peak = tl.max(peaks, 0)
        nothing = spoiled | (peak < 7.888609052210118e-31)  # 2**-100
        inverse = tl.div_rn(1.0, tl.where(nothing, 1.0, peak)) * 127.0
        inverse = tl.where(nothing, 1.0, inverse)
    tl.store(inverse_ptr + m, tl.where(spoiled, float("nan"), inverse))
    sums = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, columns, BLOCK):
        k = start + offset
        x = tl.load(row + k, mask=k < k_size, other=0.0).to(tl.float32)
        scaled = tl.minimum(tl.maximum(tl.where(nothing, 0.0, x * inverse), -127.0), 127.0)
        # adding 1.5 * 2**23 leaves no bit for a fraction: rounds halves to even
        q = (scaled + 12582912.0) - 12582912.0
        tl.store(q_ptr + m * columns + k, q.to(tl.int8), mask=k < columns)
        sums += q.to(tl.int32)
    tl.store(sums_ptr + m, tl.sum(sums, 0))


@triton.jit(do_not_specialize=["x_stride"])
def sum_rows_kernel(x_ptr, sums_ptr, x_stride, k_size, BLOCK: tl.constexpr):
    """The float32 sum of a row of x."""
    m = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, k_size, BLOCK):
        k = start + offset
        sums += tl.load(x_ptr + m * x_stride + k, mask=k < k_size, other=0.0).to(tl.float32)
    tl.store(sums_ptr + m, tl.sum(sums, 0))


@triton.jit(do_not_specialize=["m_size"])
def sum_parts_kernel(
    parts_ptr, bias_ptr, ids_ptr, y_ptr, m_size, n_size,
    EXPERTS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``y[m, n] = sum_p parts[p, m, n] + bias[n]``, p in order: float32 in, one rounding to y's dtype.

    With ``ids_ptr`` a row has the bias of its expert, or none.
    """
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < n_size
    sums = tl.zeros((BLOCK,), tl.float32)
    for p in tl.static_range(PARTS):
        sums += tl.load(parts_ptr + (p * m_size + m) * n_size + n, mask=inside, other=0.0)
    if bias_ptr is not None and ids_ptr is not None:
        expert, what = expert_of_row(ids_ptr, m, EXPERTS)
        sums += tl.load(bias_ptr + expert * n_size + n, mask=inside & (what == 1), other=0.0).to(tl.float32)
    elif bias_ptr is not None:
        sums += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + m * n_size + n, sums.to(y_ptr.dtype.element_ty), mask=inside)


def quantize_launch(x: Tensor, x_scale: Tensor | None) -> tuple[Launch, Tensor, Tensor, Tensor]:
    """(launch, q int8 ``[M, columns]``, inverse float32 ``[M]``, sums of q int32 ``[M]``) of rows ``x [M, K]``; columns
    fill whole tiles."""
    m, k = x.shape
    columns = tiles_per_row(k) * TILE
    q = torch.empty(m, columns, dtype=torch.int8, device=x.device)
    inverse = torch.empty(m, dtype=torch.float32, device=x.device)
    sums = torch.empty(m, dtype=torch.int32, device=x.device)
    arguments = dict(
        x_ptr=x, x_scale_ptr=x_scale, q_ptr=q, inverse_ptr=inverse, sums_ptr=sums, x_stride=x.stride(0), k_size=k,
        columns=columns,
    )  # fmt: skip
    return Launch(quantize_rows_kernel, (m,), arguments, {"BLOCK": 1024}, fuse=False), q, inverse, sums


def row_sums_launch(x: Tensor) -> tuple[Launch, Tensor]:
    """(launch, sums float32 ``[M]``) of rows ``x [M, K]``."""
    m, k = x.shape
    sums = torch.empty(m, dtype=torch.float32, device=x.device)
    arguments = dict(x_ptr=x, sums_ptr=sums, x_stride=x.stride(0), k_size=k)
    return Launch(sum_rows_kernel, (m,), arguments, {"BLOCK": 1024}), sums


def sum_launch(parts: Tensor, bias: Tensor | None, y: Tensor, rows: Rows | None = None) -> Launch:
    """``y [M, N] = parts.sum(0) + bias`` in order, for float32 parts ``[P, M, N]``; with ``rows``, of experts."""
    count, m, n = parts.shape
    ids, experts = (None, 0) if rows is None or bias is None else (rows.ids, rows.num_experts)
    arguments = dict(parts_ptr=parts, bias_ptr=bias, ids_ptr=ids, y_ptr=y, m_size=m, n_size=n)
    constants = dict(EXPERTS=experts, PARTS=count, BLOCK=256)
    return Launch(sum_parts_kernel, (-(-n // 256), m), arguments, constants)


def library_product(
    x: Tensor, weight_rows: Callable[[Tensor | None], Tensor], n: int, bias: Tensor | None
) -> Tensor:
    """``F.linear(x, W, bias)`` by the library's matrix product.

    ``weight_rows`` gives rows of W ``[n, K]`` in the dtype of x: those of the ids it is given, or all for ``None``. No
    more than DENSE_BYTES of W exist at a time. A bias of another dtype is rounded to that of x.
    """
    bias = None if bias is None else bias.to(x.dtype)
    step = max(1, DENSE_BYTES // (x.shape[-1] * x.element_size()))
    if step >= n:
        return F.linear(x, weight_rows(None), bias)
    y = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        ids = torch.arange(rows.start, rows.stop, device=x.device)
        y[..., rows] = F.linear(x, weight_rows(ids), None if bias is None else bias[rows])
    return y


def aligned_rows(x: Tensor) -> Tensor:
    """``x [M, K]`` itself where its rows are contiguous and begin at multiples of 16 bytes, else a copy."""
    if x.stride(1) != 1 or (x.device.type != "meta" and x.data_ptr() % 16):
        return x.clone(memory_format=torch.contiguous_format)
    return x


def row_stride(x: Tensor) -> tuple[int, int]:
    """(a, s) with ``a * s`` elements from row to row. ``a`` is 16 where that divides it, so that kernels know it."""
    stride = x.stride(0) if x.shape[0] > 1 else 0
    return (16, stride // 16) if stride % 16 == 0 else (1, stride)


def scale_period(group_size: int, k: int) -> int:
    """After how many chunks a kernel multiplies its sums by a scale. 0: at the end of a row; -1: groups cut chunks."""
    if group_size >= k:
        return 0
    return gcd(group_size // LANES, CHUNKS) if group_size % LANES == 0 else -1


def views(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Tiles as int16 and as int8."""
    return tiles.view(torch.int16), tiles.view(torch.int8)
