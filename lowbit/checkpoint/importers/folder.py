"""From a folder in a foreign format to the packed model, one layer at a time, without the foreign library.

A reader says which tensors make a layer, checks their headers and gives its weight. To everything else the folder is
shown as the float one that it was made from: each such layer has one tensor ``weight``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowbit.backends import registry
from lowbit.checkpoint import foreign, stream
from lowbit.checkpoint.convert_folder import fill_converted, return_freed_memory
from lowbit.checkpoint.libraries import FloatFolder, Stack, library_of
from lowbit.checkpoint.reader import Checkpoint, Entry
from lowbit.codebook.format import NESTED_BLOCK, CodebookFormat
from lowbit.core.activations import ActivationSpec
from lowbit.core.bitpack import unpack, words_per_row
from lowbit.core.family import Format, Weight
from lowbit.model import candidates
from lowbit.model.plan import Plan, Swap, check_arguments, make_plan
from lowbit.model.surgery import carry_over, put
from lowbit.nn.layer import Layer, layer_class, layers
from lowbit.packed.format import PackedFormat

KEPT = "the folder holds it as floats, and no spec was given for it"


@dataclass(frozen=True)
class Stored:
    """A layer of the folder.

    Attributes:
        name: its name in the files.
        checkpoint: the files.
        n, k: output and input features of the module that it belongs to.
        kind: ``"linear"``, ``"embedding"`` or ``"experts"``: that module's.
        separator: what is between the name of the layer and that of a leaf.
        expert, num_experts: of an expert whose tensors are parts of those of all, its number, and how many there are.
    """

    name: str
    checkpoint: Checkpoint
    n: int
    k: int
    kind: str = "linear"
    separator: str = "."
    expert: int | None = None
    num_experts: int = 1

    def _key(self, leaf: str) -> str:
        return f"{self.name}{self.separator}{leaf}"

    def __contains__(self, leaf: str) -> bool:
        return self._key(leaf) in self.checkpoint

    def read(self, leaf: str) -> Tensor:
        if self.expert is None:
            return self.checkpoint.read(self._key(leaf))
        part = self.checkpoint.read_part(self._key(leaf), self.expert, self.num_experts)
        return part.reshape(self.checkpoint.entries[self._key(leaf)].shape[1:])

    def dtype(self, leaf: str) -> torch.dtype:
        return self.checkpoint.entries[self._key(leaf)].dtype

    def shape(self, leaf: str) -> tuple[int, ...]:
        return self.checkpoint.entries[self._key(leaf)].shape

    def where(self, leaf: str) -> str:
        """``file: tensor 'name'``, as errors begin."""
        own = "" if self.expert is None else f", expert {self.expert}"
        return f"{self.checkpoint.entries[self._key(leaf)].file}: tensor {self._key(leaf)!r}{own}"

    def check(
        self, leaf: str, shape: tuple[int, ...], dtypes: Sequence[torch.dtype], why: str, *others: tuple[int, ...]
    ) -> None:
        """Raise ``ValueError`` unless the header of a tensor says one of these shapes and one of these dtypes."""
        entry = self.checkpoint.entries[self._key(leaf)]
        allowed = [shape if self.expert is None else (self.num_experts, *shape) for shape in (shape, *others)]
        if entry.shape not in allowed:
            shapes = " or ".join(map(str, allowed))
            raise ValueError(f"{self.where(leaf)}: shape must be {shapes} ({why}): got {entry.shape}")
        if entry.dtype not in dtypes:
            raise ValueError(f"{self.where(leaf)}: dtype must be {' or '.join(map(str, dtypes))}: got {entry.dtype}")

    def order(self, leaf: str, groups: int, size: int) -> Tensor | None:
        """The columns group after group, int32 ``[K]``, of a tensor that has the group of each; None where that is
        ``k // size``.

        Raises ``ValueError`` unless every group has ``size`` columns, but the last one what is left.
        """
        index = self.read(leaf).long()
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= groups:
            raise ValueError(f"{self.where(leaf)}: values must be in [0, {groups}): got values in [{low}, {high}]")
        in_groups = torch.arange(self.k) // size
        if torch.equal(index, in_groups):
            return None
        if self.kind != "linear":
            raise ValueError(f"{self.where(leaf)}: {self.name!r} has its groups in another order than its columns "
                             f"(act-order), which is read for linear layers: it is of kind {self.kind!r}")  # fmt: skip
        order = index.argsort(stable=True)
        if not torch.equal(index[order], in_groups):
            raise ValueError(
                f"{self.where(leaf)}: layer {self.name!r}: each group must have {size} columns, and the last one "
                f"{self.k - (groups - 1) * size}: got {torch.bincount(index, minlength=groups).tolist()!r:.200}"
            )
        return order.int()


class Reader(ABC):
    """How one format stores a layer. It is made of the section of the config file that names the format.

    Attributes:
        format: its name there, the key of :data:`lowbit.checkpoint.foreign.importers`.
        signs: leaves of tensors that only such layers have, such as ``qweight`` or ``weight.quant_map``.
        required, optional: all leaves of a layer, beside its bias, where every layer has the same: see :meth:`leaves`.
        separator: what is between the name of a layer and that of a leaf: where it is not a dot, a layer is a stack of
            experts, whose tensors are each one for all, and is known by the name of its Parameter.
        sizes: how many sizes the shape of the codes has.
        unused: leaves of tensors that belong to no layer and are not read, such as the scales of a cache.
        exact: how near the weight is to the project's own, for docs/interoperability.md.
    """

    format: ClassVar[str]
    signs: ClassVar[tuple[str, ...]]
    required: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()
    separator: ClassVar[str] = "."
    sizes: ClassVar[int] = 2
    unused: tuple[str, ...] = ()
    exact: ClassVar[str] = "bit for bit"

    def __init__(self, section: dict[str, Any], file: Path) -> None:
        self.section, self.file = section, file

    def leaves(self, name: str, entries: dict[str, Entry]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The leaves that a layer must have, its codes first, and those that it may have."""
        return self.required, self.optional

    @abstractmethod
    def float_shape(self, name: str, entries: dict[str, Entry]) -> tuple[int, ...]:
        """The shape ``[N, K]`` of the float weight (of a stack ``[E, N, K]``), as the headers have it; they are not
        checked yet."""

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
        return refusal(self.format, self.file, field, requirement, value)


