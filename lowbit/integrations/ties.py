"""Ties of transformers models: by the names of packed tensors."""

from __future__ import annotations

from typing import Any

from torch import nn

from lowbit.checkpoint.metadata import shared_tensors, tied_groups
from lowbit.nn.layer import Layer


def retie(model: Any, *, held: bool = True) -> None:
    """Rewrite the tied names from ``x.weight`` to the packed tensors of ``x``, in ``model`` and its submodels.

    A pair of which only one side is packed is not tied: each side is saved. ``held``: the tensors are what they will
    be, and names whose tensors differ are not tied; otherwise float ones are still to be read. transformers reads the
    names from ``_tied_weights_keys`` when it saves and from ``all_tied_weights_keys`` when it loads.
    """
    declared = {**(_declared(model) if held else {}), **getattr(model, "all_tied_weights_keys", {})}
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    tied: dict[str, str] = {}
    for target, source in declared.items():
        (first, leaf), (second, source_leaf) = target.rpartition(".")[::2], source.rpartition(".")[::2]
        mine, other = modules.get(first), modules.get(second)
        if mine is None or other is None:
            continue
        packed = [
            isinstance(mine, Layer) and leaf != "bias",
            isinstance(other, Layer) and source_leaf != "bias",
        ]
        if not any(packed):
            tensor = mine._parameters.get(leaf)
            if not held or (tensor is not None and tensor is other._parameters.get(source_leaf)):
                tied[target] = source
        elif all(packed) and mine is not other:
            assert isinstance(mine, Layer)
            assert isinstance(other, Layer)
            theirs = other.named_tensors()
            names = shared_tensors(mine, other)
            if all(mine.named_tensors()[name] is theirs[name] for name in names):
                tied.update({f"{first}.{name}": f"{second}.{name}" for name in names})
    for group in tied_groups(model):  # and those that only lowbit tied
        root = next((name for name in group if not any(t.startswith(name + ".") for t in tied)), group[0])
        for other in group:
            if other != root and not any(t.startswith(other + ".") for t in tied):
                names = shared_tensors(modules[root], modules[other])
                tied.update({f"{other}.{name}": f"{root}.{name}" for name in names})
    for name, part in submodels(model):
        prefix = f"{name}." if name else ""
        inside = {
            target.removeprefix(prefix): source.removeprefix(prefix)
            for target, source in tied.items()
            if target.startswith(prefix) and source.startswith(prefix)
        }
        part.all_tied_weights_keys = dict(inside)
        part._tied_weights_keys = inside


def _declared(model: Any) -> dict[str, str]:
    """The ties that the classes declare, as far as their names are those of parameters now."""
    for _, part in submodels(model):
        part.__dict__.pop("_tied_weights_keys", None)
    try:
        declared: dict[str, str] = model.get_expanded_tied_weights_keys(all_submodels=True)
    except ValueError:  # a pattern for float weights only, all of which are packed
        return {}
    return declared


def submodels(model: nn.Module) -> list[tuple[str, Any]]:
    from transformers.modeling_utils import PreTrainedModel

    return [(name, module) for name, module in model.named_modules() if isinstance(module, PreTrainedModel)]
