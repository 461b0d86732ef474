"""GGUF files as models of transformers: layers from blocks, tied weights, experts, the tokenizer.

Rows that llama.cpp's converter has put into another order are put back while they are packed.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowbit.backends import registry
from lowbit.checkpoint import stream
from lowbit.checkpoint.convert_folder import fill_converted, return_freed_memory
from lowbit.checkpoint.importers.folder import plan_rest
from lowbit.checkpoint.importers.gguf.container import GgufFile
from lowbit.checkpoint.importers.gguf.split import first_of, open_gguf
from lowbit.checkpoint.importers.gguf.types import BLOCKS, FLOATS, format_of, weight_of
from lowbit.checkpoint.reader import Checkpoint, Entry
from lowbit.integrations.gguf_config import ROPE_TENSORS, architecture_of, config_of
from lowbit.integrations.gguf_names import Change, change_of, name_in_model
from lowbit.model import candidates
from lowbit.model.candidates import Swap
from lowbit.model.plan import check_arguments
from lowbit.model.surgery import carry_over, put
from lowbit.nn.layer import Layer, layer_class

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


class GgufView(Checkpoint):
    """The tensors of a file as those of a float model: as large as there, in its order, and float."""

    def __init__(self, content: GgufFile, changes: dict[str, Change]) -> None:
        self.content, self.changes = content, changes
        self.metadata = {}
        self.entries = {name: self._entry(name) for name in changes}

    def _entry(self, name: str) -> Entry:
        info, change = self.content.tensors[name], self.changes[name]
        shape = info.shape[::-1] if change.transposed else info.shape
        if len(shape) == 1 and "shexp" in name:  # a matrix of one row, as some versions wrote it
            shape = (1, *shape)
        return Entry(self.content.file_of(name), FLOATS.get(info.type, torch.float32), shape, info.offset, info.nbytes)

    def read(self, name: str) -> Tensor:
        info, change = self.content.tensors[name], self.changes[name]
        if info.type not in FLOATS:
            tensor = self.layer(name, "linear").dequantize(torch.float32).view(info.shape)
        else:
            tensor = self.content.read(name).view(FLOATS[info.type]).view(info.shape)
            tensor = tensor if change.order is None else tensor[change.order]
        tensor = tensor.t().contiguous() if change.transposed else tensor
        tensor = tensor - change.offset if change.offset else tensor
        return tensor.view(self.entries[name].shape)

    def layer(self, names: str | Sequence[str], kind: str, **arguments: Any) -> Layer:
        """A layer that holds a tensor; of several, the rows of each expert one below the other."""
        names = [names] if isinstance(names, str) else list(names)
        info = self.content.tensors[names[0]]
        rows = self.content.read(names[0])
        if len(names) > 1:
            parts = [rows, *(self.content.read(name) for name in names[1:])]
            rows = torch.cat([part.view(info.shape[0], -1, info.row_bytes) for part in parts], 1).flatten(0, 1)
            del parts
        try:
            weight = weight_of(info.type, rows, self.changes[names[0]].order)
            del rows
            with registry.as_stored():
                made: Layer = layer_class(weight.family, kind).from_weight(weight, **arguments)
        except ValueError as error:
            raise ValueError(f"{self.content.file_of(names[0])}: tensor {names[0]!r} ({info.type}): {error}") from None
        del weight  # its codes are a byte each
        return made.prepare(owned=True)


@dataclass
class _Found:
    """A layer that the file holds in blocks: its swap, and its tensors there."""

    swap: Swap
    tensors: list[str]
    placeholder: Layer
    tied: list[Swap] = field(default_factory=list)


@torch.inference_mode(False)
def read(path: Path, spec: Any, skip: Sequence[str]) -> nn.Module:
    """The packed model of a GGUF file, or of the one in a folder: its blocks as they are, the other layers by ``spec``.

    Raises:
        ValueError: before a weight is read, naming file and field or tensor; while weights are read, naming both.
    """
    from lowbit.integrations.loading import FloatFolder

    skip = check_arguments(spec, skip)
    if spec is None and skip:
        raise ValueError(f"skip leaves layers float that spec would pack: without a spec, got skip={list(skip)!r}")
    content = open_gguf(file_of(path))
    config = config_of(content)
    config.dtype = _dtype(content)
    model = _skeleton(config)
    names, stacks = _names(content, model)
    architecture = architecture_of(content)
    view = GgufView(content, {name: change_of(architecture, config, name) for name in content.tensors})
    for target, source in model.all_tied_weights_keys.items():
        if source in names and target not in names:
            names[target] = names[source]
    _check(model, view, names, stacks)
    folder = FloatFolder(model, names, {})
    found = _in_blocks(folder, view, stacks)
    if not found and spec is None:
        raise ValueError(f"{content.file} holds floats only: give a spec, such as lowbit.Packed(bits=4)")
    plan = plan_rest(model, spec, skip)
    bar = tqdm(found.items(), desc="lowbit import", unit="layer", disable=None if len(found) > 100 else True)
    for name, each in bar:
        _put(folder, view, name, each)
        return_freed_memory()
    return fill_converted(folder, plan, view)


def file_of(path: Path) -> Path:
    """The GGUF file at ``path``, or the first of its parts; raises ``ValueError`` for a folder that has several."""
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1 and (first := first_of(files)) is not None:
        return first
    if len(files) != 1:
        raise ValueError(f"{path} must have one GGUF file, or give the file itself: got "
                         f"{', '.join(file.name for file in files[:5]) or 'none'}")  # fmt: skip
    return files[0]


def _dtype(content: GgufFile) -> torch.dtype:
    """float32 beside blocks, as llama.cpp computes; of a file of floats the half type, if it has one."""
    types = {info.type for info in content.tensors.values()}
    if not types <= set(FLOATS):
        return torch.float32
    return FLOATS["BF16" if "BF16" in types else "F16" if "F16" in types else "F32"]


def _skeleton(config: Any) -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    with stream.empty_parameters():
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(config)


def _names(content: GgufFile, model: Any) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Name in the model -> tensor of the file; and of what the model has in one and the file in several, all."""
    names: dict[str, str] = {}
    stacks: dict[str, list[str]] = {}
    for tensor, info in content.tensors.items():
        if tensor in ROPE_TENSORS:
            continue
        name, where = name_in_model(model.config.model_type, tensor), f"{content.file_of(tensor)}: tensor {tensor!r}"
        if name is None:
            raise ValueError(f"{where} belongs to no module of {type(model).__name__}")
        if info.type not in BLOCKS and info.type not in FLOATS:
            raise ValueError(f"{where}: type {info.type} is not read: lowbit reads "
                             f"{', '.join([*FLOATS, *BLOCKS])}. Give another file, or the float model")  # fmt: skip
        if name.endswith(".experts.gate_up_proj"):
            stacks.setdefault(name, []).append(tensor)
        else:
            names[name] = tensor
    state = model.state_dict()
    for name in (*names, *stacks):
        if name not in state:
            tensor = names.get(name) or stacks[name][0]
            where = f"{content.file_of(tensor)}: tensor {tensor!r}"
            raise ValueError(f"{where} belongs to no module of {type(model).__name__}")
    for name, several in stacks.items():
        kinds = sorted(tensor.split(".")[-2] for tensor in several)
        if kinds not in (["ffn_gate_exps", "ffn_up_exps"], ["ffn_gate_up_exps"]):
            raise ValueError(f"{content.file}: {name!r} must be ffn_gate_exps and ffn_up_exps, or ffn_gate_up_exps: "
                             f"got {', '.join(map(repr, several))}")  # fmt: skip
    return names, {name: sorted(tensors, key=_gate_first) for name, tensors in stacks.items()}


