"""How the files and descriptions of saved transformers models match the modules of a model: names, headers, guards."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.checkpoint import foreign, stream
from lowbit.checkpoint.libraries import Stack
from lowbit.checkpoint.metadata import Metadata, apply, place_of
from lowbit.checkpoint.reader import Checkpoint, Entry
from lowbit.core.activations import ActivationSpec
from lowbit.model import experts
from lowbit.model.candidates import embedding_extras
from lowbit.nn.layer import Layer, LayerConfig, layer_class, layers

# Without lowbit, transformers would only warn and start packed layers at random. So a saved file also holds, for every
# packed layer, an empty tensor under the name of its float weight: transformers stops at the mismatch of its size. What
# it prints then lists this name too.
_REMEDY = ".pip_install_lowbit.import_lowbit_before_from_pretrained"
NOTICE = f"this_model_needs_lowbit{_REMEDY}"
# Saving renames tensors for some models, this one too: from "model." to "backbone.", say.
NOTICE_PATTERN = f"{re.escape(_REMEDY)}$"


def guards(model: Any) -> dict[str, Tensor]:
    """What stops transformers without lowbit: see ``NOTICE``."""
    tied = {target.rpartition(".")[0] for target in model.all_tied_weights_keys}
    found = {experts.float_name(name, layer.kind): layer for name, layer in layers(model).items() if name not in tied}
    conversions = conversions_to_save(model)
    if conversions is None:
        conversions = getattr(model, "_weight_conversions", None) or _conversions(model)
    names = [name for name in found if _is_saved_as_is(model, name, conversions)]
    return {name: torch.empty(0, dtype=found[name].dtype) for name in names} | {NOTICE: torch.empty(0)}


def conversions_to_save(model: Any) -> list[Any] | None:
    """What transformers is to revert when it saves ``model``; ``None``: what it would by itself.

    Files hold packed tensors as the model does: codes and outliers cannot be cut, or joined, as float weights can.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if not layers(model) or conversions == []:
        return None
    if conversions is None:
        conversions = [c for c in _conversions(model) if type(c).__name__ != "PrefixChange"]
    packed = _packed_names(model)
    kept = [conversion for conversion in conversions if not _makes(conversion, packed)]
    return None if len(kept) == len(conversions) else kept


def of_float(model: Any, conversions: Iterable[Any]) -> list[Any]:
    """Without the conversions that would take packed tensors of ``model`` for weights to be cut into several.

    Those that merge stay: earlier versions saved packed layers as several, where transformers has them so.
    """
    packed = _packed_names(model)
    return [c for c in conversions if len(c.target_patterns) == 1 or not _makes(c, packed)]


def _packed_names(model: Any) -> list[str]:
    """The names of all that is packed, and of what stands beside it or in its place."""
    return [
        name
        for layer_name, layer in layers(model, duplicates=True).items()
        for name in (experts.float_name(layer_name, layer.kind),
                     *(f"{layer_name}.{tensor}" for tensor in (*layer.format.tensors(), "bias")))
    ]  # fmt: skip


def _makes(conversion: Any, names: Iterable[str]) -> bool:
    """Whether a conversion computes one of these tensors."""
    from transformers.core_model_loading import WeightConverter

    if not isinstance(conversion, WeightConverter):
        return False
    return any(re.search(target, name) for target in conversion.target_patterns for name in names)


def _is_saved_as_is(model: Any, name: str, conversions: Iterable[Any]) -> bool:
    """Whether transformers, which reverts ``conversions``, does not compute what it saves for ``name`` from several."""
    from transformers.core_model_loading import WeightConverter, revert_weight_conversion

    if not any(isinstance(conversion, WeightConverter) for conversion in conversions):
        return True
    try:
        return all(tensor.numel() == 0 for tensor in revert_weight_conversion(model, {name: torch.empty(0)}).values())
    except Exception:  # an operation that needs a weight of its own shape, or all of them
        return False


def is_guard(name: str, entry: Entry, packed: Mapping[str, Layer], prefix: str) -> bool:
    """Whether this is a guard, of one of the packed layers; ``prefix``: of the base model, which may be too much, as
    transformers takes it away where the model has the tensor."""
    floats = {experts.float_name(n, layer.kind) for n, layer in packed.items()}
    is_float = name in floats or name.removeprefix(f"{prefix}.") in floats
    return entry.shape == (0,) and (is_float or re.search(NOTICE_PATTERN, name) is not None)


