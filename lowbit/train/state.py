"""What a checkpoint of a training holds beside the tensors in the files of the model: masters in float32, which those
files have rounded, the specs of all layers and the names of what is trained, which have to be the same again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lowbit.nn.layer import layers
from lowbit.train.fake_quant import FakeQuant


def training_state(model: nn.Module) -> dict[str, Any]:
    """Of tensors, texts, numbers and what holds them: ``torch.load(weights_only=True)`` reads it."""
    masters = {f"{name}.{part}": layer.get_parameter(part).detach()
               for name, layer in layers(model).items() for part in layer.trained()}  # fmt: skip
    return {"trained": _trained(model), "layers": _described(model), "masters": masters}


def check_training_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Raise ``ValueError``, listing every difference by name, unless the model is prepared as that of ``state`` was."""
    problems = []
    theirs, mine = set(state["trained"]), set(_trained(model))
    problems += [f"{name} was trained: here it is not" for name in sorted(theirs - mine)]
    problems += [f"{name} was not trained: here it is" for name in sorted(mine - theirs)]
    now = _described(model)
    for name in sorted({*now, *state["layers"]}):
        before, after = state["layers"].get(name, {}), now.get(name, {})
        problems += [f"{name} had {field}={before.get(field)}: got {field}={after.get(field)}"
                     for field in {**before, **after} if before.get(field) != after.get(field)]  # fmt: skip
    if problems:
        raise ValueError("the checkpoint is of another training:\n  " + "\n  ".join(problems))


def load_masters(model: nn.Module, state: dict[str, Any]) -> None:
    with torch.no_grad():
        for name, master in state["masters"].items():
            model.get_parameter(name).copy_(master)


def _trained(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _described(model: nn.Module) -> dict[str, dict[str, Any]]:
    fake = {name: m.description() for name, m in model.named_modules() if isinstance(m, FakeQuant)}
    return fake | {name: layer.format.to_dict() for name, layer in layers(model).items()}
