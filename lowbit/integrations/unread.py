"""What ``from_pretrained`` left unread inside linear layers and embeddings: the folder holds another weight.

transformers only logs it, and starts such a weight at random or uses codes without their scales.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lowbit.core.foreign import sign_of
from lowbit.nn.layer import Layer

ATTRIBUTE = "lowbit_unread"


def install(cls: Any) -> None:
    """Let every ``PreTrainedModel`` remember, as :data:`ATTRIBUTE`, what its loading left unread."""
    original = cls._adjust_missing_and_unexpected_keys

    def adjust_missing_and_unexpected_keys(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        # up to 5.0 the keys are arguments and results; then they are in one object
        keys = result[1] if isinstance(result, tuple) else [*args, *kwargs.values()][0].unexpected_keys
        if found := _inside_layers(self, keys):
            self.__dict__[ATTRIBUTE] = found
        return result

    cls._adjust_missing_and_unexpected_keys = adjust_missing_and_unexpected_keys


def _inside_layers(model: Any, keys: Iterable[str]) -> list[str]:
    prefix = f"{model.base_model_prefix}."
    holders = {
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if not isinstance(module, Layer) and _is_matrix(module._parameters.get("weight"))
    }
    found = []
    for key in sorted(keys):
        for name in (key, key.removeprefix(prefix), prefix + key):
            parts = name.split(".")
            owner = next((o for n in range(1, len(parts)) if (o := ".".join(parts[:n])) in holders), None)
            if owner is not None and name not in (f"{owner}.weight", f"{owner}.bias"):
                found.append(key)
                break
    return found


def _is_matrix(weight: Tensor | None) -> bool:
    return weight is not None and weight.dim() == 2


def problem(model: nn.Module) -> str | None:
    """What to say of ``model``, whose loading left tensors of its layers unread."""
    keys = model.__dict__.get(ATTRIBUTE)
    if not keys:
        return None
    format = next((sign for key in keys if (sign := sign_of(key.rpartition(".")[2]))), "")
    return (
        f"transformers left {len(keys)} tensors of the folder unread that belong to layers, such as {keys[0]!r}"
        f"{f' ({format} has it)' if format else ''}: the weights of these layers may be random, or codes without their "
        f"scales. Load the float model; if the weights are right, del model.{ATTRIBUTE}"
    )
