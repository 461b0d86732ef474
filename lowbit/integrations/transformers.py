"""Hugging Face transformers: ``save_pretrained`` and ``from_pretrained`` of packed models.

Importing this costs nothing and works without transformers; what needs it is in
:mod:`lowbit.integrations.pretrained`, imported once transformers itself has been.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.checkpoint import foreign, libraries
from lowbit.checkpoint.exporters import exporter
from lowbit.checkpoint.libraries import FloatFolder
from lowbit.checkpoint.reader import Checkpoint
from lowbit.integrations import unread
from lowbit.integrations.after_import import after_import
from lowbit.model import hooks

_OURS = "lowbit.integrations.pretrained"
_LOADING = "lowbit.integrations.loading"
_GGUF = "lowbit.integrations.gguf"
_GGUF_EXPORT = "lowbit.integrations.gguf_export"


def register() -> None:
    """Make ``from_pretrained`` understand ``quant_method: lowbit``, now or when transformers is imported.

    And let converting, saving and loading know what is special about transformers models.
    """
    hooks.before_convert.register(check_loaded)
    hooks.after_convert.register(attach)
    hooks.after_dequantize.register(detach)
    libraries.register(Transformers())
    foreign.importers["gguf"] = lambda path, spec, skip: _gguf(path).read(path, spec, skip)
    exporter.register_later("gguf", lambda: importlib.import_module(_GGUF_EXPORT).Gguf())
    foreign.companions["gguf"] = lambda path, target: _gguf(path).write_tokenizer(path, target)
    # the registry of quantization methods, and PreTrainedModel, whose module imports it
    after_import("transformers.quantizers.auto", lambda module: _pretrained())
    after_import("transformers.modeling_utils", lambda module: _pretrained().install())


def is_pretrained(model: nn.Module) -> bool:
    """Whether ``model`` is a transformers ``PreTrainedModel``."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def _outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The transformers models in ``model`` (itself, or inside a wrapper), by name."""
    found: list[str] = []
    for name, module in model.named_modules():
        if is_pretrained(module) and not any(not outer or name.startswith(outer + ".") for outer in found):
            found.append(name)
            yield name, module


def check_loaded(model: nn.Module) -> None:
    """Raise ``ValueError`` for a quantized model that transformers loaded without its quantizer: it is random then.

    Also where its loading left tensors of layers unread.
    """
    for name, inner in model.named_modules():
        if not is_pretrained(inner):
            continue
        if said := unread.problem(inner):
            raise ValueError(f"{name or type(inner).__name__}: {said}")
        config: Any = getattr(inner.config, "quantization_config", None)
        fields = config if isinstance(config, dict) else getattr(config, "__dict__", {})
        loaded = getattr(inner, "hf_quantizer", None) is not None or getattr(inner.config, "_is_quantized", False)
        if fields and not loaded:
            raise ValueError(
                f"{name or type(inner).__name__}: config.quantization_config names the format "
                f"{fields.get('quant_method')!r}, which transformers did not load: the weights may be random. Load the "
                "float model, or set config.quantization_config = None if the weights are right"
            )


def attach(model: nn.Module) -> None:
    """After a conversion: let every transformers model in ``model`` save, load and tie its packed layers."""
    for _, inner in _outermost(model):
        _pretrained().attach(inner)


def detach(model: nn.Module) -> None:
    """After dequantizing: the transformers models in ``model`` are plain float models again."""
    for _, inner in _outermost(model):
        _pretrained().detach(inner)


class Transformers(libraries.Library):
    """How transformers models are saved, loaded and converted file by file."""

    def owns(self, model: nn.Module) -> bool:
        return is_pretrained(model)

    def is_folder(self, folder: Path) -> bool:
        return (folder / "config.json").is_file()

    def save(self, model: nn.Module, folder: Path) -> None:
        model.save_pretrained(folder)  # type: ignore[operator]

    def load(self, folder: Path, model: nn.Module | None, device: torch.device | str) -> Any:
        try:
            loading = importlib.import_module(_LOADING)
        except ImportError as error:
            raise ImportError(
                f"{folder} holds a transformers model: loading it needs the package transformers"
            ) from error
        return loading.load(folder, model, device)

    def load_float(self, folder: Path) -> Any:
        return importlib.import_module(_LOADING).load_float(folder)

    def open_float(self, folder: Path, checkpoint: Checkpoint) -> FloatFolder | None:
        return importlib.import_module(_LOADING).open_float(folder, checkpoint)  # type: ignore[no-any-return]


def _gguf(path: Path) -> Any:
    try:
        return importlib.import_module(_GGUF)
    except ImportError as error:
        raise ImportError(f"{path} holds a model of llama.cpp: reading it needs the package transformers") from error


def _pretrained() -> Any:
    return importlib.import_module(_OURS)


def __getattr__(name: str) -> Any:
    if name in ("LowbitConfig", "LowbitQuantizer"):
        return getattr(_pretrained(), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
