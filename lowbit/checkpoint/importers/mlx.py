"""MLX (``quantization`` in config.json), the mode ``affine``: 2, 3, 4, 5, 6 and 8 bits, groups along K; embeddings too.

    w[n, k] = code[n, k] * scale[n, g] + bias[n, g],    g = k // group_size

    weight          uint32 [N, K*b/32]   the stream of the codes of each row, least significant bit first
    scales, biases  [N, G]

The section may have an object of its own for a layer, or false where that stays float.

Source: github.com/ml-explore/mlx (mlx/backend/cpu/quantized.cpp, python/mlx/nn/layers/quantized.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lowbit.checkpoint.importers.folder import Reader, Stored, unpack_rows
from lowbit.checkpoint.reader import Entry
from lowbit.core.family import FLOAT_DTYPES, dtype_name
from lowbit.packed.format import PackedFormat, PackedWeight

BITS = (2, 3, 4, 5, 6, 8)


class Mlx(Reader):
    format = "mlx"
    signs = ("biases",)
    required = ("weight", "scales", "biases")

    def __init__(self, section: dict[str, Any], file: Path) -> None:
        super().__init__(section, file)
        self.one_of(["mode"], "affine", ("affine",))

    def _sizes(self, name: str) -> tuple[int, int]:
        own = self.section.get(name)
        said = {**self.section, **own} if isinstance(own, dict) else self.section
        bits, size = said.get("bits"), said.get("group_size")
        if bits not in BITS or type(size) is not int or size < 1 or said.get("mode", "affine") != "affine":
            raise ValueError(f"{self.file}: quantization: {name!r} must have bits of {', '.join(map(str, BITS))}, a "
                             f"group_size and the mode 'affine': got bits={bits!r:.50}, group_size={size!r:.50}, "
                             f"mode={said.get('mode')!r:.50}")  # fmt: skip
        return bits, size

    def float_shape(self, name: str, entries: dict[str, Entry]) -> tuple[int, int]:
        n, words = entries[f"{name}.weight"].shape
        return n, words * 32 // self._sizes(name)[0]

    def check(self, layer: Stored) -> PackedFormat:
        (bits, size), n, k = self._sizes(layer.name), layer.n, layer.k
        why = f"[N, K] = [{n}, {k}], bits={bits}, group_size={size} by {self.file.name}"
        if k % size or k * bits % 32:
            raise ValueError(f"{layer.where('weight')}: group_size must divide K, and words be full ({why})")
        layer.check("weight", (n, k * bits // 32), [torch.uint32], why)
        for leaf in ("scales", "biases"):
            layer.check(leaf, (n, k // size), list(FLOAT_DTYPES.values()), why)
        dtype = torch.promote_types(layer.dtype("scales"), layer.dtype("biases"))
        return PackedFormat(bits, n, k, size, "row" if size == k else "group", "minimum", dtype_name(dtype))

    def weight(self, layer: Stored) -> tuple[PackedWeight, str | None]:
        (bits, size), k = self._sizes(layer.name), layer.k
        codes = unpack_rows(layer.read("weight").view(torch.int32), bits, k)
        dtype = torch.promote_types(layer.dtype("scales"), layer.dtype("biases"))
        scales, minima = layer.read("scales").to(dtype), -layer.read("biases").to(dtype)
        return PackedWeight(codes, scales, minima, bits, None if size == k else size, minimum=True), None
