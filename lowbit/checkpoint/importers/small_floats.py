"""Weights of floats of 8 and 4 bits as codebooks: what the formats that hold such weights share.

    w[n, k] = value(code[n, k]) * scale[n, k // group_size]

A code of e4m3 is its byte: sign, four exponent bits, three mantissa bits; the codes 0x7f and 0xff are NaN (OCP 8-bit
floating point, arXiv 2209.05433). A code of e2m1 is four bits: sign, two exponent bits, one mantissa bit; of two in a
byte the first has the lower bits. An exponent byte e (e8m0) stands for ``2**(e - 127)``, 255 for NaN (OCP Microscaling
Formats, version 1.0).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lowbit.checkpoint.importers.folder import Stored
from lowbit.codebook.format import NESTED_BLOCK, CodebookFormat, CodebookWeight
from lowbit.core.family import FLOAT_DTYPES, dtype_name

E4M3 = torch.float8_e4m3fn
EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)  # what holds exponent bytes
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
MX_GROUP = 32  # columns that share an exponent
NV_GROUP = 16  # columns that share a scale of e4m3
SCALES = (*FLOAT_DTYPES.values(), *EXPONENTS)


@cache
def e4m3_table() -> Tensor:
    """The 256 values, float32 ``[1, 1, 256]``; 0 in the place of NaN, which no weight that is read holds."""
    values = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    return values.masked_fill(values.isnan(), 0).view(1, 1, 256)


@cache
def exponent_table() -> Tensor:
    """What the 256 exponent bytes stand for, float32 ``[256]``; 0 in the place of NaN."""
    return torch.tensor([2.0 ** (e - 127) for e in range(255)] + [0.0])


def read_e4m3(layer: Stored, leaf: str) -> Tensor:
    """The codes of a tensor of e4m3, uint8; raises ``ValueError`` where one is NaN."""
    codes = layer.read(leaf).view(torch.uint8)
    if bool(((codes & 0x7F) == 0x7F).any()):
        raise ValueError(f"{layer.where(leaf)}: must be finite: it holds NaN (code 0x7f or 0xff)")
    return codes


def read_scales(layer: Stored, leaf: str) -> Tensor:
    """Scales as they are stored; exponent bytes as float32. Raises ``ValueError`` for an exponent that is NaN."""
    stored = layer.read(leaf)
    if stored.dtype not in EXPONENTS:
        return stored
    exponents = stored.view(torch.uint8)
    if bool((exponents == 255).any()):
        raise ValueError(f"{layer.where(leaf)}: must be finite: it holds NaN (exponent 255)")
    return exponent_table()[exponents.long()]


def e4m3_format(n: int, k: int, size: int, scale_dtype: torch.dtype) -> CodebookFormat:
    """The form of a weight of e4m3 with one scale for each ``size`` columns of a row."""
    scales = "float32" if scale_dtype in EXPONENTS else dtype_name(scale_dtype)
    return CodebookFormat(8, n, k, size, "tensor", "float32", scales)


def e4m3_weight(codes: Tensor, scales: Tensor, size: int) -> CodebookWeight:
    """The weight of codes ``[N, K]`` and scales ``[N, G]``."""
    return CodebookWeight(codes, e4m3_table(), scales.contiguous(), size if scales.shape[1] > 1 else None)


def mxfp4_format(n: int, k: int) -> CodebookFormat:
    """The form of a weight of e2m1 with an exponent for each 32 columns: the scales are bfloat16, exactly."""
    return CodebookFormat(4, n, k, min(MX_GROUP, k), "tensor", "float32", "bfloat16")


def mxfp4_weight(packed: Tensor, scales: Tensor) -> CodebookWeight:
    """The weight of bytes ``[N, K/2]`` and scales ``[N, K/32]``."""
    size = MX_GROUP if scales.shape[1] > 1 else None
    return CodebookWeight(nibbles(packed), torch.tensor(E2M1).view(1, 1, 16), scales.bfloat16(), size)


def nvfp4_format(n: int, k: int) -> CodebookFormat:
    """The form of a weight of e2m1 with a scale of e4m3 for each 16 columns, and one for the tensor: nested scales."""
    return CodebookFormat(4, n, k, min(NV_GROUP, k), "tensor", "float32", "nested")


def nvfp4_weight(packed: Tensor, scales: Tensor, whole: Tensor, *, divided: bool = False) -> CodebookWeight:
    """The weight of bytes ``[N, K/2]``, scales as codes of e4m3 ``[N, K/16]``, and the scale of the tensor, float32.

    A scale is ``e4m3 * whole``, or where ``divided`` ``e4m3 / whole``, in float32. It is held nested, as
    ``table[code] * factor + 0``. The table is that of e4m3, which others may share, where that is exact; else it has
    the quotients.
    """
    n, groups = scales.shape
    table, whole = e4m3_table().flatten(), whole.reshape(1)
    factor = whole.reciprocal() if divided else whole
    if divided and not torch.equal(table * factor, table / whole):
        table, factor = table / whole, torch.ones(1)
    return CodebookWeight(
        nibbles(packed), torch.tensor(E2M1).view(1, 1, 16), scales, NV_GROUP if groups > 1 else None,
        scale_codebook=table, scale_absmax=factor.repeat(-(-n * groups // NESTED_BLOCK)), scale_offset=torch.zeros(1),
    )  # fmt: skip


def check_whole(layer: Stored, leaf: str, *, divided: bool = False) -> Tensor:
    """The scale of the tensor; raises ``ValueError`` where a scale would not be finite."""
    whole, table = layer.read(leaf), e4m3_table()
    found = table / whole.reshape(1) if divided else table * whole.reshape(1)
    if not bool(found.isfinite().all()):
        what = "quotients" if divided else "products"
        raise ValueError(f"{layer.where(leaf)}: must be finite, and so must its {what} with numbers of e4m3: got "
                         f"{whole.tolist()}")  # fmt: skip
    return whole


def nibbles(packed: Tensor) -> Tensor:
    """The codes ``[N, K]`` of bytes ``[N, K/2]``."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1)


def by_rows(scales: Tensor, block_rows: int, n: int) -> Tensor:
    """Scales ``[ceil(N / block_rows), G]`` of blocks, as ``[N, G]``."""
    return scales.repeat_interleave(block_rows, 0)[:n]
