"""What the stacks of experts of every family share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowbit.backends.layouts import CANONICAL, Layout
from lowbit.core.activations import ActivationSpec
from lowbit.core.family import Format, Spec, Weight, check_size, check_spec
from lowbit.core.quantizer import Statistics
from lowbit.nn.coded import CodedLayer
from lowbit.nn.layer import Layer, layer_class
from lowbit.nn.rows import cut_rows, join_rows


def experts_linear(x: Tensor, ids: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``y[i] = F.linear(x[i // r], weight[ids[i]], bias[ids[i]])`` ``[S, N]``; 0 where there is no such expert.

    One product for each expert that is chosen. ``weight`` is ``[E, N, K]``.
    """
    repeats = len(ids) // len(x) if len(x) else 1
    y = x.new_zeros(len(ids), weight.shape[1])
    for e in ids.unique().tolist():
        if e < len(weight):
            rows = (ids == e).nonzero()[:, 0]
            own = nn.functional.linear(x[rows // repeats], weight[e], None if bias is None else bias[e])
            y = y.index_copy(0, rows, own)
    return y


def _rows_of(bias: Tensor, ids: Tensor) -> Tensor:
    """``bias[ids]``, 0 where there is no such expert."""
    return nn.functional.pad(bias, (0, 0, 0, 1)).index_select(0, ids.clamp(max=len(bias)))


def as_stack(weight: Tensor, num_experts: int, transposed: bool) -> Tensor:
    """``[E, N, K]`` of weights that lie so or as ``[E*N, K]``, with N and K exchanged where ``transposed``."""
    whole = weight if weight.dim() == 3 else weight.unflatten(0, (num_experts, -1))
    return whole.transpose(1, 2) if transposed else whole


class FloatExperts(nn.Module):
    """E linear layers whose weights are one Parameter: ``[E, N, K]`` or ``[E*N, K]``, and where ``transposed``
    ``[E, K, N]`` or ``[E*K, N]``.

    ``y[i] = F.linear(x[i // r], W[ids[i]], bias[ids[i]])`` with ``r = len(ids) // len(x)``.

    Where ``owner`` is given it stands for the Parameter ``attribute`` of that module, which is the very same.
    ``caller`` is the module whose forward computes with it: the owner, or one above it.
    """

    bias: nn.Parameter | None
    by_token = True  # whether the rows of x are those of one token after the other

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None = None,
        *,
        transposed: bool = False,
        num_experts: int | None = None,
        owner: nn.Module | None = None,
        attribute: str = "",
        caller: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self.transposed = transposed
        self._count = num_experts
        self.__dict__["owner"], self.__dict__["caller"] = owner, caller  # not parts of this one
        self.attribute = attribute

    @property
    def num_experts(self) -> int:
        """E."""
        return self.weight.shape[0] if self._count is None else self._count

    def stacked(self, tensor: Tensor) -> Tensor:
        """``[E, N, K]`` of a tensor that lies as the weight does."""
        return as_stack(tensor, self.num_experts, self.transposed)

    @property
    def weights(self) -> Tensor:
        """``[E, N, K]``."""
        return self.stacked(self.weight)

    @property
    def in_features(self) -> int:
        """K of each expert."""
        return self.weights.shape[2]

    def forward(self, input: Tensor, ids: Tensor, bias: Tensor | None = None) -> Tensor:
        """``bias``: ``[E, N]``, of a module that has none of its own."""
        return experts_linear(input, ids, self.weights, self.bias if bias is None else bias)


def quantized(
    spec: Spec, weights: Iterable[Tensor], statistics: Sequence[Statistics] | None = None
) -> Iterator[Weight]:
    """What ``spec`` makes of the weights ``[N, K]`` of experts, of each by itself, in their order.

    ``statistics``: of each expert. What serves all rows of a weight and is learned, such as one table per tensor, is
    learned on all experts together: then there is one result ``[E*N, K]``.
    """
    if spec.shares_over_rows:
        held = list(weights)
        yield spec.quantize(torch.cat(held), statistics=_of_all(spec, held, statistics))
        return
    for e, weight in enumerate(weights):
        made = spec.quantize(weight, statistics=None if statistics is None else statistics[e])
        spec = spec.for_more(made.format())
        yield made


def _of_all(spec: Spec, weights: Sequence[Tensor], statistics: Sequence[Statistics] | None) -> Statistics:
    """What was measured of each expert, as the weight ``[E*N, K]`` of all has it; else the mean of the others."""
    if "sensitivity" not in spec.statistics or statistics is None:
        return Statistics()
    each = [None if own.sensitivity is None else own.sensitivity.expand(weight.shape)
            for weight, own in zip(weights, statistics, strict=True)]  # fmt: skip
    measured = [sensitivity for sensitivity in each if sensitivity is not None]
    if not measured:
        return Statistics()
    usual = sum(measured[1:], measured[0]) / len(measured)
    return Statistics(sensitivity=torch.cat([usual if sensitivity is None else sensitivity for sensitivity in each]))


class ExpertsLayer(Layer):
    """E linear layers in one: ``y[i] = x[i // r] @ W[ids[i]].T + bias[ids[i]]`` with ``r = len(ids) // len(x)``.

    x is ``[T, K]`` in float32, float16 or bfloat16, ids ``[S]`` in int32 or int64, S a multiple of T, and y ``[S, N]``
    in the dtype of x. A row whose id is ``num_experts`` or more is 0: another process has its expert.

    The weights are held as one, in the family's form; the bias is ``[E*N]``. What a format has once per tensor, such as
    a table, all experts share.

    Attributes:
        num_experts: E.
        expert_errors: :attr:`weight_error` of each expert, where it is known.
    """

    kind = "experts"
    num_experts: int
    expert_errors: list[float] | None = None
    _activation: tuple[Any, ...]  # the activation's numbers, in the op's order

    def __init__(
        self,
        format: Format,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        num_experts: int,
    ) -> None:
        check_size("num_experts", num_experts)
        self.stack_rows(format, num_experts)
        self.__dict__["num_experts"] = num_experts
        super().__init__(format, bias, dtype, device)

    def _derive(self) -> None:
        super()._derive()
        activation = self.operands_class.activation
        self._activation = () if activation is None else activation.numbers_of(self.format.activation)

    @property
    def in_features(self) -> int:
        """K of each expert."""
        return cast(int, self.format.in_features)

    @property
    def out_features(self) -> int:
        """N of each expert."""
        return self.rows // self.num_experts

    @property
    def rows(self) -> int:
        return self.stack_rows(self.format, self.num_experts)

    @staticmethod
    @abstractmethod
    def stack_rows(format: Any, num_experts: int) -> int:
        """E*N; raises ``ValueError`` unless ``format`` is that of a stack of so many weights."""

    @staticmethod
    @abstractmethod
    def joined(parts: Sequence[tuple[dict[str, Tensor], Any]]) -> tuple[dict[str, Tensor], Any]:
        """(tensors, format) of a stack of weights, each as files have it: ``(tensors, format)``."""

    @abstractmethod
    def cut(self, index: int) -> tuple[dict[str, Tensor], Any]:
        """(tensors, format) of one expert, copied; the format with the activations of the stack."""

    @classmethod
    def from_float(
        cls,
        weight: Tensor,
        spec: Spec,
        bias: Tensor | None = None,
        *,
        x_scale: Tensor | None = None,
    ) -> Any:
        """Quantize float weights ``[E, N, K]`` with ``spec``; the bias ``[E, N]`` is kept as it is.

        Raises ``ValueError`` when the spec does not fit the weight, or needs calibration that is not given;
        ``TypeError`` for what is no spec of this family.
        """
        check_spec(spec, cls.family)
        if weight.dim() != 3:
            raise ValueError(f"weight must be [E, N, K]: got shape {tuple(weight.shape)}")
        if problem := spec.problem(*weight.shape[1:]):
            raise ValueError(problem)
        return cls.from_weights(
            quantized(spec, weight.unbind()), bias, num_experts=weight.shape[0], **asdict(spec.activation),
            x_scale=x_scale, dtype=weight.dtype,
        )  # fmt: skip

    @classmethod
    def from_weights(
        cls,
        weights: Iterable[Weight],
        bias: Tensor | None = None,
        *,
        num_experts: int,
        x_scale: Tensor | None = None,
        dtype: torch.dtype | None = None,
        **activation: Any,
    ) -> Any:
        """A layer that holds these weights, one below the other; the bias is ``[E, N]`` or ``[E*N]``.

        Each is packed as it comes. Raises ``ValueError`` where they have no form in common.
        """
        parts = [(weight.tensors(), weight.format()) for weight in weights]
        return cls.from_parts(parts, bias, num_experts=num_experts, x_scale=x_scale, dtype=dtype, **activation)

    @classmethod
    def from_parts(
        cls,
        parts: Sequence[tuple[dict[str, Tensor], Any]],
        bias: Tensor | None = None,
        *,
        num_experts: int,
        x_scale: Tensor | None = None,
        dtype: torch.dtype | None = None,
        **activation: Any,
    ) -> Any:
        """:meth:`from_weights` of weights as files have them: ``(tensors, format)``."""
        tensors, weight_format = cls.joined(parts)
        format = weight_format.with_activation(ActivationSpec(**activation))
        layer = cls(format, bias is not None, dtype, "meta", num_experts=num_experts)
        layer.store(tensors)
        if "x_scale" in format.tensors():
            if x_scale is None:
                raise ValueError("activations='int8_static' needs x_scale, the calibrated scale of the input")
            layer.store({"x_scale": x_scale.detach().reshape(1).float()})
        if bias is not None:
            trained = not isinstance(bias, nn.Parameter) or bias.requires_grad
            layer.bias = nn.Parameter(bias.detach().reshape(-1), requires_grad=trained)
        layer.validate()
        return layer.prepare()

    @classmethod
    def from_weight(
        cls,
        weight: Weight,
        bias: Tensor | None = None,
        *,
        num_experts: int,
        x_scale: Tensor | None = None,
        dtype: torch.dtype | None = None,
        **activation: Any,
    ) -> Any:
        """A layer that holds ``weight`` ``[E*N, K]`` as it is; the bias is ``[E, N]`` or ``[E*N]``."""
        return cls.from_weights([weight], bias, num_experts=num_experts, x_scale=x_scale, dtype=dtype, **activation)

    def arguments(self, x: Tensor, ids: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
        """The arguments of the op."""
        t, activation = self.operands(), self.operands_class.activation
        own = () if activation is None else activation.tensor_names
        tensors = (*self.weight_arguments(t), self.num_experts, bias, *(t[name] for name in own))
        return (x, ids, *tensors, *self._activation)

    def forward(self, input: Tensor, ids: Tensor, bias: Tensor | None = None) -> Tensor:
        """``bias``: ``[E, N]``, of a layer that has none of its own."""
        if input.dim() != 2 or input.size(-1) != self.format.in_features:
            raise ValueError(
                f"{self.title()}: input must be [tokens, in_features={self.format.in_features}]: "
                f"got shape {tuple(input.shape)}"
            )
        bias = self.bias if bias is None else bias.reshape(-1)
        if self.dtype is torch.float64:
            return self._in_float64(input, ids, bias)
        y: Tensor = self._op(*self.arguments(input, ids, bias))
        return y

    def _in_float64(self, x: Tensor, ids: Tensor, bias: Tensor | None) -> Tensor:
        if self.format.activations == "float":
            return experts_linear(x, ids, self.dequantize(), None if bias is None else bias.view(self.num_experts, -1))
        y: Tensor = self._op(*self.arguments(x.float(), ids, None)).double()  # x becomes int8
        return y if bias is None else y + _rows_of(bias.view(self.num_experts, -1), ids)

    def expert(self, index: int) -> Layer:
        """One expert as a linear layer, with a copy of its part of the tensors."""
        if not 0 <= index < self.num_experts:
            raise IndexError(f"{self.title()} has the experts 0 to {self.num_experts - 1}: got {index}")
        tensors, format = self.cut(index)
        layer: Layer = layer_class(self.family, "linear")(format, False, self.dtype, "meta")
        layer.store(tensors)
        if self.bias is not None:
            own = self.bias.detach().view(self.num_experts, -1)[index].clone()
            layer.bias = nn.Parameter(own, requires_grad=self.bias.requires_grad)
        return layer.prepare()

    def to_float(self) -> FloatExperts:
        """The same experts with the dequantized weights."""
        bias = None if self.bias is None else nn.Parameter(self.bias.detach().view(self.num_experts, -1))
        return FloatExperts(nn.Parameter(self.dequantize()), bias).train(self.training)

    def extras(self) -> dict[str, Any]:
        return {"num_experts": self.num_experts}

    @classmethod
    def check_extras(cls, bias: bool, extras: dict[str, Any]) -> dict[str, Any]:
        count = extras.pop("num_experts", None)
        check_size("num_experts", count)
        super().check_extras(bias, extras)
        return {"num_experts": count}

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, " + super().extra_repr().replace(
            f"out_features={self.format.out_features}", f"out_features={self.out_features}"
        )


class CodedExperts(ExpertsLayer, CodedLayer):
    """A stack of weights with codes, ``[E*N, K]``: expert e has the rows ``[e*N, (e+1)*N)`` of every stored tensor."""

    @staticmethod
    def stack_rows(format: Any, num_experts: int) -> int:
        rows: int = format.out_features
        if rows % num_experts:
            raise ValueError(f"num_experts must divide the rows of the weight, {rows}: got num_experts={num_experts}")
        return rows

    @staticmethod
    def joined(parts: Sequence[tuple[dict[str, Tensor], Any]]) -> tuple[dict[str, Tensor], Any]:
        return join_rows(parts)

    def cut(self, index: int) -> tuple[dict[str, Tensor], Any]:
        rows = slice(index * self.out_features, (index + 1) * self.out_features)
        held = self.canonical() if self.trained() else self.named_tensors()  # no expert ends inside a block of rows
        tensors = cut_rows(held, self.format, rows)
        nnz = len(tensors["outlier_values"]) if "outlier_values" in tensors else 0
        return tensors, replace(self.format, out_features=self.out_features, outliers=nnz)

    def layouts(self, device: torch.device) -> tuple[Layout, ...]:
        found = super().layouts(device)
        whole = tuple(layout for layout in found if self.out_features % layout.rows_together == 0)
        return whole or (CANONICAL,)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float weights ``[E, N, K]`` that this layer multiplies by, rounded once to ``dtype``."""
        return super().dequantize(dtype).view(self.num_experts, self.out_features, -1)
