"""Filling a skeleton from a checkpoint, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowbit.checkpoint.reader import Checkpoint
from lowbit.nn.layer import Layer, layers

_PROGRESS_FROM = 1 << 28  # bytes; less is read in about a second


@contextmanager
def empty_parameters() -> Iterator[None]:
    """Modules made inside have their parameters on meta and their buffers real.

    Buffers are real because those that are not saved (rotary frequencies, position ids) are only known to the
    constructor that computes them.
    """
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        # one that is on meta already may be tied: it must stay the same object
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    try:
        nn.Module.register_parameter = register_empty  # type: ignore[method-assign,assignment]
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """After an exception inside, ``model`` has the modules, tensors and attributes that it had before."""
    parts = ("_modules", "_parameters", "_buffers")
    before = [(m, dict(m.__dict__), [dict(m.__dict__[part]) for part in parts]) for m in model.modules()]
    try:
        yield
    except BaseException:
        for module, attributes, contents in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for part, content in zip(parts, contents, strict=True):
                attributes[part].clear()
                attributes[part].update(content)
        raise


def assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make ``tensor`` the parameter or buffer ``name``; a Parameter is used as it is."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
        return
    old = module._parameters[leaf]
    if not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=old is not None and old.requires_grad)
    module._parameters[leaf] = tensor


def check_shapes(model: nn.Module, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
    """Compare the files' headers with what the model expects, before anything is read.

    ``names``: name in the model's state_dict -> name in the checkpoint. Raises ``ValueError`` naming file,
    tensor and field. Packed tensors have exactly one dtype; float tensors may be stored in any.
    """
    state = model.state_dict()
    exact = {
        f"{prefix}.{tensor}" if prefix else tensor: dtype
        for prefix, layer in layers(model, duplicates=True).items()
        for tensor, (_, dtype) in layer.format.tensors().items()
    }
    for name, key in names.items():
        checkpoint.check(key, tuple(state[name].shape), exact.get(name))
        found, expected = checkpoint.entries[key].dtype, state[name].dtype
        if found.is_floating_point != expected.is_floating_point:
            file = checkpoint.entries[key].file
            raise ValueError(f"{file}: tensor {key!r}: dtype must be like {expected}: got {found}")


def fill(
    model: nn.Module,
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    device: torch.device | str = "cpu",
    dtype_of: Callable[[str], torch.dtype | None] = lambda name: None,
) -> None:
    """Read every tensor of ``names`` (model name -> checkpoint name) into the model, on ``device``.

    ``dtype_of(name)`` may ask for another dtype than the stored one.
    """
    total = sum(checkpoint.entries[key].nbytes for key in names.values())
    quiet = None if total > _PROGRESS_FROM else True  # None: only on a terminal
    for name, key in tqdm(names.items(), desc="lowbit load", unit="tensor", disable=quiet):
        assign(model, name, checkpoint.read(key).to(device, dtype_of(name)))


def validate(model: nn.Module, *, owned: bool = False) -> None:
    """Check the values of every packed layer, and make it ready for its device (``owned``: :meth:`Layer.prepare`).

    Raises ``ValueError`` naming layer and tensor.
    """
    seen: set[Layer] = set()
    for name, layer in layers(model).items():
        if layer not in seen:
            layer.validate(name or "layer")
            layer.prepare(owned=owned)
        seen.add(layer)


def check_complete(model: nn.Module) -> None:
    """Raise ``ValueError`` naming a tensor that no file provided."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type == "meta":
            raise ValueError(
                f"{name} is on meta and the saved model does not hold it: build the model with real buffers"
            )
