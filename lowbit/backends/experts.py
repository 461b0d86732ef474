"""The ops of a stack of experts.

    <family>_experts(x, ids, *weight, num_experts, bias, *activation)          equals  y with
        y[i] = F.linear(x[i // r], W[ids[i]], bias[ids[i]]),    r = len(ids) // len(x)
    <family>_experts_input_gradient(dy, ids, *weight, num_experts, in_features)  equals  d with
        d[i] = dy[i] @ W[ids[i]]
    <family>_experts_weight_gradient(dy, x, ids, num_experts)                  equals  D [E*N, K], float32, with
        D[e] = sum of dy[i] x[i // r].T over the i with ids[i] == e

The E weights ``[N, K]`` are one weight in the family's form. Where that has codes it is ``[E*N, K]``, and expert e has
its rows ``[e*N, (e+1)*N)``; of Kronecker products it has E*R terms, and expert e has R of them.
x is ``[T, K]``, ids ``[S]`` in any order, S a multiple of T: a token that goes to r experts stands once. Where an id is
``num_experts`` or more, another process has the expert, and the row of y is 0. A negative id is an error; Triton's
kernels, which do not wait for the GPU to check it, give a row of NaN. A bias is ``[E*N]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lowbit.backends import registry, transforms
from lowbit.backends.operands import CodedOperands, Operands
from lowbit.backends.reference import check_activations, check_ids, without_autocast
from lowbit.backends.transforms import Rules

Define = Callable[[str], None]


class ExpertsOps:
    """The ops of the experts of one family.

    Args:
        operands: the family's weight and activation.
        define: makes a schema known, in every namespace that has the ops of families.
        library: where references, fakes and derivatives go.
    """

    def __init__(self, operands: type[Operands], define: Define, library: torch.library.Library) -> None:
        self.operands: Any = operands
        self._activation: Any = operands.activation  # None: x is always met as it is
        weight, activation = operands.types, {} if self._activation is None else self._activation.types
        self._weight, name = len(weight), f"{operands.family}_experts"
        self._arguments: dict[str, str] = {
            "x": "Tensor", "ids": "Tensor", **weight, "num_experts": "int", "bias": "Tensor?", **activation,
        }  # fmt: skip
        self._of_gradient: dict[str, str] = {
            "dy": "Tensor", "ids": "Tensor", **weight, "num_experts": "int", "in_features": "int",
        }  # fmt: skip
        define(_schema(name, self._arguments))
        if issubclass(operands, CodedOperands):
            registry.register_op(library, name, self._experts)
        else:  # a loop over experts, each of which the kernel of linears serves
            library.impl(name, self._experts, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{registry.NAMESPACE}::{name}", self._fake, lib=library)
        self._op: torch._ops.OpOverload = getattr(torch.ops.lowbit, name).default
        rules = Rules(self._save, self._gradients, self._tangent, self._batch)
        transforms.register(library, self._op, rules, follows_autocast=True)

        gradient = f"{name}_input_gradient"  # an op, as a graph cannot tell which experts there are
        library.define(_schema(gradient, self._of_gradient))
        library.impl(gradient, self._input_gradient, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{registry.NAMESPACE}::{gradient}", self._fake_input_gradient, lib=library)
        self._gradient_op: torch._ops.OpOverload = getattr(torch.ops.lowbit, gradient).default
        of_weight = f"{name}_weight_gradient"
        library.define(f"{of_weight}(Tensor dy, Tensor x, Tensor ids, int num_experts) -> Tensor")
        library.impl(of_weight, _weight_gradient, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{registry.NAMESPACE}::{of_weight}", _fake_weight_gradient, lib=library)
        self._weight_gradient_op: torch._ops.OpOverload = getattr(torch.ops.lowbit, of_weight).default
        of_gradient = Rules(
            self._save_of_gradient, self._gradients_of_gradient, self._tangent_of_gradient, self._batch_gradient
        )
        transforms.register(library, self._gradient_op, of_gradient)

    # ---- arguments

    def arguments(self, x: Tensor, ids: Tensor, *arguments: Any) -> tuple[Any, int, Tensor | None, Any]:
        """(weight, num_experts, bias, activation), checked; whether ids are negative is for the kernel to see."""
        weight = self.operands.of(arguments[: self._weight])
        num_experts, bias, *rest = arguments[self._weight :]
        activation = None if self._activation is None else self._activation.of(rest)
        check_activations(x)
        _check_sizes("x", x, ids)
        rows = num_experts * weight.expert_rows(num_experts)
        weight.check_linear(x, None, activation)
        torch._check(
            bias is None or tuple(bias.shape) == (rows,),
            lambda: f"bias must have shape [E*N] = ({rows},): got {None if bias is None else tuple(bias.shape)}",
        )
        return weight, num_experts, bias, activation

    # ---- references and fakes

    def _experts(self, x: Tensor, ids: Tensor, *arguments: Any) -> Tensor:
        weight, num_experts, bias, activation = self.arguments(x, ids, *arguments)
        n = weight.expert_rows(num_experts)
        y = x.new_zeros(len(ids), n)
        for rows, part, e in _by_expert(ids, weight, num_experts):
            own = None if bias is None else bias[e * n : (e + 1) * n]
            y[rows] = part.expert_linear(x[rows // (len(ids) // len(x))], own, activation)
        return y

    def _fake(self, x: Tensor, ids: Tensor, *arguments: Any) -> Tensor:
        weight, num_experts, _, _ = self.arguments(x, ids, *arguments)
        return x.new_empty(ids.shape[0], weight.expert_rows(num_experts))

    def _input_gradient(self, dy: Tensor, ids: Tensor, *arguments: Any) -> Tensor:
        weight, num_experts, k = self._checked_gradient(dy, ids, *arguments)
        d = dy.new_zeros(len(ids), k)
        for rows, part, _ in _by_expert(ids, weight, num_experts):
            d[rows] = part.input_gradient(dy[rows], k)
        return d

    def _fake_input_gradient(self, dy: Tensor, ids: Tensor, *arguments: Any) -> Tensor:
        _, _, k = self._checked_gradient(dy, ids, *arguments)
        return dy.new_empty(ids.shape[0], k)

    def _checked_gradient(self, dy: Tensor, ids: Tensor, *arguments: Any) -> tuple[Any, int, int]:
        weight = self.operands.of(arguments[: self._weight])
        num_experts, k = arguments[self._weight :]
        _check_sizes("dy", dy, ids)
        n = weight.expert_rows(num_experts)
        weight.check(k)
        torch._check(
            dy.shape[0] == ids.shape[0] and dy.shape[1] == n,
            lambda: f"dy must be [S, N] = [{ids.shape[0]}, {n}]: got shape {tuple(dy.shape)}",
        )
        return weight, num_experts, k

    def _unchanged(self) -> Any:
        """The activation's arguments for x as it is."""
        return () if self._activation is None else self._activation()

    # ---- derivatives

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        given = dict(zip(self._arguments, inputs, strict=True))
        weight, bias = self.operands.of([given[name] for name in self.operands.types]), given["bias"]
        trained = self._wanted(ctx).intersection(weight.tensor_names)
        self._keep(ctx, given["ids"], weight, None if bias is None else bias.dtype, given["x"] if trained else None)
        ctx.num_experts, ctx.tokens, ctx.k = given["num_experts"], given["x"].shape[0], given["x"].shape[1]

    def _save_of_gradient(self, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        given = dict(zip(self._of_gradient, inputs, strict=True))
        self._keep(ctx, given["ids"], self.operands.of([given[name] for name in self.operands.types]), None, None)
        ctx.num_experts, ctx.k = given["num_experts"], given["in_features"]

    def _keep(self, ctx: Any, ids: Tensor, weight: Any, bias_dtype: torch.dtype | None, x: Tensor | None) -> None:
        count = len(weight.tensor_names)
        saved = (x, ids, *list(weight)[:count])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(*saved)
        ctx.numbers, ctx.bias_dtype = list(weight)[count:], bias_dtype

    def _saved(self, ctx: Any) -> tuple[Tensor | None, Tensor, tuple[Any, ...]]:
        x, ids, *tensors = ctx.saved_tensors
        return x, ids, (*tensors, *ctx.numbers)

    def _wanted(self, ctx: Any) -> set[str]:
        return {name for name, needed in zip(self._arguments, ctx.needs_input_grad, strict=True) if needed}

    def _check_differentiable(self, names: set[str], what: str, more: Iterable[str] = ()) -> None:
        for name in names - {"x", "dy", "bias", *more}:
            raise RuntimeError(f"{self._op.name()} has no {what} with respect to {name}")

    def _gradients(self, ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(self._arguments)
        wanted = self._wanted(ctx)
        self._check_differentiable(wanted, "gradient", self.operands.differentiable)
        x, ids, weight = self._saved(ctx)
        found: dict[str, Tensor | None] = {}
        with without_autocast():
            if "x" in wanted:
                rows = self._gradient_op(grad.contiguous(), ids, *weight, ctx.num_experts, ctx.k)
                found["x"] = rows.view(ctx.tokens, -1, ctx.k).sum(1) if ctx.tokens else rows.view(0, ctx.k)
            if "bias" in wanted:
                sums = grad.new_zeros(ctx.num_experts + 1, grad.shape[1], dtype=torch.float32)
                sums = sums.index_add(0, ids.to(torch.int64).clamp(max=ctx.num_experts), grad.float())
                found["bias"] = sums[:-1].reshape(-1).to(ctx.bias_dtype)
            if x is not None:
                d = self._weight_gradient_op(grad.contiguous(), x, ids, ctx.num_experts)
                found |= self.operands.of(weight).stack_gradients(d, wanted, ctx.num_experts)
        return tuple(found.get(name) for name in self._arguments)

    def _gradients_of_gradient(self, ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(self._of_gradient)
        wanted = {name for name, needed in zip(self._of_gradient, ctx.needs_input_grad, strict=True) if needed}
        self._check_differentiable(wanted, "gradient")
        _, ids, weight = self._saved(ctx)
        with without_autocast():
            dy = self._op(grad.contiguous(), ids, *weight, ctx.num_experts, None, *self._unchanged())
        return tuple(dy if name == "dy" else None for name in self._of_gradient)

    def _tangent(self, ctx: Any, *tangents: Any) -> Tensor | None:
        given = {name: t for name, t in zip(self._arguments, tangents, strict=True) if t is not None}
        self._check_differentiable(set(given), "tangent")
        _, ids, weight = self._saved(ctx)
        parts: list[Tensor] = []
        with without_autocast():
            if "x" in given:
                plain = (ctx.num_experts, None, *self._unchanged())
                parts.append(self._op(given["x"], ids, *weight, *plain))
            if "bias" in given:
                bias = torch.nn.functional.pad(given["bias"].view(ctx.num_experts, -1), (0, 0, 0, 1))
                parts.append(bias.index_select(0, ids.to(torch.int64).clamp(max=ctx.num_experts)))
        return sum(parts[1:], parts[0])

    def _tangent_of_gradient(self, ctx: Any, *tangents: Any) -> Tensor | None:
        given = {name: t for name, t in zip(self._of_gradient, tangents, strict=True) if t is not None}
        self._check_differentiable(set(given), "tangent")
        _, ids, weight = self._saved(ctx)
        result: Tensor = self._gradient_op(given["dy"], ids, *weight, ctx.num_experts, ctx.k)
        return result

    def _batch(self, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return _one_by_one(self._op, info, in_dims, args)

    def _batch_gradient(self, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return _one_by_one(self._gradient_op, info, in_dims, args)


def _schema(op: str, arguments: dict[str, str]) -> str:
    return f"{op}({', '.join(f'{type} {argument}' for argument, type in arguments.items())}) -> Tensor"


def _check_sizes(name: str, x: Tensor, ids: Tensor) -> None:
    check_ids(ids)
    torch._check(x.dim() == 2, lambda: f"{name} must be [T, {'K' if name == 'x' else 'N'}]: got shape {tuple(x.shape)}")
    torch._check(
        ids.dim() == 1 and (ids.shape[0] % x.shape[0] == 0 if x.shape[0] else ids.shape[0] == 0),
        lambda: f"ids must be [S], S a multiple of T={x.shape[0]}: got shape {tuple(ids.shape)}",
    )


def _weight_gradient(dy: Tensor, x: Tensor, ids: Tensor, num_experts: int) -> Tensor:
    n, repeats = dy.shape[1], len(ids) // len(x) if len(x) else 1
    d = dy.new_zeros(num_experts * n, x.shape[1], dtype=torch.float32)
    for e in ids.unique().tolist():
        if e < num_experts:
            rows = (ids == e).nonzero()[:, 0]
            d[e * n : (e + 1) * n] = dy[rows].float().t() @ x[rows // repeats].float()
    return d


def _fake_weight_gradient(dy: Tensor, x: Tensor, ids: Tensor, num_experts: int) -> Tensor:
    return dy.new_empty(num_experts * dy.shape[1], x.shape[1], dtype=torch.float32)


def _by_expert(ids: Tensor, weight: Any, num_experts: int) -> Iterator[tuple[Tensor, Any, int]]:
    """Of each expert that has some: the rows whose it is, its weight, and its number."""
    if ids.numel() and int(ids.min()) < 0:
        raise RuntimeError(f"ids must not be negative: got {int(ids.min())}")
    whole = weight.decoded() if hasattr(weight, "decoded") else weight
    for e in ids.unique().tolist():
        if e < num_experts:
            yield (ids == e).nonzero()[:, 0], whole.expert(e, num_experts), e


def _one_by_one(
    op: torch._ops.OpOverload, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> tuple[Tensor, int]:
    if not info.batch_size:
        raise RuntimeError(f"vmap of {op} needs a batch of 1 or more: got 0")
    calls = (
        op(*(a if dim is None else a.select(dim, i).contiguous() for a, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    )
    return torch.stack(list(calls)), 0
