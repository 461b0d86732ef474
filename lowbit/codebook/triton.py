"""Triton kernels of family ``codebook``; what they compute is in :mod:`lowbit.codebook.op`.

A kernel looks codes up and multiplies the entries with x on tensor cores, with float32 sums. What it multiplies depends
on x:

* float16 or bfloat16: the entries, rounded to the dtype of x as a dense layer's weights are (exact where the table has
  that dtype). Scales, one per row or per group, multiply the sums. Where groups cut chunks, it multiplies ``entry *
  scale`` in float32 instead, split into bfloat16 pieces, exactly.
* float32: likewise, with the entries as they are.
* int8 activations: 16-bit integers T with one step per row (``_fixed_point`` in :mod:`lowbit.codebook.op`). Each is two
  bytes, in two int8 products with int32 sums, which are added exactly. Where a row has one scale or none, T is a table.

As in :mod:`lowbit.packed.triton`, weights are the left operand, and K is split where few rows would leave processors
idle. No product is fused with a sum: weights, scales and T are those of the definition, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.backends.operands import Activation
from lowbit.backends.triton import tuning
from lowbit.backends.triton.activations import (
    INT8_COLUMNS,
    aligned_rows,
    library_product,
    quantize_launch,
    row_stride,
    scale_period,
    sum_launch,
    views,
)  # fmt: skip
from lowbit.backends.triton.checks import check_bias, check_outliers, check_tensors, check_x_scale, column_numbers
from lowbit.backends.triton.codes import (
    chunk_codes,
    dot_float32,
    element_code,
    fields,
    load_plane,
    load_upper_planes,
    outlier_products,
    plane_width,
)  # fmt: skip
from lowbit.backends.triton.experts import (
    Rows,
    arguments_of,
    choose,
    expert_of_row,
    first_tile,
    of_what,
    rows_of_tile,
    sorted_rows,
)  # fmt: skip
from lowbit.backends.triton.launch import Launch, Target, run, target_of
from lowbit.backends.triton.tiles import TILES, tiles_of, tiles_per_row
from lowbit.codebook.op import OPS
from lowbit.codebook.operands import CodebookOperands
from lowbit.core.family import dtype_name

Scales = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # scales, scale_codebook, _absmax, _offset


@triton.jit
def _scale(scales_ptr, scale_codebook_ptr, scale_absmax_ptr, scale_offset_ptr, at):
    """Scale number ``at`` (int64) of ``[N, G]``, float32: ``scale_values`` in :mod:`lowbit.codebook.op`."""
    if scale_codebook_ptr is None:
        return tl.load(scales_ptr + at).to(tl.float32)
    else:
        code = tl.load(scales_ptr + at).to(tl.int32)
        product = tl.load(scale_codebook_ptr + code) * tl.load(scale_absmax_ptr + at // 256)
        return product + tl.load(scale_offset_ptr)


@triton.jit
def _table(n, group, groups, BITS: tl.constexpr, TABLES: tl.constexpr):
    """Where the table of row n (int64) and a group begins. TABLES: one per "tensor", "row" or "group"."""
    if TABLES == "tensor":
        return n * 0
    elif TABLES == "row":
        return n << BITS
    else:
        return (n * groups + group) << BITS


@triton.jit
def _entries(codes, table, PTX: tl.constexpr):
    """The entries of ``codes [rows, 32]`` (int16) in the tables that ``table`` points to, one per row or per code."""
    if not PTX:
        return tl.load(table + codes)
    elif table.dtype.element_ty.primitive_bitwidth == 32:
        # a tl.load would go through shared memory, copied ahead in blocks that may be larger than that
        return tl.inline_asm_elementwise(
            """{ .reg .b32 i, j; .reg .b64 a, b;
            and.b32 i, $2, 0xffff; mad.wide.u32 a, i, 4, $3; ld.global.nc.f32 $0, [a];
            shr.u32 j, $2, 16; mad.wide.u32 b, j, 4, $4; ld.global.nc.f32 $1, [b]; }""",
            "=&f,=&f,r,l,l", [codes, table.to(tl.int64)], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        bits = tl.inline_asm_elementwise(
            """{ .reg .b16 v, w; .reg .b32 i, j; .reg .b64 a, b;
            and.b32 i, $1, 0xffff; mad.wide.u32 a, i, 2, $2; ld.global.nc.b16 v, [a];
            shr.u32 j, $1, 16; mad.wide.u32 b, j, 2, $3; ld.global.nc.b16 w, [b]; mov.b32 $0, {v, w}; }""",
            "=&r,r,l,l", [codes, table.to(tl.int64)], dtype=tl.int16, is_pure=True, pack=2,
        )  # fmt: skip
        return bits.to(table.dtype.element_ty, bitcast=True)


# Look-up in registers, for tables of at most 16 entries of 16 bits that serve whole rows. A table is held as words of
# four low bytes and words of four high bytes. By four codes of 3 bits, one to a nibble, PTX's prmt takes four of the
# eight bytes of two words; low and high bytes so found are put together by two more. The nibbles are those of two
# chunks and of two neighbouring lanes l and h, which share a register, a quad of chunks taking two rounds:
#
#     bits   first round    second round
#     1-3    l0 l2 h0 h2    l1 l3 h1 h3
#     4      l0 l1 h0 h1    l2 l3 h2 h3


@triton.constexpr_function
def _look_up_ptx(bits, quad):
    """PTX that puts the entries of a quad's chunks, two lanes each, into $0 to $3.

    $4, $5: the first plane and that of one bit (1 bit: the same; 4 bits: of this quad only). From $6, every second
    operand, as each stands for two lanes: the words of low bytes, then those of high bytes.
    """
    count = max(1, (1 << bits) // 4)
    low = [f"${6 + 2 * i}" for i in range(count)]
    high = [f"${6 + 2 * (count + i)}" for i in range(count)]
    # a, b: the nibbles of the two rounds. t, u: where names have two parts, bytes, each a lane's chunks of one quad
    if bits == 4:
        code = [
            "prmt.b32 s, $4, 0, 0x3120;",  # l01 h01 l23 h23
            "and.b32 a, s, 0x77777777;",
            "shr.u32 c, s, 1;",  # c, d: byte i of the first half of the table's, or of the second's: i + 4
            "and.b32 c, c, 0x44444444;",
            "or.b32 c, c, 0x32103210;",
            # halves by the multiplier, because the look-ups keep the unit of shifts busy
            "mul.hi.u32 b, a, 65536;",
            "mul.hi.u32 d, c, 65536;",
        ]
    else:
        code = []
        if bits > 1:
            code += ["prmt.b32 s, $4, 0, 0x3120;"]  # l0-3 h0-3 l4-7 h4-7
            code += ["and.b32 a, s, 0x33333333;", "shr.u32 b, s, 2;", "and.b32 b, b, 0x33333333;"]
        if bits != 2:
            code += ["prmt.b32 t, $5, 0, 0x2020;", "shr.u32 u, t, 4;"]  # l0-7 h0-7 l0-7 h0-7
            code += ["and.b32 t, t, 0x0f0f;", "and.b32 u, u, 0x0f0f0000;", "or.b32 t, t, u;"]  # l0-3 h0-3 l4-7 h4-7
            code += ["and.b32 u, t, 0x0a0a0a0a;", "and.b32 t, t, 0x05050505;"]
        if bits == 1:  # bits 0, 2 to the lowest of a nibble each; bits 1, 3 to the next, where an entry is repeated
            code += ["mul.lo.u32 a, t, 5;", "and.b32 a, a, 0x11111111;"]
            code += ["mul.lo.u32 b, u, 5;", "and.b32 b, b, 0x22222222;"]
        if bits == 3:  # bits 0, 2 and bits 1, 3 to the third of a nibble each
            code += ["mul.lo.u32 t, t, 20;", "and.b32 t, t, 0x44444444;", "or.b32 a, a, t;"]
            code += ["mul.lo.u32 u, u, 10;", "and.b32 u, u, 0x44444444;", "or.b32 b, b, u;"]
        if quad == 1:
            code += ["mul.hi.u32 a, a, 65536;", "mul.hi.u32 b, b, 65536;"]
    step = 1 if bits == 4 else 2
    for nibbles, half, first, second in (("a", "c", 0, step), ("b", "d", 3 - step, 3)):
        for found, words in (("t", low), ("u", high)):
            if bits == 4:
                code += [f"prmt.b32 x, {words[0]}, {words[1]}, {nibbles};"]
                code += [f"prmt.b32 y, {words[2]}, {words[3]}, {nibbles};", f"prmt.b32 {found}, x, y, {half};"]
            else:
                code += [f"prmt.b32 {found}, {words[0]}, {words[-1]}, {nibbles};"]
        code += [f"prmt.b32 ${first}, t, u, 0x6240;", f"prmt.b32 ${second}, t, u, 0x7351;"]
    return "{ .reg .b32 a, b, c, d, s, t, u, x, y; " + " ".join(code) + " }"


@triton.jit
def _word(codebook_ptr, table, FIRST: tl.constexpr, LAST: tl.constexpr, SHIFT: tl.constexpr, DTYPE: tl.constexpr):
    """Byte SHIFT / 8 of the entries FIRST to FIRST + 3 of each table, past LAST of that again: int32 ``[rows, 1]``."""
    word = tl.zeros(table.shape, tl.int32)
    for BYTE in tl.static_range(4):
        entry = tl.load(codebook_ptr + table + min(FIRST + BYTE, LAST)).to(DTYPE)
        word |= (entry.to(tl.int16, bitcast=True).to(tl.int32) >> SHIFT & 255) << (8 * BYTE)
    return word[:, None]


@triton.jit
def _words(codebook_ptr, table, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Four words of low bytes and four of high bytes of the tables that begin at ``table``, their entries as DTYPE."""
    LAST: tl.constexpr = (1 << BITS) - 1
    return (
        _word(codebook_ptr, table, 0, LAST, 0, DTYPE), _word(codebook_ptr, table, 4, LAST, 0, DTYPE),
        _word(codebook_ptr, table, 8, LAST, 0, DTYPE), _word(codebook_ptr, table, 12, LAST, 0, DTYPE),
        _word(codebook_ptr, table, 0, LAST, 8, DTYPE), _word(codebook_ptr, table, 4, LAST, 8, DTYPE),
        _word(codebook_ptr, table, 8, LAST, 8, DTYPE), _word(codebook_ptr, table, 12, LAST, 8, DTYPE),
    )  # fmt: skip


