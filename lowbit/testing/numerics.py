"""The one tolerance rule: every kernel against float64 arithmetic on the exactly dequantized weight.

With u = 2**-24 (float32 accumulation) and e the rounding unit of the output's dtype, element by element

    |y - y64| <= (8 + sqrt(K)) * u * sum_k |x w|  +  e * |y64| + tiny

and over the whole output, ‖y - y64‖ / ‖y64‖ <= 5e-7 + 3e-8 * sqrt(K) in float32, 5e-4 in float16, 4e-3 in bfloat16.
A rounding error per product and per sum, all with one sign, would give K u instead of sqrt(K) u: the bound leaves
no room for a wrong code, scale or zero point. Of any x whatever, however its elements differ in size, kernels promise
sqrt(max(K, 4096)) in place of sqrt(K): float32 x in pieces (csrc/cpu/packed/prepare.h) needs it where W is 0 at the
large elements.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

U = 2.0**-24
OUTPUT_ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float32: 1e-44, torch.float16: 6e-8, torch.bfloat16: 1e-40}


def frobenius_bound(dtype: torch.dtype, k: int) -> float:
    return {torch.float32: 5e-7 + 3e-8 * math.sqrt(k), torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]


def assert_linear_close(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, intermediate: float = 0.0, any_x: bool = False
) -> None:
    """``y`` against float64 ``x @ weight.T + bias``; x and weight hold exactly the values the kernel worked with.

    ``intermediate``: the rounding unit of what lies between two products, where a kernel documents one: an element may
    be off by that much of sum_k |x w| besides. ``any_x``: what is promised of any x whatever, no more.
    """
    x64, w64 = x.double().reshape(-1, x.shape[-1]), weight.double()
    exact, magnitude = x64 @ w64.t(), x64.abs() @ w64.abs().t()
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    k = weight.shape[1]
    y64 = y.double().reshape(exact.shape)
    error = (y64 - exact).abs()
    accumulated = ((8 + math.sqrt(max(k, 4096) if any_x else k)) * U + intermediate) * magnitude
    bound = accumulated + OUTPUT_ROUNDING[y.dtype] * exact.abs() + SMALLEST[y.dtype]
    worst = error - bound
    if y.numel() and not bool((worst <= 0).all()):  # also catches NaN
        at = int(torch.where(worst.isnan(), torch.inf, worst).argmax())
        raise AssertionError(
            f"element {divmod(at, worst.shape[1])}: got {y64.flatten()[at]}, exact {exact.flatten()[at]}, "
            f"error {error.flatten()[at]:.3e} > bound {bound.flatten()[at]:.3e} (K={k}, {y.dtype})"
        )
    norm = float(exact.norm())
    # not where much cancels: a rounding of what cancels then exceeds the bound
    if norm > 0 and float(magnitude.norm()) < 4 * math.sqrt(k) * norm:
        relative = float(error.norm()) / norm
        assert relative <= frobenius_bound(y.dtype, k), (relative, frobenius_bound(y.dtype, k), k, y.dtype)


def assert_bitwise_equal(a: Tensor, b: Tensor) -> None:
    """Same shape, dtype and values (a zero's sign aside), NaNs in the same places."""
    assert a.dtype == b.dtype and a.shape == b.shape, (a.dtype, b.dtype, a.shape, b.shape)
    same = (a == b) | (a.isnan() & b.isnan()) if a.is_floating_point() else a == b
    assert bool(same.all()), f"{int((~same).sum())} of {same.numel()} elements differ"
