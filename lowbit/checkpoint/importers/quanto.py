"""quanto (``quanto_qmap.json``), as ``QuantizedTransformersModel.save_pretrained`` of optimum-quanto stores it.

    qint2, qint4     w.view(-1, group)[j] = scale[j] * data[j] - shift[j];  of integer shifts (data - shift) * scale
    qint8, qfloat8   w[n, k] = scale[n] * data[n, k]

    weight._data._data  of 2 and 4 bits: uint8, parts of equal numbers of rows of [N*K / group, group] in one byte, the
                        first part in the lowest bits
    weight._data        of 8 bits: int8 or float8_e4m3fn [N, K]
    weight._scale, weight._shift  [N*K / group, 1];  [N, 1]
    input_scale, output_scale     of the activations: not used, x stays float

Source: github.com/huggingface/optimum-quanto (tensor/qbits.py, tensor/packed.py, tensor/grouped.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lowbit.checkpoint.importers.folder import Reader, Stored
from lowbit.checkpoint.importers.small_floats import E4M3, e4m3_format, e4m3_weight, read_e4m3
from lowbit.checkpoint.reader import Entry
from lowbit.core.family import FLOAT_DTYPES, Format, Granularity, Weight, dtype_name
from lowbit.packed.format import PackedFormat, PackedWeight

_BITS = {"qint2": 2, "qint4": 4}
_TYPES = (*_BITS, "qint8", "qfloat8", "qfloat8_e4m3fn")
_PACKED, _DATA, _SCALE, _SHIFT = "weight._data._data", "weight._data", "weight._scale", "weight._shift"


class Quanto(Reader):
    format = "quanto"
    signs = (_SCALE,)

    def __init__(self, section: dict[str, Any], file: Path) -> None:
        super().__init__(section, file)

    def leaves(self, name: str, entries: dict[str, Entry]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        is_packed = f"{name}.{_PACKED}" in entries
        required = (_PACKED, _SCALE, _SHIFT) if is_packed else (_DATA, _SCALE)
        return required, ("input_scale", "output_scale")

    def float_shape(self, name: str, entries: dict[str, Entry]) -> tuple[int, int]:
        rows, columns = entries[f"{name}.{self.leaves(name, entries)[0][0]}"].shape
        return rows, columns

    def _said(self, layer: Stored) -> tuple[str, bool]:
        """The type of a layer's weight, and whether x is rounded."""
        said = self.section.get(layer.name)
        kind = said.get("weights") if isinstance(said, dict) else None
        if kind not in _TYPES:
            raise ValueError(f"{self.file}: {layer.name!r}: weights must be {', '.join(_TYPES)}: got {kind!r:.100}")
        return str(kind), said.get("activations") not in (None, "none")  # type: ignore[union-attr]

    def check(self, layer: Stored) -> Format:
        (kind, _), n, k = self._said(layer), layer.n, layer.k
        floats, why = list(FLOAT_DTYPES.values()), f"[N, K] = [{n}, {k}], {kind} by {self.file.name}"
        if kind not in _BITS:
            layer.check(_DATA, (n, k), [torch.int8 if kind == "qint8" else E4M3], why)
            layer.check(_SCALE, (n, 1), floats, why, (), (1,))
            scale = layer.dtype(_SCALE)
            return PackedFormat(8, n, k, k, "row", "none", dtype_name(scale)) if kind == "qint8" else e4m3_format(
                n, k, k, scale)  # fmt: skip
        if _PACKED not in layer:
            raise ValueError(f"{layer.where(_DATA)}: must be {_PACKED} ({why})")
        _, size = layer.checkpoint.entries[f"{layer.name}.{_PACKED}"].shape
        if size < 1 or k % size:
            raise ValueError(f"{layer.where(_PACKED)}: its columns must divide K = {k}: got {size}")
        rows = n * k // size
        layer.check(_PACKED, (-(-rows * _BITS[kind] // 8), size), [torch.uint8], why)
        layer.check(_SCALE, (rows, 1), floats, why)
        layer.check(_SHIFT, (rows, 1), [*floats, torch.int8, torch.uint8], why)
        is_float = layer.dtype(_SHIFT).is_floating_point
        scale_dtype = dtype_name(self._scale_dtype(layer))
        granularity: Granularity = "row" if size == k else "group"
        return PackedFormat(_BITS[kind], n, k, size, granularity, "minimum" if is_float else "int", scale_dtype)

    def _scale_dtype(self, layer: Stored) -> torch.dtype:
        """Of scales, and of float shifts, which are minima."""
        scales, shifts = layer.dtype(_SCALE), layer.dtype(_SHIFT)
        return torch.promote_types(scales, shifts) if shifts.is_floating_point else scales

    def weight(self, layer: Stored) -> tuple[Weight, str | None]:
        (kind, rounds), n, k = self._said(layer), layer.n, layer.k
        note = "x stays float: quanto rounds it" if rounds else None
        if kind not in _BITS:
            scales = layer.read(_SCALE).reshape(-1, 1).expand(n, 1).contiguous()
            if kind == "qint8":
                return PackedWeight(layer.read(_DATA).view(torch.uint8) ^ 128, scales, None, 8), note
            return e4m3_weight(read_e4m3(layer, _DATA), scales, k), note
        bits, packed = _BITS[kind], layer.read(_PACKED)
        size = packed.shape[1]
        codes = torch.cat([(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)])
        codes = codes[: n * k // size].reshape(n, k)
        scales, shifts = (layer.read(leaf).view(n, -1) for leaf in (_SCALE, _SHIFT))
        group = None if size == k else size
        if shifts.is_floating_point():
            dtype = self._scale_dtype(layer)
            return PackedWeight(codes, scales.to(dtype), shifts.to(dtype), bits, group, minimum=True), note
        if int(shifts.min()) < 0 or int(shifts.max()) >= 1 << bits:
            raise ValueError(f"{layer.where(_SHIFT)}: must be integers of 0 to {(1 << bits) - 1}")
        return PackedWeight(codes, scales, shifts.to(torch.uint8), bits, group), note
