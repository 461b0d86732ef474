"""The ops of family ``packed``: schemas, reference implementations, fakes and gradients.

``packed_linear`` equals ``F.linear(x, packed_dequantize(...), bias)``; ``packed_embedding`` equals
``F.embedding(ids, packed_dequantize(...))``. The tensors are those of :class:`lowbit.packed.format.PackedFormat`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, overload

import torch
from torch import Tensor

from lowbit import dispatch
from lowbit.bitpack import unpack, words_per_row
from lowbit.layer import FLOAT_DTYPES

_WEIGHTS_AT_ONCE = 1 << 22  # dequantized weights held at a time by the reference: 16 MiB in float32
_OUTLIERS = "Tensor? outlier_values, Tensor? outlier_columns, Tensor? outlier_rows"

library = torch.library.Library("lowbit", "DEF")
library.define(
    "packed_linear(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? bias, "
    f"{_OUTLIERS}, Tensor? x_scale, int bits, int group_size, bool int8) -> Tensor"
)
library.define(
    f"packed_dequantize(Tensor packed, Tensor scales, Tensor? zeros, {_OUTLIERS}, "
    "int bits, int group_size, int in_features, ScalarType dtype) -> Tensor"
)
library.define(
    f"packed_embedding(Tensor ids, Tensor packed, Tensor scales, Tensor? zeros, {_OUTLIERS}, "
    "int bits, int group_size, int embedding_dim, ScalarType dtype) -> Tensor"
)


_ID_DTYPES = (torch.int32, torch.int64)


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Sums are float32 whatever autocast would make of a matmul."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _check_activations(x: Tensor) -> None:
    torch._check(x.dtype in FLOAT_DTYPES.values(), lambda: f"x must be float32, float16 or bfloat16: got {x.dtype}")
    torch._check(x.dim() >= 1, lambda: "x must have at least one dimension [..., K]: got a scalar")


def _check_ids(ids: Tensor) -> None:
    torch._check(ids.dtype in _ID_DTYPES, lambda: f"ids must be int32 or int64: got {ids.dtype}")


def _check_weight(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, in_features: int
) -> None:
    """Shapes that must agree, whoever calls; raises through ``torch._check``."""
    torch._check(2 <= bits <= 8, lambda: f"bits must be between 2 and 8: got bits={bits}")
    torch._check(packed.dim() == 2, lambda: f"packed must be 2-d: got shape {tuple(packed.shape)}")
    torch._check(packed.dtype == torch.int32, lambda: f"packed must be int32: got {packed.dtype}")
    torch._check(
        packed.shape[1] == words_per_row(in_features, bits),
        lambda: f"packed must have ceil(K/32)*bits = {words_per_row(in_features, bits)} words per row "
        f"for K={in_features}, bits={bits}: got {packed.shape[1]}",
    )
    torch._check(
        1 <= group_size <= in_features,
        lambda: f"group_size must be between 1 and K: got group_size={group_size}, K={in_features}",
    )
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
    if outlier_values is not None and outlier_columns is not None and outlier_rows is not None:
        weight += outlier_matrix(outlier_values, outlier_columns, outlier_rows, in_features)
    return weight


def _centered(packed: Tensor, zeros: Tensor | None, bits: int, group: Tensor) -> Tensor:
    """``code - zero`` as float32 ``[rows, K]``; ``group[k]`` is the group of column k."""
    zero: Tensor | float = float(1 << (bits - 1)) if zeros is None else zeros.float()[:, group]
    return unpack(packed, bits, len(group)).float() - zero


def csr_row_indices(rows: Tensor) -> Tensor:
    """The row of every entry of a CSR matrix, from its row pointers."""
    counts = (rows[1:] - rows[:-1]).to(torch.int64)
    return torch.repeat_interleave(torch.arange(len(counts), device=rows.device), counts)


def outlier_matrix(values: Tensor, columns: Tensor, rows: Tensor, in_features: int) -> Tensor:
    """The dense float32 ``[rows, K]`` form of a CSR matrix."""
    dense = torch.zeros(len(rows) - 1, in_features, dtype=torch.float32, device=values.device)
    return dense.index_put_((csr_row_indices(rows), columns.to(torch.int64)), values.float())


def _row_blocks(n: int, k: int) -> Iterator[slice]:
    step = max(1, _WEIGHTS_AT_ONCE // max(k, 1))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


@overload
def _rows_of(t: Tensor, rows: slice) -> Tensor: ...
@overload
def _rows_of(t: Tensor | None, rows: slice) -> Tensor | None: ...
def _rows_of(t: Tensor | None, rows: slice) -> Tensor | None:
    """Rows of a ``[N, G]`` tensor; a per-tensor ``[1, 1]`` serves every row."""
    return t if t is None or t.shape[0] == 1 else t[rows]


def _outliers_of(
    values: Tensor | None, columns: Tensor | None, pointers: Tensor | None, rows: slice
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The same rows of a CSR matrix, as a CSR matrix of its own."""
    if values is None or columns is None or pointers is None:
        return None, None, None
    pointers = pointers[rows.start : rows.stop + 1]
    start, stop = int(pointers[0]), int(pointers[-1])
    return values[start:stop], columns[start:stop], pointers - start


