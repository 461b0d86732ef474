"""The blocks of a model, one after the other: what each is called with, and how far its output is from the float
one's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.model.calibrate import call

Call = tuple[tuple[Any, ...], dict[str, Any]]  # of a block: arguments, the first of them its hidden states


class Blocks:
    """The members of the outermost ``nn.ModuleList``s that hold some of ``names``, in order.

    Attributes:
        names: of the blocks.
        inside: of ``names``, those that are in a block.

    Raises:
        ValueError: there is none; the reference has no such block.
    """

    def __init__(self, model: nn.Module, reference: nn.Module, names: Iterable[str]) -> None:
        lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        outermost = [a for a in lists if not any(a.startswith(f"{b}.") for b in lists)]
        members = ((name, i) for name in outermost for i, _ in model.get_submodule(name).named_children())
        blocks = [f"{name}.{i}".lstrip(".") for name, i in members]
        self._layers = {block: [n for n in names if n.startswith(f"{block}.")] for block in blocks}
        self._layers = {block: inside for block, inside in self._layers.items() if inside}
        self.names = list(self._layers)
        self.inside = {n for inside in self._layers.values() for n in inside}
        if not self.names:
            raise ValueError("by='block' needs layers in the members of an nn.ModuleList: the model has none")
        self._packed = _Feed(model, self.names)
        self._float = _Feed(reference, self.names)
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


class _Feed:
    """What one model's blocks are called with.

    A pass over the batches finds it. Where a block's hidden states are the very output of the block before, no other
    pass is needed for it.
    """

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.model, self.names = model, names
        for name in names:
            try:
                model.get_submodule(name)
            except AttributeError:
                raise ValueError(f"reference must have the blocks of the model: it has no {name}") from None
        self.batches: list[Any] = []
        self._now = ""
        self._calls: dict[str, list[Call]] = {}
        self._follows: set[str] = set()  # blocks that take what the one before gives

    def go_to(self, name: str) -> None:
        """Call :meth:`output` of this block next."""
        before, self._now = self._now, name
        if before and name in self._follows:
            previous = self.model.get_submodule(before)
            outputs = [_first(previous(*args, **kwargs)) for args, kwargs in self._calls.pop(before)]
            self._calls[name] = [
                ((hidden, *args), kwargs) for hidden, (args, kwargs) in zip(outputs, self._calls[name], strict=True)
            ]
        else:
            self._look(self.names[self.names.index(name) :])

    def hidden(self, index: int) -> Tensor:
        """What the block is called with."""
        return self._calls[self._now][index][0][0]  # type: ignore[no-any-return]

    def output(self, index: int) -> Tensor:
        """What the block gives."""
        args, kwargs = self._calls[self._now][index]
        return _first(self.model.get_submodule(self._now)(*args, **kwargs))

    def _look(self, names: list[str]) -> None:
        """Find the calls of these blocks; without the hidden states, but of the first one."""
        self._calls = {name: [] for name in names}
        self._follows = set(names[1:])
        last: Tensor | None = None

        def before(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not args or not isinstance(args[0], Tensor):
                raise ValueError(f"block {name} must be called with its hidden states first: got {len(args)} arguments")
            if name != names[0] and args[0] is not last:
                self._follows.discard(name)
            self._calls[name].append((args if name == names[0] else args[1:], kwargs))

        def after(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal last
            last = _first(output)

        handles = []
        try:
            for name in names:
                block = self.model.get_submodule(name)
                handles.append(block.register_forward_pre_hook(partial(before, name), with_kwargs=True))
                handles.append(block.register_forward_hook(after))
            for i, batch in enumerate(self.batches):
                call(self.model, batch)
                wrong = next((name for name in names if len(self._calls[name]) != i + 1), None)
                if wrong is not None:
                    times = len(self._calls[wrong]) - i
                    raise ValueError(f"block {wrong} must be called once for a batch: got {times} calls")
        finally:
            for handle in handles:
                handle.remove()


def _first(output: Any) -> Tensor:
    """The hidden states of what a block gives."""
    found = output if isinstance(output, Tensor) else output[0]
    if not isinstance(found, Tensor):
        raise ValueError(f"a block must give its hidden states first: got {type(found).__name__}")
    return found
