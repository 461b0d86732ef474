"""Hugging Face transformers: ``save_pretrained`` and ``from_pretrained`` of packed models.

Importing this costs nothing and works without transformers; what needs it is in
:mod:`lowbit.integrations.pretrained`, imported once transformers itself has been.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import nn

_TRIGGER = "transformers.quantizers.auto"  # the module with the registry of quantization methods
_OURS = "lowbit.integrations.pretrained"


class _AfterImport(MetaPathFinder):
    """Imports ``_OURS`` right after ``_TRIGGER`` is imported: importing that eagerly would cost seconds."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                importlib.import_module(_OURS)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Make ``from_pretrained`` understand ``quant_method: lowbit``, now or when transformers is imported."""
    if _TRIGGER in sys.modules:
        importlib.import_module(_OURS)
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


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


def attach(model: nn.Module) -> None:
    """After a conversion: let every transformers model in ``model`` save, load and tie its packed layers."""
    for name, inner in _outermost(model):
        from lowbit.integrations import pretrained

        reasons: Any = getattr(model, "lowbit_skipped", {})
        if inner is not model:
            prefix = name + "."
            skipped: Any = {n.removeprefix(prefix): r for n, r in reasons.items() if n.startswith(prefix)}
            inner.lowbit_skipped = skipped
        pretrained.attach(inner)


def detach(model: nn.Module) -> None:
    """After dequantizing: the transformers models in ``model`` are plain float models again."""
    for _, inner in _outermost(model):
        from lowbit.integrations import pretrained

        pretrained.detach(inner)


def __getattr__(name: str) -> Any:
    if name in ("LowbitConfig", "LowbitQuantizer"):
        return getattr(importlib.import_module(_OURS), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
