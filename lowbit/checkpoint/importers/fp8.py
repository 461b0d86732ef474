"""FP8 (``quant_method: fp8``), as DeepSeek stores its models and transformers reads them: e4m3 with scales.

    w[n, k] = weight[n, k] * scale[n // rows, k // columns],    [rows, columns] = weight_block_size

    weight            float8_e4m3fn [N, K]
    weight_scale_inv  [ceil(N/rows), ceil(K/columns)]; without blocks one value, or [N, 1]. float32, float16,
                      bfloat16, or exponent bytes (``scale_fmt: ue8m0``). Others call it ``weight_scale``
    activation_scale, input_scale  of the activations: not used

Where the config has no weight_block_size, it is [128, 128] for ``weight_scale_inv``, and none for ``weight_scale``.
What the format does with x is not done: x stays float.

Source: github.com/huggingface/transformers (integrations/finegrained_fp8.py: Fp8Dequantize);
github.com/deepseek-ai/DeepSeek-V3 (inference/kernel.py: weight_dequant).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lowbit.checkpoint.importers.folder import Reader, Stored
from lowbit.checkpoint.importers.small_floats import (
    E4M3,
    SCALES,
    by_rows,
    e4m3_format,
    e4m3_weight,
    read_e4m3,
    read_scales,
)
from lowbit.checkpoint.reader import Entry
from lowbit.codebook.format import CodebookFormat, CodebookWeight

NOTE = "float8 activations of the folder are not done: x stays float"
_SCALES = ("weight_scale_inv", "weight_scale")
_BLOCK = (128, 128)


class Fp8(Reader):
    format = "fp8"
    signs = _SCALES

    def __init__(self, section: dict[str, Any], file: Path) -> None:
        super().__init__(section, file)
        self.one_of(["fmt"], "e4m3", ("e4m3", "e4m3fn"))
        self.scale_format = self.one_of(["scale_fmt"], "float", ("float", "ue8m0"))
        self.one_of(["activation_scheme"], "dynamic", ("dynamic", "static"))
        block = section.get("weight_block_size")
        sizes = block if isinstance(block, list) else []
        if block is not None and (len(sizes) != 2 or not all(type(size) is int and size >= 1 for size in sizes)):
            raise self.refusal("weight_block_size", "null or two sizes of at least 1", block)
        self.block: tuple[int, int] | None = (sizes[0], sizes[1]) if sizes else None
        self.has_default = "weight_block_size" not in section

    def leaves(self, name: str, entries: dict[str, Entry]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        scale = next((leaf for leaf in _SCALES if f"{name}.{leaf}" in entries), _SCALES[0])
        return ("weight", scale), ("activation_scale", "input_scale")

    def float_shape(self, name: str, entries: dict[str, Entry]) -> tuple[int, int]:
        n, k = entries[f"{name}.weight"].shape
        return n, k

    def _scale(self, layer: Stored) -> tuple[str, tuple[int, int] | None]:
        """The leaf of the scales, and the block of one."""
        leaf = next(leaf for leaf in _SCALES if leaf in layer)
        return leaf, _BLOCK if self.has_default and leaf == _SCALES[0] else self.block

    def check(self, layer: Stored) -> CodebookFormat:
        n, k, (scale, block) = layer.n, layer.k, self._scale(layer)
        why = f"[N, K] = [{n}, {k}], weight_block_size={block and list(block)} by {self.file.name}"
        layer.check("weight", (n, k), [E4M3], why)
        size = k if block is None else min(block[1], k)
        if layer.dtype(scale) == torch.uint8 and self.scale_format != "ue8m0":
            raise ValueError(f"{layer.where(scale)}: dtype torch.uint8 is that of exponents: {self.file.name} must say "
                             f"scale_fmt='ue8m0': got {self.scale_format!r}")  # fmt: skip
        if block is None:
            layer.check(scale, (), SCALES, why, (1,), (1, 1), (n, 1))
        else:
            layer.check(scale, (-(-n // block[0]), -(-k // size)), SCALES, why)
        return e4m3_format(n, k, size, layer.dtype(scale))

    def weight(self, layer: Stored) -> tuple[CodebookWeight, str | None]:
        n, k, (leaf, block) = layer.n, layer.k, self._scale(layer)
        scales = read_scales(layer, leaf)
        if block is None:
            scales, block = scales.reshape(-1, 1), (n if scales.numel() == 1 else 1, k)
        return e4m3_weight(read_e4m3(layer, "weight"), by_rows(scales, block[0], n), min(block[1], k)), NOTE
