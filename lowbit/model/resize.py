"""A packed layer with more rows of W, or fewer: the rows that it keeps stay as they are stored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.codebook.format import Codebook, CodebookFormat
from lowbit.core.bitpack import pack, pack_bytes
from lowbit.core.family import FLOAT_DTYPES, Format
from lowbit.nn.coded import CodedLayer
from lowbit.nn.layer import Layer, LayerConfig, make_trainable
from lowbit.nn.rows import OUTLIERS, cut_rows, row_tensors
from lowbit.packed.format import CODE_DTYPES, Packed, PackedFormat

FACTORS = ("scale_factors", "zero_factors")


@torch.no_grad()
def resized(layer: Layer, rows: Tensor, bias: nn.Parameter | None, padding_idx: int | None = None) -> Layer | None:
    """A layer of the form of ``layer`` with ``len(rows)`` rows of W: its own first ones bit for bit, then of ``rows``.

    Args:
        layer: N rows.
        rows: float ``[M, K]``; rows N to M are compressed in the form of ``layer``, without outliers.
        bias: float ``[M]``, the new layer's.
        padding_idx: of an embedding.

    Returns ``None`` for a form whose rows do not stand for themselves: Kronecker factors, nested scales; with M > N
    also one scale, or one learned table, for the whole tensor.
    """
    if not isinstance(layer, CodedLayer):
        return None
    n, m, of_rows = layer.format.out_features, len(rows), row_tensors(layer.format)
    shared = _shared(layer.format)
    if not layer.format.weight_tensors().keys() <= {*of_rows, *shared, *OUTLIERS}:
        return None
    one_scale = isinstance(layer.format, PackedFormat) and shared != FACTORS
    if m > n and shared and (one_scale or getattr(layer.format, "scales", "") == "none"):
        return None
    tensors = layer.canonical()
    stored = cut_rows(tensors, layer.format, slice(0, min(n, m)))
    format: Any = replace(layer.format, out_features=m, outliers=len(stored.get("outlier_values", ())))
    if m > n:
        added = _compressed(rows[n:], replace(format, out_features=m - n, outliers=0), tensors)
        stored |= {name: torch.cat([stored[name], added[name]]) for name in of_rows}
        if format.outliers:
            stored["outlier_rows"] = nn.functional.pad(stored["outlier_rows"], (0, m - n), value=format.outliers)
    config = LayerConfig.of(layer)
    extras = dict(config.extras)
    if layer.kind == "embedding":
        extras = {**extras, "padding_idx": padding_idx}
    new = replace(config, format=format, extras=extras).build(layer.dtype)
    new.store({name: tensor.clone() for name, tensor in stored.items()})
    new.bias = bias
    if names := layer.trained():
        make_trainable(new, *names)
    new.note = layer.note
    new.validate()
    return new.train(layer.training).prepare()


def _shared(format: Any) -> tuple[str, ...]:
    """What serves all rows."""
    if getattr(format, "one_factor", False):
        return FACTORS
    if format.granularity != "tensor":
        return ()
    return ("scales", "zeros") if isinstance(format, PackedFormat) else ("codebook",)


def _compressed(rows: Tensor, format: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of float ``rows`` in ``format``; a table that serves the whole tensor is the one in ``tensors``."""
    made = _spec(format, tensors).quantize(rows.float())
    found: dict[str, Tensor] = {**made.tensors(), "codes": made.codes}
    if isinstance(format, PackedFormat):
        if format.zeros == "minimum" and "zeros" not in _shared(format):
            found["zeros"] = found["zeros"].float() * found["scales"].float()
        if format.scale_block is not None:
            given = tensors if format.one_factor else {}
            found["scales"], found["scale_factors"] = _two_levels(
                found["scales"], format, format.scale_codes or "", given.get("scale_factors")
            )
            if format.zeros == "minimum":
                found["zeros"], found["zero_factors"] = _two_levels(
                    found["zeros"], format, "uint8", given.get("zero_factors")
                )
    for name, (_, dtype) in format.weight_tensors().items():
        if name == "packed":
            continue
        if name in _shared(format):
            found[name] = tensors[name]
        elif found[name].dtype != dtype:  # values that did not fit: the largest and smallest ones that do
            limits = torch.finfo(dtype)
            low = limits.smallest_normal if name == "scales" else limits.min
            found[name] = found[name].clamp(low, limits.max).to(dtype)
    found["packed"] = pack(_nearest(rows.float(), format, found), format.bits)
    if getattr(format, "packed_zeros", False):
        found["zeros"] = pack_bytes(found["zeros"], format.bits)
    return found