@triton.jit
def _look_up_quad(first, second, words, BITS: tl.constexpr, QUAD: tl.constexpr):
    """The bits, int16 ``[rows, 32]``, of the entries of each of the chunks 4 * QUAD .. 4 * QUAD + 3 of a tile."""
    a, b, c, d, e, f, g, h = words  # those that a table does not fill are not looked at
    if BITS == 4:
        return tl.inline_asm_elementwise(
            _look_up_ptx(BITS, QUAD), "=&r,=&r,=&r,=&r,r,r" + ",r,r" * 8, [first, first, a, b, c, d, e, f, g, h],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=2,
        )  # fmt: skip
    elif BITS == 3:
        return tl.inline_asm_elementwise(
            _look_up_ptx(BITS, QUAD), "=&r,=&r,=&r,=&r,r,r" + ",r,r" * 4, [first, second, a, b, e, f],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            _look_up_ptx(BITS, QUAD), "=&r,=&r,=&r,=&r,r,r" + ",r,r" * 2, [first, first, a, e],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def _fixed(weights, inverse_step):
    """T = ``clamp(round(weights / step), -32767, 32767)``, halves to even, as int16 of the two bytes ``high, low`` with
    ``T = 256 * high + low + 128``, both signed."""
    scaled = tl.minimum(tl.maximum(weights * inverse_step, -32767.0), 32767.0)
    # adding 1.5 * 2**23 leaves no bit for a fraction: rounds halves to even
    return (((scaled + 12582912.0) - 12582912.0).to(tl.int32) ^ 128).to(tl.int16)


@triton.jit
def _bytes(words, PTX: tl.constexpr):
    """The high and the low bytes of int16, int8."""
    if PTX:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, $3, 0x7531; prmt.b32 $1, $2, $3, 0x6420;", "=&r,=&r,r,r", [words],
            dtype=(tl.int8, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return (words >> 8).to(tl.int8), words.to(tl.int8)


@triton.jit
def codebook_steps_kernel(
    codebook_ptr, scales_ptr, scale_codebook_ptr, scale_absmax_ptr, scale_offset_ptr, tile_rows_ptr, fixed_ptr,
    steps_ptr, entries, groups, SHARED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The step of a row, and with ``fixed_ptr`` T (int16) of its ``entries`` in place of its tables, for one scale.

    SHARED: one table serves every row. With ``tile_rows_ptr``: of a row of each expert that the tiles of rows name.
    """
    n = tl.program_id(0).to(tl.int64)
    if tile_rows_ptr is not None:
        first_row, met = first_tile(tile_rows_ptr, tl.program_id(1), BLOCK_M)
        if not met:
            return
        n += first_row
    offset = tl.arange(0, BLOCK)
    first = n * 0 if SHARED else n * entries
    peaks = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, entries, BLOCK):
        at = start + offset
        entry = tl.load(codebook_ptr + first + at, mask=at < entries, other=0.0).to(tl.float32)
        peaks = tl.maximum(peaks, tl.abs(entry))
    peak = tl.max(peaks, 0)
    if scales_ptr is not None:
        peaks = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, groups, BLOCK):
            # past the last group its scale is repeated, which changes no maximum
            at = n * groups + tl.minimum(start + offset, groups - 1)
            scale = _scale(scales_ptr, scale_codebook_ptr, scale_absmax_ptr, scale_offset_ptr, at)
            peaks = tl.maximum(peaks, tl.abs(scale))
        peak = tl.max(peaks, 0) * peak
    step = tl.div_rn(peak, 32767.0)
    step = tl.where(step < 1.1754943508222875e-38, 1.0, step)  # 2**-126
    tl.store(steps_ptr + n, step)
    if fixed_ptr is not None:
        inverse = tl.div_rn(1.0, step)
        for start in range(0, entries, BLOCK):
            at = start + offset
            weights = tl.load(codebook_ptr + first + at, mask=at < entries, other=0.0).to(tl.float32)
            if scales_ptr is not None:
                weights *= _scale(scales_ptr, scale_codebook_ptr, scale_absmax_ptr, scale_offset_ptr, n)
            tl.store(fixed_ptr + n * entries + at, _fixed(weights, inverse), mask=at < entries)


@triton.jit(do_not_specialize=["m_size", "x_stride", "outlier_x_stride", "repeats"])
def codebook_linear_kernel(
    x_ptr, tiles16_ptr, tiles8_ptr, codebook_ptr, scales_ptr, scale_codebook_ptr, scale_absmax_ptr, scale_offset_ptr,
    steps_ptr, inverse_ptr, x_sums_ptr, bias_ptr,
    outlier_values_ptr, outlier_columns_ptr, outlier_pointers_ptr, outlier_x_ptr, tile_rows_ptr, order_ptr, y_ptr,
    m_size, n_size, k_size, tiles, groups, x_stride, outlier_x_stride, repeats,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, PERIOD: tl.constexpr, TABLES: tl.constexpr,
    PER_ELEMENT: tl.constexpr, SHARED_STEP: tl.constexpr, EVEN_K: tl.constexpr, X_ALIGN: tl.constexpr,
    SPLIT: tl.constexpr, PTX: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """y[m, n] for BLOCK_N rows of W and BLOCK_M of x; one split of K where SPLIT > 1 (y: float32 ``[SPLIT, M, N]``).

    With ``tile_rows_ptr`` W is a stack of experts, each of ``n_size`` rows, and ``repeats`` rows of y meet a row of x:
    :mod:`lowbit.backends.triton.experts`.

    PERIOD: after how many chunks the table or the scale changes; 0: never; -1: groups cut chunks. PER_ELEMENT: each
    weight is multiplied by its scale; otherwise int8 activations are multiplied with entries of a table of T, which has
    no scales. Sums of int8 activations stay integers where there is no ``inverse_ptr``.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(2)
    n_valid = n < n_size
    m_valid = m < m_size
    # Rows past the end repeat the last one and are not stored, so that no load in the loop needs a mask for them.
    n_row = tl.minimum(n, n_size - 1).to(tl.int64)
    m_row = tl.minimum(m, m_size - 1).to(tl.int64)
    row, column = m, n  # of y
    if tile_rows_ptr is not None:
        first_row, row, m_valid, what = rows_of_tile(tile_rows_ptr, order_ptr, tl.program_id(1), BLOCK_M)
        m, n, n_row = row // repeats, n + first_row, n_row + first_row
        m_row = m.to(tl.int64)
    lane = tl.arange(0, 32)
    first_tile = n_row * tiles
    x_rows = x_ptr + m_row * (x_stride * X_ALIGN)

    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    INT8: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    ENTRY: tl.constexpr = DTYPE if not INT8 else tl.float32 if PER_ELEMENT else tl.int16
    SCALED: tl.constexpr = scales_ptr is not None and not PER_ELEMENT
    IN_REGISTERS: tl.constexpr = PTX and BITS <= 4 and TABLES != "group" and not PER_ELEMENT
    FIELDS: tl.constexpr = fields(plane_width(BITS, 0))

    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    products = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if INT8 else tl.float32)
    low_products = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    if PERIOD == 0:
        table = codebook_ptr + _table(n_row, 0, groups, BITS, TABLES)[:, None]
        if scales_ptr is not None:
            scale = _scale(scales_ptr, scale_codebook_ptr, scale_absmax_ptr, scale_offset_ptr, n_row)[:, None]
    if IN_REGISTERS:
        words = _words(codebook_ptr, _table(n_row, 0, groups, BITS, TABLES), BITS, ENTRY)
    if INT8 and PER_ELEMENT:
        inverse_step = tl.div_rn(tl.full((BLOCK_N,), 1.0, tl.float32), tl.load(steps_ptr + n_row))[:, None]

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
            if PERIOD < 0 or (PERIOD > 0 and CHUNK % PERIOD == 0):
                # of each column, or of the chunk
                group = tl.minimum(k[None, :] if PERIOD < 0 else t * 256 + CHUNK * 32, k_size - 1) // GROUP_SIZE
                table = codebook_ptr + _table(n_row[:, None], group, groups, BITS, TABLES)
                if scales_ptr is not None:
                    at = n_row[:, None] * groups + group
                    scale = _scale(scales_ptr, scale_codebook_ptr, scale_absmax_ptr, scale_offset_ptr, at)
                if SCALED:
                    products = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            if IN_REGISTERS:
                if CHUNK % 4 == 0:
                    quad = _look_up_quad(first, second, words, BITS, CHUNK // 4)
                weights = quad[CHUNK % 4].to(ENTRY, bitcast=True)
            else:
                codes = chunk_codes(first, second, third, 0, BITS, CHUNK, PTX)
                weights = _entries(codes, table, PTX).to(ENTRY)
            if PER_ELEMENT:
                weights = weights.to(tl.float32)
                if scales_ptr is not None:
                    weights *= scale
            if INT8:
                if PER_ELEMENT:
                    weights = _fixed(weights, inverse_step)
                high, low = _bytes(weights, PTX)
                products = tl.dot(high, x, products, out_dtype=tl.int32)
                low_products = tl.dot(low, x, low_products, out_dtype=tl.int32)
            elif PER_ELEMENT:
                products = dot_float32(weights, x, products)
            else:
                products = tl.dot(weights, x, products)
            if SCALED and PERIOD > 0 and CHUNK % PERIOD == PERIOD - 1:
                sums += products * scale
    if INT8:
        x_sums = tl.load(x_sums_ptr + m_row, mask=m_valid & (part == 0), other=0)
        rest = low_products.to(tl.int64) + 128 * x_sums.to(tl.int64)[None, :]
        sums = (256 * products.to(tl.int64) + rest).to(tl.float32)
    elif not SCALED:
        sums = products
    elif PERIOD == 0:
        sums = products * scale
    if inverse_ptr is not None:
        sums = _unscaled(sums, steps_ptr, inverse_ptr, n_row, m_row, SHARED_STEP)
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


@triton.jit
def _unscaled(sums, steps_ptr, inverse_ptr, n_row, m_row, SHARED_STEP: tl.constexpr):
    """``sums * step[n] / inverse[m]`` of ``sums [rows n, rows m]``."""
    step = tl.load(steps_ptr + (n_row * 0 if SHARED_STEP else n_row))
    inverse = tl.broadcast_to(tl.load(inverse_ptr + m_row)[None, :], sums.shape)
    return tl.div_rn(sums * step[:, None], inverse)


@triton.jit(do_not_specialize=["m_size", "outlier_x_stride", "repeats"])
def codebook_sum_kernel(
    parts_ptr, steps_ptr, inverse_ptr, bias_ptr, outlier_values_ptr, outlier_columns_ptr, outlier_pointers_ptr,
    outlier_x_ptr, ids_ptr, y_ptr, m_size, n_size, outlier_x_stride, repeats,
    EXPERTS: tl.constexpr, PARTS: tl.constexpr, SHARED_STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y from the parts of integer sums: these are added before anything rounds or scales them.

    With ``ids_ptr`` W is a stack of experts, as in codebook_linear_kernel.
    """
    m = tl.program_id(1) + tl.arange(0, 1)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n_valid = n < n_size
    n_row = tl.minimum(n, n_size - 1)
    m_row = m.to(tl.int64)
    row, column = m_row, n  # of y
    sums = tl.zeros((BLOCK, 1), tl.float32)
    for p in tl.static_range(PARTS):
        sums += tl.load(parts_ptr + ((p * m_size + m_row) * n_size)[None, :] + n_row[:, None])
    if ids_ptr is not None:
        expert, what = expert_of_row(ids_ptr, row, EXPERTS)
        m, m_row = m // repeats, m_row // repeats
        n, n_row = n + expert * n_size, n_row + expert * n_size
    sums = _unscaled(sums, steps_ptr, inverse_ptr, n_row, m_row, SHARED_STEP)
    if outlier_values_ptr is not None:
        sums += outlier_products(
            outlier_values_ptr, outlier_columns_ptr, outlier_pointers_ptr, outlier_x_ptr, outlier_x_stride,
            n, n_valid, m, m < m_size, 0, 1, 32,
        )  # fmt: skip
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + n_row).to(tl.float32)[:, None]
    if ids_ptr is not None:
        sums = of_what(sums, what[None, :])
    tl.store(y_ptr + (row * n_size)[None, :] + column[:, None], sums.to(y_ptr.dtype.element_ty), mask=n_valid[:, None])


@triton.jit(do_not_specialize=["rows"])
def codebook_rows_kernel(
    ids_ptr, tiles16_ptr, tiles8_ptr, codebook_ptr, scales_ptr, scale_codebook_ptr, scale_absmax_ptr,
    scale_offset_ptr, y_ptr, rows, n_size, k_size, tiles, groups,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, TABLES: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr,
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
        codes = chunk_codes(first, second, third, 0, BITS, CHUNK, PTX)
        group = tl.minimum(k, k_size - 1)[None, :] // GROUP_SIZE
        w = _entries(codes, codebook_ptr + _table(n[:, None], group, groups, BITS, TABLES), PTX).to(tl.float32)
        if scales_ptr is not None:
            at = n[:, None] * groups + group
            w *= _scale(scales_ptr, scale_codebook_ptr, scale_absmax_ptr, scale_offset_ptr, at)
        w = tl.where(known[:, None], w, float("nan"))
        inside = (i < rows)[:, None] & (k < k_size)[None, :]
        tl.store(y_ptr + i[:, None] * k_size + k[None, :], w.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def codebook_outlier_rows_kernel(
    ids_ptr, tiles16_ptr, tiles8_ptr, codebook_ptr, scales_ptr, scale_codebook_ptr, scale_absmax_ptr,
    scale_offset_ptr, outlier_values_ptr, outlier_columns_ptr, outlier_pointers_ptr, y_ptr,
    n_size, k_size, tiles, groups,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, TABLES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The elements of y of codebook_rows_kernel that have an outlier: y[i, column] = W[n, column] + value."""
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
        codes = element_code(tiles16_ptr, tiles8_ptr, n * tiles, k, BITS)
        w = tl.load(codebook_ptr + _table(n, k // GROUP_SIZE, groups, BITS, TABLES) + codes).to(tl.float32)
        if scales_ptr is not None:
            at = n * groups + k // GROUP_SIZE
            w *= _scale(scales_ptr, scale_codebook_ptr, scale_absmax_ptr, scale_offset_ptr, at)
        tl.store(y_ptr + i * k_size + k, (w + value).to(y_ptr.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------------------------- on the host


def _tables(codebook: Tensor) -> str:
    return "group" if codebook.shape[1] > 1 else "row" if codebook.shape[0] > 1 else "tensor"


def _groups(codebook: Tensor, scales: Scales) -> int:
    """How many groups of a row may differ in their table or scale."""
    return codebook.shape[1] if scales[0] is None else scales[0].shape[1]


def _period(codebook: Tensor, scales: Scales, group_size: int, k: int) -> int:
    return scale_period(group_size, k) if _groups(codebook, scales) > 1 else 0


def _tabled(scales: Scales, period: int) -> bool:
    """Whether int8 activations are multiplied with entries of a table."""
    return period >= 0 and (scales[0] is None or scales[0].shape[1] == 1)


def _kernel_name(codebook: Tensor, scales: Scales, group_size: int, k: int, int8: bool) -> str:
    """The name in tuned.json. int8 activations with scales per group are as slow as groups that cut chunks."""
    period = _period(codebook, scales, group_size, k)
    fast = _tabled(scales, period) if int8 else period >= 0
    return "codebook_linear" if fast else "codebook_linear_odd_groups"


def _experts_kernel_name(*arguments: Any) -> str:
    return _kernel_name(*arguments).replace("linear", "experts")


def _scales(weight: CodebookOperands) -> Scales:
    return weight.scales, weight.scale_codebook, weight.scale_absmax, weight.scale_offset


def _scale_pointers(scales: Scales) -> dict[str, Tensor | None]:
    names = ("scales_ptr", "scale_codebook_ptr", "scale_absmax_ptr", "scale_offset_ptr")
    return dict(zip(names, scales, strict=True))


def steps_launch(
    codebook: Tensor, scales: Scales, n: int, tabled: bool, stack: Rows | None = None
) -> tuple[Launch, Tensor, Tensor | None]:
    """(launch, steps float32 ``[N]`` or, for all rows, ``[1]``, T) of weights ``[n, K]`` that meet int8 activations.

    ``tabled``, for no more than one scale per row: T is an int16 codebook; else None. Of a ``stack`` of many experts of
    which few rows meet some, those alone.
    """
    rows = 1 if codebook.shape[0] == 1 and scales[0] is None else n
    steps = torch.empty(rows, dtype=torch.float32, device=codebook.device)
    fixed = torch.empty(rows, *codebook.shape[1:], dtype=torch.int16, device=codebook.device) if tabled else None
    grid: tuple[int, ...] = (rows,)
    tiles, block_m = None, 0
    if rows > 1 and stack is not None and stack.by_place and len(stack.tiles) < stack.num_experts:
        grid, tiles, block_m = (rows // stack.num_experts, len(stack.tiles)), stack.tiles, stack.block_m
    arguments = dict(
        codebook_ptr=codebook, **_scale_pointers(scales), tile_rows_ptr=tiles, fixed_ptr=fixed, steps_ptr=steps,
        entries=codebook.shape[1] * codebook.shape[2], groups=_groups(codebook, scales),
    )  # fmt: skip
    constants = dict(SHARED=codebook.shape[0] == 1, BLOCK_M=block_m, BLOCK=256)
    return Launch(codebook_steps_kernel, grid, arguments, constants, fuse=False), steps, fixed


def linear_launches(
    target: Target,
    config: tuning.Config,
    x: Tensor,
    weight: CodebookOperands,
    bias: Tensor | None,
    activation: Activation,
    y: Tensor,
    rows: Rows | None = None,
) -> list[Launch]:
    """The launches of ``y [M, N] = x [M, K] @ W.T + bias``; x is as :func:`aligned_rows` gives it, W in tiles.

    With ``rows`` they are those of a stack of experts: W is ``[E*N, K]``, and rows of y may share a row of x.
    """
    tiles, codebook, scales, outliers = weight.packed, weight.codebook, _scales(weight), weight.outliers
    bits, group_size, int8, x_scale = weight.bits, weight.group_size, activation.int8, activation.x_scale
    (m, n), k, stack = y.shape, x.shape[1], len(tiles)
    launches: list[Launch] = []
    operand, inverse, steps, x_sums = x, None, None, None
    split = config.split
    period = _period(codebook, scales, group_size, k)
    per_element = period < 0 or (x.dtype == torch.float32 and not int8)
    if int8:
        quantize, operand, inverse, x_sums = quantize_launch(x, x_scale)
        steps_of_rows, steps, fixed = steps_launch(codebook, scales, stack, _tabled(scales, period), rows)
        launches += [quantize, steps_of_rows]
        per_element = fixed is None
        if fixed is not None:
            codebook, scales = fixed, (None, None, None, None)
        split = max(split, -(-k // INT8_COLUMNS))  # int32 sums
    out = y if split == 1 else torch.empty(split, m, n, dtype=torch.float32, device=y.device)
    words, octets = views(tiles)
    align, stride = row_stride(operand)
    values, columns, pointers = outliers
    sparse = dict(
        outlier_values_ptr=values, outlier_columns_ptr=columns, outlier_pointers_ptr=pointers,
        outlier_x_ptr=None if values is None else x, outlier_x_stride=x.stride(0),
    )  # fmt: skip
    integers = int8 and split > 1  # what the parts are
    finish = dict(inverse_ptr=inverse, **sparse)
    if integers:
        finish = dict.fromkeys(finish) | dict(outlier_x_stride=0)
    launches.append(
        Launch(
            codebook_linear_kernel,
            (-(-n // config.block_n), -(-m // config.block_m) if rows is None else len(rows.tiles), split),
            dict(
                x_ptr=operand, tiles16_ptr=words, tiles8_ptr=octets, codebook_ptr=codebook, **_scale_pointers(scales),
                steps_ptr=steps, x_sums_ptr=x_sums, bias_ptr=bias if split == 1 else None,
                y_ptr=out, m_size=m, n_size=n, k_size=k, tiles=tiles.shape[1], groups=_groups(codebook, scales),
                x_stride=stride, **finish, **arguments_of(rows),
            ),
            dict(
                BITS=bits, GROUP_SIZE=group_size, PERIOD=period, TABLES=_tables(codebook), PER_ELEMENT=per_element,
                SHARED_STEP=steps is not None and steps.shape[0] == 1, EVEN_K=int8 or k % 256 == 0, X_ALIGN=align,
                SPLIT=split, PTX=target.inline_ptx, BLOCK_N=config.block_n, BLOCK_M=config.block_m,
                ENTRIES=max(1, (32 if int8 else 64) // config.block_m),
            ),
            config.warps, config.stages, fuse=False,
        )
    )  # fmt: skip
    if integers:
        ids, repeats, num_experts = (None, None, 0) if rows is None else (rows.ids, rows.repeats, rows.num_experts)
        arguments = dict(
            parts_ptr=out, steps_ptr=steps, inverse_ptr=inverse, bias_ptr=bias, ids_ptr=ids, y_ptr=y, m_size=m,
            n_size=n, repeats=repeats, **sparse,
        )  # fmt: skip
        shared = steps is not None and steps.shape[0] == 1
        constants = dict(EXPERTS=num_experts, PARTS=split, SHARED_STEP=shared, BLOCK=64)
        launches.append(Launch(codebook_sum_kernel, (-(-n // 64), m), arguments, constants, fuse=False))
    elif split > 1:
        launches.append(sum_launch(out, bias, y, rows))
    return launches


def rows_launches(target: Target, ids: Tensor | None, weight: CodebookOperands, y: Tensor) -> list[Launch]:
    """The launches of ``y [rows, K] = W[ids]``, or of all of W where ids is None."""
    tiles, codebook, scales, outliers = weight.packed, weight.codebook, _scales(weight), weight.outliers
    bits, group_size = weight.bits, weight.group_size
    count, k = y.shape
    words, octets = views(tiles)
    shared = dict(
        ids_ptr=ids, tiles16_ptr=words, tiles8_ptr=octets, codebook_ptr=codebook, **_scale_pointers(scales), y_ptr=y,
        n_size=tiles.shape[0], k_size=k, tiles=tiles.shape[1], groups=_groups(codebook, scales),
    )  # fmt: skip
    constants = dict(BITS=bits, GROUP_SIZE=group_size, TABLES=_tables(codebook))
    block = 16
    launches = [
        Launch(
            codebook_rows_kernel, (-(-count // block), tiles.shape[1]), {**shared, "rows": count},
            {**constants, "BLOCK": block, "PTX": target.inline_ptx}, fuse=False,
        )
    ]  # fmt: skip
    values, columns, pointers = outliers
    if values is not None:
        sparse = dict(outlier_values_ptr=values, outlier_columns_ptr=columns, outlier_pointers_ptr=pointers)
        launches.append(
            Launch(
                codebook_outlier_rows_kernel, (count,), {**shared, **sparse}, {**constants, "BLOCK": 32}, 1, fuse=False
            )
        )
    return launches


def _prepared(
    device: torch.device, weight: CodebookOperands, k: int, bias: Tensor | None = None, *, quiet: bool = False
) -> CodebookOperands:
    """The weight as the kernels read it, checked: codes in tiles."""
    check_outliers(*weight.outliers, weight.out_features)
    tensors = {name: getattr(weight, name) for name in weight.tensor_names}
    check_tensors(device, **tensors, bias=bias)
    tiles = tiles_of(weight.packed, weight.layout, weight.bits, k, quiet=quiet)
    return replace(weight, packed=tiles, layout=TILES.number, outlier_columns=column_numbers(weight.outlier_columns))


def linear(x: Tensor, *arguments: Any) -> Tensor:
    """``lowbit::codebook_linear`` on a GPU."""
    weight, bias, activation = OPS.linear_arguments(x, *arguments)
    n, k = weight.out_features, x.shape[-1]
    weight = _prepared(x.device, weight, k, bias)
    check_bias(bias, n)
    check_x_scale(activation.x_scale, activation.int8)
    flat = aligned_rows(x.reshape(-1, k))
    m = flat.shape[0]
    target = target_of(x.device)
    kernel = _kernel_name(weight.codebook, _scales(weight), weight.group_size, k, activation.int8)
    config = tuning.choose(target, kernel, torch.int8 if activation.int8 else x.dtype, weight.bits, m, n, k)
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
    """``lowbit::codebook_experts`` on a GPU. A negative id gives a row of NaN: checking would wait for the GPU.

    Verified on emulators, not yet on a GPU.
    """
    weight, num_experts, bias, activation = OPS.experts_arguments(x, ids, *arguments)
    (tokens, k), s, n = x.shape, len(ids), weight.out_features // num_experts
    weight = _prepared(x.device, weight, k, bias)
    ids = ids.contiguous()
    check_tensors(x.device, ids=ids)
    check_bias(bias, weight.out_features)
    check_x_scale(activation.x_scale, activation.int8)
    target = target_of(x.device)
    name = _experts_kernel_name(weight.codebook, _scales(weight), weight.group_size, k, activation.int8)
    kind = torch.int8 if activation.int8 else x.dtype
    config = choose(target, name, kind, weight.bits, s, n, k, num_experts)
    y = torch.empty(s, n, dtype=x.dtype, device=x.device)
    sorting, rows = sorted_rows(ids, tokens, n, num_experts, config.block_m)
    run([*sorting, *linear_launches(target, config, aligned_rows(x), weight, bias, activation, y, rows)])
    return y


def dequantize(*arguments: Any) -> Tensor:
    """``lowbit::codebook_dequantize`` on a GPU."""
    weight, k, dtype = OPS.row_arguments(*arguments)
    weight = _prepared(weight.device, weight, k, quiet=True)
    y = torch.empty(weight.out_features, k, dtype=dtype, device=weight.device)
    run(rows_launches(target_of(y.device), None, weight, y))
    return y


def embedding(ids: Tensor, *arguments: Any) -> Tensor:
    """``lowbit::codebook_embedding`` on a GPU. An id out of range gives NaN: checking would wait for the GPU."""
    weight, k, dtype = OPS.embedding_arguments(ids, *arguments)
    weight = _prepared(ids.device, weight, k)
    y = torch.empty(ids.numel(), k, dtype=dtype, device=weight.device)
    run(rows_launches(target_of(y.device), ids.reshape(-1).contiguous(), weight, y))
    return y.view(*ids.shape, k)


def shipped(target: Target) -> Iterator[tuple[str, list[Launch]]]:
    """(name, launches) of every configuration that ships for ``target``, on meta tensors of 4096 x 4096 weights.

    Stacks are of 8 experts, 2 for each row of x. Their kernel is the linear's with other rows: fewer kinds will do.
    """
    n = 4096
    num_experts = 8

    def empty(shape: tuple[int, ...], dtype: torch.dtype = torch.float16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def weight(
        bits: int, tables: str, scales: str, group_size: int, k: int, outliers: bool = False, n: int = n
    ) -> CodebookOperands:
        groups = -(-k // group_size)
        shape = {"tensor": (1, 1), "row": (n, 1), "group": (n, groups)}[tables]
        nested = (empty((256,), torch.float32), empty((-(-n * groups // 256),), torch.float32))
        of_weights: dict[str, Scales] = {
            "none": (None, None, None, None),
            "float": (empty((n, groups)), None, None, None),
            "nested": (empty((n, groups), torch.uint8), *nested, empty((1,), torch.float32)),
        }
        tiles = empty((n, tiles_per_row(k), 8 * bits), torch.int32)
        # a table per tensor is float32 by default
        table_dtype = torch.float32 if tables == "tensor" else torch.float16
        names = ("scales", "scale_codebook", "scale_absmax", "scale_offset")
        return CodebookOperands(
            packed=tiles, codebook=empty((*shape, 1 << bits), table_dtype),
            **dict(zip(names, of_weights[scales], strict=True)),
            outlier_values=empty((64,)) if outliers else None,
            outlier_columns=empty((64,), torch.int16) if outliers else None,
            outlier_rows=empty((n + 1,), torch.int32) if outliers else None,
            bits=bits, group_size=group_size, layout=TILES.number,
        )  # fmt: skip

    def linears(
        name: str, bits: int, dtype: torch.dtype, tables: str, scales: str, group_size: int, k: int = n,
        outliers: bool = False,
    ) -> Iterator[tuple[str, list[Launch]]]:  # fmt: skip
        int8 = dtype == torch.int8
        of_weights = weight(bits, tables, scales, group_size, k, outliers)
        kernel = _kernel_name(of_weights.codebook, _scales(of_weights), group_size, k, int8)
        for m in tuning.regimes(target, kernel, dtype, bits):
            config = tuning.choose(target, kernel, dtype, bits, m, n, k)
            if not config.dense:
                x = empty((m, k), torch.float16 if int8 else dtype)
                activation, y = Activation(int8=int8), empty((m, n), x.dtype)
                launches = linear_launches(target, config, x, of_weights, None, activation, y)
                yield f"codebook_linear {bits}-bit {name} {dtype_name(dtype)} M={m}", launches

    def experts(
        name: str, bits: int, dtype: torch.dtype, tables: str, scales: str, group_size: int, outliers: bool = False,
        regimes: int = 9,
    ) -> Iterator[tuple[str, list[Launch]]]:  # fmt: skip
        int8 = dtype == torch.int8
        of_weights = weight(bits, tables, scales, group_size, n, outliers, num_experts * n)
        kernel = _experts_kernel_name(of_weights.codebook, _scales(of_weights), group_size, n, int8)
        for m in tuning.regimes(target, kernel, dtype, bits)[:regimes]:
            s = 2 if m <= 16 else m * num_experts  # a row of x, or all experts
            config = choose(target, kernel, dtype, bits, s, n, n, num_experts)
            sorting, rows = sorted_rows(empty((s,), torch.int64), s // 2, n, num_experts, config.block_m)
            x = empty((s // 2, n), torch.float16 if int8 else dtype)
            bias = empty((num_experts * n,), x.dtype) if outliers else None
            activation, y = Activation(int8=int8), empty((s, n), x.dtype)
            product = linear_launches(target, config, x, of_weights, bias, activation, y, rows)
            yield f"codebook_experts {bits}-bit {name} {dtype_name(dtype)} M={m}", [*sorting, *product]

    for bits in range(1, 9):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.int8):
            if dtype != torch.float16 or bits == 4:
                yield from linears("row", bits, dtype, "row", "none", n)
            if dtype == torch.float16 or bits == 4:
                yield from linears("tensor, group 64", bits, dtype, "tensor", "float", 64)
        ids, y = empty((64,), torch.int64), empty((64, n))
        of_weights = weight(bits, "row", "none", n, n)
        yield f"codebook_embedding {bits}-bit", rows_launches(target, ids, of_weights, y)
    for dtype in (torch.float16, torch.int8):
        yield from linears("group", 4, dtype, "group", "none", 64)
        yield from linears("nested", 4, dtype, "tensor", "nested", 64)
        yield from linears("group 20", 4, dtype, "tensor", "float", 20)
        yield from linears("outliers", 4, dtype, "row", "none", n, outliers=True)
        yield from linears("odd K", 4, dtype, "row", "none", n - 1, n - 1)
    for bits in range(1, 9):
        yield from experts("row", bits, torch.float16, "row", "none", n, regimes=9 if bits == 4 else 1)
    for dtype in (torch.bfloat16, torch.float32, torch.int8):
        yield from experts("row", 4, dtype, "row", "none", n)
    yield from experts("tensor, group 64", 4, torch.float16, "tensor", "float", 64, regimes=1)
    yield from experts("outliers, bias", 4, torch.bfloat16, "row", "none", n, outliers=True, regimes=1)
    yield from experts("outliers, bias", 4, torch.int8, "row", "none", n, outliers=True, regimes=1)
    yield from experts("group 20", 4, torch.float16, "tensor", "float", 20)
