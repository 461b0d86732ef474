"""What the linear layers of every family share."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from lowbit.core.activations import ActivationSpec
from lowbit.core.family import Spec, Weight, check_spec
from lowbit.nn.call import traced
from lowbit.nn.layer import Layer


class LinearLayer(Layer):
    """``y = x @ W.T + bias``: input ``[..., K]`` in float32, float16 or bfloat16, output ``[..., N]`` in its dtype.

    After ``.double()`` input and output are float64: the product with the dequantized weight, exact but not fast.
    """

    kind = "linear"
    whole: tuple[int, int] | None = None  # [N, K] of the layer that this one is a share of: see lowbit.nn.shard
    _activation: tuple[Any, ...]  # the activation's numbers, in the op's order
    _gathers = False  # whether the columns of W are in another order than the features of x
    order: Tensor | None

    def _derive(self) -> None:
        super()._derive()
        activation = self.operands_class.activation
        self._activation = () if activation is None else activation.numbers_of(self.format.activation)
        self._in_features = self.format.in_features
        self._gathers = getattr(self.format, "act_order", False)

    @property
    def in_features(self) -> int:
        return cast(int, self.format.in_features if self.whole is None else self.whole[1])

    @property
    def out_features(self) -> int:
        return cast(int, self.format.out_features if self.whole is None else self.whole[0])

    @classmethod
    def from_float(
        cls,
        weight: Tensor,
        spec: Spec,
        bias: Tensor | None = None,
        *,
        hessian: Tensor | None = None,
        x_scale: Tensor | None = None,
    ) -> Any:
        """Quantize a float weight ``[N, K]`` with ``spec``; the bias is kept as it is.

        Raises ``ValueError`` when the spec does not fit the weight, or needs calibration that is not given;
        ``TypeError`` for what is no spec of this family.
        """
        check_spec(spec, cls.family)
        if problem := spec.problem(*weight.shape):
            raise ValueError(problem)
        stored = spec.quantize(weight, hessian=hessian)
        return cls.from_weight(stored, bias, **asdict(spec.activation), x_scale=x_scale, dtype=weight.dtype)

    @classmethod
    def from_weight(
        cls,
        weight: Weight,
        bias: Tensor | None = None,
        *,
        x_scale: Tensor | None = None,
        dtype: torch.dtype | None = None,
        **activation: Any,
    ) -> Any:
        """A layer that holds ``weight`` as it is; nothing is rounded again.

        ``activation``: the fields of :class:`lowbit.core.activations.ActivationSpec`. ``activations="int8_static"``
        needs ``x_scale``, the calibrated scale of the input.
        """
        format = weight.format().with_activation(ActivationSpec(**activation))
        layer = cls(format, bias is not None, dtype, "meta")
        layer.store(weight.tensors())
        if "x_scale" in format.tensors():
            if x_scale is None:
                raise ValueError("activations='int8_static' needs x_scale, the calibrated scale of the input")
            layer.store({"x_scale": x_scale.detach().reshape(1).float()})
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        layer.validate()
        return layer.prepare()

    def arguments(self, x: Tensor) -> tuple[Any, ...]:
        """The arguments of the op for ``x``."""
        t, activation = self.operands(), self.operands_class.activation
        own = () if activation is None else activation.tensor_names
        return (self.gathered(x), *self.weight_arguments(t), self.bias, *(t[name] for name in own), *self._activation)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return traced(self, input)
        if not input.dim() or input.size(-1) != self._in_features:
            found = tuple(input.shape)
            required = f"input must have in_features={self._in_features} as its last size"
            raise ValueError(f"{self.title()}: {required}: got shape {found}")
        parameters = self._parameters
        bias = parameters["bias"] if parameters else self.bias  # a replica in nn.DataParallel has attributes only
        if self.dtype is torch.float64:
            return self._in_float64(input, bias)
        return self.product(input, bias)

    def product(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """``input @ W.T + bias`` by the op, for an input that is known to fit."""
        if self._gathers:
            input = self.gathered(input)
        try:
            return self._call(input, self.operands(), bias, self._activation)
        except RuntimeError:
            if not self._is_outdated():
                raise
        return self._call(input, self.operands(), bias, self._activation)

    def gathered(self, x: Tensor) -> Tensor:
        """``x`` with its features in the order of the columns of W."""
        if not self._gathers or self.order is None:
            return x
        if isinstance(x, Tensor) and x.is_cpu and x.dtype.itemsize == 2:  # each where it takes the least time
            if not torch.compiler.is_compiling() and x.numel() == self._in_features:
                return x.reshape(-1).index_select(0, self.order).view(x.shape)
            return x.gather(-1, self.order.long().expand(x.shape))
        return x.index_select(-1, self.order)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        weight = super().dequantize(dtype)
        return weight.index_select(1, self.order.argsort()) if self._gathers and self.order is not None else weight

    def _in_float64(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.format.activations == "float":
            return nn.functional.linear(x, self.dequantize(), bias)
        y = self.product(x.float(), None).double()  # x becomes int8
        return y if bias is None else y + bias

    def to_float(self) -> nn.Linear:
        """``nn.Linear`` with the dequantized weight and the same bias."""
        linear = nn.Linear(self.in_features, self.out_features, False, device="meta", dtype=self.dtype)
        linear.weight = nn.Parameter(self.dequantize())
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)
