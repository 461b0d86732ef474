"""The versioned description of a packed model: written as ``lowbit.json``, or as the ``quantization_config``
of a transformers ``config.json``.

    {"format_version": "2.5", "lowbit": "0.1.0",
     "layers": [{"family": "packed", "kind": "linear", ..., "names": ["h.0.attn.c_attn", ...]}, ...],
     "tied": [["wte", "lm_head"]], "weight_error": {"wte": 0.08}, "notes": {...}, "skipped": {"score": "..."},
     "trained": {"wte": ["scales"]}}

Layers with the same :meth:`~lowbit.nn.layer.Layer.config` share one entry. ``tied`` lists layers that use one
storage. ``trained`` lists the stored tensors that are Parameters (:func:`lowbit.make_trainable`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lowbit.core.version import VERSION
from lowbit.model import experts, sources
from lowbit.model.kept import skipped_in as skipped_in
from lowbit.model.surgery import put
from lowbit.nn.experts import FloatExperts
from lowbit.nn.layer import Layer, LayerConfig, layers, make_trainable, storage_of

# 1.0 knew the family packed only, 1.1 no groups of activations, 1.2 no guards in the files of transformers models, 2.0
# not what is trained, 2.1 no experts, 2.3 no minima and no scales of two levels, 2.4 no packed zeros
# and no factors that all rows share
FORMAT_VERSION = "2.5"
_FIELDS = {"format_version", "lowbit", "layers", "tied", "weight_error", "notes", "skipped", "trained"}


@dataclass(frozen=True)
class Metadata:
    """What a description says, by layer name."""

    layers: dict[str, LayerConfig]
    tied: tuple[tuple[str, ...], ...] = ()
    weight_error: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    trained: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> Metadata:
        """What there is to say about the packed layers of ``model``."""
        found = layers(model, duplicates=True)
        errors = {name: layer.weight_error for name, layer in found.items() if layer.weight_error is not None}
        return cls(
            {name: LayerConfig.of(layer) for name, layer in found.items()},
            tuple(map(tuple, tied_groups(model))),
            {name: float(f"{error:.6g}") for name, error in errors.items()},
            {name: layer.note for name, layer in found.items() if layer.note is not None},
            skipped_in(model),
            {name: layer.trained() for name, layer in found.items() if layer.trained()},
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON-ready description; :func:`parse` is the inverse."""
        groups: dict[str, dict[str, Any]] = {}
        for name, layer in self.layers.items():
            config = layer.to_dict()
            groups.setdefault(json.dumps(config, sort_keys=True), {**config, "names": []})["names"].append(name)
        description: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "lowbit": VERSION,
            "layers": list(groups.values()),
        }
        optional = {
            "tied": [list(group) for group in self.tied],
            "weight_error": dict(self.weight_error),
            "notes": dict(self.notes),
            "skipped": dict(self.skipped),
            "trained": dict(self.trained),
        }
        return description | {name: value for name, value in optional.items() if value}

    def renamed(self, names: dict[str, str]) -> Metadata:
        """The same for a model that calls its layers differently; layers not in ``names`` are left out."""
        tied = [tuple(names[name] for name in group if name in names) for group in self.tied]
        return Metadata(
            {names[name]: config for name, config in self.layers.items() if name in names},
            tuple(group for group in tied if len(group) > 1),
            {names[name]: error for name, error in self.weight_error.items() if name in names},
            {names[name]: note for name, note in self.notes.items() if name in names},
            self.skipped,
            {names[name]: tensors for name, tensors in self.trained.items() if name in names},
        )


def shared_tensors(first: Layer, second: Layer) -> list[str]:
    """Names of the stored tensors that two tied layers have in common."""
    others = second.format.weight_tensors()
    return [name for name, spec in first.format.weight_tensors().items() if others.get(name) == spec]


