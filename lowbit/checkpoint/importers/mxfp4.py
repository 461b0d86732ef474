"""MXFP4 (``quant_method: mxfp4``), as gpt-oss stores its experts: e2m1 with an exponent for each 32 columns.

    w[e, n, k] = value(code[e, n, k]) * 2**(scales[e, n, k // 32] - 127)

    *_blocks  uint8 [E, N, K/32, 16]   code k of a row is in byte k // 2 of its K/2 bytes, first in the lower four bits
    *_scales  uint8 [E, N, K/32]

``*`` is the name of the Parameter, such as ``gate_up_proj``; transformers holds it as [E, K, N].

Source: github.com/huggingface/transformers (integrations/mxfp4.py: convert_moe_packed_tensors);
github.com/openai/gpt-oss (gpt_oss/torch/weights.py).
"""

from __future__ import annotations

import torch

from lowbit.checkpoint.importers.folder import Reader, Stored
from lowbit.checkpoint.importers.small_floats import EXPONENTS, MX_GROUP, mxfp4_format, mxfp4_weight, read_scales
from lowbit.checkpoint.reader import Entry
from lowbit.codebook.format import CodebookFormat, CodebookWeight


class Mxfp4(Reader):
    format = "mxfp4"
    signs = ("blocks",)
    required = ("blocks", "scales")
    separator = "_"
    sizes = 4

    def float_shape(self, name: str, entries: dict[str, Entry]) -> tuple[int, ...]:
        e, n, groups, width = entries[f"{name}_blocks"].shape
        return e, n, groups * width * 2

    def check(self, layer: Stored) -> CodebookFormat:
        n, k = layer.n, layer.k
        why = f"[E, N, K] = [{layer.num_experts}, {n}, {k}], groups of {MX_GROUP}"
        layer.check("blocks", (n, -(-k // MX_GROUP), MX_GROUP // 2), [torch.uint8], why)
        layer.check("scales", (n, -(-k // MX_GROUP)), EXPONENTS, why)
        if k % MX_GROUP:
            raise ValueError(f"{layer.where('blocks')}: K must be a multiple of {MX_GROUP}: got K={k}")
        return mxfp4_format(n, k)

    def weight(self, layer: Stored) -> tuple[CodebookWeight, str | None]:
        return mxfp4_weight(layer.read("blocks").flatten(1), read_scales(layer, "scales")), None
