"""GPTQ, the checkpoint formats ``gptq`` (v1) and ``gptq_v2``, at 2, 3, 4 and 8 bits.

    w[n, k] = (code[n, k] - zero[g, n]) * scale[g, n],    g = k // group_size

    qweight int32 [ceil(K*b/32), N]   column n is the stream of the codes of row n, least significant bit first: code k
                                      has the bits k*b to (k+1)*b - 1; 3-bit codes run on over words
    qzeros  int32 [G, ceil(N*b/32)]   the same streams, of one field for each n
    scales  float16 [G, N]
    g_idx   int32 [K], optional       the group of each column: g is g_idx[k] instead. With act-order (desc_act) it is
                                      not k // group_size: the columns are then held group after group

In v2 a field of ``qzeros`` is the zero. In v1 it is the zero minus one, in b bits: a field of ``2**b - 1`` stands for
``2**b``, as the kernels of ExLlama and vLLM read it, and is held as such, in float zeros. GPTQModel writes v1 in
another way where a zero is 0: at 2, 4 and 8 bits it subtracts whole words of ones, with borrows over the fields; at 3
bits, one from each field modulo 8. Of a folder that it wrote (``meta.quantizer``) that is undone. All ways agree where
no field is ``2**b - 1``.

Source: AutoGPTQ and GPTQModel (github.com/ModelCloud/GPTQModel: nn_modules/qlinear, utils/model.py).
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowbit.checkpoint.importers.folder import Reader, Stored, unpack_rows
from lowbit.checkpoint.reader import Entry
from lowbit.core.family import FLOAT_DTYPES, dtype_name
from lowbit.packed.format import PackedFormat, PackedWeight

BITS = (2, 3, 4, 8)


class Gptq(Reader):
    format = "gptq"
    signs = ("qweight", "qzeros")
    required = ("qweight", "qzeros", "scales")
    optional = ("g_idx",)
    bits_allowed: ClassVar[tuple[int, ...]] = BITS

    def __init__(self, section: dict[str, Any], file: Path) -> None:
        super().__init__(section, file)
        allowed = ", ".join(map(str, self.bits_allowed[:-1])) + f" or {self.bits_allowed[-1]}"
        self.bits = self.integer(["bits"], allowed, lambda bits: bits in self.bits_allowed)
        self.size = self.group_size("group_size")
        self.version = self.one_of(["checkpoint_format", "format"], "gptq", ("gptq", "gptq_v2"))
        self.one_of(["pack_dtype"], "int32", ("int32", "torch.int32"))
        if section.get("is_marlin_format"):
            raise self.refusal("is_marlin_format", "false", section["is_marlin_format"])
        meta = section.get("meta")
        writers = meta.get("quantizer") if isinstance(meta, dict) else None
        writers = [writers] if isinstance(writers, str) else writers if isinstance(writers, list) else []
        self.by_gptqmodel = any(str(writer).lower().startswith("gptqmodel:") for writer in writers)
        self.dynamic = section.get("dynamic") or {}
        if not isinstance(self.dynamic, dict) or not all(isinstance(v, dict) for v in self.dynamic.values()):
            raise ValueError(f"{file}: quantization_config: dynamic must map patterns to objects: got "
                             f"{self.dynamic!r:.200}")  # fmt: skip

    def _sizes(self, name: str) -> tuple[int, int]:
        """Bits and group size of a layer: those of the first pattern of ``dynamic`` that matches, or the model's."""
        for pattern, own in self.dynamic.items():
            try:
                matches = not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), name) is not None
            except re.error as error:
                raise ValueError(f"{self.file}: quantization_config: dynamic: {pattern!r} is no pattern: "
                                 f"{error}") from None  # fmt: skip
            if matches:
                bits, size = own.get("bits", self.bits), own.get("group_size", self.size)
                if bits not in BITS or not isinstance(size, int) or (size != -1 and size < 1):
                    raise ValueError(f"{self.file}: quantization_config: dynamic: {pattern!r} must have bits 2, 3, 4 "
                                     f"or 8 and a group_size: got bits={bits!r}, group_size={size!r}")  # fmt: skip
                return bits, size
        return self.bits, self.size

    def float_shape(self, name: str, entries: dict[str, Entry]) -> tuple[int, int]:
        rows, n = entries[f"{name}.qweight"].shape
        return n, rows * 32 // self._sizes(name)[0]

    def check(self, layer: Stored) -> PackedFormat:
        (bits, size), n, k = self._sizes(layer.name), layer.n, layer.k
        size = k if size == -1 or size > k else size
        groups = -(-k // size)
        why = f"[N, K] = [{n}, {k}], bits={bits}, group_size={size} by {self.file.name}"
        layer.check("qweight", (-(-k * bits // 32), n), [torch.int32], why)
        layer.check("qzeros", (groups, -(-n * bits // 32)), [torch.int32], why)
        layer.check("scales", (groups, n), list(FLOAT_DTYPES.values()), why)
        if "g_idx" in layer:
            layer.check("g_idx", (k,), [torch.int32, torch.int64], "[K]")
        elif self.section.get("desc_act") and groups > 1:
            file = layer.checkpoint.entries[f"{layer.name}.qweight"].file
            raise ValueError(f"{file}: tensor '{layer.name}.g_idx' is missing: {self.file.name} says desc_act")
        scale = dtype_name(layer.dtype("scales"))
        format = PackedFormat(bits, n, k, size, "row" if groups == 1 else "group", "int", scale)
        return replace(format, act_order=_order(layer, groups, size) is not None)

    def weight(self, layer: Stored) -> tuple[PackedWeight, str | None]:
        (bits, size), n, k = self._sizes(layer.name), layer.n, layer.k
        codes = unpack_rows(layer.read("qweight").t(), bits, k)
        scales, zeros = layer.read("scales").t().contiguous(), self._zeros(layer.read("qzeros"), bits, n).t()
        held: Tensor | None = zeros.to(torch.uint8)
        note = None
        if bool((zeros == 1 << (bits - 1)).all()):
            held = None
        elif int(zeros.max()) == 1 << bits:
            held = zeros.to(scales.dtype)
            note = f"stored zeros of {(1 << bits) - 1} are read as {1 << bits}, and all are kept as floats"
        held = None if held is None else held.contiguous()
        order = _order(layer, scales.shape[1], k if size == -1 or size > k else size)
        codes = codes if order is None else codes[:, order]
        group = None if scales.shape[1] == 1 else size
        return PackedWeight(codes, scales, held, bits, group, order=order), note

    def _zeros(self, words: Tensor, bits: int, n: int) -> Tensor:
        """The zeros ``[G, N]``, int16."""
        if self.version == "gptq_v2":
            return unpack_rows(words, bits, n).short()
        if not self.by_gptqmodel:
            return unpack_rows(words, bits, n).short() + 1
        if bits == 3:
            return (unpack_rows(words, bits, n).short() + 1) & 7
        ones = sum(1 << shift for shift in range(0, 32, bits))
        return unpack_rows(_as_int32(words.long() + ones), bits, n).short()


def _order(layer: Stored, groups: int, size: int) -> Tensor | None:
    return layer.order("g_idx", groups, size) if "g_idx" in layer else None


def _as_int32(words: Tensor) -> Tensor:
    return (((words & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000).to(torch.int32)
