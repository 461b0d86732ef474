"""``lowbit.load`` and ``convert_folder`` of transformers folders: tensors are streamed from the files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.checkpoint import foreign, libraries, stream
from lowbit.checkpoint.metadata import Metadata, train_again
from lowbit.checkpoint.reader import Checkpoint, read_json
from lowbit.integrations.matching import (
    check,
    check_float,
    dtype_plan,
    ignored_names,
    kept_dtype,
    match,
    names_in,
    stacks,
    swap_in,
)
from lowbit.integrations.pretrained import METHOD, LowbitConfig, mark
from lowbit.integrations.ties import retie


def skeleton(folder: Path) -> Any | None:
    """The model named in ``config.json``, parameters on meta, buffers real; ``None`` for an unknown class."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, (config.architectures or [""])[0], None)
    if cls is None:
        return None
    with stream.empty_parameters():
        model = cls._from_config(config)
    return model


def load(folder: Path, model: Any | None, device: torch.device | str) -> Any:
    """:func:`lowbit.load` for a transformers folder: skeleton, swap, check headers, then stream tensors."""
    from transformers.modeling_utils import PreTrainedModel

    file = folder / "config.json"
    if (importer := foreign.importer_of(folder)) is not None:
        if model is not None:
            raise ValueError(
                f"{folder} is in a quantized format of another library: it cannot be loaded into a "
                f"{type(model).__name__}. Call lowbit.load(folder), which builds the model itself"
            )
        return _with_generation(importer(folder, None, ()), folder).to(device)
    description = read_json(file).get("quantization_config")
    if not description:
        raise ValueError(
            f"{folder} holds a float model: {file.name} has no quantization_config with quant_method 'lowbit'. "
            "lowbit.convert_folder converts it; or load it with from_pretrained and call lowbit.convert"
        )
    if not isinstance(description, dict) or description.get("quant_method") != METHOD:
        raise ValueError(f"{file}: quantization_config must have quant_method 'lowbit': got {description!r:.200}")
    try:
        described = LowbitConfig(**description).metadata
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    assert described is not None
    checkpoint, saved = Checkpoint.of_folder(folder), read_json(file).get("architectures") or ()
    if model is None:
        model = skeleton(folder)
        if model is None:
            raise ValueError(
                f"{file}: architectures must name a class of transformers: "
                "a model with code of its own is loaded by from_pretrained"
            )
        if match(model, checkpoint).transformed:
            return type(model).from_pretrained(folder, dtype="auto").to(device)
    elif not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{folder} holds a {', '.join(saved) or 'model'} of transformers: it cannot be loaded into a "
            f"{type(model).__name__}. Call lowbit.load(folder), which builds the model itself"
        )
    with stream.unchanged_on_error(model):
        _fill(model, described, checkpoint, device, saved)
    mark(model)
    return _with_generation(model, folder).eval()


def _with_generation(model: Any, folder: Path) -> Any:
    import transformers

    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def _fill(
    model: Any, described: Metadata, checkpoint: Checkpoint, device: torch.device | str, saved: Sequence[str]
) -> None:
    swap_in(model, described, saved)
    retie(model, held=False)
    found = match(model, checkpoint)
    if found.transformed:
        raise ValueError(f"the tensors of the folder do not map one to one to {type(model).__name__}")
    check(model, checkpoint, found, saved)
    stream.fill(model, checkpoint, found.names, device)
    model.tie_weights(recompute_mapping=False)
    stream.check_complete(model)
    stream.validate(model, owned=True)
    train_again(model, described.renamed(names_in(model, described, saved)))
    _move_rest(model, device)


def _move_rest(model: nn.Module, device: torch.device | str) -> None:
    """What no file holds, such as buffers that are not saved: to ``device``, where all tensors that were read are."""
    for module in model.modules():
        for parameter in module._parameters.values():
            moved = None if parameter is None else parameter.data.to(device)
            if parameter is not None and moved is not None and moved.device != parameter.device:
                parameter.data = moved
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def load_float(folder: Path) -> Any:
    """The float model of ``folder``, all of it."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    name = (config.architectures or [""])[0]
    cls = getattr(transformers, name, None)
    if cls is None:
        raise ValueError(f"{folder / 'config.json'}: architectures must name a class of transformers: got {name!r}")
    model, entries = skeleton(folder), foreign.headers(folder)
    check_float(model, entries, match(model, entries))
    model, info = cls.from_pretrained(folder, dtype="auto", output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{folder}: tensor {missing[0]!r} of {name} is missing ({len(missing)} in all)")
    return model


def open_float(folder: Path, checkpoint: Checkpoint) -> FloatFolder | None:
    """The skeleton of the float model; ``None`` for an unknown class, or where tensors are computed from several."""
    model = skeleton(folder)
    if model is None:
        return None
    _forget_format(model.config)
    found = match(model, checkpoint)
    experts = stacks(model, checkpoint, found)
    if experts is None:
        return None
    check_float(model, checkpoint.entries, found)
    for target, source in model.all_tied_weights_keys.items():
        key = found.names.get(source) or found.names.get(target)
        if key is not None:
            found.names[target] = found.names[source] = key
    return FloatFolder(model, found.names, experts)


def _forget_format(config: Any) -> None:
    """Take away what a config, or one inside, says of a format that its folder was in: the model is not in it."""
    for name in ("quantization_config", "compression_config", "quantization", "anyprec"):
        config.__dict__.pop(name, None)
    for inner in list(config.__dict__.values()):
        if hasattr(inner, "to_dict") and hasattr(inner, "model_type"):
            _forget_format(inner)


class FloatFolder(libraries.FloatFolder):
    """A transformers model on meta, and the names of its tensors in the files."""

    model: Any

    def __init__(self, model: Any, names: dict[str, str], stacks: dict[str, libraries.Stack]) -> None:
        self.model, self.names, self.stacks = model, names, stacks
        self._kept = dtype_plan(model)
        self._dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}

    def dtype_of(self, name: str) -> torch.dtype | None:
        """The model's dtype, or float32 where transformers keeps it so."""
        return kept_dtype(self._kept, name) or self._dtypes[name]

    def leaves_out(self, key: str) -> bool:
        return re.search(ignored_names(self.model), key) is not None

    def retie(self) -> None:
        retie(self.model, held=False)

    def finish(self) -> nn.Module:
        self.model.tie_weights(recompute_mapping=False)
        stream.check_complete(self.model)
        mark(self.model)
        return self.model.eval()  # type: ignore[no-any-return]
