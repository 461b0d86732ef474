"""The types of GGUF tensors, each as the weight of a family that has the same values.

A row is a sequence of blocks of 32 or 256 weights. d, m and dmin are float16, and h = k // 16 or k // 32 is the group
of weight k in its block.

    Q4_0, Q5_0, Q8_0   w = d * (q - 2**(b-1))             packed, groups of 32, symmetric
    Q4_1, Q5_1         w = d * q + m                      packed, groups of 32: minimum -m
    Q2_K               w = (d*sc[h]) * q - dmin*m[h]      packed, groups of 16, scales and minima of two levels
    Q4_K, Q5_K         the same                           packed, groups of 32, the same
    Q3_K, Q6_K         w = (d*sc[h]) * (q - 2**(b-1))     packed, groups of 16, symmetric, scales of two levels
    IQ4_NL, IQ4_XS     w = (d*ls[h]) * table[q]           codebook, groups of 32; IQ4_NL has no ls
    MXFP4              w = 2**(e - 128) * table[q]        codebook, groups of 32
    TQ1_0, TQ2_0       w = d * (q - 1)                    packed, 2 bits, groups of 256, symmetric: code q + 1

**Exact.** Every product above fits the 24 bits of float32, and a difference is rounded once, there as here: the packed
weight equals ``gguf.quants.dequantize`` bit for bit. sc and m are uint8 codes (int8 of Q3_K and Q6_K), and d and dmin
float16 factors of a block; the scales of IQ4_XS are kept in float32.

Source: github.com/ggml-org/llama.cpp (ggml/src/ggml-common.h, ggml-quants.c; gguf-py/gguf/quants.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowbit.checkpoint.importers.gguf.container import TYPES
from lowbit.codebook.format import CodebookFormat, CodebookWeight
from lowbit.core.family import Format, Weight, dtype_name
from lowbit.packed.format import PackedFormat, PackedWeight

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WEIGHTS_AT_ONCE = 1 << 22  # bounds the temporaries
_SIZES = {name: (size, nbytes) for name, size, nbytes in TYPES.values()}

IQ4 = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
E2M1 = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, -0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0)  # doubled


class Parts(NamedTuple):
    """What blocks, ``uint8 [B, bytes]``, hold."""

    codes: Tensor  # [B, size]
    scales: Tensor  # [B, size / group]: floats, or codes
    minima: Tensor | None = None  # the same shape
    scale_factors: Tensor | None = None  # [B, 1], of codes of scales
    zero_factors: Tensor | None = None


@dataclass(frozen=True)
class BlockType:
    """How the blocks of one type are read.

    Attributes:
        bits, group: of the weight that it becomes.
        decode: blocks -> their parts.
        table: of a codebook.
        scale_dtype: in which the scales, or their factors, are exact.
        has_minimum: something is subtracted.
        scale_codes: of scales of two levels.
    """

    bits: int
    group: int
    decode: Callable[[Tensor], Parts]
    table: tuple[float, ...] | None = None
    scale_dtype: torch.dtype = torch.float32
    has_minimum: bool = False
    scale_codes: torch.dtype | None = None


def format_of(name: str, n: int, k: int) -> Format:
    """The stored form of a weight ``[N, K]`` of type ``name``."""
    kind, scales = BLOCKS[name], dtype_name(BLOCKS[name].scale_dtype)
    if kind.table is not None:
        return CodebookFormat(kind.bits, n, k, kind.group, "tensor", scales=scales)
    levels: dict[str, Any] = {}
    if kind.scale_codes is not None:
        levels = dict(scale_codes=dtype_name(kind.scale_codes), scale_block=_SIZES[name][0] // kind.group)
    zeros: Any = "minimum" if kind.has_minimum else "none"
    return PackedFormat(kind.bits, n, k, kind.group, "group", zeros, scales, **levels)


def weight_of(name: str, rows: Tensor, order: Tensor | None = None) -> Weight:
    """The weight ``[N, K]`` of a tensor of type ``name``, from its bytes ``uint8 [N, bytes of a row]``.

    ``order``: row n of the weight is row ``order[n]`` of the tensor.
    """
    kind = BLOCKS[name]
    size, nbytes = _SIZES[name]
    n, blocks = len(rows), rows.shape[1] // nbytes
    k, groups = blocks * size, blocks * size // kind.group
    codes = torch.empty(n, k, dtype=torch.uint8)
    scales = torch.empty(n, groups, dtype=kind.scale_codes or kind.scale_dtype)
    zeros = None
    if kind.has_minimum:
        zeros = torch.empty(n, groups, dtype=kind.scale_dtype if kind.scale_codes is None else torch.uint8)
    scale_factors = None if kind.scale_codes is None else torch.empty(n, blocks, dtype=kind.scale_dtype)
    zero_factors = scale_factors.clone() if scale_factors is not None and kind.has_minimum else None
    step = max(1, _WEIGHTS_AT_ONCE // max(k, 1))
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        own = rows[part] if order is None else rows[order[part]]
        found = kind.decode(own.reshape(-1, nbytes))
        codes[part], scales[part] = found.codes.view(-1, k), found.scales.view(-1, groups)
        others = (zeros, found.minima), (scale_factors, found.scale_factors), (zero_factors, found.zero_factors)
        for held, values in others:
            if held is not None and values is not None:
                held[part] = values.view(-1, held.shape[1])
    if kind.table is not None:
        return CodebookWeight(codes, torch.tensor(kind.table, dtype=torch.float32)[None, None], scales, kind.group)
    block = None if scale_factors is None else size // kind.group
    return PackedWeight(
        codes, scales, zeros, kind.bits, kind.group, minimum=kind.has_minimum, scale_factors=scale_factors,
        zero_factors=zero_factors, scale_block=block,
    )  # fmt: skip


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte ``at`` of each block, ``[B, 1]``."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _fields(data: Tensor, shifts: range, mask: int, width: int) -> Tensor:
    """Runs of ``width`` bytes, each of which gives one run of fields per shift: ``[B, n]`` to ``[B, n * shifts]``."""
    runs = data.reshape(len(data), -1, width)
    fields = torch.empty(len(data), runs.shape[1], len(shifts), width, dtype=torch.uint8)
    for i, shift in enumerate(shifts):
        part = runs >> shift if shift else runs
        fields[:, :, i] = part & mask if mask << shift < 128 else part  # the last ones have nothing above them
    return fields.flatten(1)


_NIBBLES = range(0, 8, 4)


def _q4_0(b: Tensor) -> Parts:
    return Parts(_fields(b[:, 2:18], _NIBBLES, 15, 16), _half(b, 0))


def _q4_1(b: Tensor) -> Parts:
    return Parts(_fields(b[:, 4:20], _NIBBLES, 15, 16), _half(b, 0), -_half(b, 2))


def _fifth_bits(words: Tensor) -> Tensor:
    """Bit i of four bytes, as 16 times it, ``[B, 32]``."""
    return torch.stack([(words >> shift) & 1 for shift in range(8)], 2).flatten(1) << 4


def _q5_0(b: Tensor) -> Parts:
    return Parts(_fields(b[:, 6:22], _NIBBLES, 15, 16) | _fifth_bits(b[:, 2:6]), _half(b, 0))


def _q5_1(b: Tensor) -> Parts:
    return Parts(_fields(b[:, 8:24], _NIBBLES, 15, 16) | _fifth_bits(b[:, 4:8]), _half(b, 0), -_half(b, 2))


def _q8_0(b: Tensor) -> Parts:
    return Parts(b[:, 2:34] ^ 128, _half(b, 0))  # two's complement, plus 128


def _q2_k(b: Tensor) -> Parts:
    scales = b[:, :16]
    codes = _fields(b[:, 16:80], range(0, 8, 2), 3, 32)
    return Parts(codes, scales & 15, scales >> 4, _half(b, 80), _half(b, 82))


def _q3_k(b: Tensor) -> Parts:
    low, high = _fields(b[:, 96:104], _NIBBLES, 15, 8), _fields(b[:, 104:108], range(0, 8, 2), 3, 4)
    scales = (low | (high << 4)).to(torch.int8) - 32
    codes = _fields(b[:, 32:96], range(0, 8, 2), 3, 32) | (_fields(b[:, :32], range(8), 1, 32) << 2)
    return Parts(codes, scales, None, _half(b, 108))


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The scales and minima ``[B, 8]`` of twelve bytes."""
    first, second, third = packed.split(4, 1)
    scales = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], 1)
    minima = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], 1)
    return scales, minima


