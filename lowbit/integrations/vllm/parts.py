"""What a process of vLLM holds of the layers of a folder: their names, their rows and columns, and how they are run.

vLLM fuses layers that read the same x, such as q, k and v: the rows of one stand below those of the other. It divides
layers over processes by rows or by columns. Here a *part* is a layer of the folder in a fused one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.checkpoint.metadata import Metadata
from lowbit.integrations.matching import NOTICE_PATTERN
from lowbit.nn.coded import CodedLayer
from lowbit.nn.layer import Layer, LayerConfig, layer_class
from lowbit.nn.linear import LinearLayer
from lowbit.nn.rows import cut_rows, join_rows
from lowbit.nn.shard import INPUT, shard, shard_problem

Tensors = dict[str, Tensor]
# Stacks of experts; what they are called in files; and how vLLM's loaders are to call their tensors: these look for
# parts of names, and take none of them for a single expert, or for a layer that is to be fused.
STACKS = ("gate_up_proj", "down_proj")
_FILES = {
    "gate_up_proj": r"experts\.gate_up_proj|(?<=moe\.)input_linear\.weight",
    "down_proj": r"experts\.down_proj|(?<=moe\.)output_linear\.weight",
}
PLACES = {"gate_up_proj": "lowbit_first", "down_proj": "lowbit_second"}


class Description:
    """The layers of a folder, by the names that vLLM has for them."""

    def __init__(self, metadata: Metadata) -> None:
        self.layers = dict(metadata.layers)
        self.tied = metadata.tied

    def rename(self, renamed: Callable[[str], str | None]) -> None:
        """Call every layer what ``renamed`` makes of its name; one without a name there keeps its own."""
        new = {name: self._renamed(name, renamed) for name in self.layers}
        self.layers = {new[name]: config for name, config in self.layers.items()}
        self.tied = tuple(tuple(new.get(name, name) for name in group) for group in self.tied)

    def _renamed(self, name: str, renamed: Callable[[str], str | None]) -> str:
        head, _, stack = name.rpartition(".")
        if self.layers[name].layer_class.kind != "experts":
            return (renamed(f"{name}.weight") or name).removesuffix(".weight")
        # what it has of experts are names of single ones
        return (renamed(f"{head}.stack.weight") or f"{head}.stack.weight").removesuffix("stack.weight") + stack

    def find(self, name: str) -> str | None:
        """The layer that vLLM calls ``name``: its name, with or without that of the base model in front."""
        if name in self.layers:
            return name
        if re.search(r"\.output\.(query|key|value)$", name):  # what vLLM's BERT calls them
            return self.find(name.replace(".output.", ".self."))
        shorter = name.partition(".")[2]
        found = [n for n in self.layers if n == shorter or n.partition(".")[2] == name]
        return found[0] if name and len(found) == 1 else None

    @property
    def stacks(self) -> list[str]:
        """The stacks of experts."""
        return [name for name, config in self.layers.items() if config.layer_class.kind == "experts"]

    def stack_of(self, experts: str, stack: str) -> str | None:
        """The stack of the experts that vLLM calls ``experts``, whatever stands before ``experts`` in the folder."""
        found = self.find(f"{experts}.{stack}")
        if found is not None:
            return found
        same = [name for name in self.stacks if name.endswith(f".{stack}") and block_of(name) == block_of(experts)]
        return same[0] if len(same) == 1 and block_of(experts) is not None else None

    def of_shape(self, kind: str, rows: int, columns: int, taken: Container[str] = ()) -> str | None:
        """The layer of this kind and shape, for a layer that vLLM gives no name; not one that is ``taken``.

        Raises ``ValueError`` where there are several.
        """
        found = [name for name, config in self.layers.items() if config.layer_class.kind == kind
                 and (config.rows, config.format.in_features) == (rows, columns) and name not in taken]  # fmt: skip
        if len(found) > 1:
            raise ValueError(f"vLLM does not say which packed {kind} of shape [{rows}, {columns}] it makes: "
                             f"the folder has {', '.join(found)}")  # fmt: skip
        return found[0] if found else None

    def others(self, name: str) -> list[str]:
        """The layers that share the weight of ``name``."""
        return [other for group in self.tied if name in group for other in group if other != name]


def block_of(name: str) -> str | None:
    """The number of a block of the model, which is the first in the names of its layers."""
    found = re.search(r"\.(\d+)\.", name)
    return None if found is None else found[1]


def file_patterns(description: Description) -> dict[re.Pattern[str], str | None]:
    """What names of tensors in files become before vLLM's loaders see them; ``None``: they do not.

    Loaders do not see what is in the files to stop a transformers without lowbit.
    """
    found: dict[re.Pattern[str], str | None] = {re.compile(NOTICE_PATTERN): None}
    for stack, files in _FILES.items():
        own = {name: block_of(name) for name in description.stacks if name.endswith(f".{stack}")}
        tensors = {tensor for name in own for tensor in description.layers[name].format.tensors()}
        blocks = {block for block in own.values() if block is not None}
        if blocks:
            start = rf"(\.(?:{'|'.join(blocks)})\.(?:\w+\.)*?)(?:{files})"
            found[re.compile(rf"{start}\.({'|'.join(tensors)})$")] = rf"\1experts.routed_experts.{PLACES[stack]}_\2"
            found[re.compile(f"{start}$")] = None
    return found


def cut_problem(config: Any, rows: bool, count: int) -> str | None:
    """Why a layer cannot be cut to a share of its rows, or of its columns where ``count`` > 1; ``None``: it can."""
    coded = issubclass(config.layer_class, CodedLayer)
    if (rows or count > 1) and (not coded or getattr(config.format, "scales", None) == "nested"):
        return f"{config.format.describe()} cannot be cut into shares"
    return shard_problem(config.format, coded, INPUT, 0, count) if count > 1 else None


def rows_of(whole: Sequence[int], here: Sequence[int], rank: int, world: int) -> list[slice]:
    """Where the rows of process ``rank`` of ``world`` stand in a layer.

    ``whole``: how many rows each of its blocks has, one below the other; ``here``: how many of each a process holds.
    Where these are more than an equal share, neighbouring processes hold the same rows.

    Raises ``ValueError`` where a block cannot be divided so.
    """
    found, start = [], 0
    for size, part in zip(whole, here, strict=True):
        if part < 1 or size % part or (world * part) % size:
            raise ValueError(f"{size} rows cannot be divided into shares of {part} for {world} processes")
        index = rank * (size // part) // world
        found.append(slice(start + index * part, start + (index + 1) * part))
        start += size
    return found


@dataclass
class Part:
    """A layer of the folder, or this process's share of it.

    Attributes:
        name: in the folder, for messages.
        config: of the whole layer; ``None``: it is float, and its only tensor is ``weight``.
        tensors: as files have them.
        format: what ``tensors`` are now; ``None`` of a float layer.
    """

    name: str
    config: LayerConfig | None
    tensors: Tensors
    format: Any = None

    def __post_init__(self) -> None:
        if self.config is None:
            return
        if self.format is None:
            self.format = self.config.format
        for name, (shape, dtype) in self.format.tensors().items():
            Layer.check_tensor(self.name, name, self.tensors.get(name), shape, dtype)

    @property
    def rows(self) -> int:
        return self.tensors["weight"].shape[0] if self.config is None else self.format.out_features

    def share(self, rows: Sequence[slice], columns: tuple[int, int] = (0, 1)) -> Part:
        """What a process holds: these rows, one below the other, of share ``index`` of ``count`` of the columns.

        Raises ``ValueError``, naming the layer, for a form that cannot be cut so.
        """
        index, count = columns
        whole_rows = [(r.start, r.stop) for r in rows] == [(0, self.rows)]
        if self.config is None:
            weight = self.tensors["weight"]
            size = weight.shape[1] // count
            kept = [weight[r, index * size : (index + 1) * size] for r in rows]
            return replace(self, tensors={"weight": torch.cat(kept)})
        if whole_rows and count == 1:
            return self
        if problem := cut_problem(self.config, not whole_rows, count):
            raise ValueError(f"{self.name}: {problem}: serve it with tensor_parallel_size=1")
        part = self
        if not whole_rows:
            cut = [_rows(part, r) for r in rows]
            tensors, format = join_rows(cut)
            part = replace(part, tensors=tensors | part._of_input(), format=format)
        if count > 1:
            layer = part.module("linear", torch.float32)
            shard(layer, INPUT, index, count)
            part = replace(part, tensors=layer.canonical(), format=layer.format)
        return part

    def _of_input(self) -> Tensors:
        """The tensors that say how x is held."""
        weight = self.format.weight_tensors()
        return {name: tensor for name, tensor in self.tensors.items() if name not in weight}

    def module(self, kind: str, dtype: torch.dtype) -> Any:
        """A layer that holds it, not prepared yet; of embeddings without ``output_scale``: vLLM's model multiplies."""
        assert self.config is not None
        extras = {"embedding": ("padding_idx",), "experts": ("num_experts",)}.get(kind, ())
        given = {name: self.config.extras.get(name) for name in extras}
        layer = layer_class(self.config.layer_class.family, kind)(self.format, False, dtype, "meta", **given)
        layer.name = self.name
        layer.store(self.tensors)
        layer.validate(self.name)
        return layer


