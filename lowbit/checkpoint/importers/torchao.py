"""torchao (``quant_method: torchao``), in safetensors: the classes of tensors that the files' metadata names.

    Int8Tensor, IntxUnpackedToInt8Tensor   w = (qdata - zero_point) * scale,   int8 [N, K]; [N, G], [N, 1] or [1, 1]
    Float8Tensor                           w = qdata * scale,                  float8_e4m3fn [N, K]; the same
    Int4Tensor                             w = qdata * scale + zero_point,     [N, K/2], two signed nibbles in a byte,
                                           the first in the low one; scale and zero_point [G, N]

The tensors are ``_weight_qdata``, ``_weight_scale`` and ``_weight_zero_point``. ``metadata[name + ".weight"]`` is a
JSON object with the class and ``block_size`` [rows, columns] of one scale, ``target_dtype`` of unpacked integers. What
the classes do with x: int8, symmetric and per token, is done by lowbit's own rule; else x stays float.

Int4Tensor becomes ``(qdata + 8) * scale - minimum`` with the float32 ``minimum = 8 * scale - zero_point``. That is the
same number wherever the minimum is exact, as it is of bfloat16 unless ``0 < |zero_point| < scale / 8192``: the report
says where it is not.

Source: github.com/pytorch/ao (quantization/quantize_/workflows, prototype/safetensors);
github.com/pytorch/FBGEMM (fbgemm_gpu/experimental/gen_ai: int4_row_quantize_zp, pack_int4).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.importers.folder import Reader, Stored
from lowbit.checkpoint.importers.small_floats import E4M3, e4m3_format, e4m3_weight, read_e4m3
from lowbit.checkpoint.reader import Checkpoint, Entry
from lowbit.core.activations import ActivationSpec
from lowbit.core.family import FLOAT_DTYPES, Format, Granularity, Weight, dtype_name
from lowbit.packed.format import PackedFormat, PackedWeight

_CODES, _SCALE, _ZERO = "_weight_qdata", "_weight_scale", "_weight_zero_point"
_CLASSES = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor", "Int4Tensor")


class TorchAo(Reader):
    format = "torchao"
    signs = (_CODES,)
    required = (_CODES, _SCALE)
    optional = (_ZERO, "_weight_act_pre_scale")
    exact = "bit for bit; `Int4Tensor` but for the smallest zero points"

    def __init__(self, section: dict[str, Any], file: Path) -> None:
        super().__init__(section, file)
        self.metadata = Checkpoint.of_folder(file.parent).metadata

    def _said(self, name: str, where: str) -> tuple[str, dict[str, Any]]:
        """The class of a layer's weight, and its numbers."""
        try:
            said = json.loads(self.metadata[f"{name}.weight"])
            kind, numbers = said["_type"], said["_data"]
            assert isinstance(kind, str) and isinstance(numbers, dict)
        except (KeyError, ValueError, TypeError, AssertionError):
            raise ValueError(f"{where}: the metadata must say of '{name}.weight' what class it is") from None
        if kind not in _CLASSES:
            raise ValueError(f"{where}: layer {name!r}: torchao's {kind} is not read: lowbit reads "
                             f"{', '.join(_CLASSES)}. Give the float model")  # fmt: skip
        return kind, numbers

    def float_shape(self, name: str, entries: dict[str, Entry]) -> tuple[int, int]:
        n, columns = entries[f"{name}.{_CODES}"].shape
        is_int4 = self._said(name, str(entries[f"{name}.{_CODES}"].file))[0] == "Int4Tensor"
        return n, 2 * columns if is_int4 else columns

    def _sizes(self, layer: Stored) -> tuple[str, int, Granularity, int]:
        """The class, bits, what has one scale, and how many columns."""
        kind, numbers = self._said(layer.name, layer.where(_CODES))
        block, bits = numbers.get("block_size"), {"Int4Tensor": 4}.get(kind, 8)
        if kind == "IntxUnpackedToInt8Tensor":
            target = numbers.get("target_dtype")
            named = target.get("_data") if isinstance(target, dict) else None
            found = re.fullmatch(r"(?:torch\.)?int([2-8])", str(named))
            if found is None:
                raise ValueError(f"{layer.where(_CODES)}: target_dtype must be int2 to int8: got {target!r:.100}")
            bits = int(found[1])
        if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int for size in block):
            raise ValueError(f"{layer.where(_CODES)}: block_size must be two numbers: got {block!r:.100}")
        rows, size = block
        if rows == layer.n and size == layer.k and kind != "Int4Tensor":
            return kind, bits, "tensor", size
        if rows != 1 or size < 1 or layer.k % size:
            raise ValueError(f"{layer.where(_CODES)}: block_size must be [1, columns] where columns divide K = "
                             f"{layer.k}, or [N, K]: got {block}")  # fmt: skip
        return kind, bits, "row" if size == layer.k else "group", size

    def check(self, layer: Stored) -> Format:
        (kind, bits, granularity, size), n, k = self._sizes(layer), layer.n, layer.k
        groups, why = k // size, f"[N, K] = [{n}, {k}], {kind} with block_size of {size} columns"
        floats = list(FLOAT_DTYPES.values())
        if "_weight_act_pre_scale" in layer:
            raise ValueError(f"{layer.where('_weight_act_pre_scale')}: x is not multiplied by it here. Give the float "
                             "model")  # fmt: skip
        if kind == "Int4Tensor":
            layer.check(_CODES, (n, k // 2), [torch.int8, torch.uint8], why)
            layer.check(_SCALE, (groups, n), floats, why)
            layer.check(_ZERO, (groups, n), floats, why)
            return PackedFormat(4, n, k, size, granularity, "minimum", "float32")
        shape = (1, 1) if granularity == "tensor" else (n, groups)
        others: tuple[tuple[int, ...], ...] = ((), (1,)) if granularity == "tensor" else ((n,),) * (groups == 1)
        layer.check(_CODES, (n, k), [E4M3 if kind == "Float8Tensor" else torch.int8], why)
        layer.check(_SCALE, shape, floats, why, *others)
        scale = layer.dtype(_SCALE)
        if kind == "Float8Tensor":
            return e4m3_format(n, k, size, scale)
        if _ZERO in layer:
            layer.check(_ZERO, shape, [torch.int8], why, *others)
        zeros = self._zeros(layer, bits, shape)
        made = PackedFormat(bits, n, k, size, granularity, "none" if zeros is None else "int", dtype_name(scale))
        return made.with_activation(ActivationSpec("int8")) if self._rounds_x(layer) else made

    def _zeros(self, layer: Stored, bits: int, shape: tuple[int, int]) -> Tensor | None:
        zeros = layer.read(_ZERO).reshape(shape).short() + (1 << (bits - 1)) if _ZERO in layer else None
        if zeros is None or bool((zeros == 1 << (bits - 1)).all()):
            return None
        if int(zeros.min()) < 0 or int(zeros.max()) >= 1 << bits:
            raise ValueError(f"{layer.where(_ZERO)}: must be integers of {bits} bits")
        return zeros.to(torch.uint8)

    def _rounds_x(self, layer: Stored) -> bool:
        """Whether the class makes x int8 as lowbit does: symmetric, one scale per token."""
        kind, numbers = self._said(layer.name, layer.where(_CODES))
        said = json.dumps(numbers.get("act_quant_kwargs"))
        return kind == "Int8Tensor" and "PerRow" in said and '"SYMMETRIC"' in said and "act_quant_scale" not in numbers

    def _note(self, layer: Stored) -> str | None:
        _, numbers = self._said(layer.name, layer.where(_CODES))
        rounds = numbers.get("act_quant_kwargs") or numbers.get("activation_quantization")
        return "x stays float: torchao rounds it" if rounds and not self._rounds_x(layer) else None

    def weight(self, layer: Stored) -> tuple[Weight, str | None]:
        (kind, bits, granularity, size), n, k = self._sizes(layer), layer.n, layer.k
        shape = (1, 1) if granularity == "tensor" else (n, k // size)
        group = size if granularity == "group" else None
        if kind == "Int4Tensor":
            data = layer.read(_CODES).view(torch.uint8)
            codes = torch.stack([data & 15, data >> 4], 2).flatten(1) ^ 8  # two's complement, plus 8
            scale, zero = (layer.read(leaf).t().float().contiguous() for leaf in (_SCALE, _ZERO))
            minimum, note = 8 * scale - zero, self._note(layer)
            rounded = int((minimum.double() != 8 * scale.double() - zero.double()).sum())
            if rounded:
                said = f"the minima of {rounded} of {minimum.numel()} groups are rounded to float32"
                note = f"{note}; {said}" if note else said
            return PackedWeight(codes, scale, minimum, 4, group, minimum=True), note
        if kind == "Float8Tensor":
            scales = layer.read(_SCALE).reshape(shape).expand(n, -1)
            return e4m3_weight(read_e4m3(layer, _CODES), scales, size), self._note(layer)
        codes = layer.read(_CODES).short() + (1 << (bits - 1))
        if int(codes.min()) < 0 or int(codes.max()) >= 1 << bits:
            raise ValueError(f"{layer.where(_CODES)}: must be integers of {bits} bits")
        scales = layer.read(_SCALE).reshape(shape)
        zeros = self._zeros(layer, bits, shape)
        return PackedWeight(codes.to(torch.uint8), scales, zeros, bits, group), self._note(layer)