def _dequantize_block(rows: slice, weight: tuple[Any, ...], bits: int, group_size: int, k: int) -> Tensor:
    packed, scales, zeros, values, columns, pointers = weight
    return dequantize_rows(
        packed[rows], _rows_of(scales, rows), _rows_of(zeros, rows),
        *_outliers_of(values, columns, pointers, rows), bits, group_size, k,
    )  # fmt: skip


def quantize_activations(x: Tensor, x_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """float ``[M, K]`` to (q in -127..127 held as float32, float32 inverse scale ``[M, 1]``), ``x ~ q / inverse``.

    ``q = clamp(round(x * inverse), -127, 127)``, halves to even. Dynamic (``x_scale`` None): per row
    ``inverse = 127 * (1 / max|x|)``, rounded as in the quantizer that BitNet models train with; a row with
    ``max|x| < 2**-100`` counts as zero. Static: ``inverse = 1 / x_scale``. A row that holds a NaN (dynamic: or an
    infinity) gets a NaN inverse, so that its output is NaN.
    """
    x = x.float()
    if x_scale is None:
        peak = x.abs().amax(-1, keepdim=True)
        zero = ~(peak >= 2.0**-100)
        inverse = torch.where(zero, 1.0, peak.reciprocal() * 127)
        bad = ~peak.isfinite()
    else:
        inverse = x_scale.float().reshape(1, 1).reciprocal().expand(x.shape[0], 1)
        bad = zero = x.isnan().any(-1, keepdim=True)
    q = torch.where(bad | zero, 0.0, (x * inverse).round().clamp(-127, 127))
    return q, torch.where(bad, torch.nan, inverse)


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
) -> Tensor:
    _check_activations(x)
    n, k = packed.shape[0], x.shape[-1]
    _check_weight(packed, scales, zeros, bits, group_size, k)
    rows_x = x.reshape(-1, k).float().contiguous()
    y = torch.empty(rows_x.shape[0], n, dtype=x.dtype, device=x.device)
    outliers = (outlier_values, outlier_columns, outlier_rows)
    quantized = quantize_activations(rows_x, x_scale) if int8 else None
    for rows in _row_blocks(n, k):
        with _without_autocast(x.device):
            if quantized is not None:
                block = _int8_block(
                    *quantized, packed[rows], _rows_of(scales, rows), _rows_of(zeros, rows), bits, group_size
                )
                values, columns, pointers = _outliers_of(*outliers, rows)
                if values is not None and columns is not None and pointers is not None:
                    block += rows_x @ outlier_matrix(values, columns, pointers, k).t()
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
) -> Tensor:
    """Integer dot products per group (exact in float64), then ``(sum_g scale_g * dot_g) / inverse`` in float32."""
    q, k = q.double(), q.shape[-1]
    codes = unpack(packed, bits, k).double()
    y = torch.zeros(q.shape[0], packed.shape[0], dtype=torch.float32, device=q.device)
    for g, start in enumerate(range(0, k, group_size)):
        group = slice(start, min(start + group_size, k))
        zero: Tensor | float = float(1 << (bits - 1)) if zeros is None else zeros[:, g].double()
        dot = q[:, group] @ codes[:, group].t() - q[:, group].sum(-1, keepdim=True) * zero
        y += dot.float() * scales[:, g].float()
    return y / inverse


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
    _check_weight(packed, scales, zeros, bits, group_size, in_features)
    weight = (packed, scales, zeros, outlier_values, outlier_columns, outlier_rows)
    out = torch.empty(packed.shape[0], in_features, dtype=dtype, device=packed.device)
    for rows in _row_blocks(*out.shape):
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
    _check_ids(ids)
    _check_weight(packed, scales, zeros, bits, group_size, embedding_dim)
    count = packed.shape[0]
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= count):
        bad = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise RuntimeError(f"ids must be in [0, {count}) (num_embeddings={count}): got {bad}")
    unique, position = ids.reshape(-1).to(torch.int64).unique(return_inverse=True)
    dense = dequantize_rows(
        packed[unique], scales if scales.shape[0] == 1 else scales[unique],
        zeros if zeros is None or zeros.shape[0] == 1 else zeros[unique],
        None, None, None, bits, group_size, embedding_dim,
    )  # fmt: skip
    if outlier_values is not None and outlier_columns is not None and outlier_rows is not None:
        for i, row in enumerate(unique.tolist()):
            entry = slice(int(outlier_rows[row]), int(outlier_rows[row + 1]))
            dense[i, outlier_columns[entry].to(torch.int64)] += outlier_values[entry].float()
    return dense.to(dtype)[position].view(*ids.shape, embedding_dim)


