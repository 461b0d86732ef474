"""Blocks of a model that are called one after the other, without what comes before them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from lowbit.model.calibrate import call

Call = tuple[tuple[Any, ...], dict[str, Any]]  # of a block: arguments, the first of them its hidden states


def blocks_of(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """The members of the outermost ``nn.ModuleList``s that hold some of ``names``, in order, and which they hold."""
    names = list(names)
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [a for a in lists if not any(a.startswith(f"{b}.") for b in lists)]
    members = ((name, i) for name in outermost for i, _ in model.get_submodule(name).named_children())
    inside = {block: [n for n in names if n.startswith(f"{block}.")]
              for block in (f"{name}.{i}".lstrip(".") for name, i in members)}  # fmt: skip
    return {block: found for block, found in inside.items() if found}


@contextmanager
def without_cache(*models: nn.Module) -> Iterator[None]:
    """A block that is called again must not find what it left in transformers' cache of keys and values."""
    configs: list[Any] = [getattr(module, "config", None) for model in models for module in model.modules()]
    before = [(config, config.use_cache) for config in configs if isinstance(getattr(config, "use_cache", None), bool)]
    try:
        for config, _ in before:
            config.use_cache = False
        yield
    finally:
        for config, used in reversed(before):
            config.use_cache = used


class Feed:
    """What one model's blocks are called with.

    A pass over the batches finds it. Where a block's hidden states are the very output of the block before, no other
    pass is needed for it.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], batches: Sequence[Any] = ()) -> None:
        self.model, self.names, self.batches = model, list(names), batches
        for name in names:
            try:
                model.get_submodule(name)
            except AttributeError:
                raise ValueError(f"reference must have the blocks of the model: it has no {name}") from None
        self._now = ""
        self._calls: dict[str, list[Call]] = {}
        self._follows: set[str] = set()  # blocks that take what the one before gives

    def go_to(self, name: str) -> None:
        """Call :meth:`output` of this block next."""
        before, self._now = self._now, name
        if before and name in self._follows:
            previous = self.model.get_submodule(before)
            outputs = [first_of(previous(*args, **kwargs)) for args, kwargs in self._calls.pop(before)]
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
        return first_of(self.model.get_submodule(self._now)(*args, **kwargs))

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
            last = first_of(output)

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


def first_of(output: Any) -> Tensor:
    """The hidden states of what a block gives."""
    found = output if isinstance(output, Tensor) else output[0]
    if not isinstance(found, Tensor):
        raise ValueError(f"a block must give its hidden states first: got {type(found).__name__}")
    return found
