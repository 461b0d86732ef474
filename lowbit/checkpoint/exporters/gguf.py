"""GGUF, written: the types that hold a packed weight bit for bit, and the container.

Types and layouts are those of :mod:`lowbit.checkpoint.importers.gguf`. With ``e = code - zero``, a whole number,

    w = e * scale    Q4_0 where all e are in [-8, 7], Q5_0 in [-16, 15], Q8_0 in [-128, 127]

so 2 and 3 bits become Q4_0, and 4 bits with whole zeros Q5_0. One scale for a row, or for more than 32 columns, is
written for each 32. Q4_1 and Q5_1 hold minima, ``scale * code + m``; with float zeros they do where
``m = -zero * scale`` is a value of float16 and nothing is rounded. Scales of two levels are those of Q4_K, Q5_K and
Q6_K, in their groups and blocks; other blocks have no type.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.exporters.exporter import exact_in, stored
from lowbit.checkpoint.importers.gguf.container import ALIGNMENT, MAGIC, TYPES
from lowbit.checkpoint.importers.gguf.types import E2M1, IQ4
from lowbit.codebook.format import CodebookFormat
from lowbit.core.bitpack import unpack
from lowbit.nn.layer import Layer
from lowbit.packed.format import PackedFormat

GROUP = 32
_IDS = {name: (number, size, nbytes) for number, (name, size, nbytes) in TYPES.items()}
_RANGES = (("Q4_0", -8, 7), ("Q5_0", -16, 15), ("Q8_0", -128, 127))
_VERSION = 3


def row_bytes(type_name: str, k: int) -> int:
    _, size, nbytes = _IDS[type_name]
    return k // size * nbytes


def encoded(layer: Layer) -> tuple[str, Tensor] | str:
    """The type of a layer and its blocks, ``uint8 [rows, bytes of a row]``; or why no type holds it."""
    format, held = layer.format, stored(layer)
    if not isinstance(format, (PackedFormat, CodebookFormat)):
        return f"must be of the families 'packed' or 'codebook': it is {format.describe()}"
    if getattr(format, "act_order", False):
        return "must have its columns in the order of x: it has act-order"
    if format.outliers:
        return f"must have no outliers: it has {format.outliers}"
    if format.activations != "float":
        return f"must have float activations: it has {format.activations}"
    k, size = format.in_features, format.group_size
    if getattr(format, "scale_codes", None) is None and (k % GROUP or (size % GROUP and size != k)):
        return f"K and group_size must be multiples of {GROUP}: got K={k}, group_size={size}"
    codes = unpack(held["packed"], format.bits, k)
    if isinstance(format, PackedFormat) and format.scale_codes is not None:
        return _of_levels(format, codes, held)
    if isinstance(format, CodebookFormat):
        return _of_codebook(format, codes, held)
    scales = _by_group(held["scales"].float(), codes, size)
    if not exact_in(scales, torch.float16):
        return "its scales must be values of float16: some are not"
    if format.zeros == "minimum":
        return _of_minima(format, codes, scales, -_by_group(held["zeros"].float(), codes, size))
    if format.zeros == "float":
        return _of_float_zeros(format, codes, scales, _by_group(held["zeros"].float(), codes, size))
    zeros = held.get("zeros", torch.full_like(held["scales"], 1 << (format.bits - 1)))
    whole = codes.short() - _by_group(zeros.short(), codes, size).repeat_interleave(GROUP, 1)
    low, high = (int(whole.min()), int(whole.max())) if whole.numel() else (0, 0)
    for name, smallest, largest in _RANGES:
        if smallest <= low and high <= largest:
            return name, _blocks(name, (whole - smallest).to(torch.uint8), scales.half())
    return f"code - zero must be in [-128, 127]: got values in [{low}, {high}]"


def _by_group(values: Tensor, codes: Tensor, size: int) -> Tensor:
    """One value for each 32 columns."""
    n, k = codes.shape
    values = values.expand(n, -1)
    return values.expand(n, k // GROUP) if values.shape[1] == 1 else values.repeat_interleave(size // GROUP, 1)[
        :, : k // GROUP]  # fmt: skip


def _of_codebook(format: CodebookFormat, codes: Tensor, held: Mapping[str, Tensor]) -> tuple[str, Tensor] | str:
    if format.granularity != "tensor" or format.bits != 4 or format.scales in ("none", "nested"):
        return f"must be a 4-bit table of GGUF with a scale per group: it is {format.describe()}"
    table, scales = held["codebook"].float().flatten(), _by_group(held["scales"].float(), codes, format.group_size)
    if torch.equal(table, torch.tensor(IQ4)) and exact_in(scales, torch.float16):
        return "IQ4_NL", _blocks("IQ4_NL", codes, scales.half())
    ratio = next((factor for factor in (1.0, 2.0) if torch.equal(table * factor, torch.tensor(E2M1))), None)
    if ratio is None:
        return "its table must be that of IQ4_NL or of MXFP4: it is another"
    mantissa, exponent = torch.frexp(scales / ratio)
    exponents = exponent - 1 + 128
    if bool((mantissa != 0.5).any()) or bool((exponents < 0).any()) or bool((exponents > 254).any()):
        return "its scales must be powers of 2 that a byte holds (MXFP4), or values of float16 (IQ4_NL)"
    return "MXFP4", _blocks("MXFP4", codes, exponents.to(torch.uint8))


def _of_float_zeros(format: PackedFormat, codes: Tensor, scales: Tensor, zeros: Tensor) -> tuple[str, Tensor] | str:
    minimum = -(zeros.double() * scales.double())
    index = torch.arange(codes.shape[1]) // GROUP
    exact = codes.double() * scales.double()[:, index] + minimum[:, index]
    is_exact = (exact_in(minimum, torch.float16) and exact_in(exact, torch.float32)
                and torch.equal((codes.float() - zeros[:, index]) * scales[:, index], exact.float()))  # fmt: skip
    if not is_exact or format.bits > 5:
        return "must have whole zeros or none: its float zeros are not exact in Q4_1 or Q5_1"
    name = "Q4_1" if format.bits <= 4 else "Q5_1"
    return name, _blocks(name, codes, scales.half(), minimum.half())


def _of_minima(format: PackedFormat, codes: Tensor, scales: Tensor, added: Tensor) -> tuple[str, Tensor] | str:
    if format.bits > 5:
        return f"must have at most 5 bits beside minima: it has {format.bits}"
    if not exact_in(added, torch.float16):
        return "its minima must be values of float16: some are not"
    name = "Q4_1" if format.bits <= 4 else "Q5_1"
    return name, _blocks(name, codes, scales.half(), added.half())


# bits, group, zeros -> the type, and the largest code of a scale
_LEVELS = {(4, 32, "minimum"): ("Q4_K", 63), (5, 32, "minimum"): ("Q5_K", 63), (6, 16, "none"): ("Q6_K", 127)}


def _of_levels(format: PackedFormat, codes: Tensor, held: Mapping[str, Tensor]) -> tuple[str, Tensor] | str:
    size, block = format.group_size, 256 // format.group_size
    name, top = _LEVELS.get((format.bits, size, format.zeros), ("", 0))
    n, k = codes.shape
    if not name or format.scale_block != block or k % 256 or (format.scale_codes == "uint8") == (name == "Q6_K"):
        return ("must have scales of two levels as Q4_K, Q5_K or Q6_K have them, in blocks of 256 columns: it is "
                f"{format.describe()}, K={k}")  # fmt: skip
    factors = [held[each] for each in ("scale_factors", "zero_factors") if each in held]
    if not all(exact_in(each.float(), torch.float16) for each in factors):
        return "the factors of its scales must be values of float16: some are not"
    scales, minima = held["scales"].view(-1, block), held.get("zeros", held["scales"]).view(-1, block)
    if max(int(scales.max()), int(minima.max())) > top:
        return f"the codes of its scales and minima must be at most {top}: some are not"
    heads = [each.half().contiguous().view(-1, 1).view(torch.uint8) for each in factors]
    blocks = codes.view(-1, 256)
    if name == "Q6_K":
        parts = [_runs(blocks & 15, 64, 4), _runs(blocks >> 4, 32, 2), scales.view(torch.uint8), *heads]
    else:
        high = [_runs(blocks >> 4, 32, 1)] if name == "Q5_K" else []
        parts = [*heads, _six_bits(scales, minima), *high, _runs(blocks & 15, 32, 4)]
    return name, torch.cat(parts, 1).view(n, -1)


def _runs(fields: Tensor, width: int, bits: int) -> Tensor:
    """Fields of ``bits`` bits, ``[B, 256]``: of each run of ``width`` bytes as many runs of fields as fit."""
    runs = fields.view(len(fields), -1, 8 // bits, width).int()
    shifts = torch.arange(0, 8, bits).view(1, 1, -1, 1)
    return (runs << shifts).sum(2).to(torch.uint8).flatten(1)


def _six_bits(scales: Tensor, minima: Tensor) -> Tensor:
    """Twelve bytes of the scales and minima ``[B, 8]``, of six bits."""
    low, high = (scales[:, :4], minima[:, :4]), (scales[:, 4:], minima[:, 4:])
    first = [each | ((above >> 4) << 6) for each, above in zip(low, high, strict=True)]
    return torch.cat([*first, (high[0] & 15) | ((high[1] & 15) << 4)], 1)


def _blocks(name: str, codes: Tensor, scales: Tensor, minima: Tensor | None = None) -> Tensor:
    n, k = codes.shape
    grouped = codes.view(n * k // GROUP, GROUP)
    heads = [part.contiguous().view(-1, 1).view(torch.uint8) for part in (scales, minima) if part is not None]
    if name == "Q8_0":
        parts = [*heads, grouped ^ 128]
    else:
        nibbles = (grouped & 15)[:, : GROUP // 2] | ((grouped & 15)[:, GROUP // 2 :] << 4)
        parts = [*heads, *([_fifth_bits(grouped >> 4)] if name.startswith("Q5") else []), nibbles]
    return torch.cat(parts, 1).view(n, -1)


def _fifth_bits(bits: Tensor) -> Tensor:
    """Bit i of four bytes is ``bits[:, i]``."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return (bits.view(-1, 4, 8) << shifts).sum(2, dtype=torch.int32).to(torch.uint8)


