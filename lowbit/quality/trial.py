"""A model in which each group of layers is as one of its candidates has it, measured."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lowbit.model.surgery import float_modules, put
from lowbit.nn.layer import Layer
from lowbit.quality.distance import Distance


class Trial:
    """Puts candidates into ``model`` and measures.

    Args:
        model: it is changed.
        originals: group -> float modules by name.
        choices: candidate, group -> layers by name.
        distance: of the model from the float one.
    """

    def __init__(
        self, model: nn.Module, originals: list[dict[str, nn.Module]], choices: list[list[dict[str, Layer]]],
        distance: Distance,
    ) -> None:  # fmt: skip
        self.model, self.originals, self.choices, self.distance = model, originals, choices, distance
        self._placed: list[int | None] = [None] * len(originals)

    def __call__(self, plan: Sequence[int | None], distance: Distance | None = None) -> float:
        """The distance, or another, with a candidate of each group; ``None``: the float layers."""
        for g, c in enumerate(plan):
            if self._placed[g] != c:
                for name, module in (self.originals[g] if c is None else _quick(self.choices[c][g])).items():
                    put(self.model, name, module)
                self._placed[g] = c
        return (distance or self.distance)(self.model)


def _quick(layers: dict[str, Layer]) -> dict[str, nn.Module]:
    """Float layers of the same weights, which take many rows faster, where that is all there is to them."""
    if all(layer.kind != "experts" and layer.format.activations == "float" for layer in layers.values()):
        return float_modules(layers)
    return dict(layers)
