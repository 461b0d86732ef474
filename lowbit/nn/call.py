"""Calls of ops, past Python code that they do not need: of a small layer that code would take as long as the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowbit.backends.operands import Operands


def _run(op: torch._ops.OpOverload, *args: Any) -> Tensor:
    """``op(*args)``, past the Python code of its gradient where none is wanted; not in inference mode."""
    if _is_grad_enabled() and _any_requires_grad(*args):
        return op(*args)  # type: ignore[no-any-return]
    _exclude(_AUTOGRAD, True)
    try:
        return op._op(*args)  # type: ignore[no-any-return]
    finally:
        _exclude(_AUTOGRAD, False)


_is_compiling, _is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
# Not public: a torch without one of them makes the plain call.
_AUTOGRAD = getattr(torch._C.DispatchKey, "AutogradFunctionality", None)
_is_excluded: Any = getattr(torch._C, "_dispatch_tls_is_dispatch_key_excluded", None)
_exclude: Any = getattr(torch._C, "_dispatch_tls_set_dispatch_key_excluded", None)
_any_requires_grad: Any = getattr(torch._C, "_any_requires_grad", None)
_CAN_SKIP = None not in (_AUTOGRAD, _is_excluded, _exclude, _any_requires_grad)


# Its arguments are written out one by one, and what is not needed is not looked at.
_CALL = """
def make(op, inner):
    def call(layer, x, t, bias, a):
        if not _CAN_SKIP or _is_compiling():
            layer._is_outdated()  # while a graph is made, no error can be caught
            n = layer._numbers
            return op(x, {arguments})
        n = layer._numbers
        if _is_excluded(_AUTOGRAD):
            return inner(x, {arguments})
        return _run(op, x, {arguments})
    return call
"""


def call_of(op: torch._ops.OpOverload, operands: type[Operands], kind: str) -> Callable[..., Tensor]:
    """A function that calls ``op`` with the arguments of a layer, past the Python code of its gradient where none is
    wanted.

    For a linear: ``(layer, x, tensors by name, bias, numbers of the activation) -> y``; for an embedding: ``(layer,
    ids, tensors by name, None, other numbers) -> y``.
    """
    tensors = operands.tensor_names
    arguments = [f"t[{name!r}]" for name in tensors]
    arguments += [f"n[{i}]" for i in range(len(operands.types) - len(tensors))]
    if kind == "linear":
        arguments += ["bias"]
        if operands.activation is not None:
            own = operands.activation.tensor_names
            arguments += [f"t[{name!r}]" for name in own]
            arguments += [f"a[{i}]" for i in range(len(operands.activation.types) - len(own))]
    else:
        arguments += ["*a"]
    made: dict[str, Any] = {}
    exec(_CALL.format(arguments=", ".join(arguments)), globals(), made)
    called: Callable[..., Tensor] = made["make"](op, op._op)
    return called
