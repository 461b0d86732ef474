"""An optimizer that leaves out what is trained stops at its first step: one that was made before ``prepare`` would
train Parameters that are no longer in the model, or weights whose scales never move.

What ``prepare`` and ``trainable`` add is noted beside the Parameters that it belongs to. A step of an optimizer that
holds one of these, while what was added gets gradients and no optimizer holds it, is an error. torch's own hook of all
optimizers asks, from the first call of either on.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

Added = list[tuple[str, "ref[nn.Parameter]"]]

_belongs_to = WeakTensorKeyDictionary()  # Parameter -> what was added to it
_known: WeakKeyDictionary[Optimizer, tuple[tuple[int, int], list[Added], set[int]]] = WeakKeyDictionary()
_calls = 0


def watch(held: Iterable[nn.Parameter], added: Mapping[str, nn.Parameter]) -> None:
    """From now on an optimizer that has one of ``held`` has to have all of ``added``, by name, or another has to."""
    global _calls
    if not _calls:
        register_optimizer_step_pre_hook(_check)
    _calls += 1
    noted = [(name, ref(parameter)) for name, parameter in added.items()]
    for parameter in held:
        _belongs_to.setdefault(parameter, []).append(noted)


def _check(optimizer: Optimizer, arguments: Any, keywords: Any) -> None:
    if torch.compiler.is_compiling():
        return
    asked, own = _of(optimizer)
    missing = {}
    for name, kept in (each for noted in asked for each in noted):
        parameter = kept()
        if parameter is None or id(parameter) in own:
            continue
        if parameter.requires_grad and parameter.grad is not None:  # else it is frozen, or not in use
            missing[name] = parameter
    if not missing:
        return
    own |= _held_by_any()  # two optimizers may share the work
    names = [name for name, parameter in missing.items() if id(parameter) not in own]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise RuntimeError(
            f"{type(optimizer).__name__}.step() trains the model, but no optimizer has {', '.join(names[:3])}{more}: "
            "was it made before train.prepare or train.trainable? Make it afterwards; requires_grad_(False) freezes "
            "what is not to be trained"
        )


def _of(optimizer: Optimizer) -> tuple[list[Added], set[int]]:
    """What belongs to the Parameters of an optimizer, and which ones it is known not to miss, by id."""
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = _calls, len(held)
    known = _known.get(optimizer)
    if known is None or known[0] != state:
        asked = {id(noted): noted for parameter in held for noted in _belongs_to.get(parameter, ())}
        known = _known[optimizer] = state, list(asked.values()), {id(parameter) for parameter in held}
    return known[1], known[2]


def _held_by_any() -> set[int]:
    """The Parameters of all optimizers there are, by id."""
    optimizers = [each for each in gc.get_objects() if issubclass(type(each), Optimizer)]
    groups = [group for each in optimizers for group in each.__dict__.get("param_groups", ())]
    return {id(parameter) for group in groups for parameter in group["params"]}
