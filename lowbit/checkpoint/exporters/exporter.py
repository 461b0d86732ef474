"""``lowbit.export``: everything is checked first, with every layer that the format cannot hold; then it is written."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowbit.checkpoint import libraries
from lowbit.checkpoint.reader import Checkpoint
from lowbit.core.bitpack import unpack_bytes
from lowbit.core.family import did_you_mean
from lowbit.model import hooks
from lowbit.model.plan import require_model
from lowbit.model.surgery import float_modules, put
from lowbit.nn.layer import Layer, layers, storage_of

_exporters: dict[str, Callable[[], Exporter]] = {}


class Exporter(ABC):
    """How models are written in one format.

    Attributes:
        format: its name.
        suffix: of a format that is one file.
        can_share: whether layers may share one weight.
        round_trip: what is read back, for docs/interoperability.md.
    """

    format: ClassVar[str]
    suffix: ClassVar[str] = ""
    can_share: ClassVar[bool] = False
    round_trip: ClassVar[str] = "bit for bit"

    @abstractmethod
    def problem(self, name: str, layer: Layer) -> str | None:
        """Why the format cannot hold a layer, if so: the requirement, and what the layer has."""

    def check(self, model: nn.Module, kept: dict[str, Layer], floats: dict[str, Layer], tokenizer: Any) -> None:
        """Raise ``ValueError`` for what else the format cannot hold."""
        if tokenizer is not None and not callable(getattr(tokenizer, "save_pretrained", None)):
            raise ValueError(f"tokenizer must be one of transformers: got {type(tokenizer).__name__}")

    @abstractmethod
    def write(
        self, model: nn.Module, kept: dict[str, Layer], floats: dict[str, Layer], target: Path, tokenizer: Any
    ) -> None:
        """Write ``model`` to the folder or file ``target``: the layers ``kept`` as they are, ``floats`` as floats."""


def stored(layer: Layer) -> dict[str, Tensor]:
    """The tensors of a layer as files have them, but packed zeros with a byte for each."""
    format, held = layer.format, layer.canonical()
    if getattr(format, "packed_zeros", False):
        held = {**held, "zeros": unpack_bytes(held["zeros"], format.bits, format.groups)}
    return held


def register(exporter: Exporter) -> None:
    """Let :func:`export` know a format."""
    _exporters[exporter.format] = lambda: exporter


def register_later(format: str, make: Callable[[], Exporter]) -> None:
    """The same of an exporter whose module is imported only when it is asked for."""
    _exporters[format] = make


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    format: str,
    skip: Sequence[str] = (),
    tokenizer: Any = None,
) -> None:
    """Write a packed transformers model in another library's format; the model stays as it is.

    Args:
        path: a folder that does not exist yet, or is empty; of GGUF, ONNX and ``pt2`` a file that does not exist
            yet.
        format: ``"float"``, ``"compressed-tensors"``, ``"gptq"``, ``"gguf"``, ``"onnx"`` or ``"pt2"``
            (docs/interoperability.md says what each can hold).
        skip: patterns of layers that are written as floats.
        tokenizer: goes into the folder too; of GGUF the path of a file whose tokenizer is taken over.

    Raises:
        ValueError: before anything is written, with every layer that the format cannot hold, and why.
        FileExistsError: ``path`` exists, and is not an empty folder.
    """
    require_model(model)
    if format not in _exporters:
        raise ValueError(f"format must name an exporter: got {format!r:.100}{did_you_mean(str(format), _exporters)}")
    exporter = _exporters[format]()
    if libraries.owner(model) is None:
        raise ValueError(f"model must be a model of transformers to be exported: got {type(model).__name__}")
    path, packed = Path(path), layers(model)
    if not packed:
        raise ValueError("the model has no packed layer: save it with its own means")
    if isinstance(skip, str) or not all(isinstance(pattern, str) for pattern in skip):
        raise ValueError(f"skip must be a list of patterns: got {skip!r:.100}")
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in packed):
            raise ValueError(f"skip={pattern!r} matches no packed layer{did_you_mean(pattern, packed)}")
    floats = {name: layer for name, layer in packed.items() if any(fnmatchcase(name, pattern) for pattern in skip)}
    kept = {name: layer for name, layer in packed.items() if name not in floats}
    found = {name: why for name, layer in kept.items() if (why := _problem(exporter, name, layer, packed)) is not None}
    if found:
        lines = [f"{name}: {why}" for name, why in found.items()]
        more = [f"and {len(lines) - 20} more"] if len(lines) > 20 else []
        raise ValueError(f"cannot export as {format!r}, nothing was written:\n  " + "\n  ".join(lines[:20] + more)
                         + "\n  to write these layers as floats: skip=[their names or patterns]")  # fmt: skip
    exporter.check(model, kept, floats, tokenizer)
    _write(exporter, model, kept, floats, path, tokenizer)


def _problem(exporter: Exporter, name: str, layer: Layer, packed: dict[str, Layer]) -> str | None:
    why = exporter.problem(name, layer)
    if why is None and not exporter.can_share:
        storage = storage_of(layer)
        other = next((n for n, one in packed.items() if one is not layer and storage_of(one) == storage), None)
        why = None if other is None else f"must have a weight of its own: it shares that of {other}"
    return why


def _write(
    exporter: Exporter, model: nn.Module, kept: dict[str, Layer], floats: dict[str, Layer], path: Path, tokenizer: Any
) -> None:
    if path.exists() and (exporter.suffix or not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} must not exist{'' if exporter.suffix else ', or be an empty folder'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        target = temporary / path.name if exporter.suffix else temporary
        exporter.write(model, kept, floats, target, tokenizer)
        if tokenizer is not None and not exporter.suffix:
            tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)
        if exporter.suffix:
            target.rename(path)
        else:
            if path.exists():
                path.rmdir()
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _Held(nn.Module):
    """In the place of a layer: its tensors as the format has them."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def save_folder(
    model: nn.Module, held: dict[str, dict[str, Tensor]], floats: dict[str, Layer], section: Any, target: Path
) -> None:
    """Save a transformers model with other tensors in the place of its layers.

    ``held``: name -> the tensors of a layer; ``section``: the ``quantization_config``, or None.
    """
    same = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin: Any = copy.deepcopy(model, same)  # modules of its own, the tensors are the model's
    for name, module in float_modules({name: layers(twin)[name] for name in floats}).items():
        put(twin, name, module)
    for name, tensors in held.items():
        parent, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(parent), leaf, _Held(tensors))
    hooks.after_dequantize(twin)
    if section is not None:
        twin.config.quantization_config = section
    twin.save_pretrained(target)
    checkpoint = Checkpoint.of_folder(target)
    for name, tensors in held.items():
        for leaf, tensor in tensors.items():
            key = f"{name}.{leaf}"
            if key not in checkpoint:
                raise ValueError(f"{key}: transformers saves it under another name: {type(model).__name__} cannot be "
                                 "exported")  # fmt: skip
            checkpoint.check(key, tuple(tensor.shape), tensor.dtype)


def exact_in(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether all values of ``tensor`` are values of ``dtype``."""
    return torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)
