"""``save`` and ``load``: a packed model as a folder.

A plain module is saved as ``lowbit.json`` (:mod:`lowbit.checkpoint.metadata`) and ``model.safetensors``. A model of a
library that is known to :mod:`lowbit.checkpoint.libraries` is saved as the library does it: a transformers model by its
``save_pretrained``, with the description in ``config.json``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lowbit.checkpoint import card, foreign, libraries, metadata, stream
from lowbit.checkpoint.reader import SINGLE_FILE, Checkpoint, read_json
from lowbit.core.folder import DESCRIPTION_FILE as DESCRIPTION_FILE
from lowbit.model.accelerate import canonical_state_dict
from lowbit.model.plan import require_model
from lowbit.nn.layer import layers


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder, renamed to ``path`` when all went well: readers never see half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _aliases(state: dict[str, Tensor]) -> dict[str, str]:
    """Names whose tensor is the very same memory as an earlier name's: those are stored once."""
    first: dict[tuple[Any, ...], str] = {}
    aliases = {}
    for name, tensor in state.items():
        if tensor.numel() == 0:
            continue
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if key in first:
            aliases[name] = first[key]
        first.setdefault(key, name)
    return aliases


def save(model: nn.Module, folder: str | os.PathLike[str], *, tokenizer: Any = None) -> None:
    """Save a packed model to ``folder``, so that :func:`load` gives it back bit for bit.

    ``tokenizer``: a tokenizer or processor of transformers that goes into the folder too. README.md says how the folder
    is loaded; one that somebody else wrote stays.

    Every ``state_dict`` entry is saved, float ones too; tensors that are shared are stored once. Each file is
    written under a temporary name first, so an interrupted save leaves no half-written file behind.

    Raises:
        ValueError: the model has no packed layer, or holds values that are not valid (NaN scales, ...).
        TypeError: ``model`` is no module, or ``tokenizer`` has no ``save_pretrained``.
    """
    require_model(model)
    if tokenizer is not None and not callable(getattr(tokenizer, "save_pretrained", None)):
        raise TypeError(f"tokenizer must be a tokenizer or processor of transformers: got {type(tokenizer).__name__}")
    if not layers(model):
        raise ValueError("the model has no packed layer: convert it first, or save it with its own means")
    for name, layer in layers(model).items():
        layer.validate(name or "layer")
    folder = Path(folder)
    library = libraries.owner(model)
    if library is not None:
        (folder / DESCRIPTION_FILE).unlink(missing_ok=True)  # of a plain module that was saved here before
        library.save(model, folder)
    else:
        _save_plain(model, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _save_plain(model: nn.Module, folder: Path) -> None:
    state = canonical_state_dict(model)
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is not a tensor but {type(tensor).__name__}: extra state cannot be saved")
        if tensor.device.type == "meta":
            raise ValueError(f"{name} is on meta: there is nothing to save")
    aliases = _aliases(state)
    tensors = {name: tensor.contiguous() for name, tensor in state.items() if name not in aliases}
    description = metadata.describe(model)
    if aliases:
        description["shared"] = aliases
    folder.mkdir(parents=True, exist_ok=True)
    with _replacing(folder / SINGLE_FILE) as path:
        save_file(tensors, path, {"format": "pt", "lowbit_format_version": metadata.FORMAT_VERSION})
    with _replacing(folder / DESCRIPTION_FILE) as path:
        path.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    card.write(model, folder)


def load(folder: str | os.PathLike[str], model: nn.Module | None = None, *, device: torch.device | str = "cpu") -> Any:
    """Load what :func:`save` (or ``save_pretrained``) wrote, without ever holding the float weights.

    Args:
        folder: the saved folder; or one in a format that docs/interoperability.md lists, or a GGUF file.
        model: the float model to load into, needed unless ``folder`` holds a transformers model. It may be
            built under ``torch.device("meta")`` as far as its buffers are saved; its layers are swapped in
            place.
        device: where the tensors go.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: naming file, tensor and field: a truncated or malformed file, tensors that are missing,
            left over or of another shape or dtype than described, values out of range, an unknown format
            version. ``model`` is then as it was.
    """
    folder = Path(folder)
    if not folder.is_dir() and not foreign.is_file(folder):
        raise FileNotFoundError(f"{folder} is not a folder{' but a file' if folder.exists() else ''}")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be the float nn.Module to load into: got {type(model).__name__}")
    if not (folder / DESCRIPTION_FILE).is_file():
        if foreign.companion_of(folder) is not None and (importer := foreign.importer_of(folder)) is not None:
            if model is not None:
                raise ValueError(f"{folder} is in a format of its own: it cannot be loaded into a "
                                 f"{type(model).__name__}. Call lowbit.load(path), which builds the model")  # fmt: skip
            return importer(folder, None, ()).to(device)
        library = libraries.library_of(folder)
        if library is None:
            raise FileNotFoundError(
                f"{folder} has neither {DESCRIPTION_FILE} nor config.json: not a saved packed model"
            )
        return library.load(folder, model, device)
    if model is None:
        raise ValueError(
            f"{folder} holds a plain module, whose code is not saved: pass the float model as "
            "lowbit.load(folder, model); it may be built under torch.device('meta')"
        )
    description = read_json(folder / DESCRIPTION_FILE)
    aliases = description.pop("shared", {})
    try:
        described = metadata.parse(description)
    except ValueError as error:
        raise ValueError(f"{folder / DESCRIPTION_FILE}: {error}") from None
    checkpoint = Checkpoint.of_folder(folder)
    with stream.unchanged_on_error(model):
        return _fill(model, folder, described, aliases, checkpoint, device)


def _fill(
    model: Any,
    folder: Path,
    described: metadata.Metadata,
    aliases: Any,
    checkpoint: Checkpoint,
    device: torch.device | str,
) -> Any:
    """Swap the described layers into a plain ``model``, and read every tensor."""
    model = metadata.apply(model, described)
    state = model.state_dict()
    _check_aliases(folder / DESCRIPTION_FILE, aliases, state, checkpoint)
    for name in state:
        if name not in checkpoint and name not in aliases:
            raise ValueError(f"{folder}: tensor {name!r} is missing: {state[name].dtype} {list(state[name].shape)}")
    for name in checkpoint:
        if name not in state:
            raise ValueError(f"{checkpoint.entries[name].file}: tensor {name!r} belongs to no module of the model")
    names = {name: name for name in state if name in checkpoint}
    stream.check_shapes(model, checkpoint, names)
    stream.fill(model, checkpoint, names, device)
    kept = model.state_dict(keep_vars=True)
    for alias, name in aliases.items():
        stream.assign(model, alias, kept[name])
    stream.check_complete(model)
    stream.validate(model, owned=True)
    metadata.train_again(model, described)
    return model


def _check_aliases(file: Path, aliases: Any, state: dict[str, Tensor], checkpoint: Checkpoint) -> None:
    if not isinstance(aliases, dict):
        raise ValueError(f"{file}: shared must be an object: got {aliases!r:.200}")
    for alias, name in aliases.items():
        known = alias in state and name in checkpoint and name in state and alias not in checkpoint
        if not known or state[alias].shape != state[name].shape:
            raise ValueError(f"{file}: shared must name tensors of the model and the file: got {alias!r}: {name!r}")
