"""Libraries whose folders a packed model cannot be read back from: their saving says so, and names ``lowbit.save``.

Their loaders build the float model and start what they do not find at random, some of them without a word.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from torch import nn

from lowbit.integrations.after_import import after_import
from lowbit.nn.layer import layers

# module, class, and the method of it that writes the weights
_SAVERS = (
    ("diffusers.models.modeling_utils", "ModelMixin", "save_pretrained"),
    ("huggingface_hub.hub_mixin", "PyTorchModelHubMixin", "_save_pretrained"),
    ("sentence_transformers.base.modules.module", "Module", "save_torch_weights"),
)


def register() -> None:
    """Watch these libraries, now or when they are imported."""
    for name, cls, method in _SAVERS:
        after_import(name, functools.partial(_guard, cls=cls, method=method))


def _guard(module: ModuleType, cls: str, method: str) -> None:
    owner = getattr(module, cls, None)
    original = getattr(owner, method, None)
    if original is None or getattr(original, "_lowbit", False):
        return

    @functools.wraps(original)
    def checked(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        packed = layers(self)
        if packed:
            library = module.__name__.partition(".")[0]
            raise ValueError(
                f"{type(self).__name__} holds {len(packed)} packed layers ({next(iter(packed)) or 'itself'}, ...): "
                f"{library} would write a folder that loads at random. Save with lowbit.save(model, folder), and load "
                "with lowbit.load(folder, model), where model is the float model as it was before lowbit.convert; or "
                "leave these layers float by skip="
            )
        return original(self, *args, **kwargs)

    checked._lowbit = True  # type: ignore[attr-defined]
    setattr(owner, method, checked)
