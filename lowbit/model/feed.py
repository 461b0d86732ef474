"""Blocks of a model that are called one after the other, without what comes before them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lowbit.model.calibrate import Reached, call

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

    A pass over the batches finds it. Where a block's hidden states are the very output of the block before, and what
    else it takes does not depend on the blocks, no other pass is needed for it.
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
        self._previous: dict[str, str] = {}  # of a block: the one whose very output it takes
        self._unsure: set[str] = set()  # blocks that take tensors made after the first block was called

    def go_to(self, name: str) -> None:
        """Call :meth:`output` of this block next.

        Raises ``ValueError`` where a block cannot be called alone.
        """
        before, self._now = self._now, name
        if before and self._previous.get(name) == before and (name not in self._unsure or self._still_called_so(name)):
            outputs = [self._output(before, i) for i in range(len(self._calls[before]))]
            del self._calls[before]
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
        return self._output(self._now, index)

    def _output(self, name: str, index: int) -> Tensor:
        (hidden, *args), kwargs = self._calls[name][index]
        # a copy: some blocks add to their hidden states in place
        return first_of(self.model.get_submodule(name)(hidden.clone(), *args, **kwargs))

    def _still_called_so(self, name: str) -> bool:
        """Whether a block takes the tensors that were seen, hidden states apart; the first batch tells."""
        found: list[Any] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append((args[1:], kwargs))
            raise Reached

        handle = self.model.get_submodule(name).register_forward_pre_hook(before, with_kwargs=True)
        try:
            with suppress(Reached):
                call(self.model, self.batches[0])
        finally:
            handle.remove()
        seen, now = _tensors(self._calls[name][0]), _tensors(found)
        return len(seen) == len(now) and all(map(torch.equal, seen, now))

    def _look(self, names: list[str]) -> None:
        """Find the calls of these blocks; without the hidden states, but of the first one."""
        self._calls = {name: [] for name in names}
        self._previous, self._unsure = dict(zip(names[1:], names, strict=False)), set()
        last: tuple[str, Tensor | None, int] = "", None, 0  # the block, its output and the version of that
        known: set[tuple[int, int]] = set()  # of this batch: what the first block is called with
        given: list[Tensor] = []  # by the first block

        def before(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not args or not isinstance(args[0], Tensor):
                raise ValueError(f"block {name} must be called with its hidden states first: got {len(args)} arguments")
            hidden, *others = args
            version = _version(hidden)
            tensors = {(id(tensor), _version(tensor)) for tensor in _tensors((others, kwargs))}
            if name == names[0]:
                known.clear()
                known.update(tensors)
                others.insert(0, hidden.clone())
            elif self._previous.get(name) != last[0] or hidden is not last[1] or version != last[2]:
                self._previous.pop(name, None)
            if tensors - known:
                self._unsure.add(name)
            self._calls[name].append((tuple(others), kwargs))

        def after(name: str, module: nn.Module, args: Any, output: Any) -> None:
            nonlocal last
            hidden = first_of(output)
            last = name, hidden, _version(hidden)
            if name == names[0]:
                given.append(hidden.clone())

        handles = []
        try:
            for name in names:
                block = self.model.get_submodule(name)
                handles.append(block.register_forward_pre_hook(partial(before, name), with_kwargs=True))
                handles.append(block.register_forward_hook(partial(after, name)))
            for i, batch in enumerate(self.batches):
                call(self.model, batch)
                wrong = next((name for name in names if len(self._calls[name]) != i + 1), None)
                if wrong is not None:
                    times = len(self._calls[wrong]) - i
                    raise ValueError(f"block {wrong} must be called once for a batch: got {times} calls")
        finally:
            for handle in handles:
                handle.remove()
        self._require_alone(names[0], given)

    def _require_alone(self, name: str, given: list[Tensor]) -> None:
        """A block may need more than its arguments: a state that it keeps, or that the model gives it before."""
        for i, wanted in enumerate(given):
            try:
                found = self._output(name, i)
                same = found.shape == wanted.shape and torch.allclose(
                    found.float(), wanted.float(), rtol=1e-2, atol=1e-2 * float(wanted.float().std()), equal_nan=True
                )
            except Exception as error:  # whatever a foreign block may raise
                raise ValueError(f"block {name} must run alone: it raises {type(error).__name__}: {error}") from error
            if not same:
                raise ValueError(f"block {name} must give alone what it gives in the model: it does not for batch {i}")


def _tensors(arguments: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def first_of(output: Any) -> Tensor:
    """The hidden states of what a block gives."""
    try:
        found = output if isinstance(output, Tensor) else output[0]
    except (TypeError, LookupError):
        found = output
    if not isinstance(found, Tensor):
        raise ValueError(f"a block must give its hidden states first: got {type(found).__name__}")
    return found
