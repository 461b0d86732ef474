"""Modules that another library quantized: what they hold is no float weight, and nothing here can read it.

They are known by what they hold (integer or float8 weights, tensors of a class of their own, scales beside a weight),
not by a list of classes. What a recogniser reads (:mod:`lowbit.model.sources`) is not among them.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.core.family import dtype_name
from lowbit.core.foreign import is_foreign
from lowbit.model import sources
from lowbit.nn.layer import Layer

_FLOATS = frozenset((torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128))
_TOGETHER = ({"codes", "codebooks"}, {"indices", "centroids"}, {"scales", "qzeros"}, {"scales", "zeros"})
_WEIGHT = re.compile(r"(.*_)?(weight|proj|qweight|W_q)(_.*)?")
# Formats, as configs call them, whose folders are read: lowbit/checkpoint/importers has a file for each.
IMPORTED = (
    "gptq", "awq", "compressed-tensors", "fp8", "mxfp4", "modelopt", "auto-round", "gguf", "bitsandbytes", "hqq",
    "torchao", "bitnet", "quanto", "mlx", "squeezellm", "any-precision",
)  # fmt: skip
QUANTIZED = "quantized by another library"  # how the reason starts
_SIZES = ("in_features", "infeatures", "num_embeddings")
_OTHERS = ("torch.nn.parameter", "torch.distributed", "torch._subclasses", "torch._tensor", "torch.nn.modules")


def find(model: nn.Module) -> dict[str, str]:
    """Name -> what shows it, for every module that holds a weight of another library's making."""
    readable = {id(part) for module in model.modules() if sources.is_source(module) for part in module.modules()}
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, Layer) or id(module) in readable or any(name.startswith(f"{n}.") for n in found):
            continue
        if (reason := why_foreign(module)) is not None:
            found[name] = reason
    return found


def why_foreign(module: nn.Module) -> str | None:
    """What says that ``module`` was quantized by another library, or ``None``."""
    sign = _sign(module)
    return None if sign is None else f"{QUANTIZED}: {sign}"


def _sign(module: nn.Module) -> str | None:
    cls = type(module)
    if cls.__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
        return f"it is a {cls.__module__}.{cls.__name__}"
    if hasattr(module, "quantization_scheme") and hasattr(module, "weight"):
        return "compressed-tensors computes its forward"
    tensors = {n: t for held in (module._parameters, module._buffers) for n, t in held.items() if t is not None}
    if cls.__module__.startswith("transformers.integrations.") and isinstance(module, nn.Linear):
        return f"it is a {cls.__module__}.{cls.__name__}"
    sized = any(hasattr(module, name) for name in _SIZES)
    for name, tensor in tensors.items():
        if library := _library_of(tensor):
            return f"its {name} is a {type(tensor).__name__} of {library}"
        coded = tensor.dtype not in _FLOATS and tensor.dtype is not torch.bool and tensor.dim() >= 2
        if coded and (sized or _WEIGHT.fullmatch(name)):
            return f"{cls.__module__}.{cls.__name__} holds its {name} as {dtype_name(tensor.dtype)}"
    parts = [name for name in tensors if is_foreign(name)]
    parts += [name for names in _TOGETHER if names <= tensors.keys() for name in sorted(names)]
    parts = [f"{name} ({dtype_name(tensors[name].dtype)})" for name in dict.fromkeys(parts)]
    return f"{cls.__module__}.{cls.__name__} holds {', '.join(parts)}" if parts else None


def _library_of(tensor: Tensor) -> str | None:
    """The library that defines the class of a tensor, where that is no plain one."""
    cls = type(tensor)
    if cls in (Tensor, nn.Parameter) or cls.__module__.startswith(_OTHERS):
        return None
    return cls.__module__.partition(".")[0]


def config_method(model: nn.Module) -> str | None:
    """The method that the model's ``config.quantization_config`` names, where it is another library's and in force."""
    for module in model.modules():
        config = getattr(getattr(module, "config", None), "quantization_config", None)
        if not config:
            continue
        method = _field(config, "quant_method")
        method = str(getattr(method, "value", method))
        if method != "lowbit" and not _field(config, "dequantize"):
            return method
    return None


def _field(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


def problem(model: nn.Module, found: dict[str, str], is_read: bool) -> str | None:
    """One text that names the format, the first layers and their number; ``None`` where nothing is foreign.

    ``found``: what :func:`find` says of the modules that a conversion would have to read; ``is_read``: whether there
    are others that it can.
    """
    method = config_method(model)
    format = "" if method is None else f" (quantization_config: {method})"
    if found:
        sign = next(iter(found.values()))
        names = [name or "the model" for name in list(found)[:3]]
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        remedy = "Load the float model, or leave them as they are by skip="
        if method in IMPORTED:
            read = "lowbit.convert_folder(src, dst) reads the folder itself, in the forms of docs/interoperability.md"
            remedy = f"{read}. Else: {remedy[0].lower()}{remedy[1:]}"
        return f"{', '.join(names)}{more}: {sign}{format}. {remedy}"
    if method is not None and not is_read:
        return (
            f"config.quantization_config names the format {method!r}, but every module is a plain float one: where it "
            "was not understood, the weights are random. Load the float model, or set "
            "config.quantization_config = None if the weights are right"
        )
    return None