def _q4_k(b: Tensor) -> Parts:
    scales, minima = _six_bits(b[:, 4:16])
    return Parts(_fields(b[:, 16:144], _NIBBLES, 15, 32), scales, minima, _half(b, 0), _half(b, 2))


def _q5_k(b: Tensor) -> Parts:
    scales, minima = _six_bits(b[:, 4:16])
    codes = _fields(b[:, 48:176], _NIBBLES, 15, 32) | (_fields(b[:, 16:48], range(8), 1, 32) << 4)
    return Parts(codes, scales, minima, _half(b, 0), _half(b, 2))


def _q6_k(b: Tensor) -> Parts:
    codes = _fields(b[:, :128], _NIBBLES, 15, 64) | (_fields(b[:, 128:192], range(0, 8, 2), 3, 32) << 4)
    return Parts(codes, b[:, 192:208].contiguous().view(torch.int8), None, _half(b, 208))


def _iq4_xs(b: Tensor) -> Parts:
    low = torch.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], 2).flatten(1)
    high = torch.stack([(b[:, 2:4] >> shift) & 3 for shift in range(0, 8, 2)], 2).flatten(1)
    return Parts(_fields(b[:, 8:136], _NIBBLES, 15, 16), _half(b, 0) * ((low | (high << 4)).float() - 32))


