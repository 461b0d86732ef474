"""``torch.optim.swa_utils.AveragedModel(use_buffers=True)``: it would average codes as if they were numbers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.integrations.after_import import after_import
from lowbit.nn.layer import layers


def register() -> None:
    """Average all but the stored tensors of packed layers: they follow the model, as without ``use_buffers``."""
    after_import("torch.optim.swa_utils", _install)


def _install(module: ModuleType) -> None:
    original = module.AveragedModel.update_parameters
    if getattr(original, "_lowbit", False):
        return

    @functools.wraps(original)
    def update_parameters(self: Any, model: nn.Module) -> None:
        mine, theirs = layers(self.module), layers(model)
        if not self.use_buffers or not mine:
            original(self, model)
            return
        if len(mine) != len(theirs):
            raise ValueError(f"model must have the {len(mine)} packed layers of the averaged one: got {len(theirs)}")
        state = {**vars(self), "n_averaged": self.n_averaged, "module": _WithoutStored(self.module)}
        original(SimpleNamespace(**state), _WithoutStored(model))
        with torch.no_grad():
            for averaged, layer in zip(mine.values(), theirs.values(), strict=True):
                for name, tensor in layer.named_tensors().items():
                    held = averaged._buffers.get(name)  # what is trained is a Parameter
                    if held is not None:
                        held.copy_(averaged._as_held(name, tensor))

    update_parameters._lowbit = True  # type: ignore[attr-defined]
    module.AveragedModel.update_parameters = update_parameters


class _WithoutStored:
    """The parameters of a model, and its buffers but for those of packed layers."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def parameters(self) -> Iterator[nn.Parameter]:
        return self._model.parameters()

    def buffers(self) -> Iterator[Tensor]:
        stored = {id(tensor) for layer in layers(self._model).values() for tensor in layer._buffers.values()}
        return (tensor for tensor in self._model.buffers() if id(tensor) not in stored)
