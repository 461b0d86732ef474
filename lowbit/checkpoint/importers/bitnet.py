"""BitNet b1.58 (``quant_method: bitnet``), as transformers stores it: ternary weights, one scale per tensor.

    w[n, k] = (code[n, k] - 1) / weight_scale    linear_class "bitlinear"
    w[n, k] = (code[n, k] - 1) * weight_scale    linear_class "autobitlinear", quantization_mode "offline"

    weight        uint8 [N/4, K]   bits 2i and 2i + 1 of row r are the code, 0 to 2, of row r + i*N/4
    weight_scale  [1]

x is rounded to int8, by the largest of each token, as there.

Source: github.com/huggingface/transformers (integrations/bitnet.py: unpack_weights, BitLinear, AutoBitLinear).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lowbit.checkpoint.importers.folder import Reader, Stored
from lowbit.checkpoint.reader import Entry
from lowbit.core.family import FLOAT_DTYPES
from lowbit.packed.format import PackedFormat, PackedWeight

_PER_BYTE = 4


class BitNet(Reader):
    format = "bitnet"
    signs = ("weight_scale",)
    required = ("weight", "weight_scale")

    def __init__(self, section: dict[str, Any], file: Path) -> None:
        super().__init__(section, file)
        self.divides = self.one_of(["linear_class"], "bitlinear", ("bitlinear", "autobitlinear")) == "bitlinear"
        self.one_of(["quantization_mode"], "offline", ("offline",))
        if section.get("use_rms_norm"):
            raise self.refusal("use_rms_norm", "false", section["use_rms_norm"])

    def float_shape(self, name: str, entries: dict[str, Entry]) -> tuple[int, int]:
        rows, k = entries[f"{name}.weight"].shape
        return _PER_BYTE * rows, k

    def check(self, layer: Stored) -> PackedFormat:
        why = f"[N, K] = [{layer.n}, {layer.k}], 4 rows in one"
        layer.check("weight", (-(-layer.n // _PER_BYTE), layer.k), [torch.uint8], why)
        layer.check("weight_scale", (1,), list(FLOAT_DTYPES.values()), "one per tensor", ())
        return replace(PackedFormat(2, layer.n, layer.k, layer.k, "tensor"), activations="int8")

    def weight(self, layer: Stored) -> tuple[PackedWeight, str | None]:
        packed, scale = layer.read("weight"), layer.read("weight_scale").float().reshape(1, 1)
        codes = torch.cat([(packed >> (2 * i)) & 3 for i in range(_PER_BYTE)])[: layer.n]
        if bool((codes == 3).any()):
            raise ValueError(f"{layer.where('weight')}: must hold codes of 0 to 2: got 3")
        if self.divides and float(scale) == 0:
            raise ValueError(f"{layer.where('weight_scale')}: must not be 0: the weight is divided by it")
        return PackedWeight(codes + 1, 1 / scale if self.divides else scale, None, 2), None
