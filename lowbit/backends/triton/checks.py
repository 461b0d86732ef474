"""What the kernels of families with packed codes need of their operands beside the shapes that an op's fake checks.

Values are not checked here: that would wait for the GPU. A layer checks them when it is made or loaded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.core.family import FLOAT_DTYPES

_FLOATS = tuple(FLOAT_DTYPES.values())


def check_tensors(device: torch.device, **tensors: Tensor | None) -> None:
    """Every tensor is contiguous and on ``device``."""
    for name, t in tensors.items():
        if t is not None:
            torch._check(
                t.device == device, lambda name=name, t=t: f"{name} must be on {device}, as the rest: got {t.device}"
            )
            torch._check(
                t.is_contiguous(),
                lambda name=name, t=t: f"{name} must be contiguous: got strides {t.stride()}, shape {tuple(t.shape)}",
            )


def check_bias(bias: Tensor | None, n: int) -> None:
    """float ``[N]``."""
    if bias is not None:
        torch._check(tuple(bias.shape) == (n,), lambda: f"bias must be of shape [{n}]: got {list(bias.shape)}")
        torch._check(
            bias.dtype in _FLOATS, lambda: f"bias must be float32, float16 or bfloat16: got {bias.dtype}"
        )


def check_outliers(values: Tensor | None, columns: Tensor | None, rows: Tensor | None, n: int) -> None:
    """All of a CSR matrix of n rows, or none of it."""
    torch._check(
        (values is None) == (columns is None) == (rows is None) and (values is None) == (rows is None),
        lambda: "outlier_values, outlier_columns and outlier_rows must be given together",
    )
    if values is None or columns is None or rows is None:
        return
    torch._check(
        values.dim() == 1 and values.dtype in _FLOATS,
        lambda: f"outlier_values must be float32, float16 or bfloat16 [nnz]: got {values.dtype} {list(values.shape)}",
    )
    torch._check(
        columns.dtype in (torch.uint8, torch.int16, torch.uint16, torch.int32),
        lambda: f"outlier_columns must be int16, uint16, pairs of uint8, or int32: got {columns.dtype}",
    )
    shape = [len(values), 2] if columns.dtype == torch.uint8 else [len(values)]
    torch._check(
        list(columns.shape) == shape,
        lambda: f"outlier_columns must be of shape {shape}: got {list(columns.shape)} of {columns.dtype}",
    )
    torch._check(
        tuple(rows.shape) == (n + 1,), lambda: f"outlier_rows must be of shape [{n + 1}]: got {list(rows.shape)}"
    )
    torch._check(rows.dtype == torch.int32, lambda: f"outlier_rows must be int32: got {rows.dtype}")


def column_numbers(columns: Tensor | None) -> Tensor | None:
    """Columns of outliers as kernels load them: pairs of bytes are uint16."""
    return columns.view(torch.uint16) if columns is not None and columns.dtype == torch.uint8 else columns


def check_x_scale(x_scale: Tensor | None, int8: bool) -> None:
    """float32 ``[1]``, with int8 activations."""
    if x_scale is not None:
        torch._check(int8, lambda: "x_scale is for int8 activations: got int8=False")
        torch._check(
            x_scale.numel() == 1 and x_scale.dtype == torch.float32,
            lambda: f"x_scale must be one float32: got {x_scale.dtype} {list(x_scale.shape)}",
        )