def tied_groups(model: nn.Module) -> list[list[str]]:
    """Names of the layers that use one storage, in groups of two or more."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, layer in layers(model, duplicates=True).items():
        groups.setdefault(storage_of(layer), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def train_again(model: nn.Module, metadata: Metadata) -> None:
    """Make Parameters of what was trained when the model was saved, once its tensors are there."""
    found = layers(model, duplicates=True)
    for name, tensors in metadata.trained.items():
        if name in found and not found[name].trained():
            storage = storage_of(found[name])
            tied = [layer for layer in found.values() if storage_of(layer) == storage]
            make_trainable(nn.ModuleList(tied), *tensors)


def describe(model: nn.Module) -> dict[str, Any]:
    """The JSON-ready description of a model's packed layers; :func:`parse` is the inverse."""
    return Metadata.of(model).to_dict()


def _check(condition: bool, field_name: str, requirement: str, value: object) -> None:
    if not condition:
        raise ValueError(f"lowbit metadata: {field_name} must be {requirement}: got {value!r:.200}")


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def parse(description: dict[str, Any]) -> Metadata:
    """Check a description and return it by layer name.

    Raises:
        ValueError: naming the layer and the field: an unknown major version, an unknown family or field, a
            wrong type, a layer that is described twice, or named without being described.
    """
    _check(isinstance(description, dict), "the description", "an object", description)
    version = description.get("format_version")
    _check(isinstance(version, str), "format_version", "a string like '1.0'", version)
    major, _, minor = str(version).partition(".")
    newest = tuple(map(int, FORMAT_VERSION.split(".")))
    known = major in map(str, range(1, newest[0] + 1)) and minor.isdigit()
    _check(known, "format_version", f"1.x to {newest[0]}.x for this version of lowbit", version)
    if (int(major), int(minor)) <= newest:  # a later minor version may add fields
        unknown = sorted(set(description) - _FIELDS)
        _check(not unknown, "the description", f"made of the fields {', '.join(sorted(_FIELDS))}", unknown)
    entries = description.get("layers")
    _check(isinstance(entries, list), "layers", "a list of objects", entries)
    assert isinstance(entries, list)
    configs: dict[str, LayerConfig] = {}
    for entry in entries:
        _check(isinstance(entry, dict), "layers", "a list of objects", entry)
        names = entry.get("names")
        _check(_is_names(names) and bool(names), "layers: names", "a list of layer names", names)
        try:
            config = LayerConfig.parse({key: value for key, value in entry.items() if key != "names"})
        except (ValueError, TypeError) as error:
            raise ValueError(f"lowbit metadata: layer {names[0]!r}: {error}") from None
        for name in names:
            _check(name not in configs, "layers: names", "unique", name)
            configs[name] = config
    tied = description.get("tied", [])
    _check(
        isinstance(tied, list) and all(_is_names(group) for group in tied),
        "tied",
        "lists of layer names",
        tied,
    )
    tied_names = [name for group in tied for name in group]
    _check(len(set(tied_names)) == len(tied_names), "tied", "made of layers named once", tied)
    errors, notes = description.get("weight_error", {}), description.get("notes", {})
    skipped, trained = description.get("skipped", {}), description.get("trained", {})
    objects = {"weight_error": errors, "notes": notes, "skipped": skipped, "trained": trained}
    for name, value in objects.items():
        _check(isinstance(value, dict), name, "an object", value)
    for name in (*tied_names, *errors, *notes, *trained):
        _check(name in configs, "a name in tied, weight_error, notes or trained", "one of the described layers", name)
    for name, value in errors.items():
        real = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        _check(real, f"weight_error of {name!r}", "a finite number", value)
    for name, text in (*notes.items(), *skipped.items()):
        _check(isinstance(text, str), f"notes or skipped of {name!r}", "a text", text)
    for name, tensors in trained.items():
        types = configs[name].format.weight_tensors()
        floats = [n for n, (_, dtype) in types.items() if dtype.is_floating_point]
        is_valid = _is_names(tensors) and set(tensors) <= set(floats)
        _check(is_valid, f"trained of {name!r}", f"a list of {', '.join(floats)}", tensors)
    groups = tuple(tuple(group) for group in tied)
    return Metadata(configs, groups, dict(errors), dict(notes), dict(skipped), dict(trained))


