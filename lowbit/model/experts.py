"""Modules that hold the weights of many experts as 3-D Parameters: which they are, and how they call packed ones.

transformers has one interface for most of them (``transformers.integrations.moe``): such a module says by attributes
how its weights lie, and its config names the function that is its forward. A packed stack takes the place of its
Parameter, under the same name, and the module gets a config of its own that names lowbit's function.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lowbit.nn.experts import FloatExperts, experts_linear

IMPLEMENTATION = "lowbit"
_SAYS = ("num_experts", "has_gate", "has_bias", "is_transposed", "is_concatenated", "config")
_CONFIG = "lowbit_experts_config"  # the config that a module had before


def is_interface(module: nn.Module) -> bool:
    """Whether transformers' interface for experts serves ``module``."""
    return all(hasattr(module, name) for name in _SAYS) and hasattr(type(module), "_apply_gate")


def stacks(module: nn.Module) -> Iterator[FloatExperts]:
    """The stacks of weights that are Parameters of ``module``, each as a module of its own."""
    if not is_interface(module):
        return
    for attribute in names(module):
        weight = module._parameters.get(attribute)
        if weight is not None and weight.dim() == 3:
            stack = FloatExperts(weight, transposed=bool(module.is_transposed), owner=module, attribute=attribute)
            yield stack.train(module.training)


def names(module: Any) -> tuple[str, str]:
    """The names of the weights of a module that the interface serves."""
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def float_name(name: str, kind: str) -> str:
    """The name of the float weight that the packed layer ``name`` of this kind stands for."""
    return name if kind == "experts" else f"{name}.weight"


def named_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of ``model`` under each of its names, and every float stack under that of its Parameter."""
    for name, module in model.named_modules(remove_duplicate=False):
        yield name, module
        for stack in stacks(module):
            yield f"{name}.{stack.attribute}".lstrip("."), stack


def reason_against(module: nn.Module) -> str | None:
    """Why the stacks of ``module`` have to stay, though they are 3-D weights that the interface serves."""
    if "forward" in module.__dict__:
        return "its module has a forward of its own"
    return None


def expose(stack: FloatExperts) -> None:
    """Let the owner of a float stack call it as a module, so that hooks see its inputs; :func:`put` undoes it."""
    owner, attribute = stack.__dict__["owner"], stack.attribute
    owner._modules[attribute] = stack
    owner._parameters.pop(attribute, None)
    _choose_forward(owner)


def put(owner: nn.Module, attribute: str, stack: nn.Module) -> None:
    """Put a packed stack, or the float one again, into ``owner`` where the other was."""
    if isinstance(stack, FloatExperts) and is_interface(owner):
        weight = stack.weight
        if stack.transposed != bool(owner.is_transposed):
            weight = nn.Parameter(weight.detach().transpose(1, 2).contiguous(), requires_grad=weight.requires_grad)
        setattr(owner, attribute, weight)
    else:
        owner._modules[attribute] = stack  # first: an interrupt leaves no module without its weights
        owner._parameters.pop(attribute, None)
    if is_interface(owner):
        _choose_forward(owner)


def _choose_forward(owner: Any) -> None:
    called = any(name in owner._modules for name in names(owner))
    if called and _CONFIG not in owner.__dict__:
        owner.__dict__[_CONFIG] = owner.config
        # a copy for this module alone: others with this config may hold float experts, and run as they did
        owner.config = copy.copy(owner.config)
        owner.config._experts_implementation_internal = IMPLEMENTATION
    elif not called and _CONFIG in owner.__dict__:
        owner.config = owner.__dict__.pop(_CONFIG)


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *_: Any, **__: Any
) -> Tensor:
    """The forward of a module whose stacks are packed: ``[T, H]`` to ``[T, H]``.

    ``y[t] = sum_j top_k_weights[t, j] * expert[top_k_index[t, j]](hidden_states[t])``: the sum is in a fixed order. As
    in transformers' own, an index of ``num_experts`` or more is another process's expert, and adds nothing.
    """
    tokens, top_k = top_k_index.shape
    ids, weights = top_k_index.reshape(-1), top_k_weights.reshape(-1)
    up, down = names(self)
    x = _project(self, up, hidden_states, ids)
    x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
    y = _project(self, down, x, ids)
    if getattr(self, "has_post_expert_norm", False):
        y = self.post_expert_norm(y)
    if getattr(self, "_is_expert_parallel", False):
        weights = weights.masked_fill(ids >= self.num_experts, 0.0)
    y = (y * weights.unsqueeze(-1)).view(tokens, top_k, -1).sum(1)
    return y.to(hidden_states.dtype)


def _project(self: Any, name: str, x: Tensor, ids: Tensor) -> Tensor:
    weight, bias = getattr(self, name), getattr(self, f"{name}_bias") if self.has_bias else None
    if isinstance(weight, nn.Module):
        y: Tensor = weight(x, ids, bias)
        return y
    return experts_linear(x, ids, weight.transpose(1, 2) if self.is_transposed else weight, bias)
