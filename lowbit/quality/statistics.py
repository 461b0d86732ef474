"""Small statistics: ranks."""

from __future__ import annotations

import math

from torch import Tensor


def ranks(values: Tensor) -> Tensor:
    """The rank of each value ``[n]``, from 0, float64; equal values have the mean of their ranks."""
    _, position, count = values.unique(return_inverse=True, return_counts=True)
    last = count.double().cumsum(0)
    found: Tensor = ((last - count + last - 1) / 2)[position]
    return found


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's: the correlation of the ranks of x and y ``[n]``; NaN where one of them is constant or no number."""
    if bool(x.isnan().any() or y.isnan().any()):
        return math.nan
    a, b = (each - each.mean() for each in (ranks(x), ranks(y)))
    scale = float((a.square().sum() * b.square().sum()).sqrt())
    return float((a * b).sum()) / scale if scale > 0 else math.nan
