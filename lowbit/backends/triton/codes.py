"""Device functions that the Triton kernels of families with packed codes share: reading tiles
(:mod:`lowbit.backends.triton.tiles`), their codes as exact numbers of a matrix product, sparse outliers, and a float32
in pieces.

A kernel takes weights as ``[BLOCK_N rows, 32 lanes]``, one chunk of a tile. ``PTX`` says that the target understands
inline PTX; without it the same values come from plain Triton (AMD, the interpreter).
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowbit.backends.triton.tiles import CHUNKS, LANES
from lowbit.core.bitpack import PLANES


@triton.constexpr_function
def plane_width(bits, plane):
    """Bits of a plane; 0 where there is none."""
    return PLANES[bits][plane] if plane < len(PLANES[bits]) else 0


@triton.constexpr_function
def plane_start(bits, plane):
    """The first byte of a plane in its tile."""
    return LANES * sum(PLANES[bits][:plane])


@triton.constexpr_function
def fields(width):
    """Chunks that one lane of a plane of this width holds."""
    return min(16 // width, CHUNKS)


@triton.constexpr_function
def field_ptx(shift, width, place):
    """PTX on two 16-bit lanes in one register: ``((lane >> shift) & (2**width - 1)) << place | base``."""
    mask = ((1 << width) - 1) << place
    move = f"shr.u32 t, $1, {shift - place};" if shift >= place else f"shl.b32 t, $1, {place - shift};"
    return f"{{ .reg .b32 t; {move} lop3.b32 $0, t, {mask << 16 | mask:#x}, $2, 0xea; }}"


@triton.jit
def field(word, base, SHIFT: tl.constexpr, WIDTH: tl.constexpr, PLACE: tl.constexpr, PTX: tl.constexpr):
    """``base`` with the field of ``word`` at bit SHIFT put at bit PLACE, int16."""
    if PTX:
        return tl.inline_asm_elementwise(
            field_ptx(SHIFT, WIDTH, PLACE), "=r,r,r", [word, base], dtype=tl.int16, is_pure=True, pack=2
        )
    else:
        return (((word >> SHIFT) & ((1 << WIDTH) - 1)) << PLACE) | base


@triton.jit
def load_plane(tiles16_ptr, tiles8_ptr, tile, BITS: tl.constexpr, PLANE: tl.constexpr, PART: tl.constexpr):
    """One plane's lanes ``[rows, 32]`` of the tiles number ``tile`` (int64 ``[rows]``, over all rows), as int16."""
    WIDTH: tl.constexpr = plane_width(BITS, PLANE)
    lane = tl.arange(0, 32)
    first = tile * (32 * BITS) + plane_start(BITS, PLANE)
    if WIDTH == 1:
        return tl.load(tiles8_ptr + first[:, None] + lane[None, :]).to(tl.int16)
    else:
        return tl.load(tiles16_ptr + (first // 2 + 32 * PART)[:, None] + lane[None, :])


@triton.jit
def load_upper_planes(tiles16_ptr, tiles8_ptr, tile, BITS: tl.constexpr):
    """The planes above the first; a zero where there is none."""
    second = 0
    third = 0
    if plane_width(BITS, 1) > 0:
        second = load_plane(tiles16_ptr, tiles8_ptr, tile, BITS, 1, 0)
    if plane_width(BITS, 2) > 0:
        third = load_plane(tiles16_ptr, tiles8_ptr, tile, BITS, 2, 0)
    return second, third


@triton.jit
def chunk_codes(first, second, third, base, BITS: tl.constexpr, CHUNK: tl.constexpr, PTX: tl.constexpr):
    """The codes ``[rows, 32]`` of a chunk, int16, each in the low bits of ``base``."""
    W0: tl.constexpr = plane_width(BITS, 0)
    W1: tl.constexpr = plane_width(BITS, 1)
    W2: tl.constexpr = plane_width(BITS, 2)
    codes = field(first, tl.full(first.shape, base, tl.int16), CHUNK % fields(W0) * W0, W0, 0, PTX)
    if W1 > 0:
        codes = field(second, codes, CHUNK * W1, W1, W0, PTX)
    if W2 > 0:
        codes = field(third, codes, CHUNK * W2, W2, W0 + W1, PTX)
    return codes


@triton.constexpr_function
def magic_bits(dtype):
    """The bits of the number of ``dtype`` whose last mantissa bit is worth 1: 1024 in float16, 128 in bfloat16."""
    return 0x6400 if dtype == tl.float16 else 0x4300


@triton.constexpr_function
def magic_value(dtype):
    """That number."""
    return 1024.0 if dtype == tl.float16 else 128.0


@triton.jit
def centered(
    first, second, third, center, BITS: tl.constexpr, CHUNK: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr
):
    """``code - center`` of a chunk, exact in DTYPE (float16, bfloat16 or int8); ``center``: int32 ``[rows]``, which
    int8 of 8 bits takes for 128.

    The codes become the last mantissa bits of a number near 1024 (float16) or 128 (bfloat16, whose 7 bits take the 8
    of a byte in two halves): no conversion, one subtraction.
    """
    if DTYPE == tl.int8 and PTX:
        # (128 + code - center) ^ 128 in each byte: no borrow crosses bytes
        codes = chunk_codes(first, second, third, 0 if BITS == 8 else 128, BITS, CHUNK, PTX)
        offset = (center * 0 if BITS == 8 else center).to(tl.int8)
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; prmt.b32 t, $1, $2, 0x6420; sub.u32 t, t, $3; xor.b32 $0, t, 0x80808080; }", "=r,r,r,r",
            [codes, tl.broadcast_to(offset[:, None], first.shape)], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    elif DTYPE == tl.int8:
        codes = chunk_codes(first, second, third, 0, BITS, CHUNK, PTX)
        return (codes - center.to(tl.int16)[:, None]).to(tl.int8)
    elif BITS == 8 and DTYPE == tl.bfloat16:
        base = tl.full(first.shape, magic_bits(DTYPE), tl.int16)
        low = field(first, base, CHUNK % 2 * 8, 4, 0, PTX).to(tl.bfloat16, bitcast=True)
        high = field(first, base, CHUNK % 2 * 8 + 4, 4, 0, PTX).to(tl.bfloat16, bitcast=True)
        # 16 * (high - 128) - center + (low - 128): every number on the way is an integer of at most 8 bits
        high = (high - magic_value(DTYPE)) * 16.0 - center.to(tl.bfloat16)[:, None]
        return (high + (low - magic_value(DTYPE))).to(tl.bfloat16)
    else:
        codes = chunk_codes(first, second, third, magic_bits(DTYPE), BITS, CHUNK, PTX).to(DTYPE, bitcast=True)
        return (codes - (center.to(tl.float32) + magic_value(DTYPE)).to(DTYPE)[:, None]).to(DTYPE)


@triton.jit
def pieces_of(x):
    """float32 as the exact sum of three bfloat16: 8 leading bits, 8 more, the last 8 (truncated: no overflow)."""
    high = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    rest = x - high
    middle = (rest.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16), middle.to(tl.bfloat16), (rest - middle).to(tl.bfloat16)


@triton.jit
def dot(weights, x, sums):
    """``sums + weights @ x``, exact products, float32 sums; ``x`` float16 or bfloat16 like ``weights``, or float32
    where ``weights`` are bfloat16 (three products with the pieces of x, small ones first)."""
    if x.dtype == tl.float32:
        high, middle, low = pieces_of(x)
        sums = tl.dot(weights, low, sums)
        sums = tl.dot(weights, middle, sums)
        return tl.dot(weights, high, sums)
    else:
        return tl.dot(weights, x, sums, out_dtype=sums.dtype)


@triton.jit
def dot_float32(weights, x, sums):
    """``sums + weights @ x`` for float32 weights: products of the pieces of both, small ones first.

    What is left out is below 2**-24 of |weights| @ |x|.
    """
    w0, w1, w2 = pieces_of(weights)
    if x.dtype == tl.bfloat16:
        sums = tl.dot(w2, x, sums)
        sums = tl.dot(w1, x, sums)
        return tl.dot(w0, x, sums)
    else:
        x0, x1, x2 = pieces_of(x.to(tl.float32))
        sums = tl.dot(w0, x2, sums)
        sums = tl.dot(w1, x1, sums)
        sums = tl.dot(w2, x0, sums)
        sums = tl.dot(w0, x1, sums)
        sums = tl.dot(w1, x0, sums)
        return tl.dot(w0, x0, sums)


@triton.jit
def outlier_products(
    values_ptr, columns_ptr, pointers_ptr, x_ptr, x_stride, n, n_valid, m, m_valid, first, STEP: tl.constexpr,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    """``sum_e value[n, e] * x[m, column[n, e]]`` over the entries e = first, first + 1, ..., of every STEP-th run of
    ENTRIES of each row: float32 ``[BLOCK_N, BLOCK_M]``."""
    begin = tl.load(pointers_ptr + n, mask=n_valid, other=0)
    end = tl.load(pointers_ptr + n + 1, mask=n_valid, other=0)
    most = tl.max(end - begin, 0)
    sums = tl.zeros((n.shape[0], m.shape[0]), tl.float32)
    entry = tl.arange(0, ENTRIES)
    rows = x_ptr + m.to(tl.int64) * x_stride
    for start in range(first * ENTRIES, most, STEP * ENTRIES):
        at = begin[:, None] + start + entry[None, :]
        inside = at < end[:, None]
        value = tl.load(values_ptr + at, mask=inside, other=0.0).to(tl.float32)
        column = tl.load(columns_ptr + at, mask=inside, other=0).to(tl.int32)
        x = tl.load(
            rows[None, None, :] + column[:, :, None],
            mask=inside[:, :, None] & m_valid[None, None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        sums += tl.sum(value[:, :, None] * x, 1)
    return sums


@triton.jit
def element_code(tiles16_ptr, tiles8_ptr, first_tile, k, BITS: tl.constexpr):
    """The code of column ``k`` (int32, any shape) of a row that begins with tile number ``first_tile``, as int32."""
    tile = first_tile + k // 256
    chunk = k % 256 // 32
    lane = k % 32
    code = tl.zeros(k.shape, tl.int32)
    for PLANE in tl.static_range(3):
        if plane_width(BITS, PLANE) > 0:
            first = tile * (32 * BITS) + plane_start(BITS, PLANE)
            if plane_width(BITS, PLANE) == 1:
                word = tl.load(tiles8_ptr + first + lane).to(tl.int32)
            else:
                part = chunk // fields(plane_width(BITS, PLANE))
                word = tl.load(tiles16_ptr + first // 2 + part * 32 + lane).to(tl.int32)
            shift = chunk % fields(plane_width(BITS, PLANE)) * plane_width(BITS, PLANE)
            code |= ((word >> shift) & ((1 << plane_width(BITS, PLANE)) - 1)) << plane_start(BITS, PLANE) // 32
    return code
