"""AWQ, the version ``gemm``, at 4 bits.

    w[n, k] = (code[n, k] - zero[g, n]) * scale[g, n],    g = k // group_size

    qweight int32 [K, N/8]   nibble i of word [k, j], from the least significant one, is the code of row
                             n = 8*j + (0, 2, 4, 6, 1, 3, 5, 7)[i]
    qzeros  int32 [G, N/8]   the zeros in the same order; nothing is subtracted
    scales  float16 [G, N]

Source: AutoAWQ (github.com/casper-hansen/AutoAWQ: awq/modules/linear/gemm.py, awq/utils/packing_utils.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.importers.folder import Reader, Stored
from lowbit.checkpoint.reader import Entry
from lowbit.core.family import FLOAT_DTYPES, dtype_name
from lowbit.packed.format import PackedFormat, PackedWeight

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_ROWS_AT_ONCE = 1 << 20  # words per step: bounds the temporaries


class Awq(Reader):
    format = "awq"
    signs = ("qweight", "qzeros")
    required = ("qweight", "qzeros", "scales")

    def __init__(self, section: dict[str, Any], file: Path) -> None:
        super().__init__(section, file)
        self.integer(["bits", "w_bit"], "4", lambda bits: bits == BITS)
        self.size = self.group_size("group_size", "q_group_size")
        self.one_of(["format", "checkpoint_format", "version"], "gemm", ("gemm",))

    def size_of(self, name: str) -> int:
        """The group size of a layer; -1: one group per row."""
        return self.size

    def float_shape(self, name: str, entries: dict[str, Entry]) -> tuple[int, int]:
        k, words = entries[f"{name}.qweight"].shape
        return 8 * words, k

    def check(self, layer: Stored) -> PackedFormat:
        n, k, size = layer.n, layer.k, self.size_of(layer.name)
        size = k if size == -1 or size > k else size
        groups = -(-k // size)
        why = f"[N, K] = [{n}, {k}], bits={BITS}, group_size={size} by {self.file.name}"
        layer.check("qweight", (k, -(-n // 8)), [torch.int32], why)
        layer.check("qzeros", (groups, -(-n // 8)), [torch.int32], why)
        layer.check("scales", (groups, n), list(FLOAT_DTYPES.values()), why)
        scale = dtype_name(layer.dtype("scales"))
        return PackedFormat(BITS, n, k, size, "row" if groups == 1 else "group", "int", scale)

    def weight(self, layer: Stored) -> tuple[PackedWeight, str | None]:
        codes, zeros = (_codes(layer.read(leaf), layer.n).t().contiguous() for leaf in ("qweight", "qzeros"))
        scales = layer.read("scales").t().contiguous()
        held = None if bool((zeros == 1 << (BITS - 1)).all()) else zeros
        size = None if scales.shape[1] == 1 else self.size_of(layer.name)
        return PackedWeight(codes, scales, held, BITS, size), None


def _codes(words: Tensor, n: int) -> Tensor:
    """``uint8 [rows, N]`` of words ``int32 [rows, ceil(N/8)]``."""
    codes = torch.empty(*words.shape, 8, dtype=torch.uint8)
    step = max(1, _ROWS_AT_ONCE // max(words.shape[1], 1))
    for start in range(0, len(words), step):
        for i, place in enumerate(ORDER):
            codes[start : start + step, :, place] = (words[start : start + step] >> (4 * i)) & 15
    return codes.flatten(1)[:, :n]