def refusal(format: str, file: Path, field: str, requirement: str, value: object) -> ValueError:
    """What to tell of a field of the config ``file`` that is not read, with a layer of the folder."""
    example = foreign.example(file.parent)
    return ValueError(
        f"{file}: quantization_config: {field} must be {requirement} for {format!r} to be read: got "
        f"{value!r:.200}{f' ({example})' if example else ''}. Give the float model that it was made from"
    )


class FloatView(Checkpoint):
    """The files as those of a float model: each layer of the reader is a tensor, which is never read.

    Attributes:
        layers: name of a layer -> its leaves, that of its codes first.
        layer_of: name of a tensor of the float model -> the layer that it is.
    """

    def __init__(self, checkpoint: Checkpoint, reader: Reader) -> None:
        entries, separator = checkpoint.entries, reader.separator
        self.metadata = checkpoint.metadata
        self.layers = _layers(entries, reader)
        self.layer_of = {f"{name}.weight" if separator == "." else name: name for name in self.layers}
        biases = {f"{name}.bias" for name in self.layers} if separator == "." else set()
        theirs = {f"{name}{separator}{leaf}" for name, leaves in self.layers.items() for leaf in leaves} | biases
        theirs |= {name for name in entries if name.rpartition(separator)[2] in reader.unused}
        self.entries = {name: entry for name, entry in entries.items() if name not in theirs}
        for key, name in self.layer_of.items():
            if key in self.entries:
                raise ValueError(f"{entries[key].file}: tensor {key!r}: layer {name!r} has it beside its codes")
            file, shape = entries[f"{name}{separator}{self.layers[name][0]}"].file, reader.float_shape(name, entries)
            self.entries[key] = Entry(file, torch.float16, shape, 0, 2 * math.prod(shape))

    def read(self, name: str) -> Tensor:
        if name in self.layer_of:
            raise ValueError(f"{self.entries[name].file}: layer {self.layer_of[name]!r} is no float one")
        return super().read(name)


