"""How many bytes a model takes: its distinct storages, each counted once, whatever shows it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lowbit.nn.experts import FloatExperts

_SPARSE = {
    torch.sparse_coo: ("_indices", "_values"),
    **dict.fromkeys((torch.sparse_csr, torch.sparse_bsr), ("crow_indices", "col_indices", "values")),
    **dict.fromkeys((torch.sparse_csc, torch.sparse_bsc), ("ccol_indices", "row_indices", "values")),
}
Storages = dict[int, int]  # what identifies a storage -> its bytes


def storages(tensors: Iterable[Tensor]) -> Storages:
    """The distinct storages of ``tensors``. They are told apart as long as the tensors live, on meta too."""
    found: Storages = {}
    for tensor in tensors:
        for part in _parts(tensor):
            storage = part.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return found


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor subclass, or a sparse tensor, is made of."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
    elif tensor.layout in _SPARSE:
        for name in _SPARSE[tensor.layout]:
            yield getattr(tensor, name)()
    elif tensor.layout is torch.strided:  # others have no storage
        yield tensor


def named_tensors(model: nn.Module, without: Iterable[nn.Module] = ()) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """(name, module, tensor) of every parameter and buffer, under each of its names.

    ``without``: modules that are left out, with all below them.
    """
    without = list(without)
    left_out = {id(module) for module in without}
    # a module of `without` may stand for a Parameter of one in the model
    stood_for = {(id(m.owner), m.attribute) for m in without if isinstance(m, FloatExperts)}

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module, Tensor]]:
        if id(module) in left_out:
            return
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and not is_lazy(tensor) and (id(module), name) not in stood_for:
                    yield prefix + name, module, tensor
        for name, child in module._modules.items():
            if child is not None:
                yield from walk(child, f"{prefix}{name}.")

    yield from walk(model, "")


def place(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors have in common that show the very same values, whether they are one object or two."""
    if is_traceable_wrapper_subclass(tensor) or tensor.layout is not torch.strided:
        return (id(tensor),)
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def overlap(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one storage may have elements in common."""

    def ends(tensor: Tensor) -> tuple[int, int]:
        start = int(tensor.storage_offset()) * tensor.dtype.itemsize
        span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        return start, start + span * tensor.dtype.itemsize

    if not first.numel() or not second.numel() or first.untyped_storage()._cdata != second.untyped_storage()._cdata:
        return False
    (start, end), (other_start, other_end) = ends(first), ends(second)
    return start < other_end and other_start < end


def tensors_of(*modules: nn.Module) -> list[Tensor]:
    """Every parameter and buffer of the modules."""
    return [t for module in modules for t in (*module.parameters(), *module.buffers()) if not is_lazy(t)]


def nbytes(model: nn.Module) -> int:
    """Bytes of the distinct storages of a model's parameters and buffers."""
    return sum(storages(tensors_of(model)).values())


class Ledger:
    """What a conversion does to a model's bytes, group by group: ``after = before - freed + added``.

    Args:
        model: before anything is swapped.
        groups: for each group that shares one weight, the modules that are swapped.
    """

    def __init__(self, model: nn.Module, groups: list[list[nn.Module]]) -> None:
        self._of_model = storages(tensors_of(model))
        self._own = [storages(tensors_of(*modules)) for modules in groups]
        swapped = [module for modules in groups for module in modules]
        self._kept = set(storages(tensor for _, _, tensor in named_tensors(model, swapped)))
        self._added = [0 for _ in groups]

    def enter(self, group: int, made: Iterable[nn.Module]) -> None:
        """Take down what replaces the modules of a group. Tensors on meta count as if they were real."""
        held = storages(tensors_of(*made))
        self._kept.update(held.keys() & self._of_model.keys())
        self._added[group] = sum(size for key, size in held.items() if key not in self._of_model)

    @property
    def before(self) -> int:
        return sum(self._of_model.values())

    def freed(self) -> list[int]:
        """By group, the bytes that go with it: a storage that a later group also uses counts for the first."""
        seen = set(self._kept)
        sizes = []
        for own in self._own:
            sizes.append(sum(size for key, size in own.items() if key not in seen))
            seen.update(own)
        return sizes

    def added(self) -> list[int]:
        """By group, the bytes of new tensors."""
        return list(self._added)

    @property
    def after(self) -> int:
        return self.before - sum(self.freed()) + sum(self._added)
