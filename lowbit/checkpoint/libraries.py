"""Models of other libraries: how they are saved, loaded and converted file by file. Integrations register it here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.checkpoint.reader import Checkpoint


@dataclass(frozen=True)
class Stack:
    """Weights of experts that files have one by one, where the model has one tensor.

    Attributes:
        keys: of each expert, the names of its tensors in the files, in their order.
        along: the dimension along which the tensors of one expert are joined; ``None`` where it has one.
        checkpoint: the files.
    """

    keys: list[list[str]]
    along: int | None
    checkpoint: Checkpoint

    def __call__(self, index: int) -> Tensor:
        """The weight of one expert, as the model has it."""
        tensors = [self.checkpoint.read(key) for key in self.keys[index]]
        return tensors[0] if self.along is None else torch.cat(tensors, self.along)


class FloatFolder(ABC):
    """A saved float model that can be converted one layer at a time.

    Attributes:
        model: the float model, its parameters on meta.
        names: name in the model's state_dict -> name of the tensor in the files.
        stacks: name in the model's state_dict -> where the weights of its experts are, where the files have a tensor
            for each expert.
    """

    model: nn.Module
    names: dict[str, str]
    stacks: dict[str, Stack]

    @abstractmethod
    def dtype_of(self, name: str) -> torch.dtype | None:
        """The dtype in which the library loads the tensor ``name`` of the model; ``None``: as it is stored."""

    def leaves_out(self, key: str) -> bool:
        """Whether the library leaves out a tensor of the files that no module takes, without a word."""
        return False

    @abstractmethod
    def retie(self) -> None:
        """Called when the layers are swapped, before the other tensors are read: tie packed tensors by name."""

    @abstractmethod
    def finish(self) -> nn.Module:
        """Called when all tensors are read: the model, ready to be used and saved."""


class Library(ABC):
    """A library with model classes, configurations and folders of its own."""

    @abstractmethod
    def owns(self, model: nn.Module) -> bool:
        """Whether ``model`` is saved by this library's own means."""

    @abstractmethod
    def is_folder(self, folder: Path) -> bool:
        """Whether ``folder`` holds a model of this library."""

    @abstractmethod
    def save(self, model: nn.Module, folder: Path) -> None:
        """Save a packed model that this library :meth:`owns`."""

    @abstractmethod
    def load(self, folder: Path, model: nn.Module | None, device: torch.device | str) -> Any:
        """:func:`lowbit.load` of a packed model, into ``model`` where one is given."""

    @abstractmethod
    def load_float(self, folder: Path) -> Any:
        """The float model that ``folder`` holds."""

    @abstractmethod
    def open_float(self, folder: Path, checkpoint: Checkpoint) -> FloatFolder | None:
        """The float model of ``folder`` without its weights; ``None`` where files and modules do not correspond."""


_libraries: list[Library] = []


def register(library: Library) -> None:
    """Let :func:`lowbit.save`, :func:`lowbit.load` and :func:`lowbit.convert_folder` ask this library."""
    _libraries.append(library)


def owner(model: nn.Module) -> Library | None:
    """The library that saves ``model`` by its own means, if any."""
    return next((library for library in _libraries if library.owns(model)), None)


def library_of(folder: Path) -> Library | None:
    """The library whose model ``folder`` holds, if any."""
    return next((library for library in _libraries if library.is_folder(folder)), None)
