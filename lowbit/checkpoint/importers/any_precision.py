"""any-precision: a table of values for each row, and codes whose first b bits are the codes of b bits.

    w[n, k] = lut<b>[n, code[n, k] >> (parent - b)],    here b = parent_precision

    qweight   int32 [parent, N, K/32]   a plane for each bit of the codes, the highest first
    lut<b>    float16 [N, 2**b]         for each b from seed_precision to parent_precision

Within a plane the bytes of a row, which have 8 columns each and the first in the highest bit, stand in blocks of 4*T
bytes, T = 32, the last block with T = what is left / 4: byte i of a block is byte ``4 * (i % T) + (i // T ^ 3)`` there.

The config is ``anyprec`` of config.json. The finest codes are read; tables of fewer bits are not needed.

Source: github.com/SNU-ARC/any-precision-llm (any_precision/quantization/pack.py; modules/AnyPrecisionLinear.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.importers.folder import Reader, Stored
from lowbit.checkpoint.reader import Entry
from lowbit.codebook.format import CodebookFormat, CodebookWeight
from lowbit.core.family import FLOAT_DTYPES, dtype_name

_THREADS = 32


class AnyPrecision(Reader):
    format = "any-precision"
    signs = tuple(f"lut{bits}" for bits in range(2, 9))
    required = ("qweight",)
    sizes = 3

    def __init__(self, section: dict[str, Any], file: Path) -> None:
        super().__init__(section, file)
        self.bits = self.integer(["parent_precision"], "2 to 8", lambda bits: 2 <= bits <= 8)
        seed = self.integer(["seed_precision"], f"2 to {self.bits}", lambda bits: 2 <= bits <= self.bits)
        if section.get("group_count", 1) != 1:
            raise self.refusal("group_count", "1", section["group_count"])
        self.seed = seed

    def leaves(self, name: str, entries: dict[str, Entry]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return ("qweight", f"lut{self.bits}"), tuple(f"lut{bits}" for bits in range(self.seed, self.bits))

    def float_shape(self, name: str, entries: dict[str, Entry]) -> tuple[int, int]:
        shape = entries[f"{name}.qweight"].shape
        return shape[-2], shape[-1] * 32

    def check(self, layer: Stored) -> CodebookFormat:
        n, k, bits = layer.n, layer.k, self.bits
        why = f"[N, K] = [{n}, {k}], parent_precision {bits} by {self.file.name}"
        layer.check("qweight", (bits, n, k // 32), [torch.int32], why)
        layer.check(f"lut{bits}", (n, 1 << bits), list(FLOAT_DTYPES.values()), why)
        return CodebookFormat(bits, n, k, k, "row", dtype_name(layer.dtype(f"lut{bits}")))

    def weight(self, layer: Stored) -> tuple[CodebookWeight, str | None]:
        planes = layer.read("qweight")
        codes = torch.zeros(layer.n, layer.k, dtype=torch.uint8)
        for plane in planes:
            codes = codes * 2 + columns_of(plane)
        return CodebookWeight(codes, layer.read(f"lut{self.bits}")[:, None].contiguous()), None


def columns_of(plane: Tensor) -> Tensor:
    """The bits of a plane ``[N, K/32]`` as uint8 ``[N, K]``."""
    bytes = plane.contiguous().view(torch.uint8)
    count = bytes.shape[1]
    place = torch.arange(count)
    whole = count // (4 * _THREADS) * 4 * _THREADS
    threads = torch.where(place < whole, _THREADS, max(1, (count - whole) // 4))
    block = torch.where(place < whole, place // (4 * _THREADS) * 4 * _THREADS, whole)
    within = place - block
    in_order = bytes[:, block + within % threads * 4 + (within // threads ^ 3)]
    return (in_order[..., None] >> torch.arange(7, -1, -1, dtype=torch.uint8) & 1).flatten(1)
