"""The ops of a family, made of its operands: schemas, references, fakes and gradients, once for all families.

    <family>_linear(x, *weight, bias, *activation)        equals  F.linear(x, W, bias)
    <family>_dequantize(*weight, in_features, dtype)      equals  W
    <family>_embedding(ids, *weight, in_features, dtype)  equals  F.embedding(ids, W)

``weight`` stands for the fields of the family's :class:`~lowbit.backends.operands.Operands`, ``activation`` for those
of its :class:`~lowbit.backends.operands.Activation`; a family may do without it, and without ``in_features``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lowbit.backends import registry
from lowbit.backends.operands import Activation, Operands
from lowbit.backends.reference import check_activations, check_ids, without_autocast

_library = torch.library.Library(registry.NAMESPACE, "DEF")
_native = torch.library.Library(registry.NATIVE_NAMESPACE, "FRAGMENT")  # the same ops, for who calls one backend

Gradients = dict[str, Tensor | None]


class FamilyOps:
    """The ops of one family and how their arguments divide.

    Args:
        operands: the weight's part of the arguments.
    """

    def __init__(self, operands: type[Operands]) -> None:
        self.operands, self.family = operands, operands.family
        weight = operands.types
        sized = {"in_features": "int"} if operands.sized else {}
        activation = {} if operands.activation is None else operands.activation.types
        self._weight = len(weight)
        self._arguments: dict[str, dict[str, str]] = {
            "linear": {"x": "Tensor", **weight, "bias": "Tensor?", **activation},
            "dequantize": {**weight, **sized, "dtype": "ScalarType"},
            "embedding": {"ids": "Tensor", **weight, **sized, "dtype": "ScalarType"},
        }
        references = {"linear": self._linear, "dequantize": self._dequantize, "embedding": self._embedding}
        fakes = {"linear": self._fake_linear, "dequantize": self._fake_rows, "embedding": self._fake_embedding}
        for name, arguments in self._arguments.items():
            op = f"{self.family}_{name}"
            schema = f"{op}({', '.join(f'{type} {argument}' for argument, type in arguments.items())}) -> Tensor"
            _library.define(schema)
            _native.define(schema)
            registry.register_op(_library, op, references[name])
            torch.library.register_fake(f"{registry.NAMESPACE}::{op}", fakes[name], lib=_library)
        for name, save, gradients in (
            ("linear", self._save_linear, self._linear_gradients),
            ("embedding", self._save_embedding, self._embedding_gradients),
        ):
            torch.library.register_autograd(
                f"{registry.NAMESPACE}::{self.family}_{name}", gradients, setup_context=save, lib=_library
            )

    def implement(self, backend: str, module: str) -> None:
        """Let functions ``linear``, ``dequantize`` and ``embedding`` of ``module`` run the ops on ``backend``.

        The module is imported at the first call. It may import this object: whoever names it here must not be
        imported by it.
        """
        for name in self._arguments:
            registry.implement(backend, f"{self.family}_{name}", module, name)

    # ---- arguments

    def linear_arguments(self, x: Tensor, *arguments: Any) -> tuple[Any, Tensor | None, Any]:
        """(weight, bias, activation) of a linear, checked."""
        weight, bias, activation = self._split(arguments)
        check_activations(x)
        weight.check_linear(x, bias, activation)
        return weight, bias, activation

    def row_arguments(self, *arguments: Any) -> tuple[Any, int, torch.dtype]:
        """(weight, K, dtype) of a dequantize, checked."""
        weight: Any = self.operands.of(arguments[: self._weight])
        *sized, dtype = arguments[self._weight :]
        k = sized[0] if sized else weight.in_features
        weight.check(k)
        return weight, k, dtype

    def embedding_arguments(self, ids: Tensor, *arguments: Any) -> tuple[Any, int, torch.dtype]:
        """(weight, K, dtype) of an embedding, checked; whether ids are in range is for the kernel to see."""
        check_ids(ids)
        return self.row_arguments(*arguments)

    def _split(self, arguments: tuple[Any, ...]) -> tuple[Any, Tensor | None, Activation | None]:
        weight = self.operands.of(arguments[: self._weight])
        bias, *rest = arguments[self._weight :]
        return weight, bias, None if self.operands.activation is None else self.operands.activation.of(rest)

    # ---- references and fakes

    def _linear(self, x: Tensor, *arguments: Any) -> Tensor:
        weight, bias, activation = self.linear_arguments(x, *arguments)
        return weight.linear(x, bias, activation)  # type: ignore[no-any-return]

    def _dequantize(self, *arguments: Any) -> Tensor:
        weight, k, dtype = self.row_arguments(*arguments)
        return weight.dequantize(k, dtype)  # type: ignore[no-any-return]

    def _embedding(self, ids: Tensor, *arguments: Any) -> Tensor:
        weight, k, dtype = self.embedding_arguments(ids, *arguments)
        return weight.embedding(ids, k, dtype)  # type: ignore[no-any-return]

    def _fake_linear(self, x: Tensor, *arguments: Any) -> Tensor:
        weight, _bias, _activation = self.linear_arguments(x, *arguments)
        return x.new_empty(*x.shape[:-1], weight.out_features)

    def _fake_rows(self, *arguments: Any) -> Tensor:
        weight, k, dtype = self.row_arguments(*arguments)
        return torch.empty(weight.out_features, k, dtype=dtype, device=weight.device)

    def _fake_embedding(self, ids: Tensor, *arguments: Any) -> Tensor:
        weight, k, dtype = self.embedding_arguments(ids, *arguments)
        return torch.empty(*ids.shape, k, dtype=dtype, device=weight.device)

    # ---- gradients: by name, and then in the order of the arguments

    def _save_linear(self, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *arguments = inputs
        weight, bias, _activation = self._split(tuple(arguments))
        trained = self._wanted(ctx, "linear", weight.tensor_names)
        self._save(ctx, x if trained else None, weight)
        ctx.k, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype

    def _linear_gradients(self, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(grad.device):
            x, weight = self._saved(ctx)
            dy = grad.reshape(-1, weight.out_features)
            found: Gradients = {}
            wanted = self._wanted(ctx, "linear")
            if "x" in wanted:
                found["x"] = weight.input_gradient(grad, ctx.k)
            if "bias" in wanted:
                found["bias"] = dy.float().sum(0).to(ctx.bias_dtype)
            if x is not None:
                found |= weight.weight_gradients(x.reshape(-1, ctx.k), dy, wanted)
        return tuple(found.get(name) for name in self._arguments["linear"])

    def _save_embedding(self, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ids, *arguments = inputs
        self._save(ctx, ids, self.operands.of(arguments[: self._weight]))

    def _embedding_gradients(self, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(grad.device):
            ids, weight = self._saved(ctx)
            found = weight.row_gradients(ids, grad, self._wanted(ctx, "embedding"))
        return tuple(found.get(name) for name in self._arguments["embedding"])

    def _wanted(self, ctx: Any, op: str, among: Iterable[str] | None = None) -> set[str]:
        wanted = {name for name, needed in zip(self._arguments[op], ctx.needs_input_grad, strict=False) if needed}
        return wanted if among is None else wanted.intersection(among)

    def _save(self, ctx: Any, first: Tensor | None, weight: Operands) -> None:
        values = list(weight)
        count = len(weight.tensor_names)
        ctx.save_for_backward(first, *values[:count])
        ctx.numbers = values[count:]

    def _saved(self, ctx: Any) -> tuple[Any, Any]:
        first, *tensors = ctx.saved_tensors
        return first, self.operands.of([*tensors, *ctx.numbers])
