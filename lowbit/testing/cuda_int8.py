"""What a product with int8 activations must be, for the tests of the CUDA C++ kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.backends.reference import quantize_activations
from lowbit.packed.operands import PackedActivation
from lowbit.testing.numerics import assert_linear_close
from lowbit.testing.packed_cases import Weight


def assert_int8_close(
    y: Tensor, x: Tensor, weight: Weight, bias: Tensor | None = None, x_scale: Tensor | None = None
) -> None:
    """``y`` against float64 arithmetic on x as it is quantized; outliers meet x as it is."""
    q, inverse = quantize_activations(x, x_scale)
    coded = weight.dense(outliers=False)
    both = torch.cat([q.double() / inverse.double(), x.double()], 1)
    assert_linear_close(y, both, torch.cat([coded, weight.dense() - coded], 1), bias)


def one_integer(weight: Weight) -> bool:
    """Whether an element of ``x @ W.T`` is one exact integer, times scales."""
    return weight.scales.shape[1] == 1 and (weight.zeros is None or weight.zeros.dtype == torch.uint8)


def reference(x: Tensor, weight: Weight, bias: Tensor | None = None, x_scale: Tensor | None = None) -> Tensor:
    return weight.operands.linear(x, bias, PackedActivation(int8=True, x_scale=x_scale))
