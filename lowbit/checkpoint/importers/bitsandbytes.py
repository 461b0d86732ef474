"""bitsandbytes: NF4 and FP4 in blocks of the flattened weight, nested or not, and LLM.int8().

4 bits: w.flatten()[i] = quant_map[code[i]] * absmax[i // blocksize]

    weight                 uint8 [N*K/2, 1]   two codes in a byte, the first in the high nibble; or other dtypes
    weight.quant_map       float32 [16]
    weight.absmax          float32 [ceil(N*K / blocksize)]; nested: uint8 codes c, for which
                           absmax[j] = nested_quant_map[c[j]] * nested_absmax[j // 256] + nested_offset
    weight.quant_state...  the bytes of a JSON object: shape, blocksize, nested_offset

8 bits: w[n, k] = weight[n, k] * (SCB[n] / 127), of int8 [N, K] and float32 [N]. bitsandbytes multiplies in another
order, and so rounds in another place. It also rounds x to int8, but for outlying columns: here x stays float.

Source: github.com/bitsandbytes-foundation/bitsandbytes (functional.py: QuantState, dequantize_4bit,
int8_vectorwise_dequant).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.importers.folder import Reader, Stored
from lowbit.checkpoint.reader import Entry
from lowbit.codebook.format import NESTED_BLOCK, CodebookFormat, CodebookWeight
from lowbit.core.family import Format, Weight
from lowbit.packed.format import PackedFormat, PackedWeight

SMALLEST_GROUP = 16  # below that float32 scales take more than two bits per weight
_STATE = "weight.quant_state.bitsandbytes__"
_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
_INT8_NOTE = "x stays float: bitsandbytes rounds it to int8, but for outlying columns"


class BitsAndBytes(Reader):
    format = "bitsandbytes"
    signs = ("weight.quant_map", "SCB")
    exact = "NF4 and FP4 bit for bit; LLM.int8() to 3 · 2⁻²⁴ of the weight"

    def __init__(self, section: dict[str, Any], file: Path) -> None:
        super().__init__(section, file)
        self.one_of(["bnb_4bit_quant_type"], "nf4", ("nf4", "fp4"))

    def leaves(self, name: str, entries: dict[str, Entry]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        if f"{name}.SCB" in entries:
            return ("weight", "SCB"), ("weight_format",)
        state = next((f"{_STATE}{kind}" for kind in ("nf4", "fp4") if f"{name}.{_STATE}{kind}" in entries), None)
        return ("weight", "weight.absmax", "weight.quant_map", state or f"{_STATE}nf4"), _NESTED

    def float_shape(self, name: str, entries: dict[str, Entry]) -> tuple[int, int]:
        rows, columns = entries[f"{name}.weight"].shape
        return rows, columns

    def _state(self, layer: Stored) -> tuple[int, float]:
        """The block size, and what is added to nested scales; checked."""
        leaf = self.leaves(layer.name, layer.checkpoint.entries)[0][-1]
        try:
            state = json.loads(bytes(layer.read(leaf).numpy()))
            shape, size = state["shape"], state["blocksize"]
            inner, offset = state.get("nested_blocksize", NESTED_BLOCK), state.get("nested_offset", 0.0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{layer.where(leaf)}: must be the bytes of a JSON object with shape and blocksize "
                             f"({error!r:.100})") from None  # fmt: skip
        if shape != [layer.n, layer.k]:
            raise ValueError(f"{layer.where(leaf)}: shape must be [N, K] = [{layer.n}, {layer.k}]: got {shape!r:.100}")
        if type(size) is not int or size < 1 or inner != NESTED_BLOCK or not isinstance(offset, (int, float)):
            raise ValueError(f"{layer.where(leaf)}: blocksize must be at least 1, nested_blocksize {NESTED_BLOCK} and "
                             f"nested_offset a number: got {size!r:.50}, {inner!r:.50}, {offset!r:.50}")  # fmt: skip
        return size, float(offset)

    def check(self, layer: Stored) -> Format:
        n, k, why = layer.n, layer.k, f"[N, K] = [{layer.n}, {layer.k}]"
        if "SCB" in layer:
            layer.check("weight", (n, k), [torch.int8], why)
            layer.check("SCB", (n,), [torch.float32], why)
            if "weight_format" in layer:
                layer.check("weight_format", (), [torch.uint8, torch.int64], "one number")
                if int(layer.read("weight_format")):
                    raise ValueError(f"{layer.where('weight_format')}: must be 0, row after row: got "
                                     f"{int(layer.read('weight_format'))}")  # fmt: skip
            return PackedFormat(8, n, k, k, "row")
        size, _ = self._state(layer)
        entry = layer.checkpoint.entries[f"{layer.name}.weight"]
        if entry.nbytes != -(-n * k // 2):
            raise ValueError(f"{layer.where('weight')}: must have {-(-n * k // 2)} bytes ({why}): got {entry.nbytes}")
        group = math.gcd(k, size)
        if group < min(k, SMALLEST_GROUP):
            raise ValueError(f"{layer.where('weight')}: its blocks of {size} weights do not end with its rows of {k}: "
                             f"one scale per {group} weights would be needed. Give the float model")  # fmt: skip
        blocks, nested = -(-n * k // size), all(leaf in layer for leaf in _NESTED)
        layer.check("weight.absmax", (blocks,), [torch.uint8 if nested else torch.float32], why)
        layer.check("weight.quant_map", (16,), [torch.float32], "4 bits")
        if nested:
            layer.check("weight.nested_absmax", (-(-blocks // NESTED_BLOCK),), [torch.float32], why)
            layer.check("weight.nested_quant_map", (256,), [torch.float32], "8 bits")
        kept = nested and k % size == 0
        return CodebookFormat(4, n, k, group, "tensor", "float32", "nested" if kept else "float32")

    def weight(self, layer: Stored) -> tuple[Weight, str | None]:
        n, k = layer.n, layer.k
        if "SCB" in layer:
            scales = (layer.read("SCB") / 127)[:, None].contiguous()
            return PackedWeight(layer.read("weight").view(torch.uint8) ^ 128, scales, None, 8), _INT8_NOTE
        size, offset = self._state(layer)
        data = layer.read("weight").contiguous().view(torch.uint8).flatten()
        codes = torch.stack([data >> 4, data & 15], 1).flatten()[: n * k].view(n, k)
        absmax, group = layer.read("weight.absmax"), math.gcd(k, size)
        nested: dict[str, Tensor] = {}
        note = None
        if _NESTED[0] in layer:
            largest, table = layer.read(_NESTED[0]), layer.read(_NESTED[1])
            if k % size == 0:
                nested = {"scale_codebook": table, "scale_absmax": largest, "scale_offset": torch.tensor([offset])}
            else:
                absmax = table[absmax.long()] * largest.repeat_interleave(NESTED_BLOCK)[: len(absmax)] + offset
                note = "its nested scales are stored as float32"
        # a block may be several groups, and the last one end with the weight
        scales = absmax.repeat_interleave(size // group)[: n * k // group].view(n, -1)
        return CodebookWeight(codes, layer.read("weight.quant_map")[None, None], scales, group, **nested), note
