"""What integrations do with a model before and after its layers are swapped: they register it here."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

Hook = Callable[[nn.Module], None]


class Hooks:
    """Functions of a model. Calling this calls them, in the order in which they were registered."""

    def __init__(self) -> None:
        self._functions: list[Hook] = []

    def register(self, function: Hook) -> None:
        """Add ``function``; a second registration of the same function changes nothing."""
        if function not in self._functions:
            self._functions.append(function)

    def __call__(self, model: nn.Module) -> None:
        for function in self._functions:
            function(model)


before_convert = Hooks()  # may raise: nothing has changed
after_convert = Hooks()
after_dequantize = Hooks()
