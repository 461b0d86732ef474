"""The sparse part of a weight: which elements are outliers, and their CSR form.

The functions read the weight through a callable that yields (a float32 ``[rows, K]`` part, its rows), from the
beginning at every call. So their temporaries stay small.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from lowbit.core.family import MAX_INT16_COLUMNS
from lowbit.core.hessian import Left, damped
from lowbit.core.quantizer import Statistics

__all__ = [
    "CSR", "Chunks", "choose_outliers", "column_indices", "column_pairs", "costliest", "first_outliers",
    "float16_holds", "float_chunks", "is_column_pairs", "jointly", "measured_for", "sparse_rest",
]  # fmt: skip

Chunks = Callable[[], Iterator[tuple[Tensor, slice]]]
Fit = TypeVar("Fit")
Made = TypeVar("Made")

_CHUNK = 1 << 22

CSR = tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]  # values, columns, row pointers


def column_pairs(columns: Tensor) -> Tensor:
    """Columns ``[nnz]`` of 16 bits as uint8 ``[nnz, 2]``, the low byte first: the dtype that collectives know.

    Other columns are returned as they are.
    """
    return columns.view(torch.uint8).view(-1, 2) if columns.dim() == 1 and columns.dtype.itemsize == 2 else columns


def is_column_pairs(columns: Tensor) -> bool:
    """Whether these are :func:`column_pairs`."""
    return columns.dtype == torch.uint8 and columns.dim() == 2


def column_indices(columns: Tensor) -> Tensor:
    """int64 ``[nnz]``: the columns of a CSR matrix, whatever holds them: ``uint8 [nnz, 2]`` is the two bytes of each,
    the low one first."""
    if columns.dtype != torch.uint8:
        return columns.to(torch.int64)
    torch._check(
        columns.dim() == 2 and columns.shape[1] == 2,
        lambda: f"outlier_columns of uint8 must be of shape [nnz, 2]: got {list(columns.shape)}",
    )
    low, high = columns.to(torch.int64).unbind(1)
    return low | high << 8


def float_chunks(weight: Tensor, size: int) -> Iterator[tuple[Tensor, slice]]:
    """The weight ``[N, K]`` in float32, about ``size`` elements at a time."""
    n, k = weight.shape
    step = max(1, size // k)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        yield weight[rows].float(), rows


def float16_holds(values: Tensor) -> bool:
    """Whether all values are positive normal numbers of float16: rounding to it then keeps its full precision."""
    limits = torch.finfo(torch.float16)
    return bool(((values >= limits.tiny) & (values <= limits.max)).all())


def measured_for(spec: Any) -> frozenset[str]:
    """The fields of :class:`~lowbit.core.quantizer.Statistics` with which outliers are chosen better."""
    by_cost = spec.outliers and spec.outliers_by == "sensitivity"
    return frozenset({"hessian", "sensitivity"}) if by_cost else frozenset()


def first_outliers(spec: Any, chunks: Chunks, n: int, k: int) -> Tensor | None:
    """bool ``[N, K]``: the outliers that are chosen before anything is fitted; ``None`` without outliers.

    They are the weights of largest magnitude, or those that ``spec.seed`` gives. With ``"sensitivity"`` too: grids and
    tables are fitted without the largest, and then :func:`costliest` chooses.
    """
    count = round(spec.outliers * n * k)
    if spec.outliers_by != "random":
        return choose_outliers(chunks, n, k, count)

    def numbers() -> Iterator[tuple[Tensor, slice]]:
        generator = torch.Generator("cpu").manual_seed(spec.seed)
        for w, rows in chunks():
            yield torch.rand(w.shape, generator=generator, device="cpu").to(w.device), rows

    return choose_outliers(numbers, n, k, count)


def costliest(spec: Any, rest: Chunks, statistics: Statistics, n: int, k: int) -> Tensor | None:
    """bool ``[N, K]``: the outliers whose rounding costs most, ``h * rest**2``; ``rest``: weight - rounded.

    h is the mean square of the weight's gradient (the diagonal of the Fisher information: SqueezeLLM, Kim et al.,
    arXiv 2306.07629), else that of its input (the diagonal of the Hessian), else 1, as far as it was measured. With the
    same grid no other choice leaves a smaller sum of costs.
    """
    h = statistics.sensitivity
    if h is None and statistics.hessian is not None:
        h = statistics.hessian.diagonal().unsqueeze(0)
    h = None if h is None else damped(h)
    root = None if h is None else h.sqrt_()  # the square of a small rest is no float32

    def costs() -> Iterator[tuple[Tensor, slice]]:
        for difference, rows in rest():
            yield difference if root is None else difference * (root if len(root) == 1 else root[rows]), rows

    return choose_outliers(costs, n, k, round(spec.outliers * n * k))


def jointly(
    fit: Fit, first: tuple[Made, Left], again: Callable[[Fit], tuple[Made, Left]], turns: int
) -> tuple[Fit, Made]:
    """Outliers chosen by what weights leave once others make up for it, in turns with the rest: (fit, what was made)
    of least error.

    ``first``: what was made with ``fit.outliers``, those of :func:`costliest`, and what error feedback left of it. In
    each turn as many weights become the outliers, those of the largest terms, whether they were or not (SpQR's
    criterion: the squared error over (H^-1)[j, j]; Dettmers et al., arXiv 2306.03078). ``again(fit)`` then makes
    grids or tables without them, and codes; its ``fit`` is a shallow copy.
    """
    mask: Tensor = fit.outliers  # type: ignore[attr-defined]
    (n, k), count = mask.shape, int(mask.count_nonzero())
    (made, left), best = first, (fit, first[0])
    least = left.error
    for _ in range(turns):
        fit = copy.copy(fit)
        terms = partial(float_chunks, left.terms, _CHUNK)
        fit.outliers = choose_outliers(terms, n, k, count)  # type: ignore[attr-defined]
        made, left = again(fit)
        if left.error < least:
            best, least = (fit, made), left.error
    return best


def choose_outliers(chunks: Chunks, n: int, k: int, count: int) -> Tensor | None:
    """bool ``[N, K]``: exactly the ``count`` elements of largest magnitude; among equal ones the first. 0: ``None``."""
    if count == 0:
        return None
    # Radix select: for non-negative floats the order of the bits is the order of the values.
    high, above = _select(chunks, lambda bits: bits >> 16, 1 << 15, count)
    low, above = _select(
        chunks, lambda bits: torch.where(bits >> 16 == high, bits & 0xFFFF, -1), 1 << 16, count - above, above
    )
    threshold = (high << 16) | low
    ties = count - above
    mask: Tensor | None = None
    for w, rows in chunks():
        if mask is None:
            mask = torch.empty(n, k, dtype=torch.bool, device=w.device)
        bits = w.abs().view(torch.int32)
        mask[rows] = bits > threshold
        if ties:
            equal = (bits == threshold).flatten().nonzero().flatten()[:ties]
            mask[rows].view(-1)[equal] = True
            ties -= equal.numel()
    return mask


def _select(
    chunks: Chunks, digit: Callable[[Tensor], Tensor], buckets: int, count: int, above: int = 0
) -> tuple[int, int]:
    """(bucket of the count-th largest magnitude, ``above`` + the number of weights in higher buckets)."""
    histogram: Tensor | int = 0
    for w, _ in chunks():
        found = digit(w.abs().view(torch.int32)).flatten()
        histogram = histogram + torch.bincount(found[found >= 0], minlength=buckets)
    assert isinstance(histogram, Tensor)
    at_least = histogram.flip(0).cumsum(0).flip(0)
    bucket = int((at_least >= count).nonzero().max())
    return bucket, above + int(at_least[bucket] - histogram[bucket])


def sparse_rest(rest: Chunks, mask: Tensor | None) -> CSR:
    """CSR of S = ``rest``, the weight minus its dense part, where ``mask`` is set; values float16 where these fit."""
    if mask is None:
        return None, None, None
    n, k = mask.shape
    ends = torch.zeros(n + 1, dtype=torch.int64, device=mask.device)
    step = max(1, (1 << 22) // k)
    for start in range(0, n, step):  # the sum of a bool tensor would first copy all of it to int64
        ends[start + 1 : start + step + 1] = mask[start : start + step].sum(1)
    ends = ends.cumsum(0)
    # Filled in place: small results kept between large temporaries would fragment the heap.
    values = torch.empty(int(ends[-1]), dtype=torch.float32, device=mask.device)
    columns = torch.empty(len(values), dtype=torch.int32, device=mask.device)
    for difference, rows in rest():
        found = slice(int(ends[rows.start]), int(ends[rows.stop]))
        values[found] = difference[mask[rows]]
        columns[found] = mask[rows].nonzero()[:, 1].int()
    fits = bool((values.abs() <= torch.finfo(torch.float16).max).all())
    return (
        values.to(torch.float16) if fits else values,
        columns.to(torch.int16) if k <= MAX_INT16_COLUMNS else columns,
        ends.to(torch.int32),
    )