def _mxfp4(b: Tensor) -> Parts:
    return Parts(_fields(b[:, 1:17], _NIBBLES, 15, 16), torch.ldexp(torch.ones(1), b[:, :1].float() - 128))


def _tq1_0(b: Tensor) -> Parts:
    """Base 3: five digits in a byte, the first the largest, of a fraction of 256."""
    parts = []
    for first, last, width, digits in ((0, 32, 32, 5), (32, 48, 16, 5), (48, 52, 4, 4)):
        runs = b[:, first:last].reshape(len(b), -1, 1, width)
        shifted = torch.cat([runs * 3**digit for digit in range(digits)], 2)  # modulo 256
        parts.append(((shifted.short() * 3) >> 8).to(torch.uint8).flatten(1))
    return Parts(torch.cat(parts, 1) + 1, _half(b, 52))


def _tq2_0(b: Tensor) -> Parts:
    return Parts(_fields(b[:, :64], range(0, 8, 2), 3, 32) + 1, _half(b, 64))


def _levels(bits: int, group: int, decode: Callable[[Tensor], Parts], has_minimum: bool = False) -> BlockType:
    codes = torch.uint8 if has_minimum else torch.int8
    return BlockType(bits, group, decode, None, torch.float16, has_minimum, codes)


BLOCKS = {
    "Q4_0": BlockType(4, 32, _q4_0, scale_dtype=torch.float16),
    "Q4_1": BlockType(4, 32, _q4_1, scale_dtype=torch.float16, has_minimum=True),
    "Q5_0": BlockType(5, 32, _q5_0, scale_dtype=torch.float16),
    "Q5_1": BlockType(5, 32, _q5_1, scale_dtype=torch.float16, has_minimum=True),
    "Q8_0": BlockType(8, 32, _q8_0, scale_dtype=torch.float16),
    "Q2_K": _levels(2, 16, _q2_k, has_minimum=True),
    "Q3_K": _levels(3, 16, _q3_k),
    "Q4_K": _levels(4, 32, _q4_k, has_minimum=True),
    "Q5_K": _levels(5, 32, _q5_k, has_minimum=True),
    "Q6_K": _levels(6, 16, _q6_k),
    "IQ4_NL": BlockType(4, 32, _q4_0, IQ4, torch.float16),
    "IQ4_XS": BlockType(4, 32, _iq4_xs, IQ4),
    "MXFP4": BlockType(4, 32, _mxfp4, E2M1, torch.bfloat16),
    "TQ1_0": BlockType(2, 256, _tq1_0, scale_dtype=torch.float16),
    "TQ2_0": BlockType(2, 256, _tq2_0, scale_dtype=torch.float16),
}
