"""Putting modules into a model and taking them out: names, hooks, shared storage, torch's fused paths."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lowbit.model import accelerate, experts
from lowbit.nn.experts import ExpertsLayer, FloatExperts
from lowbit.nn.layer import Layer, layers, storage_of

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
# torch's fused Transformer reads `.weight`: with these values it takes the path that calls the layers
_FUSED_PATHS: dict[type[nn.Module], dict[str, Any]] = {
    nn.TransformerEncoderLayer: {"activation_relu_or_gelu": 0},
    nn.TransformerEncoder: {"enable_nested_tensor": False, "use_nested_tensor": False},
}


def put(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put ``module`` at ``name``; returns the model, or ``module`` itself for the empty name."""
    for inside, layer in layers(module).items():
        layer.name = ".".join(filter(None, (name, inside)))
    if not name:
        return module
    path, _, child = name.rpartition(".")
    parent = model.get_submodule(path)
    if isinstance(module, (ExpertsLayer, FloatExperts)):
        experts.put(model, name, module)
    else:
        setattr(parent, child, module)
    ancestors = [model, *(model.get_submodule(path[: m.end()]) for m in re.finditer(r"[^.]+", path))]
    for parent in ancestors:
        for attribute, value in _FUSED_PATHS.get(type(parent), {}).items():
            setattr(parent, attribute, value)
    return model


@contextmanager
def restoring(model: nn.Module, originals: dict[str, nn.Module]) -> Iterator[None]:
    """After the block the modules of ``originals`` are back at their names, whatever was put there."""
    fused = [(m, a, getattr(m, a)) for m in model.modules() for a in _FUSED_PATHS.get(type(m), {})]
    try:
        yield
    finally:
        for name, module in originals.items():
            put(model, name, module)
        for module, attribute, value in fused:
            setattr(module, attribute, value)


def shared_copy(model: nn.Module, modules: dict[str, nn.Module]) -> nn.Module:
    """A model of its own with the very same tensors, and ``modules`` at their names."""
    tensors = (*model.parameters(), *model.buffers())
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for name, module in modules.items():
        copied = put(copied, name, module)
    return copied


def carry_over(old: nn.Module, new: nn.Module) -> nn.Module:
    """Give ``new`` what belongs to the module rather than to its weight: training mode and hooks."""
    new.train(old.training)
    new._is_full_backward_hook = old._is_full_backward_hook
    for hooks in _HOOKS:
        kept = {key: hook for key, hook in getattr(old, hooks).items() if not _is_observer_hook(hook)}
        getattr(new, hooks).update(kept)
    accelerate.carry_over(old, new)
    return new


def _is_observer_hook(hook: Any) -> bool:
    # torch.ao's observers hang on hooks that call a child of the old module, which the packed layer lacks
    names = ("_observer_forward_hook", "_observer_forward_pre_hook")
    return getattr(hook, "__name__", "") in names and hook.__module__ == "torch.ao.quantization.quantize"


def float_modules(layers: dict[str, Layer]) -> dict[str, nn.Module]:
    """A plain torch module with the dequantized weight for every layer, by name.

    A layer with two names gives one module. Layers that share one storage give modules that share one weight.
    """
    made: dict[int, nn.Module] = {}
    weights: dict[tuple[int, ...], nn.Parameter] = {}
    for name, layer in layers.items():
        if id(layer) in made:
            continue
        if layer.device.type == "meta" and accelerate.is_hooked(layer):
            raise ValueError(f"{name}: its tensors are offloaded: call accelerate's remove_hook_from_submodules first")
        plain = layer.to_float()
        storage = storage_of(layer)
        if storage in weights:
            plain.weight = weights[storage]
        weights[storage] = plain.weight  # type: ignore[assignment]
        made[id(layer)] = carry_over(layer, plain)
    return {name: made[id(layer)] for name, layer in layers.items()}
