"""compressed-tensors: integers of 2 to 8 bits, packed or as int8, and floats of 8 and 4 bits.

    w[n, k] = (code[n, k] - zero[n, g]) * scale[n, g],    g = k // group_size

Format ``pack-quantized``:

    weight_packed      int32 [N, W]   the codes of each row: the signed values plus 2**(b-1). Dense, W = ceil(K*b/32):
                                      one stream, least significant bit first. Padded, W = ceil(K / (32//b)), as
                                      versions before 0.19 wrote it: each word begins with a code, and no code runs on
    weight_scale       [N, G] (strategy group), [N, 1] (channel) or [1] (tensor)
    weight_zero_point  int32 [W', G]  of an asymmetric group or channel: the zeros of each column, packed as the codes,
                                      with the same offset
    weight_shape       int64 [2]      N and K
    weight_g_idx       int32 [K]      the group of each column, which g is instead (actorder: "group"); all -1: in order

Formats ``int-quantized``, ``float-quantized`` and ``naive-quantized``:

    weight             int8 [N, K], signed values of b bits; or float8_e4m3fn [N, K]
    weight_scale       as above; of strategy block [ceil(N/rows), ceil(K/columns)], for block_structure [rows, columns]
    weight_zero_point  int8, in the shape of the scales, of an asymmetric group or channel of integers
    input_scale        [1]            of static activations

Formats ``nvfp4-pack-quantized``, ``mxfp4-pack-quantized`` and ``mxfp8-quantized``: groups of 16, 32 and 32 columns:

    weight_packed        uint8 [N, K/2], two codes of e2m1; of mxfp8 weight, float8_e4m3fn [N, K]
    weight_scale         [N, G], uint8, exponents; of nvfp4 float8_e4m3fn: the scale is
                         weight_scale / weight_global_scale in float32
    weight_global_scale  float32 [1], of nvfp4

x is held as int8 where the config says so of integers of 8 bits, symmetric, and per token when called or static with
one scale. Else it stays float, which the layer notes.

The cache of keys and values stays float, where the config has a scheme for it; its scales are not read.

Source: github.com/vllm-project/compressed-tensors (compressors/pack_quantized, naive_quantized, nvfp4, mxfp4, mxfp8;
quantization/lifecycle/forward.py: dequantize).
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowbit.checkpoint.importers.folder import Reader, Stored, unpack_rows
from lowbit.checkpoint.importers.small_floats import (
    E4M3,
    EXPONENTS,
    by_rows,
    check_whole,
    e4m3_format,
    e4m3_weight,
    mxfp4_format,
    mxfp4_weight,
    nvfp4_format,
    nvfp4_weight,
    read_e4m3,
    read_scales,
)
from lowbit.checkpoint.reader import Entry
from lowbit.core.activations import Activations
from lowbit.core.family import FLOAT_DTYPES, Format, Granularity, Weight, dtype_name
from lowbit.packed.format import PackedFormat, PackedWeight

_STRATEGIES: dict[str, Granularity] = {"group": "group", "channel": "row", "tensor": "tensor"}
_EMPTY: tuple[Any, ...] = (None, {}, [])
_PACKED = "pack-quantized"
_NVFP4, _MXFP4, _MXFP8 = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"
_TYPES = {_PACKED: ("int",), "int-quantized": ("int",), "float-quantized": ("float",),
          "naive-quantized": ("int", "float"), _NVFP4: ("float",), _MXFP4: ("float",), _MXFP8: ("float",)}  # fmt: skip
_GROUPS = {_NVFP4: 16, _MXFP4: 32, _MXFP8: 32}
_FP4 = (_NVFP4, _MXFP4)
_FLOATS = list(FLOAT_DTYPES.values())


_INPUTS = ("input_scale", "input_zero_point")


class _Group(NamedTuple):
    """A group of the config; ``size`` -1: one group of columns per row; ``rows``: of a block, else 1."""

    targets: list[str]
    form: str
    type: str
    bits: int
    strategy: str
    size: int
    rows: int
    symmetric: bool
    is_ordered: bool  # not by columns
    activations: Activations
    note: str | None


class CompressedTensors(Reader):
    format = "compressed-tensors"
    signs = ("weight_packed", "weight_scale")

    def __init__(self, section: dict[str, Any], file: Path) -> None:
        super().__init__(section, file)
        self.form = self.one_of(["format"], _PACKED, (*_TYPES, "mixed-precision"))
        if section.get("transform_config") not in _EMPTY:
            raise self.refusal("transform_config", "empty", section["transform_config"])
        cache = section.get("kv_cache_scheme")
        if cache not in _EMPTY:
            if not isinstance(cache, dict):
                raise self.refusal("kv_cache_scheme", "an object", cache)
            self.unused = ("k_scale", "v_scale", "k_zero_point", "v_zero_point")
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
        if group.get("output_activations") not in _EMPTY:
            raise self.refusal(f"{where}: output_activations", "empty", group["output_activations"])
        form = group.get("format") or self.form
        if not isinstance(form, str) or form not in _TYPES:
            raise self.refusal(f"{where}: format", " or ".join(map(repr, _TYPES)), form)
        targets, weights = group.get("targets"), group["weights"]
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise self.refusal(f"{where}: targets", "a list of texts", targets)
        kind, bits = weights.get("type", "int"), weights.get("num_bits")
        if kind not in _TYPES[form]:
            raise self.refusal(f"{where}: weights: type", f"{' or '.join(map(repr, _TYPES[form]))} in {form!r}", kind)
        width = 4 if form in _FP4 else 8
        if type(bits) is not int or not (2 if kind == "int" else width) <= bits <= width:
            raise self.refusal(f"{where}: weights: num_bits", "2 to 8" if kind == "int" else str(width), bits)
        strategy, size, rows = self._strategy(f"{where}: weights", weights, form)
        symmetric = weights.get("symmetric", True)
        if not isinstance(symmetric, bool) or (not symmetric and (strategy in ("tensor", "block") or kind == "float")):
            raise self.refusal(f"{where}: weights: symmetric", "true, or false for integers by group or channel",
                               symmetric)  # fmt: skip
        is_ordered = str(weights.get("actorder")).lower() in ("group", "dynamic", "true")
        activations, note = self._activations(f"{where}: input_activations", group.get("input_activations"))
        if kind == "float" and activations != "float":
            activations, note = "float", "the folder asks for int8 activations of float weights: x stays float"
        return _Group(targets, form, kind, bits, strategy, size, rows, symmetric, is_ordered, activations, note)

    def _strategy(self, where: str, weights: dict[str, Any], form: str) -> tuple[str, int, int]:
        """(strategy, columns of a group, rows of a block)."""
        strategy, size, block = (weights.get(name) for name in ("strategy", "group_size", "block_structure"))
        if form in _GROUPS:
            if strategy not in ("group", "tensor_group"):
                raise self.refusal(f"{where}: strategy", f"'group' or 'tensor_group' in {form!r}", strategy)
            if size != _GROUPS[form] or type(size) is not int:
                raise self.refusal(f"{where}: group_size", f"{_GROUPS[form]} in {form!r}", size)
            return "group", size, 1
        if strategy == "block" and form != _PACKED:
            if not isinstance(block, list) or len(block) != 2 or any(type(n) is not int or n < 1 for n in block):
                raise self.refusal(f"{where}: block_structure", "two sizes of at least 1", block)
            return strategy, block[1], block[0]
        if not isinstance(strategy, str) or strategy not in _STRATEGIES:
            raise self.refusal(f"{where}: strategy", "'group', 'channel' or 'tensor', or of weights that are not "
                               "packed 'block'", strategy)  # fmt: skip
        if strategy != "group":
            return strategy, -1, 1
        if type(size) is not int or size < 1:
            raise self.refusal(f"{where}: group_size", "at least 1", size)
        return strategy, size, 1

    def _activations(self, where: str, asked: Any) -> tuple[Activations, str | None]:
        """How x is to be held, and what is to be noted where that is not what the config asks for."""
        if asked in _EMPTY:
            return "float", None
        if not isinstance(asked, dict):
            raise self.refusal(where, "an object", asked)
        kind, bits, symmetric = asked.get("type", "int"), asked.get("num_bits", 8), asked.get("symmetric", True)
        dynamic, strategy = asked.get("dynamic", False), asked.get("strategy")
        if kind == "int" and bits == 8 and symmetric is True:
            if dynamic is True and strategy == "token":
                return "int8", None
            if dynamic is False and strategy in ("tensor", None):
                return "int8_static", None
        return "float", (f"the folder asks for activations of {bits!r:.20} bits (type={kind!r:.20}, "
                         f"strategy={strategy!r:.20}, dynamic={dynamic!r:.20}, symmetric={symmetric!r:.20}): "
                         "x stays float")  # fmt: skip

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
            return 2 if target == ("Embedding" if _is_embedding(name) else "Linear") else 3

        ranked = [(rank(target), group) for group in self.groups.values() for target in group.targets]
        best, group = min(ranked, key=lambda pair: pair[0], default=(3, None))
        if best == 3 or group is None:
            kind = "Embedding" if _is_embedding(name) else "Linear"
            raise ValueError(f"{self.file}: quantization_config: config_groups must target the layer {name!r}, by its "
                             f"name, by a pattern or as {kind!r}")  # fmt: skip
        return group

    def leaves(self, name: str, entries: dict[str, Entry]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        form = self._own(name).form
        if form == _PACKED:
            return ("weight_packed", "weight_scale"), ("weight_shape", "weight_zero_point", "weight_g_idx", *_INPUTS)
        if form in _FP4:
            more = ("weight_global_scale",) if form == _NVFP4 else ()
            return ("weight_packed", "weight_scale", *more), ("input_global_scale", *_INPUTS)
        return ("weight", "weight_scale"), ("weight_zero_point", *_INPUTS)

    def float_shape(self, name: str, entries: dict[str, Entry]) -> tuple[int, ...]:
        group, (leaf, *_) = self._own(name), self.leaves(name, entries)[0]
        n, width = entries[f"{name}.{leaf}"].shape
        return n, width * (2 if group.form in _FP4 else 1) if group.form != _PACKED else width * 32 // group.bits

    def check(self, layer: Stored) -> Format:
        group, n, k = self._own(layer.name), layer.n, layer.k
        if (layer.kind == "embedding") != _is_embedding(layer.name) and {"Linear", "Embedding"} & {*group.targets}:
            raise ValueError(f"{self.file}: quantization_config: config_groups must target the {layer.kind} layer "
                             f"{layer.name!r} by its name or by a pattern: got {group.targets!r:.200}")  # fmt: skip
        size = k if group.size == -1 or group.size > k else group.size
        groups = -(-k // size)
        why = (f"[N, K] = [{n}, {k}], type={group.type!r}, num_bits={group.bits}, strategy={group.strategy!r}, "
               f"group_size={size} by {self.file.name}")  # fmt: skip
        if group.form == _PACKED:
            self._check_packed(layer, group, size, groups, why)
        elif group.form in _FP4:
            layer.check("weight_packed", (n, -(-k // 2)), [torch.uint8], why)
            layer.check("weight_scale", (n, groups), [E4M3] if group.form == _NVFP4 else EXPONENTS, why)
            if k % 2:
                raise ValueError(f"{layer.where('weight_packed')}: K must be even: got K={k}")
            if group.form == _MXFP4:
                return mxfp4_format(n, k)
            layer.check("weight_global_scale", (1,), [torch.float32], "one for the tensor", ())
            return nvfp4_format(n, k)
        else:
            layer.check("weight", (n, k), [torch.int8 if group.type == "int" else E4M3], why)
            if group.is_ordered and groups > 1:
                raise ValueError(f"{layer.where('weight')}: layer {layer.name!r} has its groups in another order than "
                                 f"its columns: {self.file.name} says actorder")  # fmt: skip
        shape = {"tensor": (1,), "channel": (n, 1), "group": (n, groups), "block": (-(-n // group.rows), groups)}
        dtypes = EXPONENTS if group.form == _MXFP8 else _FLOATS
        layer.check("weight_scale", shape[group.strategy], dtypes, why, *([()] if group.strategy == "tensor" else []))
        self._check_zeros(layer, group, (n, groups), why)
        if group.activations == "int8_static":
            self._require(layer, "input_scale", "input_activations that are not dynamic")
            layer.check("input_scale", (1,), _FLOATS, "one scale of the input", ())
            if "input_zero_point" in layer and bool(layer.read("input_zero_point").any()):
                raise ValueError(f"{layer.where('input_zero_point')}: must be zero: {self.file.name} says symmetric")
        scale = layer.dtype("weight_scale")
        if group.type == "float":
            return e4m3_format(n, k, size, scale)
        granularity: Granularity = "group" if groups > 1 else "tensor" if group.strategy == "tensor" else "row"
        format = PackedFormat(group.bits, n, k, size, granularity, "none" if group.symmetric else "int",
                              dtype_name(scale))  # fmt: skip
        return replace(format, activations=group.activations, act_order=_order(layer, groups, size) is not None)

    def _require(self, layer: Stored, leaf: str, why: str) -> None:
        if leaf not in layer:
            file = next(e.file for n, e in layer.checkpoint.entries.items() if n.startswith(f"{layer.name}."))
            raise ValueError(f"{file}: tensor '{layer.name}.{leaf}' is missing: {self.file.name} says {why}")

    def _check_packed(self, layer: Stored, group: _Group, size: int, groups: int, why: str) -> None:
        n, k = layer.n, layer.k
        layer.check("weight_packed", (n, _words(k, group.bits, self._is_dense(layer, group.bits, why))), [torch.int32],
                    why)  # fmt: skip
        if "weight_shape" in layer:
            layer.check("weight_shape", (2,), [torch.int64, torch.int32], "[2]")
            if (told := layer.read("weight_shape").tolist()) != [n, k]:
                raise ValueError(f"{layer.where('weight_shape')}: must be [N, K] = [{n}, {k}]: got {told}")
        if "weight_g_idx" in layer:
            layer.check("weight_g_idx", (k,), [torch.int32, torch.int64], "[K]")
        elif group.is_ordered and groups > 1:
            self._require(layer, "weight_g_idx", "actorder")

    def _check_zeros(self, layer: Stored, group: _Group, shape: tuple[int, int], why: str) -> None:
        if not group.symmetric:
            self._require(layer, "weight_zero_point", "symmetric=false")
            if group.form == _PACKED:
                shape = (_words(shape[0], group.bits, self._is_dense(layer, group.bits, why)), shape[1])
            layer.check("weight_zero_point", shape, [torch.int32 if group.form == _PACKED else torch.int8], why)
        elif "weight_zero_point" in layer and bool(layer.read("weight_zero_point").any()):
            # some versions kept zeros there, unpacked
            raise ValueError(f"{layer.where('weight_zero_point')}: must be zero: {self.file.name} says symmetric=true")

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

    def weight(self, layer: Stored) -> tuple[Weight, str | None]:
        weight, note = self._weight(layer)
        if self.unused and f"{layer.name.rpartition('.')[0]}.k_scale" in layer.checkpoint:
            note = "; ".join(filter(None, (note, "the cache of keys and values stays float")))
        return weight, note

    def _weight(self, layer: Stored) -> tuple[Weight, str | None]:
        group, n, k = self._own(layer.name), layer.n, layer.k
        if group.form == _NVFP4:
            whole, scales = check_whole(layer, "weight_global_scale", divided=True), read_e4m3(layer, "weight_scale")
            return nvfp4_weight(layer.read("weight_packed"), scales, whole, divided=True), group.note
        scales, zeros, bits = read_scales(layer, "weight_scale"), None, group.bits
        if group.form == _MXFP4:
            return mxfp4_weight(layer.read("weight_packed"), scales), group.note
        if group.strategy == "tensor":
            scales = scales.reshape(1, 1)
        if group.type == "float":
            scales = by_rows(scales, n if group.strategy == "tensor" else group.rows, n)
            return e4m3_weight(read_e4m3(layer, "weight"), scales, min(group.size, k)), group.note
        if group.form == _PACKED:
            dense = self._is_dense(layer, bits, "")
            codes = _codes(layer.read("weight_packed"), bits, k, dense)
            if not group.symmetric:
                zeros = _codes(layer.read("weight_zero_point").t(), bits, n, dense).t().contiguous()
        else:
            codes = _from_signed(layer, "weight", bits)
            if not group.symmetric:
                zeros = _from_signed(layer, "weight_zero_point", bits)
            scales = by_rows(scales, group.rows, n) if group.strategy == "block" else scales
        if zeros is not None and bool((zeros == 1 << (bits - 1)).all()):
            zeros = None
        size = k if group.size == -1 or group.size > k else group.size
        order = _order(layer, scales.shape[1], size)
        codes = codes if order is None else codes[:, order]
        size_of_groups = size if scales.shape[1] > 1 else None
        return PackedWeight(codes, scales.contiguous(), zeros, bits, size_of_groups, order=order), group.note

    def x_scale(self, layer: Stored) -> Tensor | None:
        return layer.read("input_scale") if self._own(layer.name).activations == "int8_static" else None


def _order(layer: Stored, groups: int, size: int) -> Tensor | None:
    if "weight_g_idx" not in layer or bool((layer.read("weight_g_idx") == -1).all()):
        return None
    return layer.order("weight_g_idx", groups, size)


def _from_signed(layer: Stored, leaf: str, bits: int) -> Tensor:
    """int8 values of ``bits`` bits as codes, uint8: plus ``2**(bits-1)``."""
    half = 1 << (bits - 1)
    codes = layer.read(leaf).short() + half
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2 * half):
        low, high = int(codes.min()) - half, int(codes.max()) - half
        raise ValueError(f"{layer.where(leaf)}: values must be in [{-half}, {half - 1}], num_bits={bits}: got values "
                         f"in [{low}, {high}]")  # fmt: skip
    return codes.to(torch.uint8)


def _is_embedding(name: str) -> bool:
    """Whether a layer has the name of an embedding: of which class it is is known once it is found in the model."""
    return re.search(r"embed|^w[tp]e$|^shared$", name.rpartition(".")[2]) is not None


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
