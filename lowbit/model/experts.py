"""Modules that hold the weights of many experts as one Parameter: which they are, and their forward once packed.

A packed stack takes the place of its Parameter, under the same name. The module that computes with it gets a subclass
of its class, whose forward calls the stack. Most models of transformers share one interface for such modules
(``transformers.integrations.moe``); :func:`register_experts` adds others.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowbit.model import accelerate
from lowbit.model.sources import type_name
from lowbit.nn.experts import ExpertsLayer, FloatExperts, as_stack, experts_linear


@dataclass(frozen=True)
class ExpertStack:
    """How a Parameter holds the weights ``[N, K]`` of E experts: as ``[E, N, K]``, or as ``[E*N, K]``.

    Attributes:
        transposed: each expert is held as ``[K, N]``.
        num_experts: E, of a Parameter with two dimensions.
        by_token: the rows that ``project`` is given are all those of the first token, then those of the second: so
            calibration knows which are of padding. Where it is ``False``, padding counts.
    """

    transposed: bool = False
    num_experts: int | None = None
    by_token: bool = True


class Project(Protocol):
    """``y[i] = F.linear(x[i // r], W[ids[i]], bias[ids[i]])`` with ``r = len(ids) // len(x)``; 0 where an id is E or
    more. W is the stack ``name``, packed or float; x ``[T, K]``, ids ``[S]``, bias ``[E, N]``, y ``[S, N]``."""

    def __call__(self, name: str, x: Tensor, ids: Tensor, bias: Tensor | None = None) -> Tensor: ...


Stacks = Callable[[Any], Mapping[str, ExpertStack]]


@dataclass(frozen=True)
class _Entry:
    stacks: Stacks
    forward: Callable[..., Any]


# by type, or by qualified name for the types of libraries that need not be imported
_entries: dict[type[nn.Module] | str, _Entry] = {}


def register_experts(module_type: type[nn.Module], stacks: Stacks, forward: Callable[..., Any]) -> None:
    """Teach :func:`lowbit.convert` to pack the experts of modules of ``module_type``.

    Subclasses that have its forward are served too.

    Args:
        module_type: the class whose forward computes with the weights.
        stacks: module -> the names of its Parameters that are stacks, relative to it (``"w1"``, ``"mlp.w1"``), each
            with its :class:`ExpertStack`. It must not read them, because it is also asked where they are packed.
        forward: the forward of a module with packed stacks: ``forward(module, project, *args, **kwargs)``, where
            ``project(name, x, ids, bias=None)`` gives ``y[i] = F.linear(x[i // r], W[ids[i]], bias[ids[i]])`` with
            ``r = len(ids) // len(x)``, and 0 where an id is E or more.

    A second registration for the same type replaces the first.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"module_type must be a subclass of nn.Module: got {module_type!r}")
    for name, value in (("stacks", stacks), ("forward", forward)):
        if not callable(value):
            raise TypeError(f"{name} must be a function: got {value!r:.200}")
    _entries[module_type] = _Entry(stacks, forward)


def register_experts_by_name(name: str, stacks: Stacks, forward: Callable[..., Any]) -> None:
    """:func:`register_experts` for a type that is not imported: ``name`` is its ``module.qualname``."""
    _entries[name] = _Entry(stacks, forward)


# ------------------------------------------------------------------------------------- transformers' interface

_SAYS = ("num_experts", "has_gate", "has_bias", "is_transposed", "config")


def is_interface(module: nn.Module) -> bool:
    """Whether transformers' interface for experts serves ``module``."""
    return all(hasattr(module, name) for name in _SAYS) and _is_served(_plain(type(module)))


def _is_served(cls: Any) -> bool:
    # the forward that transformers puts around a class's own; a subclass may have replaced it
    code = getattr(cls.forward, "__code__", None)
    return hasattr(cls, "_apply_gate") and "original_forward" in getattr(code, "co_freevars", ())


def _interface_stacks(module: Any) -> dict[str, ExpertStack]:
    how = ExpertStack(transposed=bool(module.is_transposed))
    return {"gate_up_proj" if module.has_gate else "up_proj": how, "down_proj": how}


def experts_forward(
    module: Any,
    project: Project,
    hidden_states: Tensor,
    top_k_index: Tensor | None = None,
    top_k_weights: Tensor | None = None,
    *,
    router_indices: Tensor | None = None,
    routing_weights: Tensor | None = None,
) -> Tensor:
    """What transformers' interface computes: ``[T, H]`` to ``[T, H]``.

    ``y[t] = sum_j top_k_weights[t, j] * expert[top_k_index[t, j]](hidden_states[t])``: the sum is in a fixed order. As
    in transformers' own, an index of ``num_experts`` or more is another process's expert, and adds nothing. Some
    classes call the last two arguments ``router_indices`` and ``routing_weights``.
    """
    index = router_indices if top_k_index is None else top_k_index
    scores = routing_weights if top_k_weights is None else top_k_weights
    assert index is not None and scores is not None
    ids, weights = index.reshape(-1), scores.reshape(-1)
    up = "gate_up_proj" if module.has_gate else "up_proj"
    x = project(up, hidden_states, ids, getattr(module, f"{up}_bias") if module.has_bias else None)
    x = _gated(module, x) if module.has_gate else module.act_fn(x)
    y = project("down_proj", x, ids, module.down_proj_bias if module.has_bias else None)
    if getattr(module, "has_post_expert_norm", False):
        y = module.post_expert_norm(y)
    if getattr(module, "_is_expert_parallel", False):
        weights = weights.masked_fill(ids >= module.num_experts, 0.0)
    y = _times(y, weights.unsqueeze(-1)).view(*index.shape, -1).sum(1)
    return y.to(hidden_states.dtype)


def _gated(module: Any, x: Tensor) -> Tensor:
    """``module._apply_gate(x)``, without another tensor for the product where that is transformers' own."""
    own = type(module)._apply_gate
    if (own.__module__, own.__name__) != ("transformers.integrations.moe", "_default_apply_gate"):
        gated: Tensor = module._apply_gate(x)
        return gated
    gate, up = x.chunk(2, dim=-1)
    return _times(module.act_fn(gate), up)


def _times(y: Tensor, factor: Tensor) -> Tensor:
    """``y * factor``, in the memory of y where no gradient needs it."""
    in_place = not torch.is_grad_enabled() and torch.promote_types(y.dtype, factor.dtype) == y.dtype
    return y.mul_(factor) if in_place else y * factor


_INTERFACE = _Entry(_interface_stacks, experts_forward)


# ---------------------------------------------------------------------------------------------- which modules


def _entry(module: nn.Module) -> _Entry | None:
    return _registered(_plain(type(module))) or (_INTERFACE if is_interface(module) else None)


def _registered(cls: type) -> _Entry | None:
    for base in cls.__mro__[:-1]:
        found = _entries.get(base) or _entries.get(type_name(base))
        if found is not None and cls.forward is base.forward:  # type: ignore[attr-defined]
            return found
    return None


def _described(module: nn.Module) -> Mapping[str, ExpertStack]:
    """The stacks of ``module`` by name, packed or not; none of a module that is not known."""
    entry = _entry(module)
    if entry is None:
        return {}
    try:
        found = entry.stacks(module)
    except Exception as error:
        raise ValueError(f"{_what(module)} raised {type(error).__name__}: {error}") from error
    if not isinstance(found, Mapping) or not all(isinstance(how, ExpertStack) for how in found.values()):
        raise ValueError(f"{_what(module)} must be a mapping of names to lowbit.ExpertStack: got {found!r:.200}")
    return found


def _what(module: nn.Module) -> str:
    return f"the stacks of {_plain(type(module)).__name__}, as registered with lowbit.register_experts,"


def _place(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that has the stack ``path`` of ``module``, and what it calls it."""
    parent, _, attribute = path.rpartition(".")
    return module.get_submodule(parent), attribute


def stacks(module: nn.Module) -> Iterator[tuple[str, FloatExperts]]:
    """The stacks of weights that are Parameters of ``module``, by name, each as a module of its own.

    Raises ``ValueError`` for a Parameter that is not as registered.
    """
    for path, how in _described(module).items():
        try:
            holder, attribute = _place(module, path)
        except AttributeError as error:
            raise ValueError(f"{_what(module)} name {path!r}, which it does not have: {error}") from None
        weight = holder._parameters.get(attribute)
        if weight is None:
            continue
        count = how.num_experts
        if not is_lazy(weight):
            flat = weight.dim() == 2 and count is not None and count > 0 and weight.shape[0] % count == 0
            if not flat and (weight.dim() != 3 or (count is not None and count != weight.shape[0])):
                raise ValueError(
                    f"{_what(module)} must be [E, N, K], or [E*N, K] with num_experts=E: "
                    f"{path!r} has shape {list(weight.shape)}, and num_experts={count}"
                )
        stack = FloatExperts(
            weight, transposed=how.transposed, num_experts=count, owner=holder, attribute=attribute, caller=module
        )
        stack.by_token = how.by_token
        yield path, stack.train(module.training)


def named_stacks(name: str, module: nn.Module) -> Iterator[tuple[str, FloatExperts]]:
    """:func:`stacks` of the module ``name``, under their names in the model; errors say where."""
    try:
        for path, stack in stacks(module):
            yield f"{name}.{path}".lstrip("."), stack
    except ValueError as error:
        raise ValueError(f"{name or 'the model'}: {error}") from error


def is_same(first: nn.Module, second: nn.Module) -> bool:
    """Whether two float stacks stand for one Parameter of one module."""
    if not isinstance(first, FloatExperts) or not isinstance(second, FloatExperts):
        return False
    owner = first.__dict__["owner"]
    return owner is not None and owner is second.__dict__["owner"] and first.attribute == second.attribute


def counts(module: nn.Module) -> set[int]:
    """How many experts the stacks of ``module`` have, packed or float."""
    found = {stack.num_experts for _, stack in stacks(module)}
    for path in _described(module):
        holder, attribute = _place(module, path)
        stack = holder._modules.get(attribute)
        if isinstance(stack, (ExpertsLayer, FloatExperts)):
            found.add(stack.num_experts)
    return found


def float_name(name: str, kind: str) -> str:
    """The name of the float weight that the packed layer ``name`` of this kind stands for."""
    return name if kind == "experts" else f"{name}.weight"


def named_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of ``model`` under each of its names, and every float stack under that of its Parameter."""
    for name, module in model.named_modules(remove_duplicate=False):
        yield name, module
        yield from named_stacks(name, module)


def reason_against(stack: FloatExperts) -> str | None:
    """Why a stack has to stay, though its module is known."""
    caller = stack.__dict__["caller"]
    if "forward" in caller.__dict__ and not accelerate.is_hooked(caller):
        return "its module has a forward of its own"
    return None


# ------------------------------------------------------------------------------------------ putting stacks in


def expose(stack: FloatExperts) -> None:
    """Let the module of a float stack call it, so that hooks see its inputs; :func:`put` undoes it."""
    owner, attribute = stack.__dict__["owner"], stack.attribute
    owner._modules[attribute] = stack
    owner._parameters.pop(attribute, None)
    _choose_forward(stack.__dict__["caller"])


def put(model: nn.Module, name: str, stack: nn.Module) -> None:
    """Put a packed stack, or the float one again, at ``name``, where the other was."""
    path, _, attribute = name.rpartition(".")
    holder, found = model.get_submodule(path), _caller_of(model, name)
    if isinstance(stack, FloatExperts) and found is not None:
        setattr(holder, attribute, _parameter(stack, found[1]))
    else:
        holder._modules[attribute] = stack  # first: an interrupt leaves no module without its weights
        holder._parameters.pop(attribute, None)
    if found is not None:
        _choose_forward(found[0])


def _caller_of(model: nn.Module, name: str) -> tuple[nn.Module, ExpertStack] | None:
    """The module that computes with the stack ``name``, and how it holds it; the innermost one that says so."""
    parts = name.split(".")
    for i in reversed(range(len(parts))):
        module = model.get_submodule(".".join(parts[:i]))
        how = _described(module).get(".".join(parts[i:]))
        if how is not None:
            return module, how
    return None


def _parameter(stack: FloatExperts, how: ExpertStack) -> nn.Parameter:
    """The weights of a float stack as a module holds them: the very Parameter where it is its own."""
    if stack.__dict__["owner"] is not None or (not how.transposed and how.num_experts is None):
        return stack.weight
    made: dict[ExpertStack, nn.Parameter] = stack.weight.__dict__.setdefault("lowbit_held", {})  # others may share it
    if how not in made:
        weight = stack.weights.detach()
        weight = weight.transpose(1, 2) if how.transposed else weight
        weight = weight.contiguous() if how.num_experts is None else weight.flatten(0, 1)
        made[how] = nn.Parameter(weight, requires_grad=stack.weight.requires_grad)
    return made[how]


def _choose_forward(module: Any) -> None:
    """Give ``module`` the forward that calls stacks where it has one that is a module, else its own."""
    entry, plain = _entry(module), _plain(type(module))
    places = [_place(module, path) for path in _described(module)]
    called = any(attribute in holder._modules for holder, attribute in places)
    cls: Any = _calling(plain, entry) if called and entry is not None else plain
    if type(module) is not cls:
        hooked = accelerate.is_hooked(module)
        module.__class__ = cls
        if hooked:
            module._old_forward = types.MethodType(cls.forward, module)


def _plain(cls: type) -> type:
    """The class that a module had before its stacks were packed."""
    plain: type = cls.__dict__.get("_lowbit_plain", cls)
    return plain


@cache
def _calling(plain: Any, entry: _Entry) -> Any:
    """A subclass of ``plain`` that calls its stacks: known by the same name, and pickled as ``plain``."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return entry.forward(self, partial(_project, self), *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        made = object.__reduce_ex__(self, max(2, protocol))
        return (_new, (plain,), *made[2:])

    forward.__doc__ = plain.forward.__doc__
    return type(plain.__name__, (plain,), {
        "__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__,
        "_lowbit_plain": plain, "forward": forward, "__reduce_ex__": reduce,
    })  # fmt: skip


def _new(plain: Any) -> Any:
    """An empty module with packed stacks, for pickle."""
    entry = _registered(plain) or (_INTERFACE if _is_served(plain) else None)
    if entry is None:
        raise ValueError(f"{type_name(plain)} has packed experts: call lowbit.register_experts for it first")
    cls = _calling(plain, entry)
    return cls.__new__(cls)


def _project(module: nn.Module, name: str, x: Tensor, ids: Tensor, bias: Tensor | None = None) -> Tensor:
    holder, attribute = _place(module, name)
    weight = getattr(holder, attribute)
    if isinstance(weight, nn.Module):
        y: Tensor = weight(x, ids, bias)
        return y
    how = _described(module)[name]
    count = weight.shape[0] if how.num_experts is None else how.num_experts
    return experts_linear(x, ids, as_stack(weight, count, how.transposed), bias)
