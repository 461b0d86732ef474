"""compressed-tensors, the format ``pack-quantized``: integers of 2 to 8 bits, weights alone.

    w[n, k] = (code[n, k] - zero[n, g]) * scale[n, g],    g = k // group_size

    weight_packed      int32 [N, W]   the codes of each row: the signed values plus 2**(b-1). Dense, W = ceil(K*b/32):
                                      one stream, least significant bit first. Padded, W = ceil(K / (32//b)), as
                                      versions before 0.19 wrote it: each word begins with a code, and no code runs on
    weight_scale       [N, G] (strategy group), [N, 1] (channel) or [1] (tensor)
    weight_zero_point  int32 [W', G]  of an asymmetric group or channel: the zeros of each column, packed as the codes,
                                      with the same offset
    weight_shape       int64 [2]      N and K
    weight_g_idx       int32 [K]      the group of each column; all -1: in order

Source: github.com/vllm-project/compressed-tensors (compressors/pack_quantized).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowbit.checkpoint.importers.folder import Reader, Stored, unpack_rows
from lowbit.checkpoint.reader import Entry
from lowbit.core.family import FLOAT_DTYPES, Granularity, dtype_name
from lowbit.packed.format import PackedFormat, PackedWeight

_STRATEGIES: dict[str, Granularity] = {"group": "group", "channel": "row", "tensor": "tensor"}
_EMPTY: tuple[Any, ...] = (None, {}, [])


class _Group(NamedTuple):
    """A group of the config; ``size`` -1: one group of columns per row."""

    targets: list[str]
    bits: int
    strategy: str
    size: int
    symmetric: bool
    is_ordered: bool  # not by columns


class CompressedTensors(Reader):
    format = "compressed-tensors"
    signs = ("weight_packed",)
    required = ("weight_packed", "weight_scale")
    optional = ("weight_shape", "weight_zero_point", "weight_g_idx")

    def __init__(self, section: dict[str, Any], file: Path) -> None:
        super().__init__(section, file)
        self.one_of(["format"], "pack-quantized", ("pack-quantized",))
        for name in ("transform_config", "kv_cache_scheme"):
            if section.get(name) not in _EMPTY:
                raise self.refusal(name, "empty", section[name])
        sparsity = section.get("sparsity_config")
        if sparsity not in _EMPTY and not (isinstance(sparsity, dict) and sparsity.get("format") == "dense"):
            raise self.refusal("sparsity_config", "empty, or of the format 'dense'", sparsity)
        written = re.match(r"(\d+)\.(\d+)", str(section.get("version")))
        self.version = None if written is None else (int(written[1]), int(written[2]))
        groups = section.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise self.refusal("config_groups", "an object of groups", groups)
        self.groups = {name: self._group(f"config_groups: {name}", group) for name, group in groups.items()}

    def _group(self, where: str, group: Any) -> _Group:
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            raise self.refusal(where, "an object with weights", group)
        for name in ("input_activations", "output_activations"):
            if group.get(name) not in _EMPTY:
                raise self.refusal(f"{where}: {name}", "empty", group[name])
        if group.get("format") not in (None, "pack-quantized"):
            raise self.refusal(f"{where}: format", "'pack-quantized'", group["format"])
        targets, weights = group.get("targets"), group["weights"]
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise self.refusal(f"{where}: targets", "a list of texts", targets)
        bits, strategy, size = weights.get("num_bits"), weights.get("strategy"), weights.get("group_size")
        if type(bits) is not int or not 2 <= bits <= 8:
            raise self.refusal(f"{where}: weights: num_bits", "2 to 8", bits)
        if weights.get("type", "int") != "int":
            raise self.refusal(f"{where}: weights: type", "'int'", weights["type"])
        if not isinstance(strategy, str) or strategy not in _STRATEGIES:
            raise self.refusal(f"{where}: weights: strategy", "'group', 'channel' or 'tensor'", strategy)
        if strategy == "group" and (type(size) is not int or size < 1):
            raise self.refusal(f"{where}: weights: group_size", "at least 1", size)
        symmetric = weights.get("symmetric", True)
        if not isinstance(symmetric, bool) or (not symmetric and strategy == "tensor"):
            raise self.refusal(f"{where}: weights: symmetric", "true, or false by group or channel", symmetric)
        is_ordered = str(weights.get("actorder")).lower() in ("group", "dynamic", "true")
        return _Group(targets, bits, strategy, size if strategy == "group" else -1, symmetric, is_ordered)

    def _own(self, name: str) -> _Group:
        """The group of a layer: one that targets its name counts before patterns, and those before classes."""

        def rank(target: str) -> int:
            if target == name:
                return 0
            if target.startswith("re:"):
                try:
                    return 1 if re.match(target[3:], name) else 3
                except re.error as error:
                    raise self.refusal("config_groups: targets", f"patterns ({error})", target) from None
            return 2 if target == "Linear" else 3

        ranked = [(rank(target), group) for group in self.groups.values() for target in group.targets]
        best, group = min(ranked, key=lambda pair: pair[0], default=(3, None))
        if best == 3 or group is None:
            raise ValueError(f"{self.file}: quantization_config: config_groups must target the layer {name!r}, by its "
                             "name, by a pattern or as 'Linear'")  # fmt: skip
        return group

    def float_shape(self, name: str, entries: dict[str, Entry]) -> tuple[int, int]:
        n, words = entries[f"{name}.weight_packed"].shape
        return n, words * 32 // self._own(name).bits

    def check(self, layer: Stored) -> PackedFormat:
        (_, bits, strategy, size, symmetric, is_ordered), n, k = self._own(layer.name), layer.n, layer.k
        size = k if size == -1 or size > k else size
        groups = -(-k // size)
        why = f"[N, K] = [{n}, {k}], num_bits={bits}, strategy={strategy!r}, group_size={size} by {self.file.name}"
        dense = self._is_dense(layer, bits, why)
        layer.check("weight_packed", (n, _words(k, bits, dense)), [torch.int32], why)
        shape = {"tensor": (1,), "channel": (n, 1), "group": (n, groups)}[strategy]
        layer.check("weight_scale", shape, list(FLOAT_DTYPES.values()), why)
        if "weight_shape" in layer:
            layer.check("weight_shape", (2,), [torch.int64, torch.int32], "[2]")
            if (told := layer.read("weight_shape").tolist()) != [n, k]:
                raise ValueError(f"{layer.where('weight_shape')}: must be [N, K] = [{n}, {k}]: got {told}")
        if "weight_zero_point" not in layer:
            if not symmetric:
                file = layer.checkpoint.entries[f"{layer.name}.weight_packed"].file
                raise ValueError(f"{file}: tensor '{layer.name}.weight_zero_point' is missing: {self.file.name} says "
                                 "symmetric=false")  # fmt: skip
        elif symmetric:  # some versions kept zeros there, unpacked
            if bool(layer.read("weight_zero_point").any()):
                raise ValueError(f"{layer.where('weight_zero_point')}: must be zero: {self.file.name} says "
                                 "symmetric=true")  # fmt: skip
        else:
            layer.check("weight_zero_point", (_words(n, bits, dense), groups), [torch.int32], why)
        if "weight_g_idx" in layer:
            layer.check("weight_g_idx", (k,), [torch.int32, torch.int64], "[K]")
            if not bool((layer.read("weight_g_idx") == -1).all()):
                layer.check_order("weight_g_idx", groups, size, "actorder")
        elif is_ordered and groups > 1:
            file = layer.checkpoint.entries[f"{layer.name}.weight_packed"].file
            raise ValueError(f"{file}: tensor '{layer.name}.weight_g_idx' is missing: {self.file.name} says actorder")
        scale = dtype_name(layer.checkpoint.entries[f"{layer.name}.weight_scale"].dtype)
        granularity = "row" if strategy == "group" and groups == 1 else _STRATEGIES[strategy]
        return PackedFormat(bits, n, k, size, granularity, "none" if symmetric else "int", scale)

    def _is_dense(self, layer: Stored, bits: int, why: str) -> bool:
        """Which of the two layouts the codes have, by their width; where both have it, by who wrote them."""
        shape = layer.checkpoint.entries[f"{layer.name}.weight_packed"].shape
        dense, padded = _words(layer.k, bits, True), _words(layer.k, bits, False)
        if dense != padded or layer.k <= 32 // bits or 32 % bits == 0:
            return shape[1] != padded or dense == padded
        if self.version is None or self.version == (0, 18):
            raise ValueError(
                f"{layer.where('weight_packed')}: shape {shape} is that of dense and of padded codes, which differ "
                f"({why}): version must be 0.17 or before, or 0.19 or later: got {self.section.get('version')!r:.200}"
            )
        return self.version > (0, 18)

    def weight(self, layer: Stored) -> tuple[PackedWeight, str | None]:
        (_, bits, strategy, size, symmetric, _), n, k = self._own(layer.name), layer.n, layer.k
        words, dense = layer.read("weight_packed"), self._is_dense(layer, bits, "")
        scales, zeros = layer.read("weight_scale"), None
        if not symmetric:
            zeros = _codes(layer.read("weight_zero_point").t(), bits, n, dense).t().contiguous()
            zeros = None if bool((zeros == 1 << (bits - 1)).all()) else zeros
        if strategy == "tensor":
            scales = scales.reshape(1, 1)
        group = size if strategy == "group" and scales.shape[1] > 1 else None
        return PackedWeight(_codes(words, bits, k, dense), scales, zeros, bits, group), None


def _words(count: int, bits: int, dense: bool) -> int:
    return -(-count * bits // 32) if dense else -(-count // (32 // bits))


def _codes(words: Tensor, bits: int, count: int, dense: bool) -> Tensor:
    """``uint8 [rows, count]`` of ``int32 [rows, W]``."""
    if dense:
        return unpack_rows(words, bits, count)
    per_word = 32 // bits
    codes = torch.empty(*words.shape, per_word, dtype=torch.uint8)
    for i in range(per_word):
        codes[..., i] = (words >> (bits * i)) & ((1 << bits) - 1)
    return codes.flatten(1)[:, :count].contiguous()