def _rows(part: Part, rows: slice) -> tuple[Tensors, Any]:
    cut = cut_rows({n: t for n, t in part.tensors.items() if n in part.format.weight_tensors()}, part.format, rows)
    outliers = len(cut.get("outlier_values", ()))
    return cut, replace(part.format, out_features=rows.stop - rows.start, outliers=outliers)


def joined(parts: Sequence[Part]) -> Part | None:
    """One part of the rows of all; ``None`` where they are not of one format."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if any(part.config is None for part in parts):
        if all(part.config is None for part in parts):
            return replace(first, tensors={"weight": torch.cat([part.tensors["weight"] for part in parts])})
        return None
    if any(type(part.format) is not type(first.format) or cut_problem(part.config, True, 1) for part in parts):
        return None
    of_input = [part._of_input() for part in parts]
    if any(own.keys() != of_input[0].keys() or any(not torch.equal(own[n], of_input[0][n]) for n in own)
           for own in of_input[1:]):  # fmt: skip
        return None
    try:
        tensors, format = join_rows([(part.tensors, part.format) for part in parts])
    except ValueError:  # of unlike formats
        return None
    return replace(first, name="+".join(part.name for part in parts), tensors=tensors | of_input[0], format=format)


class FusedLinear(nn.Module):
    """``y = cat([x @ W.T for W in parts], -1) + bias``: parts of one format are joined, others run one by one."""

    def __init__(self, parts: Iterable[Part], dtype: torch.dtype) -> None:
        super().__init__()
        self.parts = nn.ModuleList()
        pending = list(parts)
        while pending:
            for count in range(len(pending), 0, -1):
                one = joined(pending[:count])
                if one is not None:
                    break
            self.parts.append(_linear(one, dtype))
            del pending[:count]
        self.sizes = [_rows_of_module(part) for part in self.parts]

    @classmethod
    def of(cls, layer: LinearLayer) -> FusedLinear:
        """With one part, which is ``layer``."""
        made = cls((), layer.dtype)
        made.parts.append(layer)
        made.sizes = [layer.format.out_features]
        return made

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if len(self.sizes) == 1:
            return _product(self.parts[0], x, bias)
        biases = [None] * len(self.sizes) if bias is None else bias.split(self.sizes)
        return torch.cat([_product(part, x, b) for part, b in zip(self.parts, biases, strict=True)], -1)


def _rows_of_module(module: Any) -> int:
    return int(module.format.out_features if isinstance(module, LinearLayer) else module.out_features)


def _linear(part: Part | None, dtype: torch.dtype) -> nn.Module:
    assert part is not None
    if part.config is not None:
        layer: nn.Module = part.module("linear", dtype).prepare()
        return layer
    weight = part.tensors["weight"].to(dtype)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _product(module: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(module, LinearLayer):
        return module.product(x, bias)
    return nn.functional.linear(x, module.weight, bias)