dispatch.register_reference(library, "packed_linear", _reference_linear)
dispatch.register_reference(library, "packed_dequantize", _reference_dequantize)
dispatch.register_reference(library, "packed_embedding", _reference_embedding)


@torch.library.register_fake("lowbit::packed_linear", lib=library)
def _fake_linear(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, *rest: Any
) -> Tensor:
    *_, bits, group_size, _int8 = rest
    _check_activations(x)
    _check_weight(packed, scales, zeros, bits, group_size, x.shape[-1])
    return x.new_empty(*x.shape[:-1], packed.shape[0])


@torch.library.register_fake("lowbit::packed_dequantize", lib=library)
def _fake_dequantize(packed: Tensor, scales: Tensor, zeros: Tensor | None, *rest: Any) -> Tensor:
    *_, bits, group_size, in_features, dtype = rest
    _check_weight(packed, scales, zeros, bits, group_size, in_features)
    return packed.new_empty(packed.shape[0], in_features, dtype=dtype)


@torch.library.register_fake("lowbit::packed_embedding", lib=library)
def _fake_embedding(
    ids: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, *rest: Any
) -> Tensor:
    *_, bits, group_size, embedding_dim, dtype = rest
    _check_ids(ids)
    _check_weight(packed, scales, zeros, bits, group_size, embedding_dim)
    return packed.new_empty(*ids.shape, embedding_dim, dtype=dtype)


# Gradients. dX = dY @ W; for int8 activations this is the straight-through estimator. In blocks of rows of W, so
# that a large dense weight never exists as a whole; with outliers in one block, because cutting a CSR matrix reads
# its row pointers, which a compiled backward cannot.


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scales, zeros, _bias, values, columns, rows, _x_scale, bits, group_size, _int8 = inputs
    trains_weight = any(ctx.needs_input_grad[i] for i in (2, 3, 5))
    ctx.save_for_backward(x if trains_weight else None, packed, scales, zeros, values, columns, rows)
    ctx.bits, ctx.group_size, ctx.shape = bits, group_size, x.shape


def _linear_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    with _without_autocast(grad.device):
        return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, packed, scales, zeros, values, columns, rows = ctx.saved_tensors
    bits, group_size, k = ctx.bits, ctx.group_size, ctx.shape[-1]
    n = packed.shape[0]
    dy = grad.reshape(-1, n)
    grads: list[Tensor | None] = [None] * 12
    if ctx.needs_input_grad[0]:
        dx = torch.zeros(dy.shape[0], k, dtype=torch.float32, device=dy.device)
        for block in _row_blocks(n, k) if rows is None else [slice(0, n)]:
            w = torch.ops.lowbit.packed_dequantize(
                packed[block], _rows_of(scales, block), _rows_of(zeros, block),
                values, columns, rows, bits, group_size, k, torch.float32,
            )  # fmt: skip
            dx += dy[:, block].float() @ w
        grads[0] = dx.to(grad.dtype).view(ctx.shape)
    if ctx.needs_input_grad[4]:
        grads[4] = dy.sum(0)
    if x is not None:
        _weight_gradients(ctx, x.reshape(-1, k), dy, grads)
    return tuple(grads)


def _weight_gradients(ctx: Any, x: Tensor, dy: Tensor, grads: list[Tensor | None]) -> None:
    """With D = dYᵀ X: d scale = sum_group D·(code − zero), d zero = −scale · sum_group D, d outlier = D[row, col]."""
    _x, packed, scales, zeros, values, columns, rows = ctx.saved_tensors
    bits, group_size, k = ctx.bits, ctx.group_size, ctx.shape[-1]
    d = dy.float().t() @ x.float()
    group = torch.arange(k, device=d.device) // group_size

    def per_scale(t: Tensor) -> Tensor:
        sums = t.new_zeros(t.shape[0], scales.shape[1]).index_add_(1, group, t)
        return (sums.sum(0, keepdim=True) if scales.shape[0] == 1 else sums)

    if ctx.needs_input_grad[2]:
        grads[2] = per_scale(d * _centered(packed, zeros, bits, group)).to(scales.dtype)
    if ctx.needs_input_grad[3]:
        grads[3] = (-scales.float() * per_scale(d)).to(zeros.dtype)
    if ctx.needs_input_grad[5]:
        grads[5] = d[csr_row_indices(rows), columns.to(torch.int64)].to(values.dtype)


torch.library.register_autograd(
    "lowbit::packed_linear", _linear_gradient, setup_context=_save_linear, lib=library
)
