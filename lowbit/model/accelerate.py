"""Hooks of Hugging Face accelerate: what stands around a module's forward, and where its weights are meanwhile.

accelerate wraps ``forward`` of a module and may hold its tensors elsewhere (offload): the module then has them on meta.
It is not imported unless a module has such a hook.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lowbit.nn import layer


def is_hooked(module: nn.Module) -> bool:
    """Whether ``forward`` is only accelerate's, around the class's own."""
    own = module.__dict__.get("_old_forward")
    return hasattr(module, "_hf_hook") and getattr(own, "__func__", None) is type(module).forward


def _parts(hook: Any) -> Iterator[Any]:
    """The hooks that a hook is made of."""
    for part in getattr(hook, "hooks", None) or (hook,):
        if part is hook:
            yield part
        else:
            yield from _parts(part)


def held_tensor(module: nn.Module, name: str, tensor: Tensor | None) -> Tensor | None:
    """A tensor of ``module``, from where accelerate keeps it while it is on meta."""
    if tensor is None or not tensor.is_meta:
        return tensor
    for hook in _parts(module.__dict__.get("_hf_hook")):
        if getattr(hook, "weights_map", None) is not None:
            held: Tensor = hook.weights_map[name]
            return held
    return tensor


def canonical_state_dict(model: nn.Module) -> dict[str, Any]:
    """:func:`lowbit.nn.layer.canonical_state_dict`, with what accelerate keeps elsewhere, too."""
    state = layer.canonical_state_dict(model)
    brought: dict[int, Tensor] = {}  # tied modules give one tensor
    for prefix, module in model.named_modules(remove_duplicate=False):
        if not hasattr(module, "_hf_hook"):
            continue
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            key = f"{prefix}.{name}" if prefix else name
            held = held_tensor(module, name, tensor) if key in state else tensor
            if tensor is None or held is None or held is tensor:
                continue
            if isinstance(module, layer.Layer):
                held = module.canonical_tensor(name, held)
            state[key] = brought.setdefault(id(tensor), held)
    return state


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """Give ``new`` the hook of ``old``; what was offloaded stays so.

    A stack of experts has no hook of its own: where its owner's offloads, it gets that one.
    """
    owner = old.__dict__.get("owner")
    if owner is not None and any(getattr(part, "offload", False) for part in _parts(owner.__dict__.get("_hf_hook"))):
        old = owner
    elif not is_hooked(old):
        return
    from accelerate.hooks import add_hook_to_module

    hook = copy.copy(old._hf_hook)
    if getattr(hook, "hooks", None):
        hook.hooks = tuple(copy.copy(part) for part in _parts(hook))  # type: ignore[union-attr]
    for part in _parts(hook):
        if getattr(part, "offload", False):
            # the packed form is in buffers, and takes the place of the weight in the hook's own store
            part.weights_map, part.offload_buffers, part.tied_params_map = None, True, None
            part.tied_params_names = set()
    add_hook_to_module(new, hook)
