"""SqueezeLLM, dense-only: 3 and 4 bits, a table of values for each row.

    w[n, k] = lookup_table[n, code[n, k]]

    qweight       int32 [K*b/32, N]   column n is the stream of the codes of row n, least significant bit first
    lookup_table  [N, 2**b]

The config is ``quantization_config`` with quant_method "squeezellm", or quant_config.json with ``wbits``. The sparse
part (rows, cols, vals, full_rows) is refused.

Source: github.com/SqueezeAILab/SqueezeLLM (squeezellm/quant.py: QuantLinearLUT).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lowbit.checkpoint.importers.folder import Reader, Stored, unpack_rows
from lowbit.checkpoint.reader import Entry
from lowbit.codebook.format import CodebookFormat, CodebookWeight
from lowbit.core.family import FLOAT_DTYPES, dtype_name

_SPARSE = ("rows", "cols", "vals", "full_rows", "full_row_indices", "startrows")


class SqueezeLlm(Reader):
    format = "squeezellm"
    signs = ("lookup_table",)
    required = ("qweight", "lookup_table")
    optional = _SPARSE

    def __init__(self, section: dict[str, Any], file: Path) -> None:
        super().__init__(section, file)
        self.bits = self.integer(["wbits", "bits"], "3 or 4", lambda bits: bits in (3, 4))

    def float_shape(self, name: str, entries: dict[str, Entry]) -> tuple[int, int]:
        rows, n = entries[f"{name}.qweight"].shape
        return n, rows * 32 // self.bits

    def check(self, layer: Stored) -> CodebookFormat:
        n, k, bits = layer.n, layer.k, self.bits
        why = f"[N, K] = [{n}, {k}], {bits} bits by {self.file.name}"
        for leaf in _SPARSE:
            if leaf in layer:
                raise ValueError(f"{layer.where(leaf)}: the sparse part of SqueezeLLM is not read. Give the float "
                                 "model, or one that is dense-only")  # fmt: skip
        layer.check("qweight", (-(-k * bits // 32), n), [torch.int32], why)
        layer.check("lookup_table", (n, 1 << bits), list(FLOAT_DTYPES.values()), why)
        return CodebookFormat(bits, n, k, k, "row", dtype_name(layer.dtype("lookup_table")))

    def weight(self, layer: Stored) -> tuple[CodebookWeight, str | None]:
        codes = unpack_rows(layer.read("qweight").t(), self.bits, layer.k)
        return CodebookWeight(codes, layer.read("lookup_table")[:, None].contiguous()), None
