"""Modules whose weight another library quantized: they are named, and never taken for float ones."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_WEIGHTS = re.compile(r"weight|^W_q$|^codes$|_(blocks|packed)$")  # names of a tensor that stands for a weight
QUANTIZED = "quantized by another library"  # how such a reason starts
_PACKAGES = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "transformers.integrations.")


def why_foreign(module: nn.Module) -> str | None:
    """What says that ``module`` was quantized by another library, or ``None``."""
    cls = type(module)
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is None or not _WEIGHTS.search(name):
            continue
        kind = type(tensor)
        if kind.__module__.partition(".")[0] not in ("torch", "lowbit"):
            return f"{QUANTIZED}: its {name} is a {kind.__module__.partition('.')[0]} {kind.__name__}"
        if tensor.dtype not in _FLOATS and tensor.numel() > 1:
            return f"{QUANTIZED}: {cls.__module__}.{cls.__name__} holds its {name} as {_dtype(tensor)}"
    if hasattr(module, "quantization_scheme"):
        return f"{QUANTIZED}: compressed-tensors computes its forward"
    has_weight = module._parameters or hasattr(module, "in_features") or hasattr(module, "num_embeddings")
    if cls.__module__.startswith(_PACKAGES) and has_weight:
        return f"{QUANTIZED}: it is a {cls.__module__}.{cls.__name__}"
    return None


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
