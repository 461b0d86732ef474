"""The ops of family ``packed``: schemas, reference implementations, fakes and gradients.

``packed_linear`` equals ``F.linear(x, packed_dequantize(...), bias)``; ``packed_embedding`` equals
``F.embedding(ids, packed_dequantize(...))``. With ``int8`` x is quantized first
(:func:`lowbit.backends.reference.quantize_activations`): statically where ``x_scale`` is given, else with a scale per
row, or per row and ``x_group`` columns where that is not 0. The tensors are those of
:class:`lowbit.packed.format.PackedFormat`.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from lowbit.backends import registry
from lowbit.backends.reference import (
    add_outlier_products,
    add_outlier_rows,
    add_outliers,
    check_activations,
    check_codes,
    check_ids,
    codes_of,
    csr_row_indices,
    embedding_weight_gradient,
    outliers_of,
    quantize_activations,
    row_blocks,
    rows_of,
    sum_per_scale,
    unique_ids,
    without_autocast,
)

_OUTLIERS = "Tensor? outlier_values, Tensor? outlier_columns, Tensor? outlier_rows"

library = torch.library.Library("lowbit", "DEF")
library.define(
    "packed_linear(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? bias, "
    f"{_OUTLIERS}, Tensor? x_scale, int bits, int group_size, bool int8, int x_group=0) -> Tensor"
)
library.define(
    f"packed_dequantize(Tensor packed, Tensor scales, Tensor? zeros, {_OUTLIERS}, "
    "int bits, int group_size, int in_features, ScalarType dtype) -> Tensor"
)
library.define(
    f"packed_embedding(Tensor ids, Tensor packed, Tensor scales, Tensor? zeros, {_OUTLIERS}, "
    "int bits, int group_size, int embedding_dim, ScalarType dtype) -> Tensor"
)


def check_weight(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, in_features: int
) -> None:
    """Shapes that must agree, whoever calls; raises through ``torch._check``."""
    check_codes(packed, 2, bits, group_size, in_features)
    groups = -(-in_features // group_size)
    torch._check(
        scales.dim() == 2
        and (scales.shape[0] == packed.shape[0] or scales.shape[0] == 1)
        and scales.shape[1] == groups,
        lambda: f"scales must be [N, {groups}] or [1, 1] for N={packed.shape[0]}, K={in_features}, "
        f"group_size={group_size}: got shape {tuple(scales.shape)}",
    )
    torch._check(scales.is_floating_point(), lambda: f"scales must be floating point: got {scales.dtype}")
    if zeros is not None:
        torch._check(
            zeros.shape == scales.shape,
            lambda: f"zeros must have the shape of scales {tuple(scales.shape)}: got {tuple(zeros.shape)}",
        )


def check_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    x_scale: Tensor | None,
    bits: int,
    group_size: int,
    int8: bool,
    x_group: int,
) -> None:
    """:func:`check_weight` and the activations."""
    check_activations(x)
    k = x.shape[-1]
    check_weight(packed, scales, zeros, bits, group_size, k)
    if x_group == 0:
        return
    torch._check(
        x_group > 0 and x_group % 32 == 0,
        lambda: f"x_group must be 0 (one scale per row of x) or a positive multiple of 32: got x_group={x_group}",
    )
    torch._check(
        int8 and x_scale is None,
        lambda: "x_group is for int8 activations quantized when called: "
        f"got x_group={x_group} with {'x_scale' if int8 else 'int8=False'}",
    )
    torch._check(
        group_size >= k or group_size % x_group == 0 or x_group % group_size == 0,
        lambda: "x_group must divide group_size or be a multiple of it: "
        f"got x_group={x_group}, group_size={group_size}",
    )


def dequantize_rows(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    outlier_values: Tensor | None,
    outlier_columns: Tensor | None,
    outlier_rows: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    """The float32 weight ``[rows, K]`` of ``packed``'s rows, in plain torch: the definition of the format."""
    group = torch.arange(in_features, device=packed.device) // group_size
    weight = _centered(packed, zeros, bits, group) * scales.float()[:, group]
    add_outliers(weight, (outlier_values, outlier_columns, outlier_rows))
    return weight


def _centered(packed: Tensor, zeros: Tensor | None, bits: int, group: Tensor) -> Tensor:
    """``code - zero`` as float32 ``[rows, K]``; ``group[k]`` is the group of column k."""
    zero: Tensor | float = float(1 << (bits - 1)) if zeros is None else zeros.float()[:, group]
    return codes_of(packed, bits, len(group)).float() - zero


@overload
def _rows_of(t: Tensor, rows: slice) -> Tensor: ...
@overload
def _rows_of(t: Tensor | None, rows: slice) -> Tensor | None: ...
def _rows_of(t: Tensor | None, rows: slice) -> Tensor | None:
    """Rows of a ``[N, G]`` tensor; a per-tensor ``[1, 1]`` serves every row."""
    return t if t is None or t.shape[0] == 1 else t[rows]