def _gate_first(tensor: str) -> tuple[bool, str]:
    return "gate" not in tensor, tensor


def _check(model: Any, view: GgufView, names: dict[str, str], stacks: dict[str, list[str]]) -> None:
    """Compare the headers with the model, before a weight is read."""
    file = view.content.file
    for name, tensor in model.state_dict().items():
        if name not in names and name not in stacks:
            raise ValueError(f"{file}: a tensor for {name!r} {list(tensor.shape)} of {type(model).__name__} is missing")
    stream.check_shapes(model, view, names)
    for name, tensors in stacks.items():
        shape, shapes = tuple(model.state_dict()[name].shape), [view.entries[t].shape for t in tensors]
        joined = [(*s[:-2], sum(other[-2] for other in shapes), s[-1]) for s in shapes if len(s) == 3]
        if joined != [shape] * len(tensors):
            raise ValueError(f"{file}: tensors {', '.join(map(repr, tensors))} must make {name!r} of {list(shape)}: "
                             f"got {[list(s) for s in shapes]}")  # fmt: skip
        types = {view.content.tensors[t].type for t in tensors}
        if len(types) > 1 and not types <= set(FLOATS):
            raise ValueError(f"{file}: tensors {', '.join(map(repr, tensors))} must have one type to make {name!r}: "
                             f"got {', '.join(sorted(types))}")  # fmt: skip