@dataclass
class Match:
    """How a checkpoint's names correspond to a model's.

    Attributes:
        names: name in the model's state_dict -> name in the checkpoint.
        unexpected: what the model has no place for: the model's name it would have -> name in the checkpoint.
        transformed: model names that transformers computes from several tensors or by an operation -> the names of
            those in the checkpoint.
        operations: of each of these model names, the conversion that transformers does.
        patterns: of each name of ``transformed`` in the checkpoint, the pattern of the conversion that it matches.
    """

    names: dict[str, str] = field(default_factory=dict)
    unexpected: dict[str, str] = field(default_factory=dict)
    transformed: dict[str, list[str]] = field(default_factory=dict)
    operations: dict[str, Any] = field(default_factory=dict)
    patterns: dict[str, str] = field(default_factory=dict)


def _conversions(model: Any) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    conversions: list[Any] = get_model_conversion_mapping(model)
    return conversions


def match(model: Any, checkpoint: Iterable[str], conversions: list[Any] | None = None) -> Match:
    """Match names as transformers' loader does: its renamings, the base model's prefix added or removed."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = of_float(model, _conversions(model) if conversions is None else conversions)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    found = Match()
    for key in checkpoint:
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name not in state:
            found.unexpected[name] = key
        elif pattern is not None:
            conversion = next(c for c in converters if pattern in c.source_patterns)
            first = conversion.target_patterns[0]
            for target in conversion.target_patterns:  # it may be cut into several
                made = name.replace(first, target)
                if made in state:
                    found.transformed.setdefault(made, []).append(key)
                    found.operations[made] = conversion
            found.patterns[key] = pattern
        else:
            found.names[name] = key
    return found


def stacks(model: Any, checkpoint: Checkpoint, found: Match) -> dict[str, Stack] | None:
    """For each tensor of ``found.transformed``, where its parts for each expert are; ``None`` where one is not made of
    experts that the files have one by one.

    Raises:
        ValueError: naming file and tensor: an expert is missing, or has another shape than the model's.
    """
    state = model.state_dict()
    made: dict[str, Stack] = {}
    for name, keys in found.transformed.items():
        operations = found.operations[name].operations
        rest = [type(operation).__name__ for operation in operations[1:]]
        merges = type(operations[0]).__name__ == "MergeModulelist" and operations[0].dim == 0
        if not merges or rest not in ([], ["Concatenate"]) or (rest and operations[1].dim == 0):
            return None
        made[name] = _stack(name, state[name].shape, keys, checkpoint, found)
    return made


def _stack(
    name: str, shape: torch.Size, keys: Iterable[str], checkpoint: Checkpoint, found: Match
) -> Stack:
    conversion, parts = found.operations[name], dict[str, list[str]]()
    for key in sorted(keys, key=_by_number):
        parts.setdefault(found.patterns[key], []).append(key)
    along = [operation.dim - 1 for operation in conversion.operations[1:]]  # where there are several for each expert
    for pattern in conversion.source_patterns:
        if len(parts.get(pattern, ())) != shape[0]:
            raise ValueError(f"tensor {name!r} needs {pattern} for {shape[0]} experts: the files have "
                             f"{len(parts.get(pattern, ()))}")  # fmt: skip

    for e in range(shape[0]):
        own = [checkpoint.entries[parts[pattern][e]] for pattern in conversion.source_patterns]
        sizes = [list(entry.shape) for entry in own]
        wanted = [list(shape[1:]) for _ in own]
        if along and all(len(size) == len(shape) - 1 for size in sizes):
            for size, one in zip(sizes, wanted, strict=True):
                one[along[0]] = size[along[0]]
        if sizes != wanted or (along and sum(size[along[0]] for size in sizes) != shape[1 + along[0]]):
            key = parts[conversion.source_patterns[0]][e]
            raise ValueError(f"{own[0].file}: tensor {key!r}: expert {e} of {name!r} must have shape "
                             f"{tuple(shape[1:])}: got {sizes}")  # fmt: skip

    ordered = [[parts[pattern][e] for pattern in conversion.source_patterns] for e in range(shape[0])]
    return Stack(ordered, along[0] if along else None, checkpoint)


def _by_number(key: str) -> list[tuple[int, int, str]]:
    """Sorts names as transformers does: numbers between dots by value."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in key.split(".")]


