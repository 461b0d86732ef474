"""From a folder in a foreign format to the packed model, one layer at a time, without the foreign library.

A reader says which tensors make a layer, checks their headers and gives its weight. To everything else the folder is
shown as the float one that it was made from: each such layer has one tensor ``weight``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowbit.checkpoint import foreign, stream
from lowbit.checkpoint.convert_folder import fill_converted, return_freed_memory
from lowbit.checkpoint.libraries import FloatFolder, Stack, library_of
from lowbit.checkpoint.reader import Checkpoint, Entry
from lowbit.core.activations import ActivationSpec
from lowbit.core.bitpack import unpack, words_per_row
from lowbit.core.family import Format, Weight
from lowbit.model import candidates
from lowbit.model.plan import Plan, Swap, check_arguments, make_plan
from lowbit.model.surgery import carry_over, put
from lowbit.nn.layer import Layer, layer_class
from lowbit.packed.format import PackedFormat

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
    plan = plan_rest(folder.model, spec, skip)
    stream.check_shapes(folder.model, view, folder.names)
    bar = tqdm(swaps.items(), desc="lowbit import", unit="layer", disable=None if len(swaps) > 100 else True)
    for name, swap in bar:
        put(folder.model, name, carry_over(swap.placeholder, _read(reader, swap)))
        return_freed_memory()
    return fill_converted(folder, plan, view)


@dataclass(frozen=True)
class _Swap:
    """What is read into one module of the model: a layer of the files; of experts all of them, in their order."""

    stored: list[Stored]
    placeholder: Layer


def _swaps(folder: FloatFolder, view: FloatView, checkpoint: Checkpoint, reader: Reader) -> dict[str, _Swap]:
    """Name in the model -> what is to be read, and an empty layer, which is put there; all headers are checked."""
    model, by_key = folder.model, {key: name for name, key in folder.names.items()}
    candidate = {n: s for s in candidates.find(model)[0] for n in s.names}
    stacks = {name: stack for name, stack in folder.stacks.items()
              if any(_layer_of(key) in view.layers for keys in stack.keys for key in keys)}  # fmt: skip
    of_experts = {_layer_of(key) for stack in stacks.values() for keys in stack.keys for key in keys}
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    found: dict[str, _Swap] = {}
    for key in view.layers:
        if key in of_experts:
            continue
        weight = by_key.get(f"{key}.weight", "")
        name, file = _layer_of(weight), view.entries[f"{key}.weight"].file
        where = f"{file}: layer {key!r} is in the format {reader.format!r}"
        if {weight, f"{key}.weight"} & {*tied, *tied.values()}:
            raise ValueError(f"{where}: {type(model).__name__} ties its weight to another's (tie_word_embeddings)")
        swap = candidate.get(name)
        if swap is None or swap.kind != "linear":
            raise ValueError(f"{where}: {type(model).__name__} has no linear layer there, and embeddings are not read "
                             "in this format")  # fmt: skip
        n, k = swap.weight().shape
        stored = Stored(key, checkpoint, n, k)
        format = reader.check(stored)
        has_bias = swap.module._parameters.get("bias") is not None
        _check_bias(stored, has_bias)
        layer = layer_class(format.family, "linear")(format, has_bias, folder.dtype_of(weight), "meta")
        found[name] = _Swap([stored], layer.train(swap.module.training))
    for name, stack in stacks.items():
        found[name] = _experts(name, stack, candidate.get(name), folder, view, checkpoint, reader)
        del folder.stacks[name]
    for name, made in found.items():
        put(model, name, made.placeholder)
        for leaf in ("weight", "bias"):
            folder.names.pop(f"{name}.{leaf}", None)
    return found


def _layer_of(key: str) -> str:
    return key.removesuffix(".weight")


def _experts(
    name: str, stack: Stack, swap: Swap | None, folder: FloatFolder, view: FloatView, checkpoint: Checkpoint,
    reader: Reader,
) -> _Swap:  # fmt: skip
    """All layers of a stack of experts, one by one in the files; they must have one form."""
    keys = [_layer_of(key) for own in stack.keys for key in own]
    file = view.entries[stack.keys[0][0]].file
    for own in stack.keys:
        for key in own:
            if _layer_of(key) not in view.layers:
                raise ValueError(f"{view.entries[key].file}: layer {_layer_of(key)!r} must be in the format "
                                 f"{reader.format!r}, as are others of {name!r}")  # fmt: skip
    if swap is None or swap.kind != "experts" or swap.transposed or stack.along not in (None, 0):
        raise ValueError(f"{file}: layer {keys[0]!r} is in the format {reader.format!r}: {name!r} of "
                         f"{type(folder.model).__name__} is no stack of experts, one below the other")  # fmt: skip
    count = swap.extras["num_experts"]
    rows, k = swap.weight().shape
    stored = [Stored(key, checkpoint, rows // len(keys), k) for key in keys]
    first, *others = formats = [_by_row_format(reader.check(layer)) for layer in stored]
    for layer, format in zip(stored[1:], others, strict=True):
        if format != first:
            mine, theirs = (asdict(f) for f in (format, first))
            field = next(field for field in mine if theirs.get(field) != mine[field])
            raise ValueError(f"{layer.where(view.layers[layer.name][0])}: the experts of {name!r} must have one form: "
                             f"{keys[0]!r} has {field}={theirs.get(field)!r}, this one {mine[field]!r}")  # fmt: skip
    for layer in stored:
        _check_bias(layer, False)
    whole = first.stacked(len(formats))
    placeholder = layer_class(whole.family, "experts")(whole, False, folder.dtype_of(name), "meta", num_experts=count)
    return _Swap(stored, placeholder.train(swap.module.training))


def _by_row_format(format: Format) -> Any:
    """What is per tensor in one expert is per row in a stack; tables are not: all experts share one."""
    is_scaled = isinstance(format, PackedFormat) and format.granularity == "tensor"
    return replace(format, granularity="row") if is_scaled else format  # type: ignore[type-var]


def _check_bias(stored: Stored, has_bias: bool) -> None:
    """A bias where the module has one; without one the file may hold zeros, which some writers always store."""
    if "bias" in stored:
        stored.check("bias", (stored.n,), foreign.FLOATS, "[N]")
        if not has_bias and bool(stored.read("bias").any()):
            raise ValueError(f"{stored.where('bias')}: must be zero: the module has no bias")
    elif has_bias:
        file = stored.checkpoint.entries[next(n for n in stored.checkpoint if n.startswith(f"{stored.name}."))].file
        raise ValueError(f"{file}: tensor '{stored.name}.bias' is missing: [{stored.n}] is required")


def plan_rest(model: nn.Module, spec: Any, skip: Iterable[str]) -> Plan:
    if spec is not None:
        plan = make_plan(model, spec, skip)
        for swap in plan.swaps():
            if swap.spec is not None and swap.kind != "embedding" and swap.spec.needs_calibration:
                raise ValueError(f"{swap.name}: {swap.spec.calibration_need} needs calibration data, which the layers "
                                 "beside those that are read as they are cannot have: choose another")  # fmt: skip
        return plan
    swaps, skipped = candidates.find(model)
    return Plan([], {**skipped, **{name: KEPT for swap in swaps for name in swap.names}})


def _read(reader: Reader, swap: _Swap) -> Layer:
    """The layer, or the stack of experts; errors name the file and the layer in it."""
    placeholder, stored = swap.placeholder, swap.stored[0]
    if placeholder.kind == "experts":
        return _read_experts(reader, swap)
    with _naming(reader, stored):
        weight, note = reader.weight(stored)
        bias = None
        if placeholder.bias is not None:
            bias = nn.Parameter(stored.read("bias").to(placeholder.dtype), requires_grad=placeholder.bias.requires_grad)
        layer: Layer = layer_class(weight.family, "linear").from_weight(
            weight, bias, dtype=placeholder.dtype, x_scale=reader.x_scale(stored),
            **asdict(placeholder.format.activation),
        )  # fmt: skip
    layer.note = note
    return layer


@contextmanager
def _naming(reader: Reader, stored: Stored) -> Iterator[None]:
    """Errors inside begin with the file and the layer in it."""
    try:
        yield
    except ValueError as error:
        required, _ = reader.leaves(stored.name, stored.checkpoint.entries)
        file = stored.checkpoint.entries[f"{stored.name}.{required[0]}"].file
        text = str(error)
        raise ValueError(text if text.startswith(str(file)) else f"{file}: layer {stored.name!r}: {text}") from None


def _read_experts(reader: Reader, swap: _Swap) -> Layer:
    """Each is packed when it was read."""
    parts: list[tuple[dict[str, Tensor], Any]] = []
    notes: dict[str, None] = {}
    for stored in swap.stored:
        with _naming(reader, stored):
            weight, note = reader.weight(stored)
            parts.append(_by_row(weight.tensors(), weight.format()))
        notes.update({note: None} if note else {})
    activation = swap.placeholder.format.activation
    scales = [scale for stored in swap.stored if (scale := reader.x_scale(stored)) is not None]
    if any(not torch.equal(scales[0], scale) for scale in scales[1:]):
        activation = ActivationSpec()
        notes["the experts have several scales of their static int8 activations: x stays float"] = None
    cls: Any = layer_class(swap.placeholder.family, "experts")
    with _naming(reader, swap.stored[0]):
        layer: Layer = cls.from_parts(
            _with_zeros(parts), num_experts=swap.placeholder.num_experts, dtype=swap.placeholder.dtype,
            x_scale=scales[0] if scales else None, **asdict(activation),
        )  # fmt: skip
    layer.note = "; ".join(notes) or None
    return layer


def _by_row(tensors: dict[str, Tensor], format: Format) -> tuple[dict[str, Tensor], Any]:
    made = _by_row_format(format)
    if made is not format:
        n = format.out_features
        tensors |= {name: tensors[name].expand(n, 1).contiguous() for name in ("scales", "zeros") if name in tensors}
    return tensors, made


def _with_zeros(parts: list[tuple[dict[str, Tensor], Any]]) -> list[tuple[dict[str, Tensor], Any]]:
    """Zeros for all where some have them, and floats where some are: a stack has one form."""
    kinds = {getattr(format, "zeros", "none") for _, format in parts}
    if len(kinds) == 1:
        return parts
    made = []
    for tensors, format in parts:
        scales, middle = tensors["scales"], 1 << (format.bits - 1)
        zeros = tensors.get("zeros", torch.full(scales.shape, middle, dtype=torch.uint8))
        kind = "float" if "float" in kinds else "int"
        held = zeros.to(scales.dtype) if kind == "float" else zeros  # up to 2**8, exact in every float dtype
        made.append(({**tensors, "zeros": held}, replace(format, zeros=kind)))
    return made


def unpack_rows(words: Tensor, bits: int, count: int) -> Tensor:
    """``uint8 [rows, count]`` of dense streams ``int32 [rows, ceil(count*bits/32)]``, least significant bit first."""
    padded = torch.zeros(len(words), words_per_row(count, bits), dtype=torch.int32)
    padded[:, : words.shape[1]] = words
    return unpack(padded, bits, count)
