"""Products of float32 tiles on matrix units that take 16 bits: each value as a sum of bfloat16 pieces.

    x = piece(x, 0) + piece(x, 1) + piece(x, 2)

Piece 0 keeps the upper 16 bits of the float32, so its 8 leading significant bits; what is left is exact, and so on:
bfloat16 values are one piece, float16 values two, and three hold any float32. Products of pieces are exact in float32.
Values that are not finite give NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PIECES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


@triton.jit
def piece(x, INDEX: tl.constexpr):
    """The bfloat16 piece ``INDEX`` of float32 ``x``."""
    for _ in tl.static_range(INDEX):
        x -= (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def dot_pieces(a, b, acc, A: tl.constexpr, B: tl.constexpr):
    """``acc + a @ b`` for float tiles of ``A`` and ``B`` pieces, small products first.

    Products of pieces i and j with i + j > 2 are left out: they are below 2**-22 of ``|a| @ |b|``, about 2**-24 on
    average. With ``A + B <= 4`` none is left out but the one of piece 2 with the second of a float16.

    The values must be rounded where they enter: a multiplication that made them must not fuse with the subtraction.
    """
    a = a.to(tl.float32)
    b = b.to(tl.float32)
    for total in tl.static_range(2, -1, -1):
        for i in tl.static_range(0, 3):
            if i <= total and i < A and total - i < B:
                acc = tl.dot(piece(a, i), piece(b, total - i), acc)
    return acc
