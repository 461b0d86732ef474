"""What stays float after a conversion: large parameters and buffers, each with the reason."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lowbit.core.family import dtype_name
from lowbit.model.storage import named_tensors, storages
from lowbit.nn.layer import Layer, layers

_UNTIED = re.compile(r"untied: a float copy of \d+ bytes is kept \((.*) is packed\)")
SHARE = 0.01  # of the model's bytes: what is smaller is not listed


@dataclass
class Kept:
    """A tensor that is not packed: its name in the model, its bytes, and why."""

    name: str
    bytes: int
    reason: str


def kept_float(
    model: nn.Module, packed: Iterable[nn.Module], skipped: Mapping[str, str], more_than: float
) -> list[Kept]:
    """Tensors of more than so many bytes that are in no module of ``packed``, the largest first.

    Float and complex ones, and Parameters of any dtype. A tensor with several names is listed once.
    """
    found: dict[int, Kept] = {}
    for name, module, tensor in named_tensors(model, packed):
        held = storages([tensor])
        size = min(tensor.numel() * tensor.dtype.itemsize, sum(held.values()))  # it may be sparse, or expanded
        listed = isinstance(tensor, nn.Parameter) or tensor.is_floating_point() or tensor.is_complex()
        if not listed or size <= more_than or isinstance(module, Layer):
            continue
        for key in list(held)[:1]:
            found.setdefault(key, Kept(name, size, _reason(name, module, tensor, skipped)))
    return sorted(found.values(), key=lambda kept: -kept.bytes)


def untied(size: int, packed: str) -> str:
    """What is said of a float tensor whose values are also the weight of the layer ``packed``."""
    return f"untied: a float copy of {size} bytes is kept ({packed} is packed)"


def with_float_copies(skipped: Mapping[str, str]) -> set[str]:
    """The packed layers whose float weight is still in the model, as :func:`untied` says."""
    return {name for reason in skipped.values() for name in _UNTIED.findall(reason)}


def skipped_in(model: nn.Module) -> dict[str, str]:
    """What conversions of ``model`` and of parts of it left float, by name in ``model``, each with its reason."""
    found: dict[str, str] = {}
    for prefix, module in model.named_modules():
        for name, reason in (module.__dict__.get("lowbit_skipped") or {}).items():
            found.setdefault(".".join(part for part in (prefix, name) if part), reason)
    packed = layers(model, duplicates=True)
    return {name: reason for name, reason in found.items() if name not in packed}


def with_earlier(model: nn.Module, skipped: dict[str, str]) -> dict[str, str]:
    """``skipped``, and what earlier conversions of ``model`` untied, where that is still float."""
    packed = {name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, Layer)}
    for name, reason in (getattr(model, "lowbit_skipped", None) or {}).items():
        for text in [] if name in packed else [match[0] for match in _UNTIED.finditer(reason)]:
            now = skipped.get(name)
            skipped[name] = text if now is None else now if text in now else f"{now}; {text}"
    return skipped


def _reason(name: str, module: nn.Module, tensor: Tensor, skipped: Mapping[str, str]) -> str:
    owner, _, leaf = name.rpartition(".")
    if name in skipped:
        return skipped[name]
    if owner in skipped:
        return skipped[owner]
    what = type(module).__name__
    if leaf not in module._parameters:
        return f"a buffer of {what}"
    if not tensor.is_floating_point():
        return f"a Parameter {list(tensor.shape)} of {what}, in {dtype_name(tensor.dtype)}"
    if isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weights"
    if isinstance(module, nn.RNNBase):
        return f"a weight of {what}: no linear layer"
    if isinstance(module, nn.EmbeddingBag):
        return f"{what} sums embeddings: no packed form"
    if isinstance(module, nn.modules.conv._ConvNd):
        return f"a weight of {what}: no linear layer"
    if what.endswith("ParametrizationList"):
        return "a part of a parametrized weight, which is computed on each call"
    if leaf == "bias":
        return f"the bias of {what}"
    if tensor.dim() == 1 and leaf == "weight":
        return f"the weight of {what}, one value per feature"
    if tensor.dim() == 3:
        experts = " (experts): see lowbit.register_experts" if "expert" in f"{name} {what}".lower() else ""
        return f"a stack of {tensor.shape[0]} weights {list(tensor.shape[1:])} in one Parameter of {what}{experts}"
    return f"a Parameter {list(tensor.shape)} of {what}: no nn.Linear or nn.Embedding"