def _dequantize_block(rows: slice, weight: tuple[Any, ...], bits: int, group_size: int, k: int) -> Tensor:
    packed, scales, zeros, values, columns, pointers = weight
    return dequantize_rows(
        packed[rows], _rows_of(scales, rows), _rows_of(zeros, rows),
        *outliers_of((values, columns, pointers), rows), bits, group_size, k,
    )  # fmt: skip


def _reference_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    outlier_values: Tensor | None,
    outlier_columns: Tensor | None,
    outlier_rows: Tensor | None,
    x_scale: Tensor | None,
    bits: int,
    group_size: int,
    int8: bool,
    x_group: int = 0,
) -> Tensor:
    check_linear(x, packed, scales, zeros, x_scale, bits, group_size, int8, x_group)
    n, k = packed.shape[0], x.shape[-1]
    x_group = x_group if x_group < k else 0
    rows_x = x.reshape(-1, k).float().contiguous()
    y = torch.empty(rows_x.shape[0], n, dtype=x.dtype, device=x.device)
    outliers = (outlier_values, outlier_columns, outlier_rows)
    quantized = quantize_activations(rows_x, x_scale, x_group) if int8 else None
    for rows in row_blocks(n, k):
        with without_autocast(x.device):
            if quantized is not None:
                block = _int8_block(
                    *quantized, packed[rows], _rows_of(scales, rows), _rows_of(zeros, rows), bits, group_size, x_group
                )
                add_outlier_products(block, rows_x, outliers_of(outliers, rows))
            else:
                weight = (packed, scales, zeros, *outliers)
                block = rows_x @ _dequantize_block(rows, weight, bits, group_size, k).t()
        if bias is not None:
            block += bias[rows].float()
        y[:, rows] = block.to(x.dtype)
    return y.view(*x.shape[:-1], n)


