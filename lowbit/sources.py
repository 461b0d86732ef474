"""Modules that *were trained quantized*: how each is read without loss.

A recogniser looks at one module and returns a :class:`Source`, the exact codes and scales it trained with, or
``None`` when the module is not of its kind. ``lowbit.convert(model)`` swaps every recognised module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from lowbit.packed.quantize import Quantized


@dataclass(frozen=True)
class Source:
    """What a quantized-trained module holds, ready to be packed as it is.

    Attributes:
        quantized: codes, scales, zeros (and outliers) such that ``(code - zero) * scale`` is the trained weight.
        bits: of the codes, 2 to 8.
        group_size: input features per scale; ``None`` for one scale per row or tensor (by the shape of scales).
        kind: ``"linear"`` or ``"embedding"``.
        bias: kept as it is.
        activations: ``"float"``, ``"int8"`` (dynamic, per token) or ``"int8_static"`` with ``x_scale``.
        x_scale: the input's scale of ``"int8_static"``.
        weight: the float weight ``[N, K]`` the module multiplies by, if it has one: conversion then checks that
            the packed form reproduces it, and refuses when it does not.
        padding_idx: of an embedding.
    """

    quantized: Quantized
    bits: int
    group_size: int | None = None
    kind: str = "linear"
    bias: nn.Parameter | Tensor | None = None
    activations: str = "float"
    x_scale: Tensor | None = None
    weight: Tensor | None = None
    padding_idx: int | None = None


Recogniser = Callable[[nn.Module], Source | None]
Prologue = Callable[[nn.Module], nn.Module]

_recognisers: dict[type[nn.Module], tuple[Recogniser, Prologue | None]] = {}


def register_source(
    module_type: type[nn.Module], recognise: Recogniser, *, prologue: Prologue | None = None
) -> None:
    """Teach :func:`lowbit.convert` to read modules of exactly ``module_type``.

    Args:
        module_type: the class of the trained module.
        recognise: module -> :class:`Source`, or ``None`` to leave this one alone.
        prologue: module -> a module to run on the input first (for example a norm that the trained module
            applies itself); the layer becomes ``nn.Sequential(prologue(module), packed layer)``. It must not need
            the module's weights, because a saved model is rebuilt with it.

    A second registration for the same type replaces the first.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"module_type must be a subclass of nn.Module: got {module_type!r}")
    _recognisers[module_type] = (recognise, prologue)


def is_source(module: nn.Module) -> bool:
    """Whether a recogniser is registered for the type of ``module``."""
    return type(module) in _recognisers


def recognise(module: nn.Module) -> Source | None:
    """The :class:`Source` of a registered module, else ``None``."""
    entry = _recognisers.get(type(module))
    return None if entry is None else entry[0](module)


def prologue_of(module: nn.Module) -> nn.Module | None:
    """The module to run before the packed form of a registered module, if any."""
    entry = _recognisers.get(type(module))
    return None if entry is None or entry[1] is None else entry[1](module)