def _shape_of(module: nn.Module) -> tuple[int, int] | None:
    """``(N, K)`` of a module that a packed layer stands for, where its attributes tell; of experts ``(E*N, K)``."""
    if isinstance(module, FloatExperts):
        experts, n, k = module.weights.shape
        return experts * n, k
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers': a linear with weight [K, N]
        return int(module.nf), module.get_parameter("weight").shape[0]  # type: ignore[arg-type]
    for rows, columns in (("out_features", "in_features"), ("num_embeddings", "embedding_dim")):
        if hasattr(module, rows) and hasattr(module, columns):
            return int(getattr(module, rows)), int(getattr(module, columns))
    return None


def place_of(modules: dict[str, nn.Module], name: str) -> str | None:
    """The name of the float module that the layer ``name`` stands for, or ``None`` where ``modules`` has none.

    A trained module with a step of its own before or after the weight became ``Sequential(..., layer, ...)``: the
    skeleton has the module that is now the layer's parent.
    """
    if name in modules:
        return name
    parent, _, child = name.rpartition(".")
    return parent if parent in modules and sources.position_of(modules[parent]) == child else None


def apply(
    model: nn.Module,
    metadata: Metadata,
    *,
    dtype_of: Callable[[str, torch.dtype], torch.dtype] = lambda name, dtype: dtype,
) -> Any:
    """Swap the described modules of a float skeleton (its parameters may be on meta) for empty layers on meta.

    ``dtype_of(name, saved dtype)`` chooses each layer's compute dtype. Tied layers share their parameters
    again. Returns the model (or the layer that replaces it, when it is itself the described module).

    Raises:
        ValueError: nothing has changed; a name that the model lacks, or a module of another kind or shape.
    """
    modules = dict(experts.named_parts(model))
    built: dict[str, Layer] = {}
    replacements: dict[str, nn.Module] = {}
    by_module: dict[int, Layer] = {}  # a module registered under two names stays one module
    for name, config in metadata.layers.items():
        where = place_of(modules, name)
        if where is None:
            count = f" ({len(metadata.layers)} were saved)" if len(metadata.layers) > 1 else ""
            raise ValueError(
                f"the saved model has a layer {name!r}{count}, which this model does not have: "
                f"it is a {type(model).__name__}"
            )
        module = modules[where]
        shape = (config.rows, config.format.in_features)
        kind = config.layer_class.kind
        found = _shape_of(module)
        is_embedding = isinstance(module, nn.Embedding) or hasattr(module, "num_embeddings")
        # a trained module's class need not tell what it is
        untold = found is None and sources.is_source(module)
        is_stack = isinstance(module, FloatExperts)
        other_kind = is_embedding != (kind == "embedding") or is_stack != (kind == "experts")
        if (found is not None and found != shape) or (other_kind and not untold):
            raise ValueError(
                f"layer {name!r} was saved from a float {kind} of shape {list(shape)}: "
                f"this model has {repr(module)[:200]} there"
            )
        if isinstance(module, nn.Linear) and config.bias != (module.bias is not None):
            raise ValueError(
                f"layer {name!r} was saved {'with' if config.bias else 'without'} a bias: "
                f"this model has {module!r} there"
            )
        if id(module) not in by_module:
            layer = config.build(dtype_of(name, config.dtype))
            layer.weight_error = metadata.weight_error.get(name)
            layer.note = metadata.notes.get(name)
            layer.train(module.training)
            by_module[id(module)] = layer
        built[name] = by_module[id(module)]
        replacements[where] = built[name] if where == name else sources.wrap(module, built[name])
    for first, *others in metadata.tied:
        for other in others:
            if shared_tensors(built[first], built[other]) != list(built[first].format.weight_tensors()):
                raise ValueError(f"tied layers must have the same format: {first!r} and {other!r} differ")
            built[other].share_weight(built[first])
    for where, replacement in replacements.items():
        model = put(model, where, replacement)
    model.lowbit_skipped = dict(metadata.skipped)  # type: ignore[assignment]
    return model
