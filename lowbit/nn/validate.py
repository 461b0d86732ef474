"""Checks of stored values: finite scales, zeros and indices in range. Each names the layer and the tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.backends.reference import csr_row_indices
from lowbit.core.outliers import column_indices

if TYPE_CHECKING:
    from lowbit.nn.layer import Layer


def require_finite(name: str, tensor_name: str, tensor: Tensor | None) -> None:
    """Raise ``ValueError`` where a stored float tensor holds NaN or infinity."""
    if tensor is not None and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name}.{tensor_name} must be finite: got NaN or infinity")


def require_factors(name: str, tensor_name: str, factors: Tensor | None) -> None:
    """Raise ``ValueError`` where a factor of scales, if any, times a code can be NaN or infinite."""
    require_finite(name, tensor_name, factors)
    if factors is not None and not bool(torch.isfinite(factors.float() * 255).all()):
        raise ValueError(f"{name}.{tensor_name} times 255 must be finite: got infinity")


def require_order(name: str, order: Tensor | None) -> None:
    """Raise ``ValueError`` unless the order of columns, if any, has each of them once."""
    if order is not None and not torch.equal(order.sort().values.long(), torch.arange(len(order), device=order.device)):
        raise ValueError(
            f"{name}.order must have each of 0 to {len(order) - 1} once: "
            f"got values in [{int(order.min())}, {int(order.max())}]"
        )


def require_x_scale(name: str, x_scale: Tensor | None) -> None:
    """Raise ``ValueError`` unless the scale of static activations, if any, is finite and positive."""
    if x_scale is not None and not (bool(torch.isfinite(x_scale).all()) and float(x_scale) > 0):
        raise ValueError(f"{name}.x_scale must be finite and positive: got {float(x_scale)}")


def require_outliers(name: str, layer: Layer) -> None:
    """Raise ``ValueError`` unless the layer's outliers, if any, are finite and a well-formed CSR matrix."""
    values, columns, rows = (layer._buffers.get(f"outlier_{part}") for part in ("values", "columns", "rows"))
    if values is None or columns is None or rows is None:
        return
    require_finite(name, "outlier_values", values)
    pointers = rows.to(torch.int64)
    counts = pointers[1:] - pointers[:-1]
    if int(pointers[0]) != 0 or int(pointers[-1]) != len(values) or bool((counts < 0).any()):
        raise ValueError(
            f"{name}.outlier_rows must rise from 0 to the number of outliers {len(values)}: "
            f"got first {int(pointers[0])}, last {int(pointers[-1])}, smallest step {int(counts.min())}"
        )
    column, k = column_indices(columns), layer.format.in_features
    if bool((column < 0).any()) or bool((column >= k).any()):
        raise ValueError(
            f"{name}.outlier_columns must be in [0, {k}): got values in [{int(column.min())}, {int(column.max())}]"
        )
    position = csr_row_indices(pointers) * k + column
    if bool((position[1:] <= position[:-1]).any()):
        raise ValueError(f"{name}.outlier_columns must increase within each row: they do not")


def require_zeros(name: str, tensor_name: str, zeros: Tensor | None, bits: int) -> None:
    """Raise ``ValueError`` unless the zeros, if any, are finite, or integers that a code can take."""
    require_finite(name, tensor_name, zeros)
    if zeros is not None and not zeros.is_floating_point() and zeros.numel() and int(zeros.max()) >= 1 << bits:
        raise ValueError(
            f"{name}.{tensor_name} must be between 0 and {(1 << bits) - 1} at bits={bits}: got {int(zeros.max())}"
        )
