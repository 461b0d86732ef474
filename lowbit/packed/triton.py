"""Triton kernels of family ``packed``; what they compute is in :mod:`lowbit.packed.op`.

A kernel multiplies x with exact integers, ``x @ (code - center).T``, on tensor cores, with float32 sums (int32 for int8
activations). The scales, one per row or per group, multiply the sums. So no weight is ever rounded. Weights are the
left operand: their rows lie along the 64 or 128 rows of a tensor-core product, so that a single row of x needs no
kernel of its own. Where few rows would leave processors idle, K is split, and a second launch adds the parts in order.

Groups whose size is no multiple of 32 are slower: weights are multiplied by their scales in float32, and then split
into bfloat16 pieces, exactly. So are weights with minima, and those with scales of two levels, which are decoded where
they are loaded: packed_values_kernel. Packed zeros are made bytes by a launch of their own, before the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends.reference import dequantize_activations, quantize_activations
from lowbit.backends.triton import tuning
from lowbit.backends.triton.activations import (
    INT8_COLUMNS,
    aligned_rows,
    library_product,
    quantize_launch,
    row_stride,
    row_sums_launch,
    scale_period,
    sum_launch,
    views,
)  # fmt: skip
from lowbit.backends.triton.checks import check_bias, check_outliers, check_tensors, check_x_scale, column_numbers
from lowbit.backends.triton.codes import (
    centered,
    chunk_codes,
    dot,
    dot_float32,
    element_code,
    fields,
    load_plane,
    load_upper_planes,
    outlier_products,
    plane_width,
)  # fmt: skip
from lowbit.backends.triton.experts import Rows, arguments_of, choose, of_what, rows_of_tile, sorted_rows
from lowbit.backends.triton.launch import Launch, Target, run, target_of
from lowbit.backends.triton.tiles import TILES, tiles_of, tiles_per_row
from lowbit.core.family import dtype_name
from lowbit.packed.op import OPS
from lowbit.packed.operands import PackedActivation, PackedOperands

_FLOAT = PackedActivation()


@triton.jit
def _center(zero, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """The integer nearest to a zero point for which ``code - center`` is exact in DTYPE; int32."""
    if DTYPE == tl.int8 and BITS == 8:
        return tl.full(zero.shape, 128, tl.int32)
    else:
        largest = (1 << BITS) - 1
        return (tl.minimum(tl.maximum(zero, 0.0), largest) + 0.5).to(tl.int32)


@triton.jit
def _with_residual(products, x_sums, center, zero, RESIDUAL: tl.constexpr, ZEROS: tl.constexpr):
    """``sum x * (code - zero)`` from ``sum x * (code - center)`` and ``sum x``: float32, exact for integers."""
    if RESIDUAL and ZEROS == "int":  # of int8 activations; x_sums may be those of a longer row than products
        rest = (center - zero.to(tl.int32)).to(tl.int64)[:, None]
        return (products.to(tl.int64) + rest * x_sums.to(tl.int64)[None, :]).to(tl.float32)
    elif RESIDUAL:
        rest = (center.to(tl.float32) - zero)[:, None]
        return products.to(tl.float32) + rest * x_sums.to(tl.float32)[None, :]
    else:
        return products.to(tl.float32)


@triton.jit(do_not_specialize=["m_size", "x_stride", "outlier_x_stride", "repeats"])
def packed_linear_kernel(
    x_ptr, tiles16_ptr, tiles8_ptr, scales_ptr, zeros_ptr, bias_ptr, inverse_ptr, x_sums_ptr,
    outlier_values_ptr, outlier_columns_ptr, outlier_pointers_ptr, outlier_x_ptr, tile_rows_ptr, order_ptr, y_ptr,
    m_size, n_size, k_size, tiles, groups, x_stride, outlier_x_stride, repeats,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, FLUSH: tl.constexpr, PER_TENSOR: tl.constexpr, ZEROS: tl.constexpr,
    EVEN_K: tl.constexpr, X_ALIGN: tl.constexpr, SPLIT: tl.constexpr, PTX: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """y[m, n] for BLOCK_N rows of W and BLOCK_M of x; one split of K where SPLIT > 1 (y: float32 ``[SPLIT, M, N]``).

    With ``tile_rows_ptr`` W is a stack of experts, each of ``n_size`` rows, and ``repeats`` rows of y meet a row of x:
    :mod:`lowbit.backends.triton.experts`.


    FLUSH: after how many chunks the scales multiply the sums; 0: once, at the end; -1: each weight is scaled.
    ``x_sums_ptr``: sums of whole rows of x, where FLUSH is 0 and the zero point needs them.
    ZEROS: "none", "int" or "float". GROUP_SIZE is not read where FLUSH is 0.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(2)
    n_valid = n < n_size
    m_valid = m < m_size
    # Rows past the end repeat the last one and are not stored, so that no load in the loop needs a mask for them.
    n_row = tl.minimum(n, n_size - 1)
    m_row = tl.minimum(m, m_size - 1).to(tl.int64)
    row, column = m, n  # of y
    if tile_rows_ptr is not None:
        first_row, row, m_valid, what = rows_of_tile(tile_rows_ptr, order_ptr, tl.program_id(1), BLOCK_M)
        m, n, n_row = row // repeats, n + first_row, n_row + first_row
        m_row = m.to(tl.int64)
    lane = tl.arange(0, 32)
    first_tile = n_row.to(tl.int64) * tiles
    first_scale = n_row.to(tl.int64) * groups
    x_rows = x_ptr + m_row * (x_stride * X_ALIGN)

    INT8: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    DTYPE: tl.constexpr = tl.bfloat16 if x_ptr.dtype.element_ty == tl.float32 else x_ptr.dtype.element_ty
    SUMS: tl.constexpr = tl.int32 if INT8 else tl.float32
    # where center - zero is not 0: it multiplies the sum of x
    RESIDUAL: tl.constexpr = FLUSH >= 0 and (ZEROS == "float" or (ZEROS == "int" and INT8 and BITS == 8))
    FIELDS: tl.constexpr = fields(plane_width(BITS, 0))

    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    products = tl.zeros((BLOCK_N, BLOCK_M), SUMS)
    x_sums = tl.zeros((BLOCK_M,), SUMS)
    center = tl.full((BLOCK_N,), 1 << (BITS - 1), tl.int32)
    zero = tl.zeros((BLOCK_N,), tl.float32)
    if FLUSH == 0 and ZEROS != "none":
        zero = tl.load(zeros_ptr + (0 if PER_TENSOR else n_row)).to(tl.float32) + tl.zeros((BLOCK_N,), tl.float32)
        center = _center(zero, BITS, DTYPE)

    begin = (part * tiles) // SPLIT
    end = ((part + 1) * tiles) // SPLIT
    if tile_rows_ptr is not None:
        end = tl.where(what == 1, end, begin)
    for t in range(begin, end):
        second, third = load_upper_planes(tiles16_ptr, tiles8_ptr, first_tile + t, BITS)
        for CHUNK in tl.static_range(8):
            if CHUNK % FIELDS == 0:
                first = load_plane(tiles16_ptr, tiles8_ptr, first_tile + t, BITS, 0, CHUNK // FIELDS)
            k = t * 256 + CHUNK * 32 + lane
            if EVEN_K:
                x = tl.load(x_rows[None, :] + k[:, None])
            else:
                x = tl.load(x_rows[None, :] + k[:, None], mask=k[:, None] < k_size, other=0.0)
            if FLUSH < 0:
                group = tl.minimum(k, k_size - 1) // GROUP_SIZE
                at = first_scale[:, None] + group[None, :]
                weights = chunk_codes(first, second, third, 0, BITS, CHUNK, PTX).to(tl.float32)
                if ZEROS == "none":
                    weights -= 1 << (BITS - 1)
                else:
                    weights -= tl.load(zeros_ptr + at).to(tl.float32)
                weights *= tl.load(scales_ptr + at).to(tl.float32)
                sums = dot_float32(weights, x.to(tl.bfloat16) if INT8 else x, sums)
            else:
                if FLUSH > 0:
                    if CHUNK % FLUSH == 0:
                        products = tl.zeros((BLOCK_N, BLOCK_M), SUMS)
                        x_sums = tl.zeros((BLOCK_M,), SUMS)
                        at = first_scale + tl.minimum((t * 8 + CHUNK) * 32 // GROUP_SIZE, groups - 1)
                        if ZEROS != "none":
                            zero = tl.load(zeros_ptr + at).to(tl.float32)
                            center = _center(zero, BITS, DTYPE)
                weights = centered(first, second, third, center, BITS, CHUNK, DTYPE, PTX)
                products = dot(weights, x, products)
                # With FLUSH 0 a product may still run in the next iteration, so nothing else may read x: if x were also
                # loaded into registers, Triton would overwrite what the product still reads.
                if RESIDUAL and FLUSH > 0:
                    x_sums += tl.sum(x.to(SUMS), 0)
                if FLUSH > 0:
                    if CHUNK % FLUSH == FLUSH - 1:
                        scale = tl.load(scales_ptr + at).to(tl.float32)
                        sums += _with_residual(products, x_sums, center, zero, RESIDUAL, ZEROS) * scale[:, None]
    if FLUSH == 0:
        if RESIDUAL:
            x_sums = tl.load(x_sums_ptr + m_row, mask=m_valid & (part == 0), other=0)
        scale = tl.load(scales_ptr + (0 if PER_TENSOR else n_row)).to(tl.float32) + tl.zeros((BLOCK_N,), tl.float32)
        sums = _with_residual(products, x_sums, center, zero, RESIDUAL, ZEROS) * scale[:, None]
    if inverse_ptr is not None:
        sums = tl.div_rn(sums, tl.load(inverse_ptr + m_row)[None, :] + tl.zeros((BLOCK_N, BLOCK_M), tl.float32))
    if outlier_values_ptr is not None:
        sums += outlier_products(
            outlier_values_ptr, outlier_columns_ptr, outlier_pointers_ptr, outlier_x_ptr, outlier_x_stride,
            n, n_valid, m, m_valid, part, SPLIT, ENTRIES,
        )  # fmt: skip
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + n_row).to(tl.float32)[:, None]
    if tile_rows_ptr is not None:
        sums = of_what(sums, what)
    y_row = (part * m_size + row).to(tl.int64) * n_size
    tl.store(
        y_ptr + y_row[None, :] + column[:, None], sums.to(y_ptr.dtype.element_ty),
        mask=n_valid[:, None] & m_valid[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=["m_size", "x_stride", "outlier_x_stride", "repeats"])
def packed_values_kernel(
    x_ptr, tiles16_ptr, tiles8_ptr, scales_ptr, zeros_ptr, scale_factors_ptr, zero_factors_ptr, bias_ptr, inverse_ptr,
    outlier_values_ptr, outlier_columns_ptr, outlier_pointers_ptr, outlier_x_ptr, tile_rows_ptr, order_ptr, y_ptr,
    m_size, n_size, k_size, tiles, groups, factors, x_stride, outlier_x_stride, repeats,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, SCALE_BLOCK: tl.constexpr, PER_TENSOR: tl.constexpr,
    MINIMUM: tl.constexpr, EVEN_K: tl.constexpr, X_ALIGN: tl.constexpr, SPLIT: tl.constexpr, PTX: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """packed_linear_kernel for weights with minima or scales of two levels: each weight is made in float32."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(2)
    n_valid = n < n_size
    m_valid = m < m_size
    n_row = tl.minimum(n, n_size - 1)
    m_row = tl.minimum(m, m_size - 1).to(tl.int64)
    row, column = m, n  # of y
    if tile_rows_ptr is not None:
        first_row, row, m_valid, what = rows_of_tile(tile_rows_ptr, order_ptr, tl.program_id(1), BLOCK_M)
        m, n, n_row = row // repeats, n + first_row, n_row + first_row
        m_row = m.to(tl.int64)
    lane = tl.arange(0, 32)
    first_tile = n_row.to(tl.int64) * tiles
    x_rows = x_ptr + m_row * (x_stride * X_ALIGN)
    INT8: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    FIELDS: tl.constexpr = fields(plane_width(BITS, 0))

    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    begin = (part * tiles) // SPLIT
    end = ((part + 1) * tiles) // SPLIT
    if tile_rows_ptr is not None:
        end = tl.where(what == 1, end, begin)
    for t in range(begin, end):
        second, third = load_upper_planes(tiles16_ptr, tiles8_ptr, first_tile + t, BITS)
        for CHUNK in tl.static_range(8):
            if CHUNK % FIELDS == 0:
                first = load_plane(tiles16_ptr, tiles8_ptr, first_tile + t, BITS, 0, CHUNK // FIELDS)
            k = t * 256 + CHUNK * 32 + lane
            if EVEN_K:
                x = tl.load(x_rows[None, :] + k[:, None])
            else:
                x = tl.load(x_rows[None, :] + k[:, None], mask=k[:, None] < k_size, other=0.0)
            weights = _value(
                chunk_codes(first, second, third, 0, BITS, CHUNK, PTX), scales_ptr, zeros_ptr, scale_factors_ptr,
                zero_factors_ptr, n_row.to(tl.int64)[:, None], k[None, :], k_size, groups, factors,
                BITS, GROUP_SIZE, SCALE_BLOCK, PER_TENSOR, MINIMUM,
            )  # fmt: skip
            sums = dot_float32(weights, x.to(tl.bfloat16) if INT8 else x, sums)
    if inverse_ptr is not None:
        sums = tl.div_rn(sums, tl.load(inverse_ptr + m_row)[None, :] + tl.zeros((BLOCK_N, BLOCK_M), tl.float32))
    if outlier_values_ptr is not None:
        sums += outlier_products(
            outlier_values_ptr, outlier_columns_ptr, outlier_pointers_ptr, outlier_x_ptr, outlier_x_stride,
            n, n_valid, m, m_valid, part, SPLIT, ENTRIES,
        )  # fmt: skip
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + n_row).to(tl.float32)[:, None]
    if tile_rows_ptr is not None:
        sums = of_what(sums, what)
    y_row = (part * m_size + row).to(tl.int64) * n_size
    tl.store(
        y_ptr + y_row[None, :] + column[:, None], sums.to(y_ptr.dtype.element_ty),
        mask=n_valid[:, None] & m_valid[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def packed_rows_kernel(
    ids_ptr, tiles16_ptr, tiles8_ptr, scales_ptr, zeros_ptr, scale_factors_ptr, zero_factors_ptr, y_ptr,
    rows, n_size, k_size, tiles, groups, factors,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, SCALE_BLOCK: tl.constexpr, PER_TENSOR: tl.constexpr,
    MINIMUM: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y[i, :] = row ids[i] of W (row i without ids), one tile of BLOCK rows; NaN for an id outside [0, N)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    t = tl.program_id(1)
    i_row = tl.minimum(i, rows - 1)
    n = i_row
    if ids_ptr is not None:
        n = tl.load(ids_ptr + i_row).to(tl.int64)
    known = (n >= 0) & (n < n_size)
    n = tl.where(known, n, 0)
    tile = n * tiles + t
    second, third = load_upper_planes(tiles16_ptr, tiles8_ptr, tile, BITS)
    FIELDS: tl.constexpr = fields(plane_width(BITS, 0))
    for CHUNK in tl.static_range(8):
        if CHUNK % FIELDS == 0:
            first = load_plane(tiles16_ptr, tiles8_ptr, tile, BITS, 0, CHUNK // FIELDS)
        k = t * 256 + CHUNK * 32 + tl.arange(0, 32)
        code = chunk_codes(first, second, third, 0, BITS, CHUNK, PTX)
        w = _value(
            code, scales_ptr, zeros_ptr, scale_factors_ptr, zero_factors_ptr, n[:, None], k[None, :], k_size, groups,
            factors, BITS, GROUP_SIZE, SCALE_BLOCK, PER_TENSOR, MINIMUM,
        )  # fmt: skip
        w = tl.where(known[:, None], w, float("nan"))
        inside = (i < rows)[:, None] & (k < k_size)[None, :]
        tl.store(y_ptr + i[:, None] * k_size + k[None, :], w.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _value(
    code, scales_ptr, zeros_ptr, scale_factors_ptr, zero_factors_ptr, n, k, k_size, groups, factors,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, SCALE_BLOCK: tl.constexpr, PER_TENSOR: tl.constexpr,
    MINIMUM: tl.constexpr,
):  # fmt: skip
    """``(code - zero) * scale`` in float32, ``code * scale - minimum`` where MINIMUM; SCALE_BLOCK 0: of one level."""
    group = tl.minimum(k, k_size - 1) // GROUP_SIZE
    at = (n * 0 if PER_TENSOR else n * groups) + group
    scale = tl.load(scales_ptr + at).to(tl.float32)
    if SCALE_BLOCK > 0:
        scale *= tl.load(scale_factors_ptr + n * factors + group // SCALE_BLOCK).to(tl.float32)
    if MINIMUM:
        minimum = tl.load(zeros_ptr + at).to(tl.float32)
        if SCALE_BLOCK > 0:
            minimum *= tl.load(zero_factors_ptr + n * factors + group // SCALE_BLOCK).to(tl.float32)
        return code.to(tl.float32) * scale - minimum
    if zeros_ptr is None:
        centered = code.to(tl.float32) - (1 << (BITS - 1))
    else:
        centered = code.to(tl.float32) - tl.load(zeros_ptr + at).to(tl.float32)
    return centered * scale


@triton.jit
def packed_outlier_rows_kernel(
    ids_ptr, tiles16_ptr, tiles8_ptr, scales_ptr, zeros_ptr, scale_factors_ptr, zero_factors_ptr, outlier_values_ptr,
    outlier_columns_ptr, outlier_pointers_ptr, y_ptr, n_size, k_size, tiles, groups, factors,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, SCALE_BLOCK: tl.constexpr, PER_TENSOR: tl.constexpr,
    MINIMUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The elements of y of packed_rows_kernel that have an outlier: y[i, column] = W[n, column] + value."""
    i = tl.program_id(0).to(tl.int64)
    n = i
    if ids_ptr is not None:
        n = tl.load(ids_ptr + i).to(tl.int64)
    known = (n >= 0) & (n < n_size)
    n = tl.where(known, n, 0)
    begin = tl.load(outlier_pointers_ptr + n)
    end = tl.where(known, tl.load(outlier_pointers_ptr + n + 1), begin)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < end
        k = tl.load(outlier_columns_ptr + at, mask=inside, other=0).to(tl.int32)
        value = tl.load(outlier_values_ptr + at, mask=inside, other=0.0).to(tl.float32)
        code = element_code(tiles16_ptr, tiles8_ptr, n * tiles, k, BITS)
        w = value + _value(
            code, scales_ptr, zeros_ptr, scale_factors_ptr, zero_factors_ptr, n, k, k_size, groups, factors,
            BITS, GROUP_SIZE, SCALE_BLOCK, PER_TENSOR, MINIMUM,
        )  # fmt: skip
        tl.store(y_ptr + i * k_size + k, w.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def packed_zeros_kernel(zeros_ptr, to_ptr, n_size, groups, row_bytes, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros of BITS bits, ``[n_size, row_bytes]``, with a byte for each: ``[n_size, groups]``."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n_size.to(tl.int64) * groups
    n, g = at // groups, at % groups
    byte, shift = g * BITS // 8, (g * BITS % 8).to(tl.int32)
    first = zeros_ptr + n * row_bytes + byte
    field = tl.load(first, mask=inside, other=0).to(tl.int32)
    field |= tl.load(first + 1, mask=inside & (shift + BITS > 8), other=0).to(tl.int32) << 8
    tl.store(to_ptr + at, ((field >> shift) & ((1 << BITS) - 1)).to(tl.uint8), mask=inside)


# ------------------------------------------------------------------------------------------------------- on the host


def packed_zeros_launch(zeros: Tensor, groups: int, bits: int) -> tuple[Launch, Tensor]:
    """(launch, zeros uint8 ``[N, groups]``) of packed ones."""
    n = len(zeros)
    found = torch.empty(n, groups, dtype=torch.uint8, device=zeros.device)
    arguments = dict(zeros_ptr=zeros, to_ptr=found, n_size=n, groups=groups, row_bytes=zeros.shape[1])
    return Launch(packed_zeros_kernel, (-(-found.numel() // 1024),), arguments, dict(BITS=bits, BLOCK=1024)), found


def _prepared(
    device: torch.device, weight: PackedOperands, k: int, bias: Tensor | None = None, *, quiet: bool = False
) -> PackedOperands:
    """The weight as the kernels read it, checked: codes in tiles, scales and zeros row after row, zeros as bytes."""

    # they may stand group after group, as beside blocks
    zeros = None if weight.zeros is None else weight.zeros.contiguous()
    weight = replace(weight, scales=weight.scales.contiguous(), zeros=zeros)
    check_outliers(*weight.outliers, weight.out_features)
    check_tensors(
        device, packed=weight.packed, scales=weight.scales, zeros=zeros, bias=bias,
        outlier_values=weight.outlier_values, outlier_columns=weight.outlier_columns, outlier_rows=weight.outlier_rows,
        scale_factors=weight.scale_factors, zero_factors=weight.zero_factors,
    )  # fmt: skip
    if zeros is not None and weight.packed_zeros:
        launch, zeros = packed_zeros_launch(zeros, weight.scales.shape[1], weight.bits)
        run([launch])
        weight = replace(weight, zeros=zeros)
    tiles = tiles_of(weight.packed, weight.layout, weight.bits, k, quiet=quiet)
    return replace(weight, packed=tiles, layout=TILES.number, outlier_columns=column_numbers(weight.outlier_columns))


def _by_value(weight: PackedOperands, k: int) -> bool:
    """Whether kernels make each weight in float32 before it meets x."""
    return weight.minimum or weight.scale_block > 0 or scale_period(weight.group_size, k) < 0


def _levels_arguments(weight: PackedOperands) -> dict[str, Any]:
    first = weight.scale_factors
    one = first is not None and len(first) == 1 and weight.out_features > 1  # for all rows
    factors = 0 if first is None or one else first.shape[1]
    return dict(scale_factors_ptr=first, zero_factors_ptr=weight.zero_factors, factors=factors)


def _levels_constants(weight: PackedOperands) -> dict[str, Any]:
    return dict(SCALE_BLOCK=weight.scale_block, MINIMUM=weight.minimum)


def linear_launches(
    target: Target,
    config: tuning.Config,
    x: Tensor,
    weight: PackedOperands,
    bias: Tensor | None,
    activation: PackedActivation,
    y: Tensor,
    rows: Rows | None = None,
) -> list[Launch]:
    """The launches of ``y [M, N] = x [M, K] @ W.T + bias``; x is as :func:`aligned_rows` gives it, W in tiles.

    With ``rows`` they are those of a stack of experts: W is ``[E*N, K]``, and rows of y may share a row of x.
    """
    tiles, scales, zeros, outliers = weight.packed, weight.scales, weight.zeros, weight.outliers
    bits, group_size, int8, x_scale = weight.bits, weight.group_size, activation.int8, activation.x_scale
    (m, n), k = y.shape, x.shape[1]
    launches: list[Launch] = []
    operand, inverse, x_sums = x, None, None
    if int8:
        quantize, operand, inverse, x_sums = quantize_launch(x, x_scale)
        launches.append(quantize)
    period = -1 if _by_value(weight, k) else scale_period(group_size, k)
    if period != 0 or zeros is None:
        x_sums = None
    elif zeros.is_floating_point() and not int8:
        sum_rows, x_sums = row_sums_launch(x)
        launches.append(sum_rows)
    split = config.split
    if int8 and period == 0:  # one int32 sum over all of a split
        split = max(split, -(-k // INT8_COLUMNS))
    out = y if split == 1 else torch.empty(split, m, n, dtype=torch.float32, device=y.device)
    words, octets = views(tiles)
    align, stride = row_stride(operand)
    values, columns, pointers = outliers
    own: dict[str, Any] = dict(
        FLUSH=period, ZEROS="none" if zeros is None else "float" if zeros.is_floating_point() else "int"
    )
    more: dict[str, Any] = dict(x_sums_ptr=x_sums)
    if weight.minimum or weight.scale_block:
        own, more = _levels_constants(weight), _levels_arguments(weight)
    launches.append(
        Launch(
            packed_values_kernel if weight.minimum or weight.scale_block else packed_linear_kernel,
            (-(-n // config.block_n), -(-m // config.block_m) if rows is None else len(rows.tiles), split),
            dict(
                x_ptr=operand, tiles16_ptr=words, tiles8_ptr=octets, scales_ptr=scales, zeros_ptr=zeros,
                bias_ptr=bias if split == 1 else None, inverse_ptr=inverse, **more,
                outlier_values_ptr=values, outlier_columns_ptr=columns, outlier_pointers_ptr=pointers,
                outlier_x_ptr=None if values is None else x, y_ptr=out, m_size=m, n_size=n, k_size=k,
                tiles=tiles.shape[1], groups=scales.shape[1], x_stride=stride, outlier_x_stride=x.stride(0),
                **arguments_of(rows),
            ),
            dict(
                BITS=bits, GROUP_SIZE=group_size, PER_TENSOR=scales.shape[0] == 1 and len(tiles) > 1, **own,
                EVEN_K=int8 or k % 256 == 0, X_ALIGN=align, SPLIT=split, PTX=target.inline_ptx,
                BLOCK_N=config.block_n, BLOCK_M=config.block_m, ENTRIES=max(1, 32 // config.block_m),
            ),
            # A fused multiply-add would round the same sum of outliers differently in different lanes, and would not
            # round weights that are multiplied by their scales.
            config.warps, config.stages, fuse=values is None and period >= 0,
        )
    )  # fmt: skip
    if split > 1:
        launches.append(sum_launch(out, bias, y, rows))
    return launches


def rows_launches(target: Target, ids: Tensor | None, weight: PackedOperands, y: Tensor) -> list[Launch]:
    """The launches of ``y [rows, K] = W[ids]``, or of all of W where ids is None."""
    tiles, scales, zeros, outliers = weight.packed, weight.scales, weight.zeros, weight.outliers
    bits, group_size = weight.bits, weight.group_size
    (count, k), n = y.shape, tiles.shape[0]
    words, octets = views(tiles)
    shared = dict(
        ids_ptr=ids, tiles16_ptr=words, tiles8_ptr=octets, scales_ptr=scales, zeros_ptr=zeros, y_ptr=y, n_size=n,
        k_size=k, tiles=tiles.shape[1], groups=scales.shape[1], **_levels_arguments(weight),
    )  # fmt: skip
    constants = dict(
        BITS=bits, GROUP_SIZE=group_size, PER_TENSOR=scales.shape[0] == 1 and n > 1, **_levels_constants(weight)
    )
    block = 16
    launches = [
        Launch(
            packed_rows_kernel, (-(-count // block), tiles.shape[1]), {**shared, "rows": count},
            {**constants, "BLOCK": block, "PTX": target.inline_ptx}, fuse=False,
        )
    ]  # fmt: skip
    values, columns, pointers = outliers
    if values is not None:
        sparse = dict(outlier_values_ptr=values, outlier_columns_ptr=columns, outlier_pointers_ptr=pointers)
        launches.append(
            Launch(
                packed_outlier_rows_kernel, (count,), {**shared, **sparse}, {**constants, "BLOCK": 32}, 1, fuse=False
            )
        )
    return launches


def linear(x: Tensor, *arguments: Any) -> Tensor:
    """``lowbit::packed_linear`` on a GPU."""
    weight, bias, activation = OPS.linear_arguments(x, *arguments)
    n, k = weight.out_features, x.shape[-1]
    if 0 < activation.x_group < k:  # else one group is the row
        return _in_groups(linear, x, weight, bias, activation)
    weight = _prepared(x.device, weight, k, bias)
    check_bias(bias, n)
    check_x_scale(activation.x_scale, activation.int8)
    flat = aligned_rows(x.reshape(-1, k))
    m = flat.shape[0]
    target = target_of(x.device)
    name = "packed_linear_odd_groups" if _by_value(weight, k) else "packed_linear"
    config = tuning.choose(target, name, torch.int8 if activation.int8 else x.dtype, weight.bits, m, n, k)
    if config.dense:

        def weight_rows(ids: Tensor | None) -> Tensor:
            rows = torch.empty(n if ids is None else len(ids), k, dtype=x.dtype, device=x.device)
            run(rows_launches(target, ids, weight, rows))
            return rows

        return library_product(x, weight_rows, n, bias)
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    run(linear_launches(target, config, flat, weight, bias, activation, y))
    return y.view(*x.shape[:-1], n)


def experts(x: Tensor, ids: Tensor, *arguments: Any) -> Tensor:
    """``lowbit::packed_experts`` on a GPU. A negative id gives a row of NaN: checking would wait for the GPU.

    Verified on emulators, not yet on a GPU.
    """
    weight, num_experts, bias, activation = OPS.experts_arguments(x, ids, *arguments)
    (tokens, k), s, n = x.shape, len(ids), weight.out_features // num_experts
    if 0 < activation.x_group < k:

        def product(x: Tensor, *operands: Any) -> Tensor:
            *of_weight, bias, x_scale, int8, x_group = operands
            return experts(x, ids, *of_weight, num_experts, bias, x_scale, int8, x_group)

        return _in_groups(product, x, weight, bias, activation)
    weight = _prepared(x.device, weight, k, bias)
    ids = ids.contiguous()
    check_tensors(x.device, ids=ids)
    check_bias(bias, weight.out_features)
    check_x_scale(activation.x_scale, activation.int8)
    target = target_of(x.device)
    name = "packed_experts_odd_groups" if _by_value(weight, k) else "packed_experts"
    kind = torch.int8 if activation.int8 else x.dtype
    config = choose(target, name, kind, weight.bits, s, n, k, num_experts)
    y = torch.empty(s, n, dtype=x.dtype, device=x.device)
    sorting, rows = sorted_rows(ids, tokens, n, num_experts, config.block_m)
    run([*sorting, *linear_launches(target, config, aligned_rows(x), weight, bias, activation, y, rows)])
    return y


def _in_groups(
    product: Callable[..., Tensor], x: Tensor, weight: PackedOperands, bias: Tensor | None, activation: PackedActivation
) -> Tensor:
    """``product`` with int8 activations in groups: what they stand for, by the kernel for float32. Outliers meet x as
    it is, beside weights of 0."""
    flat, x_group = x.reshape(-1, x.shape[-1]), activation.x_group
    rounded = dequantize_activations(*quantize_activations(flat, None, x_group), x_group).view(x.shape)
    coded = replace(weight, outlier_values=None, outlier_columns=None, outlier_rows=None)
    y = product(rounded, *coded, bias, *_FLOAT)
    if weight.outlier_values is not None:
        none = torch.zeros_like(weight.zeros) if weight.minimum and weight.zeros is not None else weight.zeros
        outliers = replace(weight, scales=torch.zeros_like(weight.scales), zeros=none)
        y = y + product(x.float(), *outliers, None, *_FLOAT)
    return y.to(x.dtype)


def dequantize(*arguments: Any) -> Tensor:
    """``lowbit::packed_dequantize`` on a GPU."""
    weight, k, dtype = OPS.row_arguments(*arguments)
    weight = _prepared(weight.device, weight, k, quiet=True)
    y = torch.empty(weight.out_features, k, dtype=dtype, device=weight.device)
    run(rows_launches(target_of(y.device), None, weight, y))
    return y


def embedding(ids: Tensor, *arguments: Any) -> Tensor:
    """``lowbit::packed_embedding`` on a GPU. An id out of range gives a row of NaN: checking would wait for the GPU."""
    weight, k, dtype = OPS.embedding_arguments(ids, *arguments)
    weight = _prepared(ids.device, weight, k)
    y = torch.empty(ids.numel(), k, dtype=dtype, device=weight.device)
    run(rows_launches(target_of(y.device), ids.reshape(-1).contiguous(), weight, y))
    return y.view(*ids.shape, k)


def shipped(target: Target) -> Iterator[tuple[str, list[Launch]]]:
    """(name, launches) of every configuration that ships for ``target``, on meta tensors of 4096 x 4096 weights.

    Scales and zeros are per group, which takes more registers than per row; other kinds come at 4 bits only. Stacks
    are of 8 experts, 2 for each row of x. Their kernel is the linear's with other rows, so that fewer kinds will do.
    """
    n = k = 4096
    num_experts = 8

    def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def weight(
        bits: int, group_size: int, zeros: torch.dtype | None, outliers: bool = False, n: int = n
    ) -> PackedOperands:
        shape = (n, -(-k // group_size))
        return PackedOperands(
            packed=empty((n, tiles_per_row(k), 8 * bits), torch.int32), scales=empty(shape, torch.float16),
            zeros=None if zeros is None else empty(shape, zeros),
            outlier_values=empty((64,), torch.float16) if outliers else None,
            outlier_columns=empty((64,), torch.int16) if outliers else None,
            outlier_rows=empty((n + 1,), torch.int32) if outliers else None,
            bits=bits, group_size=group_size, layout=TILES.number,
        )  # fmt: skip

    def levels(bits: int, group_size: int, block: int, n: int = n) -> PackedOperands:
        codes, factors = empty((n, k // group_size), torch.uint8), empty((n, k // group_size // block), torch.float16)
        return replace(
            weight(bits, group_size, None, n=n), scales=codes, zeros=codes, scale_factors=factors,
            zero_factors=factors, minimum=True, scale_block=block,
        )  # fmt: skip

    def linears(
        name: str, bits: int, dtype: torch.dtype, group_size: int, zeros: torch.dtype | None, outliers: bool = False,
        kernel: str = "packed_linear",
    ) -> Iterator[tuple[str, list[Launch]]]:  # fmt: skip
        int8 = dtype == torch.int8
        for m in tuning.regimes(target, kernel, dtype, bits):
            config = tuning.choose(target, kernel, dtype, bits, m, n, k)
            if not config.dense:
                x = empty((m, k), torch.float16 if int8 else dtype)
                yield (
                    f"packed_linear {bits}-bit {name} {dtype_name(dtype)} M={m}",
                    linear_launches(
                        target, config, x, weight(bits, group_size, zeros, outliers), None,
                        PackedActivation(int8=int8), empty((m, n), x.dtype),
                    ),
                )  # fmt: skip

    def experts(
        name: str, bits: int, dtype: torch.dtype, group_size: int, zeros: torch.dtype | None, outliers: bool = False,
        kernel: str = "packed_experts", regimes: int = 9,
    ) -> Iterator[tuple[str, list[Launch]]]:  # fmt: skip
        int8 = dtype == torch.int8
        for m in tuning.regimes(target, kernel, dtype, bits)[:regimes]:
            s = 2 if m <= 16 else m * num_experts  # a row of x, or all experts
            config = choose(target, kernel, dtype, bits, s, n, k, num_experts)
            sorting, rows = sorted_rows(empty((s,), torch.int64), s // 2, n, num_experts, config.block_m)
            x = empty((s // 2, k), torch.float16 if int8 else dtype)
            bias = empty((num_experts * n,), x.dtype) if outliers else None
            operands = weight(bits, group_size, zeros, outliers, num_experts * n)
            activation, y = PackedActivation(int8=int8), empty((s, n), x.dtype)
            product = linear_launches(target, config, x, operands, bias, activation, y, rows)
            yield f"packed_experts {bits}-bit {name} {dtype_name(dtype)} M={m}", [*sorting, *product]

    for bits in range(2, 9):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.int8):
            yield from linears("group 128", bits, dtype, 128, torch.uint8)
        ids, y = empty((64,), torch.int64), empty((64, k), torch.float16)
        yield f"packed_embedding {bits}-bit", rows_launches(target, ids, weight(bits, 128, torch.uint8), y)
    for dtype in (torch.float16, torch.int8):
        yield from linears("per row", 4, dtype, k, None)
        yield from linears("group 128, float zeros", 4, dtype, 128, torch.float16)
        yield from linears("group 128, outliers", 4, dtype, 128, None, outliers=True)
        yield from linears("group 20", 4, dtype, 20, torch.uint8, kernel="packed_linear_odd_groups")
    operands = levels(4, 32, 8)
    for dtype in (torch.float16, torch.int8):
        config = tuning.choose(target, "packed_linear_odd_groups", dtype, 4, 1, n, k)
        x, name = empty((1, k), torch.float16), f"packed_linear 4-bit group 32, two levels {dtype_name(dtype)} M=1"
        activation = PackedActivation(int8=dtype == torch.int8)
        yield name, linear_launches(target, config, x, operands, None, activation, empty((1, n), x.dtype))
    yield "packed_embedding 4-bit, two levels", rows_launches(target, ids, operands, y)
    for bits in range(2, 8):
        yield f"packed_zeros {bits}-bit", [packed_zeros_launch(empty((n, 4 * bits), torch.uint8), 32, bits)[0]]
    for bits in range(2, 9):
        yield from experts("group 128", bits, torch.float16, 128, torch.uint8, regimes=9 if bits == 4 else 1)
    for dtype in (torch.bfloat16, torch.float32, torch.int8):
        yield from experts("group 128", 4, dtype, 128, torch.uint8)
    yield from experts("per row", 8, torch.int8, k, None)
    yield from experts("group 128, outliers, bias", 4, torch.bfloat16, 128, None, outliers=True, regimes=1)
    yield from experts("group 20", 4, torch.float16, 20, torch.uint8, kernel="packed_experts_odd_groups")
