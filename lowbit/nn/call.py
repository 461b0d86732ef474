"""Calls of ops, past Python code that they do not need: of a small layer that code would take as long as the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad as _forward_ad

from lowbit.backends.operands import Operands
from lowbit.backends.transforms import below_autograd

_is_compiling, _is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
_is_inference = torch.is_inference_mode_enabled
# Not public: a torch without one of them makes the plain call.
_in_transform: Any = getattr(torch._C, "_are_functorch_transforms_active", None)
_below_autograd = below_autograd
_CAN_SKIP = _in_transform is not None and hasattr(_forward_ad, "_current_level")


# Its arguments are written out one by one, and what is not needed is not looked at. The guard is an object of C++ that
# only its expression holds: whatever ends the call, even an exception from a signal, it ends too and restores what was.
_CALL = """
def make(op, inner):
    def call(layer, x, t, bias, a):
        if not _CAN_SKIP or _is_compiling():
            layer._is_outdated()  # while a graph is made, no error can be caught
            n = layer._numbers
            return op(x, {arguments})
        n = layer._numbers
        autograd = (
            _is_inference() or _in_transform() or _forward_ad._current_level >= 0
            or _is_grad_enabled() and ({wanted})
        )
        return (None if autograd else _below_autograd(), inner(x, {arguments}))[1]
    return call
"""


def traced(layer: Any, x: Any) -> Any:
    """What ``torch.fx`` makes of a call: the layer as a whole, as of the layers of torch. A layer that is traced by
    itself is a call of its op.

    Raises ``RuntimeError`` where such a layer is in training: its op is given tensors that are made in each call.
    """
    path = x.tracer.path_of_module(layer)
    if path:
        return x.tracer.create_proxy("call_module", path, (x,), {})
    arguments = layer.arguments(x)
    held = {id(tensor) for tensor in (*layer.parameters(), *layer.buffers())}
    if any(isinstance(argument, Tensor) and id(argument) not in held for argument in arguments):
        raise RuntimeError(
            f"torch.fx cannot trace {layer.title()} by itself while its tensors are trained: "
            "trace a module that holds it, or export it with torch.export"
        )
    y, scale = x.tracer.create_proxy("call_function", layer._op, arguments, {}), getattr(layer, "output_scale", 1.0)
    return y if scale == 1.0 else y * scale


def call_of(op: torch._ops.OpOverload, operands: type[Operands], kind: str) -> Callable[..., Tensor]:
    """A function that calls ``op`` with the arguments of a layer, past the Python code of its gradient where no
    derivative is wanted.

    For a linear: ``(layer, x, tensors by name, bias, numbers of the activation) -> y``; for an embedding: ``(layer,
    ids, tensors by name, None, other numbers) -> y``.
    """
    tensors = operands.tensor_names
    arguments = [f"t[{name!r}]" for name in tensors]
    arguments += [f"n[{i}]" for i in range(len(operands.types) - len(tensors))]
    wanted = [f"t[{name!r}]" for name in operands.differentiable]
    if kind == "linear":
        arguments += ["bias"]
        wanted += ["bias"]
        if operands.activation is not None:
            own = operands.activation.tensor_names
            arguments += [f"t[{name!r}]" for name in own]
            arguments += [f"a[{i}]" for i in range(len(operands.activation.types) - len(own))]
    else:
        arguments += ["*a"]
    conditions = ["x.requires_grad", *(f"({t} is not None and {t}.requires_grad)" for t in wanted)]
    made: dict[str, Any] = {}
    text = _CALL.format(arguments=", ".join(arguments), wanted=" or ".join(conditions))
    exec(text, globals(), made)
    called: Callable[..., Tensor] = made["make"](op, op._op)
    return called
