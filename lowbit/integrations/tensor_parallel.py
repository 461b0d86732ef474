"""Tensor parallelism of packed transformers models: each process keeps its share of every layer's codes.

transformers divides a model by its plan: a style for each module, the Parameters of which it shards. Packed tensors are
buffers, and cutting them is our part: each process reads all of a layer's tensors and keeps its share
(:func:`lowbit.nn.shard.shard`). transformers' styles then move inputs and outputs. Embeddings and what is tied to them
stay whole in every process.

Names inside transformers that this file depends on were checked with 5.24.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from lowbit.nn.layer import Layer, layers, storage_of
from lowbit.nn.linear import LinearLayer
from lowbit.nn.shard import INPUT, OUTPUT, shard

_DIMENSIONS = {
    "colwise": OUTPUT, "colwise_gather_output": OUTPUT, "colwise_rep": OUTPUT,
    "rowwise": INPUT, "rowwise_split_input": INPUT, "rowwise_rep": INPUT,
}  # fmt: skip


def styles(model: nn.Module, plan: dict[str, str]) -> dict[str, str]:
    """Take out of ``plan`` what stays whole; returns layer name -> style of the others.

    ``plan``: module name, with ``*`` for numbers -> style.
    """
    found = layers(model, duplicates=True)
    storages = [storage_of(layer) for layer in found.values()]
    whole = {
        _pattern(name)
        for name, layer in found.items()
        if not isinstance(layer, LinearLayer) or storages.count(storage_of(layer)) > 1
    }
    for name in whole & plan.keys():
        del plan[name]
    return {name: plan[_pattern(name)] for name in found if _pattern(name) in plan}


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def split(model: Any, styles: Mapping[str, str]) -> None:
    """Cut every layer that has a style to this process's share; nothing in a model that is not divided.

    Raises ``ValueError`` naming a layer that cannot be cut so.
    """
    count = getattr(model, "_tp_size", None) or 1
    if count == 1:
        return
    for name, layer in layers(model).items():
        if layer.kind == "experts":  # the styles of the modules around them would add up whole experts
            raise ValueError(f"{name}: packed experts cannot be divided between {count} processes: load the model "
                             "without tp_plan, or convert it with skip=['*.experts']")  # fmt: skip
    mesh = model._device_mesh
    mesh = mesh["tp"] if mesh.mesh_dim_names and "tp" in mesh.mesh_dim_names else mesh
    for name, layer in layers(model).items():
        style = styles.get(name, "one of another plan" if getattr(layer, "_is_hooked", False) else None)
        if style is None:
            continue
        if style not in _DIMENSIONS:
            raise ValueError(
                f"{name}: a packed layer is divided in the styles {', '.join(_DIMENSIONS)}: got style={style!r}"
            )
        assert isinstance(layer, LinearLayer)
        shard(layer, _DIMENSIONS[style], mesh.get_local_rank(), count)
        layer._hf_quantized_needs_local_tp = True  # our ops take plain tensors


def refuse_saving(model: nn.Module) -> None:
    """Raise ``ValueError`` where a layer is only a share: the other processes hold the rest."""
    for name, layer in layers(model).items():
        if _is_share(layer):
            raise ValueError(f"{name} is this process's share of a layer: save the model before it is divided")


def _is_share(layer: Layer) -> bool:
    return getattr(layer, "whole", None) is not None
