"""Rows of W in the stored tensors of a format with codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from lowbit.core.family import FLOAT_DTYPES, dtype_name

NESTED = "scale_absmax"  # of nested scales: an entry for each block of them
NESTED_BLOCK = 256
OUTLIERS = ("outlier_values", "outlier_columns", "outlier_rows")


def row_tensors(format: Any) -> list[str]:
    """The tensors of the weight with an entry for each row of W; not those of outliers, which have one per outlier."""
    n = format.out_features
    mine, longer = (replace(format, out_features=rows, outliers=0).weight_tensors() for rows in (n, n + 1))
    return [name for name, (shape, _) in mine.items() if (shape[0], longer[name][0][0]) == (n, n + 1)]


def _blocks(format: Any, rows: slice) -> slice:
    """Which entries of ``scale_absmax`` are of these rows; raises ``ValueError`` where others share one."""
    first, last = rows.start * format.groups, rows.stop * format.groups
    if first % NESTED_BLOCK or (last % NESTED_BLOCK and rows.stop != format.out_features):
        raise ValueError(f"rows of nested scales must begin and end with a block of {NESTED_BLOCK} of them: "
                         f"got rows {rows.start} to {rows.stop}, G={format.groups}")  # fmt: skip
    return slice(first // NESTED_BLOCK, -(-last // NESTED_BLOCK))


def cut_rows(tensors: dict[str, Tensor], format: Any, rows: slice) -> dict[str, Tensor]:
    """``tensors`` of ``format``, as files have them, of these rows alone: what serves all rows stays as it is.

    What is cut is copied, so that the rest can be freed. Without the tensors of outliers where these rows have none, as
    formats are.
    """
    cut = {name: tensor for name, tensor in tensors.items() if name not in OUTLIERS}
    cut |= {name: tensors[name][rows].clone() for name in row_tensors(format) if name != NESTED}
    if NESTED in tensors:
        cut[NESTED] = tensors[NESTED][_blocks(format, rows)].clone()
    if "outlier_rows" in tensors:
        ends = tensors["outlier_rows"][rows.start : rows.stop + 1]
        first, last = int(ends[0]), int(ends[-1])
        if last > first:
            cut |= {name: tensors[name][first:last].clone() for name in OUTLIERS[:2]}
            cut["outlier_rows"] = ends - ends[0]
    return cut


def join_rows(parts: Sequence[tuple[dict[str, Tensor], Any]]) -> tuple[dict[str, Tensor], Any]:
    """(tensors, format) of weights of one width, one below the other; each as files have it: ``(tensors, format)``.

    Where parts differ in the dtype of scales, tables or outliers, the result has the one that holds all of them.

    Raises:
        ValueError: they differ in more, or in what serves all rows, such as a table per tensor.
    """
    if len(parts) == 1:
        return parts[0]
    parts = [_with_factors(*part) for part in parts]
    first = parts[0][1]
    dtypes = {field.name: _widest([getattr(format, field.name) for _, format in parts]) for field in fields(first)
              if getattr(first, field.name) in FLOAT_DTYPES}  # fmt: skip
    like_first = {"out_features": first.out_features, "outliers": first.outliers, **dtypes}
    for _, format in parts:
        if replace(format, **like_first) != replace(first, **dtypes):
            raise ValueError(f"weights must be of one format to be joined: got {first} and {format}")
    rows = sum(format.out_features for _, format in parts)
    joined = replace(first, **dtypes, out_features=rows, outliers=sum(format.outliers for _, format in parts))
    wanted, by_row, tensors = joined.weight_tensors(), row_tensors(joined), {}
    for name, (_, dtype) in wanted.items():
        if name == "outlier_rows":
            tensors[name] = _joined_ends(parts)
            continue
        held = [part[name].to(dtype) for part, _ in parts if name in part]  # none of outliers where there are none
        if name == NESTED:
            for _, format in parts:
                if format.out_features * format.groups % NESTED_BLOCK:
                    raise ValueError(f"weights must have a multiple of {NESTED_BLOCK} nested scales to be joined: "
                                     f"got N={format.out_features}, G={format.groups}")  # fmt: skip
            tensors[name] = torch.cat(held)
        elif name not in by_row and name not in OUTLIERS:
            if not all(torch.equal(held[0], other) for other in held[1:]):
                raise ValueError(f"weights must have the same {name} to be joined, as it serves all rows")
            tensors[name] = held[0]
        else:
            tensors[name] = torch.cat(held)
    return tensors, joined


def _with_factors(tensors: dict[str, Tensor], format: Any) -> tuple[dict[str, Tensor], Any]:
    """A weight whose rows share a factor of their scales, with one for each row."""
    if not getattr(format, "one_factor", False):
        return tensors, format
    spread = dict(tensors)
    for name in ("scale_factors", "zero_factors"):
        if name in tensors:
            spread[name] = tensors[name].expand(format.out_features, 1).contiguous()
    return spread, replace(format, one_factor=False)


def _widest(names: Sequence[str]) -> str:
    return dtype_name(reduce(torch.promote_types, (FLOAT_DTYPES[name] for name in names)))


def _joined_ends(parts: Sequence[tuple[dict[str, Tensor], Any]]) -> Tensor:
    """The row pointers ``[N + 1]`` of outliers of all parts."""
    device = parts[0][0]["packed"].device
    ends, before = [torch.zeros(1, dtype=torch.int32, device=device)], 0
    for tensors, format in parts:
        own = tensors.get("outlier_rows", torch.zeros(format.out_features + 1, dtype=torch.int32, device=device))
        ends.append(own[1:] + before)
        before += format.outliers
    return torch.cat(ends)
