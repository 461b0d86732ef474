"""SqueezeLLM: 3 and 4 bits, a table of values for each row, dense-only or with a sparse part.

    w[n, k] = lookup_table[n, code[n, k]] + S[n, k]

    qweight       int32 [K*b/32, N]   column n is the stream of the codes of row n, least significant bit first
    lookup_table  [N, 2**b]
    rows int32 [N+1], cols int32 [nnz], vals [nnz]       S in CSR form; the packer has taken the table's entry off
    full_rows [K, X], full_row_indices int32 [X]         more of S: column x is its row full_row_indices[x]
    startrows                                            how threads share rows, not read

S becomes the outliers of the layer, without the zeros of ``full_rows``. A place that S has twice is refused.

The config is ``quantization_config`` with quant_method "squeezellm", or quant_config.json with ``wbits``.

Source: github.com/SqueezeAILab/SqueezeLLM (squeezellm/quant.py: QuantLinearLUT; quant_cuda_kernel.cu).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.importers.folder import Reader, Stored, unpack_rows
from lowbit.checkpoint.reader import Entry
from lowbit.codebook.format import CodebookFormat, CodebookWeight
from lowbit.core.family import FLOAT_DTYPES, MAX_INT16_COLUMNS, dtype_name
from lowbit.core.outliers import CSR

_CSR, _FULL = ("rows", "cols", "vals"), ("full_rows", "full_row_indices")


class SqueezeLlm(Reader):
    format = "squeezellm"
    signs = ("lookup_table",)
    required = ("qweight", "lookup_table")
    optional = (*_CSR, *_FULL, "startrows")

    def __init__(self, section: dict[str, Any], file: Path) -> None:
        super().__init__(section, file)
        self.bits = self.integer(["wbits", "bits"], "3 or 4", lambda bits: bits in (3, 4))

    def float_shape(self, name: str, entries: dict[str, Entry]) -> tuple[int, int]:
        rows, n = entries[f"{name}.qweight"].shape
        return n, rows * 32 // self.bits

    def check(self, layer: Stored) -> CodebookFormat:
        n, k, bits = layer.n, layer.k, self.bits
        why = f"[N, K] = [{n}, {k}], {bits} bits by {self.file.name}"
        layer.check("qweight", (-(-k * bits // 32), n), [torch.int32], why)
        layer.check("lookup_table", (n, 1 << bits), list(FLOAT_DTYPES.values()), why)
        floats = list(FLOAT_DTYPES.values())
        for leaves in (_CSR, _FULL):
            there = [leaf for leaf in leaves if leaf in layer]
            if there and len(there) < len(leaves):
                missing = next(leaf for leaf in leaves if leaf not in layer)
                raise ValueError(f"{layer.where(there[0])}: '{layer.name}.{missing}' is missing beside it")
        if "vals" in layer:
            count = layer.shape("vals")
            layer.check("vals", (count[0] if count else 0,), floats, "CSR")
            layer.check("cols", count, [torch.int32], "as vals")
            layer.check("rows", (n + 1,), [torch.int32], f"[N + 1], N = {n}")
        if "full_rows" in layer:
            count = layer.shape("full_row_indices")
            layer.check("full_row_indices", (count[0] if count else 0,), [torch.int32], "one for each")
            layer.check("full_rows", (k, *count), floats, f"[K, X], K = {k}")
        dtype = dtype_name(layer.dtype("lookup_table"))
        values, _, _ = _sparse(layer)
        if values is None:
            return CodebookFormat(bits, n, k, k, "row", dtype)
        return CodebookFormat(bits, n, k, k, "row", dtype, outliers=len(values), outlier_dtype=dtype_name(values.dtype))

    def weight(self, layer: Stored) -> tuple[CodebookWeight, str | None]:
        codes = unpack_rows(layer.read("qweight").t(), self.bits, layer.k)
        values, columns, rows = _sparse(layer)
        table = layer.read("lookup_table")[:, None].contiguous()
        weight = CodebookWeight(codes, table, outlier_values=values, outlier_columns=columns, outlier_rows=rows)
        return weight, None


def _sparse(layer: Stored) -> CSR:
    """Both parts of S in one CSR form; three times None where there is none."""
    n, k = layer.n, layer.k
    places, values = [], []
    if "vals" in layer:
        ends, columns = layer.read("rows").long(), layer.read("cols").long()
        if int(ends[0]) != 0 or int(ends[-1]) != len(columns) or bool((ends.diff() < 0).any()):
            raise ValueError(f"{layer.where('rows')}: values must rise from 0 to {len(columns)}: got "
                             f"{ends.tolist()!r:.100}")  # fmt: skip
        _require_in(layer, "cols", columns, k)
        places.append(torch.arange(n).repeat_interleave(ends.diff()) * k + columns)
        values.append(layer.read("vals"))
    if "full_rows" in layer:
        index, full = layer.read("full_row_indices").long(), layer.read("full_rows")
        _require_in(layer, "full_row_indices", index, n)
        at = full.nonzero()
        places.append(index[at[:, 1]] * k + at[:, 0])
        values.append(full[at[:, 0], at[:, 1]])
    if not sum(map(len, places)):
        return None, None, None
    where, order = torch.cat(places).sort()
    if bool((where.diff() == 0).any()):
        twice = int(where[1:][where.diff() == 0][0])
        leaf = "vals" if "vals" in layer else "full_rows"
        raise ValueError(f"{layer.where(leaf)}: the sparse part has row {twice // k}, column {twice % k} twice")
    ends = torch.bincount(where // k, minlength=n).cumsum(0)
    columns = (where % k).to(torch.int16 if k <= MAX_INT16_COLUMNS else torch.int32)
    return torch.cat(values)[order], columns, torch.cat([ends.new_zeros(1), ends]).int()


def _require_in(layer: Stored, leaf: str, values: Tensor, limit: int) -> None:
    if values.numel() and (int(values.min()) < 0 or int(values.max()) >= limit):
        raise ValueError(f"{layer.where(leaf)}: values must be in [0, {limit}): got values in "
                         f"[{int(values.min())}, {int(values.max())}]")  # fmt: skip