def check(model: Any, checkpoint: Checkpoint, found: Match, saved: Sequence[str] | None = None) -> None:
    """Compare the headers with a model whose layers were swapped in; raises ``ValueError`` naming file and tensor.

    Packed layers must find exactly their tensors. For the rest, loading the class that was saved is strict as
    well; another class (a base model, another head) may leave tensors out or start new ones, as in
    transformers.
    """
    provided = set(found.names) | set(found.transformed)
    tied = {**model.all_tied_weights_keys}
    for target, source in tied.items():
        if {target, source} & provided:
            provided |= {target, source}
    same_class = _same_class(model, saved)
    packed = layers(model, duplicates=True)
    ignored = "|".join(model._keys_to_ignore_on_load_missing or ()) or "(?!)"
    folder = next(iter(checkpoint.entries.values())).file.parent if checkpoint.entries else "the checkpoint"
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        # a head that was packed only because its weight is tied starts with a new bias
        is_new = leaf == "bias" and f"{owner}.packed" not in found.names
        mandatory = (owner in packed and not is_new) or (same_class and re.search(ignored, name) is None)
        if mandatory and name not in provided:
            raise ValueError(f"{folder}: tensor {name!r} is missing: {tensor.dtype} {list(tensor.shape)} is required")
    ignored = ignored_names(model)
    for name, key in found.unexpected.items():
        file = checkpoint.entries[key].file
        if is_guard(name, checkpoint.entries[key], packed, model.base_model_prefix):
            continue
        if name.rpartition(".")[0] in packed:
            raise ValueError(f"{file}: tensor {key!r} does not belong to the described format of its layer")
        if same_class and re.search(ignored, name) is None:
            raise ValueError(f"{file}: tensor {key!r} belongs to no module of {type(model).__name__}")
    stream.check_shapes(model, checkpoint, found.names)


def ignored_names(model: Any) -> str:
    """A pattern of the names of tensors that transformers leaves out without a word, as its loader has it."""
    buffers = [name for name, _ in model.named_buffers()]
    more = {  # those that are no longer saved, and may have another owner than in the files
        r"rotary_emb\.inv_freq": any(name.endswith("rotary_emb.inv_freq") for name in buffers),
        r"(^|\.)position_ids$": any(name.endswith("position_ids") for name in buffers),
    }
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), *(p for p, wanted in more.items() if wanted)]
    return "|".join(f"({pattern})" for pattern in patterns) or "(?!)"


def check_float(model: Any, entries: Mapping[str, Entry], found: Match) -> None:
    """Check the headers of a *float* model: a tensor that no module takes may belong to a quantized format.

    What transformers leaves out without a word is left out. So is, with a warning, what belongs to a module that
    ``model`` does not have, such as a head. A scale is left out only at the root (CLIP's ``logit_scale``), and in the
    file of another class with float tensors beside it, where it was learned.

    Raises:
        ValueError: naming file, tensor and format: a tensor beside the weight of a module that does not take it, one
            with the name of a scale or of codes, or a weight that is not stored in float16, bfloat16, float32 or
            float64.
    """
    state, cls, prefix = model.state_dict(), type(model).__name__, model.base_model_prefix + "."
    buffers = {name for name, _ in model.named_buffers()}
    children = {name for name, _ in model.named_children()}
    is_other = not _same_class(model, None)
    owners = {name for name, m in model.named_modules(remove_duplicate=False) if m._parameters and name} | set(state)
    ignored, left_out = ignored_names(model), []
    for name, key in found.unexpected.items():
        names = (name, name.removeprefix(prefix), prefix + name)  # a base model's file, or a file of a base model
        if re.search(ignored, name) or buffers.intersection(names):
            continue
        owner, _, leaf = name.rpartition(".")
        sign = foreign.sign_of(leaf)
        beside = any(n.rpartition(".")[0] in owners or any(n.startswith(f"{t}_") for t in state) for n in names)
        inside = any(n.partition(".")[0] in children for n in names[:2])
        if beside or (sign is not None and (inside or not _is_learned(key, sign, entries, is_other))):
            kind = f", as {sign} has it" if sign else ""
            raise ValueError(
                f"{entries[key].file}: tensor {key!r} ({_dtype(entries[key])}) of layer "
                f"{owner.removesuffix('.weight')!r} belongs to no module of {cls}: the folder is not a plain float "
                f"model{kind}. lowbit reads quantized formats only where config.json names them: give the float model"
            )
        left_out.append(key)
    for name, keys in [*((name, [key]) for name, key in found.names.items()), *found.transformed.items()]:
        for key in keys:
            if state[name].is_floating_point() and entries[key].dtype not in foreign.FLOATS:
                raise ValueError(
                    f"{entries[key].file}: tensor {key!r} is stored as {_dtype(entries[key])}: {cls} has a float "
                    "tensor there. lowbit reads quantized formats only where config.json names them: give the float "
                    "model"
                )
    if left_out:
        more = f" and {len(left_out) - 5} more" if len(left_out) > 5 else ""
        warnings.warn(f"left out, {cls} has no module for it: {', '.join(left_out[:5])}{more}", stacklevel=2)


def _is_learned(key: str, sign: str, entries: Mapping[str, Entry], is_other: bool) -> bool:
    """Whether a tensor called as a scale is one that a float model learns; it is in no module of the model.

    ``is_other``: the file is another class's, whose modules need not be here.
    """
    owner, dot, _ = key.rpartition(".")
    if sign or (dot and not is_other):
        return False
    beside = [entry for name, entry in entries.items() if name.rpartition(".")[0] == owner] if is_other else []
    return all(entry.dtype in foreign.FLOATS for entry in (entries[key], *beside))