def _two_levels(values: Tensor, format: PackedFormat, kind: str, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    """uint8 or int8 (``kind``) codes of ``values [M, G]``, and their factors, given or their own; no negative ones."""
    assert format.scale_block is not None
    values, block = values.float(), format.scale_block
    top = 127 if kind == "int8" else 255
    if factors is None:
        of_blocks = [part.amax(1).clamp(min=0) / top for part in values.split(block, 1)]
        factors = torch.stack(of_blocks, 1).clamp(max=torch.finfo(FLOAT_DTYPES[format.scale_dtype]).max)
        factors = factors.to(FLOAT_DTYPES[format.scale_dtype])
    spread = factors.float().repeat_interleave(block, 1)[:, : values.shape[1]]
    codes = (values / torch.where(spread == 0, 1.0, spread)).round().clamp(0, top)
    return codes.to(CODE_DTYPES[kind]), factors


def _spec(format: Format, tensors: dict[str, Tensor]) -> Any:
    """The spec that gives ``format``."""
    if isinstance(format, PackedFormat):
        return Packed(
            bits=format.bits,
            group_size=format.group_size if format.granularity == "group" else None,
            granularity=format.granularity,
            symmetric=format.zeros == "none",
            zeros={"none": "int", "minimum": "float"}.get(format.zeros, format.zeros),  # type: ignore[arg-type]
            quantizer="minmax",
            scale_dtype=FLOAT_DTYPES[format.scale_dtype],
        )
    assert isinstance(format, CodebookFormat)
    has_scales, is_shared = format.scales != "none", format.granularity == "tensor"
    in_groups = format.granularity == "group" or (has_scales and format.group_size != format.in_features)
    return Codebook(
        bits=format.bits,
        granularity=format.granularity,
        group_size=format.group_size if in_groups else None,
        table=tensors["codebook"].flatten().tolist() if is_shared else None,
        scales=has_scales,
        codebook_dtype=FLOAT_DTYPES[format.codebook_dtype],
        scale_dtype=FLOAT_DTYPES.get(format.scales),
    )


def _times(codes: Tensor, factors: Tensor, block: int) -> Tensor:
    """Scales of two levels, float32 ``[M, G]``."""
    return codes.float() * factors.float().repeat_interleave(block, 1)[:, : codes.shape[1]]


def _nearest(rows: Tensor, format: Any, found: dict[str, Tensor]) -> Tensor:
    """uint8 ``[M, K]``: the code of the nearest value, for scales and tables as they are stored."""
    m, k = rows.shape
    column = torch.arange(k, device=rows.device) // format.group_size

    def spread(values: Tensor) -> Tensor:  # [1 or M, 1 or G, ...] to [M, K, ...]
        of_columns = values[:, column] if values.shape[1] > 1 else values.expand(-1, k, *values.shape[2:])
        return of_columns.float().expand(m, k, *values.shape[2:])

    if isinstance(format, PackedFormat):
        half = torch.full((1, 1), float(1 << (format.bits - 1)), device=rows.device)
        zeros = spread(found.get("zeros", half))
        low = 1.0 if format.zeros == "none" else 0.0  # symmetric levels are -n..n
        scales = found["scales"]
        if format.scale_block is not None:
            scales = _times(scales, found["scale_factors"], format.scale_block)
        if format.zeros == "minimum":
            minima = found["zeros"]
            if "zero_factors" in found and format.scale_block is not None:
                minima = _times(minima, found["zero_factors"], format.scale_block)
            rows, zeros = rows + spread(minima), torch.zeros_like(half)
        scales = spread(scales)
        codes = rows.div(torch.where(scales == 0, 1.0, scales)).add_(zeros).round_()
        return codes.clamp_(low, (1 << format.bits) - 1).to(torch.uint8)
    if format.scales != "none":
        scales = spread(found["scales"])
        rows = rows / torch.where(scales == 0, 1.0, scales)
    codes = torch.empty(m, k, dtype=torch.uint8, device=rows.device)
    for i in range(m):  # one row at a time: [K, 2**bits] distances
        tables = found["codebook"][i if len(found["codebook"]) > 1 else 0]  # [1 or G, 2**bits]
        table = tables[column] if len(tables) > 1 else tables
        codes[i] = (rows[i, :, None] - table.float()).abs().argmin(-1).to(torch.uint8)
    return codes