def _in_blocks(folder: Any, view: GgufView, stacks: dict[str, list[str]]) -> dict[str, _Found]:
    """The layers that are kept in their blocks; empty ones are put into the model."""
    model, names, tensors = folder.model, folder.names, view.content.tensors
    swaps = {float_name: swap for swap in candidates.find(model)[0] for n in swap.names
             for float_name in ([n] if swap.kind == "experts" else [f"{n}.weight"])}  # fmt: skip
    tied: dict[str, str] = model.all_tied_weights_keys
    found: dict[str, _Found] = {}
    for name, swap in swaps.items():
        held = stacks.get(name) or ([names[name]] if name in names else [])
        group = [n for n, source in tied.items() if source == name]
        if not held or tensors[held[0]].type not in BLOCKS or name in tied or not all(n in swaps for n in group):
            continue
        if swap.kind == "experts" and swap.transposed:
            raise ValueError(f"{view.content.file_of(held[0])}: tensor {held[0]!r}: {type(model).__name__} holds the "
                             f"experts {name!r} transposed, and blocks cannot be")  # fmt: skip
        own = [swap, *(swaps[n] for n in group)]
        empty = [_empty(folder, each, tensors[held[0]].type) for each in own]
        found[swap.name] = _Found(swap, held, empty[0], own[1:])
        for each, layer in zip(own, empty, strict=True):
            put(model, each.name, layer)
            names.pop(each.name if each.kind == "experts" else f"{each.name}.weight", None)
    for name, several in stacks.items():
        if name not in found:
            folder.stacks[name] = partial(_expert, view, several)
    return found


def _expert(view: GgufView, tensors: list[str], index: int) -> Tensor:
    return torch.cat([view.read_part(tensor, index, view.entries[tensor].shape[0]) for tensor in tensors])


def _empty(folder: Any, swap: Swap, type_name: str) -> Layer:
    weight = swap.weight()
    format = format_of(type_name, *weight.shape)
    dtype = folder.dtype_of(swap.name if swap.kind == "experts" else f"{swap.name}.weight")
    has_bias = swap.kind == "linear" and swap.module._parameters.get("bias") is not None
    layer: Layer = layer_class(format.family, swap.kind)(format, has_bias, dtype, "meta", **swap.extras)
    return layer.train(swap.module.training)


def _put(folder: Any, view: GgufView, name: str, found: _Found) -> None:
    """Read a layer, and put it into the model; with those that share its weight."""
    swap, empty = found.swap, found.placeholder
    arguments: dict[str, Any] = dict(swap.extras, dtype=empty.dtype)
    if swap.kind == "linear":
        arguments["bias"] = _bias(folder, view, name, empty)
    layer = view.layer(found.tensors, swap.kind, **arguments)
    put(folder.model, name, carry_over(empty, layer))
    for other in found.tied:
        made = folder.model.get_submodule(other.name)
        made.share_weight(layer)
        made.bias = _bias(folder, view, other.name, made)
        made.prepare()


def _bias(folder: Any, view: GgufView, name: str, empty: Layer) -> nn.Parameter | None:
    tensor = folder.names.pop(f"{name}.bias", None)
    if empty.bias is None or tensor is None:
        return None
    return nn.Parameter(view.read(tensor).to(empty.dtype))


def write_tokenizer(path: Path, target: Path) -> None:
    """The tokenizer that the file describes, unless the folder has one; a warning where transformers makes none."""
    from transformers import PreTrainedTokenizerFast

    file = open_gguf(file_of(path)).file  # of several the first, which has the fields
    if any((target / name).is_file() for name in TOKENIZER_FILES):
        return
    try:
        with tempfile.TemporaryDirectory() as alone:  # transformers prefers what else is in a folder
            (Path(alone) / "model.gguf").symlink_to(file.resolve())
            PreTrainedTokenizerFast.from_pretrained(alone, gguf_file="model.gguf").save_pretrained(target)
    except Exception as error:
        warnings.warn(f"{file}: transformers makes no tokenizer of it ({error}): the folder has none", stacklevel=3)
