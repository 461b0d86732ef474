"""What the reference implementations of the families with packed codes share: plain torch, any device.

Checks raise through ``torch._check``, so that they serve fakes as well. A sparse outlier matrix is in CSR form:
``values`` and ``columns`` of every entry, row after row, and ``pointers`` to the first entry of each row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lowbit.backends.layouts import rows_together
from lowbit.core.family import FLOAT_DTYPES
from lowbit.core.outliers import column_indices

Outliers = tuple[Tensor | None, Tensor | None, Tensor | None]

WEIGHTS_AT_ONCE = 1 << 22  # dequantized weights held at a time by a reference: 16 MiB in float32
_ID_DTYPES = (torch.int32, torch.int64)


_AUTOCAST: Any = torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
for _name, _key in torch._C.DispatchKey.__members__.items():
    if _name.startswith("Autocast"):
        _AUTOCAST = _AUTOCAST | torch._C.DispatchKeySet(_key)


def without_autocast() -> AbstractContextManager[Any]:
    """Sums are float32 whatever autocast would make of a matmul.

    An object of C++: however a ``with`` block ends, even by an exception from a signal, autocast is as it was.
    """
    guard: Any = torch._C._ExcludeDispatchKeyGuard
    return guard(_AUTOCAST)  # type: ignore[no-any-return]


def check_activations(x: Tensor) -> None:
    torch._check(x.dtype in FLOAT_DTYPES.values(), lambda: f"x must be float32, float16 or bfloat16: got {x.dtype}")
    torch._check(x.dim() >= 1, lambda: "x must have at least one dimension [..., K]: got a scalar")


def sum_per_scale(t: Tensor, scales: Tensor, group: Tensor) -> Tensor:
    """``t [N, K]`` summed over the weights that share a scale, in the shape of ``scales``; ``group[k]``: column k's."""
    sums = t.new_zeros(t.shape[0], scales.shape[1]).index_add_(1, group, t)
    return sums.sum(0, keepdim=True) if scales.shape[0] == 1 else sums


def embedding_weight_gradient(ids: Tensor, grad: Tensor, n: int) -> Tensor:
    """The gradient ``[n, K]`` of a weight whose rows were gathered: float32, as dense as ``F.embedding``'s."""
    rows = grad.reshape(-1, grad.shape[-1]).float()
    return rows.new_zeros(n, rows.shape[1]).index_add_(0, ids.reshape(-1), rows)


def check_ids(ids: Tensor) -> None:
    torch._check(ids.dtype in _ID_DTYPES, lambda: f"ids must be int32 or int64: got {ids.dtype}")


def unique_ids(ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The distinct ids, sorted, and each id's place among them; raises when one is not in ``[0, count)``."""
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= count):
        bad = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise RuntimeError(f"ids must be in [0, {count}) (num_embeddings={count}): got {bad}")
    unique, position = ids.reshape(-1).to(torch.int64).unique(return_inverse=True)
    return unique, position


def row_ranges(n: int, k: int, parts: int = 1) -> Iterator[slice]:
    """Ranges of rows of an ``[n, k]`` weight that are small enough to be dequantized: packed codes may be cut there.
    None has more than its share of so many ``parts``, unless no cut is possible."""
    whole = rows_together()
    most = min(WEIGHTS_AT_ONCE // max(k, 1), n // parts)
    step = max(whole, most // whole * whole)
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def csr_row_indices(pointers: Tensor, entries: int | None = None) -> Tensor:
    """The row of every entry of a CSR matrix, from its row pointers; ``entries``: how many there are, where a graph has
    to know that without looking."""
    counts = (pointers[1:] - pointers[:-1]).to(torch.int64)
    rows = torch.arange(len(counts), device=pointers.device)
    return torch.repeat_interleave(rows, counts, output_size=entries)


def csr_places(columns: Tensor, pointers: Tensor, in_features: int) -> Tensor:
    """The place of every entry of a CSR matrix in the dense one, flattened."""
    return csr_row_indices(pointers, len(columns)) * in_features + column_indices(columns)


def outlier_matrix(values: Tensor, columns: Tensor, pointers: Tensor, in_features: int) -> Tensor:
    """The dense float32 ``[rows, K]`` form of a CSR matrix."""
    rows = len(pointers) - 1
    places = csr_places(columns, pointers, in_features)
    dense = values.new_zeros(rows * in_features, dtype=torch.float32).index_add(0, places, values.float())
    return dense.view(rows, in_features)


def outliers_of(outliers: Outliers, rows: slice) -> Outliers:
    """Rows of a CSR matrix, as a CSR matrix of its own."""
    values, columns, pointers = outliers
    if values is None or columns is None or pointers is None:
        return None, None, None
    pointers = pointers[rows.start : rows.stop + 1]
    start, stop = int(pointers[0]), int(pointers[-1])
    return values[start:stop], columns[start:stop], pointers - start


def add_outliers(weight: Tensor, outliers: Outliers) -> None:
    """``weight += S``, in place."""
    values, columns, pointers = outliers
    if values is not None and columns is not None and pointers is not None:
        weight += outlier_matrix(values, columns, pointers, weight.shape[1])


def add_outlier_products(y: Tensor, x: Tensor, outliers: Outliers) -> None:
    """``y += x @ S.T``, in place."""
    values, columns, pointers = outliers
    if values is not None and columns is not None and pointers is not None:
        y += x @ outlier_matrix(values, columns, pointers, x.shape[1]).t()


def add_outlier_rows(dense: Tensor, rows: Tensor, outliers: Outliers) -> None:
    """``dense[i] += S[rows[i]]``, in place."""
    values, columns, pointers = outliers
    if values is None or columns is None or pointers is None:
        return
    for i, row in enumerate(rows.tolist()):
        entry = slice(int(pointers[row]), int(pointers[row + 1]))
        dense[i, column_indices(columns[entry])] += values[entry].float()


def quantize_activations(x: Tensor, x_scale: Tensor | None, group_size: int = 0) -> tuple[Tensor, Tensor]:
    """float ``[M, K]`` to (q in -127..127 held as float32, float32 inverse scale ``[M, 1]``), ``x ~ q / inverse``.

    With a ``group_size`` every group of that many columns (the last may be shorter) is a row of its own, dynamic:
    inverse is ``[M, ceil(K / group_size)]``.

    ``q = clamp(round(x * inverse), -127, 127)``, halves to even. Dynamic (``x_scale`` None): per row
    ``inverse = 127 * (1 / max|x|)``, rounded as in the quantizer that BitNet models train with; a row with
    ``max|x| < 2**-100`` counts as zero. Static: ``inverse = 1 / x_scale``. A row that holds a NaN (dynamic: or an
    infinity) gets a NaN inverse, so that its output is NaN.
    """
    if group_size:
        m, k = x.shape
        groups = -(-k // group_size)
        padded = torch.nn.functional.pad(x, (0, groups * group_size - k))
        q, inverse = quantize_activations(padded.reshape(m * groups, group_size), None)
        return q.reshape(m, groups * group_size)[:, :k], inverse.reshape(m, groups)
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


def dequantize_activations(q: Tensor, inverse: Tensor, group_size: int) -> Tensor:
    """float32 ``[M, K]``: ``q / inverse`` of what :func:`quantize_activations` gave for groups."""
    return q / inverse.repeat_interleave(group_size, 1)[:, : q.shape[1]]