def _int8_block(
    q: Tensor,
    inverse: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    x_group: int,
) -> Tensor:
    """Integer dot products (exact in float64) of each run of columns that share a scale of the weight and one of x,
    then ``sum_runs dot * scale / inverse`` in float32; where x has one scale, it divides the sum."""
    q, k = q.double(), q.shape[-1]
    codes = codes_of(packed, bits, k).double()
    y = torch.zeros(q.shape[0], packed.shape[0], dtype=torch.float32, device=q.device)
    size = min(group_size, x_group or k)
    for start in range(0, k, size):
        run, g = slice(start, min(start + size, k)), start // group_size
        zero: Tensor | float = float(1 << (bits - 1)) if zeros is None else zeros[:, g].double()
        dot = q[:, run] @ codes[:, run].t() - q[:, run].sum(-1, keepdim=True) * zero
        part = dot.float() * scales[:, g].float()
        y += part / inverse[:, start // x_group, None] if x_group else part
    return y if x_group else y / inverse


def _reference_dequantize(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    outlier_values: Tensor | None,
    outlier_columns: Tensor | None,
    outlier_rows: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    check_weight(packed, scales, zeros, bits, group_size, in_features)
    weight = (packed, scales, zeros, outlier_values, outlier_columns, outlier_rows)
    out = torch.empty(packed.shape[0], in_features, dtype=dtype, device=packed.device)
    for rows in row_blocks(*out.shape):
        out[rows] = _dequantize_block(rows, weight, bits, group_size, in_features).to(dtype)
    return out


def _reference_embedding(
    ids: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    outlier_values: Tensor | None,
    outlier_columns: Tensor | None,
    outlier_rows: Tensor | None,
    bits: int,
    group_size: int,
    embedding_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    check_ids(ids)
    check_weight(packed, scales, zeros, bits, group_size, embedding_dim)
    unique, position = unique_ids(ids, packed.shape[0])
    dense = dequantize_rows(
        rows_of(packed, unique, bits), scales if scales.shape[0] == 1 else scales[unique],
        zeros if zeros is None or zeros.shape[0] == 1 else zeros[unique],
        None, None, None, bits, group_size, embedding_dim,
    )  # fmt: skip
    add_outlier_rows(dense, unique, (outlier_values, outlier_columns, outlier_rows))
    return dense.to(dtype)[position].view(*ids.shape, embedding_dim)


registry.register_reference(library, "packed_linear", _reference_linear)
registry.register_reference(library, "packed_dequantize", _reference_dequantize)
registry.register_reference(library, "packed_embedding", _reference_embedding)
for _function in ("linear", "dequantize", "embedding"):
    registry.register_triton(library, f"packed_{_function}", "lowbit.packed.triton", _function)


@torch.library.register_fake("lowbit::packed_linear", lib=library)
def _fake_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    outlier_values: Tensor | None,
    outlier_columns: Tensor | None,
    outlier_rows: Tensor | None,
    x_scale: Tensor | None,
    bits: int,
    group_size: int,
    int8: bool,
    x_group: int = 0,
) -> Tensor:
    check_linear(x, packed, scales, zeros, x_scale, bits, group_size, int8, x_group)
    return x.new_empty(*x.shape[:-1], packed.shape[0])


@torch.library.register_fake("lowbit::packed_dequantize", lib=library)
def _fake_dequantize(packed: Tensor, scales: Tensor, zeros: Tensor | None, *rest: Any) -> Tensor:
    *_, bits, group_size, in_features, dtype = rest
    check_weight(packed, scales, zeros, bits, group_size, in_features)
    return packed.new_empty(packed.shape[0], in_features, dtype=dtype)


@torch.library.register_fake("lowbit::packed_embedding", lib=library)
def _fake_embedding(
    ids: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, *rest: Any
) -> Tensor:
    *_, bits, group_size, embedding_dim, dtype = rest
    check_ids(ids)
    check_weight(packed, scales, zeros, bits, group_size, embedding_dim)
    return packed.new_empty(*ids.shape, embedding_dim, dtype=dtype)


# Gradients. dX = dY @ W; for int8 activations this is the straight-through estimator. In blocks of rows of W, so
# that a large dense weight never exists as a whole; with outliers in one block, because cutting a CSR matrix reads
# its row pointers, which a compiled backward cannot.


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scales, zeros, _bias, values, columns, rows, _x_scale, bits, group_size, _int8, _x_group = inputs
    trains_weight = any(ctx.needs_input_grad[i] for i in (2, 3, 5))
    ctx.save_for_backward(x if trains_weight else None, packed, scales, zeros, values, columns, rows)
    ctx.bits, ctx.group_size, ctx.shape = bits, group_size, x.shape


def _linear_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    with without_autocast(grad.device):
        return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, packed, scales, zeros, values, columns, rows = ctx.saved_tensors
    bits, group_size, k = ctx.bits, ctx.group_size, ctx.shape[-1]
    n = packed.shape[0]
    dy = grad.reshape(-1, n)
    grads: list[Tensor | None] = [None] * 13
    if ctx.needs_input_grad[0]:
        dx = torch.zeros(dy.shape[0], k, dtype=torch.float32, device=dy.device)
        for block in row_blocks(n, k) if rows is None else [slice(0, n)]:
            w = torch.ops.lowbit.packed_dequantize(
                packed[block], _rows_of(scales, block), _rows_of(zeros, block),
                values, columns, rows, bits, group_size, k, torch.float32,
            )  # fmt: skip
            dx += dy[:, block].float() @ w
        grads[0] = dx.to(grad.dtype).view(ctx.shape)
    if ctx.needs_input_grad[4]:
        grads[4] = dy.sum(0)
    if x is not None:
        grads[2], grads[3], grads[5] = _weight_gradients(
            ctx, dy.float().t() @ x.reshape(-1, k).float(), [ctx.needs_input_grad[i] for i in (2, 3, 5)]
        )
    return tuple(grads)


def _weight_gradients(ctx: Any, d: Tensor, wanted: list[bool]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """From D, the gradient of W: d scale = sum_group D·(code − zero), d zero = −scale · sum_group D, d outlier =
    D[row, col]."""
    _x, packed, scales, zeros, values, columns, rows = ctx.saved_tensors
    of_scales = of_zeros = of_outliers = None
    group = torch.arange(d.shape[1], device=d.device) // ctx.group_size
    if wanted[0]:
        of_scales = sum_per_scale(d * _centered(packed, zeros, ctx.bits, group), scales, group).to(scales.dtype)
    if wanted[1]:
        of_zeros = (-scales.float() * sum_per_scale(d, scales, group)).to(zeros.dtype)
    if wanted[2]:
        of_outliers = d[csr_row_indices(rows), columns.to(torch.int64)].to(values.dtype)
    return of_scales, of_zeros, of_outliers


def _save_embedding(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, *tensors, ctx.bits, ctx.group_size, _embedding_dim, _dtype = inputs
    ctx.save_for_backward(ids, *tensors)


def _embedding_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    ids, packed, *_ = ctx.saved_tensors
    d = embedding_weight_gradient(ids, grad, packed.shape[0])
    grads: list[Tensor | None] = [None] * 11
    grads[2], grads[3], grads[4] = _weight_gradients(ctx, d, [ctx.needs_input_grad[i] for i in (2, 3, 4)])
    return tuple(grads)


torch.library.register_autograd(
    "lowbit::packed_linear", _linear_gradient, setup_context=_save_linear, lib=library
)
torch.library.register_autograd(
    "lowbit::packed_embedding", _embedding_gradient, setup_context=_save_embedding, lib=library
)