def _dtype(entry: Entry) -> str:
    return str(entry.dtype).removeprefix("torch.")


def _same_class(model: Any, saved: Sequence[str] | None) -> bool:
    """Whether ``model`` is of the class that was saved: one of ``saved``, or of what its own config says."""
    return type(model).__name__ in _saved_classes(model, saved)


def _saved_classes(model: Any, saved: Sequence[str] | None) -> Sequence[str]:
    return saved or model.config.architectures or ()


def swap_in(model: Any, described: Metadata, saved: Sequence[str] | None = None) -> None:
    """Swap the described layers into a transformers skeleton, under the names this class has for them."""
    described = described.renamed(names_in(model, described, saved))
    if not _same_class(model, saved):
        described = _with_tied_partners(model, described)
    plan = dtype_plan(model)
    wanted = model.config.dtype

    def dtype_of(name: str, saved: torch.dtype) -> torch.dtype:
        return kept_dtype(plan, experts.float_name(name, described.layers[name].layer_class.kind)) or wanted or saved

    apply(model, described, dtype_of=dtype_of)


def forget_kept_dtypes(model: Any, packed: Iterable[str]) -> None:
    # versions before 5.21 would cast every tensor of the modules that they keep in float32, codes too
    names = [f"{name}.weight" for name in packed]
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict", "dtype_plan"):
        kept = getattr(model, attribute, None)
        if kept:
            free = [p for p in kept if not any(re.search(p.replace("*", ".*"), name) for name in names)]
            setattr(model, attribute, {p: kept[p] for p in free} if isinstance(kept, dict) else type(kept)(free))


def dtype_plan(model: Any) -> dict[str, torch.dtype]:
    plan: dict[str, torch.dtype] = (
        model._get_dtype_plan(model.config.dtype) if hasattr(model, "_get_dtype_plan") else model.dtype_plan  # 5.0
    )
    return plan


def kept_dtype(plan: dict[str, torch.dtype], name: str) -> torch.dtype | None:
    # transformers keeps some modules in float32 whatever the dtype of the model
    return next((dtype for pattern, dtype in plan.items() if re.search(pattern.replace("*", ".*"), name)), None)


def names_in(model: Any, described: Metadata, saved: Sequence[str] | None = None) -> dict[str, str]:
    """Name of each described layer -> its name in ``model``, which may be a base model or have another head.

    A layer may be missing only with everything around it (a head, a decoder) and only from another class than
    the one that was saved: a layer that silently stayed float would run on random weights.
    """
    modules = dict(experts.named_parts(model))
    prefix, same_class = model.base_model_prefix + ".", _same_class(model, saved)
    names: dict[str, str] = {}
    missing = []
    for name in described.layers:
        options = (name, name.removeprefix(prefix), prefix + name)
        found = next((n for n in options if place_of(modules, n) is not None), None)
        if found is not None:
            names[name] = found
        elif same_class or any("." in n and n.rpartition(".")[0] in modules for n in options[:2]):
            missing.append(name)
    has_base = hasattr(model, model.base_model_prefix)
    is_related = same_class or (names and not has_base) or not any("." in name for name in described.layers)
    if not missing and not is_related and not any(name.startswith(prefix) for name in names.values()):
        missing = list(described.layers)[:1]
    if missing:
        raise ValueError(
            f"{type(model).__name__} has no layer {missing[0]!r}: "
            f"the packed model was saved from {', '.join(_saved_classes(model, saved)) or 'another class'}"
        )
    return names


def _with_tied_partners(model: Any, described: Metadata) -> Metadata:
    """Describe also the new layers that this class ties to described ones, such as a head on a base model."""
    configs, tied = dict(described.layers), [list(group) for group in described.tied]
    for pair in model.all_tied_weights_keys.items():
        names = [name.removesuffix(".weight") for name in pair]
        known = [name for name in names if name in described.layers]
        if len(known) != 1 or any(name in described.skipped for name in names):
            continue
        (partner,) = (name for name in names if name not in known)
        module = model.get_submodule(partner)
        like = configs[known[0]]
        is_embedding = isinstance(module, nn.Embedding)
        made = layer_class(like.layer_class.family, "embedding" if is_embedding else "linear")
        bias = not is_embedding and module.bias is not None
        extras = embedding_extras(module) if is_embedding else {}
        if extras is None:  # a forward of its own: its weight is tied, and float
            continue
        extras = made.check_extras(bias, extras)
        config = LayerConfig(made, like.format.with_activation(ActivationSpec()), bias, like.dtype, extras)
        configs[partner] = config
        group = next((group for group in tied if known[0] in group), None)
        if group is None:
            tied.append([known[0], partner])
        else:
            group.append(partner)
    return replace(described, layers=configs, tied=tuple(tuple(group) for group in tied))
