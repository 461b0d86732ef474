"""NVIDIA's Model Optimizer (``quant_method: modelopt``, or ``hf_quant_config.json``): NVFP4 and FP8.

    w[n, k] = value(code[n, k]) * scale[n, k // group_size]

NVFP4, where the weight is uint8:

    weight          uint8 [N, K/2]          two codes of e2m1, the first in the lower bits
    weight_scale    float8_e4m3fn [N, K/16]
    weight_scale_2  float32                 the scale of a group is weight_scale * weight_scale_2 in float32

FP8, where it is float8_e4m3fn [N, K]:

    weight_scale    one, [N], [ceil(N/128), 1, ceil(K/128), 1] (FP8_PB_WO), or uint8 [N, K/32], exponents (MXFP8)

    input_scale, k_scale, v_scale  of activations and the cache: not used

Neither activations nor the cache are quantized: the layers note it.

Source: github.com/NVIDIA/Model-Optimizer (modelopt/torch/quantization/qtensor: dequantize; modelopt/torch/export).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lowbit.checkpoint.importers.folder import Reader, Stored
from lowbit.checkpoint.importers.small_floats import (
    E4M3,
    MX_GROUP,
    NV_GROUP,
    by_rows,
    check_whole,
    e4m3_format,
    e4m3_weight,
    nvfp4_format,
    nvfp4_weight,
    read_e4m3,
    read_scales,
)
from lowbit.checkpoint.reader import Entry
from lowbit.codebook.format import CodebookFormat, CodebookWeight
from lowbit.core.family import FLOAT_DTYPES

ALGORITHMS = ("NVFP4", "W4A16_NVFP4", "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8", "MIXED_PRECISION")
_BLOCK = 128
_FLOATS = list(FLOAT_DTYPES.values())


class Modelopt(Reader):
    format = "modelopt"
    signs = ("weight_scale",)

    def __init__(self, section: dict[str, Any], file: Path) -> None:
        super().__init__(section, file)
        self.algorithm = str(section.get("quant_algo")).upper()
        if self.algorithm not in ALGORITHMS:
            raise self.refusal("quant_algo", " or ".join(map(repr, ALGORITHMS)), section.get("quant_algo"))
        size = section.get("group_size")
        if size not in (None, NV_GROUP) and self.algorithm.endswith("NVFP4"):
            raise self.refusal("group_size", str(NV_GROUP), size)

    def leaves(self, name: str, entries: dict[str, Entry]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        weight = entries.get(f"{name}.weight")
        more = ("weight_scale_2",) if weight is not None and weight.dtype == torch.uint8 else ()
        return ("weight", "weight_scale", *more), ("input_scale", "k_scale", "v_scale")

    def float_shape(self, name: str, entries: dict[str, Entry]) -> tuple[int, ...]:
        weight = entries[f"{name}.weight"]
        n, width = weight.shape
        return n, width * (2 if weight.dtype == torch.uint8 else 1)

    def check(self, layer: Stored) -> CodebookFormat:
        n, k = layer.n, layer.k
        why = f"[N, K] = [{n}, {k}], quant_algo={self.algorithm!r} by {self.file.name}"
        if layer.dtype("weight") == torch.uint8:
            if k % 2:
                raise ValueError(f"{layer.where('weight')}: K must be even: got K={k}")
            layer.check("weight", (n, k // 2), [torch.uint8], why)
            layer.check("weight_scale", (n, -(-k // NV_GROUP)), [E4M3], why)
            layer.check("weight_scale_2", (), [torch.float32], "one for the tensor", (1,))
            return nvfp4_format(n, k)
        layer.check("weight", (n, k), [E4M3], why)
        if layer.dtype("weight_scale") == torch.uint8:
            layer.check("weight_scale", (n, -(-k // MX_GROUP)), [torch.uint8], why)
            return e4m3_format(n, k, min(MX_GROUP, k), torch.uint8)
        blocks = (-(-n // _BLOCK), 1, -(-k // _BLOCK), 1)
        layer.check("weight_scale", (), _FLOATS, why, (1,), (n,), (n, 1), blocks)
        is_block = len(layer.shape("weight_scale")) == 4
        return e4m3_format(n, k, min(_BLOCK, k) if is_block else k, layer.dtype("weight_scale"))

    def weight(self, layer: Stored) -> tuple[CodebookWeight, str | None]:
        note = None
        if "16" not in self.algorithm.partition("_")[0]:  # W4A16: x is float there, too
            note = "activations of few bits that the folder may ask for are not done: x stays float"
        if "k_scale" in layer or "v_scale" in layer:
            note = "; ".join(filter(None, (note, "the cache of keys and values stays float")))
        n, k = layer.n, layer.k
        if layer.dtype("weight") == torch.uint8:
            whole = check_whole(layer, "weight_scale_2")
            return nvfp4_weight(layer.read("weight"), read_e4m3(layer, "weight_scale"), whole), note
        scales, rows, size = read_scales(layer, "weight_scale"), 1, MX_GROUP
        if scales.dim() == 4:
            scales, rows, size = scales[:, 0, :, 0], _BLOCK, _BLOCK
        elif layer.dtype("weight_scale") != torch.uint8:
            scales, rows = scales.reshape(-1, 1), n if scales.numel() == 1 else 1
        return e4m3_weight(read_e4m3(layer, "weight"), by_rows(scales, rows, n), min(size, k)), note
