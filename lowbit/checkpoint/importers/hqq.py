"""HQQ (``quant_method: hqq``), as transformers stores it: 2, 3, 4 and 8 bits, groups along K (``axis: 1``).

    w.view(-1, group_size)[j] = (code[j] - zero[j]) * scale[j],    j = n * G + k // group_size

    W_q          the codes [N*G, group_size], of b bits: parts of equal numbers of rows lie in the bits of one word,
                 the first part in the highest. uint8 [N*G*b/8, group_size]; at 3 bits ten parts in int32, filled up
    scale, zero  [N*G, 1]
    nbits, axis, shape, group_size, ...   numbers, each as a tensor

Source: github.com/mobiusml/hqq (hqq/core/quantize.py: Quantizer.dequantize, HQQLinear.state_dict; core/bitpack.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lowbit.checkpoint.importers.folder import Reader, Stored
from lowbit.checkpoint.reader import Entry
from lowbit.core.family import FLOAT_DTYPES, Granularity, dtype_name
from lowbit.packed.format import PackedFormat, PackedWeight

_PARTS = {8: 1, 4: 2, 3: 10, 2: 4}  # bits -> codes in a word
_NUMBERS = ("nbits", "axis", "shape")
_SAID = ("group_size",)
_MUST_BE_0 = ("view_as_float", "quant_scale", "quant_zero")


class Hqq(Reader):
    format = "hqq"
    signs = ("W_q",)
    required = ("W_q", "scale", "zero", *_NUMBERS)
    optional = (
        *_MUST_BE_0, *_SAID, "packing", "unpack_view_dtype", "compute_dtype", "offload_meta",
        "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero",
    )  # fmt: skip

    def __init__(self, section: dict[str, Any], file: Path) -> None:
        super().__init__(section, file)

    def float_shape(self, name: str, entries: dict[str, Entry]) -> tuple[int, int]:
        rows, columns = entries[f"{name}.W_q"].shape
        return rows, columns

    def check(self, layer: Stored) -> PackedFormat:
        n, k = layer.n, layer.k
        said = {leaf: layer.read(leaf).flatten().tolist() for leaf in (*_NUMBERS, *_SAID, *_MUST_BE_0)
                if leaf in layer}  # fmt: skip
        if said["shape"] != [n, k]:
            raise ValueError(f"{layer.where('shape')}: must be [N, K] = [{n}, {k}]: got {said['shape']}")
        if said["nbits"] not in [[bits] for bits in _PARTS]:
            raise ValueError(f"{layer.where('nbits')}: must be 2, 3, 4 or 8: got {said['nbits']}")
        if said["axis"] != [1]:
            raise ValueError(f"{layer.where('axis')}: must be 1, groups along a row: got {said['axis']}. Give the "
                             "float model")  # fmt: skip
        for leaf in _MUST_BE_0:
            if said.get(leaf, [0]) != [0]:
                raise ValueError(f"{layer.where(leaf)}: must be 0: got {said[leaf]}. Give the float model")
        bits = said["nbits"][0]
        _, size = layer.checkpoint.entries[f"{layer.name}.W_q"].shape
        if size < 1 or k % size:
            raise ValueError(f"{layer.where('W_q')}: its columns must divide K = {k}: got {size}")
        if said.get("group_size", [size]) != [size]:
            raise ValueError(f"{layer.where('group_size')}: must be the columns of W_q, {size}: got "
                             f"{said['group_size']}")  # fmt: skip
        rows, why = n * k // size, f"[N, K] = [{n}, {k}], nbits={bits}, groups of {size}"
        layer.check("W_q", (-(-rows // _PARTS[bits]), size), [torch.int32 if bits == 3 else torch.uint8], why)
        layer.check("scale", (rows, 1), list(FLOAT_DTYPES.values()), why)
        layer.check("zero", (rows, 1), [layer.dtype("scale")], why)
        granularity: Granularity = "row" if size == k else "group"
        return PackedFormat(bits, n, k, size, granularity, "float", dtype_name(layer.dtype("scale")))

    def weight(self, layer: Stored) -> tuple[PackedWeight, str | None]:
        bits, words, n, k = int(layer.read("nbits")), layer.read("W_q"), layer.n, layer.k
        parts, mask = _PARTS[bits], (1 << bits) - 1
        codes = torch.cat([((words >> (bits * (parts - 1 - i))) & mask).to(torch.uint8) for i in range(parts)])
        scales, zeros = (layer.read(leaf).view(n, -1) for leaf in ("scale", "zero"))
        size = words.shape[1]
        codes = codes[: n * k // size].view(n, k)
        return PackedWeight(codes, scales, zeros, bits, None if size == k else size), None
