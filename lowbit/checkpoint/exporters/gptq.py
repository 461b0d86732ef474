"""GPTQ: ``gptq`` (v1) where every zero is at least 1, else ``gptq_v2``; 2, 3, 4 and 8 bits.

The layout is that of :mod:`lowbit.checkpoint.importers.gptq`: the streams of canonical words, transposed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.checkpoint.exporters.compressed_tensors import in_order, integer_problem
from lowbit.checkpoint.exporters.exporter import Exporter, exact_in, save_folder, stored
from lowbit.core.bitpack import pack
from lowbit.nn.layer import Layer
from lowbit.packed.format import PackedFormat

BITS = (2, 3, 4, 8)


class Gptq(Exporter):
    format = "gptq"

    def problem(self, name: str, layer: Layer) -> str | None:
        why, format = integer_problem(layer), layer.format
        if why is not None:
            return why
        if format.bits not in BITS:
            return f"must have 2, 3, 4 or 8 bits: it has {format.bits}"
        if format.granularity == "tensor":
            return "must have scales by row or group: it has one per tensor"
        if format.in_features * format.bits % 32 or format.out_features * format.bits % 32:
            return (f"its codes must fill words of 32 bits along N and K: got N={format.out_features}, "
                    f"K={format.in_features}, bits={format.bits}")  # fmt: skip
        if not exact_in(layer.canonical()["scales"], torch.float16):
            return "its scales must be values of float16: some are not"
        return None

    def write(
        self, model: nn.Module, kept: dict[str, Layer], floats: dict[str, Layer], target: Path, tokenizer: Any
    ) -> None:
        is_v1 = all(int(zeros.min()) > 0 for layer in kept.values()
                    if (zeros := stored(layer).get("zeros")) is not None and zeros.numel())  # fmt: skip
        sizes: dict[tuple[int, int], list[str]] = {}
        for name, layer in kept.items():
            sizes.setdefault(_sizes(layer.format), []).append(name)
        (bits, size), *others = sorted(sizes, key=lambda key: -len(sizes[key]))
        dynamic: dict[str, Any] = {
            f"+:^{name.replace('.', '[.]')}$": {"bits": b, "group_size": g} for b, g in others for name in sizes[b, g]
        }
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        left = [*linear, *(name for name, layer in floats.items() if layer.kind == "linear")]
        dynamic |= {f"-:^{name.replace('.', '[.]')}$": {} for name in left}
        section = {
            "quant_method": "gptq", "bits": bits, "group_size": size,
            "desc_act": any(layer.format.act_order for layer in kept.values()),
            "sym": all(layer.format.zeros == "none" for layer in kept.values()), "lm_head": "lm_head" in kept,
            "checkpoint_format": "gptq" if is_v1 else "gptq_v2", "pack_dtype": "int32", "dynamic": dynamic,
        }  # fmt: skip
        held = {name: _tensors(layer, 1 if is_v1 else 0) for name, layer in kept.items()}
        save_folder(model, held, floats, section, target)


def _sizes(format: PackedFormat) -> tuple[int, int]:
    return format.bits, format.group_size if format.granularity == "group" else -1


def _tensors(layer: Layer, minus: int) -> dict[str, Tensor]:
    format, held = layer.format, stored(layer)
    n, k, bits = format.out_features, format.in_features, format.bits
    words, groups = in_order(layer)
    zeros = held.get("zeros", torch.full(format.scale_shape, 1 << (bits - 1), dtype=torch.uint8))
    made = {
        "qweight": words[:, : k * bits // 32].t().contiguous(),
        "qzeros": pack((zeros - minus).t().contiguous(), bits)[:, : n * bits // 32].contiguous(),
        "scales": held["scales"].half().t().contiguous(),
        "g_idx": groups,
    }
    return made if layer.bias is None else {**made, "bias": layer.bias.detach()}
