"""The ops of family ``codebook``: schemas, reference implementations, fakes and gradients.

    w[n, k] = codebook[tn, tg, code[n, k]] (* scale[n, g]) (+ outlier S[n, k]),    g = k // group_size

``codebook_linear`` equals ``F.linear(x, codebook_dequantize(...), bias)``; ``codebook_embedding`` equals
``F.embedding(ids, codebook_dequantize(...))``. Tensors, with G = ceil(K / group_size):

* ``packed`` int32 ``[N, ceil(K/32)*bits]``: the codes, 1 to 8 bits (:mod:`lowbit.core.bitpack`).
* ``codebook`` float: one table per tensor ``[1, 1, 2**bits]``, row ``[N, 1, 2**bits]`` or group ``[N, G, 2**bits]``.
* ``scales`` float ``[N, G]``, optional. Or nested, as in bitsandbytes' double quantization: ``scales`` is uint8 and,
  with ``scale_codebook`` ``[256]``, ``scale_absmax`` ``[ceil(N*G/256)]`` and ``scale_offset`` ``[1]``, all float32,
  ``scale[n, g] = scale_codebook[scales[n, g]] * scale_absmax[(n*G + g) // 256] + scale_offset``.
* ``outlier_values``, ``outlier_columns``, ``outlier_rows``: S in CSR form, optional.

The weight is float32: the product is rounded once, the sum with an outlier once more.
"""

from __future__ import annotations

from typing import Any

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
    unique_ids,
    without_autocast,
)
from lowbit.core.family import FLOAT_DTYPES

_WEIGHT = (
    "Tensor packed, Tensor codebook, Tensor? scales, Tensor? scale_codebook, Tensor? scale_absmax, "
    "Tensor? scale_offset"
)
_OUTLIERS = "Tensor? outlier_values, Tensor? outlier_columns, Tensor? outlier_rows"

library = torch.library.Library("lowbit", "FRAGMENT")
library.define(
    f"codebook_linear(Tensor x, {_WEIGHT}, Tensor? bias, {_OUTLIERS}, Tensor? x_scale, "
    "int bits, int group_size, bool int8, bool mean_gradient) -> Tensor"
)
library.define(
    f"codebook_dequantize({_WEIGHT}, {_OUTLIERS}, int bits, int group_size, int in_features, ScalarType dtype)"
    " -> Tensor"
)
library.define(
    f"codebook_embedding(Tensor ids, {_WEIGHT}, {_OUTLIERS}, "
    "int bits, int group_size, int embedding_dim, ScalarType dtype, bool mean_gradient) -> Tensor"
)

_LARGEST_FIXED = 32767  # int8 activations meet weights of 16 bits