def _layers(entries: dict[str, Entry], reader: Reader) -> dict[str, tuple[str, ...]]:
    """The names of the layers in the format, each with its leaves, that of its codes first; refused where one is not
    complete, or nothing is in the format."""
    separator = reader.separator
    ends = [f"{separator}{sign}" for sign in reader.signs]
    signed = {key.removesuffix(end): entry for key, entry in entries.items() for end in ends if key.endswith(end)}
    found: dict[str, tuple[str, ...]] = {}
    for name, entry in signed.items():
        required, optional = reader.leaves(name, entries)
        for leaf in required:
            if f"{name}{separator}{leaf}" not in entries:
                raise ValueError(f"{entry.file}: tensor '{name}{separator}{leaf}' is missing: the layer needs "
                                 f"{', '.join(required)}")  # fmt: skip
        key = f"{name}{separator}{required[0]}"
        if len(entries[key].shape) != reader.sizes:
            raise ValueError(f"{entries[key].file}: tensor {key!r}: shape must have {reader.sizes} sizes: got "
                             f"{entries[key].shape}")  # fmt: skip
        found[name] = (*required, *optional)
    if not found:
        raise ValueError(
            f"{reader.file} names the format {reader.format!r}, but no tensor of the folder is a "
            f"{' or '.join(reader.signs)}: no layer is in that format"
        )
    return found


@torch.inference_mode(False)
def read_folder(
    reader_of: Callable[[dict[str, Any], Path], Reader], path: Path, spec: Any, skip: Sequence[str]
) -> nn.Module:
    """The packed model of a folder: its layers in the format of the reader as they are stored, the others by ``spec``.

    Raises:
        ValueError: before a weight is read, naming file, tensor and field, or layer and argument; while weights are
            read, naming file and layer.
    """
    skip = check_arguments(spec, skip)
    if spec is None and skip:
        raise ValueError(f"skip leaves layers float that spec would pack: without a spec, got skip={list(skip)!r}")
    section, file = next((s, f) for s, f, _ in foreign.named_sections(path))
    reader = reader_of(section, file)
    checkpoint = Checkpoint.of_folder(path)
    view, library = FloatView(checkpoint, reader), library_of(path)
    if library is None:
        raise FileNotFoundError(f"{path} is not a transformers model folder: it has no config.json")
    folder = library.open_float(path, view)
    if folder is None:
        raise ValueError(f"{path / 'config.json'}: architectures must name a class of transformers whose tensors are "
                         f"those of the files, one by one, for {reader.format!r} to be read")  # fmt: skip
    swaps = _swaps(folder, view, checkpoint, reader)
    _check_complete(folder, path)
    plan = plan_rest(folder.model, spec, skip)
    stream.check_shapes(folder.model, view, folder.names)
    for swap in tqdm(swaps, desc="lowbit import", unit="layer", disable=None if len(swaps) > 100 else True):
        for place, layer in zip(swap.places, _read(reader, swap), strict=True):
            for name in place.names:
                put(folder.model, name, carry_over(place.empty, layer))
        return_freed_memory()
    return fill_converted(folder, plan, view)


@dataclass(frozen=True)
class _Place:
    """Where a layer goes: the names that its module has in the model, an empty layer, and the tensor of its bias."""

    names: list[str]
    empty: Layer
    bias: str | None = None


