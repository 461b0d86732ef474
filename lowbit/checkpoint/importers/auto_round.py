"""AutoRound's own folders (``quant_method: auto-round``): integers in the layouts of GPTQ and AWQ.

    w[n, k] = (code[n, k] - zero[g, n]) * scale[g, n],    g = k // group_size

``packing_format`` says which:

    auto_round:auto_gptq, auto_round:gptq            GPTQ v1 (gptq.py): zeros minus one; 2 to 8 bits
    auto_round, auto_round:exllamav2, :tritonv2 ...  GPTQ v2: zeros as they are; 2 to 8 bits
    auto_round:auto_awq, auto_round:awq              AWQ (awq.py), 4 bits

``extra_config`` has other bits and group sizes of layers, by name or by a pattern; of 16 bits are float layers.

Source: github.com/intel/auto-round (auto_round/export/export_to_autoround/export.py; auto_round_extension/torch;
auto_round/inference/utils.py).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lowbit.checkpoint.importers.awq import Awq
from lowbit.checkpoint.importers.folder import Reader, refusal
from lowbit.checkpoint.importers.gptq import Gptq

FORMAT = "auto-round"
_V1 = ("auto", "auto_round:auto_gptq", "auto_round:gptq", "auto_round:gptq:exllamav2", "auto_gptq")
_RAW = ("auto_round", *(f"auto_round:{kernel}" for kernel in (
    "exllama", "exllamav2", "triton", "tritonv2", "torch", "ipex", "gptqmodel", "auto_gptqmodel")))  # fmt: skip
_AWQ = ("auto_round:auto_awq", "auto_round:awq", "auto_awq")


class _Config:
    """What the section says of layers: bits and group sizes."""

    def __init__(self, reader: Reader) -> None:
        section, self.reader = reader.section, reader
        kind, activations = section.get("data_type"), section.get("act_bits")
        if kind not in (None, "int"):
            raise reader.refusal("data_type", "'int'", kind)
        if activations is not None and (type(activations) is not int or activations < 16):
            raise reader.refusal("act_bits", "16 or absent", activations)
        if section.get("rotation_config") not in (None, {}, []):
            raise reader.refusal("rotation_config", "empty", section["rotation_config"])
        self.extra = section.get("extra_config") or {}
        if not isinstance(self.extra, dict) or not all(isinstance(own, dict) for own in self.extra.values()):
            raise reader.refusal("extra_config", "an object of objects", self.extra)

    def sizes(self, name: str, bits: int, size: int) -> tuple[int, int]:
        """Bits and group size of a layer, where ``bits`` and ``size`` are the model's."""
        named = [own for pattern, own in self.extra.items() if pattern == name]
        named += [own for pattern, own in self.extra.items() if self._matches(pattern, name)]
        own: dict[str, Any] = named[0] if named else {}
        bits, size = own.get("bits", bits), own.get("group_size", size)
        if type(bits) is not int or not 2 <= bits <= 8 or type(size) is not int or (size != -1 and size < 1):
            raise ValueError(f"{self.reader.file}: quantization_config: extra_config: layer {name!r} must have 2 to 8 "
                             f"bits and a group_size: got bits={bits!r:.50}, group_size={size!r:.50}")  # fmt: skip
        return bits, size

    @staticmethod
    def _matches(pattern: str, name: str) -> bool:
        try:
            return re.search(pattern, name) is not None
        except re.error:  # as AutoRound does
            return False


class _AutoGptq(Gptq):
    format = FORMAT
    bits_allowed = tuple(range(2, 9))

    def __init__(self, section: dict[str, Any], file: Path) -> None:
        super().__init__(section, file)
        self.version = "gptq" if packing(section) in _V1 else "gptq_v2"
        self.config = _Config(self)

    def _sizes(self, name: str) -> tuple[int, int]:
        return self.config.sizes(name, self.bits, self.size)


class _AutoAwq(Awq):
    format = FORMAT

    def __init__(self, section: dict[str, Any], file: Path) -> None:
        super().__init__(section, file)
        self.config = _Config(self)

    def size_of(self, name: str) -> int:
        bits, size = self.config.sizes(name, 4, self.size)
        if bits != 4:
            raise ValueError(f"{self.file}: quantization_config: extra_config: layer {name!r} must have 4 bits in the "
                             f"layout of AWQ: got bits={bits}")  # fmt: skip
        return size


def packing(section: dict[str, Any]) -> str:
    """The packing that a section names; as AutoRound does, that of GPTQ where it names none."""
    found = section.get("packing_format", section.get("backend", _V1[1]))
    return found if isinstance(found, str) else repr(found)


def auto_round(section: dict[str, Any], file: Path) -> Reader:
    """The reader of a section; raises ``ValueError`` for a packing that is not read."""
    found = packing(section)
    if found in (*_V1, *_RAW):
        return _AutoGptq(section, file)
    if found in _AWQ:
        return _AutoAwq(section, file)
    allowed = ", ".join(map(repr, (*_V1, *_RAW, *_AWQ)))
    raise refusal(FORMAT, file, "packing_format", f"one of {allowed}", found)
