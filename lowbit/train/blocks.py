"""The blocks of a model, one after the other: what each is called with, and how far its output is from the float
one's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.model.feed import Feed, blocks_of


class Blocks:
    """The members of the outermost ``nn.ModuleList``s that hold some of ``names``, in order.

    Attributes:
        names: of the blocks.
        inside: of ``names``, those that are in a block.

    Raises:
        ValueError: there is none; the reference has no such block.
    """

    def __init__(self, model: nn.Module, reference: nn.Module, names: Iterable[str]) -> None:
        self._layers = blocks_of(model, names)
        self.names = list(self._layers)
        self.inside = {n for inside in self._layers.values() for n in inside}
        if not self.names:
            raise ValueError("by='block' needs layers in the members of an nn.ModuleList: the model has none")
        self._packed = Feed(model, self.names)
        self._float = Feed(reference, self.names)
        self._wanted: list[Tensor] = []
        self._masks: list[Tensor | None] = []
        self._size = 1.0

    def each(self, batches: list[Any]) -> Iterator[tuple[str, list[str]]]:
        """(block, names of its layers), as :meth:`error` then measures it; the block may change meanwhile."""
        self._masks = [batch.get("attention_mask") if isinstance(batch, dict) else None for batch in batches]
        for feed in (self._packed, self._float):
            feed.batches = batches
        for block in self.names:
            with torch.no_grad():
                self._float.go_to(block)
                self._wanted = [self._float.output(i) for i in range(len(batches))]
                added = [_rows(wanted - self._float.hidden(i), mask).square().mean()
                         if wanted.shape == self._float.hidden(i).shape else _rows(wanted, mask).square().mean()
                         for i, (wanted, mask) in enumerate(zip(self._wanted, self._masks, strict=True))]  # fmt: skip
                self._size = float(torch.stack(added).mean().clamp(min=torch.finfo(torch.float32).tiny))
                self._packed.go_to(block)
            yield block, self._layers[block]

    def error(self, index: int) -> Tensor:
        """The mean squared error of the packed block's output for a batch, over the mean square of what the float
        block adds to its input; padding does not count. Differentiable."""
        difference = self._packed.output(index).float() - self._wanted[index].float()
        return _rows(difference, self._masks[index]).square().mean() / self._size


def _rows(values: Tensor, mask: Tensor | None) -> Tensor:
    return values[mask.bool()].float() if mask is not None and mask.shape == values.shape[:2] else values.float()
