"""The ops of a family, made of its operands: schemas, references, fakes and gradients, once for all families.

    <family>_linear(x, *weight, bias, *activation)        equals  F.linear(x, W, bias)
    <family>_dequantize(*weight, in_features, dtype)      equals  W
    <family>_embedding(ids, *weight, in_features, dtype)  equals  F.embedding(ids, W)

``weight`` stands for the fields of the family's :class:`~lowbit.backends.operands.Operands`, ``activation`` for those
of its :class:`~lowbit.backends.operands.Activation`; a family may do without it, and without ``in_features``.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lowbit.backends import registry, transforms
from lowbit.backends.experts import ExpertsOps
from lowbit.backends.operands import Activation, CodedOperands, Operands
from lowbit.backends.reference import check_activations, check_ids, without_autocast
from lowbit.backends.transforms import Rules

_library = torch.library.Library(registry.NAMESPACE, "DEF")
_native = torch.library.Library(registry.NATIVE_NAMESPACE, "FRAGMENT")  # the same ops, for who calls one backend

_cuda = torch.library.Library("lowbit_cuda", "FRAGMENT")  # again, and why a call is declined

families: dict[str, FamilyOps] = {}

Gradients = dict[str, Tensor | None]
_FIRST = {"linear": "x", "embedding": "ids", "dequantize": ""}


def _define(schema: str) -> None:
    _library.define(schema)
    _native.define(schema)
    _cuda.define(schema)
    _cuda.define(schema.replace("(", "_declines(", 1).replace("-> Tensor", "-> str"))


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
        families[self.family] = self
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
            _define(schema)
            registry.register_op(_library, op, references[name])
            torch.library.register_fake(f"{registry.NAMESPACE}::{op}", fakes[name], lib=_library)
            rules = Rules(
                save=partial(self._save, name),
                gradients=partial(self._gradients, name),
                tangent=partial(self._tangent, name),
                batch=partial(self._batch, name),
            )
            transforms.register(_library, self._op(name), rules, follows_autocast=name == "linear")
        self.experts = ExpertsOps(operands, _define, _library)

    def implement(self, backend: str, module: str) -> None:
        """Let functions ``linear``, ``dequantize`` and ``embedding`` of ``module`` run the ops on ``backend``, and
        ``experts`` where the family has stacks of experts.

        The module is imported at the first call. It may import this object: whoever names it here must not be
        imported by it.
        """
        names = (*self._arguments, *(("experts",) if issubclass(self.operands, CodedOperands) else ()))
        for name in names:  # Kronecker products of experts are those of linears, one after the other
            registry.implement(backend, f"{self.family}_{name}", module, name)

    # ---- arguments

    def linear_arguments(self, x: Tensor, *arguments: Any) -> tuple[Any, Tensor | None, Any]:
        """(weight, bias, activation) of a linear, checked."""
        weight, bias, activation = self._split(arguments)
        check_activations(x)
        weight.check_linear(x, bias, activation)
        return weight, bias, activation

    def experts_arguments(self, x: Tensor, ids: Tensor, *arguments: Any) -> tuple[Any, int, Tensor | None, Any]:
        """(weight, num_experts, bias, activation) of a stack of experts, checked; ids are for the kernel to see."""
        return self.experts.arguments(x, ids, *arguments)

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

    # ---- derivatives: by name, and gradients then in the order of the arguments

    def _op(self, kind: str) -> torch._ops.OpOverload:
        op: torch._ops.OpOverload = getattr(torch.ops.lowbit, f"{self.family}_{kind}").default
        return op

    def _save(self, kind: str, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        given = dict(zip(self._arguments[kind], inputs, strict=True))
        weight: Any = self.operands.of([given[name] for name in self.operands.types])
        first, bias = given.get(_FIRST[kind]), given.get("bias")
        moves_forward = forward_ad._current_level >= 0
        if kind == "linear" and not moves_forward and not self._wanted(kind, ctx).intersection(weight.tensor_names):
            first = None  # the gradient of x does not need x
        count = len(weight.tensor_names)
        saved = (first, *list(weight)[:count])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        if moves_forward:
            ctx.save_for_forward(*saved)
        ctx.numbers = list(weight)[count:]
        ctx.k = given["x"].shape[-1] if kind == "linear" else given.get("in_features") or weight.in_features
        ctx.dtype, ctx.bias_dtype = output.dtype, None if bias is None else bias.dtype

    def _saved(self, ctx: Any) -> tuple[Any, Any]:
        first, *tensors = ctx.saved_tensors  # once: checkpointing lets nobody ask twice
        return first, self.operands.of([*tensors, *ctx.numbers])

    def _wanted(self, kind: str, ctx: Any) -> set[str]:
        return {name for name, needed in zip(self._arguments[kind], ctx.needs_input_grad, strict=True) if needed}

    def _check_differentiable(self, kind: str, names: Iterable[str], what: str) -> None:
        for name in {*names} - {"x", "bias", *self.operands.differentiable}:
            raise RuntimeError(f"{registry.NAMESPACE}::{self.family}_{kind} has no {what} with respect to {name}")

    def _gradients(self, kind: str, ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(self._arguments[kind])
        wanted = self._wanted(kind, ctx)
        self._check_differentiable(kind, wanted, "gradient")
        first, weight = self._saved(ctx)
        found: Gradients = {}
        with without_autocast():
            if kind == "dequantize":
                found = weight.dense_gradients(grad, wanted)
            elif kind == "embedding":
                found = weight.row_gradients(first, grad, wanted)
            else:
                dy = grad.reshape(-1, weight.out_features)
                if "x" in wanted:
                    found["x"] = weight.input_gradient(grad, ctx.k)
                if "bias" in wanted:
                    found["bias"] = dy.float().sum(0).to(ctx.bias_dtype)
                if wanted.intersection(weight.tensor_names):
                    found |= weight.weight_gradients(first.reshape(-1, ctx.k), dy, wanted)
        return tuple(found.get(name) for name in self._arguments[kind])

    def _tangent(self, kind: str, ctx: Any, *tangents: Any) -> Tensor | None:
        """The tangent of the result. int8 activations: straight through, as the gradient is."""
        given = {name: t for name, t in zip(self._arguments[kind], tangents, strict=True) if t is not None}
        self._check_differentiable(kind, given, "tangent")
        first, weight = self._saved(ctx)
        x, bias = given.pop("x", None), given.pop("bias", None)
        parts: list[Tensor] = []
        with without_autocast():
            if x is not None:
                activation = () if self.operands.activation is None else self.operands.activation()
                parts.append(self._op(kind)(x, *weight, None, *activation))
            if given:
                of_weight = weight.tangent(ctx.k, given)
                if kind == "linear":
                    of_weight = first.float() @ of_weight.t()
                elif kind == "embedding":
                    of_weight = of_weight[first]
                parts.append(of_weight.to(ctx.dtype))
            if bias is not None:
                parts.append(bias.to(ctx.dtype).expand(*first.shape[:-1], -1))
        return sum(parts[1:], parts[0])

    def _batch(self, kind: str, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        """A batch of x or of ids is more rows; where the weight itself is batched, one call for each."""
        op = self._op(kind)
        batched = [name for name, dim in zip(self._arguments[kind], in_dims, strict=True) if dim is not None]
        if batched == [_FIRST[kind]]:
            return op(args[0].movedim(in_dims[0], 0), *args[1:]), 0
        if not info.batch_size:
            raise RuntimeError(f"vmap of {op} over {', '.join(batched)} needs a batch of 1 or more: got 0")
        calls = (
            op(*(a if dim is None else a.select(dim, i).contiguous() for a, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        )
        return torch.stack(list(calls)), 0