@dataclass(frozen=True)
class _Swap:
    """What is read into the model: a layer of the files, into all modules that share it; of experts all layers of a
    stack, in their order."""

    stored: list[Stored]
    places: list[_Place]


def _swaps(folder: FloatFolder, view: FloatView, checkpoint: Checkpoint, reader: Reader) -> list[_Swap]:
    """What is to be read; the empty layers are put into the model. All headers are checked."""
    model, by_key = folder.model, dict[str, list[str]]()
    for name, key in folder.names.items():
        by_key.setdefault(key, []).append(name)
    candidate = {n: s for s in candidates.find(model)[0] for n in s.names}
    stacks = {name: stack for name, stack in folder.stacks.items()
              if any(key in view.layer_of for keys in stack.keys for key in keys)}  # fmt: skip
    of_experts = {view.layer_of.get(key) for stack in stacks.values() for keys in stack.keys for key in keys}
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    found: list[_Swap] = []
    for tensor, key in view.layer_of.items():
        if key in of_experts:
            continue
        weights = by_key.get(tensor, [])
        if not weights and folder.leaves_out(tensor):  # such as a layer that predicts more tokens
            continue
        where = f"{view.entries[tensor].file}: layer {key!r} is in the format {reader.format!r}"
        others = [name for name in weights if name != tensor and name in view.entries]
        if others or (not weights and tensor in {*tied, *tied.values()}):
            raise ValueError(f"{where}: {type(model).__name__} ties its weight to another's (tie_word_embeddings), and "
                             f"the files have both{f', as {others[0]!r}' if others else ''}")  # fmt: skip
        swaps = [candidate.get(weight.removesuffix(".weight")) for weight in weights]
        kinds = ("linear", "embedding") if reader.separator == "." else ("experts",)
        if not swaps or any(swap is None or swap.kind not in kinds for swap in swaps):
            raise ValueError(f"{where}: {type(model).__name__} has no {' or '.join(kinds)} layer there")
        distinct = list({id(swap): swap for swap in swaps if swap is not None}.values())
        dtype = folder.dtype_of(weights[0])
        found.append(_layers_of(key, distinct, dtype, folder, checkpoint, reader))
    for name, stack in stacks.items():
        found.append(_experts(name, stack, candidate.get(name), folder, view, checkpoint, reader))
        del folder.stacks[name]
    for place in (place for swap in found for place in swap.places):
        for name in place.names:
            put(model, name, place.empty)
            for tensor in (name, f"{name}.weight", f"{name}.bias"):
                folder.names.pop(tensor, None)
    return found


