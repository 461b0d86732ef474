"""Rows of W in the stored tensors of a format with codes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

OUTLIERS = ("outlier_values", "outlier_columns", "outlier_rows")


def row_tensors(format: Any) -> list[str]:
    """The tensors of the weight with an entry for each row of W; not those of outliers, which have one per outlier."""
    n = format.out_features
    mine, longer = (replace(format, out_features=rows, outliers=0).weight_tensors() for rows in (n, n + 1))
    return [name for name, (shape, _) in mine.items() if (shape[0], longer[name][0][0]) == (n, n + 1)]


def cut_rows(tensors: dict[str, Tensor], format: Any, rows: slice) -> dict[str, Tensor]:
    """``tensors`` of ``format``, as files have them, of these rows alone: what serves all rows stays as it is.

    What is cut is copied, so that the rest can be freed. Without the tensors of outliers where these rows have none, as
    formats are.
    """
    cut = {name: tensor for name, tensor in tensors.items() if name not in OUTLIERS}
    cut |= {name: tensors[name][rows].clone() for name in row_tensors(format)}
    if "outlier_rows" in tensors:
        ends = tensors["outlier_rows"][rows.start : rows.stop + 1]
        first, last = int(ends[0]), int(ends[-1])
        if last > first:
            cut |= {name: tensors[name][first:last].clone() for name in OUTLIERS[:2]}
            cut["outlier_rows"] = ends - ends[0]
    return cut
