"""compressed-tensors, the format ``pack-quantized``: what vLLM serves without a plugin.

The layout is that of :mod:`lowbit.checkpoint.importers.compressed_tensors`, with dense words (versions from 0.19 on):
canonical words, without those that only fill up.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.checkpoint.exporters.exporter import Exporter, save_folder, stored
from lowbit.core.bitpack import pack, unpack
from lowbit.nn.layer import Layer
from lowbit.packed.format import PackedFormat

VERSION = "0.20.1"
_STRATEGIES = {"group": "group", "row": "channel", "tensor": "tensor"}


def integer_problem(layer: Layer) -> str | None:
    """Why a layer is not a linear one of integers with whole zeros in full groups, if so."""
    format = layer.format
    if layer.kind != "linear":
        return f"must be a linear layer: it is an {layer.kind}" if layer.kind == "embedding" else "holds experts"
    if not isinstance(format, PackedFormat):
        return f"must be of the family 'packed': it is {format.describe()}"
    if format.zeros == "float":
        return "must have integer zeros or none: it has float zeros"
    if format.zeros == "minimum":
        return "must have integer zeros or none: it has minima"
    if format.scale_codes is not None:
        return "must have scales of one level: it has codes of scales, and their factors"
    if format.outliers:
        return f"must have no outliers: it has {format.outliers}"
    if format.activations != "float":
        return f"must have float activations: it has {format.activations}"
    if format.in_features % format.group_size:
        return f"group_size must divide K: got group_size={format.group_size}, K={format.in_features}"
    return None


def in_order(layer: Layer) -> tuple[Tensor, Tensor]:
    """The words of the codes in the order of x's features, and the group of each feature, int32 ``[K]``."""
    format, held = layer.format, layer.canonical()
    groups = (torch.arange(format.in_features) // format.group_size).to(torch.int32)
    if not format.act_order:
        return held["packed"], groups
    back = held["order"].argsort()
    return pack(unpack(held["packed"], format.bits, format.in_features)[:, back], format.bits), groups[back]


class CompressedTensors(Exporter):
    format = "compressed-tensors"

    def problem(self, name: str, layer: Layer) -> str | None:
        why = integer_problem(layer)
        if why is None and layer.format.granularity == "tensor" and layer.format.zeros != "none":
            why = "must have no zeros with one scale per tensor: it has one"
        return why

    def write(
        self, model: nn.Module, kept: dict[str, Layer], floats: dict[str, Layer], target: Path, tokenizer: Any
    ) -> None:
        groups: dict[tuple[Any, ...], list[str]] = {}
        for name, layer in kept.items():
            f: PackedFormat = layer.format
            key = f.bits, f.granularity, f.group_size, f.zeros == "none", f.act_order
            groups.setdefault(key, []).append(name)
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        section = {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "version": VERSION, "ignore": [*linear, *(n for n, layer in floats.items() if layer.kind == "linear")],
            "config_groups": {f"group_{i}": _group(key, names, len(groups) == 1)
                              for i, (key, names) in enumerate(groups.items())},
        }  # fmt: skip
        save_folder(model, {name: _tensors(layer) for name, layer in kept.items()}, floats, section, target)


def _group(key: tuple[Any, ...], names: list[str], is_only: bool) -> dict[str, Any]:
    bits, granularity, size, symmetric, act_order = key
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": _STRATEGIES[granularity],
               "group_size": size if granularity == "group" else None, "dynamic": False,
               "actorder": "group" if act_order else None}  # fmt: skip
    return {"targets": ["Linear"] if is_only else names, "weights": weights, "input_activations": None,
            "output_activations": None, "format": "pack-quantized"}  # fmt: skip


def _tensors(layer: Layer) -> dict[str, Tensor]:
    format, held = layer.format, stored(layer)
    n, k, bits = format.out_features, format.in_features, format.bits
    scales = held["scales"].flatten() if format.granularity == "tensor" else held["scales"]
    words, groups = in_order(layer)
    made = {
        "weight_packed": words[:, : -(-k * bits // 32)].contiguous(),
        "weight_scale": scales.contiguous(),
        "weight_shape": torch.tensor([n, k]),
    }
    if format.act_order:
        made["weight_g_idx"] = groups
    if "zeros" in held:
        words = pack(held["zeros"].t().contiguous(), bits)[:, : -(-n * bits // 32)]
        made["weight_zero_point"] = words.t().contiguous()
    return made if layer.bias is None else {**made, "bias": layer.bias.detach()}