def _layers_of(
    key: str, swaps: Sequence[Swap], dtype: torch.dtype | None, folder: FloatFolder, checkpoint: Checkpoint,
    reader: Reader,
) -> _Swap:  # fmt: skip
    """A layer of the files for modules that share a weight, an embedding and its tied head say; or one for experts."""
    n, k = swaps[0].weight().shape
    if swaps[0].kind == "experts":
        count = swaps[0].extras["num_experts"]
        each = [Stored(key, checkpoint, n // count, k, "experts", reader.separator, e, count) for e in range(count)]
        whole = _by_row_format(reader.check(each[0])).stacked(count)
        layer = layer_class(whole.family, "experts")(whole, False, dtype, "meta", num_experts=count)
        return _Swap(each, [_Place(swaps[0].names, layer.train(swaps[0].module.training))])
    ordered = sorted(swaps, key=lambda swap: swap.kind)  # an embedding first: whose layer it is in a config
    stored, places = Stored(key, checkpoint, n, k, ordered[0].kind), []
    format = reader.check(stored)
    with_bias = {swap.name for swap in swaps if swap.module._parameters.get("bias") is not None}
    # a head has one of its own, which the files do not have beside the weight that it shares
    _check_bias(stored, any(f"{name}.bias" not in folder.names for name in with_bias))
    for swap in ordered:
        has_bias, bias = swap.name in with_bias, None
        if has_bias:
            bias = folder.names.get(f"{swap.name}.bias", f"{key}.bias")
            checkpoint.check(bias, (n,))
        own = format if swap.kind == "linear" else format.with_activation(ActivationSpec())
        empty = layer_class(format.family, swap.kind)(own, has_bias, dtype, "meta", **swap.extras)
        places.append(_Place(swap.names, empty.train(swap.module.training), bias))
    return _Swap([stored], places)


def _experts(
    name: str, stack: Stack, swap: Swap | None, folder: FloatFolder, view: FloatView, checkpoint: Checkpoint,
    reader: Reader,
) -> _Swap:  # fmt: skip
    """All layers of a stack of experts, one by one in the files; they must have one form."""
    tensors = [key for own in stack.keys for key in own]
    file = view.entries[tensors[0]].file
    for key in tensors:
        if key not in view.layer_of:
            raise ValueError(f"{view.entries[key].file}: layer {key.removesuffix('.weight')!r} must be in the format "
                             f"{reader.format!r}, as are others of {name!r}")  # fmt: skip
    keys = [view.layer_of[key] for key in tensors]
    if swap is None or swap.kind != "experts" or swap.transposed or stack.along not in (None, 0):
        raise ValueError(f"{file}: layer {keys[0]!r} is in the format {reader.format!r}: {name!r} of "
                         f"{type(folder.model).__name__} is no stack of experts, one below the other")  # fmt: skip
    count = swap.extras["num_experts"]
    rows, k = swap.weight().shape
    stored = [Stored(key, checkpoint, rows // len(keys), k, "experts") for key in keys]
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
    empty = layer_class(whole.family, "experts")(whole, False, folder.dtype_of(name), "meta", num_experts=count)
    return _Swap(stored, [_Place([name], empty.train(swap.module.training))])


def _by_row_format(format: Format) -> Any:
    """The form of one expert as a stack can have it: with scales by row, and nested ones in whole blocks.

    A table is not by row: all experts share it.
    """
    if isinstance(format, PackedFormat) and format.granularity == "tensor":
        return replace(format, granularity="row")
    if isinstance(format, CodebookFormat) and format.scales == "nested":
        cannot = format.out_features * format.groups % NESTED_BLOCK
        return replace(format, scales="float32") if cannot else format
    return format


def _check_complete(folder: FloatFolder, path: Path) -> None:
    """Raise ``ValueError`` naming a tensor that the model needs and no file has."""
    packed = layers(folder.model, duplicates=True)
    for name, tensor in folder.model.state_dict().items():
        is_read = name in folder.names or name in folder.stacks or name.rpartition(".")[0] in packed
        if tensor.device.type == "meta" and not is_read:
            raise ValueError(f"{path}: tensor {name!r} is missing: {list(tensor.shape)} is required")


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


def _read(reader: Reader, swap: _Swap) -> list[Layer]:
    """The layers of the places, which share one weight, or the stack of experts; errors name file and layer."""
    stored, made = swap.stored[0], list[Any]()
    if stored.kind == "experts":
        return [_read_experts(reader, swap)]
    with _naming(reader, stored), registry.as_stored():
        weight, note = reader.weight(stored)
        for place in swap.places:
            empty, bias = place.empty, None
            if place.bias is not None and empty.bias is not None:
                read = stored.checkpoint.read(place.bias).to(empty.dtype)
                bias = nn.Parameter(read, requires_grad=empty.bias.requires_grad)
            cls: Any = layer_class(weight.family, empty.kind)
            if made:
                format = made[0].format.with_activation(empty.format.activation)
                layer = cls(format, False, empty.dtype, "meta", **empty.extras())
                layer.share_weight(made[0])
                if "x_scale" in format.tensors():
                    layer.store({"x_scale": _x_scale(reader, stored)})
                layer.bias = bias
            elif empty.kind == "embedding":
                layer = cls.from_weight(weight, dtype=empty.dtype, **empty.extras())
            else:
                layer = cls.from_weight(weight, bias, dtype=empty.dtype, x_scale=reader.x_scale(stored),
                                        **asdict(empty.format.activation))  # fmt: skip
            layer.note = note
            made.append(layer)
    del weight  # its codes are a byte each
    return [layer.prepare(owned=True) for layer in made]


def _x_scale(reader: Reader, stored: Stored) -> Tensor:
    scale = reader.x_scale(stored)
    assert scale is not None
    return scale.detach().reshape(1).float()


@contextmanager
def _naming(reader: Reader, stored: Stored) -> Iterator[None]:
    """Errors inside begin with the file and the layer in it."""
    try:
        yield
    except ValueError as error:
        required, _ = reader.leaves(stored.name, stored.checkpoint.entries)
        file = stored.where(required[0]).partition(": tensor ")[0]
        text = str(error)
        raise ValueError(text if text.startswith(str(file)) else f"{file}: layer {stored.name!r}: {text}") from None


def _read_experts(reader: Reader, swap: _Swap) -> Layer:
    """Each is packed when it was read."""
    parts: list[tuple[dict[str, Tensor], Any]] = []
    notes: dict[str, None] = {}
    for i, stored in enumerate(swap.stored):
        with _naming(reader, stored):
            weight, note = reader.weight(stored)
            parts.append(_by_row(weight.tensors(), weight.format()))
        notes.update({note: None} if note else {})
        if i % 16 == 15:
            return_freed_memory()  # what is kept lies between what was needed to read it
    empty: Any = swap.places[0].empty
    activation = empty.format.activation
    scales = [scale for stored in swap.stored if (scale := reader.x_scale(stored)) is not None]
    if any(not torch.equal(scales[0], scale) for scale in scales[1:]):
        activation = ActivationSpec()
        notes["the experts have several scales of their static int8 activations: x stays float"] = None
    cls: Any = layer_class(empty.family, "experts")
    with _naming(reader, swap.stored[0]):
        joined = cls.joined(_with_one_table(_with_zeros(parts)))
        parts.clear()  # the stack is in memory twice, not three times
        return_freed_memory()
        with registry.as_stored():
            layer: Layer = cls.from_parts(
                [joined], num_experts=empty.num_experts, dtype=empty.dtype,
                x_scale=scales[0] if scales else None, **asdict(activation),
            )  # fmt: skip
    layer.note = "; ".join(notes) or None
    return layer.prepare(owned=True)


def _by_row(tensors: dict[str, Tensor], format: Format) -> tuple[dict[str, Tensor], Any]:
    made = _by_row_format(format)
    if isinstance(made, PackedFormat) and made is not format:
        n = format.out_features
        tensors |= {name: tensors[name].expand(n, 1).contiguous() for name in ("scales", "zeros") if name in tensors}
    elif made is not format:
        return _with_float_scales(tensors, format)
    return tensors, made


def _with_float_scales(tensors: dict[str, Tensor], format: Any) -> tuple[dict[str, Tensor], Any]:
    """Nested scales as float32."""
    codes, table = tensors["scales"], tensors["scale_codebook"]
    factors = tensors["scale_absmax"].repeat_interleave(NESTED_BLOCK)[: codes.numel()].view(codes.shape)
    scales = table[codes.long()] * factors + tensors["scale_offset"]
    made = {name: tensor for name, tensor in tensors.items() if not name.startswith("scale")}
    return {**made, "scales": scales}, replace(format, scales="float32")


def _with_one_table(parts: list[tuple[dict[str, Tensor], Any]]) -> list[tuple[dict[str, Tensor], Any]]:
    """Float scales for all where the tables of nested ones differ: a stack has one."""
    tables = [tensors["scale_codebook"] for tensors, _ in parts if "scale_codebook" in tensors]
    if all(torch.equal(tables[0], table) for table in tables[1:]):
        return parts
    return [_with_float_scales(tensors, format) for tensors, format in parts]


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