# ------------------------------------------------------------------------------------------------------- the container


@dataclass(frozen=True)
class Planned:
    """A tensor that is to be written: its type, its shape as torch has it, and what gives its bytes."""

    type: str
    shape: tuple[int, ...]
    content: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return row_bytes(self.type, self.shape[-1]) * math.prod(self.shape[:-1])


def write(file: Path, fields: Mapping[str, Any], tensors: Mapping[str, Planned]) -> None:
    """Write a file, one tensor at a time."""
    out = bytearray(MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(fields)))
    for key, value in fields.items():
        out += _text(key) + _value(value)
    offset = 0
    for name, tensor in tensors.items():
        sizes = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        out += _text(name) + sizes + struct.pack("<IQ", _IDS[tensor.type][0], offset)
        offset += tensor.nbytes + -tensor.nbytes % ALIGNMENT
    with open(file, "wb") as stream:
        stream.write(out + bytes(-len(out) % ALIGNMENT))
        for name, tensor in tensors.items():
            content = tensor.content().contiguous().view(torch.uint8)
            if content.numel() != tensor.nbytes:
                raise ValueError(f"tensor {name!r} must have {tensor.nbytes} bytes: got {content.numel()}")
            stream.write(memoryview(content.flatten().numpy()))  # type: ignore[arg-type]
            stream.write(bytes(-tensor.nbytes % ALIGNMENT))


def _text(value: str) -> bytes:
    raw = value.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    if isinstance(value, (list, tuple)):
        return struct.pack("<I", 9) + _list(value)
    kind = _kind(value)
    return struct.pack("<I", kind) + _bare(kind, value)


def _list(values: Sequence[Any]) -> bytes:
    kind = _kind(values[0], is_listed=True) if values else 5
    return struct.pack("<IQ", kind, len(values)) + _joined(_bare(kind, value) for value in values)


def _joined(parts: Iterable[bytes]) -> bytes:
    return b"".join(parts)


def _kind(value: Any, is_listed: bool = False) -> int:
    if isinstance(value, bool):
        return 7
    if isinstance(value, int):
        return 5 if is_listed or value < 0 else 4  # int32 or uint32
    return 6 if isinstance(value, float) else 8


def _bare(kind: int, value: Any) -> bytes:
    return _text(value) if kind == 8 else struct.pack({7: "<?", 5: "<i", 4: "<I", 6: "<f"}[kind], value)
