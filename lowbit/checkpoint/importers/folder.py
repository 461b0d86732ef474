"""From a folder in a foreign format to the packed model, one layer at a time, without the foreign library.

A reader says which tensors make a layer, checks their headers and gives its weight. To everything else the folder is
shown as the float one that it was made from: each such layer has one tensor ``weight``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowbit.checkpoint import foreign, stream
from lowbit.checkpoint.convert_folder import fill_converted, return_freed_memory
from lowbit.checkpoint.libraries import FloatFolder, library_of
from lowbit.checkpoint.reader import Checkpoint, Entry
from lowbit.core.bitpack import unpack, words_per_row
from lowbit.core.family import Format, Weight
from lowbit.model import candidates
from lowbit.model.plan import Plan, check_arguments, make_plan
from lowbit.model.surgery import carry_over, put
from lowbit.nn.layer import Layer, layer_class

KEPT = "the folder holds it as floats, and no spec was given for it"


@dataclass(frozen=True)
class Stored:
    """A layer of the folder.

    Attributes:
        name: its name in the files.
        checkpoint: the files.
        n, k: output and input features of the module that it belongs to.
    """

    name: str
    checkpoint: Checkpoint
    n: int
    k: int

    def __contains__(self, leaf: str) -> bool:
        return f"{self.name}.{leaf}" in self.checkpoint

    def read(self, leaf: str) -> Tensor:
        return self.checkpoint.read(f"{self.name}.{leaf}")

    def where(self, leaf: str) -> str:
        """``file: tensor 'name'``, as errors begin."""
        return f"{self.checkpoint.entries[f'{self.name}.{leaf}'].file}: tensor '{self.name}.{leaf}'"

    def check(
        self, leaf: str, shape: tuple[int, ...], dtypes: Sequence[torch.dtype], why: str, *others: tuple[int, ...]
    ) -> None:
        """Raise ``ValueError`` unless the header of a tensor says one of these shapes and one of these dtypes."""
        entry = self.checkpoint.entries[f"{self.name}.{leaf}"]
        if entry.shape not in (shape, *others):
            shapes = " or ".join(map(str, (shape, *others)))
            raise ValueError(f"{self.where(leaf)}: shape must be {shapes} ({why}): got {entry.shape}")
        if entry.dtype not in dtypes:
            raise ValueError(f"{self.where(leaf)}: dtype must be {' or '.join(map(str, dtypes))}: got {entry.dtype}")

    def check_order(self, leaf: str, groups: int, size: int, field: str) -> None:
        """Raise ``ValueError`` unless a tensor of the groups of columns says ``k // size``; ``field``: its config's."""
        index = self.read(leaf).long()
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= groups:
            raise ValueError(f"{self.where(leaf)}: values must be in [0, {groups}): got values in [{low}, {high}]")
        if not torch.equal(index, torch.arange(self.k) // size):
            raise ValueError(
                f"{self.where(leaf)}: layer {self.name!r} has its groups in another order than its columns (act-order, "
                f"{field}): lowbit reads groups of {size} columns side by side. Give a model that was quantized "
                "without act-order, or the float model"
            )


class Reader(ABC):
    """How one format stores a layer. It is made of the section of the config file that names the format.

    Attributes:
        format: its name there, the key of :data:`lowbit.checkpoint.foreign.importers`.
        signs: leaves of tensors that only such layers have.
        required, optional: all leaves of a layer, beside its bias, where every layer has the same: see :meth:`leaves`.
    """

    format: ClassVar[str]
    signs: ClassVar[tuple[str, ...]]
    required: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()

    def __init__(self, section: dict[str, Any], file: Path) -> None:
        self.section, self.file = section, file

    def leaves(self, name: str, entries: dict[str, Entry]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The leaves that a layer must have, its codes first, and those that it may have."""
        return self.required, self.optional

    @abstractmethod
    def float_shape(self, name: str, entries: dict[str, Entry]) -> tuple[int, int]:
        """The shape ``[N, K]`` of the float weight, as the headers have it; they are not checked yet."""

    @abstractmethod
    def check(self, layer: Stored) -> Format:
        """The stored form that the headers describe. Raises ``ValueError`` naming file, tensor and field."""

    @abstractmethod
    def weight(self, layer: Stored) -> tuple[Weight, str | None]:
        """The weight, exactly, and what is to be noted of it in the report."""

    def x_scale(self, layer: Stored) -> Tensor | None:
        """The scale of the input, where :meth:`check` gives a format with ``activations="int8_static"``."""
        return None

    def integer(self, names: Sequence[str], allowed: str, is_valid: Any) -> int:
        """A field of the config, under the first of its names that is there."""
        name = next((n for n in names if n in self.section), names[0])
        value = self.section.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not is_valid(value):
            raise ValueError(f"{self.file}: quantization_config: {name} must be {allowed}: got {value!r:.200}")
        return value

    def group_size(self, *names: str) -> int:
        return self.integer(names, "-1 (one group per row) or at least 1", lambda size: size == -1 or size >= 1)

    def one_of(self, names: Sequence[str], default: str, allowed: Sequence[str]) -> str:
        """What the config calls the variant of the format; refused where it is not one of ``allowed``."""
        found = default
        for name in names:
            if (value := self.section.get(name)) is not None:
                found = str(value).lower()
                if found not in allowed:
                    raise self.refusal(name, " or ".join(map(repr, allowed)), value)
        return found

    def refusal(self, field: str, requirement: str, value: object) -> ValueError:
        """What to tell of a field of the config that is not read, with a layer of the folder."""
        example = foreign.example(self.file.parent)
        return ValueError(
            f"{self.file}: quantization_config: {field} must be {requirement} for {self.format!r} to be read: got "
            f"{value!r:.200}{f' ({example})' if example else ''}. Give the float model that it was made from"
        )


class FloatView(Checkpoint):
    """The files as those of a float model: each layer of the reader is a tensor ``weight``, which is never read."""

    def __init__(self, checkpoint: Checkpoint, reader: Reader) -> None:
        entries = checkpoint.entries
        self.metadata = checkpoint.metadata
        self.layers = _layers(entries, reader)
        theirs = {f"{name}.{leaf}" for name, leaves in self.layers.items() for leaf in (*leaves, "bias")}
        self.entries = {name: entry for name, entry in entries.items() if name not in theirs}
        for name, leaves in self.layers.items():
            if f"{name}.weight" in self.entries:
                file = entries[f"{name}.weight"].file
                raise ValueError(f"{file}: tensor '{name}.weight': layer {name!r} has it beside its codes")
            file, shape = entries[f"{name}.{leaves[0]}"].file, reader.float_shape(name, entries)
            self.entries[f"{name}.weight"] = Entry(file, torch.float16, shape, 0, 2 * shape[0] * shape[1])

    def read(self, name: str) -> Tensor:
        if name.removesuffix(".weight") in self.layers and name.endswith(".weight"):
            raise ValueError(f"{self.entries[name].file}: layer {name.removesuffix('.weight')!r} is no float one")
        return super().read(name)


def _layers(entries: dict[str, Entry], reader: Reader) -> dict[str, tuple[str, ...]]:
    """The names of the layers in the format, each with its leaves, that of its codes first; refused where one is not
    complete, or nothing is in the format."""
    parts = [(*name.rpartition("."), entry) for name, entry in entries.items()]
    signed = {name: entry for name, _, leaf, entry in parts if leaf in reader.signs}
    found: dict[str, tuple[str, ...]] = {}
    for name, entry in signed.items():
        required, optional = reader.leaves(name, entries)
        for leaf in required:
            if f"{name}.{leaf}" not in entries:
                raise ValueError(f"{entry.file}: tensor '{name}.{leaf}' is missing: the layer needs "
                                 f"{', '.join(required)}")  # fmt: skip
        first = entries[f"{name}.{required[0]}"]
        if len(first.shape) != 2:
            raise ValueError(f"{first.file}: tensor '{name}.{required[0]}': shape must have 2 sizes: got "
                             f"{first.shape}")  # fmt: skip
        found[name] = (*required, *optional)
    if not found:
        raise ValueError(
            f"{reader.file} names the format {reader.format!r}, but no tensor of the folder is a "
            f"{' or '.join(reader.signs)}: no layer is in that format"
        )
    return found


@torch.inference_mode(False)
def read_folder(reader_class: type[Reader], path: Path, spec: Any, skip: Sequence[str]) -> nn.Module:
    """The packed model of a folder: its layers in the format of the reader as they are stored, the others by ``spec``.

    Raises:
        ValueError: before a weight is read, naming file, tensor and field, or layer and argument; while weights are
            read, naming file and layer.
    """
    skip = check_arguments(spec, skip)
    if spec is None and skip:
        raise ValueError(f"skip leaves layers float that spec would pack: without a spec, got skip={list(skip)!r}")
    section, file = next((s, f) for s, f, _ in foreign.named_sections(path))
    reader = reader_class(section, file)
    checkpoint = Checkpoint.of_folder(path)
    view, library = FloatView(checkpoint, reader), library_of(path)
    if library is None:
        raise FileNotFoundError(f"{path} is not a transformers model folder: it has no config.json")
    folder = library.open_float(path, view)
    if folder is None:
        raise ValueError(f"{path / 'config.json'}: architectures must name a class of transformers whose tensors are "
                         f"those of the files, one by one, for {reader.format!r} to be read")  # fmt: skip
    swaps = _swaps(folder, view, checkpoint, reader)
    plan = _plan_rest(folder.model, spec, skip)
    stream.check_shapes(folder.model, view, folder.names)
    bar = tqdm(swaps.items(), desc="lowbit import", unit="layer", disable=None if len(swaps) > 100 else True)
    for name, (stored, placeholder) in bar:
        put(folder.model, name, carry_over(placeholder, _read(reader, stored, placeholder)))
        return_freed_memory()
    return fill_converted(folder, plan, view)


def _swaps(
    folder: FloatFolder, view: FloatView, checkpoint: Checkpoint, reader: Reader
) -> dict[str, tuple[Stored, Layer]]:
    """Name in the model -> the stored layer and an empty one, which is put into the model; all headers are checked."""
    model, by_key = folder.model, {key: name for name, key in folder.names.items()}
    linears = {n: s for s in candidates.find(model)[0] if s.kind == "linear" for n in s.names}
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    found: dict[str, tuple[Stored, Layer]] = {}
    for key in view.layers:
        weight = by_key.get(f"{key}.weight", "")
        name, file = weight.removesuffix(".weight"), view.entries[f"{key}.weight"].file
        where = f"{file}: layer {key!r} is in the format {reader.format!r}"
        if {weight, f"{key}.weight"} & {*tied, *tied.values()}:
            raise ValueError(f"{where}: {type(model).__name__} ties its weight to another's (tie_word_embeddings)")
        if name not in linears:
            raise ValueError(f"{where}: {type(model).__name__} has no linear layer there, and experts and embeddings "
                             "are not read in this format")  # fmt: skip
        swap = linears[name]
        n, k = swap.weight().shape
        stored = Stored(key, checkpoint, n, k)
        format = reader.check(stored)
        has_bias = swap.module._parameters.get("bias") is not None
        _check_bias(stored, has_bias)
        dtype = folder.dtype_of(weight)
        found[name] = stored, layer_class(format.family, "linear")(format, has_bias, dtype, "meta")
        found[name][1].train(swap.module.training)
    for name, (_, placeholder) in found.items():
        put(model, name, placeholder)
        for leaf in ("weight", "bias"):
            folder.names.pop(f"{name}.{leaf}", None)
    return found


def _check_bias(stored: Stored, has_bias: bool) -> None:
    """A bias where the module has one; without one the file may hold zeros, which some writers always store."""
    if "bias" in stored:
        stored.check("bias", (stored.n,), foreign.FLOATS, "[N]")
        if not has_bias and bool(stored.read("bias").any()):
            raise ValueError(f"{stored.where('bias')}: must be zero: the module has no bias")
    elif has_bias:
        file = stored.checkpoint.entries[next(n for n in stored.checkpoint if n.startswith(f"{stored.name}."))].file
        raise ValueError(f"{file}: tensor '{stored.name}.bias' is missing: [{stored.n}] is required")


def _plan_rest(model: nn.Module, spec: Any, skip: Iterable[str]) -> Plan:
    if spec is not None:
        plan = make_plan(model, spec, skip)
        for swap in plan.swaps():
            if swap.spec is not None and swap.kind != "embedding" and swap.spec.needs_calibration:
                raise ValueError(f"{swap.name}: {swap.spec.calibration_need} needs calibration data, which the layers "
                                 "beside those that are read as they are cannot have: choose another")  # fmt: skip
        return plan
    swaps, skipped = candidates.find(model)
    return Plan([], {**skipped, **{name: KEPT for swap in swaps for name in swap.names}})


def _read(reader: Reader, stored: Stored, placeholder: Layer) -> Layer:
    try:
        weight, note = reader.weight(stored)
        bias = None
        if placeholder.bias is not None:
            bias = nn.Parameter(stored.read("bias").to(placeholder.dtype), requires_grad=placeholder.bias.requires_grad)
        layer: Layer = layer_class(weight.family, "linear").from_weight(
            weight, bias, dtype=placeholder.dtype, x_scale=reader.x_scale(stored),
            **asdict(placeholder.format.activation),
        )  # fmt: skip
    except ValueError as error:
        required, _ = reader.leaves(stored.name, stored.checkpoint.entries)
        file = stored.checkpoint.entries[f"{stored.name}.{required[0]}"].file
        text = str(error)
        raise ValueError(text if text.startswith(str(file)) else f"{file}: layer {stored.name!r}: {text}") from None
    layer.note = note
    return layer


def unpack_rows(words: Tensor, bits: int, count: int) -> Tensor:
    """``uint8 [rows, count]`` of dense streams ``int32 [rows, ceil(count*bits/32)]``, least significant bit first."""
    padded = torch.zeros(len(words), words_per_row(count, bits), dtype=torch.int32)
    padded[:, : words.shape[1]] = words
    return unpack(padded, bits, count)