def check_weight(
    bits: int,
    group_size: int,
    in_features: int,
    packed: Tensor,
    codebook: Tensor,
    scales: Tensor | None,
    scale_codebook: Tensor | None,
    scale_absmax: Tensor | None,
    scale_offset: Tensor | None,
) -> None:
    """Shapes and dtypes that must agree, whoever calls; raises through ``torch._check``."""
    check_codes(packed, 1, bits, group_size, in_features)
    n, groups, entries = packed.shape[0], -(-in_features // group_size), 1 << bits
    torch._check(
        codebook.dim() == 3
        and codebook.shape[2] == entries
        and (codebook.shape[1] == 1 or codebook.shape[1] == groups)
        and (codebook.shape[0] == n or (codebook.shape[0] == 1 and codebook.shape[1] == 1)),
        lambda: f"codebook must be [1, 1, {entries}], [N, 1, {entries}] or [N, {groups}, {entries}] for bits={bits}, "
        f"N={n}, K={in_features}, group_size={group_size}: got shape {tuple(codebook.shape)}",
    )
    torch._check(
        codebook.dtype in FLOAT_DTYPES.values(),
        lambda: f"codebook must be float32, float16 or bfloat16: got {codebook.dtype}",
    )
    given = sum(t is not None for t in (scale_codebook, scale_absmax, scale_offset))
    torch._check(given in (0, 3), lambda: "scale_codebook, scale_absmax and scale_offset must be given together")
    torch._check(
        scales is not None or not given,
        lambda: "scales must be given with scale_codebook, scale_absmax and scale_offset",
    )
    if scales is None:
        return
    torch._check(
        scales.dim() == 2 and scales.shape[0] == n and scales.shape[1] == groups,
        lambda: f"scales must be [N, {groups}] for N={n}, K={in_features}, group_size={group_size}: "
        f"got shape {tuple(scales.shape)}",
    )
    if not given:
        torch._check(
            scales.dtype in FLOAT_DTYPES.values(),
            lambda: f"scales must be float32, float16 or bfloat16 without scale_codebook: got {scales.dtype}",
        )
        return
    torch._check(scales.dtype == torch.uint8, lambda: f"scales must be uint8 with scale_codebook: got {scales.dtype}")
    _check_nested("scale_codebook", scale_codebook, 256)
    _check_nested("scale_absmax", scale_absmax, (n * groups + 255) // 256)
    _check_nested("scale_offset", scale_offset, 1)


def _check_nested(name: str, t: Tensor | None, size: int) -> None:
    if t is not None:
        torch._check(
            t.dim() == 1 and t.shape[0] == size, lambda: f"{name} must be of shape [{size}]: got {tuple(t.shape)}"
        )
        torch._check(t.dtype == torch.float32, lambda: f"{name} must be float32: got {t.dtype}")


def scale_values(
    scales: Tensor | None, scale_codebook: Tensor | None, scale_absmax: Tensor | None, scale_offset: Tensor | None
) -> Tensor | None:
    """The float32 scales ``[N, G]``, nested ones decoded: the definition of the nested form."""
    if scales is None or scale_codebook is None or scale_absmax is None or scale_offset is None:
        return None if scales is None else scales.float()
    block = torch.arange(scales.numel(), device=scales.device) // 256
    product = scale_codebook[scales.reshape(-1).to(torch.int64)] * scale_absmax[block]
    return (product + scale_offset).view(scales.shape)


def dequantize_rows(
    packed: Tensor, codebook: Tensor, scale: Tensor | None, bits: int, group_size: int, in_features: int
) -> Tensor:
    """The float32 weight ``[rows, K]`` of ``packed``'s rows without outliers, in plain torch: the format's definition.

    ``codebook`` and ``scale`` (as of :func:`scale_values`) are those of the rows; one table may serve them all.
    """
    weight = _table_values(codebook, _entry(packed, codebook, bits, group_size, in_features))
    return weight if scale is None else weight * scale[:, _groups(packed, group_size, in_features)]


def _groups(packed: Tensor, group_size: int, in_features: int) -> Tensor:
    return torch.arange(in_features, device=packed.device) // group_size


def _entry(packed: Tensor, codebook: Tensor, bits: int, group_size: int, in_features: int) -> Tensor:
    """The entry of each weight among those of its row's tables, int64 ``[rows, K]``."""
    codes = codes_of(packed, bits, in_features).to(torch.int64)
    if codebook.shape[1] == 1:
        return codes
    return codes + (_groups(packed, group_size, in_features) << bits)


def _table_values(codebook: Tensor, entry: Tensor) -> Tensor:
    tables = codebook.float().flatten(1)
    return tables.expand(entry.shape[0], -1).gather(1, entry)


def _tables_of(codebook: Tensor, rows: slice | Tensor) -> Tensor:
    """Rows of a codebook; one table serves every row."""
    return codebook if codebook.shape[0] == 1 else codebook[rows]


def _fixed_point(codebook: Tensor, scale: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``weight`` as integers in -32767..32767 (held as float32) and the float32 step ``[rows, 1]`` of each row.

    ``step = (max_g |scale| * max |entry of the row's tables|) / 32767``, 1 where that is below ``2**-126``;
    ``T = round(weight * (1 / step))``, halves to even.
    """
    peak = codebook.float().abs().amax((1, 2)).expand(weight.shape[0])
    if scale is not None:
        peak = scale.abs().amax(1) * peak
    step = (peak / _LARGEST_FIXED).unsqueeze(1)
    step = torch.where(step < 2.0**-126, 1.0, step)
    return (weight * step.reciprocal()).round().clamp(-_LARGEST_FIXED, _LARGEST_FIXED), step


def _reference_linear(
    x: Tensor,
    packed: Tensor,
    codebook: Tensor,
    scales: Tensor | None,
    scale_codebook: Tensor | None,
    scale_absmax: Tensor | None,
    scale_offset: Tensor | None,
    bias: Tensor | None,
    outlier_values: Tensor | None,
    outlier_columns: Tensor | None,
    outlier_rows: Tensor | None,
    x_scale: Tensor | None,
    bits: int,
    group_size: int,
    int8: bool,
    mean_gradient: bool,
) -> Tensor:
    check_activations(x)
    n, k = packed.shape[0], x.shape[-1]
    nested = (scale_codebook, scale_absmax, scale_offset)
    check_weight(bits, group_size, k, packed, codebook, scales, *nested)
    scale = scale_values(scales, *nested)
    rows_x = x.reshape(-1, k).float().contiguous()
    y = torch.empty(rows_x.shape[0], n, dtype=x.dtype, device=x.device)
    quantized = quantize_activations(rows_x, x_scale) if int8 else None
    for rows in row_blocks(n, k):
        tables, row_scale = _tables_of(codebook, rows), None if scale is None else scale[rows]
        weight = dequantize_rows(packed[rows], tables, row_scale, bits, group_size, k)
        outliers = outliers_of((outlier_values, outlier_columns, outlier_rows), rows)
        with without_autocast(x.device):
            if quantized is not None:
                q, inverse = quantized
                fixed, step = _fixed_point(tables, row_scale, weight)
                sums = q.double() @ fixed.double().t()  # exact
                block = sums.float() * step.t() / inverse
                add_outlier_products(block, rows_x, outliers)
            else:
                add_outliers(weight, outliers)
                block = rows_x @ weight.t()
        if bias is not None:
            block += bias[rows].float()
        y[:, rows] = block.to(x.dtype)
    return y.view(*x.shape[:-1], n)


def _reference_dequantize(
    packed: Tensor,
    codebook: Tensor,
    scales: Tensor | None,
    scale_codebook: Tensor | None,
    scale_absmax: Tensor | None,
    scale_offset: Tensor | None,
    outlier_values: Tensor | None,
    outlier_columns: Tensor | None,
    outlier_rows: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    nested = (scale_codebook, scale_absmax, scale_offset)
    check_weight(bits, group_size, in_features, packed, codebook, scales, *nested)
    scale = scale_values(scales, *nested)
    out = torch.empty(packed.shape[0], in_features, dtype=dtype, device=packed.device)
    for rows in row_blocks(*out.shape):
        tables, row_scale = _tables_of(codebook, rows), None if scale is None else scale[rows]
        weight = dequantize_rows(packed[rows], tables, row_scale, bits, group_size, in_features)
        add_outliers(weight, outliers_of((outlier_values, outlier_columns, outlier_rows), rows))
        out[rows] = weight.to(dtype)
    return out


def _reference_embedding(
    ids: Tensor,
    packed: Tensor,
    codebook: Tensor,
    scales: Tensor | None,
    scale_codebook: Tensor | None,
    scale_absmax: Tensor | None,
    scale_offset: Tensor | None,
    outlier_values: Tensor | None,
    outlier_columns: Tensor | None,
    outlier_rows: Tensor | None,
    bits: int,
    group_size: int,
    embedding_dim: int,
    dtype: torch.dtype,
    mean_gradient: bool,
) -> Tensor:
    check_ids(ids)
    nested = (scale_codebook, scale_absmax, scale_offset)
    check_weight(bits, group_size, embedding_dim, packed, codebook, scales, *nested)
    unique, position = unique_ids(ids, packed.shape[0])
    scale = scale_values(scales, *nested)
    dense = dequantize_rows(
        rows_of(packed, unique, bits), _tables_of(codebook, unique), None if scale is None else scale[unique],
        bits, group_size, embedding_dim,
    )  # fmt: skip
    add_outlier_rows(dense, unique, (outlier_values, outlier_columns, outlier_rows))
    return dense.to(dtype)[position].view(*ids.shape, embedding_dim)


registry.register_reference(library, "codebook_linear", _reference_linear)
registry.register_reference(library, "codebook_dequantize", _reference_dequantize)
registry.register_reference(library, "codebook_embedding", _reference_embedding)
for _function in ("linear", "dequantize", "embedding"):
    registry.register_triton(library, f"codebook_{_function}", "lowbit.codebook.triton", _function)


@torch.library.register_fake("lowbit::codebook_linear", lib=library)
def _fake_linear(x: Tensor, *arguments: Any) -> Tensor:
    weight, (bits, group_size) = arguments[:6], arguments[-4:-2]
    check_activations(x)
    check_weight(bits, group_size, x.shape[-1], *weight)
    return x.new_empty(*x.shape[:-1], weight[0].shape[0])


@torch.library.register_fake("lowbit::codebook_dequantize", lib=library)
def _fake_dequantize(*arguments: Any) -> Tensor:
    weight, (bits, group_size, in_features, dtype) = arguments[:6], arguments[-4:]
    check_weight(bits, group_size, in_features, *weight)
    packed: Tensor = weight[0]
    return packed.new_empty(packed.shape[0], in_features, dtype=dtype)


@torch.library.register_fake("lowbit::codebook_embedding", lib=library)
def _fake_embedding(ids: Tensor, *arguments: Any) -> Tensor:
    weight, (bits, group_size, embedding_dim, dtype) = arguments[:6], arguments[-5:-1]
    check_ids(ids)
    check_weight(bits, group_size, embedding_dim, *weight)
    packed: Tensor = weight[0]
    return packed.new_empty(*ids.shape, embedding_dim, dtype=dtype)


# Gradients. dX = dY @ W; for int8 activations this is the straight-through estimator. In blocks of rows of W, so
# that a large dense weight never exists as a whole; with outliers in one block, because cutting a CSR matrix reads
# its row pointers, which a compiled backward cannot.

_X, _CODEBOOK, _SCALES, _BIAS, _OUTLIER_VALUES, _INPUTS = 0, 2, 3, 7, 8, 16
_TRAINED = (_CODEBOOK, _SCALES, _OUTLIER_VALUES)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *weight, _bias, values, columns, rows, _x_scale, bits, group_size, _int8, mean_gradient = inputs
    trains_weight = any(ctx.needs_input_grad[i] for i in _TRAINED)
    ctx.save_for_backward(x if trains_weight else None, *weight, values, columns, rows)
    ctx.bits, ctx.group_size, ctx.shape, ctx.mean_gradient = bits, group_size, x.shape, mean_gradient


def _linear_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    with without_autocast(grad.device):
        return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, packed, codebook, *scales, values, columns, rows = ctx.saved_tensors
    bits, group_size, k = ctx.bits, ctx.group_size, ctx.shape[-1]
    n = packed.shape[0]
    dy = grad.reshape(-1, n)
    grads: list[Tensor | None] = [None] * _INPUTS
    scale = scale_values(*scales)
    if ctx.needs_input_grad[_X]:
        dx = torch.zeros(dy.shape[0], k, dtype=torch.float32, device=dy.device)
        for block in row_blocks(n, k) if rows is None else [slice(0, n)]:
            w = torch.ops.lowbit.codebook_dequantize(
                packed[block], _tables_of(codebook, block), None if scale is None else scale[block], None, None, None,
                values, columns, rows, bits, group_size, k, torch.float32,
            )  # fmt: skip
            dx += dy[:, block].float() @ w
        grads[_X] = dx.to(grad.dtype).view(ctx.shape)
    if ctx.needs_input_grad[_BIAS]:
        grads[_BIAS] = dy.sum(0)
    if x is not None:
        grads[_CODEBOOK], grads[_SCALES], grads[_OUTLIER_VALUES] = _weight_gradients(
            ctx, dy.float().t() @ x.reshape(-1, k).float(), [ctx.needs_input_grad[i] for i in _TRAINED]
        )
    return tuple(grads)


def _weight_gradients(ctx: Any, d: Tensor, wanted: list[bool]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """From D, the gradient of W: d codebook = sum or mean of D·scale over the weights that use an entry (0 where none
    does), d scale = sum_group D·codebook[code], d outlier = D[row, col]."""
    _x, packed, codebook, scales, *nested, values, columns, rows = ctx.saved_tensors
    n, k = d.shape
    of_codebook = of_scales = of_outliers = None
    scale = scale_values(scales, *nested)
    group = _groups(packed, ctx.group_size, k)
    entry = _entry(packed, codebook, ctx.bits, ctx.group_size, k)

    if wanted[0]:
        scaled = d if scale is None else d * scale[:, group]

        def per_entry(t: Tensor) -> Tensor:
            sums = t.new_zeros(n, codebook.shape[1] * codebook.shape[2]).scatter_add_(1, entry, t)
            return (sums.sum(0, keepdim=True) if codebook.shape[0] == 1 else sums).view(codebook.shape)

        total = per_entry(scaled)
        if ctx.mean_gradient:
            total = total / per_entry(torch.ones_like(d)).clamp(min=1)
        of_codebook = total.to(codebook.dtype)
    if wanted[1]:
        product = d * _table_values(codebook, entry)
        sums = torch.zeros_like(scales, dtype=torch.float32).index_add_(1, group, product)
        of_scales = sums.to(scales.dtype)
    if wanted[2]:
        of_outliers = d[csr_row_indices(rows), columns.to(torch.int64)].to(values.dtype)
    return of_codebook, of_scales, of_outliers


def _save_embedding(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, *tensors, bits, group_size, _embedding_dim, _dtype, mean_gradient = inputs
    ctx.save_for_backward(ids, *tensors)
    ctx.bits, ctx.group_size, ctx.mean_gradient = bits, group_size, mean_gradient


def _embedding_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    ids, packed, *_ = ctx.saved_tensors
    d = embedding_weight_gradient(ids, grad, packed.shape[0])
    grads: list[Tensor | None] = [None] * 15
    wanted = [ctx.needs_input_grad[i] for i in (_CODEBOOK, _SCALES, _OUTLIER_VALUES - 1)]  # no bias in between
    grads[_CODEBOOK], grads[_SCALES], grads[_OUTLIER_VALUES - 1] = _weight_gradients(ctx, d, wanted)
    return tuple(grads)


torch.library.register_autograd(
    "lowbit::codebook_linear", _linear_gradient, setup_context=_save_linear, lib=library
)
torch.library.register_autograd(
    "lowbit::codebook_embedding", _embedding_gradient, setup_context=_save_embedding, lib=library
)
